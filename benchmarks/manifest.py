"""Manifests of millions of rows in figures: `python benchmarks/manifest.py [--rows N] [--ranks N] [--out FILE]`.

Generates a JSONL and a Parquet file of clips with captions of about 150 bytes each, and measures

- convert: the first opening of each, which writes the Arrow file that is mapped: seconds, the largest memory of its own
  that the process had meanwhile, and the size of the file.
- reopen: seconds that every later opening takes.
- train: what the manifest, its lengths and parts, a shuffling `BatchSampler` and a `Loader` with four workers take
  together, in `--ranks` processes at once, after some batches. Every process counts with its proportional share (PSS),
  so shared pages count once. Pages of the mapped file are told apart: the system drops them when memory is asked for.

The clips point at files that do not exist: a tiny item stands for each.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # this checkout, installed or not

from pe_av.data.manifest import Clip, read_manifest
from pe_av.loading.loader import Loader
from pe_av.loading.sampler import BatchSampler

MIB, PIECE, WORKERS = 2**20, 100_000, 4


def generate(folder: Path, rows: int) -> None:
    """clips.jsonl and clips.parquet, of the same clips."""
    words = np.array("dog bell rain street engine crowd piano river wind laughter a the of in near behind".split())
    chance = np.random.default_rng(0)
    schema = pa.schema([(name, pa.string()) for name in ("path", "caption", "audio_caption", "split")])
    with (folder / "clips.jsonl").open("w") as file, pq.ParquetWriter(folder / "clips.parquet", schema) as writer:
        for start in range(0, rows, PIECE):
            said = [" ".join(words[pick]) for pick in chance.integers(0, len(words), (1000, 15))]
            numbers = range(start, min(start + PIECE, rows))
            table = [
                {
                    "path": f"clips/{i:08d}.mp4",
                    "caption": f"{i} {said[i % 1000]}",
                    "audio_caption": f"{said[i // 1000 % 1000]} {i}",
                    "split": "eval" if i % 10 == 0 else "train",
                }
                for i in numbers
            ]
            seconds = chance.integers(1, 30, len(table)).tolist()
            file.writelines(json.dumps(row | {"seconds": s}) + "\n" for row, s in zip(table, seconds, strict=True))
            writer.write_table(pa.Table.from_pylist(table, schema))


def tiny_item(clip: Clip) -> dict[str, object]:
    return {"id": clip.id, "captions": clip.captions, "waveform": torch.zeros(1920)}


def collate(items: list[dict[str, Any]], picks: list[int]) -> dict[str, Any]:
    return {"ids": [item["id"] for item in items], "inputs": torch.stack([item["waveform"] for item in items])}


def memory(processes: list[int], mapped: str) -> dict[str, float]:
    """MiB that processes have together, and how much of it are pages of a mapped file."""
    total = file = 0
    for process in processes:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
        of_file = False
        for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
            if "-" in line.split()[0]:  # a mapping begins: address range, …, the file
                of_file = line.endswith(mapped)
            elif of_file and line.startswith("Pss:"):
                file += int(line.split()[1])
    return {"MiB": (total - file) / 1024, "mapped_file_MiB": file / 1024}


def family(process: int) -> list[int]:
    """A process and all that descend from it."""
    children = [
        int(child)
        for task in Path(f"/proc/{process}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return [process, *(below for child in children for below in family(child))]


def convert(path: Path) -> dict[str, float]:
    own = [0]  # KiB

    def watch() -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            own[0] = max(own[0], int(status.split("RssAnon:")[1].split()[0]))
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()
    time.sleep(0.2)
    before, started = own[0], time.perf_counter()
    manifest = read_manifest(path)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    assert len(read_manifest(path)) == len(manifest)
    return {
        "convert_seconds": seconds, "rows_per_second": len(manifest) / seconds,
        "peak_MiB_above_start": (own[0] - before) / 1024,
        "copy_bytes_per_row": os.path.getsize(manifest.stored[0]) / len(manifest),
        "source_bytes_per_row": path.stat().st_size / len(manifest),
        "reopen_seconds": time.perf_counter() - started,
    }  # fmt: skip


def rank(path: Path, batches: int, number: int, world: int) -> None:
    """Reads some batches, says what it took, and waits to be measured."""
    started = time.perf_counter()
    manifest = read_manifest(path)
    opened = time.perf_counter() - started
    lengths, parts = manifest.lengths(30.0), manifest.modalities()
    sampler = BatchSampler(len(manifest), 64, shuffle=True, lengths=lengths, modalities=parts, rank=number, world=world)
    del lengths, parts
    loader = Loader(manifest, tiny_item, sampler, collate, WORKERS, 60.0)
    stream = iter(loader)
    for _ in range(batches):
        next(stream)
    ready = time.perf_counter() - started
    print(
        json.dumps({"open_seconds": opened, "first_batches_seconds": ready, "mapped": manifest.stored[0]}), flush=True
    )
    sys.stdin.readline()
    stream.close()
    loader.close()


def train(path: Path, batches: int, ranks: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "rank", str(path), str(batches)]
    running = [
        subprocess.Popen([*command, str(i), str(ranks)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for i in range(ranks)
    ]
    told = [json.loads(process.stdout.readline()) for process in running]
    processes = [member for process in running for member in family(process.pid)]
    found = memory(processes, os.path.realpath(told[0]["mapped"]))
    for process in running:
        process.communicate("\n")
    times = {name: max(one[name] for one in told) for name in ("open_seconds", "first_batches_seconds")}
    return {"ranks": ranks, "workers_per_rank": WORKERS, "processes": len(processes), **found, **times}


def bare() -> dict[str, float]:
    """What a process has that only imports what the others import."""
    return memory([os.getpid()], "no file")


def in_process(*arguments: str) -> Any:
    return json.loads(subprocess.check_output([sys.executable, __file__, *arguments], text=True))


def main() -> None:
    if sys.argv[1:2] == ["convert"]:
        print(json.dumps(convert(Path(sys.argv[2]))))
        return
    if sys.argv[1:2] == ["rank"]:
        rank(Path(sys.argv[2]), *map(int, sys.argv[3:]))
        return
    if sys.argv[1:2] == ["bare"]:
        print(json.dumps(bare()))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--batches", type=int, default=200, help="of 64 clips, read by each rank before measuring")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder, given.rows)
        found = {
            "device": f"{platform.machine()}, {os.cpu_count()} cores",
            "date": datetime.date.today().isoformat(),
            "rows": given.rows,
            "jsonl": in_process("convert", str(folder / "clips.jsonl")),
            "parquet": in_process("convert", str(folder / "clips.parquet")),
            "imports_alone": in_process("bare"),
            "train": [train(folder / "clips.jsonl", given.batches, ranks) for ranks in given.ranks],
            "load": os.getloadavg()[0],
        }
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if given.out is not None:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
