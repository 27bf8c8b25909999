"""The audio tower: waveform -> codec latents at 25 per second -> transformer over time."""

from torch import Tensor, nn

from pe_av.model.codec import CodecEncoder
from pe_av.model.transformer import TemporalTransformer


class AudioEncoder(nn.Module):
    """Codec features (B, T, codebook_dim), `encode`d from a waveform -> pooled (B, D) and sequence (B, T, D)."""

    def __init__(self, codec: CodecEncoder, transformer: TemporalTransformer, codebook_dim: int, hidden_size: int):
        super().__init__()
        self.codec = codec
        self.data_proj = nn.Linear(codebook_dim, hidden_size)
        self.transformer = transformer

    def encode(self, input_values: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The part that comes before anything learned, while the codec is frozen.

        Args:
            input_values: (B, 1, samples), whole hops of 48 kHz mono.
            padding_mask: (B, samples) bool, True where valid, valid samples first.
        Returns:
            codec features (B, frames, codebook_dim) and their mask (B, frames) or None.
        """
        if padding_mask is None:
            return self.codec(input_values), None
        frame_mask = padding_mask[:, :: self.codec.hop_length]
        return self.codec(input_values * padding_mask[:, None], frame_mask), frame_mask

    def forward(
        self, codec_features: Tensor, frame_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """
        Args:
            codec_features: (B, frames, codebook_dim); frame_mask: (B, frames) bool, True where valid.
        Returns:
            pooled (B, D), sequence (B, frames, D), attention weights per layer.
        """
        return self.transformer(self.data_proj(codec_features), frame_mask)
