"""How time and memory grow with the input, ours beside a peer, on a CPU: `python -m benchmarks curves [CURVE …]`

- codec, audio: seconds of sound, through the codec and through the audio transformer (10,000 positions at most);
- batch: clips of 10 s through the audio transformer;
- frames: through the frame encoder; tokens: of a caption through the text encoder;
- gallery: `retrieval_ranks` of as many queries as items, beside the whole matrix of scores at once;
- ranks: `contrastive_loss` of 4,096 clips on 1 to 4 processes of one thread each, beside `gathered_loss`.

The peer of the first five is transformers. Each series stops before the size that would go past `--seconds`, or past
the memory that is free. Exponents are the slopes on the upper half of a series in log-log, by least squares. Writes
results/curves_cpu.json and draws it into results/curves_cpu.svg.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch import Tensor

from benchmarks.growing import CPU, PARTS, Point, exponent, grow, series
from benchmarks.peer import RESULTS, PeakMemory, apart, checkpoints, chip, save, saved
from pe_av.config import HEADS, PAIRINGS, LossConfig
from pe_av.config.compose import load_preset
from pe_av.evaluation.ranking import retrieval_ranks
from pe_av.loss import contrastive_loss, gathered_loss

SIZES = {
    "codec": [1, 2, 5, 10, 20, 60, 120, 300, 600, 1200, 3600],
    "audio": [1, 2, 5, 10, 20, 50, 100, 200, 399],
    "batch": [1, 2, 4, 8, 16, 32, 64, 128, 256],
    "frames": [1, 2, 4, 8, 16, 32, 64, 128, 256, 500, 1000],
    "tokens": [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192],
    "gallery": [1000, 2000, 4000, 8000, 16_000, 30_000],
    "ranks": [1, 2, 3, 4],
}
AXES = {
    "codec": "seconds of sound, codec",
    "audio": "seconds of sound, audio transformer",
    "batch": "clips of 10 s, audio transformer",
    "frames": "frames",
    "tokens": "tokens",
    "gallery": "items of the gallery",
    "ranks": "ranks",
}
PEERS = dict.fromkeys(PARTS, "transformers") | {"gallery": "whole matrix", "ranks": "gathered_loss"}
DIM, PAIRS = 1024, 4096


def gallery(ours: bool, sizes: list[int], budget: float) -> list[Point]:
    def prepare(size: int):
        queries, items = (F.normalize(torch.randn(size, DIM), dim=1) for _ in range(2))

        def whole() -> Tensor:
            scores = queries.double() @ items.double().T
            return (scores >= scores.diagonal()[:, None]).sum(1)

        return (lambda: retrieval_ranks(queries, items)) if ours else whole

    prepare(sizes[0])()
    return grow(prepare, sizes, budget)


def ranks(ours: bool, sizes: list[int], budget: float) -> list[Point]:
    """The slowest rank's seconds, and the largest memory of one rank."""
    points, started = [], time.perf_counter()
    for world in sizes:
        if points and time.perf_counter() - started + points[-1]["seconds"] > budget:
            break
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(_rank, (world, folder, ours), nprocs=world)
            found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
        points.append({"size": world, "seconds": max(f[0] for f in found), "mib": max(f[1] for f in found)})
    return points


