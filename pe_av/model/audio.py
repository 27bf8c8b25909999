"""The audio tower: waveform -> codec features, 25 positions per second -> temporal transformer."""

from torch import Tensor, nn

from pe_av.model.codec import CodecEncoder
from pe_av.model.transformer import TemporalTransformer


class AudioEncoder(nn.Module):
    """`encode`: waveform -> codec features; `forward`: codec features (B, T, codebook_dim) -> pooled and sequence."""

    def __init__(self, codec: CodecEncoder, transformer: TemporalTransformer, codebook_dim: int, hidden_size: int):
        super().__init__()
        self.codec = codec
        self.data_proj = nn.Linear(codebook_dim, hidden_size)
        self.transformer = transformer

    def encode(self, input_values: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Run the codec. While it is frozen, the result never changes and can be cached.

        Args:
            input_values: (B, 1, samples) mono at the codec's sampling rate, whole hops.
            padding_mask: (B, samples) bool, True where valid, valid samples first.
        Returns:
            codec features (B, T, codebook_dim) and their mask (B, T), or None without a `padding_mask`.
        """
        if padding_mask is None:
            return self.codec(input_values), None
        position_mask = padding_mask[:, :: self.codec.hop_length]
        return self.codec(input_values * padding_mask[:, None], position_mask), position_mask

    def forward(
        self, codec_features: Tensor, position_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """
        Args:
            codec_features: (B, T, codebook_dim).
            position_mask: (B, T) bool, True where valid, valid positions first; None: all valid.
        Returns:
            pooled (B, D), sequence (B, T, D), attention weights per layer (None unless attention="eager").
        """
        return self.transformer(self.data_proj(codec_features), position_mask)
