"""The formulas of `python -m benchmarks expect` against what a real step computes and sends."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.expect import clip_flops, ring_bytes
from pe_av import build_model
from pe_av.config import HEADS, PAIRINGS, LossConfig
from pe_av.loss import contrastive_loss


def test_operations_are_those_of_a_real_step():
    """Counted on the CPU, beside the formula, which also counts what nobody needs: the gradients with respect to pixels
    and codec features."""
    model, sizes = build_model("tiny").train(), {"seconds": 2, "frames": 8, "tokens": 32}
    model.set_attention("eager")  # PyTorch does not count its fused attention on a CPU
    codec, trained = clip_flops(build_model("tiny", "meta"), **sizes)
    waveform = 0.1 * torch.randn(1, 1, 96_000)
    with FlopCounterMode(display=False) as counter:
        features, _ = model.audio.encode(waveform)
    assert codec == pytest.approx(counter.get_total_flops(), rel=0.01)  # which encodes in blocks that overlap
    inputs = {"codec_features": features, "pixel_values_videos": torch.randn(1, 8, 3, 64, 64)}
    texts = {None: {"input_ids": torch.randint(5, 500, (1, 32))}}
    with FlopCounterMode(display=False) as counter:
        sum(value.sum() for value in model.embed(inputs, texts).values()).backward()
    needless = 2 * (8 * 16 * (3 * 16 * 16) * 128 + 2 * 25 * 64 * 128)  # 16 patches a frame; 25 positions a second
    assert 3 * trained - needless == counter.get_total_flops()


@pytest.mark.parametrize("ranks", [2, 8])
def test_bytes_of_the_ring_are_those_that_are_sent(ranks: int, monkeypatch: pytest.MonkeyPatch):
    """On the first rank of a process group whose other ranks are pretended; what it sends is the same."""
    sent = []

    class Done:
        def wait(self) -> None: ...

    def count(operations: list[dist.P2POp]) -> list[Done]:
        sent.extend(op.tensor.nbytes for op in operations if op.op is dist.isend)
        return [Done()]

    monkeypatch.setattr(dist, "batch_isend_irecv", count)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        embeds = {name: F.normalize(torch.randn(6, 16), dim=1).requires_grad_() for name in HEADS}
        logits = {name: (torch.tensor([10.0]), torch.tensor([-10.0])) for name in PAIRINGS}
        contrastive_loss(embeds, logits, LossConfig().pairings)
    finally:
        dist.destroy_process_group()
    assert sum(sent) == ring_bytes(6, ranks, 16)
