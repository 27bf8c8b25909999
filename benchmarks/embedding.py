"""Embedding a corpus, beside decoding its files alone and the model alone with the same workers and threads.

    python -m benchmarks embedding [--clips 1000] [--workers 1]

The demo world's clips and `tiny` with random weights; the threads of the model are the cores that the workers leave.
"""

import argparse
import os
import tempfile
from itertools import cycle, islice
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.peer import chip, positive, save, seconds_of
from pe_av.checkpoint import build_model, save_model
from pe_av.config import DemoConfig, EmbedConfig
from pe_av.config.compose import from_dict
from pe_av.data.demo import prepare_demo
from pe_av.data.manifest import Manifest, read_manifest
from pe_av.embed import PartWriter, make_plan
from pe_av.workers import read_all

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=positive, default=1000)
    parser.add_argument("--workers", type=positive, default=1)
    parser.add_argument("--demo", default="data/demo", help="folder of the demo's files")
    options = parser.parse_args()
    torch.set_num_threads(max((os.cpu_count() or 1) - options.workers, 1))
    _, held_out = prepare_demo(DemoConfig(root=options.demo))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(build_model("tiny"), folder / "checkpoint")
        clips = list(islice(cycle(read_manifest(held_out)), options.clips))
        named = (type(clip)(f"{row}", clip.audio, clip.video) for row, clip in enumerate(clips))
        Manifest.of(named).write(folder / "clips.parquet")
        settings = {"checkpoint": str(folder / "checkpoint"), "source": str(folder / "clips.parquet"), "device": "cpu"}
        data = {"demo": None, "num_workers": options.workers}
        config = from_dict(EmbedConfig, {**settings, "target": str(folder / "index"), "data": data}, "benchmark")
        plan = make_plan(config, CPU)
        writer = PartWriter(plan, CPU)

        def decode() -> None:
            for _ in read_all(plan.clips, writer.read, options.workers):
                pass

        decoding = options.clips / seconds_of(decode, CPU)
        read = writer.read
        items = [read(clip) for clip in plan.clips[:64]]
        batch = writer.collate(items)
        passes = max(options.clips // 64, 1)
        computing = 64 * passes / seconds_of(lambda: [writer.embed(batch) for _ in range(passes)], CPU)
        throughput = writer.write(plan.missing())
    whole = throughput.rows / throughput.seconds
    row = {"whole": whole, "decoding": decoding, "model": computing, "share": whole / min(decoding, computing)}
    table = Table("clips/s", "decoding alone", "model alone", "share of the slower", title=f"embedding on {chip(CPU)}")
    table.add_row(*(f"{row[name]:,.1f}" for name in ("whole", "decoding", "model")), f"{100 * row['share']:.0f} %")
    Console().print(table)
    save("embedding", [{"case": "demo, tiny"} | row], {"clips": options.clips, "workers": options.workers}, CPU)


if __name__ == "__main__":
    main()
