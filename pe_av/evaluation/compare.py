"""Trainings beside each other: `python -m pe_av.evaluation.compare RUN RUN … [PICTURE.png]`.

Draws the loss and the recalls of all runs over the steps into one picture, comparison.png unless another is named, and
prints which settings differ between the runs, and their last recalls. Runs that differ in nothing but their seed are of
one colour, and a further table has their means.

A run is the folder that train.py writes; other folders are left out. Its loss is read from history.jsonl, its recalls
over the steps from tensorboard/, and its last recalls from metrics.json.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pe_av.config import ConfigError
from pe_av.evaluation.metrics import DIRECTIONS
from pe_av.evaluation.paired import short_names

SAME_SETTING = ("seed", "resume", "data.demo.root", "data.stamps.root")  # may differ between runs of one setting


@dataclass
class Run:
    """A training, as its folder tells it."""

    name: str
    settings: dict[str, Any]  # dotted key -> value, of its config.yaml
    losses: list[tuple[int, float]]  # (step, loss)
    recalls: dict[str, list[tuple[int, float]]]  # direction -> (step, R@1 in percent)
    step: int | None  # of the last evaluation; None if there was none yet
    last: dict[str, dict[str, float]]  # direction -> `retrieval_metrics` of that evaluation


class NoRunError(ConfigError):
    """A folder that train.py did not write."""


def read_run(folder: Path, name: str) -> Run:
    """
    Raises:
        NoRunError: the folder is no run.
        ConfigError: there is no such folder, or a file in it cannot be read.
    """
    if not folder.is_dir():
        if folder.exists():
            raise NoRunError(f"{folder}: is no folder, so it is not that of a run")
        raise ConfigError(f"{folder}: no such folder; give folders that train.py has written, such as runs/<date>")
    for file in ("config.yaml", "history.jsonl"):
        if not (folder / file).is_file():
            raise NoRunError(f"{folder}: has no {file}, so it is not the folder of a run")
    config = _read(folder / "config.yaml", yaml.safe_load, dict)
    history = _read(folder / "history.jsonl", _rows, list)
    metrics = _read(folder / "metrics.json", json.loads, dict) if (folder / "metrics.json").is_file() else {}
    return Run(
        name,
        settings=flat(config),
        losses=[(row["step"], row["loss"]) for row in history if row.get("loss") is not None],
        recalls=_recalls(folder / "tensorboard"),
        step=metrics.get("step"),
        last={direction: metrics[direction] for direction in DIRECTIONS if direction in metrics},
    )


def _read(path: Path, parse: Any, kind: type) -> Any:
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    if not isinstance(values, kind):
        raise ConfigError(f"{path}: holds a {type(values).__name__}, not a {kind.__name__}")
    return values


def _rows(text: str) -> list[dict[str, Any]]:
    # the last line may be torn if the run was killed
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def _recalls(folder: Path) -> dict[str, list[tuple[int, float]]]:
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes a second

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: all of them
    events.Reload()
    known = events.Tags()["scalars"]
    return {
        direction: [(event.step, event.value) for event in events.Scalars(f"R@1/{direction}")]
        for direction in DIRECTIONS
        if f"R@1/{direction}" in known
    }


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}. An entry of a list with a name, such as a pairing of the loss, is one value."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            values |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(one, dict) and "name" in one for one in value):
            for one in value:
                given = [f"{name}={_text(part)}" for name, part in one.items() if name != "name"]
                values[f"{prefix}{key}.{one['name']}"] = " ".join(given)
        else:
            values[f"{prefix}{key}"] = value
    return values


def different_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The settings in which not all runs agree: dotted key -> the value in each run, "–" if there is none."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    # a setting that an older version did not have is like one that is null
    values = {key: [_text(run.settings.get(key)) for run in runs] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}


def _text(value: Any) -> str:
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def check_comparable(runs: Sequence[Run]) -> None:
    """Raise ConfigError unless all runs are evaluated on the same data."""
    # where a rendered world lies is of no consequence, and neither is how it is read
    demo = ("data.demo", "data.demo.seed", "data.demo.eval_clips", "data.demo.validation")
    keys = ("data.eval", "data.eval_split", *demo, "data.stamps")
    first = runs[0]
    for run in runs[1:]:
        for key in keys:
            theirs = (first.settings.get(key), run.settings.get(key))
            if theirs[0] != theirs[1]:
                values = " and ".join(_text(value) for value in theirs)
                raise ConfigError(
                    f"{first.name} and {run.name} are evaluated on different data ({key}: {values}), so their recalls "
                    "cannot be compared"
                )


def by_setting(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs that differ in nothing but seed and folders, under the name of the first without its seed."""
    groups: dict[str, list[Run]] = {}
    names: dict[tuple[tuple[str, str], ...], str] = {}
    for run in runs:
        settings = {key: _text(value) for key, value in run.settings.items() if key not in SAME_SETTING}
        shortened = re.sub(r"[,-]?\bseed=?\d+", "", run.name) or run.name
        name = names.setdefault(tuple(sorted(settings.items())), shortened)
        groups.setdefault(name, []).append(run)
    return groups


