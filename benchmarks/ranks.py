"""Exact ranks beside the bare float32 products of the same blocks: `python -m benchmarks ranks [options]`.

Both run in one process of their own for each size, in turns; the best of the repeats counts. `trained` are embeddings
whose true pairs stand out, as after training; of `random` ones the true scores lie among all others, where float32
decides the least; `collapsed` ones are all equal. Memory is the peak above the embeddings.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.peer import RESULTS, chip
from pe_av.evaluation.ranking import ITEMS, QUERIES, retrieval_ranks

MIB = 2**20


def embeddings(kind: str, size: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    gallery = torch.randn(size, width, device=device)
    if kind == "collapsed":
        gallery[:] = gallery[0].clone()
    queries = torch.randn(size, width, device=device)
    if kind == "trained":
        queries.mul_(5).add_(gallery)  # cosines of true pairs about 0.2, of others 0 ± 0.03
    return queries, gallery


def bare(queries: Tensor, gallery: Tensor) -> None:
    for rows in queries.split(QUERIES):
        for columns in gallery.split(ITEMS):
            rows @ columns.T


def measure(kind: str, size: int, options: argparse.Namespace) -> dict[str, float | int | str]:
    if options.threads:
        torch.set_num_threads(options.threads)
    cuda = options.device.startswith("cuda")
    queries, gallery = embeddings(kind, size, options.dim, options.device)
    for do in (bare, retrieval_ranks):
        do(queries[:2000], gallery[:2000])  # libraries loaded, kernels chosen
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _resident("VmRSS")
    theirs, ours = [], []
    for _ in range(options.repeats if size <= 30_000 else 1):
        # half of the peer on either side, so that a processor that slows down in between slows both
        half = len(queries) // 2
        first = seconds(lambda: bare(queries[:half], gallery), cuda)  # noqa: B023
        ours.append(seconds(lambda: retrieval_ranks(queries, gallery), cuda))
        theirs.append(first + seconds(lambda: bare(queries[half:], gallery), cuda))  # noqa: B023
    peak = torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")
    row = {"kind": kind, "size": size, "ours_seconds": min(ours), "products_seconds": min(theirs)}
    return row | {"ratio": min(ours) / min(theirs), "mib": (peak - before) / MIB}


def seconds(do: Callable[[], object], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    do()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _resident(field: str) -> int:
    """Bytes, from the kernel's account of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _child(answer: Connection, *arguments) -> None:
    answer.send(measure(*arguments))


def apart(*arguments) -> dict[str, float | int | str]:
    """`measure` in a process of its own, whose memory is given back whole."""
    from benchmarks import ranks  # under this name the new process finds it, too

    context = multiprocessing.get_context("spawn")
    receiver, answer = context.Pipe(duplex=False)
    process = context.Process(target=ranks._child, args=(answer, *arguments))
    process.start()
    answer.close()
    found = receiver.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--kinds", nargs="+", default=["trained"], choices=["trained", "random", "collapsed"])
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--repeats", type=int, default=3, help="up to 30,000 queries; beyond, one")
    options = parser.parse_args()
    name = chip(torch.device(options.device))
    table = Table("embeddings", "size", "ours s", "products s", "ratio", "extra MiB", title=f"exact ranks on {name}")
    rows = []
    for kind in options.kinds:
        for size in options.sizes:
            row = apart(kind, size, options)
            rows.append(row)
            figures = (f"{row[n]:,.2f}" for n in ("ours_seconds", "products_seconds", "ratio"))
            table.add_row(kind, f"{size:,}", *figures, f"{row['mib']:,.0f}")
            print(row, flush=True)
    Console().print(table)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"ranks_{options.device.partition(':')[0]}.json"
    result = {"chip": name, "date": str(date.today()), "torch": torch.__version__, "dim": options.dim, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
