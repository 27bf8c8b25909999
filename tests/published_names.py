"""The weights of the two published formats under our names: a table of renames for each, and the few tensors that
change shape on the way."""

import re

from torch import Tensor

Renames = list[tuple[str, str]]  # regular expression and replacement, applied to every name from the top down

TEMPORAL: Renames = [
    (r"\.(embeddings|patch_embedder)\.(cls_token|class_embedding)$", ".class_token"),
    (r"\.(embeddings|patch_embedder)\.resnet_block\.block1\.", ".conv_blocks.0."),
    (r"\.(embeddings|patch_embedder)\.resnet_block\.block2\.", ".conv_blocks.1."),
    (r"(conv_blocks\.\d)\.groupnorm\.", r"\1."),
    (r"(conv_blocks\.\d)\.project\.", r"\1.conv."),
    (r"\.self_attn\.", ".attention."),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".mlp_norm."),
]
CODEC: Renames = [
    (r"\.block\.(\d)\.res_unit1\.", r".stages.\1.units.0."),
    (r"\.block\.(\d)\.res_unit2\.", r".stages.\1.units.1."),
    (r"\.block\.(\d)\.res_unit3\.", r".stages.\1.units.2."),
    (r"\.block\.(\d)\.snake1\.", r".stages.\1.snake."),
    (r"\.block\.(\d)\.conv1\.", r".stages.\1.down."),
    (r"^audio\.codec\.conv1\.", "audio.codec.conv_in."),
    (r"^audio\.codec\.snake1\.", "audio.codec.snake."),
    (r"^audio\.codec\.conv2\.", "audio.codec.conv_out."),
]
TEXT: Renames = [
    (r"^text_model\.embeddings\.tok_embeddings\.", "text.embedding."),
    (r"^text_model\.embeddings\.norm\.", "text.embedding_norm."),
    (r"^text_model\.", "text."),
    (r"^text\.layers\.(\d+)\.attn_norm\.", r"text.layers.\1.attention_norm."),
    (r"^text\.layers\.(\d+)\.attn\.Wqkv\.", r"text.layers.\1.qkv."),
    (r"^text\.layers\.(\d+)\.attn\.Wo\.", r"text.layers.\1.out."),
    (r"^text\.layers\.(\d+)\.mlp\.Wi\.", r"text.layers.\1.gate_up."),
    (r"^text\.layers\.(\d+)\.mlp\.Wo\.", r"text.layers.\1.down."),
]

# facebookresearch/perception_models
ORIGINAL: Renames = [
    (r"^audio_visual_model\.audio_model\.dac_vae_encoder\.encoder\.", "audio.codec."),
    (r"^audio_visual_model\.audio_model\.dac_vae_encoder\.bottleneck\.in_proj\.", "audio.codec.to_mean."),
    (r"^audio_visual_model\.audio_model\.audio_transformer\.", "audio.transformer."),
    (r"^audio_visual_model\.audio_model\.", "audio."),
    (r"^audio_visual_model\.visual_model\.pe_encoder\.", "video.vision."),
    (r"^audio_visual_model\.visual_model\.visual_transformer\.", "video.transformer."),
    (r"^audio_visual_model\.visual_model\.", "video."),
    (r"^audio_visual_model\.audio_visual_transformer\.modality_aligner\.conv\.", "fusion.video_proj."),
    (r"^audio_visual_model\.audio_visual_transformer\.modality_aligner\.layer_norm\.", "fusion.video_norm."),
    (r"^audio_visual_model\.audio_visual_transformer\.concat_modality_proj\.", "fusion.concat_proj."),
    (r"^audio_visual_model\.audio_visual_transformer\.data_proj\.", "fusion.data_proj."),
    (r"^audio_visual_model\.audio_visual_transformer\.", "fusion.transformer."),
    *CODEC,
    *TEMPORAL,
    *TEXT,
    (r"^video\.vision\.class_embedding$", "video.vision.class_token"),
    (r"^video\.vision\.positional_embedding$", "video.vision.position"),
    (r"^video\.vision\.proj$", "video.vision.proj.weight"),
    (r"^video\.vision\.conv1\.", "video.vision.patch_embed."),
    (r"^video\.vision\.ln_pre\.", "video.vision.pre_norm."),
    (r"^video\.vision\.ln_post\.", "video.vision.post_norm."),
    (r"^video\.vision\.transformer\.resblocks\.", "video.vision.layers."),
    (r"^video\.vision\.attn_pool\.layernorm\.", "video.vision.pool.mlp_norm."),
    (r"^video\.vision\.attn_pool\.", "video.vision.pool."),
    (r"^video\.vision\.(.+)\.attn\.in_proj_", r"video.vision.\1.qkv."),
    (r"^video\.vision\.(.+)\.attn\.out_proj\.", r"video.vision.\1.out."),
    (r"^video\.vision\.(.+)\.ln_1\.", r"video.vision.\1.attention_norm."),
    (r"^video\.vision\.(.+)\.ln_2\.", r"video.vision.\1.mlp_norm."),
    (r"^video\.vision\.(.+)\.mlp\.c_fc\.", r"video.vision.\1.mlp.up."),
    (r"^video\.vision\.(.+)\.mlp\.c_proj\.", r"video.vision.\1.mlp.down."),
    (r"^audio_head\.", "heads.audio."),
    (r"^visual_head\.", "heads.video."),
    (r"^audio_visual_head\.", "heads.audio_video."),
    (r"^audio_text_head\.", "heads.text_audio."),
    (r"^visual_text_head\.", "heads.text_video."),
    (r"^audio_visual_text_head\.", "heads.text_audio_video."),
    (r"^audio_plus_text_head\.", "heads.audio_plus_text."),
    (r"^visual_plus_text_head\.", "heads.video_plus_text."),
    (r"^heads\.(\w+)\.layer_norm\.", r"heads.\1.norm."),
]

