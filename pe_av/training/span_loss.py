"""The loss of frame-level training: every audio position against every caption of the batch, on one rank or many."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pe_av.ranks import rank, world_size


def span_loss(
    audio: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    targets: Tensor,
    mask: Tensor,
    captions: Tensor,
    first: int = 0,
    positions: int | None = None,
) -> Tensor:
    """The sigmoid loss of every position with every caption.

    L = −(1 / positions) Σ_{i,t,j} log σ(z_itj (s · x_it · y_j + b)), where z is +1 at the positions of recording i that
    are in the spans of its own caption, and −1 otherwise: outside the spans, and for the captions of other recordings.
    A recording may well contain what an equal caption of another row describes, so such pairs are left out.

    Args:
        audio: (B, T, D) embeddings of positions; text: (N, D), of all captions of the batch; scale, bias: (1,).
        targets: (B, T) bool, the positions of row i that its own caption describes.
        mask: (B, T) bool, valid positions.
        captions: (N,) integers, equal for equal captions.
        first: the caption of row i is number `first` + i.
        positions: valid positions of the whole batch, by which the sum is divided; None: those in `mask`.
    """
    with torch.autocast(audio.device.type, enabled=False):
        logits = scale.float() * torch.einsum("itd,jd->itj", audio.float(), text.float()) + bias.float()
    of_rows = torch.arange(first, first + len(audio), device=text.device)  # the number of each row's own caption
    own = (of_rows[:, None] == torch.arange(len(text), device=text.device))[:, None]  # (B, 1, N)
    positive = own & targets[..., None]
    counted = mask[..., None] & (own | (captions[of_rows][:, None] != captions)[:, None])
    losses = F.softplus(torch.where(positive, -logits, logits))
    return losses.masked_fill(~counted, 0).sum() / (mask.sum() if positions is None else positions)


def gather_rows(own: Tensor, rows: Sequence[int]) -> Tensor:
    """(B, …) of every rank -> (N, …) of all ranks. The gradient of a rank's rows is summed over all ranks.

    Args:
        rows: B of every rank.
    """
    return _GatherRows.apply(own, rows)


def sum_gradient(value: Tensor) -> Tensor:
    """A parameter that every rank uses in the world size times its own share of a loss. On every rank, its gradient
    becomes that of the whole loss."""
    return _SumGradient.apply(value)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own: Tensor, rows: Sequence[int]) -> Tensor:
        ctx.first, ctx.count = sum(rows[: rank()]), len(own)
        if world_size() == 1:
            return own.clone()
        padded = own.new_zeros(max(rows), *own.shape[1:])
        padded[: len(own)] = own
        gathered = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(gathered, padded)
        return torch.cat([of_rank[:count] for of_rank, count in zip(gathered, rows, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        if world_size() > 1:
            gradient = gradient.contiguous()
            dist.all_reduce(gradient)
        return gradient[ctx.first : ctx.first + ctx.count], None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        if world_size() > 1:
            gradient = gradient.contiguous()
            dist.all_reduce(gradient)
            gradient = gradient / world_size()
        return gradient
