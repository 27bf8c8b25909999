"""Exact ranks of true items, in blocks: float32 matrix products decide all that their rounding error leaves no doubt
about, and only the rest is computed again in float64.

The score of a pair is defined by arithmetic that is the same wherever the pair stands: the products of the elements in
float64, summed by halves (`_sum`). So equal items have equal scores, and ranks depend neither on the sizes of the
blocks nor on the number of processes or the device. A matrix product adds up the same products in another order. For a
sum of n products with unit roundoff u, whatever its order, the two differ by at most γ_n Σ|x_i y_i| ≤ γ_n ‖x‖‖y‖, with
γ_n = n·u / (1 − n·u) (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).

Memory beyond the embeddings grows with the size of a block and with the number of queries and of items, not with their
product. Equal items are compared once, so that a model that gives all items the same embedding costs less, not more.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pe_av.ranks import rank, world_size

QUERIES, ITEMS = 1024, 4096  # of a block; its scores fit into the cache of a processor
PRODUCTS = 2**18  # of the pairs that are computed at a time in float64
DOUBTFUL = 0.01  # the fraction of a block beyond which it is multiplied in float64, before pairs are computed singly


def retrieval_ranks(
    queries: Tensor,
    gallery: Tensor,
    target: Tensor | None = None,
    shared: bool = False,
    cosine: bool = False,
) -> Tensor:
    """The 1-based rank of each query's true item in the gallery, sorted by dot product.

    Items with the score of the true one are ranked before it, so that a collapsed model, which gives all items the same
    embedding, gets the last rank and not the first.

    Args:
        queries: (Q, D), any floating type and device.
        gallery: (G, D), on the same device.
        target: (Q,) index in the gallery of each query's true item, or (Q, M), padded with -1, of its true items: the
            rank is that of the best of them among the other items. None: item i is true for query i.
        shared: all ranks call this with the same arguments and share the work.
        cosine: sort by cosine instead.
    Returns:
        (Q,) int64 ranks, 1 … G.
    Raises:
        ValueError: embeddings are not finite, shapes do not match, or a target is outside the gallery.
    """
    target = checked_target(queries, gallery, target)
    return 1 + others_at_or_above(DotProducts(queries, gallery, cosine), target, shared=shared)[:, 0]


def checked_target(queries: Tensor, gallery: Tensor, target: Tensor | None) -> Tensor:
    """(Q, M), what `retrieval_ranks` takes as its target; raises what that raises."""
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries {tuple(queries.shape)} and gallery {tuple(gallery.shape)} are not (Q, D) and (G, D)")
    for side, embeds in (("queries", queries), ("gallery", gallery)):
        bad = (~torch.linalg.vector_norm(embeds, torch.inf, 1).isfinite()).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{side}: {len(bad)} of {len(embeds)} embeddings are NaN or infinite, first at row {bad[0]}"
            )
    if target is None:
        if len(queries) != len(gallery):
            raise ValueError(f"{len(queries)} queries for {len(gallery)} gallery items need a target for each query")
        target = torch.arange(len(queries))
    elif target.ndim not in (1, 2) or target.shape[:1] != queries.shape[:1]:
        raise ValueError(f"target {tuple(target.shape)} is not (Q,) or (Q, M), with Q = {len(queries)} queries")
    if not len(queries):
        return torch.empty(0, 1, dtype=torch.int64, device=queries.device)
    if not len(gallery):
        raise ValueError(f"the gallery is empty: there is nothing that {len(queries)} queries could find")
    target = target.to(queries.device, torch.int64).reshape(len(queries), -1)
    best = target.amax(1)
    if int(best.min()) < 0 or int(best.max()) >= len(gallery) or int(target.min()) < -1:
        raise ValueError(f"target holds {int(target.min())} … {int(target.max())}, outside 0 … {len(gallery) - 1}")
    return target


class DotProducts:
    """Scores that are dot products.

    Args:
        queries: (Q, D), finite, of any floating type and on any device.
        gallery: (G, D), on the same device.
        unit: divide every row by its length, which gives the cosine; a row of zeros stays.
        copies: (G,) how often each item counts; None: once.
        group: (Q,) ascending numbers from 0; scores of queries of one group can be compared. None: those of no two.
    """

    precisions: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    query_block, item_block = QUERIES, ITEMS

    def __init__(
        self,
        queries: Tensor,
        gallery: Tensor,
        unit: bool = False,
        copies: Tensor | None = None,
        group: Tensor | None = None,
    ):
        self.queries, self.gallery = queries, gallery
        self.device, self.items = gallery.device, len(gallery)
        self.first, self.item_class = _distinct(gallery)  # of each class of equal items the first; (G,) their classes
        copies = torch.ones_like(self.item_class) if copies is None else copies.to(gallery.device)
        self.item_copies = copies
        self.copies = torch.zeros_like(self.first).index_add_(0, self.item_class, copies)
        self.repeats = bool((self.copies != 1).any())
        # powers of two change no order and no tie, and keep float32 from overflowing; embeddings of usual size stay as
        # they are, since scaling copies them
        query_scale, item_scale = _power_of_two(queries), _power_of_two(gallery)
        if group is not None:  # the scale that the largest one of the group needs
            scales = torch.full_like(query_scale, torch.inf).scatter_reduce_(0, group, query_scale, "amin")
            query_scale = scales[group]
        largest = item_scale.amin() if len(gallery) else torch.ones(())  # the scale that the largest item needs
        self.query_scale = None if _usual(query_scale) else query_scale
        self.item_scale = None if _usual(largest) else largest.expand(len(gallery))
        if unit:
            self.query_scale, self.item_scale = (
                scale / _lengths(rows, scale) for rows, scale in ((queries, query_scale), (gallery, item_scale))
            )
        self.query_length = _lengths(queries, self.query_scale, zero=0.0)
        self.item_length = _lengths(gallery, self.item_scale)[self.first]

    def block(self, queries: slice, classes: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The scores of some queries and some classes of items, and (queries, 1) by how much they can be wrong."""
        items = classes if len(self.first) == len(self.gallery) else self.first[classes]
        left = _scaled(self.queries, self.query_scale, queries).to(dtype)
        right = _scaled(self.gallery, self.item_scale, items).to(dtype)
        size, longest = left.shape[1] + 32, self.item_length[classes].max()
        unit = torch.finfo(dtype).eps / 2
        lengths = self.query_length[queries, None]
        # the second part: numbers below the smallest normal one may lose digits, or be taken for zero
        error = size * unit / (1 - size * unit) * lengths * longest
        error = error + 4 * size * torch.finfo(dtype).tiny * (1 + lengths) * (1 + longest)
        return left @ right.T, error.where(lengths > 0, 0.0)  # those of a query of zeros are exact

    def of_pairs(self, queries: Tensor, classes: Tensor) -> Tensor:
        """(P,) the scores of P pairs, in float64; these are what defines the ranks."""
        scores = torch.empty(len(queries), dtype=torch.float64, device=queries.device)
        for piece in _pieces(len(queries), max(1, PRODUCTS // max(self.queries.shape[1], 1))):
            left = _scaled(self.queries, self.query_scale, queries[piece])
            right = _scaled(self.gallery, self.item_scale, self.first[classes[piece]])
            scores[piece] = _sum(left.double() * right)
        return scores


class Reweighted(DotProducts):
    """The scores of the original repository's evaluation (facebookresearch/perception_models): each query's cosines,
    times 10, and then times their softmax over the queries.

    With z_ij = 10 · cos(query i, item j) the score is z_ij · exp(z_ij) / Σ_k exp(z_kj), the sum being over all queries:
    an item that many queries score high counts less. So a query's score depends on the other queries.

    Args:
        query_copies: (Q,) how often each query counts in the sum; None: once.
        shared: all ranks call this with the same arguments and share the items.
    """

    precisions = (torch.float64,)

    @torch.no_grad()
    def __init__(
        self,
        queries: Tensor,
        gallery: Tensor,
        query_copies: Tensor | None = None,
        copies: Tensor | None = None,
        shared: bool = False,
    ):
        super().__init__(queries, gallery, unit=True, copies=copies)
        weights = torch.ones(len(queries)) if query_copies is None else query_copies
        weights = weights.to(queries.device, torch.float64)
        self.log_sums = torch.zeros(len(self.first), dtype=torch.float64, device=queries.device)
        blocks = list(_pieces(len(self.first), ITEMS))
        for columns in blocks[rank() :: world_size()] if shared else blocks:
            for rows in _pieces(len(queries), QUERIES):
                cosines, _ = super().block(rows, columns, torch.float64)
                self.log_sums[columns] += weights[rows] @ cosines.mul_(10).exp_()
            self.log_sums[columns].log_()
        if shared and world_size() > 1:
            dist.all_reduce(self.log_sums)

    def block(self, queries: slice, classes: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cosines, error = super().block(queries, classes, dtype)
        z = cosines.mul_(10)
        # |d score / d z| ≤ 11, and exp is wrong by a few units in the last place of a number below 1
        error = 110 * error + 1000 * torch.finfo(dtype).eps
        return (z - self.log_sums[classes]).exp_().mul_(z), error

    def of_pairs(self, queries: Tensor, classes: Tensor) -> Tensor:
        z = 10 * super().of_pairs(queries, classes)
        # one by one, because a vectorized exp can give equal numbers at different places different results
        softmax = [math.exp(value) for value in (z - self.log_sums[classes]).tolist()]
        return z * torch.tensor(softmax, dtype=torch.float64).to(z.device)


class BestWindows:
    """Scores of queries and items that consist of windows: the highest dot product of any two of their windows.

    Args:
        queries: (V, D) the windows of all queries.
        query: (V,) ascending, which of the queries 0, 1, … each is of; none is left out.
        gallery, item: the same of the items.
        unit: the highest cosine instead.
        copies: (G,) how often each item counts; None: once.
    """

    precisions = DotProducts.precisions

    def __init__(
        self,
        queries: Tensor,
        query: Tensor,
        gallery: Tensor,
        item: Tensor,
        unit: bool = False,
        copies: Tensor | None = None,
    ):
        self.device = gallery.device
        item, self.items = item.to(self.device), int(item.max()) + 1 if len(item) else 0
        # of items whose windows are equal, one is compared
        same = _first_of_equal(_distinct(gallery)[1], item)
        self.first, self.item_class = same.unique(return_inverse=True)
        kept = (same == torch.arange(self.items, device=self.device))[item]
        self.query, self.item = query.to(self.device), self.item_class[item[kept]]
        self.windows = DotProducts(queries, gallery[kept], unit, group=self.query)
        self.query_first, self.item_first = (_firsts(group) for group in (self.query, self.item))
        self.item_copies = torch.ones_like(same) if copies is None else copies.to(self.device)
        self.copies = torch.zeros_like(self.first).index_add_(0, self.item_class, self.item_copies)
        self.repeats = bool((self.copies != 1).any())
        self.query_block, self.item_block = (
            max(1, size * (len(first) - 1) // max(len(group), 1))
            for size, first, group in ((QUERIES, self.query_first, query), (ITEMS, self.item_first, self.item))
        )

    def block(self, queries: slice, classes: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `DotProducts.block`."""
        rows, columns = (
            slice(int(first[part.start]), int(first[part.stop]))
            for first, part in ((self.query_first, queries), (self.item_first, classes))
        )
        same = self.windows.item_class[columns]  # equal windows are one class
        scores, error = self.windows.block(rows, columns if len(self.windows.first) == len(self.item) else same, dtype)
        query, item = self.query[rows] - queries.start, self.item[columns] - classes.start
        scores = highest(scores, item, classes.stop - classes.start, 1)
        return tuple(highest(values, query, queries.stop - queries.start, 0) for values in (scores, error))

    def of_pairs(self, queries: Tensor, classes: Tensor) -> Tensor:
        """As `DotProducts.of_pairs`."""
        first, item_first = self.query_first[queries], self.item_first[classes]
        widths = self.item_first[classes + 1] - item_first
        counts = (self.query_first[queries + 1] - first) * widths
        scores = torch.empty(len(queries), dtype=torch.float64, device=self.device)
        # pairs of windows are listed for some pairs at a time, since a clip may have thousands of windows
        ends = counts.cumsum(0)
        start = 0
        while start < len(queries):
            done = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(torch.searchsorted(ends, done + PRODUCTS, right=True)))
            pair = torch.arange(start, stop, device=self.device).repeat_interleave(counts[start:stop])
            number = torch.arange(len(pair), device=self.device) - (ends - counts)[pair] + done
            left = first[pair] + number // widths[pair]
            right = self.windows.item_class[item_first[pair] + number % widths[pair]]
            values = self.windows.of_pairs(left, right)[:, None]
            scores[start:stop] = highest(values, pair - start, stop - start, 0)[:, 0]
            start = stop
        return scores


def _first_of_equal(classes: Tensor, item: Tensor) -> Tensor:
    """(G,) the first item that has windows of the same classes, in any order; classes and item are (V,)."""
    rows = [each.sort().values for each in classes.split(item.bincount().tolist())]
    _, number = pad_sequence(rows, batch_first=True, padding_value=-1).unique(dim=0, return_inverse=True)
    items = torch.arange(len(number), device=item.device)
    first = torch.full_like(items, len(items)).scatter_reduce_(0, number, items, "amin")
    return first[number]


def _firsts(group: Tensor) -> Tensor:
    """Of ascending group numbers 0 … G − 1: (G + 1,) where each group begins, and the number of all."""
    counts = group.bincount()
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def highest(values: Tensor, group: Tensor, groups: int, dim: int) -> Tensor:
    """The highest of each group of rows (dim 0) or columns (dim 1)."""
    if values.shape[dim] == groups:
        return values
    shape = [groups if d == dim else size for d, size in enumerate(values.shape)]
    index = group.unsqueeze(1 - dim).expand_as(values)
    return values.new_full(shape, -torch.inf).scatter_reduce_(dim, index, values, "amax")


@torch.no_grad()
def others_at_or_above(
    scores: DotProducts | BestWindows,
    target: Tensor,
    best: int = 1,
    shared: bool = False,
    query_block: int | None = None,
    item_block: int | None = None,
) -> Tensor:
    """For the best true items of each query, how many items that are not true score as high or higher.

    Args:
        target: (Q, M) int64, the true items of each query, padded with -1; at least one, and repeated ones count once.
        best: the number of true items to look at, those with the highest scores.
        shared: all ranks call this with the same arguments and share the queries.
        query_block, item_block: sizes of the blocks; None: those that suit the scores.
    Returns:
        (Q, min(best, M)) int64 in ascending order; the size of the gallery where a query has fewer true items.
    """
    device, queries = scores.device, len(target)
    width = min(best, target.shape[1])
    others = torch.zeros(queries, width, dtype=torch.int64, device=device)
    blocks = list(_pieces(queries, query_block or scores.query_block))
    with _full_precision(device):
        for rows in blocks[rank() :: world_size()] if shared else blocks:
            true = distinct_targets(target[rows].to(device))
            given = true >= 0
            classes = scores.item_class[true.clamp(min=0)]
            exact = torch.full(true.shape, -torch.inf, dtype=torch.float64, device=device)
            exact[given] = scores.of_pairs(given.nonzero()[:, 0] + rows.start, classes[given])
            thresholds = exact.topk(width, 1).values
            counts = torch.zeros_like(others[rows])
            for columns in _pieces(len(scores.first), item_block or scores.item_block):
                counts += _at_least(scores, rows, columns, thresholds, scores.precisions)
            copies = scores.item_copies[true.clamp(min=0)] * given
            for j in range(width):
                counts[:, j] -= (copies * (exact >= thresholds[:, j : j + 1])).sum(1)
            others[rows] = counts.where(thresholds > -torch.inf, scores.items)
    if shared and world_size() > 1:
        dist.all_reduce(others)  # each query's row is zero except on the process that has computed it
    return others


def distinct_targets(target: Tensor) -> Tensor:
    """(Q, M) true items, padded with -1 -> the same in another order, each once."""
    target = target.sort(1, descending=True).values
    repeated = torch.zeros_like(target, dtype=torch.bool)
    repeated[:, 1:] = target[:, 1:] == target[:, :-1]
    return target.masked_fill(repeated, -1)


def _at_least(
    scores: DotProducts | BestWindows,
    rows: slice,
    columns: slice,
    thresholds: Tensor,
    precisions: tuple[torch.dtype, ...],
) -> Tensor:
    """(rows, T) how many items of a block have at least the scores `thresholds` (rows, T)."""
    dtype, *finer = precisions
    block, error = scores.block(rows, columns, dtype)
    # rounded outwards; a query of zeros scores 0 with every item, and so does its true one
    low, high = (
        torch.nextafter((thresholds + side * error).to(dtype), torch.tensor(side * torch.inf, dtype=dtype).to(block))
        .where(error > 0, -1.0)
        .contiguous()
        for side in (-1, 1)
    )
    weights = scores.copies[columns].double() if scores.repeats else None
    above = torch.empty_like(block)
    counts, possible = (
        torch.stack([_count(torch.gt(block, column, out=above), weights) for column in bound.split(1, 1)], 1)
        for bound in (high, low)
    )
    doubtful = possible - counts
    if finer and doubtful.sum() > DOUBTFUL * block.numel():
        return _at_least(scores, rows, columns, thresholds, tuple(finer))
    for j in doubtful.any(0).nonzero().flatten().tolist():
        near = torch.gt(block, low[:, j : j + 1], out=torch.empty_like(block))
        near -= torch.gt(block, high[:, j : j + 1], out=above)
        row, column = _ones(near)
        reaches = scores.of_pairs(row + rows.start, column + columns.start) >= thresholds[row, j]
        counts[:, j].index_add_(0, row, reaches * scores.copies[column + columns.start])
    return counts


def _count(above: Tensor, weights: Tensor | None) -> Tensor:
    """(rows,) of a matrix of 0 and 1; float32 adds the ones of a block exactly, and faster than integers."""
    return (above.sum(1) if weights is None else above.double() @ weights).long()


def _ones(near: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and columns of the few ones in a matrix of 0 and 1: first which groups of 64 have any, since that is
    several times faster than `nonzero` of the matrix."""
    groups = near.view(-1, math.gcd(near.numel(), 64))
    some = groups.sum(1).nonzero()[:, 0]
    group, place = groups[some].nonzero(as_tuple=True)
    index = some[group] * groups.shape[1] + place
    return index // near.shape[1], index % near.shape[1]


def _distinct(gallery: Tensor) -> tuple[Tensor, Tensor]:
    """The first row of each class of equal rows, and (G,) the class of every row."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (2 * gallery.shape[1],), generator=generator).to(gallery.device)
    count, device = len(gallery), gallery.device
    hashes = torch.empty(count, dtype=torch.int64, device=device)
    for piece in _pieces(count, QUERIES):
        bits = (gallery[piece].double() + 0.0).view(torch.int32)  # + 0.0: −0 equals 0
        hashes[piece] = (bits * factors).sum(1)  # modulo 2^64
    _, item_class = hashes.unique(return_inverse=True)
    numbers = torch.arange(count, device=device)
    first = torch.full((int(item_class.max()) + 1 if count else 0,), count, device=device)
    first.scatter_reduce_(0, item_class, numbers, "amin")
    later = (first[item_class] != numbers).nonzero().flatten()
    for piece in _pieces(len(later), QUERIES):
        rows = later[piece]
        others = rows[(gallery[rows] != gallery[first[item_class[rows]]]).any(1)]  # equal hashes of different rows
        item_class[others] = len(first) + torch.arange(len(others), device=device)
        first = torch.cat((first, others))
    if len(first) == count:  # all differ: in their own order, blocks are slices
        return numbers, numbers
    return first, item_class


def _power_of_two(rows: Tensor) -> Tensor:
    """(N,) float64 that brings the largest element of each row to 0.5 … 1; 1 for a row of zeros."""
    largest = torch.linalg.vector_norm(rows, torch.inf, 1)
    exponent = torch.frexp(largest.double()).exponent.clamp(min=-1000)  # 2^1000 is finite
    return torch.ldexp(torch.ones_like(largest, dtype=torch.float64), -exponent)


def _usual(scale: Tensor) -> bool:
    return bool(((scale >= 2.0**-20) & (scale <= 2.0**20)).all())


def _lengths(rows: Tensor, scale: Tensor | None, zero: float = 1.0) -> Tensor:
    """(N,) float64, the Euclidean lengths of rows times scale; `zero` for a row of zeros."""
    lengths = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for piece in _pieces(len(rows), max(1, PRODUCTS // max(rows.shape[1], 1))):
        lengths[piece] = _sum(_scaled(rows, scale, piece).double().square()).sqrt_()
    return lengths.where(lengths > 0, zero)


def _scaled(rows: Tensor, scale: Tensor | None, index: slice | Tensor) -> Tensor:
    return rows[index] if scale is None else rows[index].double() * scale[index, None]


def _sum(terms: Tensor) -> Tensor:
    """(P, D) -> (P,), halving the columns until one is left: the order of a row's additions depends on D alone.

    The terms are overwritten.
    """
    width = terms.shape[1]
    while width > 1:
        half = (width + 1) // 2
        terms[:, : width - half] += terms[:, half:width]
        width = half
    return terms[:, :1].sum(1)  # of one term, or none


def _pieces(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32, whatever autocast, TF32 and `set_float32_matmul_precision` say."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
