"""Published configs to ours: `config.json` of transformers or of the original repository -> ModelConfig.

A published config leaves out what equals its implementation's defaults, so those are repeated here. No config can
name a class or run code: only known keys are read, and a key that would change what the model computes is refused.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pe_av.config import (
    CodecConfig,
    ConfigError,
    ModelConfig,
    PEAudioFrameConfig,
    TextConfig,
    VisionConfig,
)
from pe_av.config.compose import config_dir, from_dict, read_yaml
from pe_av.conversion.weight_names import ORIGINAL, TRANSFORMERS

Section = dict[str, Any]

# the frame encoders: name in our configs and in the original's -> timm's name
VISION = {
    "PE-Core-T16-384": "vit_pe_core_tiny_patch16_384",
    "PE-Core-S16-384": "vit_pe_core_small_patch16_384",
    "PE-Core-B16-224": "vit_pe_core_base_patch16_224",
    "PE-Core-L14-336": "vit_pe_core_large_patch14_336",
    "PE-Core-G14-448": "vit_pe_core_gigantic_patch14_448",
}
FIXED_FRAMES = 16  # of models whose original config has `fixed_len_video: true`

# defaults that transformers' PeAudioEncoderConfig, PeVideoEncoderConfig and PeAudioVideoEncoderConfig share
HF_TEMPORAL = {
    "hidden_size": 1792,
    "intermediate_size": 4800,
    "num_hidden_layers": 6,
    "num_attention_heads": 14,
    "num_key_value_heads": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 10_000,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "attention_dropout": 0.0,
}
HF_TEXT = {"hidden_size": 1024, "intermediate_size": 2624, "num_hidden_layers": 22, "num_attention_heads": 16}
HF_CODEC = {"encoder_hidden_size": 64, "downsampling_ratios": [2, 8, 10, 12], "codebook_dim": 128}
MODERNBERT = {
    "vocab_size": 50_368,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "hidden_activation": "gelu",
    "max_position_embeddings": 8192,
    "local_attention": 128,
    "norm_eps": 1e-5,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "pad_token_id": 50_283,
}
# timm's arguments that are accepted with these values only, which is what our encoder computes
TIMM_FIXED = {"attn_type": "rope", "global_pool": "map", "use_pre_transformer_norm": True, "use_rot_pos_emb": True}
TIMM_FIXED |= {"rope_grid_indexing": "xy", "attn_pool_mlp_ratio": 4.0, "in_chans": 3}


def read_published_config(folder: Path) -> tuple[ModelConfig | PEAudioFrameConfig, str]:
    """The config of the model that `folder/config.json` describes, and its implementation: TRANSFORMERS or ORIGINAL.

    Raises:
        ConfigError: the file is missing, not JSON, of another architecture, or asks for something unsupported.
    """
    path = folder / "config.json"
    values = _read_json(path)
    model_type = values.get("model_type")
    try:
        if "text_model" in values and ("audio_visual_model" in values or "audio_model" in values):
            return _from_original(values, str(path)), ORIGINAL
        if model_type in ("pe_audio_video", "pe_audio", "pe_video"):
            return _from_hf(values, folder), TRANSFORMERS
    except ConfigError:
        raise
    except KeyError as error:
        raise ConfigError(f"{path}: the key {error} is missing") from None
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"{path}: a setting has the wrong type ({error})") from error
    raise ConfigError(
        f"{path}: model_type={model_type} is not a PE-AV model: known are pe_audio_video, pe_audio and pe_video of "
        "transformers, and the original's configs with text_model and audio_visual_model or audio_model"
    )


def _from_original(values: Section, source: str) -> ModelConfig | PEAudioFrameConfig:
    shared = {"text": _text(MODERNBERT | values["text_model"], values["nth_text_layer"], source)}
    shared["output_dim"] = values["output_dim"]
    audio_visual = values.get("audio_visual_model")
    audio = (audio_visual or values)["audio_model"]
    shared["audio"] = {
        "codec": _codec(audio["dac_vae_encoder"], audio["dac_vae_encoder"]["sampling_rate"]),
        "transformer": _temporal_original(audio["audio_transformer"], source),
    }
    if audio_visual is None:
        return from_dict(PEAudioFrameConfig, shared, source)
    video = audio_visual["visual_model"]
    shared["video"] = {
        "vision": asdict(_vision_preset(video["pe_encoder"], source)),
        "transformer": _temporal_original(video["visual_transformer"], source),
        "num_frames": FIXED_FRAMES if video.get("fixed_len_video") else None,
    }
    shared["fusion"] = _temporal_original(audio_visual["audio_visual_transformer"], source)
    return from_dict(ModelConfig, shared, source)


def _temporal_original(section: Section, source: str) -> Section:
    head_dim = section.get("head_dim") or section["hidden_size"] // section["num_attention_heads"]
    return _temporal({**section, "head_dim": head_dim}, source)


def _from_hf(values: Section, folder: Path) -> ModelConfig | PEAudioFrameConfig:
    source, model_type = str(folder / "config.json"), values["model_type"]
    text = MODERNBERT | HF_TEXT | (values.get("text_config") or {})
    shared: Section = {"text": _text(text, text["num_hidden_layers"], source), "output_dim": text["hidden_size"]}
    if (folder / "tokenizer_config.json").is_file():
        longest = _read_json(folder / "tokenizer_config.json").get("model_max_length") or math.inf
        shared["text"]["max_tokens"] = int(min(longest, shared["text"]["max_tokens"]))
    towers = values if model_type != "pe_audio_video" else values.get("audio_video_config") or {}
    if model_type != "pe_video":
        audio = towers.get("audio_config") or {}
        codec = HF_CODEC | (audio.get("dac_config") or {})
        # the DAC section's own sampling rate is that of another codec; the feature extractor has the right one
        sampling_rate = _preprocessing(folder, "feature_extractor").get("sampling_rate", CodecConfig.sampling_rate)
        shared["audio"] = {"codec": _codec(codec, sampling_rate), "transformer": _temporal(audio, source)}
    if model_type != "pe_audio":
        video = towers.get("video_config") or {}
        shared["video"] = {
            "vision": _vision_hf(video.get("vision_config") or {}, source),
            "transformer": _temporal(video, source),
        } | _sampling(_preprocessing(folder, "video_processor"), folder)
    if model_type == "pe_audio_video":
        shared["fusion"] = _temporal(towers, source)
        return from_dict(ModelConfig, shared, source)
    if model_type == "pe_video":
        return from_dict(ModelConfig, shared | {"heads": ["video", "text_video"]}, source)
    architectures = values.get("architectures") or []
    if "PeAudioFrameLevelModel" in architectures:
        return from_dict(PEAudioFrameConfig, shared, source)
    if "PeAudioModel" in architectures:
        return from_dict(ModelConfig, shared | {"heads": ["audio", "text_audio"]}, source)
    raise ConfigError(
        f"{source}: architectures={architectures} does not tell PeAudioModel from PeAudioFrameLevelModel, "
        'whose weights have the same names: add "architectures": ["PeAudioModel"] or the other to it'
    )


def _temporal(section: Section, source: str) -> Section:
    values = {key: section.get(key, default) for key, default in HF_TEMPORAL.items()}
    rope = section.get("rope_parameters") or {}
    rope = {key: value for key, value in rope.items() if value is not None}
    if "rope_theta" in section:
        rope.setdefault("rope_theta", section["rope_theta"])
    unknown = rope.keys() - {"rope_type", "rope_theta", "factor"}
    if unknown:
        raise ConfigError(f"{source}: rope_parameters has {', '.join(sorted(unknown))}, which is not supported")
    return values | {"rope_parameters": rope}


def _text(section: Section, nth_text_layer: int, source: str) -> Section:
    for key in ("norm_bias", "attention_bias", "mlp_bias"):
        if section.get(key):
            raise ConfigError(f"{source}: the text model has {key}, which is not supported")
    rope = section.get("rope_parameters") or {}
    for layer_type in ("full_attention", "sliding_attention"):
        rope_type = rope.get(layer_type, {}).get("rope_type", "default")
        if rope_type != "default":
            raise ConfigError(f"{source}: rope_type={rope_type} of the text model's {layer_type} is not supported")
    theta = {
        "global": section.get("global_rope_theta", rope.get("full_attention", {}).get("rope_theta", 160_000.0)),
        "local": section.get("local_rope_theta", rope.get("sliding_attention", {}).get("rope_theta", 10_000.0)),
    }
    values = {key: section[key] for key in MODERNBERT if key != "hidden_activation"}
    every_n = section.get("global_attn_every_n_layers") or _global_every_n(section.get("layer_types"), source)
    return values | {
        "hidden_act": section["hidden_activation"],
        "global_attn_every_n_layers": every_n,
        "global_rope_theta": float(theta["global"]),
        "local_rope_theta": float(theta["local"]),
        "nth_text_layer": nth_text_layer,
        "max_tokens": min(TextConfig.max_tokens, section["max_position_embeddings"]),
    }


def _global_every_n(layer_types: list[str] | None, source: str) -> int:
    """`global_attn_every_n_layers` from transformers' list with the attention type of each layer."""
    if layer_types is None:
        return TextConfig.global_attn_every_n_layers
    full = [i for i, layer_type in enumerate(layer_types) if layer_type == "full_attention"]
    every_n = full[1] if len(full) > 1 else len(layer_types)
    if full != list(range(0, len(layer_types), every_n)):
        raise ConfigError(f"{source}: layer_types is not a regular pattern that starts with full_attention")
    return every_n


