"""The training objective on held-out clips, and biases that start from them."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pe_av.config import PAIRINGS, Pairing
from pe_av.evaluation.embedder import EmbeddedClips
from pe_av.loss import contrastive_loss
from pe_av.ranks import rank, world_size


@torch.no_grad()
def held_out_losses(
    clips: EmbeddedClips,
    logits: nn.ModuleDict,
    pairings: Sequence[Pairing],
    batch_size: int,
    group: dist.ProcessGroup | None,
) -> dict[str, float]:
    """The loss of each pairing, and their weighted sum as "total".

    A loss depends on the batch size, so the clips are compared in batches of `batch_size`, in their order, and the loss
    is the mean over these; a last batch that is not full is left out. One rank computes each batch, and the sum is
    taken in the order of the batches, so the result is the same to the bit on any number of ranks.

    Args:
        logits: pairing -> module with the scale and bias.
        group: of this rank alone; None with a single process.
    """
    scales = {name: (pair.scale.detach().cpu(), pair.bias.detach().cpu()) for name, pair in logits.items()}
    pairings = [p for p in pairings if all(side in clips.embeds for side in p.embeddings)]
    total = max((len(rows) for rows in clips.embeds.values()), default=0)
    starts = range(0, max(total - total % batch_size, min(total, 1)), batch_size)
    sums = torch.zeros(len(starts), len(pairings), dtype=torch.float64)
    counts = torch.zeros_like(sums)
    for number in range(rank(), len(starts), world_size()):
        losses = _batch_losses(clips, slice(starts[number], starts[number] + batch_size), scales, pairings, group)
        for index, pairing in enumerate(pairings):
            if pairing.name in losses:
                sums[number, index], counts[number, index] = losses[pairing.name].double(), 1
    if world_size() > 1:
        dist.all_reduce(sums)
        dist.all_reduce(counts)
    columns = zip(pairings, sums.sum(0).tolist(), counts.sum(0).tolist(), strict=True)
    means = {pairing.name: loss / count for pairing, loss, count in columns if count}
    if not means:
        return {}
    return {"total": sum(p.weight * means[p.name] for p in pairings if p.name in means), **means}


def _batch_losses(
    clips: EmbeddedClips,
    rows: slice,
    logits: dict[str, tuple[Tensor, Tensor]],
    pairings: Sequence[Pairing],
    group: dist.ProcessGroup | None,
) -> dict[str, Tensor]:
    """The losses of those pairings of which at least two of the rows have both sides."""
    valid = {side: clips.valid[side][rows] for p in pairings for side in p.embeddings}
    present = [p for p in pairings if (valid[p.embeddings[0]] & valid[p.embeddings[1]]).sum() >= 2]
    if not present:
        return {}
    valid = {side: valid[side] for p in present for side in p.embeddings}
    embeds = {side: clips.embeds[side][rows] for side in valid}
    keys = {kind: key[rows] for kind, key in clips.keys.items()}
    return contrastive_loss(embeds, logits, present, valid, keys, group).losses


@torch.no_grad()
def start_biases(clips: EmbeddedClips, logits: nn.ModuleDict, batch_size: int) -> None:
    """Set the bias of each pairing to −log(N − 1) − s · (mean of x·y over pairs that do not belong together).

    Such a pair then has a probability of about 1 / N, for a batch size N; the scale s stays.
    """
    for name, (left, right) in PAIRINGS.items():
        if name in logits and left in clips.embeds and right in clips.embeds:
            rows = clips.valid[left] & clips.valid[right]
            if rows.sum() < 2:
                continue
            similarity, pair = clips.embeds[left][rows] @ clips.embeds[right][rows].T, logits[name]
            negatives = similarity[~torch.eye(len(similarity), dtype=torch.bool)].mean()
            pair.bias.fill_(-math.log(batch_size - 1) - pair.scale.item() * negatives.item())
