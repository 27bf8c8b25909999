"""What the two models return."""

from dataclasses import dataclass, fields

from torch import Tensor


@dataclass
class PEAudioVideoOutput:
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
    attentions: dict[str, list[Tensor]] | None = None  # tower -> per layer (B, H, T, T); needs attention=eager

    def embeds(self) -> dict[str, Tensor]:
        """The embeddings that are not None, by their names in `config.HEADS`."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("_embeds")}
        return {name.removesuffix("_embeds"): value for name, value in values.items() if value is not None}


@dataclass
class PEAudioFrameOutput:
    """The output of `PEAudioFrame.forward`; row i compares text i with the positions of audio i."""

    audio_embeds: Tensor  # (B, positions, D), not normalized
    text_embeds: Tensor  # (B, D)
    logits: Tensor  # (B, positions) float32; -inf in the padding
    spans: list[list[list[float]]] | None  # per row [[start_s, end_s], …]; None in training, where it would be a sync
    text_last_hidden_state: Tensor  # (B, T, D) before the final norm
    audio_last_hidden_state: Tensor  # (B, positions, D)
