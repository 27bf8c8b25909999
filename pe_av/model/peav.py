"""PE-AV: audio, video, audio+video and text in one space (arXiv 2512.19687)."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from ..config import PAIRINGS, CodecConfig, ModelConfig, TextConfig, TransformerConfig, VisionConfig
from ..loss import sigmoid_loss
from .audio import AudioEncoder
from .codec import CodecEncoder
from .fusion import FusionEncoder
from .heads import ContrastiveHead, PairLogits
from .text import ModernBERT, TextBlock
from .transformer import Block, TemporalTransformer
from .video import VideoEncoder
from .vit import AttentionPool, VisionBlock, VisionTransformer


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


@dataclass
class Features:
    """What a tower gives: its pooled (B, D) vector, its sequence (B, T, D), its mask (B, T) and attention weights."""

    pooled: Tensor
    sequence: Tensor
    mask: Tensor | None
    attentions: list[Tensor | None]


class PEAudioVideo(nn.Module):
    """Three towers, a fusion of two of them, eight heads, and a scale and bias per pairing."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        audio, video, attention = config.audio.transformer, config.video.transformer, config.attention
        text_size, output = config.text.hidden_size, config.output_dim
        self.text = _text(config.text, attention)
        self.audio = AudioEncoder(
            _codec(config.audio.codec), _temporal(audio, attention), config.audio.codec.codebook_dim, audio.hidden_size
        )
        self.video = VideoEncoder(
            _vision(config.video.vision, attention),
            _temporal(video, attention),
            config.video.vision.output_dim,
            video.hidden_size,
        )
        self.fusion = FusionEncoder(
            _temporal(config.fusion, attention), audio.hidden_size, video.hidden_size, config.fusion.hidden_size
        )
        self.heads = nn.ModuleDict(
            {
                "audio": ContrastiveHead(audio.hidden_size, output),
                "video": ContrastiveHead(video.hidden_size, output),
                "audio_video": ContrastiveHead(config.fusion.hidden_size, output),
                "text_audio": ContrastiveHead(text_size, output),
                "text_video": ContrastiveHead(text_size, output),
                "text_audio_video": ContrastiveHead(text_size, output),
                "audio_plus_text": ContrastiveHead(audio.hidden_size + text_size, output),
                "video_plus_text": ContrastiveHead(video.hidden_size + text_size, output),
            }
        )
        self.logits = nn.ModuleDict(
            {pairing: PairLogits(config.logit_scale_init, config.logit_bias_init) for pairing in PAIRINGS}
        )
        self._initialize()

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        padding_mask_videos: Tensor | None = None,
        codec_features: Tensor | None = None,
        return_loss: bool = False,
        loss_weights: dict[str, float] | None = None,
        output_attentions: bool = False,
    ) -> PEAudioVideoOutput:
        """Embed two or three of text, audio and video, row i of each belonging together.

        Args:
            input_ids: (B, T) token ids; attention_mask: (B, T).
            input_values: (B, 1, samples) 48 kHz mono in whole hops; padding_mask: (B, samples).
            pixel_values_videos: (B, F, 3, S, S) in [-1, 1]; padding_mask_videos: (B, F).
                Masks are bool, True where valid, valid positions first; None: all valid.
            codec_features: (B, frames, codebook_dim) from `audio.encode`, instead of input_values, for a codec that is
                frozen and clips that are seen often; padding_mask is then (B, frames).
            return_loss: also the sigmoid contrastive loss of every pairing that the inputs allow, and their sum.
            loss_weights: weight of each pairing in the sum, 1 where not named.
            output_attentions: also the attention weights of each tower; the model must be built with attention=eager.
        Raises:
            ValueError: fewer than two inputs, inputs of different batch size, or an input the model cannot take.
        """
        if input_values is not None and codec_features is not None:
            raise ValueError("input_values and codec_features are the same audio twice: pass one of them")
        audio_input = input_values if codec_features is None else codec_features
        given = {"text": input_ids, "audio": audio_input, "video": pixel_values_videos}
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
            audio = self._codec_features(codec_features, padding_mask)
        video = None if pixel_values_videos is None else self._video(pixel_values_videos, padding_mask_videos)
        fused = None if audio is None or video is None else self._fuse(audio, video)
        towers = {"text": text, "audio": audio, "video": video, "audio_video": fused}
        towers = {name: features for name, features in towers.items() if features is not None}

        embeds = {name: self.heads[name](towers[name].pooled) for name in towers if name != "text"}
        if text is not None:
            for name in list(embeds):
                embeds[f"text_{name}"] = self.heads[f"text_{name}"](text.pooled)
                if name != "audio_video":
                    embeds[f"{name}_plus_text"] = self._plus_text(name, towers[name], text)

        out = PEAudioVideoOutput(**{f"{name}_embeds": value for name, value in embeds.items()})
        for name, features in towers.items():
            setattr(out, f"{name}_last_hidden_state", features.sequence)
        if output_attentions:
            out.attentions = {name: features.attentions for name, features in towers.items()}
        for name in loss_weights or {}:
            if name not in PAIRINGS:
                raise ValueError(f"loss_weights: {name} is no pairing; known are {', '.join(PAIRINGS)}")
        for pairing, (left, right) in PAIRINGS.items():
            if left in embeds and right in embeds:
                logits = self.logits[pairing](embeds[left], embeds[right])
                setattr(out, f"logits_{pairing}", logits)
                if return_loss:
                    loss = sigmoid_loss(logits)
                    setattr(out, f"{pairing}_loss", loss)
                    weighted = loss * (loss_weights or {}).get(pairing, 1.0)
                    out.loss = weighted if out.loss is None else out.loss + weighted
        return out

    def get_audio_embeds(self, input_values: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, 1, samples) -> (B, D), to be compared with `get_text_audio_embeds` and `get_video_embeds`."""
        return self.heads["audio"](self._audio(input_values, padding_mask).pooled)

    def get_video_embeds(self, pixel_values_videos: Tensor, padding_mask_videos: Tensor | None = None) -> Tensor:
        """(B, F, 3, S, S) -> (B, D), to be compared with `get_text_video_embeds` and `get_audio_embeds`."""
        return self.heads["video"](self._video(pixel_values_videos, padding_mask_videos).pooled)

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
        return self.heads["audio_video"](self._fuse(audio, video).pooled)

    def get_text_audio_embeds(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, D), to be compared with `get_audio_embeds`."""
        return self.heads["text_audio"](self._text(input_ids, attention_mask).pooled)

    def get_text_video_embeds(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, D), to be compared with `get_video_embeds`."""
        return self.heads["text_video"](self._text(input_ids, attention_mask).pooled)

    def get_text_audio_video_embeds(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, D), to be compared with `get_audio_video_embeds`."""
        return self.heads["text_audio_video"](self._text(input_ids, attention_mask).pooled)

    def get_audio_plus_text_embeds(
        self,
        input_ids: Tensor,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Sound and a caption of it -> (B, D), a joint query to be compared with `get_video_embeds`."""
        text = self._text(input_ids, attention_mask)
        return self._plus_text("audio", self._audio(input_values, padding_mask), text)

    def get_video_plus_text_embeds(
        self,
        input_ids: Tensor,
        pixel_values_videos: Tensor,
        attention_mask: Tensor | None = None,
        padding_mask_videos: Tensor | None = None,
    ) -> Tensor:
        """Pictures and a caption of them -> (B, D), a joint query to be compared with `get_audio_embeds`."""
        text = self._text(input_ids, attention_mask)
        return self._plus_text("video", self._video(pixel_values_videos, padding_mask_videos), text)

    def blocks(self) -> list[nn.Module]:
        """The repeated layers of all towers, in which nearly all of the memory and time goes."""
        return [module for module in self.modules() if isinstance(module, Block | TextBlock | VisionBlock)]

    def set_attention(self, implementation: str) -> None:
        """Compute attention by "eager", "sdpa" or "flex" from now on; the weights stay."""
        self.config = replace(self.config, attention=implementation)  # which refuses what cannot be
        for module in self.modules():
            if hasattr(module, "implementation"):
                module.implementation = implementation

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of each part, as the meta device can also tell."""
        parts = {
            "text": self.text,
            "audio": self.audio,
            "video": self.video,
            "fusion": self.fusion,
            "heads": nn.ModuleList((self.heads, self.logits)),
        }
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}

    def _text(self, input_ids: Tensor, mask: Tensor | None) -> Features:
        _check(self, "input_ids", input_ids, 2, mask, "attention_mask", dim=1)
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids are {input_ids.dtype}: pass the tokenizer's integers")
        most = self.config.text.max_position_embeddings
        if input_ids.shape[1] > most:
            raise ValueError(f"input_ids have {input_ids.shape[1]} tokens, more than max_position_embeddings={most}")
        if input_ids.shape[1] == 0:
            raise ValueError("input_ids have no tokens: the tokenizer puts one even before an empty caption")
        if _values_can_be_read(self, input_ids):
            known = self.config.text.vocab_size
            wrong = input_ids[(input_ids < 0) | (input_ids >= known)]
            if wrong.numel():
                raise ValueError(
                    f"input_ids have {wrong[0]}, which is not in the vocabulary of {known}: wrong tokenizer?"
                )
        sequence, attentions = self.text(input_ids, mask)
        return Features(sequence[:, 0], sequence, mask, attentions)

    def _audio(self, input_values: Tensor, mask: Tensor | None) -> Features:
        _check(self, "input_values", input_values, 3, mask, "padding_mask", dim=2)
        hop = self.audio.codec.hop_length
        if input_values.shape[1] != 1:
            raise ValueError(f"input_values are {tuple(input_values.shape)}: average the channels to (B, 1, samples)")
        if input_values.shape[2] % hop or input_values.shape[2] == 0:
            raise ValueError(
                f"input_values have {input_values.shape[2]} samples, not whole hops of {hop}: the Processor pads them"
            )
        return self._codec_features(*self.audio.encode(input_values.to(self.audio.codec.to_mean.weight.dtype), mask))

    def _codec_features(self, features: Tensor, mask: Tensor | None) -> Features:
        _check(self, "codec_features", features, 3, mask, "padding_mask", dim=1)
        width = self.config.audio.codec.codebook_dim
        if features.shape[2] != width or features.shape[1] == 0:
            raise ValueError(f"codec_features are {tuple(features.shape)}, not (B, frames >= 1, codebook_dim={width})")
        pooled, sequence, attentions = self.audio(features.to(self.audio.data_proj.weight.dtype), mask)
        return Features(pooled, sequence, mask, attentions)

    def _video(self, pixel_values_videos: Tensor, mask: Tensor | None) -> Features:
        _check(self, "pixel_values_videos", pixel_values_videos, 5, mask, "padding_mask_videos", dim=1)
        size = self.config.video.vision.image_size
        if pixel_values_videos.shape[2:] != (3, size, size) or pixel_values_videos.shape[1] == 0:
            raise ValueError(
                f"pixel_values_videos are {tuple(pixel_values_videos.shape)}, not (B, frames >= 1, 3, {size}, {size}): "
                "the Processor resizes them"
            )
        pooled, sequence, attentions = self.video(pixel_values_videos.to(self.video.proj.weight.dtype), mask)
        return Features(pooled, sequence, mask, attentions)

    def _fuse(self, audio: Features, video: Features) -> Features:
        pooled, sequence, attentions = self.fusion(audio.sequence, video.sequence, audio.mask, video.mask)
        return Features(pooled, sequence, audio.mask, attentions)

    def _plus_text(self, name: str, tower: Features, text: Features) -> Tensor:
        return self.heads[f"{name}_plus_text"](torch.cat((tower.pooled, text.pooled), dim=-1))

    @torch.no_grad()
    def _initialize(self) -> None:
        """Normal weights of each part's own width, zero biases; the codec keeps PyTorch's fan-in scaled start."""
        config = self.config
        spread = {
            self.text: config.text.initializer_range,
            self.audio.data_proj: config.audio.transformer.initializer_range,
            self.audio.transformer: config.audio.transformer.initializer_range,
            self.video: config.video.transformer.initializer_range,
            self.video.vision: config.video.vision.initializer_range,
            self.fusion: config.fusion.initializer_range,
            self.heads: config.fusion.initializer_range,
        }
        for part, std in spread.items():
            for module in part.modules():
                if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding):
                    nn.init.normal_(module.weight, std=std)
                    if getattr(module, "bias", None) is not None:
                        nn.init.zeros_(module.bias)
                elif isinstance(module, TemporalTransformer | VisionTransformer):
                    if module.class_token is not None:
                        nn.init.normal_(module.class_token, std=std)
                    if isinstance(module, VisionTransformer):
                        nn.init.normal_(module.position, std=std)
                elif isinstance(module, AttentionPool):
                    nn.init.normal_(module.probe, std=std)


