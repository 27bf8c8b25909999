"""The figures of one direction that follow from its ranks, and how far chance among the queries could move them."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RESAMPLES = 1000


def retrieval_metrics(
    ranks: Tensor,
    gallery_size: int,
    true_items: float = 1.0,
    precisions: Tensor | None = None,
    units: Tensor | None = None,
) -> dict[str, float | int | dict[str, list[float]]]:
    """The figures of one direction, as plain numbers for JSON.

    Args:
        ranks: (Q,) 1-based ranks, at least one.
        gallery_size: number of items that each query was compared with.
        true_items: how many of them are true for a query, on average.
        precisions: (Q,) `average_precision_at_10`. None: a query has one true item.
        units: (Q,) int64, what `intervals` resamples. None: no intervals.
    Returns:
        R@1, R@5, R@10 (percent of queries with a true item among the first k), chance (R@1 of a guess), MedR and MeanR
        (median and mean rank), MRR (mean of 1 / rank), mAP@10 (percent), queries and gallery (their numbers), and with
        `units` ci95, which has [low, high] of each figure but chance and the numbers.
    Raises:
        ValueError: there are no ranks, or one is outside 1 … gallery_size.
    """
    values = ranks.cpu().numpy()
    if not len(values):
        raise ValueError("no ranks: a direction without queries has no recall")
    if not 1 <= values.min() <= values.max() <= gallery_size:
        raise ValueError(f"ranks {values.min()} … {values.max()} are outside 1 … {gallery_size}, the gallery's size")
    precision = np.where(values <= 10, 1 / values, 0.0) if precisions is None else precisions.cpu().numpy()
    means = {f"R@{k}": 100 * (values <= k) for k in (1, 5, 10)}
    means |= {"MeanR": values, "MRR": 1 / values, "mAP@10": 100 * precision}
    metrics = {f"R@{k}": 100 * float((values <= k).mean()) for k in (1, 5, 10)} | {
        "chance": 100 * true_items / gallery_size,
        "MedR": float(np.median(values)),
        "MeanR": float(values.mean()),
        "MRR": float((1 / values).mean()),
        "mAP@10": 100 * float(precision.mean()),
        "queries": len(values),
        "gallery": gallery_size,
    }
    if units is not None:
        metrics["ci95"] = intervals(values, means, units.cpu().numpy())
    return metrics


def average_precision_at_10(others: Tensor, true_counts: Tensor) -> Tensor:
    """Σ of the precision at each true item among the first ten, divided by min(number of true items, 10).

    At equal scores the items that are not true come first.

    Args:
        others: (Q, T) `ranking.others_at_or_above` of the ten best true items.
        true_counts: (Q,) the number of true items.
    Returns:
        (Q,) float64, 0 … 1.
    """
    found = torch.arange(1, others.shape[1] + 1, device=others.device)
    position = others + found  # of the j-th best true item
    precision = (found / position.double()).where(position <= 10, 0.0)
    return precision.sum(1) / true_counts.clamp(max=10)


def intervals(ranks: NDArray, means: dict[str, NDArray], units: NDArray, seed: int = 0) -> dict[str, list[float]]:
    """95 % percentile bootstrap intervals (Efron 1979) from `RESAMPLES` resamples.

    Args:
        ranks: (Q,), for the median.
        means: figure -> (Q,) values whose mean it is.
        units: (Q,) queries with the same number are drawn together: captions of one clip are not independent, and
            drawing them one by one would give intervals that are too narrow.
    """
    random = np.random.default_rng(seed)
    order = np.argsort(ranks, kind="stable")
    ranks = ranks[order]
    values = np.stack([column[order] for column in means.values()], 1).astype(np.float64)
    _, units = np.unique(units[order], return_inverse=True)
    count = int(units.max()) + 1
    drawn = np.empty((RESAMPLES, len(means) + 1))
    for row in drawn:
        times = np.bincount(random.integers(0, count, count), minlength=count)[units]  # how often each query is drawn
        until = np.cumsum(times)
        total = until[-1]
        row[:-1] = times.astype(np.float64) @ values / total
        row[-1] = ranks[np.searchsorted(until, [(total - 1) // 2, total // 2], side="right")].mean()
    bounds = np.percentile(drawn, [2.5, 97.5], axis=0).T.tolist()
    return dict(zip([*means, "MedR"], bounds, strict=True))
