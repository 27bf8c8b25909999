"""Every measured ratio to transformers as one picture: `python -m benchmarks picture` draws results/ratios.svg.

Reads results/SUBJECT_cpu.json and SUBJECT_cuda.json of the subjects that are compared with transformers. A point is the
peer's median time divided by ours, a whisker the lowest and highest of the alternating runs.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot  # noqa: E402

from benchmarks.peer import RESULTS  # noqa: E402

SUBJECTS = ("codec", "frames", "text", "audio", "forward", "startup")
COLOURS = {"cpu": "#2da44e", "cuda": "#8250df"}
GREY = "#7d8590"  # readable on white and on black


def rows_of(subject: str, device: str) -> list[dict]:
    """The rows of a file, each with its setting, but for those of the model for tests; [] if there
    is no such file."""
    path = RESULTS / f"{subject}_{device}.json"
    if not path.is_file():
        return []
    entries = json.loads(path.read_text())
    rows = [row | {"device": device} | {k: v for k, v in entry.items() if k != "rows"}
            for entry in entries if entry.get("preset") != "tiny" for row in entry["rows"]]  # fmt: skip
    newest = {(row["case"], row.get("preset"), row.get("dtype")): row for row in rows}
    return list(newest.values())


def label(row: dict) -> str:
    facts = [row["case"], row.get("preset"), {"bfloat16": "bf16"}.get(row.get("dtype"))]
    return ", ".join(fact for fact in facts if fact)


def draw(path: Path, **how: object) -> None:
    """Into an SVG, or whatever the name's ending says; `how`: further arguments of `savefig`."""
    groups = {subject: rows_of(subject, "cpu") + rows_of(subject, "cuda") for subject in SUBJECTS}
    groups = {subject: rows for subject, rows in groups.items() if rows}
    every = [row for rows in groups.values() for row in rows]
    style = {"text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY}
    style |= {"ytick.color": GREY, "font.size": 9, "svg.fonttype": "path", "svg.hashsalt": "ratios"}
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(9, 1.3 + 0.27 * (len(every) + len(groups))))
        place, ticks = 0.0, {}
        for subject, rows in groups.items():
            axes.annotate(subject, (0, place), (-8, 0), ("axes fraction", "data"), "offset points", ha="right",
                          va="center", weight="bold")  # fmt: skip
            for row in rows:
                place += 1
                ticks[place] = label(row)
                spread = [[row["ratio"] - row["lowest_ratio"]], [row["highest_ratio"] - row["ratio"]]]
                spread = [[max(value[0], 0)] for value in spread]
                axes.errorbar(row["ratio"], place, xerr=spread, fmt="o", ms=5, capsize=2.5, lw=1.2,
                              color=COLOURS[row["device"]])  # fmt: skip
                right = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
                axes.annotate(f"{row['ratio']:.1f} ×", (1, place), (8, 0), **right)
            place += 1
        axes.axvline(1, color=GREY, lw=1)
        axes.set_xscale("log")
        low = min(0.8, *(row["lowest_ratio"] for row in every)) / 1.1
        high = max(2.0, *(row["highest_ratio"] for row in every)) * 1.1
        marks = [mark for mark in (0.25, 0.5, 1, 2, 3, 5, 10, 20, 50) if low <= mark <= high]
        axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
        axes.set(xlim=(low, high), ylim=(place, -1))
        axes.minorticks_off()
        axes.set_yticks(list(ticks), list(ticks.values()))
        axes.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.grid(axis="x", alpha=0.25, color=GREY)
        axes.set_xlabel("time of transformers 5.23 ÷ ours: right of 1, ours is faster")
        chips: dict[tuple[str, str], set[str]] = {}
        for row in every:
            chips.setdefault((row["device"], row["chip"]), set()).add(row["date"])
        for index, ((device, name), dates) in enumerate(chips.items()):
            span = " to ".join(dict.fromkeys((min(dates), max(dates))))
            axes.annotate(f"{name}, {span}", (1, 1), (0, 6 + 12 * index), "axes fraction", "offset points", ha="right",
                          color=COLOURS[device], fontsize=8)  # fmt: skip
        figure.savefig(path, bbox_inches="tight", **how)
        pyplot.close(figure)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    draw(RESULTS / "ratios.svg", transparent=True, metadata={"Date": None})
    print(f"written to {RESULTS / 'ratios.svg'}")


if __name__ == "__main__":
    main()
