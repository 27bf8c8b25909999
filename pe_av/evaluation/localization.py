"""How well PEAudioFrame tells positions apart: average precision, AUROC, F1 and intersection over union. The figures of
whole spans are in events.py."""

import torch
from torch import Tensor


def localization_metrics(scores: list[Tensor], targets: list[Tensor], threshold: float) -> dict[str, float]:
    """
    Args:
        scores, targets: of each recording, (positions,) probabilities and bool.
        threshold: positions with a higher score are marked.
    Returns:
        "AP", the average precision of the positions of a recording, and "IoU", marked ∩ target / marked ∪ target, both
        averaged over the recordings; "AUROC", the area under the ROC curve of the positions of a recording, averaged
        over those recordings that have positions of both kinds (missing if none has), and "pooled AUROC", that of the
        positions of all recordings together; "F1" of all positions; "best F1", the highest that any threshold gives,
        and that "best threshold"; "chance AP", the share of target positions; and "recordings", their number. All but
        the threshold and the number are in percent. The best threshold may differ from 0.5, because in the batches of
        training most captions belong to other recordings.
    """
    precisions, unions, areas = [], [], []
    hits = marked_total = target_total = 0
    for score, target in zip(scores, targets, strict=True):
        marked = score > threshold
        both = (marked & target).sum().item()
        hits += both
        marked_total += marked.sum().item()
        target_total += target.sum().item()
        unions.append(both / max((marked | target).sum().item(), 1))
        precisions.append(average_precision(score, target))
        if target.any() and not target.all():
            areas.append(auroc(score, target))
    every, asked = torch.cat(list(scores)), torch.cat(list(targets))
    best, best_threshold = best_f1(every, asked)
    both_kinds = asked.any() and not asked.all()
    pooled = {"pooled AUROC": 100 * auroc(every, asked)} if both_kinds else {}
    mean = {"AUROC": 100 * sum(areas) / len(areas)} if areas else {}
    return (
        mean
        | pooled
        | {
            "AP": 100 * sum(precisions) / len(precisions),
            "F1": 100 * 2 * hits / max(marked_total + target_total, 1),
            "best F1": 100 * best,
            "best threshold": best_threshold,
            "IoU": 100 * sum(unions) / len(unions),
            "chance AP": 100 * target_total / sum(len(target) for target in targets),
            "recordings": len(targets),
        }
    )


def best_f1(score: Tensor, target: Tensor) -> tuple[float, float]:
    """The highest F1 that a threshold gives, and the lowest score that is marked then."""
    values, hits, marked = _cumulative(score, target)
    f1 = 2 * hits / (marked + target.sum())
    return f1.max().item(), values[f1.argmax()].item()


def average_precision(score: Tensor, target: Tensor) -> float:
    """Σ precision · gain in recall, over the distinct scores from the highest down; 0 without a target."""
    if not target.any():
        return 0.0
    _, hits, marked = _cumulative(score, target)
    gained = torch.diff(hits, prepend=torch.zeros(1, dtype=torch.float64)) / target.sum()
    return (hits / marked * gained).sum().item()


def auroc(score: Tensor, target: Tensor) -> float:
    """The probability that a random target position has a higher score than a random other one; equal ones count ½."""
    _, hits, marked = _cumulative(score, target)
    zero = torch.zeros(1, dtype=torch.float64)
    true, false = torch.cat((zero, hits)), torch.cat((zero, marked - hits))
    return (torch.trapezoid(true, false) / (true[-1] * false[-1])).item()


def _cumulative(score: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct scores from the highest down, and how many targets and how many positions reach each."""
    order = score.argsort(descending=True)
    hits = target[order].double().cumsum(0)
    last = torch.cat((score[order][1:] != score[order][:-1], torch.ones(1, dtype=torch.bool)))  # of equal scores
    return score[order][last], hits[last], torch.arange(1, len(score) + 1, dtype=torch.float64)[last]
