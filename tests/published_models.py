"""Small models of transformers and folders of them, as its users have them on disk: what conversion is tested on.

Their configs are written out here by hand, so that what our converter writes is compared with something else.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from conftest import in_double, random_batch, randomize, relative_error, small_config
from test_processor import WORDS, make_tokenizer
from torch import Tensor, nn
from transformers import (
    PeAudioConfig,
    PeAudioFeatureExtractor,
    PeAudioFrameLevelModel,
    PeAudioModel,
    PeAudioProcessor,
    PeAudioVideoConfig,
    PeAudioVideoModel,
    PeAudioVideoProcessor,
    PeVideoConfig,
    PeVideoModel,
    PeVideoProcessor,
    PeVideoVideoProcessor,
    PreTrainedTokenizerFast,
)

from pe_av.config import (
    AudioConfig,
    CodecConfig,
    ModelConfig,
    RopeConfig,
    TextConfig,
    TransformerConfig,
    VideoConfig,
    VisionConfig,
)

EMBEDDINGS = ("audio", "video", "audio_video", "text_audio", "text_video", "text_audio_video")
EMBEDDINGS += ("audio_plus_text", "video_plus_text")
LOGITS = ("audio_text", "video_text", "audio_video", "audio_video_text", "audio_plus_text_video")
LOGITS += ("video_plus_text_audio",)


def shape_one() -> ModelConfig:
    """Another width in every part but audio and video, which must be the same in transformers; PE-Core-L14's kind."""
    config = small_config()
    text = replace(config.text, nth_text_layer=config.text.num_hidden_layers)
    transformer = replace(config.video.transformer, hidden_size=config.audio.transformer.hidden_size)
    vision = replace(config.video.vision, intermediate_size=128)
    video = replace(config.video, transformer=transformer, vision=vision, num_frames=4)
    return replace(config, text=text, video=video, output_dim=text.hidden_size)


def shape_two() -> ModelConfig:
    """No class token and a mixed ratio of the MLP, as in PE-Core-G14; one key-value head for four; every frame."""
    temporal = TransformerConfig(
        hidden_size=24, intermediate_size=36, num_attention_heads=4, num_key_value_heads=1, head_dim=6
    )
    return ModelConfig(
        text=TextConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=2,
            local_attention=4,
            global_attn_every_n_layers=2,
            global_rope_theta=5000.0,
            local_rope_theta=700.0,
            max_position_embeddings=48,
            max_tokens=48,
            pad_token_id=3,
            nth_text_layer=3,
        ),
        audio=AudioConfig(
            CodecConfig(encoder_hidden_size=2, downsampling_ratios=[2, 3, 4], codebook_dim=6, sampling_rate=1200),
            replace(temporal, num_hidden_layers=3, attention_bias=True),
        ),
        video=VideoConfig(
            VisionConfig(
                image_size=42,
                patch_size=14,
                hidden_size=48,
                intermediate_size=280,
                num_hidden_layers=3,
                num_attention_heads=3,
                output_dim=16,
                use_class_token=False,
                pool_heads=6,
            ),
            replace(temporal, num_hidden_layers=2, rms_norm_eps=1e-3, max_position_embeddings=70),
        ),
        fusion=replace(temporal, hidden_size=40, num_hidden_layers=1, num_attention_heads=2, hidden_act="gelu"),
        output_dim=32,
    )


def shape_three() -> ModelConfig:
    """Rotary positions stretched, each tower by another base and factor; PE-Core-B16's kind; frames by their rate."""
    config = shape_one()
    audio, video, fusion = config.audio.transformer, config.video.transformer, config.fusion
    return replace(
        config,
        audio=replace(
            config.audio,
            transformer=replace(audio, num_key_value_heads=4, rope_parameters=RopeConfig("linear", 300.0, 2.5)),
        ),
        video=replace(
            config.video,
            transformer=replace(video, num_hidden_layers=3, rope_parameters=RopeConfig("default", 50.0)),
            vision=VisionConfig(
                image_size=48,
                patch_size=16,
                hidden_size=24,
                intermediate_size=96,
                num_hidden_layers=1,
                num_attention_heads=1,
                output_dim=12,
                pool_heads=2,
                rope_theta=90.0,
            ),
            num_frames=None,
            frames_per_second=2.0,
        ),
        fusion=replace(
            fusion, num_hidden_layers=1, num_key_value_heads=2, rope_parameters=RopeConfig("linear", 1e3, 4)
        ),
    )


SHAPES = {"one": shape_one, "two": shape_two, "three": shape_three}
TIMM = {"one": "vit_pe_core_large_patch14_336", "two": "vit_pe_core_gigantic_patch14_448"}
TIMM["three"] = "vit_pe_core_base_patch16_224"
CLASSES = (PeAudioVideoModel, PeAudioModel, PeVideoModel, PeAudioFrameLevelModel)


def hf_temporal(config: TransformerConfig) -> dict[str, object]:
    values = asdict(config)
    if config.rope_parameters.rope_type == "default":
        del values["rope_parameters"]["factor"]
    return values