def plot_runs(runs: Sequence[Run], path: str | Path) -> None:
    """Write a PNG with a panel for the loss and one for R@1 of each direction that a run has, a line for each run.

    Runs that differ in their seed alone have one colour.
    """
    directions = [direction for direction in DIRECTIONS if any(direction in run.recalls for run in runs)]
    columns = min(4, 1 + len(directions))
    rows = -(-(1 + len(directions)) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.6 * rows + 0.3), dpi=130, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
    groups = by_setting(runs)
    colours = colormaps["tab10" if len(groups) <= 10 else "turbo"]
    numbered = [(number, name, run) for number, (name, members) in enumerate(groups.items()) for run in members]
    for panel, direction in zip(panels, [None, *directions], strict=False):
        panel.set_title("training loss" if direction is None else f"R@1 of {direction} (%)", fontsize="medium")
        for number, name, run in numbered:
            points = run.losses if direction is None else run.recalls.get(direction, [])
            if points:
                colour = colours(number if len(groups) <= 10 else number / (len(groups) - 1))
                steps, values = np.array(points, dtype=float).T
                if direction is None:
                    width = max(1, len(values) // 40)  # a running mean: single steps are noisy
                    values = np.convolve(values, np.full(width, 1 / width), mode="valid")
                    steps = steps[width // 2 :][: len(values)]
                panel.plot(steps, values, marker="." if len(values) < 20 else None, color=colour, label=name)
        if direction is not None:
            panel.set_ylim(0, 102)
        panel.grid(color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.set_tick_params(labelbottom=True)
        panel.set_xlabel("step", fontsize="small")
    for panel in panels[1 + len(directions) :]:
        panel.set_axis_off()
    lines = {line.get_label(): line for panel in figure.axes for line in panel.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(len(groups), 4), frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def settings_table(runs: Sequence[Run]) -> Table:
    """A row for every setting that differs, a column for every run."""
    table = _table("settings that differ", "setting", [run.name for run in runs])
    for key, values in different_settings(runs).items():
        table.add_row(key, *values)
    return table


def recalls_table(runs: Sequence[Run]) -> Table:
    """The last R@1 of every direction, a column for every run."""
    table = _table("last R@1 in percent", "direction", [run.name for run in runs])
    table.add_row("after step", *("–" if run.step is None else str(run.step) for run in runs))
    for direction in DIRECTIONS:
        if any(direction in run.last for run in runs):
            values = (f"{run.last[direction]['R@1']:.1f}" if direction in run.last else "–" for run in runs)
            table.add_row(direction, *values)
    return table


def seeds_table(runs: Sequence[Run]) -> Table | None:
    """The last R@1 of every direction, mean ± standard deviation over the seeds of a setting; None if none has two."""
    groups = by_setting(runs)
    if len(groups) == len(runs):
        return None
    table = _table("last R@1 in percent, mean ± standard deviation over seeds", "direction", list(groups))
    table.add_row("seeds", *(str(len(members)) for members in groups.values()))
    for direction in DIRECTIONS:
        cells = []
        for members in groups.values():
            values = [run.last[direction]["R@1"] for run in members if direction in run.last]
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{spread}" if values else "–")
        if set(cells) != {"–"}:
            table.add_row(direction, *cells)
    return table


def _table(title: str, first: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(Text(name), justify="right", overflow="fold")
    return table


def main(arguments: Sequence[str]) -> None:
    """python -m pe_av.evaluation.compare RUN RUN … [PICTURE.png]"""
    folders = [argument for argument in arguments if not argument.endswith(".png")]
    pictures = [argument for argument in arguments if argument.endswith(".png")]
    if len(folders) < 2 or len(pictures) > 1:
        sys.exit(f"usage: {main.__doc__}")
    log = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    try:
        runs = []
        for folder, name in zip(folders, short_names(folders), strict=True):
            try:
                runs.append(read_run(Path(folder), name))
            except NoRunError as error:  # runs/* also has the folders of evaluations
                log.print(f"left out: {error}")
        if len(runs) < 2:
            raise ConfigError("fewer than two of these folders are runs, so there is nothing to compare")
        check_comparable(runs)
        picture = (pictures or ["comparison.png"])[0]
        plot_runs(runs, picture)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    console = Console()
    console.print(settings_table(runs))
    console.print(recalls_table(runs))
    if (means := seeds_table(runs)) is not None:
        console.print(means)
    log.print(f"written to {picture}")


if __name__ == "__main__":
    main(sys.argv[1:])
