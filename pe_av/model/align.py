"""Video to the audio's clock: nearest-neighbour resampling of each row's valid frames to its valid audio length."""

import torch
from einops import repeat
from torch import Tensor


def nearest_index(source_length: Tensor, target_length: Tensor, target_size: int) -> Tensor:
    """For every target position, the source position that `interpolate(mode="nearest")` reads.

    Args:
        source_length: (B,) valid frames of each row, at least 1.
        target_length: (B,) valid positions of each row, at most `target_size`.
    Returns:
        (B, target_size) indices into the source; positions past a row's target length repeat its last frame.
    """
    # float32 on purpose: the rule that we match rounds the scale to float32 before multiplying
    scale = source_length.float() / target_length.float()
    position = torch.arange(target_size, device=scale.device, dtype=torch.float32)
    index = (position * scale[:, None]).floor().long()
    return index.minimum(source_length[:, None] - 1)


def align(video: Tensor, video_length: Tensor, audio_length: Tensor, audio_size: int) -> Tensor:
    """(B, F, D) video at its own rate -> (B, audio_size, D) at the audio's rate.

    Args:
        video_length: (B,) valid frames; audio_length: (B,) valid audio positions.
    """
    index = nearest_index(video_length, audio_length, audio_size)
    return video.gather(1, repeat(index, "b t -> b t d", d=video.shape[-1]))
