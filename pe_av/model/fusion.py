"""The fusion of audio and video: align the video with the audio, concatenate both, run a temporal transformer."""

import torch
from torch import Tensor, nn

from pe_av.model.align import align, nearest_index
from pe_av.model.transformer import TemporalTransformer


class FusionEncoder(nn.Module):
    """Audio (B, T, Da) and video (B, F, Dv) sequences -> pooled (B, D), sequence (B, T, D)."""

    def __init__(self, transformer: TemporalTransformer, audio_size: int, video_size: int, hidden_size: int):
        super().__init__()
        self.video_proj = nn.Linear(video_size, audio_size)  # the published 1×1 convolution
        self.video_norm = nn.LayerNorm(audio_size)
        self.concat_proj = nn.Linear(2 * audio_size, hidden_size)
        self.data_proj = nn.Linear(hidden_size, hidden_size)
        self.transformer = transformer

    def forward(
        self, audio: Tensor, video: Tensor, audio_mask: Tensor | None = None, video_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """
        Args:
            audio: (B, T, Da); audio_mask: (B, T) bool, True where valid, valid positions first; None: all valid.
            video: (B, F, Dv); video_mask: (B, F), likewise.
        Returns:
            pooled (B, D), sequence (B, T, D), attention weights per layer (None unless attention="eager").
        """
        video = align(self.video_proj(video), self.alignment(audio, video, audio_mask, video_mask))
        joined = self.concat_proj(torch.cat((audio, self.video_norm(video)), dim=-1))
        return self.transformer(self.data_proj(joined), audio_mask)

    @staticmethod
    def alignment(
        audio: Tensor, video: Tensor, audio_mask: Tensor | None = None, video_mask: Tensor | None = None
    ) -> Tensor:
        """Arguments as of `forward` -> (B, T), the frame of the video that stands beside each position of the audio."""
        audio_length, video_length = (
            torch.full((x.shape[0],), x.shape[1], device=x.device) if mask is None else mask.sum(1)
            for x, mask in ((audio, audio_mask), (video, video_mask))
        )
        return nearest_index(video_length, audio_length, audio.shape[1])
