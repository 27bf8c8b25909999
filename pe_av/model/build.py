"""Build the towers of a model from their configs, with random initial weights."""

import torch
from torch import nn

from pe_av.config import AudioConfig, CodecConfig, ModelConfig, TextConfig, TransformerConfig, VideoConfig, VisionConfig
from pe_av.model.audio import AudioEncoder
from pe_av.model.codec import CodecEncoder
from pe_av.model.fusion import FusionEncoder
from pe_av.model.text import ModernBERT
from pe_av.model.transformer import TemporalTransformer
from pe_av.model.video import VideoEncoder
from pe_av.model.vit import AttentionPool, VisionTransformer


def build_text(config: TextConfig, attention: str) -> ModernBERT:
    tower = ModernBERT(
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
    return init_linear(tower, config.initializer_range)


def build_audio(config: AudioConfig, attention: str) -> AudioEncoder:
    temporal = config.transformer
    tower = AudioEncoder(
        build_codec(config.codec), build_temporal(temporal, attention), config.codec.codebook_dim, temporal.hidden_size
    )
    init_linear(tower.data_proj, temporal.initializer_range)  # the codec initializes itself
    return tower


def build_video(config: VideoConfig, attention: str) -> VideoEncoder:
    vision, temporal = config.vision, config.transformer
    tower = VideoEncoder(
        build_vision(vision, attention), build_temporal(temporal, attention), vision.output_dim, temporal.hidden_size
    )
    init_linear(tower.proj, temporal.initializer_range)
    init_linear(tower.data_proj, temporal.initializer_range)
    return tower


def build_fusion(config: ModelConfig, attention: str) -> FusionEncoder:
    audio, video, fusion = config.audio.transformer, config.video.transformer, config.fusion
    tower = FusionEncoder(build_temporal(fusion, attention), audio.hidden_size, video.hidden_size, fusion.hidden_size)
    return init_linear(tower, fusion.initializer_range)


def build_vision(config: VisionConfig, attention: str) -> VisionTransformer:
    encoder = VisionTransformer(
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        output_dim=config.output_dim,
        proj_bias=config.proj_bias,
        use_class_token=config.use_class_token,
        pool_heads=config.pool_heads,
        rope_theta=config.rope_theta,
        attention=attention,
    )
    return init_linear(encoder, config.initializer_range)


def build_codec(config: CodecConfig) -> CodecEncoder:
    tile_positions = None
    if config.tile_seconds is not None:
        tile_positions = max(1, round(config.tile_seconds * config.sampling_rate / config.hop_length))
    return CodecEncoder(
        encoder_hidden_size=config.encoder_hidden_size,
        downsampling_ratios=config.downsampling_ratios,
        codebook_dim=config.codebook_dim,
        trainable=config.trainable,
        tile_positions=tile_positions,
    )


def build_temporal(config: TransformerConfig, attention: str) -> TemporalTransformer:
    transformer = TemporalTransformer(
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
    return init_linear(transformer, config.initializer_range)


@torch.no_grad()
def init_linear(part: nn.Module, std: float) -> nn.Module:
    """Normal weights, class tokens, probes and position embeddings; zero biases; norms stay 1. Returns `part`."""
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
    return part
