"""The video tower: frames -> vision transformer, one vector per frame -> temporal transformer."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_av.model.packing import has_values
from pe_av.model.transformer import TemporalTransformer
from pe_av.model.vit import VisionTransformer


def scale_frames(frames: Tensor) -> Tensor:
    """uint8 pixels of any shape -> float32 in [-1, 1]: scaled to [0, 1], then normalized with mean and std 0.5."""
    return frames.to(torch.float32).div_(255).sub_(0.5).div_(0.5)


class VideoEncoder(nn.Module):
    """`encode`: frames -> frame features; `forward`: frame features (B, F, vision_dim) -> pooled and sequence."""

    # Where no gradient is needed: a thousand frames take no more memory than eight of 24 × 24 patches. A GPU, to which
    # kernels for so few are no more work than launching them, takes 32 times as many. None: all at once, for sharded
    # layers, which gather their weights in every call, of which all ranks must make as many.
    patches_at_a_time: int | None = 8 * 24**2

    def __init__(self, vision: VisionTransformer, transformer: TemporalTransformer, vision_dim: int, hidden_size: int):
        super().__init__()
        self.vision = vision
        self.proj = nn.Linear(vision_dim, hidden_size, bias=False)
        self.data_proj = nn.Linear(hidden_size, hidden_size)
        self.transformer = transformer

    def encode(self, pixel_values_videos: Tensor, padding_mask_videos: Tensor | None = None) -> Tensor:
        """What can be cached while `vision` is frozen. Only valid frames are computed, a bounded number at a time.

        Args:
            pixel_values_videos: (B, F, 3, S, S) in [-1, 1], or uint8, which is scaled.
            padding_mask_videos: (B, F) bool, True where valid; None: all valid.
        Returns:
            (B, F, vision_dim) frame features of unit length, zeros at padding.
        """
        pixels = pixel_values_videos.flatten(0, 1)
        size, mask = pixel_values_videos.shape[:2], padding_mask_videos
        if mask is None or not has_values(mask):
            return self._encode(pixels).unflatten(0, size)
        valid = mask.flatten().nonzero()[:, 0]  # a host waits for a GPU here, once
        features = self._encode(pixels[valid])
        return features.new_zeros(len(pixels), features.shape[-1]).index_copy(0, valid, features).unflatten(0, size)

    def _encode(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, vision_dim)."""
        dtype = self.vision.patch_embed.weight.dtype
        pieces: Sequence[Tensor] = [pixels]
        if self.patches_at_a_time is not None and not torch.is_grad_enabled() and has_values(pixels):
            patches = self.patches_at_a_time * (32 if pixels.is_cuda else 1)
            pieces = pixels.split(max(1, patches // self.vision.grid**2))
        found = [self.vision((scale_frames(p) if p.dtype == torch.uint8 else p).to(dtype)) for p in pieces]
        return F.normalize(torch.cat(found), dim=-1)

    def forward(
        self, frame_features: Tensor, padding_mask_videos: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """
        Args:
            frame_features: (B, F, vision_dim).
            padding_mask_videos: (B, F) bool, True where valid, valid frames first; None: all valid.
        Returns:
            pooled (B, D), sequence (B, F, D), attention weights per layer (None unless attention="eager").
        """
        return self.transformer(self.data_proj(self.proj(frame_features)), padding_mask_videos)
