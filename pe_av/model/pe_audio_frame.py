"""PE-A-Frame: a text query against every moment of a sound (arXiv 2512.19687, the frame-level model)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pe_av.config import PEAudioFrameConfig
from pe_av.model.build import build_audio, build_text, init_linear
from pe_av.model.features import Features, audio_features, codec_to_features, text_features
from pe_av.model.heads import ContrastiveHead, PairLogits
from pe_av.model.transformer import use_attention


@dataclass
class PEAudioFrameOutput:
    """What `PEAudioFrame.forward` returns."""

    audio_embeds: Tensor  # (B, frames, D), not normalized
    text_embeds: Tensor  # (B, D)
    logits: Tensor  # (B, frames) float32; row i is text i against the frames of audio i; -inf where padding is
    spans: list[list[list[float]]] | None  # per row [[start_s, end_s], …]; None in training, which would wait for them
    text_last_hidden_state: Tensor  # (B, T, D) before the final norm
    audio_last_hidden_state: Tensor  # (B, frames, D)


class PEAudioFrame(nn.Module):
    """Text and audio towers, two heads, one scale and bias; 25 frames per second at the published sizes."""

    def __init__(self, config: PEAudioFrameConfig):
        super().__init__()
        self.config = config
        self.text = build_text(config.text, config.attention)
        self.audio = build_audio(config.audio, config.attention)
        self.heads = nn.ModuleDict(
            {
                "audio": ContrastiveHead(config.audio.transformer.hidden_size, config.output_dim),
                "text": ContrastiveHead(config.text.hidden_size, config.output_dim),
            }
        )
        init_linear(self.heads, config.audio.transformer.initializer_range)
        self.logits = PairLogits(config.logit_scale_init, config.logit_bias_init)

    def forward(
        self,
        input_ids: Tensor,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        codec_features: Tensor | None = None,
        threshold: float = 0.5,
    ) -> PEAudioFrameOutput:
        """When, in audio i, is what text i says to be heard?

        Args:
            input_ids: (B, T) token ids; attention_mask: (B, T).
            input_values: (B, 1, samples) 48 kHz mono in whole hops; padding_mask: (B, samples).
            codec_features: (B, frames, codebook_dim) instead of input_values; padding_mask is then (B, frames).
            threshold: a frame belongs to a span when its probability is above this.
        Raises:
            ValueError: an input that the model cannot take, or a threshold outside 0 … 1.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold} is no probability: give one from 0 to 1")
        if (input_values is None) == (codec_features is None):
            raise ValueError("give the audio once: input_values or codec_features")
        given = input_values if codec_features is None else codec_features
        if len(input_ids) != len(given):
            raise ValueError(f"{len(input_ids)} texts for {len(given)} sounds: text i is looked for in sound i")
        text = text_features(self.text, self.config.text, input_ids, attention_mask)
        if codec_features is None:
            audio = audio_features(self.audio, input_values, padding_mask)
        else:
            audio = codec_to_features(self.audio, codec_features, padding_mask)
        audio_embeds, text_embeds = self.heads["audio"](audio.sequence), self.heads["text"](text.pooled)
        logits = self.logits(audio_embeds, text_embeds[:, None])[..., 0]
        if audio.mask is not None:
            logits = logits.masked_fill(~audio.mask, -torch.inf)
        return PEAudioFrameOutput(
            audio_embeds=audio_embeds,
            text_embeds=text_embeds,
            logits=logits,
            spans=None if self.training else spans(logits.sigmoid() > threshold, self.seconds_per_position),
            text_last_hidden_state=text.sequence,
            audio_last_hidden_state=audio.sequence,
        )

    def get_audio_embeds(self, input_values: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, 1, samples) -> (B, frames, D)."""
        return self.heads["audio"](audio_features(self.audio, input_values, padding_mask).sequence)

    def get_text_embeds(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, D)."""
        features: Features = text_features(self.text, self.config.text, input_ids, attention_mask)
        return self.heads["text"](features.pooled)

    @property
    def seconds_per_position(self) -> float:
        codec = self.config.audio.codec
        return codec.hop_length / codec.sampling_rate

    def blocks(self) -> list[nn.Module]:
        """The repeated layers of both towers, in which nearly all of the memory and time goes."""
        return [*self.text.layers[: self.text.nth], *self.audio.transformer.layers]

    def set_attention(self, implementation: str) -> None:
        """Compute attention by "eager", "sdpa" or "flex" from now on; the weights stay."""
        self.config = replace(self.config, attention=implementation)
        use_attention(self, implementation)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of each part."""
        parts = {"text": self.text, "audio": self.audio, "heads": nn.ModuleList((self.heads, self.logits))}
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def spans(active: Tensor, seconds_per_position: float) -> list[list[list[float]]]:
    """Runs of active frames: (B, frames) bool -> per row [[start_s, end_s], …]; an end is the next frame's start."""
    edges = torch.nn.functional.pad(active.int(), (1, 1)).diff(dim=1)  # +1 where a run starts, -1 after its last frame
    found = []
    for row in edges.cpu():
        starts, ends = ((row == sign).nonzero().flatten().tolist() for sign in (1, -1))
        found.append([[a * seconds_per_position, b * seconds_per_position] for a, b in zip(starts, ends, strict=True)])
    return found
