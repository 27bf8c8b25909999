"""Our config to the text files of a folder that transformers loads: config, processor and tokenizer settings."""

import json
from dataclasses import asdict, replace

from tokenizers import Tokenizer

from pe_av.config import (
    CodecConfig,
    ConfigError,
    ModelConfig,
    PEAudioFrameConfig,
    TextConfig,
    TransformerConfig,
    VisionConfig,
)
from pe_av.conversion.read_config import HF_CODEC, HF_TEMPORAL, MODERNBERT, VISION, Section
from pe_av.conversion.weight_names import transformers_format


def hf_model_config(config: ModelConfig | PEAudioFrameConfig) -> ModelConfig | PEAudioFrameConfig:
    """The config of the model as transformers holds it, which is without the text layers past `nth_text_layer`: those
    never run, and transformers reads the text feature after the last layer.

    Raises:
        ConfigError: no transformers model computes what this one does; the message names every reason.
    """
    text = config.text
    reasons = []
    if config.output_dim != text.hidden_size:
        reasons.append(f"output_dim={config.output_dim} is not text.hidden_size={text.hidden_size}")
    if transformers_format(config) is None:
        reasons.append(f"none of its classes has exactly the heads {', '.join(config.heads)}")
    elif isinstance(config, ModelConfig) and "fusion" in config.towers:
        audio, video = config.audio.transformer.hidden_size, config.video.transformer.hidden_size
        if audio != video:
            reasons.append(f"audio and video are {audio} and {video} wide, but it needs the same width")
    if isinstance(config, ModelConfig) and "video" in config.towers:
        vision = config.video.vision
        if int(vision.hidden_size * (vision.intermediate_size / vision.hidden_size)) != vision.intermediate_size:
            reasons.append("video.vision.intermediate_size cannot be given exactly as a ratio of hidden_size")
    if reasons:
        raise ConfigError(f"transformers cannot hold this model: {'; '.join(reasons)}")
    return replace(config, text=replace(text, num_hidden_layers=text.nth_text_layer))


def hf_files(config: ModelConfig | PEAudioFrameConfig, tokenizer: Tokenizer | None, dtype: str) -> dict[str, str]:
    """The text files beside the weights and the tokenizer: name -> content.

    Args:
        config: from `hf_model_config`.
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
    layer_types = ("full_attention", "sliding_attention")
    special = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    return values | {
        "model_type": "modernbert",
        "hidden_activation": config.hidden_act,
        "layer_types": [
            layer_types[i % config.global_attn_every_n_layers > 0] for i in range(config.num_hidden_layers)
        ],
        "rope_parameters": {
            layer_type: {"rope_type": "default", "rope_theta": theta}
            for layer_type, theta in zip(layer_types, (config.global_rope_theta, config.local_rope_theta), strict=True)
        },
        # take the text feature before the final norm, as the original does
        "tie_last_hidden_states": False,
        **dict.fromkeys(special),  # never read; the defaults may lie outside the vocabulary
    }


def _hf_vision(config: VisionConfig) -> Section:
    grid = config.image_size // config.patch_size
    return {
        "model_type": "timm_wrapper",
        # any size can be had from either one; they differ in the class token
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
