"""What only a GPU can show: its kernels, precisions, compiler and NCCL against float64 on the CPU. `pytest -m gpu`"""

import os
import socket
import warnings
from copy import deepcopy

import pytest
import torch
import torch.multiprocessing as mp
from conftest import in_double, random_batch, relative_error
from torch import Tensor

from pe_av import build_model
from pe_av.config import LossConfig, OptimConfig, ParallelConfig
from pe_av.device import precision_context, to_device
from pe_av.evaluation.embedder import Embedder
from pe_av.loss import contrastive_loss
from pe_av.model import packing
from pe_av.model.pe_audio_video import PEAudioVideo
from pe_av.model.transformer import attend
from pe_av.ranks import process_group
from pe_av.training.gradient_caching import backward
from pe_av.training.optim import build_optimizer, take_step
from pe_av.training.parallel import clip_gradients, parallelize

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
ROWS = ((24, 60, 8), (9, 25, 8), (15, 35, 3), (64, 50, 5))  # tokens, codec frames, video frames


def new_model() -> PEAudioVideo:
    """The tiny one, as a training starts with it, with a loss that depends on the embeddings."""
    torch.manual_seed(0)
    model = build_model("tiny")
    model.audio.codec.calibrate(0.1 * torch.randn(1, 1, 48_000))
    for pair in model.logits.values():
        pair.scale.data.fill_(1.0)
    return model


def results(model: PEAudioVideo, batch: dict[str, Tensor], precision: str = "fp32") -> dict[str, Tensor]:
    """All embeddings, and the gradient of every parameter that has one, in float64 on the CPU."""
    device = next(model.parameters()).device
    model.zero_grad(set_to_none=True)
    with precision_context(precision, device):
        out = model(**to_device(batch, device), return_loss=True)
    out.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | out.embeds()
    return {name: value.detach().double().cpu() for name, value in found.items()}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    model = new_model().double()
    return results(model, in_double(random_batch(model.config, ROWS)))


def expect(found: dict[str, Tensor], expected: dict[str, Tensor], embeds: float, gradients: float) -> float:
    """Each embedding, and the gradients of all parameters as one vector; returns the error of the gradients. In a new
    model these are small differences of large terms, so rounding to bfloat16 changes them much."""
    assert found.keys() == expected.keys()
    names = [name for name in expected if "." in name]
    whole, right = (torch.cat([values[name].flatten() for name in names]) for values in (found, expected))
    error = relative_error(whole, right)
    assert error <= gradients
    for name in expected.keys() - set(names):
        assert relative_error(found[name], expected[name]) <= embeds, name
    return error


def test_float32(expected: dict[str, Tensor]):
    model = new_model().to(GPU)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expect(results(model, random_batch(model.config, ROWS)), expected, 1e-4, 1e-3)


def test_bfloat16_and_ragged_rows(expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch):
    """Flash attention for rows is used in all four transformers, and no worse than padded attention."""
    model, used = new_model().to(GPU), []
    batch = random_batch(model.config, ROWS)
    kernel = packing.varlen_attn
    monkeypatch.setattr(packing, "varlen_attn", lambda *a, **k: (used.append(k["window_size"]), kernel(*a, **k))[1])
    packed = results(model, batch, "bf16")
    assert len(used) >= model.text.nth + 6 and (model.text.reach, model.text.reach) in used
    error = expect(packed, expected, 0.03, 0.5)
    monkeypatch.setattr(packing, "flash_dtype", lambda x, head_dim: None)
    assert error <= 1.5 * expect(results(model, batch, "bf16"), expected, 0.03, 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reach", [None, 0, 3, 64])
@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(4, 4, 32), (6, 2, 64), (2, 1, 128)])
def test_flash_attention_for_rows(dtype: torch.dtype, reach: int | None, heads: int, key_heads: int, head_dim: int):
    """Forward and backward against eager attention under a mask, in float64."""
    lengths, size = [150, 1, 33, 64], 150
    mask = torch.arange(size) < torch.tensor(lengths)[:, None]
    distance = (torch.arange(size)[:, None] - torch.arange(size)).abs()
    window = mask[:, None, None] & (distance <= (size if reach is None else reach)) | (distance == 0)
    inputs = [torch.randn(4, h, size, head_dim).to(dtype) for h in (heads, key_heads, key_heads)]
    upstream = torch.randn(4, heads, size, head_dim).to(dtype) * mask[:, None, :, None]

    exact = [x.double().requires_grad_() for x in inputs]
    right, _ = attend(*exact, window, "eager")
    right_gradients = torch.autograd.grad(right, exact, upstream.double())

    rows = packing.Packing(mask.to(GPU), lengths, reach, packing.flash_dtype(inputs[0].to(GPU), head_dim))
    assert rows.flash == dtype
    leaves = [x.to(GPU).requires_grad_() for x in inputs]
    flat = [rows.pack(x.transpose(1, 2)).transpose(1, 2) for x in leaves]
    found = rows.unpack(attend(*flat, rows, "sdpa")[0].transpose(1, 2)).transpose(1, 2)
    gradients = torch.autograd.grad(found, leaves, upstream.to(GPU))
    error = 0.01 if dtype == torch.bfloat16 else 0.002
    assert relative_error(found.cpu() * mask[:, None, :, None], right * mask[:, None, :, None]) <= error
    for gradient, right_gradient in zip(gradients, right_gradients, strict=True):
        assert relative_error(gradient.cpu(), right_gradient) <= 2 * error


