"""The codec against transformers' DAC encoder; that a row does not hear what it is padded with; tiles."""

import math
from collections.abc import Callable

import pytest
import torch
from conftest import randomize, relative_error
from published_names import CODEC, renamed
from torch import Tensor
from transformers import DacConfig
from transformers.models.dac.modeling_dac import DacEncoder

from pe_av.config import CodecConfig
from pe_av.model.build import build_codec
from pe_av.model.codec import CodecEncoder

RATIOS = [2, 8, 10, 12]
HOP = 1920


def build(width: int = 4, ratios: list[int] = RATIOS, codebook_dim: int = 6, seed: int = 0) -> CodecEncoder:
    return randomize(CodecEncoder(width, ratios, codebook_dim), seed).double()


def noise(rows: int, frames: int, hop: int = HOP) -> Tensor:
    return 0.1 * torch.randn(rows, 1, frames * hop, dtype=torch.float64)


@pytest.mark.parametrize("ratios", [[2, 8, 10, 12], [2, 4, 8, 8], [3, 5]])
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_latents_equal_transformers(ratios: list[int], frames: int):
    """Without padding; in float64, because random weights amplify rounding."""
    hop = math.prod(ratios)
    codec = build(ratios=ratios)
    theirs = DacEncoder(
        DacConfig(encoder_hidden_size=4, downsampling_ratios=ratios, hidden_size=4 * 2 ** len(ratios))
    ).double()
    names = {renamed(f"audio.codec.{name}", CODEC).removeprefix("audio.codec."): name for name in theirs.state_dict()}
    weights = codec.state_dict()
    theirs.load_state_dict({theirs_name: weights.pop(name) for name, theirs_name in names.items()})
    assert set(weights) == {"to_mean.weight", "to_mean.bias"}

    waveform = noise(2, frames, hop)
    with torch.inference_mode():
        expected = codec.to_mean(theirs(waveform)).transpose(1, 2)
    assert relative_error(codec(waveform), expected) <= 1e-12


@pytest.mark.parametrize("loudness", [0.0, 1.0, 1e3])
def test_padding_is_not_heard(loudness: float):
    """A row in a batch is the row alone, whatever stands behind its end: digital silence, noise, or a bang."""
    codec = build()
    lengths = [9, 1, 2, 8, 5]
    waveform = noise(5, 9)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    waveform[~mask.repeat_interleave(HOP, dim=1)[:, None]] *= loudness
    together = codec(waveform, mask)
    for row, length in enumerate(lengths):
        by_itself = codec(waveform[row : row + 1, :, : length * HOP])
        assert relative_error(together[row, :length], by_itself[0]) <= 1e-12


def test_padding_is_not_heard_in_float32():
    """With the weights that a codec starts with, which do not amplify rounding."""
    codec = CodecEncoder(8, RATIOS, 16)
    waveform, mask = noise(2, 9).float(), torch.arange(9) < torch.tensor([[9], [4]])
    together = codec(waveform, mask)
    assert relative_error(together[1, :4], codec(waveform[1:, :, : 4 * HOP])[0]) <= 5e-6


def tile_sizes(frames: int) -> list[int]:
    return sorted({1, 2, 3, frames - 1, frames, frames + 5} - {0})


