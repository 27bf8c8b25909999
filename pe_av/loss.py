"""The sigmoid contrastive loss (arXiv 2303.15343, equation 1) over the pairings of a batch, on any number of ranks.

For one pairing with logits l_ij of N clips, L = −(1/N) Σ_ij log σ(z_ij l_ij), where z_ij is +1 on the diagonal, for the
embeddings of one clip, and −1 elsewhere. (transformers multiplies by eye(N) instead, which gives the pairs off the
diagonal no gradient.) The total is the weighted sum over the pairings. Three functions compute it:

- `sigmoid_loss`: the formula, from the logits of one process;
- `gathered_loss`: the formula on every rank, from the embeddings of all ranks, differentiated by autograd: the
  readable reference that tests compare with;
- `contrastive_loss`: what training uses, a ring (section 3.1 of that paper). The right-hand embeddings of each rank
  travel around all ranks, one message per hop. At each rank they meet its left-hand embeddings and collect their own
  gradient. Loss and gradients come from one pass over blocks of logits, so no N × N matrix is ever stored.

Which pairs count. Row i of the left side belongs to row i of the right side. A row whose `valid` flag is False (its
clip lacks a modality) is left out of all its pairs, positive and negative. Where one side of a pairing is text alone,
two different rows with equal `caption_keys` have the same caption, which is right for both; that pair is left out too.
N is the number of rows of all ranks in which both sides are valid; if it is 0, so are the loss and its gradient.

What each rank gets. The loss is that of the global batch and is the same on every rank, and so are the gradients of
scales and biases. The gradient of a rank's own embeddings is that of the global loss times the world size: training
averages the gradients of parameters over the ranks (as DDP and FSDP do), and the average is then exactly the gradient
of one process that holds the whole batch.

The file is long because the three forms, which must agree on every rule above, are easiest to check side by side.
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

BLOCK = 2048  # rows and columns of the logits computed at a time: 16 MiB; larger matrix products are not faster


@dataclass
class LossOutput:
    """The loss of a global batch."""

    total: Tensor  # scalar, with gradient
    losses: dict[str, Tensor]  # pairing -> its unweighted loss, without gradient, for logging


def sigmoid_loss(logits: Tensor, counted: Tensor | None = None) -> Tensor:
    """(N, N) logits -> scalar, computed in float32, or in float64 for float64 logits.

    Args:
        counted: (N, N) bool, False for pairs to leave out; the loss is divided by the number of positives that count.
    Raises:
        ValueError: the logits are not square.
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
    """The weighted sum of the pairings' losses over the global batch; the head of this file has the exact rules.

    Computed in float32 for embeddings of any dtype, under autocast too; in float64 if any of them is float64.

    Args:
        embeds: embedding -> (B, D), not normalized; named as in `config.HEADS`, followed by "@kind" for captions of a
            kind, e.g. "text_audio@audio_visual" (`Pairing.embeddings`). B may differ between ranks and may be 0.
        logits: pairing, of `config.PAIRINGS` -> its learned (scale, bias), of one element each.
        valid: embedding, named as in `embeds` -> (B,) bool, False where the clip lacks it; not named: all True.
        caption_keys: kind of caption, None for pairings without one -> (B,) int64, equal for equal captions on all
            ranks.
        group: the ranks that share the batch; None: all ranks, or this process alone without a process group.
        block: rows and columns of the blocks of logits.
    Raises:
        ValueError: embeddings that are missing or do not fit together, or ranks that disagree on anything but B. It is
            raised on every rank, so that none is left waiting.
    """
    plan = _plan(embeds, logits, pairings, valid, caption_keys, group, block)
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
    """`contrastive_loss` written plainly, with several N × N matrices per pairing: the reference for tests."""
    plan = _plan(embeds, logits, pairings, valid, caption_keys, group, BLOCK)

    def gather(rows: Tensor) -> Tensor:  # (B, …) of every rank -> (N, …)
        if plan.world == 1:
            return rows
        padded = rows.new_zeros(max(plan.rows), *rows.shape[1:])
        padded[: len(rows)] = rows.detach()
        every = [torch.empty_like(padded) for _ in plan.rows]
        dist.all_gather(every, padded, group=group)
        every = [of_rank[:n] for of_rank, n in zip(every, plan.rows, strict=True)]
        # the same values as `rows`, with a gradient that is multiplied by the world size
        every[plan.rank] = rows + (plan.world - 1) * (rows - rows.detach()) if rows.requires_grad else rows
        return torch.cat(every)

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
# the plan: what to compute, checked and agreed on by all ranks


