"""Contrastive training with a batch larger than the memory (gradient caching, arXiv 2101.06983).

The loss needs the embeddings of the whole batch, but not the activations behind them. So: embed every micro-batch
without a graph, take the loss and its gradient at the embeddings, then embed every micro-batch again, with a graph and
the same random numbers, and send its rows of that gradient through. The gradients are those of the whole batch.

A micro-batch travels to the device when its turn comes, so `micro_batch_size` bounds all that a step holds there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pe_av.device import to_device
from pe_av.training.parallel import gradients_stay_local


def backward(
    embedder: nn.Module,
    micro_batches: Sequence[dict[str, Any]],
    loss_of: Callable[[dict[str, Tensor]], tuple[Tensor, Any]],
    device: torch.device,
    last: bool = True,
) -> Any:
    """Gradients of the whole batch into the parameters.

    Args:
        embedder: a micro-batch -> name -> (rows, …) embeddings. Micro-batches may give different names, where clips
            lack something; an embedding that one of them does not give is zero there.
        micro_batches: what the embedder takes, in the order of the rows (`data.parts`), at least one of them not empty;
            on several ranks as many on each, computing the same.
        loss_of: embeddings of all rows -> scalar loss, and whatever is to be returned.
        device: where the embedder computes.
        last: whether ranks average their gradients now; False if another batch follows before the optimizer's step.
    Returns:
        the second that `loss_of` gave.
    """
    if len(micro_batches) == 1:
        with gradients_stay_local(embedder, not last):
            loss, result = loss_of(embedder(to_device(micro_batches[0], device)))
            if loss.requires_grad:
                loss.backward()
        return result
    # a part in which nothing is to be computed, on any rank, has rows all the same
    last_of_all = max(index for index, part in enumerate(micro_batches) if _computes(part))
    states, embedded = [], []
    for part in micro_batches:
        states.append(_random_state())
        with torch.no_grad():
            embedded.append(embedder(to_device(part, device)) if _computes(part) else {})
    after = _random_state()
    sizes = [part["size"] for part in micro_batches]
    whole = joined(embedded, sizes)
    for value in whole.values():
        value.requires_grad_()
    loss, result = loss_of(whole)
    if loss.requires_grad:
        loss.backward()  # as far as the embeddings, and into the logit scales and biases
    start = 0
    for index, (part, size) in enumerate(zip(micro_batches, sizes, strict=True)):
        if _computes(part):
            _set_random_state(states[index])
            with gradients_stay_local(embedder, not last or index < last_of_all):
                embeds = embedder(to_device(part, device))
                # what frozen parts give has no graph to send a gradient through
                wanted = [name for name in embeds if whole[name].grad is not None and embeds[name].requires_grad]
                # of a part without rows there is nothing to say, whatever shape its embeddings have
                gradients = [
                    whole[name].grad[start : start + size] if size else torch.zeros_like(embeds[name])
                    for name in wanted
                ]
                if wanted:
                    torch.autograd.backward([embeds[name] for name in wanted], gradients)
        start += size
    _set_random_state(after)
    return result


def _computes(part: dict[str, Any]) -> bool:
    return bool(part["inputs"] or part["texts"])


def joined(embedded: Sequence[dict[str, Tensor]], sizes: Sequence[int]) -> dict[str, Tensor]:
    """Embeddings of consecutive rows, one after the other; zeros where a name is missing. Without any rows at all,
    those of one part, which have none."""
    like = {name: value for embeds in embedded for name, value in embeds.items()}
    like |= {
        name: value for embeds, size in zip(embedded, sizes, strict=True) if size for name, value in embeds.items()
    }

    def rows_of(name: str, embeds: dict[str, Tensor], size: int) -> Tensor:
        return embeds[name] if name in embeds else like[name].new_zeros(size, *like[name].shape[1:])

    with_rows = [(embeds, size) for embeds, size in zip(embedded, sizes, strict=True) if size]
    return {
        name: torch.cat([rows_of(name, embeds, size) for embeds, size in with_rows]) if with_rows else value
        for name, value in like.items()
    }


def _random_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
