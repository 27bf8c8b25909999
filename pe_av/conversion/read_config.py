"""The configs of the published formats, to ours and back.

A published config names everything that differs from its library's defaults, so the defaults stand here too. Nothing
in it can name a class or run code: known keys are read, and what would change the numbers unseen is refused.
"""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pe_av.config import (
    HEADS,
    CodecConfig,
    ConfigError,
    ModelConfig,
    PEAudioFrameConfig,
    TextConfig,
    TransformerConfig,
    VisionConfig,
)
from pe_av.config.compose import config_dir, from_dict, read_yaml

Section = dict[str, Any]

# the frame encoders, by their name in our configs, the original's and timm's
VISION = {
    "PE-Core-T16-384": "vit_pe_core_tiny_patch16_384",
    "PE-Core-S16-384": "vit_pe_core_small_patch16_384",
    "PE-Core-B16-224": "vit_pe_core_base_patch16_224",
    "PE-Core-L14-336": "vit_pe_core_large_patch14_336",
    "PE-Core-G14-448": "vit_pe_core_gigantic_patch14_448",
}
FIXED_FRAMES = 16  # what the original's `fixed_len_video` means

# defaults of transformers' PeAudioEncoderConfig, PeVideoEncoderConfig and PeAudioVideoEncoderConfig alike
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
# timm's arguments that only say what our encoder always does
TIMM_FIXED = {"attn_type": "rope", "global_pool": "map", "use_pre_transformer_norm": True, "use_rot_pos_emb": True}
TIMM_FIXED |= {"rope_grid_indexing": "xy", "attn_pool_mlp_ratio": 4.0, "in_chans": 3}


# ---------------------------------------------------------------------------------------------------------------------
# to ours


