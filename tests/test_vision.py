"""The vision transformer against timm's `vit_pe_core_*`, with the same random weights."""

from dataclasses import asdict, replace

import pytest
import timm
import torch
from conftest import in_double, randomize, relative_error, small_config
from published_names import from_timm
from torch import nn

from pe_av.config import VisionConfig
from pe_av.config.compose import config_dir, read_yaml
from pe_av.model.vit import VisionTransformer


def ours(config: VisionConfig, reference: nn.Module, attention: str = "sdpa") -> VisionTransformer:
    """Our transformer with the weights of timm's."""
    arguments = asdict(config)
    del arguments["initializer_range"]
    model = VisionTransformer(**arguments, attention=attention)
    model.load_state_dict(from_timm(dict(reference.named_parameters())))
    return model.eval()


def timms(config: VisionConfig) -> nn.Module:
    """timm's PE-Core at a size of our choosing; what a small size does not touch, its own constructor decides."""
    # the two kinds that PE-Core comes in: with a class token patches count from 1, without one from 0
    architecture = "vit_pe_core_tiny_patch16_384" if config.use_class_token else "vit_pe_core_gigantic_patch14_448"
    grid = config.image_size // config.patch_size
    model = timm.create_model(
        architecture,
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        attn_pool_num_heads=config.pool_heads,
        num_classes=config.output_dim,
        ref_feat_shape=(grid, grid),
    )
    nn.init.zeros_(randomize(model).head.bias)
    return model.eval()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # on a CPU that is what it is
@pytest.mark.parametrize("use_class_token", [True, False])
@pytest.mark.parametrize("grid", [1, 2, 5])
def test_small_transformer_equals_timm(use_class_token: bool, grid: int):
    """Frames of 1 to 25 patches; the MLP is four times as wide as the tokens, the ratio that PE-Core's pooling has."""
    config = replace(
        small_config().video.vision,
        image_size=8 * grid,
        intermediate_size=128,
        use_class_token=use_class_token,
        num_hidden_layers=3,
    )
    reference = timms(config)
    pixels = torch.randn(4, 3, config.image_size, config.image_size)
    with torch.inference_mode():
        expected = reference(pixels)
        assert relative_error(ours(config, reference)(pixels), expected) <= 1e-6
        for attention in ("eager", "flex"):
            assert relative_error(ours(config, reference, attention)(pixels), expected) <= 1e-6


@pytest.mark.parametrize("use_class_token", [True, False])
def test_pooling_is_four_times_as_wide_as_its_tokens(use_class_token: bool):
    """Whatever the width of the layers' MLPs, which in G14 is another one."""
    config = replace(small_config().video.vision, intermediate_size=80, use_class_token=use_class_token)
    assert config.intermediate_size != 4 * config.hidden_size
    reference = timms(config)
    pixels = torch.randn(2, 3, config.image_size, config.image_size)
    with torch.inference_mode():
        assert relative_error(ours(config, reference)(pixels), reference(pixels)) <= 1e-6


def test_a_published_size_equals_timm():
    """PE-Core-T16-384 as its YAML and as timm's own entry have it, no argument given."""
    config = read_yaml(VisionConfig, config_dir() / "vision" / "PE-Core-T16-384.yaml")
    reference = randomize(timm.create_model("vit_pe_core_tiny_patch16_384", num_classes=512)).eval()
    nn.init.zeros_(reference.head.bias)
    pixels = torch.randn(1, 3, 384, 384)
    with torch.inference_mode():
        assert relative_error(ours(config, reference)(pixels), reference(pixels)) <= 2e-6


def test_rotation_is_seen():
    """That the comparison with timm can fail: another base of the rotary embedding gives other outputs."""
    config = replace(small_config().video.vision, image_size=40, intermediate_size=128)
    reference = timms(config)
    pixels = torch.randn(2, 3, 40, 40)
    with torch.inference_mode():
        turned = ours(replace(config, rope_theta=100.0), reference)(pixels)
        assert relative_error(turned, reference(pixels)) > 1e-2


def test_frames_are_independent_of_each_other():
    """In float64, where the size of a batch does not decide on the last digits."""
    config = replace(small_config().video.vision, intermediate_size=128)
    model = ours(config, timms(config)).double()
    pixels = in_double({"pixels": torch.randn(5, 3, 32, 32)})["pixels"]
    with torch.inference_mode():
        together = model(pixels)
        for i, frame in enumerate(pixels):
            assert relative_error(model(frame[None])[0], together[i]) <= 1e-12