def _codec(section: Section, sampling_rate: int) -> Section:
    return {key: section[key] for key in HF_CODEC} | {"sampling_rate": sampling_rate}


def _vision_preset(name: str, source: str) -> VisionConfig:
    if name not in VISION:
        raise ConfigError(f"{source}: the frame encoder {name} is unknown; known are {', '.join(VISION)}")
    return read_yaml(VisionConfig, config_dir() / "vision" / f"{name}.yaml")


def _vision_hf(section: Section, source: str) -> Section:
    """The preset that timm's name of the encoder stands for, changed by its arguments."""
    architecture = section.get("architecture", VISION["PE-Core-L14-336"]).split(".")[
        0
    ]  # a tag of weights may follow the dot
    names = {timm: ours for ours, timm in VISION.items()}
    base = _vision_preset(names.get(architecture, architecture), source)
    arguments = dict(section.get("model_args") or {})
    hidden_size = arguments.pop("embed_dim", base.hidden_size)
    ratio = arguments.pop("mlp_ratio", base.intermediate_size / base.hidden_size)
    labels = section.get("label_names") or section.get("id2label")
    output_dim = len(labels) if labels else section.get("num_labels") or section.get("num_classes") or base.output_dim
    vision = {
        "image_size": arguments.pop("img_size", base.image_size),
        "patch_size": arguments.pop("patch_size", base.patch_size),
        "hidden_size": hidden_size,
        "intermediate_size": int(hidden_size * ratio),
        "num_hidden_layers": arguments.pop("depth", base.num_hidden_layers),
        "num_attention_heads": arguments.pop("num_heads", base.num_attention_heads),
        "output_dim": output_dim,
        "use_class_token": arguments.pop("class_token", base.use_class_token),
        "pool_heads": arguments.pop("attn_pool_num_heads", base.pool_heads),
        "rope_theta": float(arguments.pop("rope_temperature", base.rope_theta)),
        "initializer_range": section.get("initializer_range", base.initializer_range),
    }
    grid = vision["image_size"] // vision["patch_size"]
    fixed = TIMM_FIXED | {
        "ref_feat_shape": [grid, grid],
        "rope_grid_offset": 1.0 if vision["use_class_token"] else 0.0,
        "num_classes": output_dim,
    }
    if vision["image_size"] != base.image_size or vision["patch_size"] != base.patch_size:
        arguments.setdefault("ref_feat_shape", "that of the preset")  # its rotary embedding is of another grid
    for key, value in arguments.items():
        if key not in fixed or (list(value) if isinstance(value, tuple) else value) != fixed[key]:
            raise ConfigError(f"{source}: model_args.{key}={value} of the frame encoder is not supported")
    return vision


def _sampling(video_processor: Section, folder: Path) -> Section:
    for key in ("image_mean", "image_std"):
        if any(value != 0.5 for value in video_processor.get(key) or []):
            raise ConfigError(f"{folder}: the video processor's {key} is not 0.5, the only supported value")
    if video_processor.get("do_sample_frames") is False:
        return {}
    if video_processor.get("num_frames"):
        return {"num_frames": video_processor["num_frames"]}
    return {"frames_per_second": video_processor["fps"]} if video_processor.get("fps") else {}


def _preprocessing(folder: Path, part: str) -> Section:
    """Settings of the "feature_extractor" or "video_processor"; which file holds them depends on the version."""
    values: Section = {}
    separate = {"feature_extractor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}
    if (folder / separate[part]).is_file():
        values |= _read_json(folder / separate[part])
    if (folder / "processor_config.json").is_file():
        section = _read_json(folder / "processor_config.json").get(part) or {}
        if not isinstance(section, dict):
            raise ConfigError(f"{folder / 'processor_config.json'}: {part} is not an object of settings")
        values |= section
    return values


def _read_json(path: Path) -> Section:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file, so this is not a published checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {type(values).__name__}, not an object of settings")
    return values
