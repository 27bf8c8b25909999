"""PE-AV: audio, video, audio+video and text in one space (arXiv 2512.19687)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from pe_av.config import HEADS, PAIRINGS, ModelConfig
from pe_av.loss import sigmoid_loss
from pe_av.model.build import build_audio, build_fusion, build_text, build_video, init_linear
from pe_av.model.features import (
    Features,
    audio_features,
    codec_to_features,
    frames_to_features,
    text_features,
    video_features,
)
from pe_av.model.heads import ContrastiveHead, PairLogits
from pe_av.model.text import TextBlock
from pe_av.model.transformer import Block, use_attention
from pe_av.model.vit import VisionBlock


@dataclass
class PEAudioVideoOutput:
    """What `PEAudioVideo.forward` returns; whatever the inputs do not allow is None.

    Embeddings are (B, D) and not normalized; `logits_<left>_<right>` are (B, B) float32, rows the left side.
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
    audio_last_hidden_state: Tensor | None = None  # (B, audio frames, D)
    video_last_hidden_state: Tensor | None = None  # (B, F, D)
    audio_video_last_hidden_state: Tensor | None = None  # (B, audio frames, D)
    attentions: dict[str, list[Tensor]] | None = None  # tower -> per layer (B, H, T, T); attention=eager only

    def embeds(self) -> dict[str, Tensor]:
        """The embeddings that there are, by the names of `config.PAIRINGS`."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("_embeds")}
        return {name.removesuffix("_embeds"): value for name, value in found.items() if value is not None}


class PEAudioVideo(nn.Module):
    """Three towers, a fusion of two of them, eight heads, and a scale and bias per pairing."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        towers, attention = config.towers, config.attention
        self.text = build_text(config.text, attention) if "text" in towers else None
        self.audio = build_audio(config.audio, attention) if "audio" in towers else None
        self.video = build_video(config.video, attention) if "video" in towers else None
        self.fusion = build_fusion(config, attention) if "fusion" in towers else None
        size = {
            "text": config.text.hidden_size,
            "audio": config.audio.transformer.hidden_size,
            "video": config.video.transformer.hidden_size,
            "fusion": config.fusion.hidden_size,
        }
        self.heads = nn.ModuleDict()
        for name in config.heads:
            read = HEADS[name] if name.endswith("_plus_text") else HEADS[name][-1:]
            self.heads[name] = ContrastiveHead(sum(size[part] for part in read), config.output_dim)
        self.logits = nn.ModuleDict(
            {
                pairing: PairLogits(config.logit_scale_init, config.logit_bias_init)
                for pairing, sides in PAIRINGS.items()
                if set(sides) <= set(config.heads)
            }
        )
        init_linear(self.heads, config.fusion.initializer_range)
        # the heads of the text start equal, so that sound and picture of a clip are drawn to one place from the start
        texts = [self.heads[name] for name in config.heads if name.startswith("text_")]
        for head in texts[1:]:
            head.load_state_dict(texts[0].state_dict())

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        padding_mask_videos: Tensor | None = None,
        codec_features: Tensor | None = None,
        frame_features: Tensor | None = None,
        return_loss: bool = False,
        loss_weights: dict[str, float] | None = None,
        output_attentions: bool = False,
    ) -> PEAudioVideoOutput:
        """Embed two or three of text, audio and video, row i of each belonging together.

        Args:
            input_ids: (B, T) token ids; attention_mask: (B, T).
            input_values: (B, 1, samples) 48 kHz mono in whole hops; padding_mask: (B, samples).
            pixel_values_videos: (B, F, 3, S, S) in [-1, 1], or uint8, which is scaled here and a quarter of the size
                on the way; padding_mask_videos: (B, F).
                Masks are bool, True where valid, valid positions first; None: all valid.
            codec_features: (B, frames, codebook_dim) from `audio.encode`, instead of input_values, for a codec that is
                frozen and clips that are seen often; padding_mask is then (B, frames).
            frame_features: (B, F, output_dim of the frame encoder) from `video.encode`, instead of
                pixel_values_videos, for a frame encoder that is frozen.
            return_loss: also the sigmoid contrastive loss of every pairing that the inputs allow, and their sum.
            loss_weights: weight of each pairing in the sum, 1 where not named.
            output_attentions: also the attention weights of each tower; the model must be built with attention=eager.
        Raises:
            ValueError: fewer than two inputs, inputs of different batch size, or an input the model cannot take.
        """
        if input_values is not None and codec_features is not None:
            raise ValueError("input_values and codec_features are the same audio twice: pass one of them")
        if pixel_values_videos is not None and frame_features is not None:
            raise ValueError("pixel_values_videos and frame_features are the same video twice: pass one of them")
        audio_input = input_values if codec_features is None else codec_features
        video_input = pixel_values_videos if frame_features is None else frame_features
        given = {"text": input_ids, "audio": audio_input, "video": video_input}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) < 2:
            use = {"text": "get_text_audio_embeds, get_text_video_embeds or get_text_audio_video_embeds"}
            only = next(iter(given), None)
            remedy = f"for {only} alone use {use.get(only, f'get_{only}_embeds')}" if only else "got none"
            raise ValueError(f"forward needs two of text, audio and video: {remedy}")
        if len({len(value) for value in given.values() if value.dim()}) > 1:
            counts = ", ".join(f"{len(value)} of {name}" for name, value in given.items())
            raise ValueError(
                f"inputs of different batch size ({counts}): pair them, or embed each with its get_* method"
            )
        if output_attentions and self.config.attention != "eager":
            raise ValueError(
                f"attention={self.config.attention} keeps no weights: build the model with attention=eager"
            )

        text = None if input_ids is None else self._text(input_ids, attention_mask)
        audio = None if input_values is None else self._audio(input_values, padding_mask)
        if codec_features is not None:
            audio = codec_to_features(self.audio, codec_features, padding_mask)
        video = None if pixel_values_videos is None else self._video(pixel_values_videos, padding_mask_videos)
        if frame_features is not None:
            video = frames_to_features(self.video, frame_features, padding_mask_videos)
        fused = self._fuse(audio, video) if audio and video and self.fusion else None
        towers = {"text": text, "audio": audio, "video": video, "audio_video": fused}
        towers = {name: features for name, features in towers.items() if features is not None}

        embeds = {}
        for name, head in self.heads.items():
            if name in towers:
                embeds[name] = head(towers[name].pooled)
            elif name.removeprefix("text_") in towers and text is not None:
                embeds[name] = head(text.pooled)
            elif name.removesuffix("_plus_text") in towers and text is not None:
                embeds[name] = self._plus_text(name, towers[name.removesuffix("_plus_text")].pooled, text.pooled)

        out = PEAudioVideoOutput(**{f"{name}_embeds": value for name, value in embeds.items()})
        for name, features in towers.items():
            setattr(out, f"{name}_last_hidden_state", features.sequence)
        if output_attentions:
            out.attentions = {name: features.attentions for name, features in towers.items()}
        for name in loss_weights or {}:
            if name not in PAIRINGS:
                raise ValueError(f"loss_weights: {name} is no pairing; known are {', '.join(PAIRINGS)}")
        for pairing, pair_logits in self.logits.items():
            left, right = PAIRINGS[pairing]
            if left in embeds and right in embeds:
                logits = pair_logits(embeds[left], embeds[right])
                setattr(out, f"logits_{pairing}", logits)
                if return_loss:
                    loss = sigmoid_loss(logits)
                    setattr(out, f"{pairing}_loss", loss)
                    weighted = loss * (loss_weights or {}).get(pairing, 1.0)
                    out.loss = weighted if out.loss is None else out.loss + weighted
        return out

    def embed(
        self,
        inputs: Mapping[str, Tensor],
        texts: Mapping[str | None, Mapping[str, Tensor]] | None = None,
        rows: Mapping[str, Tensor] | None = None,
        batch_size: int | None = None,
    ) -> dict[str, Tensor]:
        """Every embedding that a batch allows, also of clips that lack something and with captions of several kinds.

        Args:
            inputs: arguments of `forward` by name.
            texts: kind of caption -> `input_ids` and `attention_mask`; None: those of `inputs`, of kind None.
            rows: "audio", "video", "text", "text@<kind>" -> (n,) ascending numbers of the clips that its inputs are of,
                for a batch in which clips lack one or the other; "audio_video": the clips that have both. Where there
                are none, an input of one row is run all the same and its result dropped: on several ranks, all must run
                the same towers. None: every input has one row per clip.
            batch_size: number of clips, B; needed with `rows`.
        Returns:
            name, for captions of a kind with "@<kind>" -> (B, D); what stands in the row of a clip that lacks the
            inputs means nothing.
        """
        if texts is None:
            names = ("input_ids", "attention_mask")
            texts = {None: {name: inputs[name] for name in names if name in inputs}} if "input_ids" in inputs else {}
        towers: dict[str, Features] = {}
        if "codec_features" in inputs:
            towers["audio"] = codec_to_features(self.audio, inputs["codec_features"], inputs.get("padding_mask"))
        elif "input_values" in inputs:
            towers["audio"] = self._audio(inputs["input_values"], inputs.get("padding_mask"))
        if "frame_features" in inputs:
            mask = inputs.get("padding_mask_videos")
            towers["video"] = frames_to_features(self.video, inputs["frame_features"], mask)
        elif "pixel_values_videos" in inputs:
            towers["video"] = self._video(inputs["pixel_values_videos"], inputs.get("padding_mask_videos"))
        both = None if rows is None else rows.get("audio_video")
        if self.fusion is not None and len(towers) == 2 and (rows is None or both is not None):
            sides = (towers[name] if both is None else towers[name].at(rows[name], both) for name in ("audio", "video"))
            towers["audio_video"] = self._fuse(*sides)

        def pooled(name: str, features: Features) -> Tensor:  # (B, D), zeros for clips without
            if rows is None:
                return features.pooled
            found = features.pooled[: len(rows[name])]
            return found.new_zeros(batch_size, found.shape[1]).index_copy(0, rows[name], found)

        media = {name: pooled(name, tower) for name, tower in towers.items()}
        embeds = {name: self._head(name)(value) for name, value in media.items() if name in self.heads}
        for kind, tokens in texts.items():
            at = "" if kind is None else f"@{kind}"
            text = pooled(f"text{at}", self._text(tokens["input_ids"], tokens.get("attention_mask")))
            for name, head in self.heads.items():
                if name.startswith("text_"):
                    embeds[name + at] = head(text)
                elif name.removesuffix("_plus_text") in media and name.endswith("_plus_text"):
                    embeds[name + at] = self._plus_text(name, media[name.removesuffix("_plus_text")], text)
        return embeds

    def get_audio_embeds(self, input_values: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, 1, samples) -> (B, D), to be compared with `get_text_audio_embeds` and `get_video_embeds`."""
        return self._head("audio")(self._audio(input_values, padding_mask).pooled)

    def get_video_embeds(self, pixel_values_videos: Tensor, padding_mask_videos: Tensor | None = None) -> Tensor:
        """(B, F, 3, S, S) -> (B, D), to be compared with `get_text_video_embeds` and `get_audio_embeds`."""
        return self._head("video")(self._video(pixel_values_videos, padding_mask_videos).pooled)

    def get_audio_video_embeds(
        self,
        input_values: Tensor,
        pixel_values_videos: Tensor,
        padding_mask: Tensor | None = None,
        padding_mask_videos: Tensor | None = None,
    ) -> Tensor:
        """Audio and video of the same clips -> (B, D), to be compared with `get_text_audio_video_embeds`."""
        audio = self._audio(input_values, padding_mask)
        video = self._video(pixel_values_videos, padding_mask_videos)
        return self._head("audio_video")(self._fuse(audio, video).pooled)

    def get_text_audio_embeds(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, D), to be compared with `get_audio_embeds`."""
        return self._head("text_audio")(self._text(input_ids, attention_mask).pooled)

    def get_text_video_embeds(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, D), to be compared with `get_video_embeds`."""
        return self._head("text_video")(self._text(input_ids, attention_mask).pooled)

    def get_text_audio_video_embeds(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, D), to be compared with `get_audio_video_embeds`."""
        return self._head("text_audio_video")(self._text(input_ids, attention_mask).pooled)

    def get_audio_plus_text_embeds(
        self,
        input_ids: Tensor,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Sound and a caption of it -> (B, D), a joint query to be compared with `get_video_embeds`."""
        text = self._text(input_ids, attention_mask)
        audio = self._audio(input_values, padding_mask)
        return self._plus_text("audio_plus_text", audio.pooled, text.pooled)

    def get_video_plus_text_embeds(
        self,
        input_ids: Tensor,
        pixel_values_videos: Tensor,
        attention_mask: Tensor | None = None,
        padding_mask_videos: Tensor | None = None,
    ) -> Tensor:
        """Pictures and a caption of them -> (B, D), a joint query to be compared with `get_audio_embeds`."""
        text = self._text(input_ids, attention_mask)
        video = self._video(pixel_values_videos, padding_mask_videos)
        return self._plus_text("video_plus_text", video.pooled, text.pooled)

    def blocks(self) -> list[nn.Module]:
        """The repeated layers of all towers, in which nearly all of the memory and time goes."""
        unused = () if self.text is None else self.text.layers[self.text.nth :]  # they never run
        kinds = Block | TextBlock | VisionBlock
        return [module for module in self.modules() if isinstance(module, kinds) and module not in unused]

    def set_attention(self, implementation: str) -> None:
        """Compute attention by "eager", "sdpa" or "flex" from now on; the weights stay."""
        self.config = replace(self.config, attention=implementation)  # which refuses what cannot be
        use_attention(self, implementation)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of each part, as the meta device can also tell."""
        parts = {name: getattr(self, name) for name in self.config.towers}
        parts["heads"] = nn.ModuleList((self.heads, self.logits))
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}

    def _text(self, input_ids: Tensor, mask: Tensor | None) -> Features:
        return text_features(self.text, self.config.text, input_ids, mask)

    def _audio(self, input_values: Tensor, mask: Tensor | None) -> Features:
        return audio_features(self.audio, input_values, mask)

    def _video(self, pixel_values_videos: Tensor, mask: Tensor | None) -> Features:
        return video_features(self.video, pixel_values_videos, mask)

    def _fuse(self, audio: Features, video: Features) -> Features:
        if self.fusion is None:
            raise ValueError("this model was loaded without fusion: load it with towers that include it")
        pooled, sequence, attentions = self.fusion(audio.sequence, video.sequence, audio.mask, video.mask)
        return Features(pooled, sequence, audio.mask, attentions)

    def _plus_text(self, name: str, media: Tensor, text: Tensor) -> Tensor:
        return self._head(name)(torch.cat((media, text), dim=-1))

    def _head(self, name: str) -> ContrastiveHead:
        if name not in self.heads:
            raise ValueError(f"this model has no head for {name}_embeds; it makes {', '.join(self.heads)}")
        return self.heads[name]
