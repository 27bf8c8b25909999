"""How well frames are told apart: average precision, F1 and intersection over union of what is marked."""

import torch
from torch import Tensor


def localization_metrics(scores: list[Tensor], targets: list[Tensor], threshold: float) -> dict[str, float]:
    """Over recordings, each (frames,) scores and bool targets.

    Returns:
        in percent: "AP", mean over recordings of the average precision of their frames; "F1" of all frames at the
        threshold; "IoU", mean over recordings of marked ∩ target / marked ∪ target; and "chance AP", the share of
        target frames. "recordings": how many there were.
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
    return {
        "AP": 100 * sum(precisions) / len(precisions),
        "F1": 100 * 2 * hits / max(marked_total + target_total, 1),
        "IoU": 100 * sum(unions) / len(unions),
        "chance AP": 100 * target_total / frames,
        "recordings": len(targets),
    }


def average_precision(score: Tensor, target: Tensor) -> float:
    """Σ precision · recall gained, over the distinct scores from the highest down; 0 where nothing is a target."""
    if not target.any():
        return 0.0
    order = score.argsort(descending=True)
    found = target[order].double().cumsum(0)
    last = torch.cat((score[order][1:] != score[order][:-1], torch.ones(1, dtype=torch.bool)))  # of equal scores
    found, taken = found[last], torch.arange(1, len(score) + 1, dtype=torch.float64)[last]
    gained = torch.diff(found, prepend=torch.zeros(1, dtype=torch.float64)) / target.sum()
    return (found / taken * gained).sum().item()
