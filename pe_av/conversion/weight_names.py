"""What the published formats call each of our weights, and in what shape they store it: the key maps, as tables.

A row of a table maps the beginning of our name to the beginning of theirs; the rest of the name stays, and "*" stands
for a layer's number. The first row that fits is taken; a name that no row fits is the same in both formats. "-" says
that the format does not have the weight. One table serves both directions: what a checkpoint must hold is exactly what
the names of our own model map to.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from pe_av.config import HEADS, ModelConfig, PEAudioFrameConfig

Rows = list[tuple[str, str]]  # (ours, theirs)


def _columns(table: str) -> tuple[Rows, ...]:
    """The rows of a table for each of the formats to the right of the first column."""
    lines = [line.split() for line in table.strip().splitlines() if line.strip()]
    return tuple([(line[0], line[column]) for line in lines] for column in range(1, len(lines[0])))


# ---------------------------------------------------------------------------------------------------------------------
# whole models

# ours                  transformers' PeAudioVideoModel                  the original's PEAudioVisual, whose towers and
#                                                                        fusion have "audio_visual_model." before this
_HF, _ORIGINAL = _columns("""
text.                   text_model.                                      text_model.

audio.codec.to_mean.    audio_model.audio_encoder.embedder.bottleneck.   audio_model.dac_vae_encoder.bottleneck.in_proj.
audio.codec.            audio_model.audio_encoder.embedder.dac_encoder.  audio_model.dac_vae_encoder.encoder.
audio.transformer.      audio_model.audio_encoder.                       audio_model.audio_transformer.
audio.                  audio_model.audio_encoder.embedder.              audio_model.

video.vision.           video_model.video_encoder.embedder.vision_model.timm_model.  visual_model.pe_encoder.
video.transformer.      video_model.video_encoder.                                   visual_model.visual_transformer.
video.                  video_model.video_encoder.embedder.                          visual_model.

fusion.transformer.     audio_video_encoder.            audio_visual_transformer.
fusion.                 audio_video_encoder.embedder.   audio_visual_transformer.

heads.audio.            audio_model.audio_head.         audio_head.
heads.video.            video_model.video_head.         visual_head.
heads.audio_video.      audio_video_head.               audio_visual_head.
heads.text_audio.       audio_model.text_audio_head.    audio_text_head.
heads.text_video.       video_model.text_video_head.    visual_text_head.
heads.text_audio_video. text_audio_video_head.          audio_visual_text_head.
heads.audio_plus_text.  audio_plus_text_head.           audio_plus_text_head.
heads.video_plus_text.  video_plus_text_head.           visual_plus_text_head.
heads.text.             audio_model.text_audio_head.    text_head.

