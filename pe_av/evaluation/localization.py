"""How well frames are told apart: average precision, F1 and intersection over union of what is marked."""

import torch
from torch import Tensor


def localization_metrics(scores: list[Tensor], targets: list[Tensor], threshold: float) -> dict[str, float]:
    """Over recordings, each (frames,) scores and bool targets.

    Returns:
        in percent: "AP", mean over recordings of the average precision of their frames; "F1" of all frames at the
        threshold; "IoU", mean over recordings of marked ∩ target / marked ∪ target; and "chance AP", the share of
        target frames. "best F1" is that of all frames at the "best threshold", a probability: that of training depends
        on its batches, in which most captions are of other recordings. "recordings": how many there were.
    """
    precisions, unions = [], []
    hits = marked_total = target_total = 0
    for score, target in zip(scores, targets, strict=True):
        marked = score > threshold
        both = (marked & target).sum().item()
        hits, marked_total, target_total = (
            hits + both,
            marked_total + marked.sum().item(),
            target_total + target.sum().item(),
        )
        unions.append(both / max((marked | target).sum().item(), 1))
        precisions.append(average_precision(score, target))
    frames = sum(len(target) for target in targets)
    best, best_threshold = best_f1(torch.cat(scores), torch.cat(targets))
    return {
        "AP": 100 * sum(precisions) / len(precisions),
        "F1": 100 * 2 * hits / max(marked_total + target_total, 1),
        "best F1": 100 * best,
        "best threshold": best_threshold,
        "IoU": 100 * sum(unions) / len(unions),
        "chance AP": 100 * target_total / frames,
        "recordings": len(targets),
    }


def best_f1(score: Tensor, target: Tensor) -> tuple[float, float]:
    """The highest F1 that a threshold gives, and the lowest score that is then marked."""
    values, found, taken = _found(score, target)
    f1 = 2 * found / (taken + target.sum())
    return f1.max().item(), values[f1.argmax()].item()


def average_precision(score: Tensor, target: Tensor) -> float:
    """Σ precision · recall gained, over the distinct scores from the highest down; 0 where nothing is a target."""
    if not target.any():
        return 0.0
    _, found, taken = _found(score, target)
    gained = torch.diff(found, prepend=torch.zeros(1, dtype=torch.float64)) / target.sum()
    return (found / taken * gained).sum().item()


def _found(score: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct scores from the highest down; how many targets, and how many frames, reach each."""
    order = score.argsort(descending=True)
    found = target[order].double().cumsum(0)
    last = torch.cat((score[order][1:] != score[order][:-1], torch.ones(1, dtype=torch.bool)))  # of equal scores
    return score[order][last], found[last], torch.arange(1, len(score) + 1, dtype=torch.float64)[last]
