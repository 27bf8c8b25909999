"""Contrastive training with a batch larger than the memory (gradient caching, arXiv 2101.06983).

The loss needs the embeddings of the whole batch, but not the activations behind them. So: embed every micro-batch
without a graph, take the loss and its gradient at the embeddings, then embed every micro-batch again, with a graph and
the same random numbers, and send its rows of that gradient through. The gradients are those of the whole batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .parallel import gradients_stay_local


def backward(
    embedder: nn.Module,
    micro_batches: Sequence[dict[str, Any]],
    loss_of: Callable[[dict[str, Tensor]], tuple[Tensor, Any]],
    last: bool = True,
) -> Any:
    """Gradients of the whole batch into the parameters.

    Args:
        embedder: a micro-batch -> name -> (rows, D) embeddings, the same names for all.
        micro_batches: what the embedder takes, in the order of the rows.
        loss_of: embeddings of all rows -> scalar loss, and whatever is to be returned.
        last: whether ranks average their gradients now; False if another batch follows before the optimizer's step.
    Returns:
        the second that `loss_of` gave.
    """
    if len(micro_batches) == 1:
        with gradients_stay_local(embedder, not last):
            loss, result = loss_of(embedder(micro_batches[0]))
            loss.backward()
        return result
    states, parts = [], []
    for inputs in micro_batches:
        states.append(_random_state())
        with torch.no_grad():
            parts.append(embedder(inputs))
    after = _random_state()
    whole = {name: torch.cat([part[name] for part in parts]).requires_grad_() for name in parts[0]}
    loss, result = loss_of(whole)
    loss.backward()  # as far as the embeddings, and into the logit scales and biases
    start = 0
    for index, inputs in enumerate(micro_batches):
        _set_random_state(states[index])
        with gradients_stay_local(embedder, not last or index < len(micro_batches) - 1):
            embeds = embedder(inputs)
            rows = slice(start, start + len(next(iter(embeds.values()))))
            wanted = [name for name, embeddings in whole.items() if embeddings.grad is not None]
            torch.autograd.backward([embeds[name] for name in wanted], [whole[name].grad[rows] for name in wanted])
        start = rows.stop
    _set_random_state(after)
    return result


def _random_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