@pytest.mark.parametrize("frames", [1, 2, 5, 13])
@pytest.mark.parametrize("masked", [False, True])
def test_tiles_equal_the_whole(frames: int, masked: bool):
    """At every position, the edges of tiles and of the clip among them."""
    codec = build()
    waveform = noise(2, frames)
    mask = torch.arange(frames) < torch.tensor([[frames], [max(1, frames // 2)]]) if masked else None
    whole = codec(waveform, mask)
    valid = slice(None) if mask is None else mask
    for codec.tile_positions in tile_sizes(frames):
        tiled = codec(waveform, mask)
        assert tiled.shape == whole.shape
        assert relative_error(tiled[valid], whole[valid]) <= 1e-12, codec.tile_positions


def reach(codec: CodecEncoder, frames: int) -> int:
    """How many latent frames away from a latent frame a change of the waveform is still seen."""
    middle = frames // 2
    waveform = noise(1, frames).requires_grad_()
    latents = codec(waveform)
    (gradient,) = torch.autograd.grad(latents[0, middle].sum(), waveform)
    seen = gradient[0, 0].nonzero().flatten() // codec.hop_length
    return int(max(middle - seen.min(), seen.max() - middle))


@pytest.mark.parametrize("ratios", [[2, 8, 10, 12], [2, 4, 8, 8], [2, 2], [3, 5, 2]])
def test_halo_is_what_a_frame_can_see(ratios: list[int]):
    """What is needed is measured with a gradient; up to two frames more is waste, but nothing worse."""
    codec = CodecEncoder(2, ratios, 3, trainable=True).double()
    needed = reach(codec, frames=81)
    assert 1 <= needed < 40  # the clip's own ends are further away
    assert needed <= codec.halo_positions <= needed + 2


def test_a_halo_too_small_is_heard(monkeypatch: pytest.MonkeyPatch):
    """That the comparison of tiles with the whole can fail: with one frame less than is needed, it does."""
    codec = build()
    needed = reach(CodecEncoder(2, RATIOS, 3, trainable=True).double(), frames=41)
    waveform = noise(1, 13)
    whole = codec(waveform)
    codec.tile_positions = 3
    for halo, is_heard in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(CodecEncoder, "halo_positions", halo)
        assert (relative_error(codec(waveform), whole) > 1e-9) == is_heard


def test_tile_seconds():
    for seconds, frames in ((None, None), (1.0, 25), (0.5, 12), (0.001, 1)):
        assert build_codec(CodecConfig(encoder_hidden_size=2, tile_seconds=seconds)).tile_positions == frames


def test_frozen_codec_takes_no_gradient_and_a_trainable_one_does():
    waveform = noise(1, 2).requires_grad_()
    frozen, trainable = build(), CodecEncoder(4, RATIOS, 6, trainable=True).double()
    assert not frozen(waveform).requires_grad
    assert not any(p.requires_grad for p in frozen.parameters())
    trainable(waveform).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable.parameters())


def test_random_weights_are_low_pass_where_the_rate_falls():
    """Filters of unit gain in a Hann window: their taps at one channel pair have the window's form, and no other."""
    codec = CodecEncoder(8, RATIOS, 16)
    for stage, stride in zip(codec.stages, RATIOS, strict=True):
        window = torch.hann_window(2 * stride + 2, periodic=False)[1:-1]
        gain = stage.down.weight.sum(-1, keepdim=True)
        assert relative_error(stage.down.weight, gain * window / window.sum()) <= 1e-6
        spread = gain.std() * stage.down.in_channels**0.5
        assert abs(spread - 1) < 6 / (2 * gain.numel()) ** 0.5
    for name, parameter in codec.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name


def test_calibration_gives_unit_variance():
    """Of every convolution's channels, on the sound that it was calibrated with; and centres what is strided."""
    codec = CodecEncoder(8, RATIOS, 16)
    waveform = 0.1 * torch.randn(3, 1, 20 * HOP)
    codec.calibrate(waveform)
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: outputs.update({name: output})

    for name, module in codec.named_modules():
        if isinstance(module, torch.nn.Conv1d):
            module.register_forward_hook(keep(name))
    latents = codec(waveform)
    assert len(outputs) == 1 + 4 * (3 * 2 + 1) + 2
    for name, output in outputs.items():
        assert (output.std(dim=(0, 2)) - 1).abs().max() <= 1e-2, name
        if "down" in name or name == "to_mean":
            assert output.mean(dim=(0, 2)).abs().max() <= 1e-3, name
    assert relative_error(latents, outputs["to_mean"].transpose(1, 2)) == 0
