"""What embeddings depend on beside the code, as evaluations and collections of embeddings record it."""

import hashlib
from importlib.metadata import version
from pathlib import Path

import torch

from pe_av.checkpoint import WEIGHTS_FILE
from pe_av.config import ConfigError, ModelConfig, WindowsConfig
from pe_av.config.evaluation import EmbeddingConfig
from pe_av.data.manifest import Manifest
from pe_av.device import computes_in_bf16


def evaluation_setting(
    config: EmbeddingConfig, model: ModelConfig, clips: Manifest, device: torch.device
) -> dict[str, str | int | float | None]:
    """Everything beside the code that changes an embedding."""
    video = model.video
    return {
        "checkpoint_sha256": weights_sha256(Path(config.checkpoint)),
        "manifest_sha256": clips.sha256(),
        "clips": len(clips),
        "max_seconds": config.data.max_seconds,
        "windows": windows_text(config.windows),
        "sampling_rate": model.audio.codec.sampling_rate,
        "num_frames": video.num_frames,
        "frames_per_second": video.frames_per_second,
        "image_size": video.vision.image_size,
        "max_tokens": model.text.max_tokens,
        "precision": "bf16" if computes_in_bf16(config.precision, device) else "fp32",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "pe_av": version("pe-av"),
        "torch": torch.__version__,
    }


def windows_text(windows: WindowsConfig) -> str | None:
    """How clips were embedded in windows; None: they were not."""
    if windows.seconds is None:
        return None
    return f"{windows.seconds:g} s every {windows.hop or windows.seconds:g} s, {windows.combine}"


def weights_sha256(checkpoint: Path) -> str:
    """Of the weights of a native checkpoint.

    Raises:
        ConfigError: there are none.
    """
    path = checkpoint / WEIGHTS_FILE
    if not path.is_file():
        raise ConfigError(f"{checkpoint}: has no {WEIGHTS_FILE}; give the folder of a checkpoint")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
