"""Several checkpoints on the same clips: `python eval.py checkpoint=[A,B,C]`.

Each is evaluated as it would be alone, into a folder of its own. Beside them `comparison.json` and `comparison.md` tell
by how much R@1 differs from that of the first, with the interval of the difference: checkpoints find the same queries
easy, so two of them can differ clearly although their own intervals overlap.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pe_av.checkpoint import CONFIG_FILE, CheckpointError
from pe_av.config import ConfigError, EvalConfig, ModelConfig
from pe_av.config.compose import read_model_config
from pe_av.device import pick_device
from pe_av.evaluation.figures import RESAMPLES
from pe_av.evaluation.html_report import Evaluation, markdown_table
from pe_av.evaluation.metrics import DIRECTIONS
from pe_av.evaluation.report import write_metrics
from pe_av.evaluation.retrieval import evaluate
from pe_av.ranks import process_group, rank

FILE = "comparison.json"


def evaluate_checkpoints(config: EvalConfig, folder: Path, before: Sequence[Path] = ()) -> dict[str, Any]:
    """Evaluate every checkpoint of a list, and compare them with the first.

    Args:
        before: folders with the comparisons of the same checkpoints on other data sets; if there are any, one table of
            all is written beside `folder`.
    Returns:
        what `compare_evaluations` does; also written to `folder`.
    Raises:
        ConfigError, CheckpointError: the settings, the data or a checkpoint cannot be used, or the checkpoints have no
            direction in common.
    """
    names = short_names(config.checkpoint)
    check_common_directions(config.checkpoint)
    evaluations = {}
    with process_group(pick_device(config.device), config.timeout_minutes) as device:
        for name, path in zip(names, config.checkpoint, strict=True):
            single = replace(config, checkpoint=path)
            evaluations[name] = drop_embeddings(evaluate(single, folder / name.replace("/", "_"), device))
        comparison = compare_evaluations(evaluations)
        if rank() == 0:
            write_metrics(folder / FILE, comparison)
            earlier = [
                json.loads((other / FILE).read_text(encoding="utf-8")) for other in before if (other / FILE).is_file()
            ]
            _write(folder, [comparison])
            if earlier:
                _write(folder.parent, [*earlier, comparison])
            print_comparison([*earlier, comparison])
    return comparison


def check_common_directions(paths: Sequence[str]) -> None:
    """Raise before anything is evaluated if these are no checkpoints that can be compared."""
    heads = {}
    for path in paths:
        if not (Path(path) / CONFIG_FILE).is_file():
            raise CheckpointError(f"{path}: no checkpoint there; give its folder, such as runs/<date>/checkpoint")
        model = read_model_config(Path(path) / CONFIG_FILE)
        if not isinstance(model, ModelConfig):
            raise ConfigError(f"{path} is a PEAudioFrame, which has no embedding of a whole clip to retrieve with")
        heads[path] = set(model.heads)
    common = set.intersection(*heads.values())
    if not any({query, gallery} <= common for query, gallery in DIRECTIONS.values()):
        listed = "; ".join(f"{path} has {', '.join(sorted(names))}" for path, names in heads.items())
        raise ConfigError(f"the checkpoints have no two embeddings in common that could be compared: {listed}")


def drop_embeddings(evaluation: Evaluation) -> Evaluation:
    """The evaluation without what takes memory and is not compared."""
    return replace(evaluation, embedded=replace(evaluation.embedded, embeds={}, texts={}, valid={}, keys={}))


def compare_evaluations(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """R@1 of each evaluation, and its difference to that of the first.

    Returns:
        {"data": name, "checkpoints": name -> path, "directions": direction -> {"queries", "gallery", "R@1": name ->
        percent, "difference": name -> {"R@1": points, "ci95": [low, high]}}}, of the directions that all have.
    Raises:
        ConfigError: the evaluations are of different clips or captions, or have no direction in common.
    """
    (first_name, first), *others = evaluations.items()
    for name, other in others:
        if (first.embedded.ids, first.embedded.sentences) != (other.embedded.ids, other.embedded.sentences):
            different = sorted(set(first.embedded.ids) ^ set(other.embedded.ids))
            what = f": {len(different)} clips, such as {different[0]}, are in one alone" if different else ""
            raise ConfigError(f"{first_name} and {name} were evaluated on different clips or captions{what}")
    common = [name for name in first.ranked if all(name in other.ranked for _, other in others)]
    if not common:
        raise ConfigError(f"{', '.join(evaluations)}: there is no direction that all of them have")
    directions = {}
    for direction in common:
        ranked = [evaluation.ranked[direction] for evaluation in evaluations.values()]
        hits = np.stack([(each.ranks == 1).numpy() for each in ranked])
        differences = paired_differences(hits, ranked[0].units.numpy())
        directions[direction] = {
            "queries": hits.shape[1],
            "gallery": len(ranked[0].items),
            "R@1": {name: 100 * float(row.mean()) for name, row in zip(evaluations, hits, strict=True)},
            "difference": dict(zip(list(evaluations)[1:], differences, strict=True)),
        }
    return {
        "data": first.data,
        "checkpoints": {name: evaluation.config.checkpoint for name, evaluation in evaluations.items()},
        "directions": directions,
    }


def paired_differences(hits: NDArray, units: NDArray, seed: int = 0) -> list[dict[str, Any]]:
    """By how much each row's mean differs from the first row's, with 95 % percentile bootstrap intervals (Efron 1979)
    of the differences: a resample draws the same queries for all rows.

    Args:
        hits: (K, Q) bool, whether each of K checkpoints answers each query.
        units: (Q,) queries with the same number are drawn together, as in `figures.intervals`.
    Returns:
        K − 1 of {"R@1": points of percent, "ci95": [low, high]}.
    """
    random = np.random.default_rng(seed)
    _, units = np.unique(units, return_inverse=True)
    sizes = np.bincount(units)
    gained = hits[1:].astype(np.int8) - hits[:1].astype(np.int8)
    gains = np.stack([np.bincount(units, row, len(sizes)) for row in gained], 1)  # of each unit, in queries
    drawn = np.empty((RESAMPLES, len(gained)))
    for row in drawn:
        times = np.bincount(random.integers(0, len(sizes), len(sizes)), minlength=len(sizes)).astype(np.float64)
        row[:] = 100 * (times @ gains) / (times @ sizes)
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    means = 100 * gained.mean(1, dtype=np.float64)
    return [{"R@1": float(m), "ci95": [float(a), float(b)]} for m, a, b in zip(means, low, high, strict=True)]


def short_names(paths: Sequence[str]) -> list[str]:
    """What tells paths apart: without the folders that all begin with, and those that all end with."""
    parts = [list(Path(path).parts) for path in paths]
    while min(map(len, parts)) > 1 and len({one[0] for one in parts}) == 1:
        parts = [one[1:] for one in parts]
    while min(map(len, parts)) > 1 and len({one[-1] for one in parts}) == 1:
        parts = [one[:-1] for one in parts]
    return ["/".join(one).strip("/") for one in parts]


def comparison_table(
    comparisons: Sequence[Mapping[str, Any]], titles: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of text: each data set's directions, with R@1 of each checkpoint and the differences.

    Args:
        titles: what the checkpoints are called in the names of the columns.
    """
    first, *others = titles
    names = list(comparisons[0]["checkpoints"])
    rows = []
    for comparison in comparisons:
        for direction, row in comparison["directions"].items():
            cells = [f"{row['R@1'][names[0]]:.1f}"]
            for name in names[1:]:
                difference = row["difference"][name]
                low, high = difference["ci95"]
                sure = " *" if low > 0 or high < 0 else ""
                cells += [f"{row['R@1'][name]:.1f}", f"{difference['R@1']:+z.1f} [{low:+z.1f}, {high:+z.1f}]{sure}"]
            rows.append([comparison["data"], direction, *cells, str(row["queries"])])
    columns = [first, *(column for title in others for column in (title, f"{title} − {first}"))]
    return ["data", "direction", *columns, "queries"], rows


