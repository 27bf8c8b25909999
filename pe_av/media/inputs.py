"""Arrays and tensors that users pass as audio or video: checked, and brought to one layout."""

from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from pe_av.media.tracks import MediaError

MIN_RATE, MAX_RATE = 1_000, 1_000_000  # Hz; a lower number was meant as kHz


def to_waveform(audio: Any) -> Tensor:
    """A user's (samples,) or (channels, samples), floating point or integer -> (channels, samples) float32.

    Raises:
        MediaError: it is anything else, or has no samples.
    """
    waveform = _to_tensor(audio, "a waveform")
    shape = tuple(waveform.shape)
    if waveform.ndim not in (1, 2):
        raise MediaError(f"a waveform of shape {shape}; pass (samples,) or (channels, samples), and a batch as a list")
    if 0 in shape:
        raise MediaError(f"a waveform of shape {shape} has no samples; leave the item out")
    if waveform.ndim == 2 and shape[0] > shape[1]:
        raise MediaError(f"a waveform of shape {shape} has more channels than samples; transpose it")
    if waveform.dtype in (torch.int16, torch.int32):
        waveform = waveform.float() / -float(torch.iinfo(waveform.dtype).min)
    elif not waveform.is_floating_point():
        raise MediaError(f"a waveform of {waveform.dtype}; pass floating point in [-1, 1], int16 or int32")
    return waveform.float() if waveform.ndim == 2 else waveform.float()[None]


def to_rate(sampling_rate: Any) -> int:
    """A user's sampling rate of waveforms, as an integer.

    Raises:
        MediaError: it is not given, or not a possible rate.
    """
    if sampling_rate is None:
        raise MediaError("a waveform does not say its sampling rate; pass it as sampling_rate=, in Hz")
    is_whole = isinstance(sampling_rate, int | float | np.number) and float(sampling_rate).is_integer()
    if not is_whole or not MIN_RATE <= sampling_rate <= MAX_RATE:
        raise MediaError(
            f"sampling_rate={sampling_rate} is not a whole number of Hz between {MIN_RATE} and {MAX_RATE}; "
            "pass the rate at which the audio was recorded, e.g. 48000"
        )
    return int(sampling_rate)


def to_frames(video: Any) -> Tensor:
    """A user's (F, 3, H, W) or (F, H, W, 3) uint8 -> (F, 3, H, W) uint8. An image is a video of one frame: a PIL image
    of any mode, turned upright, or (3, H, W) or (H, W, 3) uint8.

    Raises:
        MediaError: it is anything else, or has no frames.
    """
    if type(video).__module__.startswith("PIL."):
        from PIL import ImageOps  # whoever has a PIL image has Pillow

        video = np.asarray(ImageOps.exif_transpose(video).convert("RGB"))
    frames = _to_tensor(video, "frames")
    shape = tuple(frames.shape)
    if frames.ndim == 3:
        frames = frames[None]
    if frames.ndim != 4:
        raise MediaError(f"frames of shape {shape}; pass (F, 3, H, W) or (F, H, W, 3), and a batch as a list of videos")
    if frames.dtype != torch.uint8:
        raise MediaError(f"frames of {frames.dtype}; pass uint8 from 0 to 255, the processor scales them")
    if 0 in shape:
        raise MediaError(f"frames of shape {shape} have no pixels; leave the item out")
    if (frames.shape[1] == 3) == (frames.shape[3] == 3):
        first, forms = "second", "(F, 3, H, W) or (F, H, W, 3)"
        if len(shape) == 3:
            first, forms = "first", "(3, H, W) or (H, W, 3) of an image"
        raise MediaError(
            f"frames of shape {shape}; exactly one of the {first} and the last dimension must be 3, for RGB: "
            f"pass {forms}"
        )
    return frames if frames.shape[1] == 3 else rearrange(frames, "f h w c -> f c h w")


def _to_tensor(item: Any, name: str) -> Tensor:
    if isinstance(item, np.ndarray) and item.dtype.kind in "biuf" and item.dtype.itemsize <= 8:
        # torch shares memory only with writable arrays in native byte order and without negative strides
        return torch.from_numpy(np.require(item, item.dtype.newbyteorder("="), ["C", "W"]))
    if isinstance(item, Tensor):
        return item.detach().cpu()
    kind = f"an array of {item.dtype}" if isinstance(item, np.ndarray) else f"of type {type(item).__name__}"
    raise MediaError(f"is {kind}; pass a path, or {name} as a tensor or array")