def hf_config(name: str, cls: type) -> PeAudioVideoConfig | PeAudioConfig | PeVideoConfig:
    """transformers' config of the small shape `name`."""
    return hf_config_of(SHAPES[name](), TIMM[name], cls)


def hf_config_of(
    config: ModelConfig, architecture: str, cls: type
) -> PeAudioVideoConfig | PeAudioConfig | PeVideoConfig:
    text, codec, vision = config.text, config.audio.codec, config.video.vision
    grid = vision.image_size // vision.patch_size
    layers = range(text.num_hidden_layers)
    parts = {
        "text_config": {
            "model_type": "modernbert",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "local_attention": text.local_attention,
            "max_position_embeddings": text.max_position_embeddings,
            "layer_types": [
                "sliding_attention" if i % text.global_attn_every_n_layers else "full_attention" for i in layers
            ],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": text.global_rope_theta},
                "sliding_attention": {"rope_type": "default", "rope_theta": text.local_rope_theta},
            },
            "pad_token_id": text.pad_token_id,
            **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),
            "tie_last_hidden_states": False,
        }
    }
    audio = {
        "model_type": "pe_audio_encoder",
        **hf_temporal(config.audio.transformer),
        "dac_config": {
            "model_type": "dac",
            "encoder_hidden_size": codec.encoder_hidden_size,
            "downsampling_ratios": codec.downsampling_ratios,
            "codebook_dim": codec.codebook_dim,
        },
    }
    video = {
        "model_type": "pe_video_encoder",
        **hf_temporal(config.video.transformer),
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": architecture,
            "num_labels": vision.output_dim,
            "model_args": {
                "img_size": vision.image_size,
                "patch_size": vision.patch_size,
                "embed_dim": vision.hidden_size,
                "depth": vision.num_hidden_layers,
                "num_heads": vision.num_attention_heads,
                "mlp_ratio": vision.intermediate_size / vision.hidden_size,
                "attn_pool_num_heads": vision.pool_heads,
                "rope_temperature": vision.rope_theta,
                "ref_feat_shape": [grid, grid],
            },
        },
    }
    if cls is PeAudioVideoModel:
        both = {**hf_temporal(config.fusion), "audio_config": audio, "video_config": video}
        return PeAudioVideoConfig(**parts, audio_video_config=both, attn_implementation="eager")
    if cls is PeVideoModel:
        return PeVideoConfig(**parts, video_config=video, attn_implementation="eager")
    return PeAudioConfig(**parts, audio_config=audio, attn_implementation="eager")


def hf_model(name: str, cls: type = PeAudioVideoModel, head_bias: bool = False) -> nn.Module:
    """A model of the small shape `name` with random weights; timm's head gets its bias only if asked for, since the
    original has none."""
    model = randomize(cls(hf_config(name, cls))).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("timm_model.head.bias") and not head_bias:
            nn.init.zeros_(parameter)
    return model


def hf_folder(folder: Path, model: nn.Module, name: str) -> Path:
    """`model` as its library saves it, with the processor that belongs to it."""
    config = SHAPES[name]()
    model.save_pretrained(folder)
    if not isinstance(model, PeAudioModel):
        keep_num_labels(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(),
        pad_token=WORDS[config.text.pad_token_id],
        model_max_length=config.text.max_tokens,
    )
    codec, video = config.audio.codec, config.video
    sound = PeAudioFeatureExtractor(sampling_rate=codec.sampling_rate, hop_length=codec.hop_length)
    frames = PeVideoVideoProcessor(
        size={"height": video.vision.image_size, "width": video.vision.image_size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_sample_frames=(video.num_frames or video.frames_per_second) is not None,
        num_frames=video.num_frames,
        fps=video.frames_per_second,
    )
    if isinstance(model, PeAudioVideoModel):
        processor = PeAudioVideoProcessor(sound, frames, tokenizer)
    elif isinstance(model, PeVideoModel):
        processor = PeVideoProcessor(frames, tokenizer)
    else:
        processor = PeAudioProcessor(sound, tokenizer)
    processor.save_pretrained(folder)
    return folder


def keep_num_labels(folder: Path) -> None:
    """transformers 5.23 saves the width of timm's head as the number of label_names and reads num_labels, so without
    this it cannot load what it has saved."""
    values = json.loads((folder / "config.json").read_text())
    video = values.get("audio_video_config", values)["video_config"]
    video["vision_config"]["num_labels"] = len(video["vision_config"]["label_names"])
    (folder / "config.json").write_text(json.dumps(values, indent=2))


def equal_rows(config: ModelConfig, steps: int = 9, frames: int = 4) -> dict[str, Tensor]:
    """Three rows of the same lengths, unpadded, in float64."""
    inputs = random_batch(config, rows=((20, steps, frames),) * 3)
    return in_double({name: value for name, value in inputs.items() if "mask" not in name})


def differences(found: object, expected: object) -> dict[str, float]:
    """How far each embedding and each matrix of logits that transformers gives is from ours."""
    names = [*(f"{name}_embeds" for name in EMBEDDINGS), *(f"logits_{name}" for name in LOGITS)]
    theirs = {name: getattr(expected, name, None) for name in names}
    return {
        name: relative_error(getattr(found, name), value) for name, value in theirs.items() if torch.is_tensor(value)
    }
