"""PE-AV: audio, video, audio+video and text in one embedding space (arXiv 2512.19687)."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from pe_av.config import HEADS, PAIRINGS, ModelConfig
from pe_av.loss import sigmoid_loss
from pe_av.model.build import build_audio, build_fusion, build_text, build_video, init_linear
from pe_av.model.features import (
    Features,
    audio_features,
    check_attentions,
    check_combination,
    codec_to_features,
    frames_to_features,
    keep_states,
    text_features,
    video_features,
)
from pe_av.model.heads import ContrastiveHead, PairLogits
from pe_av.model.outputs import PEAudioVideoOutput
from pe_av.model.summary import Summary, summarize
from pe_av.model.text import TextBlock
from pe_av.model.transformer import Block, use_attention
from pe_av.model.vit import VisionBlock


class PEAudioVideo(nn.Module):
    """Text, audio and video towers, the fusion of the last two, a head per embedding, a scale and bias per pairing."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        towers, attention = config.towers, config.attention
        self.text = build_text(config.text, attention) if "text" in towers else None
        self.audio = build_audio(config.audio, attention) if "audio" in towers else None
        self.video = build_video(config.video, attention) if "video" in towers else None
        self.fusion = build_fusion(config, attention) if "fusion" in towers else None
        width = {
            "text": config.text.hidden_size,
            "audio": config.audio.transformer.hidden_size,
            "video": config.video.transformer.hidden_size,
            "audio_video": config.fusion.hidden_size,
        }
        self.heads = nn.ModuleDict()
        for name in config.heads:
            self.heads[name] = ContrastiveHead(sum(width[tower] for tower in _read_by(name)), config.output_dim)
        self.logits = nn.ModuleDict(
            {
                pairing: PairLogits(config.logit_scale_init, config.logit_bias_init)
                for pairing, sides in PAIRINGS.items()
                if set(sides) <= set(config.heads)
            }
        )
        init_linear(self.heads, config.fusion.initializer_range)
        # all text heads start equal, so that the audio and video of a clip are drawn to the same place from the start
        text_heads = [self.heads[name] for name in config.heads if name.startswith("text_")]
        for head in text_heads[1:]:
            head.load_state_dict(text_heads[0].state_dict())

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
        output_hidden_states: bool = False,
    ) -> PEAudioVideoOutput:
        """Embed two or three of text, audio and video, where row i of each belongs to the same clip.

        Masks are bool, True where valid, with the valid entries first; None means that everything is valid.

        Args:
            input_ids: (B, T) token ids; attention_mask: (B, T).
            input_values: (B, 1, samples) 48 kHz mono in whole hops; padding_mask: (B, samples).
            pixel_values_videos: (B, F, 3, S, S) in [-1, 1], or uint8 (a quarter of the memory), which is scaled here;
                padding_mask_videos: (B, F).
            codec_features: (B, positions, codebook_dim) from `audio.encode`, instead of input_values; padding_mask is
                then (B, positions). Saves the codec where it is frozen and clips are seen often.
            frame_features: (B, F, output_dim of the frame encoder) from `video.encode`, instead of
                pixel_values_videos. Saves the frame encoder likewise.
            return_loss: also return the sigmoid contrastive loss of every pairing of the embeddings, and their sum.
            loss_weights: weight of each pairing in the sum; 1 for those not named.
            output_attentions: also return the attention weights of each tower; needs a model with attention=eager.
            output_hidden_states: also return the hidden states of each tower, and the alignment of video with audio.
        Raises:
            ValueError: fewer than two inputs, inputs of different batch size, or an input the model cannot take.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "input_values": input_values,
            "codec_features": codec_features,
            "padding_mask": padding_mask,
            "pixel_values_videos": pixel_values_videos,
            "frame_features": frame_features,
            "padding_mask_videos": padding_mask_videos,
        }
        inputs = {name: value for name, value in inputs.items() if value is not None}
        check_combination(inputs)
        check_attentions(output_attentions, self.config.attention)
        for name in loss_weights or {}:
            if name not in PAIRINGS:
                raise ValueError(f"loss_weights: {name} is not a pairing; known are {', '.join(PAIRINGS)}")

        with keep_states(self._transformers()) if output_hidden_states else nullcontext() as states:
            features = {"text": self._text_features(inputs)} if input_ids is not None else {}
            features |= self._media_features(inputs)
            if self.fusion is not None and "audio" in features and "video" in features:
                features["audio_video"] = self._fuse(features["audio"], features["video"])
        # the text is embedded only for what it can be compared with here
        heads = [name for name in self.heads if name.removeprefix("text_") in features or not name.startswith("text_")]
        embeds = self._apply_heads(heads, {name: tower.pooled for name, tower in features.items()})

        out = PEAudioVideoOutput(**{f"{name}_embeds": value for name, value in embeds.items()})
        for name, tower in features.items():
            setattr(out, f"{name}_last_hidden_state", tower.sequence)
        if output_attentions:
            out.attentions = {name: tower.attentions for name, tower in features.items()}
        if output_hidden_states:
            out.hidden_states = {name: states[name] for name in features}
            if "audio_video" in features:
                audio, video = features["audio"], features["video"]
                out.alignment = self.fusion.alignment(audio.sequence, video.sequence, audio.mask, video.mask)
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
        """Every embedding of a batch in which clips may lack a modality and have captions of several kinds.

        Args:
            inputs: arguments of `forward` by name.
            texts: kind of caption -> its `input_ids` and `attention_mask`. None: take those in `inputs`, as kind None.
            rows: which clips have what, for a batch in which some lack a modality: "audio", "video", "text" or
                "text@<kind>" -> (n,) ascending rows of the clips that these inputs belong to, and "audio_video" ->
                rows of the clips that have both. With n = 0 the input has one row all the same, which is computed and
                discarded, because all ranks must run the same towers. None: every input has one row per clip.
            batch_size: number of clips, B; needed with `rows`.
        Returns:
            embedding, with "@<kind>" appended if it depends on a caption of a kind -> (B, D). The rows of clips that
            lack one of its inputs are meaningless.
        """
        if texts is None:
            texts = {None: inputs} if "input_ids" in inputs else {}
        features = self._media_features(inputs)
        both = None if rows is None else rows.get("audio_video")
        if self.fusion is not None and len(features) == 2 and (rows is None or both is not None):
            audio, video = (
                features[name] if both is None else features[name].select(rows[name], both)
                for name in ("audio", "video")
            )
            features["audio_video"] = self._fuse(audio, video)

        def pooled_rows(name: str, tower: Features) -> Tensor:  # (B, D), zeros for clips that lack the input
            if rows is None:
                return tower.pooled
            present = tower.pooled[: len(rows[name])]
            return present.new_zeros(batch_size, present.shape[1]).index_copy(0, rows[name], present)

        pooled = {name: pooled_rows(name, tower) for name, tower in features.items()}
        with_text = [name for name in self.heads if "text" in HEADS[name]]
        embeds = self._apply_heads([name for name in self.heads if name not in with_text], pooled)
        for kind, tokens in texts.items():
            suffix = "" if kind is None else f"@{kind}"
            text = pooled_rows(f"text{suffix}", self._text_features(tokens))
            of_kind = self._apply_heads(with_text, pooled | {"text": text})
            embeds |= {name + suffix: value for name, value in of_kind.items()}
        return embeds

    def get_audio_embeds(self, input_values: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, 1, samples) -> (B, D); compare with `get_text_audio_embeds` and `get_video_embeds`."""
        return self._embed_one("audio", audio=(input_values, padding_mask))

    def get_video_embeds(self, pixel_values_videos: Tensor, padding_mask_videos: Tensor | None = None) -> Tensor:
        """(B, F, 3, S, S) -> (B, D); compare with `get_text_video_embeds` and `get_audio_embeds`."""
        return self._embed_one("video", video=(pixel_values_videos, padding_mask_videos))

    def get_audio_video_embeds(
        self,
        input_values: Tensor,
        pixel_values_videos: Tensor,
        padding_mask: Tensor | None = None,
        padding_mask_videos: Tensor | None = None,
    ) -> Tensor:
        """Audio and video of the same clips -> (B, D); compare with `get_text_audio_video_embeds`."""
        return self._embed_one(
            "audio_video", audio=(input_values, padding_mask), video=(pixel_values_videos, padding_mask_videos)
        )

    def get_text_audio_embeds(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, D); compare with `get_audio_embeds`."""
        return self._embed_one("text_audio", text=(input_ids, attention_mask))

    def get_text_video_embeds(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, D); compare with `get_video_embeds`."""
        return self._embed_one("text_video", text=(input_ids, attention_mask))

    def get_text_audio_video_embeds(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, D); compare with `get_audio_video_embeds`."""
        return self._embed_one("text_audio_video", text=(input_ids, attention_mask))

    def get_audio_plus_text_embeds(
        self,
        input_ids: Tensor,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Audio and a caption of it, as one joint query -> (B, D); compare with `get_video_embeds`."""
        return self._embed_one("audio_plus_text", text=(input_ids, attention_mask), audio=(input_values, padding_mask))

    def get_video_plus_text_embeds(
        self,
        input_ids: Tensor,
        pixel_values_videos: Tensor,
        attention_mask: Tensor | None = None,
        padding_mask_videos: Tensor | None = None,
    ) -> Tensor:
        """Video and a caption of it, as one joint query -> (B, D); compare with `get_audio_embeds`."""
        return self._embed_one(
            "video_plus_text", text=(input_ids, attention_mask), video=(pixel_values_videos, padding_mask_videos)
        )

    def blocks(self) -> list[nn.Module]:
        """The repeated layers of all towers that run, which take nearly all of the memory and time."""
        unused = () if self.text is None else self.text.layers[self.text.nth :]
        kinds = Block | TextBlock | VisionBlock
        return [module for module in self.modules() if isinstance(module, kinds) and module not in unused]

    def set_attention(self, implementation: str) -> None:
        """Compute attention by "eager", "sdpa" or "flex" from now on; the weights stay.

        Raises:
            ConfigError: an unknown implementation, or "flex" with dropout of attention weights.
        """
        self.config = replace(self.config, attention=implementation)
        use_attention(self, implementation)

    def parameter_counts(self) -> dict[str, int]:
        """Number of parameters of each tower and of all heads; works on the meta device too."""
        parts = {name: getattr(self, name) for name in self.config.towers}
        parts["heads"] = nn.ModuleList((self.heads, self.logits))
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}

    def summary(self, seconds: float = 10.0, frames: int = 16, tokens: int = 32) -> Summary:
        """Parameters and operations of each tower, as a table, for all embeddings of one clip of this size."""
        return summarize(self, PEAudioVideo.embed, seconds, frames, tokens)

    def _embed_one(self, name: str, **inputs: tuple[Tensor, Tensor | None]) -> Tensor:
        """The embedding `name` (B, D); `inputs` are the modalities that it is made from, each with its mask."""
        if name not in self.heads:
            raise ValueError(
                f"this model has no head for {name}_embeds, only for {', '.join(self.heads)}: "
                f"load it with towers={HEADS[name]}"
            )
        features = {}
        if "text" in inputs:
            features["text"] = text_features(self.text, self.config.text, *inputs["text"])
        if "audio" in inputs:
            features["audio"] = audio_features(self.audio, *inputs["audio"])
        if "video" in inputs:
            features["video"] = video_features(self.video, *inputs["video"])
        if name == "audio_video":
            features["audio_video"] = self._fuse(features["audio"], features["video"])
        return self._apply_heads([name], {tower: value.pooled for tower, value in features.items()})[name]

    def _transformers(self) -> dict[str, nn.Module | None]:
        """By the names of the features that they compute; None: a tower that the model lacks."""
        over_time = {"audio": self.audio, "video": self.video, "audio_video": self.fusion}
        return {"text": self.text} | {name: part and part.transformer for name, part in over_time.items()}

    def _text_features(self, inputs: Mapping[str, Tensor]) -> Features:
        return text_features(self.text, self.config.text, inputs["input_ids"], inputs.get("attention_mask"))

    def _media_features(self, inputs: Mapping[str, Tensor]) -> dict[str, Features]:
        """The output of the audio and the video tower, as far as `inputs`, arguments of `forward`, has their input."""
        features = {}
        mask = inputs.get("padding_mask")
        if "codec_features" in inputs:
            features["audio"] = codec_to_features(self.audio, inputs["codec_features"], mask)
        elif "input_values" in inputs:
            features["audio"] = audio_features(self.audio, inputs["input_values"], mask)
        mask = inputs.get("padding_mask_videos")
        if "frame_features" in inputs:
            features["video"] = frames_to_features(self.video, inputs["frame_features"], mask)
        elif "pixel_values_videos" in inputs:
            features["video"] = video_features(self.video, inputs["pixel_values_videos"], mask)
        return features

    def _fuse(self, audio: Features, video: Features) -> Features:
        pooled, sequence, attentions = self.fusion(audio.sequence, video.sequence, audio.mask, video.mask)
        return Features(pooled, sequence, audio.mask, attentions)

    def _apply_heads(self, names: Iterable[str], pooled: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The embeddings `names`, leaving out those that read a tower that is not in `pooled` (tower -> (B, D))."""
        embeds = {}
        for name in names:
            towers = _read_by(name)
            if all(tower in pooled for tower in towers):
                read = [pooled[tower] for tower in towers]
                embeds[name] = self.heads[name](read[0] if len(read) == 1 else torch.cat(read, dim=-1))
        return embeds


def _read_by(head: str) -> tuple[str, ...]:
    """The towers whose pooled features the head reads, concatenated: "audio_plus_text" -> ("audio", "text")."""
    if head.endswith("_plus_text"):
        return HEADS[head]
    return ("text",) if head.startswith("text_") else (head,)