logits.audio_text.              audio_model.text_audio_logit_   -
logits.video_text.              video_model.text_video_logit_   -
logits.audio_video.             audio_video_logit_              -
logits.audio_video_text.        text_audio_video_logit_         -
logits.audio_plus_text_video.   audio_plus_text_logit_          -
logits.video_plus_text_audio.   video_plus_text_logit_          -
logits.                         audio_model.text_audio_logit_   logit_
""")  # heads.text. and logits. are PEAudioFrame's: PeAudioFrameLevelModel and the original's PEAudioFrame

# ---------------------------------------------------------------------------------------------------------------------
# inside a tower

# ours                      in transformers                                    in the original
_TEMPORAL_HF, _TEMPORAL_ORIGINAL = _columns("""
class_token                 patch_embedder.class_embedding                     embeddings.cls_token
conv_blocks.0.conv.         patch_embedder.resnet_block.block1.project.        embeddings.resnet_block.block1.project.
conv_blocks.1.conv.         patch_embedder.resnet_block.block2.project.        embeddings.resnet_block.block2.project.
conv_blocks.0.              patch_embedder.resnet_block.block1.groupnorm.      embeddings.resnet_block.block1.groupnorm.
conv_blocks.1.              patch_embedder.resnet_block.block2.groupnorm.      embeddings.resnet_block.block2.groupnorm.
layers.*.attention.         layers.*.self_attn.                                layers.*.self_attn.
layers.*.attention_norm.    layers.*.input_layernorm.                          layers.*.input_layernorm.
layers.*.mlp_norm.          layers.*.post_attention_layernorm.                 layers.*.post_attention_layernorm.
""")

# ours                      in transformers          in the original
_FUSION_HF, _FUSION_ORIGINAL = _columns("""
video_proj.                 video_proj.              modality_aligner.conv.
video_norm.                 video_norm.              modality_aligner.layer_norm.
concat_proj.                concat_modality_proj.    concat_modality_proj.
""")

# ours                      timm's vit_pe_core_*, in transformers    PE-Core, in the original
TIMM, PE_CORE = _columns("""
class_token                 cls_token                                class_embedding
position                    pos_embed                                positional_embedding
patch_embed.                patch_embed.proj.                        conv1.
pre_norm.                   norm_pre.                                ln_pre.
post_norm.                  norm.                                    ln_post.
proj.weight                 head.weight                              proj
proj.bias                   head.bias                                proj.bias
layers.*.attention_norm.    blocks.*.norm1.                          transformer.resblocks.*.ln_1.
layers.*.mlp_norm.          blocks.*.norm2.                          transformer.resblocks.*.ln_2.
layers.*.qkv.               blocks.*.attn.qkv.                       transformer.resblocks.*.attn.in_proj_
layers.*.out.               blocks.*.attn.proj.                      transformer.resblocks.*.attn.out_proj.
layers.*.mlp.up.            blocks.*.mlp.fc1.                        transformer.resblocks.*.mlp.c_fc.
layers.*.mlp.down.          blocks.*.mlp.fc2.                        transformer.resblocks.*.mlp.c_proj.
pool.probe                  attn_pool.latent                         attn_pool.probe
pool.q.                     attn_pool.q.                             attn_pool.attn.in_proj_
pool.kv.                    attn_pool.kv.                            attn_pool.attn.in_proj_
pool.out.                   attn_pool.proj.                          attn_pool.attn.out_proj.
pool.mlp_norm.              attn_pool.norm.                          attn_pool.layernorm.
pool.mlp.up.                attn_pool.mlp.fc1.                       attn_pool.mlp.c_fc.
pool.mlp.down.              attn_pool.mlp.fc2.                       attn_pool.mlp.c_proj.
""")

# ours                      DAC, in both
(CODEC,) = _columns("""
conv_in.                    conv1.
conv_out.                   conv2.
snake.                      snake1.
stages.*.snake.             block.*.snake1.
stages.*.down.              block.*.conv1.
stages.*.units.0.           block.*.res_unit1.
stages.*.units.1.           block.*.res_unit2.
stages.*.units.2.           block.*.res_unit3.
""")

# ours                      ModernBERT, in both
(MODERNBERT,) = _columns("""
embedding.                  embeddings.tok_embeddings.
embedding_norm.             embeddings.norm.
layers.*.attention_norm.    layers.*.attn_norm.
layers.*.qkv.               layers.*.attn.Wqkv.
layers.*.out.               layers.*.attn.Wo.
layers.*.gate_up.           layers.*.mlp.Wi.
layers.*.down.              layers.*.mlp.Wo.
""")

_HEAD: Rows = [("norm.", "layer_norm.")]

# the table for what follows one of our prefixes
_SHARED = {"text.": MODERNBERT, "audio.codec.": CODEC} | {f"heads.{name}.": _HEAD for name in (*HEADS, "text")}
_TOWERS = ("audio.transformer.", "video.transformer.", "fusion.transformer.")
_INSIDE_HF = _SHARED | {"video.vision.": TIMM, "fusion.": _FUSION_HF} | dict.fromkeys(_TOWERS, _TEMPORAL_HF)
_INSIDE_ORIGINAL = (
    _SHARED | {"video.vision.": PE_CORE, "fusion.": _FUSION_ORIGINAL} | dict.fromkeys(_TOWERS, _TEMPORAL_ORIGINAL)
)


# ---------------------------------------------------------------------------------------------------------------------
# formats


ORIGINAL, TRANSFORMERS, OURS = "the original's", "transformers'", "ours"


@dataclass(frozen=True)
class Format:
    """A layout of weights; two checkpoints of one format differ only in size."""

    implementation: str  # ORIGINAL, TRANSFORMERS or OURS, each of which has a config format of its own
    model: str  # the class or classes in the implementation
    signs: tuple[str, ...]  # a checkpoint is of this format if a name in it begins with one of these
    heads: tuple[frozenset[str], ...] = ()  # the models that it can hold, by their heads; (): any
    rows: Sequence[tuple[str, str]] = ()  # the table of whole models; () for our own names

    def __str__(self) -> str:
        return f"{self.implementation} {self.model}".strip()

    def holds(self, config: ModelConfig | PEAudioFrameConfig) -> bool:
        """Whether a model of this config can be stored in this format."""
        return not self.heads or _heads(config) in self.heads

    def stored(self, name: str, shape: tuple[int, ...]) -> "StoredWeight | None":
        """How our weight of this name and shape is stored; None if the format does not have it."""
        theirs = self._rename(name)
        if theirs is None:
            return None
        if self.implementation != OURS and name == "fusion.video_proj.weight":  # theirs is a convolution of kernel 1
            return StoredWeight(theirs, (*shape, 1), lambda t: t[..., 0])
        if self.implementation == ORIGINAL and name.startswith("audio.codec.to_mean."):
            # mean and scale of the bottleneck in one tensor; only sampling, which we never do, needs the scale
            return StoredWeight(theirs, (2 * shape[0], *shape[1:]), lambda t: t[: shape[0]])
        if self.implementation == ORIGINAL and name.startswith("video.vision."):
            return stored_by_pe_core(name.removeprefix("video.vision."), theirs, shape)
        return StoredWeight(theirs, shape)

    def _rename(self, name: str) -> str | None:
        inside = _INSIDE_HF if self.implementation == TRANSFORMERS else _INSIDE_ORIGINAL
        for ours, theirs in self.rows:
            if name.startswith(ours):
                return None if theirs == "-" else theirs + rename(name.removeprefix(ours), inside.get(ours, []))
        return name


@dataclass(frozen=True)
class StoredWeight:
    """One of our weights as another format stores it."""

    name: str
    shape: tuple[int, ...]
    take: Callable[[Tensor], Tensor] = lambda tensor: tensor  # their tensor -> ours


_ALL, _AUDIO, _VIDEO = frozenset(HEADS), frozenset({"audio", "text_audio"}), frozenset({"video", "text_video"})
_FRAME = frozenset({"audio", "text"})
_NESTED = ("audio_model.", "visual_model.", "audio_visual_transformer.")

PE_AUDIO_VISUAL = Format(
    ORIGINAL,
    "PEAudioVisual",
    ("audio_visual_model.",),
    (_ALL,),
    [(ours, f"audio_visual_model.{name}" if name.startswith(_NESTED) else name) for ours, name in _ORIGINAL],
)
PE_AUDIO_VIDEO = Format(TRANSFORMERS, "PeAudioVideoModel", ("audio_video_encoder.",), (_ALL,), _HF)
FORMATS = (  # a checkpoint is of the first one that has its signs
    PE_AUDIO_VISUAL,
    Format(ORIGINAL, "PEAudioFrame", ("audio_model.audio_transformer.",), (_FRAME,), _ORIGINAL),
    PE_AUDIO_VIDEO,
    Format(
        TRANSFORMERS,
        "PeAudioModel or PeAudioFrameLevelModel",
        ("audio_encoder.",),
        (_AUDIO, _FRAME),
        [(ours, name.removeprefix("audio_model.")) for ours, name in _HF],
    ),
    Format(
        TRANSFORMERS,
        "PeVideoModel",
        ("video_encoder.",),
        (_VIDEO,),
        [(ours, name.removeprefix("video_model.")) for ours, name in _HF],
    ),
    Format(OURS, "", ("audio.transformer.", "video.transformer.")),
)

# PeAudioVideoModel holds these weights more than once; a file may have any or all of the copies
TIED = (  # (copy, main)
    ("audio_model.text_model.", "text_model."),
    ("video_model.text_model.", "text_model."),
    ("audio_video_encoder.embedder.audio_encoder.", "audio_model.audio_encoder."),
    ("audio_video_encoder.embedder.video_encoder.", "video_model.video_encoder."),
)
# buffers that follow from the config, and the output of the codec's bottleneck, which only a decoder needs
NOT_NEEDED = re.compile(r"rotary_emb\.(original_)?inv_freq$|\.rope\.pos_embed$|\.bottleneck\.out_proj\.(weight|bias)$")


def transformers_format(config: ModelConfig | PEAudioFrameConfig) -> Format | None:
    """The format in which transformers stores a model of this config; None if it has no class with these heads."""
    return next((f for f in FORMATS if f.implementation == TRANSFORMERS and f.holds(config)), None)


def rename(name: str, rows: Rows) -> str:
    """Our name within a part of the model -> theirs, by a table of that part."""
    for ours, theirs in rows:
        match = re.match(re.escape(ours).replace(r"\*", r"(\d+)"), name)
        if match:
            return theirs.replace("*", match[1] if "*" in ours else "") + name[match.end() :]
    return name


def stored_by_pe_core(name: str, theirs: str, shape: tuple[int, ...]) -> StoredWeight:
    """How the original stores a weight of the frame encoder: our name in it, its name in the file, our shape."""
    if name == "proj.weight":
        return StoredWeight(theirs, shape[::-1], lambda t: t.T)
    if name == "class_token":
        return StoredWeight(theirs, shape[2:], lambda t: t[None, None])
    if name == "position":
        return StoredWeight(theirs, shape[1:], lambda t: t[None])
    if name.startswith(("pool.q.", "pool.kv.")):  # one stacked tensor of query, key and value
        width = shape[0] if name.startswith("pool.q.") else shape[0] // 2
        rows = slice(None, width) if name.startswith("pool.q.") else slice(width, None)
        return StoredWeight(theirs, (3 * width, *shape[1:]), lambda t: t[rows])
    return StoredWeight(theirs, shape)


def _heads(config: ModelConfig | PEAudioFrameConfig) -> frozenset[str]:
    return _FRAME if isinstance(config, PEAudioFrameConfig) else frozenset(config.heads)