def _text(config: TextConfig, attention: str) -> ModernBERT:
    return ModernBERT(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        hidden_act=config.hidden_act,
        global_attn_every_n_layers=config.global_attn_every_n_layers,
        local_attention=config.local_attention,
        global_rope_theta=config.global_rope_theta,
        local_rope_theta=config.local_rope_theta,
        norm_eps=config.norm_eps,
        attention_dropout=config.attention_dropout,
        nth_text_layer=config.nth_text_layer,
        attention=attention,
    )


def _codec(config: CodecConfig) -> CodecEncoder:
    tile_frames = None
    if config.tile_seconds is not None:
        tile_frames = max(1, round(config.tile_seconds * config.sampling_rate / config.hop_length))
    return CodecEncoder(
        encoder_hidden_size=config.encoder_hidden_size,
        downsampling_ratios=config.downsampling_ratios,
        codebook_dim=config.codebook_dim,
        trainable=config.trainable,
        tile_frames=tile_frames,
    )


def _vision(config: VisionConfig, attention: str) -> VisionTransformer:
    return VisionTransformer(
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        output_dim=config.output_dim,
        use_class_token=config.use_class_token,
        pool_heads=config.pool_heads,
        rope_theta=config.rope_theta,
        attention=attention,
    )


def _temporal(config: TransformerConfig, attention: str) -> TemporalTransformer:
    return TemporalTransformer(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.key_value_heads,
        head_dim=config.head_dim,
        hidden_act=config.hidden_act,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope=config.rope_parameters,
        attention_bias=config.attention_bias,
        attention_dropout=config.attention_dropout,
        attention=attention,
    )


