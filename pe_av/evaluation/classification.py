"""Zero-shot classification: each clip gets the class whose prompts fit it best.

    python -m pe_av.evaluation.classification checkpoint=DIR data=esc50 [key=value …]

A label is put into each of the templates of configs/prompts/NAME.yaml, and the embedding of the class is the plain mean
of the embeddings of these sentences. The model's logit of a clip x and a text y is s·x·y + b with unnormalized x and y,
so the score of the mean is the mean of the scores: s·x·ȳ + b is the mean logit over the templates. Bringing the
embeddings to unit length first, as is usual where the score is a cosine, would be another score than the model's.

Audio is compared with `text_audio`, video with `text_video`, and both together with `text_audio_video`. Scale and bias,
which change no order, are left out. A class that scores as high as a true one counts against the model, as in
retrieval. The settings are explained in pe_av/config/evaluation.py.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pe_av.config import ConfigError
from pe_av.config.compose import run_command
from pe_av.config.evaluation import ClassifyConfig, PromptsConfig
from pe_av.data.clips import open_manifest
from pe_av.data.recipes import CLASSES_FILE
from pe_av.device import pick_device, precision_context, to_device
from pe_av.evaluation.embedder import Embedder
from pe_av.evaluation.figures import intervals
from pe_av.evaluation.labelled import (
    LabelledClips,
    class_names,
    embed_labelled,
    load_for_labels,
    model_modalities,
)
from pe_av.evaluation.localization import average_precision
from pe_av.evaluation.metrics import windows_of
from pe_av.evaluation.ranking import BestWindows, checked_target, highest, others_at_or_above
from pe_av.evaluation.report import write_metrics
from pe_av.evaluation.setting import evaluation_setting
from pe_av.media.processor import Processor
from pe_av.model.pe_audio_video import PEAudioVideo
from pe_av.ranks import process_group, rank

CONFUSED = 20  # pairs of classes that metrics.json lists
NAMED = 60  # with more classes, the picture has no names: they would be too small to read


def classification_metrics(
    embeds: Tensor, classes: Tensor, target: Tensor, windows: tuple[Tensor, Tensor] | None = None
) -> dict[str, Any]:
    """
    Args:
        embeds: (N, D) of clips, at least one.
        classes: (C, D).
        target: (N, M) int64, the classes of each clip, padded with -1; each has at least one.
        windows: (V, D) of the clips, by the best of which they are scored, and (V,) ascending, the clip of each.
    Returns:
        "top-1", "top-5": percent of clips of which a true class is among the first k; at equal scores, a class that is
        not true comes first. "mean per class": the mean over the classes of the top-1 of their clips. "mAP": the mean
        over the classes of the average precision with which their scores sort the clips, in percent. "chance": top-1
        of a guess. "clips", "classes": their numbers; "classes_without_clips": the number of those that no clip has,
        which no mean counts. "ci95": [low, high] of top-1 and top-5, by bootstrap over the clips. "AP": (C,) list, in
        percent, None without a clip. "ranks": (N,) list, of the best true class of each clip. "confusion": (C, C) list
        of the number of clips of a class (row) that got a class (column). The last and "mean per class" are missing if
        a clip has several classes.
    Raises:
        ValueError: embeddings are not finite, shapes do not match, or a target is outside the classes.
    """
    target = checked_target(embeds, classes, target)
    rows, clip = (embeds, torch.arange(len(embeds))) if windows is None else windows
    ranks = 1 + others_at_or_above(BestWindows(rows, clip, classes, torch.arange(len(classes))), target)[:, 0]
    is_true = torch.zeros(len(embeds), len(classes), dtype=torch.bool)
    given = target >= 0
    is_true[given.nonzero()[:, 0], target[given]] = True
    counts = is_true.sum(0)

    # equal clips are multiplied once: a product's rounding may depend on where in a matrix a row stands
    distinct, inverse = rows.unique(dim=0, return_inverse=True)
    scores = highest((distinct.double() @ classes.double().T)[inverse], clip, len(embeds), 0)
    precisions = [average_precision(scores[:, c], is_true[:, c]) if counts[c] else None for c in range(len(classes))]
    hits = {f"top-{k}": 100.0 * (ranks <= k).numpy() for k in (1, 5)}
    bounds = intervals(ranks.numpy(), hits, np.arange(len(ranks)))
    metrics: dict[str, Any] = {name: float(values.mean()) for name, values in hits.items()} | {
        "mAP": 100 * float(np.mean([value for value in precisions if value is not None])),
        "chance": 100 * is_true.sum().item() / is_true.numel(),
        "clips": len(embeds),
        "classes": len(classes),
        "classes_without_clips": int((counts == 0).sum()),
        "ci95": {name: bounds[name] for name in hits},
        "AP": [None if value is None else 100 * value for value in precisions],
        "ranks": ranks.tolist(),
    }
    if is_true.sum(1).max() == 1:
        truth = is_true.long().argmax(1)
        others = scores.masked_fill(is_true, -torch.inf).argmax(1)
        chosen = truth.where(ranks == 1, others)
        confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
        confusion.index_put_((truth, chosen), torch.ones(1, dtype=torch.int64), accumulate=True)
        metrics["confusion"] = confusion.tolist()
        recalls = confusion.diagonal()[counts > 0] / counts[counts > 0].double()
        metrics["mean per class"] = 100 * recalls.mean().item()
    return metrics


@torch.no_grad()
def class_embeddings(
    model: PEAudioVideo,
    processor: Processor,
    prompts: PromptsConfig,
    labels: Sequence[str],
    batch_size: int,
    modalities: Sequence[str],
) -> dict[str, Tensor]:
    """Modality -> (classes, D) float32 on the CPU, the means over the templates."""
    device = next(model.parameters()).device
    templates = {modality: list(dict.fromkeys(getattr(prompts, modality))) for modality in modalities}
    sentences = list({fill(t, label): None for ts in templates.values() for t in ts for label in labels})
    rows: dict[str, list[Tensor]] = defaultdict(list)
    for start in range(0, len(sentences), batch_size):
        chunk = sentences[start : start + batch_size]
        texts, places = {None: processor.batch_text(chunk)}, {"text": torch.arange(len(chunk))}
        micro_batch = {"inputs": {}, "texts": texts, "rows": places, "size": len(chunk)}
        for name, embeds in Embedder(model)(to_device(micro_batch, device)).items():
            rows[name].append(embeds.float().cpu())
    number = {sentence: row for row, sentence in enumerate(sentences)}
    means = {}
    for modality, used in templates.items():
        embeds = torch.cat(rows[f"text_{modality}"])
        index = torch.tensor([[number[fill(template, label)] for template in used] for label in labels])
        means[modality] = embeds[index].double().mean(1).float()  # (classes, templates, D) -> (classes, D)
    return means


def fill(template: str, label: str) -> str:
    """The sentence that a template and a label make."""
    return template.replace("{}", label)


def classify_checkpoint(config: ClassifyConfig, folder: Path) -> dict[str, Any]:
    """Classify the clips of `data.eval`; the results are written to `folder`.

    Returns:
        modality -> `classification_metrics`, with "splits", the top-1 of each split of the manifest, if it has several.
    Raises:
        ConfigError, CheckpointError: the settings, the data or the checkpoint cannot be used.
    """
    with process_group(pick_device(config.device), config.timeout_minutes) as device:
        return _classify(config, folder, device)


def _classify(config: ClassifyConfig, folder: Path, device: torch.device) -> dict[str, Any]:
    model, processor = load_for_labels(config, device, prompts=True)
    manifest = open_manifest(config.data, "eval")
    source = config.data.eval or "the evaluation clips"
    path = None if config.classes is None else Path(config.classes)
    beside = None if config.data.eval is None else Path(config.data.eval).parent / CLASSES_FILE
    if path is None and beside is not None and beside.exists():
        path = beside
    names = class_names(path, manifest, source)
    folder.mkdir(parents=True, exist_ok=True)
    clips = embed_labelled(config, model, processor, manifest, source, folder, device)
    modalities = [
        name
        for name in config.modalities or model_modalities(model, prompts=True)
        if name in clips.valid and clips.valid[name].any()
    ]
    if not modalities:
        raise ConfigError(
            f"{source}: its clips, such as {clips.ids[0]}, have nothing that the model of {config.checkpoint} embeds"
        )
    with precision_context(config.precision, device):
        classes = class_embeddings(model, processor, config.prompts, names, config.batch_size, modalities)
    metrics = {modality: _evaluate(clips, modality, names, classes[modality]) for modality in modalities}
    if rank() == 0:
        for modality, row in metrics.items():
            if "confusion" in row:
                plot_confusion(row.pop("confusion"), names, folder / f"confusion_{modality}.png", row["top-1"])
        record = {
            "checkpoint": str(config.checkpoint),
            "manifest": source,
            "split": config.data.eval_split,
            "templates": {modality: getattr(config.prompts, modality) for modality in modalities},
            "classes_from": "the clips" if path is None else str(path),
            "setting": evaluation_setting(config, model.config, manifest, device),
            **clips.record,
        }
        write_metrics(folder / "metrics.json", metrics, **record)
        print_classification(metrics)
        Console(stderr=True).print(f"written to {folder}", soft_wrap=True)
    return metrics


def _evaluate(clips: LabelledClips, modality: str, names: Sequence[str], classes: Tensor) -> dict[str, Any]:
    """`classification_metrics` of the clips that have the modality, with names instead of numbers, and by split."""
    number = {name: row for row, name in enumerate(names)}
    rows = clips.valid[modality].nonzero().flatten()
    targets = [torch.tensor([number[label] for label in clips.labels[row]]) for row in rows.tolist()]
    target = pad_sequence(targets, batch_first=True, padding_value=-1)
    embeds = clips.embeds[modality][rows]
    windows = clips.windows and windows_of(clips.windows, (), modality, embeds, rows)
    metrics = classification_metrics(embeds, classes, target, windows)
    precisions, ranks = metrics.pop("AP"), metrics.pop("ranks")
    metrics["AP"] = {name: value for name, value in zip(names, precisions, strict=True) if value is not None}
    metrics["classes_without_clips"] = [name for name, value in zip(names, precisions, strict=True) if value is None]
    if "confusion" in metrics:
        metrics["most confused"] = most_confused(metrics["confusion"], names)
    splits = [clips.splits[row] for row in rows.tolist()]
    if len(set(splits) - {None}) > 1:
        first = torch.tensor(ranks) == 1
        by_split = {
            split: 100 * first[torch.tensor([one == split for one in splits])].double().mean().item()
            for split in sorted(set(splits) - {None})
        }
        values = np.array(list(by_split.values()))
        metrics["splits"] = by_split | {"mean": values.mean(), "standard deviation": values.std(ddof=1)}
    return metrics


def most_confused(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The pairs of different classes with the most clips, most first: {"true", "chosen", "clips"}."""
    counts = np.array(confusion)
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:CONFUSED]
    pairs = [(*divmod(int(place), len(names)), int(counts.flat[place])) for place in order]
    return [{"true": names[row], "chosen": names[column], "clips": n} for row, column, n in pairs if n]


