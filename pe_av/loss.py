"""The sigmoid contrastive loss (arXiv 2303.15343, equation 1) over the pairings of a batch, on one process or many.

For one pairing with logits l_ij of N pairs, L = −(1/N) Σ_ij log σ(z_ij l_ij), with z_ij = +1 on the diagonal, where the
pairs that belong together stand, and −1 everywhere else. The published code multiplies by eye(N) instead, which leaves
the pairs that do not belong together without any gradient. The total is the weighted sum over the pairings.

Three forms, from the plainest to the one that training uses, all with the same value and gradient:

- `sigmoid_loss`: the formula, of the logits of one process;
- `gathered_loss`: the formula on every rank, of all embeddings of all ranks; autograd does the rest;
- `contrastive_loss`: a ring (as in section 3.1 of that paper). The right-hand embeddings of a rank go around all ranks
  in one message per hop, meet the left-hand ones of each, gather their gradient on the way, and come home with it.
  Value and gradients are computed in one pass, block by block, so that no N × N matrix is ever kept.

What counts. Row i of the left side belongs to row i of the right side. A row whose `valid` flag is False (the clip
lacks a modality) is left out of every pair, as a positive and as a negative. If one side of a pairing is text alone,
two different rows with equal `caption_keys` have the same caption, which is right for both: that pair is left out too.
N is the number of rows, over all ranks, both sides of which are valid; with none, the loss is 0 and has no gradient.

What each rank gets. The loss is that of the global batch, the same on every rank. So are the gradients of scales and
biases. The gradient of a rank's own embeddings is the global loss's times the number of ranks. Data-parallel training
averages the gradients of parameters over the ranks (DDP and FSDP do); what it arrives at is then exactly the gradient
of one process that holds the whole batch, in the towers and in the scales and biases.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pe_av.config import CAPTIONS, HEADS, Pairing

BLOCK = 2048  # rows and columns of logits computed at a time: 16 MiB, beyond which matrix products get no faster


@dataclass
class LossOutput:
    total: Tensor  # scalar, with gradient
    losses: dict[str, Tensor]  # pairing -> its own loss, without weight and gradient, to be logged


def sigmoid_loss(logits: Tensor, counted: Tensor | None = None) -> Tensor:
    """(N, N) logits -> scalar, in float32; float64 stays.

    Args:
        counted: (N, N) bool, False for the pairs that are left out; the loss is divided by the positives that remain.
    Raises:
        ValueError: the logits are not square, so which pairs belong together is not known.
    """
    if logits.dim() != 2 or logits.shape[0] != logits.shape[1]:
        raise ValueError(
            f"logits are {tuple(logits.shape)}: the loss needs one right-hand item for every left-hand one"
        )
    logits = logits if logits.dtype == torch.float64 else logits.float()
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    losses = -F.logsigmoid(signs * logits)
    if counted is None:
        return losses.sum() / len(logits)
    positives = counted.diagonal().sum()
    return losses.masked_fill(~counted, 0).sum() / positives.clamp(min=1) * (positives > 0)


def contrastive_loss(
    embeds: Mapping[str, Tensor],
    logits: Mapping[str, tuple[Tensor, Tensor]],
    pairings: Sequence[Pairing],
    valid: Mapping[str, Tensor] | None = None,
    caption_keys: Mapping[str | None, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    block: int = BLOCK,
) -> LossOutput:
    """The weighted sum of the pairings' losses over the global batch; the head of this file says what it gives whom.

    It is computed in float32 from embeddings of any precision, under autocast too; in float64 if one of them is.

    Args:
        embeds: embedding -> (B, D), not normalized; named as in `config.HEADS`, with "@kind" where the caption's kind
            matters, e.g. "text_audio@audio_visual" (`Pairing.embeddings`). Every rank may have another B, also 0.
        logits: pairing of `config.PAIRINGS` -> its learned (scale, bias), of one element each.
        valid: embedding, named as in `embeds` -> (B,) bool, False where the clip has none; None or not named: all True.
        caption_keys: kind of caption, None for pairings without -> (B,) int64, equal where captions are equal.
            Ranks must give the same keys to the same captions, and masks of the same names.
        group: the ranks that share the batch; None: all, or this process alone where none have been set up.
        block: side of the blocks of logits.
    Raises:
        ValueError: embeddings that are missing or do not fit together, or ranks that disagree on anything but B. It is
            raised on every rank, so that none waits for another.
    """
    plan = _plan(embeds, logits, pairings, valid or {}, caption_keys or {}, group, block)
    tensors = [embeds[name] for name in plan.names]
    scales, biases = zip(*(logits[name] for name in plan.learned), strict=True)
    total, losses = _RingLoss.apply(plan, *tensors, *scales, *biases)
    return LossOutput(total, {p.name: loss for p, loss in zip(plan.pairings, losses, strict=True)})


def gathered_loss(
    embeds: Mapping[str, Tensor],
    logits: Mapping[str, tuple[Tensor, Tensor]],
    pairings: Sequence[Pairing],
    valid: Mapping[str, Tensor] | None = None,
    caption_keys: Mapping[str | None, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
) -> LossOutput:
    """`contrastive_loss` written plainly: the reference for tests, which needs several N × N matrices per pairing."""
    plan = _plan(embeds, logits, pairings, valid or {}, caption_keys or {}, group, BLOCK)

    def gather(rows: Tensor) -> Tensor:  # (B, …) of every rank -> (N, …)
        if plan.world == 1:
            return rows
        padded = rows.new_zeros(max(plan.rows), *rows.shape[1:])
        padded[: len(rows)] = rows.detach()
        parts = [torch.empty_like(padded) for _ in plan.rows]
        dist.all_gather(parts, padded, group=group)
        parts = [part[:n] for part, n in zip(parts, plan.rows, strict=True)]
        parts[plan.rank] = rows + (plan.world - 1) * (rows - rows.detach()) if rows.requires_grad else rows
        return torch.cat(parts)

    present = {name: gather(plan.valid[name].byte()).bool() for name in plan.names if name in plan.valid}
    keys = {kind: gather(plan.keys[kind]) for kind in plan.kinds}
    sides = {}
    for name in plan.names:
        rows = embeds[name].to(plan.dtype)
        if name in plan.valid:
            rows = rows.masked_fill(~plan.valid[name][:, None], 0)
        sides[name] = gather(rows)

    losses = {}
    for pairing in plan.pairings:
        left, right = pairing.embeddings
        scale, bias = (value.to(plan.dtype) for value in logits[pairing.logits])
        n = sum(plan.rows)
        counted = torch.ones(n, n, dtype=torch.bool, device=scale.device)
        if left in present:
            counted &= present[left][:, None]
        if right in present:
            counted &= present[right][None, :]
        if plan.compares_captions(pairing):
            key = keys[pairing.caption]
            counted &= (key[:, None] != key[None, :]) | torch.eye(n, dtype=torch.bool, device=key.device)
        with torch.autocast(scale.device.type, enabled=False):
            losses[pairing.name] = sigmoid_loss(scale * (sides[left] @ sides[right].T) + bias, counted)
    total = sum(pairing.weight * losses[pairing.name] for pairing in plan.pairings)
    return LossOutput(total, {name: loss.detach() for name, loss in losses.items()})


# ---------------------------------------------------------------------------------------------------------------------
# what is to be computed, and that all ranks agree on it


@dataclass
class _Plan:
    """What the ranks have agreed on, and the masks, which have no gradient."""

    pairings: list[Pairing]
    valid: Mapping[str, Tensor]
    keys: Mapping[str | None, Tensor]
    group: dist.ProcessGroup | None
    block: int
    names: list[str] = field(default_factory=list)  # the embeddings that take part, each once
    learned: list[str] = field(default_factory=list)  # the scales and biases that take part, each once
    dtype: torch.dtype = torch.float32
    world: int = 1
    rank: int = 0
    rows: list[int] = field(default_factory=list)  # of every rank
    gradient: bool = False  # whether any rank wants one

    def compares_captions(self, pairing: Pairing) -> bool:
        """Whether equal captions make equal embeddings on one side, so that which row they stand in tells nothing."""
        return pairing.caption in self.keys and any(HEADS[s] == ("text",) for s in (pairing.left, pairing.right))

    @property
    def right(self) -> list[str]:
        """The embeddings that travel; what several pairings have on their right travels once."""
        return list(dict.fromkeys(pairing.embeddings[1] for pairing in self.pairings))

    @property
    def kinds(self) -> list[str | None]:
        """The kinds of caption whose keys travel."""
        return list(dict.fromkeys(p.caption for p in self.pairings if self.compares_captions(p)))


def _plan(
    embeds: Mapping[str, Tensor],
    logits: Mapping[str, tuple[Tensor, Tensor]],
    pairings: Sequence[Pairing],
    valid: Mapping[str, Tensor],
    keys: Mapping[str | None, Tensor],
    group: dist.ProcessGroup | None,
    block: int,
) -> _Plan:
    plan = _Plan(list(pairings), valid, keys, group, block)
    if dist.is_available() and dist.is_initialized():
        plan.world, plan.rank = dist.get_world_size(group), dist.get_rank(group)
    problem = _problem(embeds, logits, plan)
    if problem is None:
        plan.names = list(dict.fromkeys(name for p in plan.pairings for name in p.embeddings))
        plan.learned = list(dict.fromkeys(p.logits for p in plan.pairings))
        if any(embeds[name].dtype == torch.float64 for name in plan.names):
            plan.dtype = torch.float64
        inputs = [embeds[name] for name in plan.names] + [value for name in plan.learned for value in logits[name]]
        plan.gradient = torch.is_grad_enabled() and any(value.requires_grad for value in inputs)
        plan.rows = [len(inputs[0])]
    if plan.world > 1:
        _agree(plan, problem, [f"{plan.dtype}", *(_describe(p, embeds, plan) for p in plan.pairings if not problem)])
    elif problem is not None:
        raise ValueError(problem)
    return plan


def _agree(plan: _Plan, problem: str | None, lines: list[str]) -> None:
    """Tell the other ranks what is to be computed, in `lines`, and learn how many rows each has."""
    # The numbers of rows size the messages, so the host must know them. Where the group has a backend for the CPU, as
    # it has by default, this leaves the GPU alone; with NCCL alone the host waits here until the embeddings are there.
    device = "cpu" if "cpu:" in dist.get_backend_config(plan.group) else "cuda"
    digest = int.from_bytes(hashlib.blake2b("\n".join(lines).encode(), digest_size=7).digest(), "big")
    rows = plan.rows[0] if plan.rows else 0
    mine = torch.tensor([digest, rows, plan.gradient, problem is not None], device=device)
    everyone = [torch.empty_like(mine) for _ in range(plan.world)]
    dist.all_gather(everyone, mine, group=plan.group)
    digests, plan.rows, gradients, problems = map(list, zip(*torch.stack(everyone).tolist(), strict=True))
    plan.gradient = any(gradients)
    if len(set(digests)) == 1 and not any(problems):
        return
    told: list[tuple[str | None, list[str]]] = [(None, [])] * plan.world
    dist.all_gather_object(told, (problem, lines), group=plan.group)
    if any(problems):
        raise ValueError(problem or next(f"rank {rank}: {theirs}" for rank, (theirs, _) in enumerate(told) if theirs))
    other = next(rank for rank in range(plan.world) if told[rank][1] != lines)
    theirs = told[other][1]
    here = "; ".join(line for line in lines if line not in theirs) or "nothing more, or another order"
    there = "; ".join(line for line in theirs if line not in lines) or "nothing more, or another order"
    raise ValueError(f"the ranks disagree on the loss: rank {plan.rank} has {here}, where rank {other} has {there}")


def _describe(pairing: Pairing, embeds: Mapping[str, Tensor], plan: _Plan) -> str:
    left, right = pairing.embeddings
    masks = [f"valid {name}" for name in (left, right) if name in plan.valid]
    masks += ["caption keys"] if plan.compares_captions(pairing) else []
    return (
        f"{pairing.name} = {left} × {right} in {embeds[left].shape[1]} dimensions, weight {pairing.weight:g}, "
        f"logits {pairing.logits}, masks: {', '.join(masks) or 'none'}"
    )


def _problem(embeds: Mapping[str, Tensor], logits: Mapping[str, tuple[Tensor, Tensor]], plan: _Plan) -> str | None:
    """What is wrong with the arguments on this rank, said rather than raised: the other ranks must hear of it first."""
    if not plan.pairings:
        return "there are no pairings: the loss needs at least one"
    if plan.block < 1:
        return f"block={plan.block} is not positive"
    for pairing in plan.pairings:
        for name in pairing.embeddings:
            if name not in embeds:
                return f"pairing {pairing.name} needs {name} embeddings; there are {', '.join(embeds) or 'none'}"
            if embeds[name].dim() != 2 or not embeds[name].is_floating_point():
                return f"{name} embeddings are {embeds[name].dtype} {tuple(embeds[name].shape)}, not floats (B, D)"
        if pairing.logits not in logits:
            return f"pairing {pairing.name} uses the scale and bias of {pairing.logits}; there are {', '.join(logits)}"
        left, right = (embeds[name] for name in pairing.embeddings)
        if left.shape != right.shape:
            sides = (f"{tuple(embeds[name].shape)} {name}" for name in pairing.embeddings)
            return f"pairing {pairing.name}: {' and '.join(sides)} embeddings do not pair up"
        if left.device != right.device:
            return f"pairing {pairing.name}: its embeddings are on {left.device} and {right.device}"
    rows = {len(embeds[name]) for pairing in plan.pairings for name in pairing.embeddings}
    if len(rows) > 1:
        return f"pairings of {' and '.join(map(str, sorted(rows)))} rows: a batch has the same rows in all of them"
    for name, flags in plan.valid.items():
        if name not in embeds:
            return f"valid names {name}, of which there are no embeddings; there are {', '.join(embeds)}"
        if flags.dtype != torch.bool or flags.shape != embeds[name].shape[:1]:
            return f"valid of {name} is {flags.dtype} {tuple(flags.shape)}, not bool ({len(embeds[name])},)"
    for kind, keys in plan.keys.items():
        if kind is not None and kind not in CAPTIONS:
            return f"caption_keys of {kind!r}: kinds are None and {', '.join(CAPTIONS)}"
        if keys.dtype != torch.int64 or keys.shape != (min(rows),):
            return f"caption_keys of {kind!r} are {keys.dtype} {tuple(keys.shape)}, not int64 ({min(rows)},)"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# the ring


@dataclass
class _Rows:
    """The rows of one rank: its own, or the right-hand side of one that passes by."""

    embeds: dict[str, Tensor]  # (B, D), zeros in rows that are not valid
    gradients: dict[str, Tensor]  # (B, D), the sum so far; empty where no rank wants any
    valid: dict[str, Tensor]  # (B,) bool, where there are flags
    keys: dict[str | None, Tensor]  # (B,) int64


class _RingLoss(torch.autograd.Function):
    """The total and the (pairings,) losses of embeddings, scales and biases; see `contrastive_loss`."""

    @staticmethod
    def forward(ctx, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(tensors[0].device.type, enabled=False):
            total, losses, gradients = _ring(plan, tensors)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[1:], strict=True)
        return None, *((gradient * upstream).to(dtype) if want else None for gradient, dtype, want in wanted)


def _ring(plan: _Plan, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The total, the loss of every pairing, and the gradient of every tensor (none where no rank wants any)."""
    n, device = len(plan.names), tensors[0].device
    own = _own_rows(plan, dict(zip(plan.names, tensors[:n], strict=True)))
    learned = [value.to(plan.dtype).reshape(1) for value in tensors[n:]]
    scales, biases = (
        dict(zip(plan.learned, half, strict=True))
        for half in (learned[: len(learned) // 2], learned[len(learned) // 2 :])
    )

    positives = torch.stack([_positives(pairing, own, plan.rows[plan.rank], device) for pairing in plan.pairings])
    if plan.world > 1:
        dist.all_reduce(positives, group=plan.group)
    share = torch.where(positives > 0, 1 / positives, 0)  # (pairings,) 1/N
    weights = share * share.new_tensor([pairing.weight for pairing in plan.pairings])

    if plan.world > 1:
        messages = _Messages(plan, own, device)
        right = messages.pack(own)
    else:
        right = _Rows(
            own.embeds, {name: torch.zeros_like(own.embeds[name]) for name in plan.right}, own.valid, own.keys
        )
    blocks = _Blocks(plan, device)
    sums = share.new_zeros(3, len(plan.pairings))  # loss; gradient of scale; gradient of bias: without weight and 1/N
    for hop in range(plan.world if max(plan.rows) else 0):
        for k, pairing in enumerate(plan.pairings):
            scale, bias = scales[pairing.logits], biases[pairing.logits]
            blocks.add(sums[:, k], pairing, scale, bias, weights[k].to(plan.dtype), own, right, home=hop == 0)
        if plan.world > 1:
            right = messages.pass_on(hop)

    if plan.world > 1:
        dist.all_reduce(sums, group=plan.group)
    losses, total = (sums[0] * share).to(plan.dtype), (sums[0] * weights).sum().to(plan.dtype)
    if not plan.gradient:
        return total, losses, []
    gradients = []
    for name in plan.names:
        gradient, *other = (rows.gradients[name] for rows in (own, right) if name in rows.gradients)
        for part in other:
            gradient += part
        # times the ranks, because they are averaged; not in place, so that no view keeps the whole message in memory
        gradients.append(gradient * plan.world if plan.world > 1 else gradient)
    for row in (sums[1:] * weights).to(plan.dtype):
        for name in plan.learned:
            shared = sum(row[k] for k, pairing in enumerate(plan.pairings) if pairing.logits == name)
            gradients.append(shared.reshape(tensors[len(gradients)].shape))
    return total, losses, gradients


def _own_rows(plan: _Plan, embeds: dict[str, Tensor]) -> _Rows:
    valid = {name: plan.valid[name] for name in plan.names if name in plan.valid}
    rows = {name: value.to(plan.dtype) for name, value in embeds.items()}
    for name, flags in valid.items():  # what stands in the others may be anything, NaN too
        rows[name] = rows[name].masked_fill(~flags[:, None], 0)
    left = dict.fromkeys(pairing.embeddings[0] for pairing in plan.pairings)
    gradients = {name: torch.zeros_like(rows[name]) for name in left} if plan.gradient else {}
    return _Rows(rows, gradients, valid, {kind: plan.keys[kind] for kind in plan.kinds})


def _positives(pairing: Pairing, own: _Rows, rows: int, device: torch.device) -> Tensor:
    """How many of this rank's rows have both sides: float64 scalar."""
    both = torch.ones(rows, dtype=torch.bool, device=device)
    for name in pairing.embeddings:
        both = both & own.valid[name] if name in own.valid else both
    return both.sum(dtype=torch.float64)


class _Blocks:
    """Loss and gradients of a pairing between this rank's left rows and the right rows that are here."""

    def __init__(self, plan: _Plan, device: torch.device):
        self.plan = plan
        size = min(plan.block, max(plan.rows))
        self.logits = torch.empty(size * size, dtype=plan.dtype, device=device)
        self.scratch = torch.empty_like(self.logits)
        self.zero = torch.zeros((), dtype=plan.dtype, device=device)

    def add(
        self,
        sums: Tensor,
        pairing: Pairing,
        scale: Tensor,
        bias: Tensor,
        weight: Tensor,
        own: _Rows,
        right: _Rows,
        home: bool,
    ) -> None:
        """Add to `sums` (3,) and to the gradients in `own` and `right`.

        −log σ(−l) = softplus(l), with derivative σ(l). On the diagonal, which there is where the right rows are at
        home, the sign of l is turned before and that of the derivative after. What is left out has l = −inf: 0 in both.
        """
        left_name, right_name = pairing.embeddings
        x_rows, y_rows, block = own.embeds[left_name], right.embeds[right_name], self.plan.block
        for i in range(0, len(x_rows), block):
            x = x_rows[i : i + block]
            scaled = x * scale  # (I, D)
            weighted = scaled * weight
            x_gradient = torch.zeros_like(scaled)  # of the sum over pairs by scale · x
            for j in range(0, len(y_rows), block):
                y = y_rows[j : j + block]
                logits = self.logits[: len(x) * len(y)].view(len(x), len(y))
                scratch = self.scratch[: len(x) * len(y)].view(len(x), len(y))
                torch.addmm(bias, scaled, y.T, out=logits)
                diagonal = home and i == j
                if diagonal:
                    logits.diagonal().neg_()
                for left_out in self._left_out(pairing, own, right, slice(i, i + block), slice(j, j + block), home):
                    logits.masked_fill_(left_out, -torch.inf)
                torch.logaddexp(logits, self.zero, out=scratch)
                sums[0] += scratch.sum()
                if not self.plan.gradient:
                    continue
                logits.sigmoid_()
                if diagonal:
                    logits.diagonal().neg_()
                sums[2] += logits.sum()
                x_gradient.addmm_(logits, y)
                right.gradients[right_name][j : j + block].addmm_(logits.T, weighted)
            if self.plan.gradient:
                sums[1] += (x * x_gradient).sum()
                own.gradients[left_name][i : i + block].addcmul_(x_gradient, scale * weight)

    def _left_out(self, pairing: Pairing, own: _Rows, right: _Rows, i: slice, j: slice, home: bool) -> Iterator[Tensor]:
        """Masks that (I, J) broadcasts with, True for pairs that do not count."""
        left_name, right_name = pairing.embeddings
        if left_name in own.valid:
            yield ~own.valid[left_name][i, None]
        if right_name in right.valid:
            yield ~right.valid[right_name][None, j]
        if self.plan.compares_captions(pairing):
            same = own.keys[pairing.caption][i, None] == right.keys[pairing.caption][None, j]
            if home and i == j:
                same.fill_diagonal_(False)
            yield same


class _Messages:
    """Right-hand rows in one contiguous tensor, which goes to the next rank while that of the previous one comes in.

    Keys and flags come first, then the embeddings, then their gradients: those alone make the last way home. All
    messages are as long as that of the rank with the most rows, so that a rank without any is a station too.
    """

    def __init__(self, plan: _Plan, own: _Rows, device: torch.device):
        self.plan, self.most = plan, max(plan.rows)
        self.width = {name: own.embeds[name].shape[1] for name in plan.right}
        self.flagged = [name for name in plan.right if name in own.valid]
        self.words = 8 // plan.dtype.itemsize  # that hold the bits of one int64
        embeds = sum(self.width.values())
        self.head = self.most * (self.words * len(plan.kinds) + len(self.flagged) + embeds)
        self.buffer = torch.zeros(self.head + self.most * embeds * plan.gradient, dtype=plan.dtype, device=device)
        self.spare = torch.empty_like(self.buffer)
        world = dist.group.WORLD if plan.group is None else plan.group
        self.next, self.previous = (dist.get_global_rank(world, (plan.rank + step) % plan.world) for step in (1, -1))

    def pack(self, own: _Rows) -> _Rows:
        """This rank's right-hand rows, put into the message that starts here."""
        rows, flags = self._views(self.plan.rank)
        for there, here in ((rows.embeds, own.embeds), (rows.keys, own.keys), (flags, own.valid)):
            for name, values in there.items():
                values.copy_(here[name])
        return self._views(self.plan.rank)[0]

    def pass_on(self, hop: int) -> _Rows:
        """Send what is here to the next rank and return what the previous one had; after the last hop, one's own."""
        last = hop == self.plan.world - 1
        part = slice(self.head, None) if last else slice(None)
        if self.plan.gradient or not last:
            out = dist.P2POp(dist.isend, self.buffer[part], self.next, self.plan.group)
            back = dist.P2POp(dist.irecv, self.spare[part], self.previous, self.plan.group)
            for request in dist.batch_isend_irecv([out, back]):
                request.wait()
            self.buffer, self.spare = self.spare, self.buffer
        return self._views((self.plan.rank - hop - 1) % self.plan.world)[0]

    def _views(self, rank: int) -> tuple[_Rows, dict[str, Tensor]]:
        """What the message holds when it is that of `rank`, and its flags as they travel, as numbers."""
        start, rows = 0, self.plan.rows[rank]

        def take(width: int) -> Tensor:
            nonlocal start
            start += self.most * width
            return self.buffer[start - self.most * width : start][: rows * width]

        keys = {kind: take(self.words).view(torch.int64) for kind in self.plan.kinds}
        flags = {name: take(1) for name in self.flagged}
        embeds = {name: take(width).view(rows, width) for name, width in self.width.items()}
        gradients = {name: take(width).view(rows, width) for name, width in self.width.items() if self.plan.gradient}
        return _Rows(embeds, gradients, {name: flag > 0 for name, flag in flags.items()}, keys), flags
