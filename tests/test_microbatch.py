"""Micro-batches against the whole batch: the same gradients, also where the model draws random numbers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import random_batch, randomize, relative_error, small_config
from torch import Tensor, nn

from pe_av.config import LossConfig
from pe_av.loss import contrastive_loss
from pe_av.model.pe_audio_video import PEAudioVideo
from pe_av.training.gradient_caching import backward


class Embedder(nn.Module):
    """The model with dropout of its embeddings: a seed gives the rows the same mask in a batch and in micro-batches."""

    def __init__(self, model: PEAudioVideo, dropout: float):
        super().__init__()
        self.model, self.dropout = model, dropout

    def forward(self, micro_batch: dict[str, Any]) -> dict[str, Tensor]:
        inputs = micro_batch["inputs"]
        rows = inputs["rows"]
        embeds = self.model(**{name: value for name, value in inputs.items() if name != "rows"}).embeds()
        if self.dropout:
            noise = torch.rand(len(rows), 28, generator=None, dtype=torch.float64)  # drawn again in the second pass
            embeds = {name: value * (noise > self.dropout) for name, value in embeds.items()}
        return embeds


def gradients(sizes: list[int], dropout: float) -> tuple[float, dict[str, Tensor]]:
    config = small_config()
    config = replace(config, text=replace(config.text, attention_dropout=0.0))
    model = randomize(PEAudioVideo(config)).double().train()
    batch = random_batch(config, rows=((24, 6, 3), (9, 5, 4), (15, 7, 3), (11, 4, 2), (20, 6, 5), (8, 3, 1)))
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()} | {"rows": torch.arange(6)}
    micro_batches = [
        {"inputs": dict(zip(batch, values, strict=True)), "texts": {}, "size": len(values[0])}
        for values in zip(*(v.split(sizes) for v in batch.values()), strict=True)
    ]
    logits = {name: (pair.scale, pair.bias) for name, pair in model.logits.items()}

    def loss_of(embeds: dict[str, Tensor]) -> tuple[Tensor, tuple[float, dict[str, Tensor]]]:
        out = contrastive_loss(embeds, logits, LossConfig().pairings)
        return out.total, (out.total.item(), out.losses)

    torch.manual_seed(5)
    loss, losses = backward(Embedder(model, dropout), micro_batches, loss_of, torch.device("cpu"))
    assert set(losses) == set(model.logits)
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sizes", [[3, 3], [1, 2, 3], [1] * 6])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_of_the_whole_batch(sizes: list[int], dropout: float):
    loss, expected = gradients([6], dropout)
    found_loss, found = gradients(sizes, dropout)
    assert found_loss == pytest.approx(loss, rel=1e-9)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) <= 1e-5 or expected[name].norm() < 1e-12, name


def test_the_random_numbers_go_on_as_if_nothing_had_been_computed_twice():
    gradients([6], 0.4)
    after_whole = torch.rand(3)
    gradients([2, 4], 0.4)
    assert torch.equal(torch.rand(3), after_whole)
