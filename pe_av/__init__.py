"""PE-AV (arXiv 2512.19687): audio, video, audio+video and text in one embedding space."""

from pe_av.checkpoint import build_model, load_model, save_model
from pe_av.embedding import embed_items
from pe_av.media.processor import Processor
from pe_av.model.pe_audio_frame import PEAudioFrame
from pe_av.model.pe_audio_video import PEAudioVideo

__all__ = ["PEAudioFrame", "PEAudioVideo", "Processor", "build_model", "embed_items", "load_model", "save_model"]
