"""Reports of a run or an evaluation: the table of recalls, `metrics.json`, loss curves and similarity matrices."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no display is needed, and a notebook keeps its own backend
from matplotlib.ticker import LogLocator, NullFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pe_av.config import PAIRINGS
from pe_av.evaluation.metrics import DIRECTIONS, public_name

COLOURS = dict(
    zip(PAIRINGS, ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown"), strict=True)
)
TITLES = {name: " – ".join(map(public_name, sides)) for name, sides in PAIRINGS.items()}  # audio_text: audio – text
GREY = "0.45"


def print_table(metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Print a table of every direction, with the recall of guessing, to standard output.

    Args:
        metrics: direction -> `retrieval_metrics`; "reweighted", if given, the same by the original's protocol, of which
            R@1 is shown; other keys, such as `write_metrics` adds, are ignored.
    """
    reweighted = metrics.get("reweighted") or {}
    caption = "recalls and chance R@1 in percent"
    if reweighted:
        caption += "; R@1 rw: re-weighted, as in published tables"
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption)
    table.add_column("direction", no_wrap=True)
    columns = ["chance", "R@5", "R@10", "MedR", "MeanR", "MRR", "gallery"]  # fits 80 characters
    for column in ["R@1", "R@1 rw", *columns] if reweighted else ["R@1", *columns]:
        table.add_column(column, justify="right", style={"R@1": "bold", "chance": "dim"}.get(column), no_wrap=True)
    for direction in DIRECTIONS:
        if direction in metrics:
            row = metrics[direction]
            table.add_row(
                direction,
                f"{row['R@1']:.1f}",
                *([f"{reweighted[direction]['R@1']:.1f}"] if reweighted else []),
                f"{row['chance']:.2g}",
                *(f"{row[name]:.1f}" for name in ("R@5", "R@10")),
                f"{row['MedR']:g}",
                f"{row['MeanR']:.1f}",
                f"{row['MRR']:.3f}",
                str(row["gallery"]),
            )
    Console().print(table)


