"""How well PEAudioFrame tells positions apart: average precision, AUROC, F1 and intersection over union. The figures of
whole spans are in events.py.

    python -m pe_av.evaluation.localization checkpoint=DIR eval=spans.jsonl [key=value …]

evaluates a checkpoint; training evaluates by the same figures. pe_av/config/evaluation.py explains the settings.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from pe_av.checkpoint import load_model
from pe_av.config import ConfigError
from pe_av.config.compose import run_command
from pe_av.config.evaluation import LocalizeConfig
from pe_av.data.span_demo import prepare_span_demo
from pe_av.data.spans import SpanReader, read_span_manifest
from pe_av.device import pick_device, precision_context, to_device
from pe_av.evaluation.events import event_metrics, plot_recordings
from pe_av.evaluation.report import write_metrics
from pe_av.loading.bad_items import BadItems
from pe_av.loading.loader import Loader
from pe_av.loading.sampler import BatchSampler
from pe_av.loading.span_batch import SpanCollate
from pe_av.media.processor import Processor
from pe_av.model.pe_audio_frame import PEAudioFrame
from pe_av.ranks import of_all_ranks, process_group, rank, world_size


def localization_metrics(scores: Sequence[Tensor], targets: Sequence[Tensor], threshold: float) -> dict[str, float]:
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
    every, asked = torch.cat(tuple(scores)), torch.cat(tuple(targets))
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


def localize_checkpoint(config: LocalizeConfig, folder: Path) -> dict[str, float | int]:
    """Evaluate a PEAudioFrame; `metrics.json` and `spans.png` are written to `folder`. The ranks share the recordings.

    Returns:
        `localization_metrics` and `events.event_metrics`.
    Raises:
        ConfigError, CheckpointError: the settings, the data or the checkpoint cannot be used.
    """
    with process_group(pick_device(config.device), config.timeout_minutes) as device:
        return _localize(config, folder, device)


def _localize(config: LocalizeConfig, folder: Path, device: torch.device) -> dict[str, float | int]:
    model = load_model(config.checkpoint, device)
    if not isinstance(model, PEAudioFrame):
        raise ConfigError(f"{config.checkpoint} is no PEAudioFrame: it has no probability for each position")
    processor = Processor.from_pretrained(config.checkpoint)
    path = prepare_span_demo(config.demo)[1] if config.eval is None else Path(config.eval)
    clips = read_span_manifest(path)
    folder.mkdir(parents=True, exist_ok=True)
    read = SpanReader(processor, config.max_seconds)
    sampler = BatchSampler(len(clips), config.batch_size, rank=rank(), world=world_size())
    collate = SpanCollate(processor, model.seconds_per_position)
    loader = Loader(clips, read, sampler, collate, config.num_workers, config.time_limit)
    console = Console(stderr=True, quiet=rank() > 0)
    with precision_context(config.precision, device):
        own = [_localize_batch(model, batch, device) for batch in track(loader, "evaluating", console=console)]
    loader.close()
    # batch b of rank r is number b · world + r of all
    batches = [batch for turn in zip(*of_all_ranks(own), strict=True) for batch in turn]
    bad = BadItems(folder, len(clips), config.max_bad_fraction, writes=rank() == 0)
    lists = {name: sum((batch[name] for batch in batches), []) for name in ("bad", "partial", "cut")}
    bad.add(sum(batch["read"] for batch in batches), **lists)
    rows = [row for batch in batches for row in batch["rows"]]
    if not rows:
        raise ConfigError(f"{path}: none of its {len(clips)} recordings can be read: see {folder}/bad_items.jsonl")
    ids, scores, targets, spans = zip(*rows, strict=True)
    broken = [name for name, score in zip(ids, scores, strict=True) if not score.isfinite().all()]
    if broken:
        raise ConfigError(
            f"{config.checkpoint}: the probabilities of {len(broken)} recordings of {path} are NaN, such as {broken[0]}"
        )
    metrics = localization_metrics(scores, targets, config.threshold)
    metrics |= event_metrics(scores, spans, model.seconds_per_position, config.threshold)
    if rank() == 0:
        by_id, rate = {clip.id: clip for clip in clips}, model.config.audio.codec.sampling_rate
        drawn = [
            item | {"sampling_rate": rate, "scores": score}
            for name, score in zip(ids[: config.drawn], scores, strict=False)
            if "waveform" in (item := read(by_id[name]))
        ]
        if drawn:
            plot_recordings(drawn, model.seconds_per_position, config.threshold).savefig(folder / "spans.png")
        record = {
            "checkpoint": str(config.checkpoint),
            "manifest": str(path),
            "threshold": config.threshold,
            "max_seconds": config.max_seconds,
            "precision": config.precision,
            **{f"{name}_items": len(reasons) for name, reasons in bad.reasons.items()},
        }
        write_metrics(folder / "metrics.json", metrics, **record)
        for name, value in metrics.items():
            print(f"{name:22} {value:.4g}")
        console.print(f"written to {folder}", soft_wrap=True)
    return metrics


@torch.no_grad()
def _localize_batch(model: PEAudioFrame, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The "rows" of (id, probabilities, targets, spans), and what was read."""
    rows = []
    if batch["ids"]:
        probability = model(**to_device(batch["inputs"], device)).logits.float().sigmoid().cpu()
        for i, length in enumerate(batch["mask"].sum(1).tolist()):
            rows.append((batch["ids"][i], probability[i, :length], batch["targets"][i, :length], batch["spans"][i]))
    return {name: batch[name] for name in ("read", "bad", "partial", "cut")} | {"rows": rows}


if __name__ == "__main__":
    run_command(LocalizeConfig, "localize", localize_checkpoint)