def _values_can_be_read(model: nn.Module, value: Tensor) -> bool:
    return not (model.training or value.is_meta or torch.compiler.is_compiling())


def _check(
    model: nn.Module, name: str, value: Tensor, dims: int, mask: Tensor | None, mask_name: str, dim: int
) -> None:
    """Shapes and types always; values only outside training, where a copy to the host does no harm."""
    if value.dim() != dims:
        raise ValueError(f"{name} has {value.dim()} dimensions {tuple(value.shape)}, not {dims}")
    if dims > 2 and not value.is_floating_point():
        raise ValueError(f"{name} is {value.dtype}: pass floating point values, as the Processor makes them")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"{mask_name} is {mask.dtype}: pass bool, True where valid")
        if mask.shape != (value.shape[0], value.shape[dim]):
            raise ValueError(
                f"{mask_name} is {tuple(mask.shape)}, not {(value.shape[0], value.shape[dim])} as {name} needs"
            )
    if not _values_can_be_read(model, value):
        return
    if dims > 2 and not value.isfinite().all():
        rows = (~value.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        raise ValueError(f"{name} has NaN or infinite values in rows {rows}")
    if mask is not None:
        if not mask.any(1).all():
            rows = (~mask.any(1)).nonzero().flatten().tolist()
            raise ValueError(f"{mask_name} masks the whole of rows {rows}: drop them from the batch")
        if (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError(f"{mask_name} has valid positions after padding: put the valid ones first")