def read_published_config(folder: Path) -> tuple[ModelConfig | PEAudioFrameConfig, str]:
    """The model that `config.json` describes, and of which library it is: "hf" or "original".

    Raises:
        ConfigError: the file is missing, not JSON, of another architecture, or asks for what our model does not do.
    """
    path = folder / "config.json"
    values = _read_json(path)
    kind = values.get("model_type")
    try:
        if "text_model" in values and ("audio_visual_model" in values or "audio_model" in values):
            return _from_original(values, str(path)), "original"
        if kind in ("pe_audio_video", "pe_audio", "pe_video"):
            return _from_hf(values, folder), "hf"
    except ConfigError:
        raise
    except KeyError as error:
        raise ConfigError(f"{path}: the key {error} is missing") from None
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"{path}: a setting is not of the kind that it should be ({error})") from error
    raise ConfigError(
        f"{path}: model_type={kind} is no PE-AV: known are pe_audio_video, pe_audio and pe_video of transformers, "
        "and the original's configs with text_model and audio_visual_model or audio_model"
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
    source, kind = str(folder / "config.json"), values["model_type"]
    text = MODERNBERT | HF_TEXT | (values.get("text_config") or {})
    shared: Section = {"text": _text(text, text["num_hidden_layers"], source), "output_dim": text["hidden_size"]}
    if (folder / "tokenizer_config.json").is_file():
        longest = _read_json(folder / "tokenizer_config.json").get("model_max_length") or math.inf
        shared["text"]["max_tokens"] = int(min(longest, shared["text"]["max_tokens"]))
    towers = values if kind != "pe_audio_video" else values.get("audio_video_config") or {}
    if kind != "pe_video":
        audio = towers.get("audio_config") or {}
        codec = HF_CODEC | (audio.get("dac_config") or {})
        # the DAC section has a rate of its own, which is that of another codec; the feature extractor's is heard
        sampling_rate = _preprocessing(folder, "feature_extractor").get("sampling_rate", CodecConfig.sampling_rate)
        shared["audio"] = {"codec": _codec(codec, sampling_rate), "transformer": _temporal(audio, source)}
    if kind != "pe_audio":
        video = towers.get("video_config") or {}
        shared["video"] = {
            "vision": _vision_hf(video.get("vision_config") or {}, source),
            "transformer": _temporal(video, source),
        } | _sampling(_preprocessing(folder, "video_processor"), folder)
    if kind == "pe_audio_video":
        shared["fusion"] = _temporal(towers, source)
        return from_dict(ModelConfig, shared, source)
    if kind == "pe_video":
        return from_dict(ModelConfig, shared | {"heads": ["video", "text_video"]}, source)
    architectures = values.get("architectures") or []
    if "PeAudioFrameLevelModel" in architectures:
        return from_dict(PEAudioFrameConfig, shared, source)
    if "PeAudioModel" in architectures:
        return from_dict(ModelConfig, shared | {"heads": ["audio", "text_audio"]}, source)
    raise ConfigError(
        f"{source}: architectures={architectures} does not tell PeAudioModel from PeAudioFrameLevelModel, "
        'whose weights have the same names: put "architectures": ["…"] into it'
    )


def _temporal(section: Section, source: str) -> Section:
    values = {key: section.get(key, default) for key, default in HF_TEMPORAL.items()}
    rope = section.get("rope_parameters") or {}
    rope = {key: value for key, value in rope.items() if value is not None}
    if "rope_theta" in section:
        rope.setdefault("rope_theta", section["rope_theta"])
    unknown = rope.keys() - {"rope_type", "rope_theta", "factor"}
    if unknown:
        raise ConfigError(f"{source}: rope_parameters has {', '.join(sorted(unknown))}, which our rotation does not do")
    return values | {"rope_parameters": rope}


def _text(section: Section, nth_text_layer: int, source: str) -> Section:
    for key in ("norm_bias", "attention_bias", "mlp_bias"):
        if section.get(key):
            raise ConfigError(f"{source}: the text model has {key}, which no published PE-AV has and ours cannot")
    rope = section.get("rope_parameters") or {}
    for kind in ("full_attention", "sliding_attention"):
        rope_type = rope.get(kind, {}).get("rope_type", "default")
        if rope_type != "default":
            raise ConfigError(f"{source}: rope_type={rope_type} of the text model's {kind} is not what ours does")
    theta = {
        "global": section.get("global_rope_theta", rope.get("full_attention", {}).get("rope_theta", 160_000.0)),
        "local": section.get("local_rope_theta", rope.get("sliding_attention", {}).get("rope_theta", 10_000.0)),
    }
    values = {key: section[key] for key in MODERNBERT if key != "hidden_activation"}
    every = section.get("global_attn_every_n_layers") or _every(section.get("layer_types"), source)
    return values | {
        "hidden_act": section["hidden_activation"],
        "global_attn_every_n_layers": every,
        "global_rope_theta": float(theta["global"]),
        "local_rope_theta": float(theta["local"]),
        "nth_text_layer": nth_text_layer,
        "max_tokens": min(TextConfig.max_tokens, section["max_position_embeddings"]),
    }


def _every(layer_types: list[str] | None, source: str) -> int:
    """Every how many layers one sees everything, from transformers' list of what each layer does."""
    if layer_types is None:
        return TextConfig.global_attn_every_n_layers
    everything = [i for i, kind in enumerate(layer_types) if kind == "full_attention"]
    every = everything[1] if len(everything) > 1 else len(layer_types)
    if everything != list(range(0, len(layer_types), every)):
        raise ConfigError(f"{source}: layer_types is no regular pattern that starts with full_attention")
    return every


def _codec(section: Section, sampling_rate: int) -> Section:
    return {key: section[key] for key in HF_CODEC} | {"sampling_rate": sampling_rate}


def _vision_preset(name: str, source: str) -> VisionConfig:
    if name not in VISION:
        raise ConfigError(f"{source}: the frame encoder {name} is unknown; known are {', '.join(VISION)}")
    return read_yaml(VisionConfig, config_dir() / "vision" / f"{name}.yaml")


def _vision_hf(section: Section, source: str) -> Section:
    """timm's name of the encoder, changed by its arguments."""
    architecture = section.get("architecture", VISION["PE-Core-L14-336"]).split(".")[0]  # a tag may follow
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
        arguments.setdefault("ref_feat_shape", "that of another grid")
    for key, value in arguments.items():
        if key not in fixed or (list(value) if isinstance(value, tuple) else value) != fixed[key]:
            raise ConfigError(f"{source}: model_args.{key}={value} of the frame encoder is not what ours does")
    return vision


def _sampling(video_processor: Section, folder: Path) -> Section:
    for key in ("image_mean", "image_std"):
        if any(value != 0.5 for value in video_processor.get(key) or []):
            raise ConfigError(f"{folder}: the video processor's {key} is not 0.5, which our frames are scaled with")
    if video_processor.get("do_sample_frames") is False:
        return {}
    if video_processor.get("num_frames"):
        return {"num_frames": video_processor["num_frames"]}
    return {"frames_per_second": video_processor["fps"]} if video_processor.get("fps") else {}


def _preprocessing(folder: Path, part: str) -> Section:
    """Settings of the "feature_extractor" or the "video_processor", which three generations of files keep."""
    values: Section = {}
    separate = {"feature_extractor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}
    if (folder / separate[part]).is_file():
        values |= _read_json(folder / separate[part])
    if (folder / "processor_config.json").is_file():
        section = _read_json(folder / "processor_config.json").get(part) or {}
        if not isinstance(section, dict):
            raise ConfigError(f"{folder / 'processor_config.json'}: {part} is not a section of settings")
        values |= section
    return values


def _read_json(path: Path) -> Section:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file, so this is no published checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {type(values).__name__}, not an object of settings")
    return values


# ---------------------------------------------------------------------------------------------------------------------
# to transformers


def hf_model_config(config: ModelConfig | PEAudioFrameConfig) -> ModelConfig | PEAudioFrameConfig:
    """The part of the model that transformers can hold: it reads the last text layer, so those after
    `nth_text_layer`, which never run, stay behind.

    Raises:
        ConfigError: transformers' model cannot be made to compute what this one does; names every reason.
    """
    text = config.text
    wrong = []
    if config.output_dim != text.hidden_size:
        wrong.append(f"output_dim={config.output_dim} is not text.hidden_size={text.hidden_size}")
    if isinstance(config, ModelConfig) and set(config.heads) not in map(set, _HF_CLASSES):
        wrong.append(f"no class of it has just the heads {', '.join(config.heads)}")
    elif isinstance(config, ModelConfig) and "fusion" in config.towers:
        audio, video = config.audio.transformer.hidden_size, config.video.transformer.hidden_size
        if audio != video:
            wrong.append(f"audio and video are {audio} and {video} wide, where it needs the same")
    if isinstance(config, ModelConfig) and "video" in config.towers:
        vision = config.video.vision
        if int(vision.hidden_size * (vision.intermediate_size / vision.hidden_size)) != vision.intermediate_size:
            wrong.append("video.vision.intermediate_size is no ratio of hidden_size in floating point")
    if wrong:
        raise ConfigError(f"transformers cannot hold this model: {'; '.join(wrong)}")
    return replace(config, text=replace(text, num_hidden_layers=text.nth_text_layer))


_HF_CLASSES = (tuple(HEADS), ("audio", "text_audio"), ("video", "text_video"))


def hf_files(config: ModelConfig | PEAudioFrameConfig, tokenizer: Tokenizer | None, dtype: str) -> dict[str, str]:
    """The files beside the weights, by name, of what `hf_model_config` gave.

    Args:
        dtype: of the weights, e.g. "float32".
    """
    text = _hf_text(config.text)
    audio = {"model_type": "pe_audio_encoder", **_hf_temporal(config.audio.transformer)}
    audio["dac_config"] = {"model_type": "dac", **{key: getattr(config.audio.codec, key) for key in HF_CODEC}}
    audio["dac_config"]["sampling_rate"] = config.audio.codec.sampling_rate
    values: Section = {"dtype": dtype, "text_config": text, "transformers_version": "5.23.0"}
    if isinstance(config, PEAudioFrameConfig) or set(config.heads) == {"audio", "text_audio"}:
        name = "PeAudioFrameLevelModel" if isinstance(config, PEAudioFrameConfig) else "PeAudioModel"
        values |= {"architectures": [name], "model_type": "pe_audio", "audio_config": audio}
        parts = {"feature_extractor": _hf_feature_extractor(config.audio.codec)}
        processor = "PeAudioProcessor"
    else:
        video = {"model_type": "pe_video_encoder", **_hf_temporal(config.video.transformer)}
        video["vision_config"] = _hf_vision(config.video.vision)
        frames = {
            "video_processor_type": "PeVideoVideoProcessor",
            "size": {"height": config.video.vision.image_size, "width": config.video.vision.image_size},
            "resample": 2,  # bilinear
            "do_resize": True,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "do_sample_frames": config.video.num_frames is not None or config.video.frames_per_second is not None,
            "num_frames": config.video.num_frames,
            "fps": config.video.frames_per_second,
        }
        if set(config.heads) == {"video", "text_video"}:
            values |= {"architectures": ["PeVideoModel"], "model_type": "pe_video", "video_config": video}
            parts, processor = {"video_processor": frames}, "PeVideoProcessor"
        else:
            both = {"model_type": "pe_audio_video_encoder", **_hf_temporal(config.fusion)}
            both |= {"audio_config": audio, "video_config": video}
            values |= {"architectures": ["PeAudioVideoModel"], "model_type": "pe_audio_video"}
            values["audio_video_config"] = both
            parts = {"feature_extractor": _hf_feature_extractor(config.audio.codec), "video_processor": frames}
            processor = "PeAudioVideoProcessor"
    files = {"config.json": values, "processor_config.json": {"processor_class": processor, **parts}}
    if tokenizer is not None:
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.text.max_tokens,
            "pad_token": tokenizer.id_to_token(config.text.pad_token_id),
            "processor_class": processor,
        }
    return {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}


def _hf_temporal(config: TransformerConfig) -> Section:
    values = {key: value for key, value in asdict(config).items() if key in HF_TEMPORAL}
    values["num_key_value_heads"] = config.key_value_heads
    rope = asdict(config.rope_parameters)
    if rope["rope_type"] == "default":
        del rope["factor"]
    return values | {"rope_parameters": rope}


def _hf_text(config: TextConfig) -> Section:
    values = {key: getattr(config, key) for key in MODERNBERT if key != "hidden_activation"}
    kinds = ("full_attention", "sliding_attention")
    special = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    return values | {
        "model_type": "modernbert",
        "hidden_activation": config.hidden_act,
        "layer_types": [kinds[i % config.global_attn_every_n_layers > 0] for i in range(config.num_hidden_layers)],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta}
            for kind, theta in zip(kinds, (config.global_rope_theta, config.local_rope_theta), strict=True)
        },
        # the text feature before the final norm, as in the original; without it transformers takes it after
        "tie_last_hidden_states": False,
        **dict.fromkeys(special),  # the model never reads them, and their defaults lie outside a small vocabulary
    }


def _hf_vision(config: VisionConfig) -> Section:
    grid = config.image_size // config.patch_size
    return {
        "model_type": "timm_wrapper",
        # the gigantic one differs from the others in having no class token, and in what follows from that
        "architecture": VISION["PE-Core-L14-336" if config.use_class_token else "PE-Core-G14-448"],
        "do_pooling": True,
        "global_pool": "map",
        "initializer_range": config.initializer_range,
        "num_labels": config.output_dim,
        "num_classes": config.output_dim,
        "label_names": [f"LABEL_{i}" for i in range(config.output_dim)],
        "model_args": {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "embed_dim": config.hidden_size,
            "depth": config.num_hidden_layers,
            "num_heads": config.num_attention_heads,
            "mlp_ratio": config.intermediate_size / config.hidden_size,
            "attn_pool_num_heads": config.pool_heads,
            "rope_temperature": config.rope_theta,
            "ref_feat_shape": [grid, grid],
        },
    }


def _hf_feature_extractor(codec: CodecConfig) -> Section:
    return {
        "feature_extractor_type": "PeAudioFeatureExtractor",
        "feature_size": 1,
        "hop_length": codec.hop_length,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": codec.sampling_rate,
    }