@dataclass
class _Plan:
    """What all ranks have agreed to compute, and the inputs without gradient."""

    pairings: list[Pairing]
    valid: Mapping[str, Tensor]
    keys: Mapping[str | None, Tensor]
    group: dist.ProcessGroup | None
    block: int
    names: list[str] = field(default_factory=list)  # the embeddings of all pairings, each once
    learned: list[str] = field(default_factory=list)  # whose scales and biases are used, each once
    dtype: torch.dtype = torch.float32
    world: int = 1
    rank: int = 0
    rows: list[int] = field(default_factory=list)  # number of rows, B, of every rank
    gradient: bool = False  # whether any rank needs it

    def compares_captions(self, pairing: Pairing) -> bool:
        """Whether rows with equal captions are no negatives: one side is text alone, which is then equal in both."""
        return pairing.caption in self.keys and any(HEADS[s] == ("text",) for s in (pairing.left, pairing.right))

    @property
    def right(self) -> list[str]:
        """The embeddings that travel around the ring, each once."""
        return list(dict.fromkeys(pairing.embeddings[1] for pairing in self.pairings))

    @property
    def kinds(self) -> list[str | None]:
        """The kinds of caption whose keys travel around the ring."""
        return list(dict.fromkeys(p.caption for p in self.pairings if self.compares_captions(p)))


def _plan(embeds, logits, pairings, valid, caption_keys, group, block) -> _Plan:
    """The plan for the arguments of `contrastive_loss`."""
    plan = _Plan(list(pairings), valid or {}, caption_keys or {}, group, block)
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
    """Exchange the description `lines` and the number of rows with all ranks; raise on all if one has a problem."""
    # The host needs the numbers of rows for the sizes of the messages. With a CPU backend, which groups have by
    # default, the exchange does not touch the GPU; with NCCL alone, the host waits here for the embeddings.
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
    reports: list[tuple[str | None, list[str]]] = [(None, [])] * plan.world
    dist.all_gather_object(reports, (problem, lines), group=plan.group)
    if any(problems):
        raise ValueError(
            problem or next(f"rank {rank}: {report}" for rank, (report, _) in enumerate(reports) if report)
        )
    other, theirs = next((rank, report) for rank, (_, report) in enumerate(reports) if report != lines)
    only_here = "; ".join(line for line in lines if line not in theirs) or "nothing more, or another order"
    only_there = "; ".join(line for line in theirs if line not in lines) or "nothing more, or another order"
    raise ValueError(
        f"the ranks disagree on the loss: rank {plan.rank} has {only_here}, where rank {other} has {only_there}"
    )


def _describe(pairing: Pairing, embeds: Mapping[str, Tensor], plan: _Plan) -> str:
    left, right = pairing.embeddings
    masks = [f"valid {name}" for name in (left, right) if name in plan.valid]
    masks += ["caption keys"] if plan.compares_captions(pairing) else []
    return (
        f"{pairing.name} = {left} × {right} in {embeds[left].shape[1]} dimensions, weight {pairing.weight:g}, "
        f"logits {pairing.logits}, masks: {', '.join(masks) or 'none'}"
    )


def _problem(embeds: Mapping[str, Tensor], logits: Mapping[str, tuple[Tensor, Tensor]], plan: _Plan) -> str | None:
    """What is wrong with this rank's arguments, if anything; returned, because all ranks must raise it together."""
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
        return f"pairings of {' and '.join(map(str, sorted(rows)))} rows: all pairings need the same rows"
    for name, flags in plan.valid.items():
        if name not in embeds:
            return f"valid names {name}, but there are no such embeddings, only {', '.join(embeds)}"
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
    """Rows of one rank: all of this rank's own, or the right-hand ones of the rank whose message is here."""

    embeds: dict[str, Tensor]  # (B, D), 0 in invalid rows
    gradients: dict[str, Tensor]  # (B, D), the sum so far; {} if no rank needs them
    valid: dict[str, Tensor]  # (B,) bool, of the embeddings that have flags
    keys: dict[str | None, Tensor]  # (B,) int64


class _RingLoss(torch.autograd.Function):
    """(embeddings, scales, biases) -> total, (pairings,) losses. The gradients are computed in the forward pass."""

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
        inputs = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[1:], strict=True)
        return None, *((gradient * upstream).to(dtype) if needed else None for gradient, dtype, needed in inputs)


