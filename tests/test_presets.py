"""The sizes in `configs/` give the published models: the tensors that transformers and timm build, to the parameter."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch
from published_names import from_timm, from_transformers
from torch import Tensor
from transformers import PeAudioVideoConfig, PeAudioVideoModel

from pe_av.checkpoint import build_model
from pe_av.config import VisionConfig
from pe_av.config.compose import config_dir, load_preset, model_presets, read_yaml
from pe_av.model.pe_audio_video import PEAudioVideo
from pe_av.model.vit import VisionTransformer

# parameters in the published model.safetensors
PUBLISHED = {"small": 846_991_308, "base": 1_033_701_580, "large": 2_234_700_748}

# width, width of the gated MLP, attention heads, layers of the audio transformer
SIZES = {"small": (768, 2048, 6, 12), "base": (1024, 2752, 8, 16), "large": (1792, 4800, 14, 28)}

VISION = {
    "PE-Core-T16-384": "vit_pe_core_tiny_patch16_384",
    "PE-Core-S16-384": "vit_pe_core_small_patch16_384",
    "PE-Core-B16-224": "vit_pe_core_base_patch16_224",
    "PE-Core-L14-336": "vit_pe_core_large_patch14_336",
    "PE-Core-G14-448": "vit_pe_core_gigantic_patch14_448",
}


def published_model(name: str) -> PeAudioVideoModel:
    """transformers' model in a published size, without memory. Its own defaults are no published size."""
    width, mlp, heads, audio_layers = SIZES[name]
    size = {"hidden_size": width, "intermediate_size": mlp, "num_attention_heads": heads, "head_dim": 128}
    vision = {"model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336", "num_labels": 1024}
    text = {"hidden_size": 1024, "intermediate_size": 2624, "num_hidden_layers": 22, "num_attention_heads": 16}
    config = PeAudioVideoConfig(
        text_config={"model_type": "modernbert", **text},
        audio_video_config={
            **size,
            "num_hidden_layers": 6,
            "audio_config": {"model_type": "pe_audio_encoder", **size, "num_hidden_layers": audio_layers},
            "video_config": {
                "model_type": "pe_video_encoder",
                **size,
                "num_hidden_layers": 4,
                "vision_config": vision,
            },
        },
    )
    with torch.device("meta"):
        return PeAudioVideoModel(config)


def vision_transformer(config: VisionConfig) -> VisionTransformer:
    arguments = asdict(config)
    del arguments["initializer_range"]
    return VisionTransformer(**arguments, attention="sdpa")


def shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def count(weights: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in weights.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_has_the_published_tensors(name: str):
    """All but one: the bias of timm's head, 1024 zeros that timm adds to the original's projection, which has none."""
    ours = dict(build_model(name, device="meta").named_parameters())
    # a tower that stands in two places is tied, and counted once
    theirs = dict(published_model(name).named_parameters())
    head_bias = [key for key in theirs if key.endswith("timm_model.head.bias")]
    assert [tuple(theirs[key].shape) for key in head_bias] == [(1024,)]

    assert count(theirs) == PUBLISHED[name]
    assert count(ours) == PUBLISHED[name] - 1024
    assert shapes(from_transformers(theirs)) == shapes(ours)


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_of_the_parts(name: str):
    """Tower by tower the counts of transformers, and together all there is."""
    model = build_model(name, device="meta")
    expected: Counter[str] = Counter()
    for key, tensor in from_transformers(dict(published_model(name).named_parameters())).items():
        part = key.split(".")[0]
        expected["heads" if part == "logits" else part] += tensor.numel()
    assert model.parameter_counts() == expected
    assert sum(model.parameter_counts().values()) == sum(p.numel() for p in model.parameters())


def test_the_original_has_no_bias_in_the_head():
    """A matrix from the vision transformer's width to its output's, and nothing else of that name."""
    keys = json.loads((Path(__file__).parent / "golden" / "keys.json").read_text())
    prefix = "audio_visual_model.visual_model.pe_encoder."
    heads = {key: shape for key, shape in keys.items() if key.removeprefix(prefix).startswith("proj")}
    assert heads == {f"{prefix}proj": [192, 512]}


def test_every_preset_builds():
    assert model_presets() == ["base", "large", "small", "tiny"]
    for name in model_presets():
        with torch.device("meta"):
            PEAudioVideo(load_preset(name))
    assert sum(p.numel() for p in build_model("tiny").parameters()) < 5_000_000


@pytest.mark.parametrize("name", VISION)
def test_vision_preset_has_the_tensors_of_timm(name: str):
    """All but the head's bias. G14 differs from the others: it has no class token, and the MLP of its attention pooling
    is four times as wide as its tokens, as everywhere, while those of its layers are not."""
    config = read_yaml(VisionConfig, config_dir() / "vision" / f"{name}.yaml")
    with torch.device("meta"):
        ours = dict(vision_transformer(config).named_parameters())
        theirs = dict(timm.create_model(VISION[name], num_classes=config.output_dim).named_parameters())
    assert shapes(from_timm(theirs)) == shapes(ours)
    assert count(ours) == count(theirs) - config.output_dim
    assert ("class_token" in ours) == (name != "PE-Core-G14-448")


def test_there_is_a_test_for_every_vision_preset():
    assert sorted(VISION) == sorted(path.stem for path in (config_dir() / "vision").glob("*.yaml"))


@pytest.mark.parametrize(
    ("name", "patch", "classes"),
    [(name, int(name[-6:-4]), timm.get_pretrained_cfg(arch).num_classes) for name, arch in VISION.items()],
)
def test_vision_preset_has_timms_picture_and_output_size(name: str, patch: int, classes: int):
    config = read_yaml(VisionConfig, config_dir() / "vision" / f"{name}.yaml")
    assert (config.image_size, config.patch_size, config.output_dim) == (int(name[-3:]), patch, classes)
    assert timm.get_pretrained_cfg(VISION[name]).input_size == (3, config.image_size, config.image_size)