def write_metrics(path: str | Path, metrics: Mapping[str, Any], **extra: Any) -> None:
    """Write `metrics` as JSON, with `extra` (the step, the checkpoint, …) as further keys.

    The file is replaced atomically: no reader and no interruption leaves half of it.

    Raises:
        ValueError: an extra key is also a metric, or a number is NaN or infinite, which JSON does not have.
    """
    clash = sorted(metrics.keys() & extra.keys())
    if clash:
        raise ValueError(f"{', '.join(clash)}: both a metric and an extra key")
    text = json.dumps({**metrics, **extra}, indent=2, allow_nan=False) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")  # in the same folder, since renaming is atomic only there
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def plot_losses(
    history: Sequence[Mapping[str, float]], path: str | Path, evaluations: Sequence[Mapping[str, float]] = ()
) -> None:
    """Write a PNG of the loss over the steps, in total and by pairing, and beside it of R@1 over the steps.

    Args:
        history: rows of {"step", "loss", "<pairing>_loss", …}, of which only the step is required.
        evaluations: rows of {"step", "R@1/<direction>": percent, …}; without recalls only the loss is drawn.
    """
    recalls = any(key.startswith("R@1/") for row in evaluations for key in row)
    figure = Figure(figsize=(13 if recalls else 7, 4.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2 if recalls else 1, sharex=True, squeeze=False)[0]

    panels[0].set(title="training loss", ylabel="sigmoid contrastive loss", yscale="log")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    _curve(panels[0], history, "loss", color="black", linewidth=2, label="total")
    for pairing, colour in COLOURS.items():
        _curve(panels[0], history, f"{pairing}_loss", color=colour, label=TITLES[pairing])
    others = sorted(
        {key for row in history for key in row if key.endswith("_loss")} - {f"{name}_loss" for name in PAIRINGS}
    )
    for key in others:  # the user's own loss.pairings
        _curve(panels[0], history, key, linewidth=1, linestyle="--", label=key.removesuffix("_loss"))

    if recalls:
        panels[1].set(title="zero-shot retrieval", ylabel="R@1 (%)", ylim=(0, 102))
        pairing_of = {frozenset(sides): pairing for pairing, sides in PAIRINGS.items()}
        for direction, (query, gallery) in DIRECTIONS.items():
            pairing = pairing_of[frozenset((query, gallery))]
            forward = PAIRINGS[pairing] == (query, gallery)
            points = [(row["step"], row[f"R@1/{direction}"]) for row in evaluations if f"R@1/{direction}" in row]
            if points:
                style = {"marker": "o" if forward else "s", "markersize": 3.5, "linestyle": "-" if forward else "--"}
                panels[1].plot(*zip(*points, strict=True), color=COLOURS[pairing], label=direction, **style)

    for panel in panels:
        panel.set_xlabel("step")
        panel.grid(color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small", handlelength=3)
    _save(figure, path)


def plot_similarity(
    embeds: Mapping[str, Tensor], path: str | Path, valid: Mapping[str, Tensor] | None = None, limit: int = 64
) -> None:
    """Write a PNG of the cosine similarities in the six pairings; the diagonals are the matched embeddings.

    Args:
        embeds: name -> (N, D); a pairing of which one is missing is left empty.
        valid: name -> (N,) bool, whether a clip has the embedding; others are not shown. None: all clips have it.
        limit: the number of clips shown, the first ones.
    """
    cosines = {}
    for pairing, sides in PAIRINGS.items():
        if all(name in embeds for name in sides):
            shown = torch.ones(len(embeds[sides[0]]), dtype=torch.bool)
            for name in sides:
                shown &= shown if valid is None else valid[name]
            left, right = (F.normalize(embeds[name][shown][:limit].detach().double(), dim=1) for name in sides)
            if len(left):
                cosines[pairing] = (left @ right.T).cpu().numpy()
    bound = max((float(np.nanmax(np.abs(cosine))) for cosine in cosines.values()), default=1.0)

    figure = Figure(figsize=(11, 7.6), dpi=150, layout="constrained")
    panels = figure.subplots(2, 3)
    image = None
    for panel, (pairing, (left, right)) in zip(panels.flat, PAIRINGS.items(), strict=True):
        panel.set(xlabel=public_name(right), ylabel=public_name(left), xticks=[], yticks=[])
        panel.set_title(TITLES[pairing], fontweight="bold", pad=20)
        if pairing not in cosines:
            panel.set_box_aspect(1)
            panel.text(0.5, 0.5, "not evaluated", ha="center", va="center", color=GREY, transform=panel.transAxes)
            continue
        cosine = cosines[pairing]
        image = panel.imshow(cosine, cmap="RdBu_r", vmin=-bound, vmax=bound, interpolation="nearest")
        caption = f"matched {cosine.diagonal().mean():z.2f}"
        if len(cosine) > 1:
            caption += f", others {cosine[~np.eye(len(cosine), dtype=bool)].mean():z.2f}"
        panel.text(0.5, 1.02, caption, ha="center", va="bottom", color=GREY, transform=panel.transAxes)
    if image is not None:
        figure.colorbar(image, ax=panels, label="cosine similarity", shrink=0.6)
    _save(figure, path)


def _curve(panel: Axes, history: Sequence[Mapping[str, float]], key: str, **style: Any) -> None:
    """Draw a loss over the steps: faintly every value, and clearly their running mean."""
    points = [(row["step"], row[key]) for row in history if row.get(key) is not None]
    if not points:
        return
    steps, values = np.array(points, dtype=float).T
    style.setdefault("color", None)
    (faint,) = panel.plot(steps, values, color=style["color"], alpha=0.2, linewidth=0.8)
    style["color"] = faint.get_color()  # if none was given, the next of matplotlib's cycle
    width = max(1, len(values) // 40)
    mean = np.convolve(values, np.full(width, 1 / width), mode="valid")
    panel.plot(steps[width // 2 :][: len(mean)], mean, **style)


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