def _ring(plan: _Plan, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The total, the (pairings,) losses, and the gradient of every tensor (or [] if no rank needs them)."""
    n, device = len(plan.names), tensors[0].device
    own = _own_rows(plan, dict(zip(plan.names, tensors[:n], strict=True)))
    learned = [value.to(plan.dtype).reshape(1) for value in tensors[n:]]
    half = len(plan.learned)
    scales, biases = (dict(zip(plan.learned, values, strict=True)) for values in (learned[:half], learned[half:]))

    positives = torch.stack([_positives(pairing, own, plan.rows[plan.rank], device) for pairing in plan.pairings])
    if plan.world > 1:
        dist.all_reduce(positives, group=plan.group)
    share = torch.where(positives > 0, 1 / positives, 0)  # (pairings,) 1/N
    # one multiplication each, as a list would be copied to the GPU, and the host would wait for that
    weights = torch.stack([one * pairing.weight for one, pairing in zip(share, plan.pairings, strict=True)])

    if plan.world > 1:
        messages = _Messages(plan, own, device)
        right = messages.pack(own)
    else:
        right = _Rows(
            own.embeds, {name: torch.zeros_like(own.embeds[name]) for name in plan.right}, own.valid, own.keys
        )
    blocks = _Blocks(plan, device)
    sums = share.new_zeros(3, len(plan.pairings))  # loss, gradient of scale, gradient of bias; before weight and 1/N
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
        for more in other:
            gradient += more
        # times the world size, as the head says; not in place, so that no view keeps the whole message in memory
        gradients.append(gradient * plan.world if plan.world > 1 else gradient)
    for row in (sums[1:] * weights).to(plan.dtype):
        for name in plan.learned:
            shared = sum(row[k] for k, pairing in enumerate(plan.pairings) if pairing.logits == name)
            gradients.append(shared.reshape(tensors[len(gradients)].shape))
    return total, losses, gradients


def _own_rows(plan: _Plan, embeds: dict[str, Tensor]) -> _Rows:
    valid = {name: plan.valid[name] for name in plan.names if name in plan.valid}
    rows = {name: value.to(plan.dtype) for name, value in embeds.items()}
    for name, flags in valid.items():  # invalid rows may hold anything, NaN included
        rows[name] = rows[name].masked_fill(~flags[:, None], 0)
    left = dict.fromkeys(pairing.embeddings[0] for pairing in plan.pairings)
    gradients = {name: torch.zeros_like(rows[name]) for name in left} if plan.gradient else {}
    return _Rows(rows, gradients, valid, {kind: plan.keys[kind] for kind in plan.kinds})


def _positives(pairing: Pairing, own: _Rows, rows: int, device: torch.device) -> Tensor:
    """How many of this rank's rows are valid on both sides: float64 scalar."""
    both = torch.ones(rows, dtype=torch.bool, device=device)
    for name in pairing.embeddings:
        both = both & own.valid[name] if name in own.valid else both
    return both.sum(dtype=torch.float64)


class _Blocks:
    """Loss and gradients between this rank's left-hand rows and the right-hand rows whose message is here."""

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
        """Add one pairing to `sums` (3,) and to the gradients in `own` and `right`.

        A negative pair has the loss −log σ(−l) = softplus(l), with the derivative σ(l). On the diagonal, which exists
        if `right` is this rank's own (`home`), l is negated before and the derivative after. Pairs that are left out
        get l = −inf, which makes both 0.
        """
        left_name, right_name = pairing.embeddings
        x_rows, y_rows, block = own.embeds[left_name], right.embeds[right_name], self.plan.block
        for i in range(0, len(x_rows), block):
            x = x_rows[i : i + block]
            scaled = x * scale  # (I, D)
            weighted = scaled * weight
            x_gradient = torch.zeros_like(scaled)  # of the summed losses with respect to scale · x
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
        """Masks that broadcast to (I, J), True for pairs that do not count."""
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
    """Right-hand rows in one contiguous tensor, sent to the next rank while that of the previous rank is received.

    Keys and flags come first, then embeddings, then gradients; the last hop, which is home, sends gradients only. All
    messages have the size that the rank with the most rows needs, so a rank without rows can pass them on too.
    """

    def __init__(self, plan: _Plan, own: _Rows, device: torch.device):
        self.plan, self.most = plan, max(plan.rows)
        self.width = {name: own.embeds[name].shape[1] for name in plan.right}
        self.flagged = [name for name in plan.right if name in own.valid]
        self.words = 8 // plan.dtype.itemsize  # elements that hold the bits of one int64
        embeds = sum(self.width.values())
        self.head = self.most * (self.words * len(plan.kinds) + len(self.flagged) + embeds)
        self.buffer = torch.zeros(self.head + self.most * embeds * plan.gradient, dtype=plan.dtype, device=device)
        self.spare = torch.empty_like(self.buffer)
        world = dist.group.WORLD if plan.group is None else plan.group
        self.next, self.previous = (dist.get_global_rank(world, (plan.rank + step) % plan.world) for step in (1, -1))

    def pack(self, own: _Rows) -> _Rows:
        """Put this rank's right-hand rows into its message and return views of them."""
        rows, flags = self._views(self.plan.rank)
        for packed, values in ((rows.embeds, own.embeds), (rows.keys, own.keys), (flags, own.valid)):
            for name, view in packed.items():
                view.copy_(values[name])
        return self._views(self.plan.rank)[0]

    def pass_on(self, hop: int) -> _Rows:
        """Send the message here to the next rank; return the rows that the previous rank sent (at last, one's own)."""
        last = hop == self.plan.world - 1
        sent = slice(self.head, None) if last else slice(None)
        if self.plan.gradient or not last:
            send = dist.P2POp(dist.isend, self.buffer[sent], self.next, self.plan.group)
            receive = dist.P2POp(dist.irecv, self.spare[sent], self.previous, self.plan.group)
            for request in dist.batch_isend_irecv([send, receive]):
                request.wait()
            self.buffer, self.spare = self.spare, self.buffer
        return self._views((self.plan.rank - hop - 1) % self.plan.world)[0]

    def _views(self, rank: int) -> tuple[_Rows, dict[str, Tensor]]:
        """Views of the message here, which is that of `rank`, and of its flags as the numbers that they travel as."""
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
