"""What the published formats call each of our weights, and in what shape they keep it.

Every table goes from our names to theirs, so one list serves both directions: what a checkpoint must hold is what our
model's own names come to.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Rules = list[tuple[str, str]]  # regular expression and replacement, for what follows a part's prefix

CODEC: Rules = [
    (r"^conv_in\.", "conv1."),
    (r"^conv_out\.", "conv2."),
    (r"^snake\.", "snake1."),
    (r"^stages\.(\d+)\.snake\.", r"block.\1.snake1."),
    (r"^stages\.(\d+)\.down\.", r"block.\1.conv1."),
    (r"^stages\.(\d+)\.units\.0\.", r"block.\1.res_unit1."),
    (r"^stages\.(\d+)\.units\.1\.", r"block.\1.res_unit2."),
    (r"^stages\.(\d+)\.units\.2\.", r"block.\1.res_unit3."),
]
TEMPORAL: Rules = [
    (r"^layers\.(\d+)\.attention\.", r"layers.\1.self_attn."),
    (r"^layers\.(\d+)\.attention_norm\.", r"layers.\1.input_layernorm."),
    (r"^layers\.(\d+)\.mlp_norm\.", r"layers.\1.post_attention_layernorm."),
]
# the two formats differ in the name of what comes before the layers
TEMPORAL_HF: Rules = [
    (r"^class_token$", "patch_embedder.class_embedding"),
    (r"^conv_blocks\.0\.conv\.", "patch_embedder.resnet_block.block1.project."),
    (r"^conv_blocks\.1\.conv\.", "patch_embedder.resnet_block.block2.project."),
    (r"^conv_blocks\.0\.(weight|bias)$", r"patch_embedder.resnet_block.block1.groupnorm.\1"),
    (r"^conv_blocks\.1\.(weight|bias)$", r"patch_embedder.resnet_block.block2.groupnorm.\1"),
    *TEMPORAL,
]
TEMPORAL_ORIGINAL: Rules = [
    (
        ours,
        theirs.replace("patch_embedder.class_embedding", "embeddings.cls_token").replace(
            "patch_embedder", "embeddings"
        ),
    )
    for ours, theirs in TEMPORAL_HF
]
MODERNBERT: Rules = [
    (r"^embedding\.", "embeddings.tok_embeddings."),
    (r"^embedding_norm\.", "embeddings.norm."),
    (r"^layers\.(\d+)\.attention_norm\.", r"layers.\1.attn_norm."),
    (r"^layers\.(\d+)\.qkv\.", r"layers.\1.attn.Wqkv."),
    (r"^layers\.(\d+)\.out\.", r"layers.\1.attn.Wo."),
    (r"^layers\.(\d+)\.gate_up\.", r"layers.\1.mlp.Wi."),
    (r"^layers\.(\d+)\.down\.", r"layers.\1.mlp.Wo."),
]
TIMM: Rules = [  # vit_pe_core_*
    (r"^class_token$", "cls_token"),
    (r"^position$", "pos_embed"),
    (r"^patch_embed\.", "patch_embed.proj."),
    (r"^pre_norm\.", "norm_pre."),
    (r"^post_norm\.", "norm."),
    (r"^proj\.", "head."),
    (r"^layers\.(\d+)\.attention_norm\.", r"blocks.\1.norm1."),
    (r"^layers\.(\d+)\.mlp_norm\.", r"blocks.\1.norm2."),
    (r"^layers\.(\d+)\.qkv\.", r"blocks.\1.attn.qkv."),
    (r"^layers\.(\d+)\.out\.", r"blocks.\1.attn.proj."),
    (r"^layers\.(\d+)\.mlp\.up\.", r"blocks.\1.mlp.fc1."),
    (r"^layers\.(\d+)\.mlp\.down\.", r"blocks.\1.mlp.fc2."),
    (r"^pool\.probe$", "attn_pool.latent"),
    (r"^pool\.out\.", "attn_pool.proj."),
    (r"^pool\.mlp_norm\.", "attn_pool.norm."),
    (r"^pool\.mlp\.up\.", "attn_pool.mlp.fc1."),
    (r"^pool\.mlp\.down\.", "attn_pool.mlp.fc2."),
    (r"^pool\.(q|kv)\.", r"attn_pool.\1."),
]
PE_CORE: Rules = [  # the original's
    (r"^class_token$", "class_embedding"),
    (r"^position$", "positional_embedding"),
    (r"^patch_embed\.", "conv1."),
    (r"^pre_norm\.", "ln_pre."),
    (r"^post_norm\.", "ln_post."),
    (r"^proj\.weight$", "proj"),
    (r"^layers\.(\d+)\.attention_norm\.", r"transformer.resblocks.\1.ln_1."),
    (r"^layers\.(\d+)\.mlp_norm\.", r"transformer.resblocks.\1.ln_2."),
    (r"^layers\.(\d+)\.qkv\.(weight|bias)$", r"transformer.resblocks.\1.attn.in_proj_\2"),
    (r"^layers\.(\d+)\.out\.", r"transformer.resblocks.\1.attn.out_proj."),
    (r"^layers\.(\d+)\.mlp\.up\.", r"transformer.resblocks.\1.mlp.c_fc."),
    (r"^layers\.(\d+)\.mlp\.down\.", r"transformer.resblocks.\1.mlp.c_proj."),
    (r"^pool\.probe$", "attn_pool.probe"),
    (r"^pool\.(?:q|kv)\.(weight|bias)$", r"attn_pool.attn.in_proj_\1"),
    (r"^pool\.out\.", "attn_pool.attn.out_proj."),
    (r"^pool\.mlp_norm\.", "attn_pool.layernorm."),
    (r"^pool\.mlp\.up\.", "attn_pool.mlp.c_fc."),
    (r"^pool\.mlp\.down\.", "attn_pool.mlp.c_proj."),
]
HEAD: Rules = [(r"^norm\.", "layer_norm.")]

# our prefix, their prefix, rules for the rest; the first prefix that fits is taken
Table = list[tuple[str, str, Rules]]

HF: Table = [  # transformers' PeAudioVideoModel
    ("text.", "text_model.", MODERNBERT),
    ("audio.codec.to_mean.", "audio_model.audio_encoder.embedder.bottleneck.", []),
    ("audio.codec.", "audio_model.audio_encoder.embedder.dac_encoder.", CODEC),
    ("audio.transformer.", "audio_model.audio_encoder.", TEMPORAL_HF),
    ("audio.", "audio_model.audio_encoder.embedder.", []),
    ("video.vision.", "video_model.video_encoder.embedder.vision_model.timm_model.", TIMM),
    ("video.transformer.", "video_model.video_encoder.", TEMPORAL_HF),
    ("video.", "video_model.video_encoder.embedder.", []),
    ("fusion.concat_proj.", "audio_video_encoder.embedder.concat_modality_proj.", []),
    ("fusion.transformer.", "audio_video_encoder.", TEMPORAL_HF),
    ("fusion.", "audio_video_encoder.embedder.", []),
    ("heads.audio.", "audio_model.audio_head.", HEAD),
    ("heads.video.", "video_model.video_head.", HEAD),
    ("heads.audio_video.", "audio_video_head.", HEAD),
    ("heads.text_audio.", "audio_model.text_audio_head.", HEAD),
    ("heads.text_video.", "video_model.text_video_head.", HEAD),
    ("heads.text_audio_video.", "text_audio_video_head.", HEAD),
    ("heads.audio_plus_text.", "audio_plus_text_head.", HEAD),
    ("heads.video_plus_text.", "video_plus_text_head.", HEAD),
    ("logits.audio_text.", "audio_model.text_audio_logit_", []),
    ("logits.video_text.", "video_model.text_video_logit_", []),
    ("logits.audio_video.", "audio_video_logit_", []),
    ("logits.audio_video_text.", "text_audio_video_logit_", []),
    ("logits.audio_plus_text_video.", "audio_plus_text_logit_", []),
    ("logits.video_plus_text_audio.", "video_plus_text_logit_", []),
]
# PeAudioModel and PeVideoModel are the two models that it holds
HF_AUDIO: Table = [(ours, theirs.removeprefix("audio_model."), rules) for ours, theirs, rules in HF]
HF_VIDEO: Table = [(ours, theirs.removeprefix("video_model."), rules) for ours, theirs, rules in HF]
HF_FRAME: Table = [  # PeAudioFrameLevelModel, with the weights of PeAudioModel
    ("heads.text.", "text_audio_head.", HEAD),
    ("logits.", "text_audio_logit_", []),
    *HF_AUDIO,
]

ORIGINAL: Table = [  # facebookresearch/perception_models, PEAudioVisual
    ("text.", "text_model.", MODERNBERT),
    ("audio.codec.to_mean.", "audio_visual_model.audio_model.dac_vae_encoder.bottleneck.in_proj.", []),
    ("audio.codec.", "audio_visual_model.audio_model.dac_vae_encoder.encoder.", CODEC),
    ("audio.transformer.", "audio_visual_model.audio_model.audio_transformer.", TEMPORAL_ORIGINAL),
    ("audio.", "audio_visual_model.audio_model.", []),
    ("video.vision.", "audio_visual_model.visual_model.pe_encoder.", PE_CORE),
    ("video.transformer.", "audio_visual_model.visual_model.visual_transformer.", TEMPORAL_ORIGINAL),
    ("video.", "audio_visual_model.visual_model.", []),
    ("fusion.video_proj.", "audio_visual_model.audio_visual_transformer.modality_aligner.conv.", []),
    ("fusion.video_norm.", "audio_visual_model.audio_visual_transformer.modality_aligner.layer_norm.", []),
    ("fusion.concat_proj.", "audio_visual_model.audio_visual_transformer.concat_modality_proj.", []),
    ("fusion.data_proj.", "audio_visual_model.audio_visual_transformer.data_proj.", []),
    ("fusion.transformer.", "audio_visual_model.audio_visual_transformer.", TEMPORAL_ORIGINAL),
    ("heads.audio.", "audio_head.", HEAD),
    ("heads.video.", "visual_head.", HEAD),
    ("heads.audio_video.", "audio_visual_head.", HEAD),
    ("heads.text_audio.", "audio_text_head.", HEAD),
    ("heads.text_video.", "visual_text_head.", HEAD),
    ("heads.text_audio_video.", "audio_visual_text_head.", HEAD),
    ("heads.audio_plus_text.", "audio_plus_text_head.", HEAD),
    ("heads.video_plus_text.", "visual_plus_text_head.", HEAD),
]
ORIGINAL_FRAME: Table = [  # facebookresearch/perception_models, PEAudioFrame
    *((ours, theirs.removeprefix("audio_visual_model."), rules) for ours, theirs, rules in ORIGINAL[:5]),
    ("heads.audio.", "audio_head.", HEAD),
    ("heads.text.", "text_head.", HEAD),
    ("logits.", "logit_", []),
]


@dataclass(frozen=True)
class Stored:
    """Where and how a format keeps one of our weights."""

    name: str
    shape: tuple[int, ...]
    take: Callable[[Tensor], Tensor]  # their tensor -> ours


def same(tensor: Tensor) -> Tensor:
    return tensor


def renamed(ours: str, table: Table) -> str | None:
    """Their name of our weight; None where the format does not have it."""
    for prefix, replacement, rules in table:
        if ours.startswith(prefix):
            rest = ours.removeprefix(prefix)
            for pattern, substitute in rules:
                changed = re.sub(pattern, substitute, rest)
                if changed != rest:
                    return replacement + changed
            return replacement + rest
    return None


def stored(ours: str, shape: tuple[int, ...], table: Table) -> Stored | None:
    """How a format keeps our weight of this name and shape; None where it does not have it."""
    theirs = renamed(ours, table)
    if theirs is None:
        return None
    if ours == "fusion.video_proj.weight":
        return Stored(theirs, (*shape, 1), lambda t: t[..., 0])  # a convolution of kernel 1
    if table in (ORIGINAL, ORIGINAL_FRAME):
        if ours.startswith("audio.codec.to_mean."):
            # mean and scale of the bottleneck in one; the scale is for sampling, which an encoder never does
            return Stored(theirs, (2 * shape[0], *shape[1:]), lambda t: t[: shape[0]])
        if ours.startswith("video.vision."):
            return stored_by_pe_core(ours.removeprefix("video.vision."), theirs, shape)
    return Stored(theirs, shape, same)


def stored_by_pe_core(part: str, theirs: str, shape: tuple[int, ...]) -> Stored:
    """The original frame encoder's way of keeping the vision weight `part` under the name `theirs`."""
    if part == "proj.weight":
        return Stored(theirs, shape[::-1], lambda t: t.T)
    if part == "class_token":
        return Stored(theirs, shape[2:], lambda t: t[None, None])
    if part == "position":
        return Stored(theirs, shape[1:], lambda t: t[None])
    if part.startswith(("pool.q.", "pool.kv.")):
        # the probe's query has another length than keys and values, so ours are two layers
        width = shape[0] if part.startswith("pool.q.") else shape[0] // 2
        half = slice(None, width) if part.startswith("pool.q.") else slice(width, None)
        return Stored(theirs, (3 * width, *shape[1:]), lambda t: t[half])
    return Stored(theirs, shape, same)
