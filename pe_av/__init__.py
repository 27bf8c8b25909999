"""PE-AV (arXiv 2512.19687): audio, video, audio+video and text in one embedding space."""

from .checkpoint import build_model, load_model, save_model
from .data.processor import Processor
from .model.frame import PEAudioFrame
from .model.peav import PEAudioVideo

__all__ = ["PEAudioFrame", "PEAudioVideo", "Processor", "build_model", "load_model", "save_model"]
