"""From nothing to a model: importing the package, and loading a checkpoint, beside transformers and reading the file.

    python -m benchmarks startup [--preset large] [--folder where two checkpoints fit]

Every measurement is a new process; the three alternate. Before each, its file is read, so that it is in the page cache.
`load` includes the construction of the model. What is mapped into memory is read only when it is used, so the second
row also reads every weight once, in both.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.peer import apart, checkpoints, load_theirs, ratio_row, report, touch
from pe_av import load_model

CPU = torch.device("cpu")
PIECE = 2**24  # bytes read at a time


def imports(repeats: int) -> dict:
    """Seconds of a new process that imports the package, beyond those of one that imports torch alone."""
    commands = {
        "torch": "import torch",
        "ours": "import pe_av",
        "theirs": "from transformers import PeAudioVideoModel",
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, code in commands.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times[name].append(time.perf_counter() - started)
    alone = statistics.median(times["torch"])
    print(f"import torch {alone:.2f} s")
    ours, theirs = ([max(seconds - alone, 1e-3) for seconds in times[name]] for name in ("ours", "theirs"))
    return ratio_row("import, beyond torch", ours, theirs)


def read(path: Path) -> float:
    """Seconds to read the bytes of a file once, into a buffer that is used again."""
    buffer, started = bytearray(PIECE), time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - started


def load(ours: bool, folder: str) -> tuple[float, float]:
    """Seconds until the model is there, and until every weight of it has been read too. In a process of its own."""
    if not ours:
        import transformers  # noqa: F401  # importing is measured elsewhere
        from transformers import PeAudioVideoModel  # noqa: F401
    started = time.perf_counter()
    model = load_model(folder) if ours else load_theirs(folder)
    loaded = time.perf_counter() - started
    touch(model)
    return loaded, time.perf_counter() - started


def loads(preset: str, repeats: int) -> list[dict]:
    reads, ours, theirs = [], [], []
    with checkpoints(preset) as folders:
        files = [Path(folder) / "model.safetensors" for folder in folders]
        size = files[0].stat().st_size / 1e9
        for _ in range(repeats):
            for folder, file, found in zip(folders, files, (ours, theirs), strict=True):
                read(file)
                if found is ours:
                    reads.append(read(file))
                found.append(apart(load, found is ours, folder))
    rows = []
    for index, name in enumerate((f"load, {size:.1f} GB", f"load and read all, {size:.1f} GB")):
        row = ratio_row(name, [pair[index] for pair in ours], [pair[index] for pair in theirs])
        reading = statistics.median(reads)
        rows.append(row | {"reading_the_file_seconds": reading, "per_reading": row["ours_seconds"] / reading})
        print(f"{name}: {rows[-1]['per_reading']:.2f} times the {reading:.2f} s of reading the file")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="large")
    parser.add_argument("--folder", help="where two checkpoints fit; default: the system's temporary folder")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.folder:
        os.environ["TMPDIR"] = options.folder
    report("startup", [imports(options.repeats)], {}, CPU)
    report("startup", loads(options.preset, options.repeats), {"preset": options.preset}, CPU)


if __name__ == "__main__":
    main()