def _rank(rank: int, world: int, folder: str, ours: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(rank)
    embeds = {name: F.normalize(torch.randn(PAIRS // world, DIM), dim=1).requires_grad_() for name in HEADS}
    logits = {name: (torch.tensor([10.0]), torch.tensor([-10.0])) for name in PAIRINGS}
    loss = contrastive_loss if ours else gathered_loss
    with PeakMemory(CPU) as memory:
        dist.barrier()
        started = time.perf_counter()
        loss(embeds, logits, LossConfig().pairings).total.backward()
        seconds = time.perf_counter() - started
    (Path(folder) / f"{rank}.json").write_text(json.dumps([seconds, memory.mib]))
    dist.barrier()
    dist.destroy_process_group()


def measure(curve: str, preset: str, folders: tuple[str, str] | None, budget: float) -> dict[str, object]:
    row: dict[str, object] = {"curve": curve, "of": AXES[curve], "peer": PEERS[curve]}
    for ours in (True, False):
        sizes = SIZES[curve]
        if curve in PARTS:
            limits = {"tokens": load_preset(preset).text.max_position_embeddings}
            sizes = [size for size in sizes if size <= limits.get(curve, size)]
            points = apart(series, curve, ours, preset, folders[not ours], sizes, budget)
        elif curve == "gallery":
            points = apart(gallery, ours, sizes, budget)
        else:
            points = ranks(ours, sizes, budget)
        side = "ours" if ours else "theirs"
        row[side] = points
        row[f"{side}_exponents"] = {name: exponent(points, name) for name in ("seconds", "mib")}
        found = {n: "–" if e is None else f"{e:.2f}" for n, e in row[f"{side}_exponents"].items()}
        print(
            f"{curve}, {side if ours else PEERS[curve]}: to {points[-1]['size']:,} {AXES[curve]}, "
            f"{points[-1]['seconds']:.2f} s, {points[-1]['mib']:,.0f} MiB; exponents of time {found['seconds']}, "
            f"of memory {found['mib']}",
            flush=True,
        )
    return row


def draw(rows: list[dict], title: str, path: Path) -> None:
    """Two small pictures for each curve, time above memory."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("svg")
    grey = "#7d8590"  # readable on white and on black
    style = {"text.color": grey, "axes.labelcolor": grey, "axes.edgecolor": grey, "xtick.color": grey}
    style |= {"ytick.color": grey, "font.size": 8, "svg.fonttype": "none", "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        columns = 4
        lines = -(-len(rows) // columns)
        figure, axes = pyplot.subplots(2 * lines, columns, figsize=(12, 4.6 * lines), squeeze=False)
        for panel in axes.flat:
            panel.set_visible(False)
        for index, row in enumerate(rows):
            for offset, (quantity, unit) in enumerate((("seconds", "s"), ("mib", "MiB"))):
                panel = axes[2 * (index // columns) + offset][index % columns]
                panel.set_visible(True)
                for side, name, colour in (("ours", "ours", "#2da44e"), ("theirs", row["peer"], "#e16f24")):
                    points = [point for point in row[side] if point[quantity] > 0]
                    slope = row[f"{side}_exponents"][quantity]
                    label = name if slope is None else f"{name}, ~n^{slope:.2f}"
                    panel.plot([p["size"] for p in points], [p[quantity] for p in points], "o-", ms=3, lw=1.2,
                               color=colour, label=label)  # fmt: skip
                panel.set(xscale="log", yscale="log", ylabel=unit)
                panel.set_title(f"{'time' if offset == 0 else 'memory'}: {row['of']}", fontsize=8)
                if row["curve"] == "ranks":
                    panel.set_xticks([1, 2, 3, 4], ["1", "2", "3", "4"])
                panel.minorticks_off()  # they would be most of the file
                panel.grid(alpha=0.25, color=grey)
                panel.legend(frameon=False, fontsize=7)
        figure.suptitle(title, fontsize=9)
        figure.tight_layout()
        figure.savefig(path, transparent=True)
        pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", nargs="*", metavar="CURVE", help=f"of {', '.join(SIZES)}; default: all")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--seconds", type=float, default=60, help="for each series")
    options = parser.parse_args()
    curves = options.curves or list(SIZES)
    if unknown := set(curves) - SIZES.keys():
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(SIZES)}")
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    if set(curves) & PARTS.keys():
        with checkpoints(options.preset) as folders:
            rows = [measure(curve, options.preset, folders, options.seconds) for curve in curves]
    else:
        rows = [measure(curve, options.preset, None, options.seconds) for curve in curves]
    measured = {row["curve"]: row for row in [*saved("curves", {"preset": options.preset}, CPU), *rows]}
    rows = [measured[curve] for curve in SIZES if curve in measured]  # also of what was measured before
    save("curves", rows, {"preset": options.preset}, CPU)
    draw(rows, f"{options.preset} on {chip(CPU)}, float32", RESULTS / "curves_cpu.svg")


if __name__ == "__main__":
    main()
