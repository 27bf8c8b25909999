"""The video tower: frames -> vision transformer, one vector per frame -> temporal transformer."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pe_av.model.transformer import TemporalTransformer
from pe_av.model.vit import VisionTransformer


def scale_frames(frames: Tensor) -> Tensor:
    """uint8 pixels of any shape -> float32 in [-1, 1]: scaled to [0, 1], then normalized with mean and std 0.5."""
    return frames.to(torch.float32).div_(255).sub_(0.5).div_(0.5)


class VideoEncoder(nn.Module):
    """`encode`: frames -> frame features; `forward`: frame features (B, F, vision_dim) -> pooled and sequence."""

    def __init__(self, vision: VisionTransformer, transformer: TemporalTransformer, vision_dim: int, hidden_size: int):
        super().__init__()
        self.vision = vision
        self.proj = nn.Linear(vision_dim, hidden_size, bias=False)
        self.data_proj = nn.Linear(hidden_size, hidden_size)
        self.transformer = transformer

    def encode(self, pixel_values_videos: Tensor) -> Tensor:
        """(B, F, 3, S, S) in [-1, 1] -> (B, F, vision_dim) of unit length. Can be cached while `vision` is frozen."""
        batch = pixel_values_videos.shape[0]
        frames = self.vision(rearrange(pixel_values_videos, "b f c h w -> (b f) c h w"))
        return rearrange(F.normalize(frames, dim=-1), "(b f) d -> b f d", b=batch)

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