def print_classification(metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table of `classification_metrics`, in percent, to standard output."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("by", no_wrap=True)
    columns = ("top-1", "chance", "top-5", "mean per class", "mAP", "clips", "classes")
    for column in columns:
        table.add_column(column, justify="right", style={"top-1": "bold", "chance": "dim"}.get(column))
    for modality, row in metrics.items():
        cells = ["–" if name not in row else row[name] for name in columns]
        table.add_row(modality, *(f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells))
    Console().print(table)
    for modality, row in metrics.items():
        if row["classes_without_clips"]:
            lost = row["classes_without_clips"]
            print(f"{modality}: {len(lost)} classes have no clip, such as {lost[0]}")


def plot_confusion(confusion: Sequence[Sequence[int]], names: Sequence[str], path: Path, top_1: float) -> None:
    """Write a PNG of which classes (columns) the clips of each class (rows) got, in percent of the row."""
    counts = np.array(confusion, dtype=float)
    totals = counts.sum(1, keepdims=True)
    share = np.divide(100 * counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)  # grey without a clip
    size = min(4 + 0.16 * len(names), 13)
    figure = Figure(figsize=(size + 1, size), dpi=150, layout="constrained")
    panel = figure.subplots()
    panel.set_facecolor("0.85")
    image = panel.imshow(share, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    panel.set(xlabel="chosen", ylabel="true", title=f"top-1 {top_1:.1f} %, {int(counts.sum())} clips")
    if len(names) <= NAMED:
        panel.set_xticks(range(len(names)), [name[:30] for name in names], rotation=90, fontsize=6)
        panel.set_yticks(range(len(names)), [name[:30] for name in names], fontsize=6)
    figure.colorbar(image, ax=panel, label="percent of the clips of a class", shrink=0.6)
    figure.savefig(path, format="png")


if __name__ == "__main__":
    run_command(ClassifyConfig, "classify", classify_checkpoint)