# timm's vit_pe_core_*
TIMM: Renames = [
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "position"),
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^norm_pre\.", "pre_norm."),
    (r"^norm\.", "post_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"layers.\1.attention_norm."),
    (r"^blocks\.(\d+)\.norm2\.", r"layers.\1.mlp_norm."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"layers.\1.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"layers.\1.out."),
    (r"^blocks\.", "layers."),
    (r"^attn_pool\.latent$", "pool.probe"),
    (r"^attn_pool\.proj\.", "pool.out."),
    (r"^attn_pool\.norm\.", "pool.mlp_norm."),
    (r"^attn_pool\.", "pool."),
    (r"\.mlp\.fc1\.", ".mlp.up."),
    (r"\.mlp\.fc2\.", ".mlp.down."),
    (r"^head\.", "proj."),
]

# transformers' PeAudioVideoModel
TRANSFORMERS: Renames = [
    (r"^audio_model\.audio_encoder\.embedder\.dac_encoder\.", "audio.codec."),
    (r"^audio_model\.audio_encoder\.embedder\.bottleneck\.", "audio.codec.to_mean."),
    (r"^audio_model\.audio_encoder\.embedder\.", "audio."),
    (r"^audio_model\.audio_encoder\.", "audio.transformer."),
    (r"^video_model\.video_encoder\.embedder\.vision_model\.timm_model\.", "video.vision."),
    (r"^video_model\.video_encoder\.embedder\.", "video."),
    (r"^video_model\.video_encoder\.", "video.transformer."),
    (r"^audio_video_encoder\.embedder\.concat_modality_proj\.", "fusion.concat_proj."),
    (r"^audio_video_encoder\.embedder\.", "fusion."),
    (r"^audio_video_encoder\.", "fusion.transformer."),
    *CODEC,
    *TEMPORAL,
    *TEXT,
    (r"^audio_model\.audio_head\.", "heads.audio."),
    (r"^video_model\.video_head\.", "heads.video."),
    (r"^audio_video_head\.", "heads.audio_video."),
    (r"^audio_model\.text_audio_head\.", "heads.text_audio."),
    (r"^video_model\.text_video_head\.", "heads.text_video."),
    (r"^text_audio_video_head\.", "heads.text_audio_video."),
    (r"^audio_plus_text_head\.", "heads.audio_plus_text."),
    (r"^video_plus_text_head\.", "heads.video_plus_text."),
    (r"^heads\.(\w+)\.layer_norm\.", r"heads.\1.norm."),
    (r"^audio_model\.text_audio_logit_", "logits.audio_text."),
    (r"^video_model\.text_video_logit_", "logits.video_text."),
    (r"^audio_video_logit_", "logits.audio_video."),
    (r"^text_audio_video_logit_", "logits.audio_video_text."),
    (r"^audio_plus_text_logit_", "logits.audio_plus_text_video."),
    (r"^video_plus_text_logit_", "logits.video_plus_text_audio."),
]


def renamed(name: str, table: Renames) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def from_original(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of facebookresearch/perception_models; it has no logit scales and biases, so neither has the result."""
    ours = {}
    for original, tensor in weights.items():
        name = renamed(original, ORIGINAL)
        if ".bottleneck.out_proj." in name:  # the way back from the latent, which only a decoder needs
            continue
        if name.startswith("audio.codec.to_mean."):
            tensor = tensor[: tensor.shape[0] // 2]  # the second half is the scale, which only sampling needs
        elif name == "fusion.video_proj.weight":
            tensor = tensor[..., 0]  # a convolution of kernel 1
        elif name == "video.vision.proj.weight":
            tensor = tensor.T
        elif name == "video.vision.class_token":
            tensor = tensor[None, None]
        elif name == "video.vision.position":
            tensor = tensor[None]
        if name.startswith("video.vision.pool.qkv."):  # the query of a probe has another length than keys and values
            kind, width = name.rsplit(".", 1)[1], tensor.shape[0] // 3
            ours[f"video.vision.pool.q.{kind}"] = tensor[:width]
            ours[f"video.vision.pool.kv.{kind}"] = tensor[width:]
        else:
            ours[name] = tensor
    return ours


def from_timm(weights: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Of timm's vit_pe_core_*, whose head has a bias that ours and the original have not; timm sets it to zero when it
    makes its checkpoint from the original (`timm.models.eva.checkpoint_filter_fn`)."""
    ours = {prefix + renamed(name, TIMM): tensor for name, tensor in weights.items()}
    bias = ours.pop(f"{prefix}proj.bias")
    assert bias.is_meta or not bias.any(), "a head with a bias has no counterpart"
    return ours


def from_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of transformers' PeAudioVideoModel, every tied tensor once, as `named_parameters` gives them."""
    ours = {renamed(name, TRANSFORMERS): tensor for name, tensor in weights.items()}
    vision = {name: ours.pop(name) for name in list(ours) if name.startswith("video.vision.")}
    ours |= from_timm({name.removeprefix("video.vision."): t for name, t in vision.items()}, prefix="video.vision.")
    ours["fusion.video_proj.weight"] = ours["fusion.video_proj.weight"][..., 0]  # a convolution of kernel 1
    return ours