NOTE = (
    "R@1 in percent; differences to the first checkpoint with the 95 % intervals of a paired bootstrap, and a star "
    "where the interval excludes 0."
)


def print_comparison(comparisons: Sequence[Mapping[str, Any]]) -> None:
    """Print the table to standard output, with letters for the checkpoints so that it fits the screen."""
    names = list(comparisons[0]["checkpoints"])
    letters = ["ABCDEFGHIJKLMNOPQRSTUVWXYZ"[i] if len(names) <= 26 else str(i + 1) for i in range(len(names))]
    columns, rows = comparison_table(comparisons, letters)
    start = 0 if len(comparisons) > 1 else 1  # one data set needs no column
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns[start:]:
        left = column in ("data", "direction")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "data")
    for row in rows:
        table.add_row(*row[start:])
    console = Console()
    console.print(table)
    for letter, name in zip(letters, names, strict=True):
        console.print(f"{letter}: {name}", highlight=False, markup=False, soft_wrap=True)
    console.print(NOTE, highlight=False)


def _write(folder: Path, comparisons: Sequence[Mapping[str, Any]]) -> None:
    columns, rows = comparison_table(comparisons, list(comparisons[0]["checkpoints"]))
    rows = [[data, direction.replace("->", " → "), *cells] for data, direction, *cells in rows]
    lines = [*markdown_table(columns, rows), "", NOTE]
    (folder / "comparison.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if len(comparisons) > 1:
        write_metrics(folder / FILE, {"comparisons": comparisons})
