"""Search among random embeddings: exact, beside reading the same memory once; and by faiss, with its recall.

python -m benchmarks search [--rows 1000000] [--dim 1024] [--approximate]
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.peer import PeakMemory, apart, chip, positive, save, seconds_of
from pe_av.index import Index, part_path, write_part, write_record
from pe_av.nearest import make_approximate, nearest, nearest_approximately

CPU = torch.device("cpu")
PART_ROWS = 65_536
CLUSTERS = 1000  # of the embeddings, around which they lie as those of a model do


def write_index(folder: Path, rows: int, dim: int) -> None:
    write_record(folder, {"rows": rows, "part_rows": PART_ROWS, "embeddings": {"audio": dim}})
    random = np.random.default_rng(0)
    centres = random.standard_normal((CLUSTERS, dim), dtype=np.float32)
    for number, start in enumerate(range(0, rows, PART_ROWS)):
        count = min(PART_ROWS, rows - start)
        values = random.standard_normal((count, dim), dtype=np.float32)
        values += centres[random.integers(CLUSTERS, size=count)]
        about = [{"id": str(start + row), "start": 0.0} for row in range(count)]
        write_part(part_path(folder, number), about, {"audio": values}, {"audio": np.ones(count, bool)})


def exact(folder: Path, repeats: int) -> dict[str, float]:
    index = Index(folder)
    query = np.random.default_rng(1).standard_normal((1, index.record["embeddings"]["audio"]), dtype=np.float32)

    def read() -> None:
        for _, values, _ in index.blocks("audio", 65_536):
            torch.from_numpy(values).sum()

    read()  # the file is in the page cache from here on
    with PeakMemory(CPU) as memory:
        seconds = [seconds_of(lambda: nearest(index, "audio", query, 10), CPU) for _ in range(repeats)]
    bound = [seconds_of(read, CPU) for _ in range(repeats)]
    return {"seconds": float(np.median(seconds)), "reading_seconds": float(np.median(bound)), "mib": memory.mib}


def approximate(folder: Path, repeats: int) -> dict[str, float]:
    index = Index(folder)
    queries = index.vectors("audio", np.arange(0, len(index), len(index) // 50))
    queries += 0.5 * np.random.default_rng(1).standard_normal(queries.shape, dtype=np.float32)
    building = seconds_of(lambda: make_approximate(index, "audio"), CPU)
    _, found = nearest_approximately(index, "audio", queries, 10)
    _, true = nearest(index, "audio", queries, 10)
    recall = np.mean([len(set(ours) & set(theirs)) / 10 for ours, theirs in zip(found, true, strict=True)])
    one = [seconds_of(lambda: nearest_approximately(index, "audio", queries[:1], 10), CPU) for _ in range(repeats)]
    return {"building_seconds": building, "seconds": float(np.median(one)), "recall_at_10": float(recall)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positive, default=1_000_000)
    parser.add_argument("--dim", type=positive, default=1024)
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--approximate", action="store_true", help="also build and ask the index of faiss")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder), options.rows, options.dim)
        rows = [{"case": "exact"} | apart(exact, Path(folder), options.repeats)]
        if options.approximate:
            rows.append({"case": "approximate"} | apart(approximate, Path(folder), options.repeats))
    table = Table("case", "s", "reading s", "MiB", "recall@10", "building s", title=f"search on {chip(CPU)}")
    for row in rows:
        names = ("seconds", "reading_seconds", "mib", "recall_at_10", "building_seconds")
        table.add_row(row["case"], *(f"{row[name]:,.3f}" if name in row else "" for name in names))
    Console().print(table)
    save("search", rows, {"rows_of_index": options.rows, "dim": options.dim}, CPU)


if __name__ == "__main__":
    main()
