"""What the two models return."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


def described(name: str, values: Mapping[str, Any]) -> str:
    """What a REPL shows of named values, a line each: numbers as they are, other tensors by their dtype and shape."""
    present = {key: value for key, value in values.items() if value is not None}
    width = max(map(len, present), default=0)
    lines = [f"\n  {key:<{width}}  {_in_short(value)}" for key, value in present.items()]
    return f"{name}({''.join(lines)}\n)" if lines else f"{name}()"


def _in_short(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.numel() == 1 and value.dim() == 0 and not value.is_meta:
            return f"{value.item():.6g}"
        elsewhere = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{elsewhere}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_in_short(inner)}" for key, inner in value.items())
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return f"{len(value)} × {_in_short(value[0])}"
    return repr(value)


class _Described:
    """The repr that the outputs share."""

    def __repr__(self) -> str:
        return described(type(self).__name__, vars(self))


@dataclass(repr=False)
class PEAudioVideoOutput(_Described):
    """The output of `PEAudioVideo.forward`; what cannot be computed from the given inputs is None.

    Embeddings are (B, D) and not normalized; `logits_<pairing>` are (B, B) float32, with the left side in the rows.
    """

    loss: Tensor | None = None
    audio_embeds: Tensor | None = None
    video_embeds: Tensor | None = None
    audio_video_embeds: Tensor | None = None
    text_audio_embeds: Tensor | None = None
    text_video_embeds: Tensor | None = None
    text_audio_video_embeds: Tensor | None = None
    audio_plus_text_embeds: Tensor | None = None
    video_plus_text_embeds: Tensor | None = None
    logits_audio_text: Tensor | None = None
    logits_video_text: Tensor | None = None
    logits_audio_video: Tensor | None = None
    logits_audio_video_text: Tensor | None = None
    logits_audio_plus_text_video: Tensor | None = None
    logits_video_plus_text_audio: Tensor | None = None
    audio_text_loss: Tensor | None = None
    video_text_loss: Tensor | None = None
    audio_video_loss: Tensor | None = None
    audio_video_text_loss: Tensor | None = None
    audio_plus_text_video_loss: Tensor | None = None
    video_plus_text_audio_loss: Tensor | None = None
    text_last_hidden_state: Tensor | None = None  # (B, T, D) before the final norm; token 0 is the text feature
    audio_last_hidden_state: Tensor | None = None  # (B, audio positions, D)
    video_last_hidden_state: Tensor | None = None  # (B, F, D)
    audio_video_last_hidden_state: Tensor | None = None  # (B, audio positions, D)
    # on request, by tower: "text", "audio", "video", "audio_video"
    attentions: dict[str, list[Tensor]] | None = None  # per layer (B, H, T, T); needs attention=eager
    # The input of the first layer and the output of each, (B, T, D): before the final norm. In all but text, position 0
    # is the class token, and T one more than in the last hidden state. What stands in padding means nothing.
    hidden_states: dict[str, list[Tensor]] | None = None
    alignment: Tensor | None = None  # (B, audio positions), the frame that the fusion sees at each; with hidden_states

    def embeds(self) -> dict[str, Tensor]:
        """The embeddings that are not None, by their names in `config.HEADS`."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("_embeds")}
        return {name.removesuffix("_embeds"): value for name, value in values.items() if value is not None}


@dataclass(repr=False)
class PEAudioFrameOutput(_Described):
    """The output of `PEAudioFrame.forward`; row i compares text i with the positions of audio i."""

    audio_embeds: Tensor  # (B, positions, D), not normalized
    text_embeds: Tensor  # (B, D)
    logits: Tensor  # (B, positions) float32; -inf in the padding
    spans: list[list[list[float]]] | None  # per row [[start_s, end_s], …]; None in training, where it would be a sync
    text_last_hidden_state: Tensor  # (B, T, D) before the final norm
    audio_last_hidden_state: Tensor  # (B, positions, D)
    attentions: dict[str, list[Tensor]] | None = None  # as in `PEAudioVideoOutput`, of "text" and "audio"
    hidden_states: dict[str, list[Tensor]] | None = None
