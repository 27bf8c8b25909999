"""PE-A-Frame: where in an audio clip a text is heard (arXiv 2512.19687, the frame-level model).

What the paper calls audio frames are called positions here: 40 ms each at the published sizes.
"""

from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_av.config import PEAudioFrameConfig
from pe_av.model.build import build_audio, build_text, init_linear
from pe_av.model.features import audio_features, check_attentions, codec_to_features, keep_states, text_features
from pe_av.model.heads import ContrastiveHead, PairLogits
from pe_av.model.outputs import PEAudioFrameOutput
from pe_av.model.summary import Summary, summarize
from pe_av.model.transformer import use_attention


class PEAudioFrame(nn.Module):
    """Text and audio towers, a head for each, one scale and bias; a logit for every position of the audio."""

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
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> PEAudioFrameOutput:
        """Find the positions of audio i at which what text i describes is heard.

        Masks are bool, True where valid, with the valid entries first; None means that everything is valid.

        Args:
            input_ids: (B, T) token ids; attention_mask: (B, T).
            input_values: (B, 1, samples) 48 kHz mono in whole hops; padding_mask: (B, samples).
            codec_features: (B, positions, codebook_dim) from `audio.encode`, instead of input_values; padding_mask is
                then (B, positions).
            threshold: a position belongs to a span if its probability is above this.
            output_attentions: also return the attention weights of each tower; needs a model with attention=eager.
            output_hidden_states: also return the hidden states of each tower.
        Raises:
            ValueError: an input that the model cannot take, or a threshold outside 0 … 1.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold} is not a probability: choose one from 0 to 1")
        if (input_values is None) == (codec_features is None):
            raise ValueError("pass the audio once: either input_values or codec_features")
        audio_input = input_values if codec_features is None else codec_features
        if len(input_ids) != len(audio_input):
            raise ValueError(
                f"{len(input_ids)} texts for {len(audio_input)} audio clips: text i is looked for in audio i, so pass "
                "as many of one as of the other"
            )
        check_attentions(output_attentions, self.config.attention)
        transformers = {"text": self.text, "audio": self.audio.transformer}
        with keep_states(transformers) if output_hidden_states else nullcontext() as states:
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
            attentions={"text": text.attentions, "audio": audio.attentions} if output_attentions else None,
            hidden_states=states,
        )

    def get_audio_embeds(self, input_values: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, 1, samples) -> (B, positions, D)."""
        return self.heads["audio"](audio_features(self.audio, input_values, padding_mask).sequence)

    def get_text_embeds(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, D)."""
        return self.heads["text"](text_features(self.text, self.config.text, input_ids, attention_mask).pooled)

    @property
    def seconds_per_position(self) -> float:
        codec = self.config.audio.codec
        return codec.hop_length / codec.sampling_rate

    def blocks(self) -> list[nn.Module]:
        """The repeated layers of both towers that run, which take nearly all of the memory and time."""
        return [*self.text.layers[: self.text.nth], *self.audio.transformer.layers]

    def set_attention(self, implementation: str) -> None:
        """Compute attention by "eager", "sdpa" or "flex" from now on; the weights stay.

        Raises:
            ConfigError: an unknown implementation, or "flex" with dropout of attention weights.
        """
        self.config = replace(self.config, attention=implementation)
        use_attention(self, implementation)

    def parameter_counts(self) -> dict[str, int]:
        """Number of parameters of each tower and of the heads; works on the meta device too."""
        parts = {"text": self.text, "audio": self.audio, "heads": nn.ModuleList((self.heads, self.logits))}
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}

    def summary(self, seconds: float = 10.0, tokens: int = 32) -> Summary:
        """Parameters and operations of each tower, as a table, for one recording of this size and one text."""

        def run(model: PEAudioFrame, inputs: dict[str, Tensor]) -> None:
            model.get_text_embeds(inputs["input_ids"])
            model.get_audio_embeds(inputs["input_values"])

        return summarize(self, run, seconds, 0, tokens)


def spans(active: Tensor, seconds_per_position: float) -> list[list[list[float]]]:
    """Runs of active positions: (B, positions) bool -> per row [[start_s, end_s], …], where end_s is exclusive."""
    edges = F.pad(active.int(), (1, 1)).diff(dim=1)  # +1 where a run starts, -1 just after its last position
    rows = []
    for row in edges.cpu():
        starts, ends = ((row == sign).nonzero().flatten().tolist() for sign in (1, -1))
        rows.append([[a * seconds_per_position, b * seconds_per_position] for a, b in zip(starts, ends, strict=True)])
    return rows