def test_compiled_blocks(expected: dict[str, Tensor]):
    model = new_model().to(GPU)
    parallelize(model, Embedder(model), ParallelConfig(compile=True), GPU)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expect(results(model, random_batch(model.config, ROWS)), expected, 1e-4, 1e-3)
    expect(results(model, random_batch(model.config, ROWS), "bf16"), expected, 0.03, 0.5)


def test_flex_attention(expected: dict[str, Tensor]):
    model = new_model().to(GPU)
    model.set_attention("flex")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expect(results(model, random_batch(model.config, ROWS)), expected, 1e-4, 1e-3)


def test_activations_that_are_computed_again(expected: dict[str, Tensor]):
    model = new_model().to(GPU)
    parallelize(model, Embedder(model), ParallelConfig(activation_checkpointing=True), GPU)
    expect(results(model, random_batch(model.config, ROWS), "bf16"), expected, 0.03, 0.5)


@pytest.mark.parametrize("trainable", [False, True])
def test_the_codec_on_ragged_rows(trainable: bool):
    """Rows of similar length together where it is frozen, the padded batch where it learns."""
    codec = new_model().audio.codec.requires_grad_(trainable)
    codec.trainable, codec.tile_positions = trainable, 8
    lengths = torch.tensor([30, 3, 29, 12, 70, 12, 1, 0])
    mask, waveform = torch.arange(70) < lengths[:, None], 0.1 * torch.randn(8, 1, 70 * codec.hop_length)
    right = deepcopy(codec).double()
    exact = right(waveform.double(), mask)
    codec.to(GPU)
    for allow_tf32, error in ((False, 1e-4), (True, 1e-2)):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allow_tf32):
            found = codec(waveform.to(GPU), mask.to(GPU))
        assert relative_error(found.cpu()[mask], exact[mask]) <= error
    if trainable:
        exact[mask].square().sum().backward()
        found[mask.to(GPU)].square().sum().backward()
        for (name, p), q in zip(right.named_parameters(), codec.parameters(), strict=True):
            assert relative_error(q.grad.cpu(), p.grad) <= 0.05, name
    else:  # in bfloat16 no worse than the padded batch
        codec, waveform, mask = codec.bfloat16(), waveform.to(GPU).bfloat16(), mask.to(GPU)
        rows, padded = (encode(waveform, mask)[mask].cpu() for encode in (codec, codec._encode))
        assert relative_error(rows, exact[mask.cpu()]) <= 1.5 * relative_error(padded, exact[mask.cpu()])


class Steps:
    """A training's steps on one fixed batch: embedder, loss, gradients, clipping, Muon and AdamW."""

    def __init__(self, parallel: ParallelConfig | None, precision: str):
        self.model, self.precision = new_model().to(GPU).train(), precision
        embedder = Embedder(self.model)
        self.embedder = embedder if parallel is None else parallelize(self.model, embedder, parallel, GPU)
        self.optimizer = build_optimizer(self.model, OptimConfig(lr=1e-3, muon_lr=3e-3, warmup_steps=0))
        batch = random_batch(self.model.config, ROWS)
        texts = {name: batch.pop(name) for name in ("input_ids", "attention_mask")}
        part = {"inputs": batch, "texts": {None: texts}, "rows": None, "size": len(ROWS)}
        self.part = to_device(part, GPU)  # so that a step copies nothing

    def step(self) -> Tensor:
        logits = {name: (pair.scale, pair.bias) for name, pair in self.model.logits.items()}

        def loss_of(embeds: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            total = contrastive_loss(embeds, logits, LossConfig().pairings).total
            return total, total.detach()

        self.optimizer.zero_grad()
        with precision_context(self.precision, GPU):
            loss = backward(self.embedder, [self.part], loss_of, GPU)
        norm = clip_gradients([p for p in self.model.parameters() if p.requires_grad], 1.0)
        take_step(self.optimizer, ~norm.isfinite())
        return loss


def one_rank(_: int, strategy: str, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    expected = Steps(None, "fp32")
    losses = [expected.step().item() for _ in range(4)]
    assert losses[-1] < losses[0]
    with process_group(GPU, timeout_minutes=1):
        found = Steps(ParallelConfig(strategy=strategy), "fp32")
        assert [found.step().item() for _ in range(4)] == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_rank_with_nccl(strategy: str):
    """Gives the losses of a process without a group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_rank, (strategy, port), nprocs=1)


def test_the_host_waits_for_lengths_only():
    """In a step: for those of four transformers and of the rows of the codec, their order, and the places of frames."""
    steps = Steps(None, "bf16")
    for _ in range(2):
        steps.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            steps.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) <= 7, waits
