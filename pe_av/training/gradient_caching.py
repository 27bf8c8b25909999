"""Contrastive training with a batch larger than the memory: gradient caching (arXiv 2101.06983).

The loss needs the embeddings of the whole batch, but not the activations behind them. So every micro-batch is embedded
twice: first without a graph, to compute the loss and its gradient at the embeddings; then again with a graph and the
same random numbers, to propagate its rows of that gradient. The result is the gradient of the whole batch.

A micro-batch is moved to the device only when it is embedded, so `micro_batch_size` bounds all that a step holds there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pe_av.device import to_device
from pe_av.loading.split import joined
from pe_av.training.parallel import gradients_stay_local


def backward(
    embedder: nn.Module,
    micro_batches: Sequence[dict[str, Any]],
    loss_of: Callable[[dict[str, Tensor]], tuple[Tensor, Any]],
    device: torch.device,
    last: bool = True,
) -> Any:
    """Add the gradients of the whole batch to those of the parameters.

    Args:
        embedder: micro-batch -> name -> (rows, …) embeddings. Where clips lack a modality, micro-batches may give
            different names; an embedding that one of them does not give is zero in its rows.
        micro_batches: what the embedder takes, in the order of the rows (loading/split.py). At least one has
            something to compute. With several ranks there are as many on each, computing the same.
        loss_of: embeddings of all rows -> scalar loss, and anything to be returned.
        device: where the embedder computes.
        last: whether ranks average their gradients now; False if another batch follows before the optimizer's step.
    Returns:
        the second value of `loss_of`.
    """
    if len(micro_batches) == 1:
        with gradients_stay_local(embedder, not last):
            loss, result = loss_of(embedder(to_device(micro_batches[0], device)))
            if loss.requires_grad:
                loss.backward()
        return result

    # 1. every embedding, without a graph
    states, embedded = [], []
    for micro_batch in micro_batches:
        states.append(_random_state())
        with torch.no_grad():
            embedded.append(embedder(to_device(micro_batch, device)) if _computes(micro_batch) else {})
    after = _random_state()

    # 2. the loss, and its gradient at the embeddings and in the logit scales and biases
    sizes = [micro_batch["size"] for micro_batch in micro_batches]
    whole = joined(embedded, sizes)
    for value in whole.values():
        value.requires_grad_()
    loss, result = loss_of(whole)
    if loss.requires_grad:
        loss.backward()

    # 3. every embedding again, and its rows of that gradient through the model
    last_to_compute = max(index for index, micro_batch in enumerate(micro_batches) if _computes(micro_batch))
    start = 0
    for index, (micro_batch, size) in enumerate(zip(micro_batches, sizes, strict=True)):
        if _computes(micro_batch):
            _set_random_state(states[index])
            with gradients_stay_local(embedder, not last or index < last_to_compute):
                embeds = embedder(to_device(micro_batch, device))
                # an embedding that no pairing uses has no gradient, and one of frozen towers has no graph for it
                names = [name for name in embeds if whole[name].grad is not None and embeds[name].requires_grad]
                # the embeddings of a micro-batch without rows may have any shape: their gradient is zero
                gradients = [
                    whole[name].grad[start : start + size] if size else torch.zeros_like(embeds[name]) for name in names
                ]
                if names:
                    torch.autograd.backward([embeds[name] for name in names], gradients)
        start += size
    _set_random_state(after)
    return result


def _computes(micro_batch: dict[str, Any]) -> bool:
    """Whether there is anything to compute; there may be rows without that, where no pairing needs their embeddings."""
    return bool(micro_batch["inputs"] or micro_batch["texts"])


def _random_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
