"""Bring the video sequence to the rate of the audio, row by row, by nearest-neighbour resampling."""

import torch
from einops import repeat
from torch import Tensor


def nearest_index(source_length: Tensor, target_length: Tensor, target_size: int) -> Tensor:
    """For every target position, the index that `interpolate(mode="nearest")` reads from the source.

    Args:
        source_length: (B,) valid length of each source row, at least 1.
        target_length: (B,) valid length of each target row, at most `target_size`.
    Returns:
        (B, target_size) indices into the source; beyond a target row's end they point to its last valid position.
    """
    # interpolate rounds the scale to float32 before it multiplies, so the same indices need float32 here too
    scale = source_length.float() / target_length.float()
    position = torch.arange(target_size, device=scale.device, dtype=torch.float32)
    index = (position * scale[:, None]).floor().long()
    return index.minimum(source_length[:, None] - 1)


def align(video: Tensor, index: Tensor) -> Tensor:
    """The vectors of (B, F, D), one per frame, at the (B, T) indices of `nearest_index` -> (B, T, D)."""
    return video.gather(1, repeat(index, "b t -> b t d", d=video.shape[-1]))
