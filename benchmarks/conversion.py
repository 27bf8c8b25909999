"""What converting a checkpoint costs: its peak memory beside the size of the file, and its time beside a plain copy.

    python benchmarks/conversion.py [preset=large] [folder=where 40 GB are free]

Appends one JSON line to benchmarks/results/conversion.jsonl for each direction. The peak is VmHWM of a process that
does nothing else, and so counts the mapped pages of the source too. Times are until the data are on the disk.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, installed or not

from pe_av import build_model, save_model  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "conversion.jsonl"
WEIGHTS = "model.safetensors"

# in a process of its own: seconds, and peak and idle memory in kB
CONVERT = """
import os, sys, time
from pe_av.conversion.write_checkpoint import convert

def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

idle, started = memory("VmRSS"), time.perf_counter()
convert(sys.argv[1], sys.argv[2], sys.argv[3])
os.sync()
print(time.perf_counter() - started, memory("VmHWM"), idle)
"""


def copy_seconds(source: Path, target: Path) -> float:
    started = time.perf_counter()
    shutil.copyfile(source, target)
    os.sync()
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def measure(source: Path, target: Path, to: str, preset: str) -> dict[str, object]:
    """Copy, conversion and copy again, since the first of them also reads the file from the disk."""
    size = (source / WEIGHTS).stat().st_size
    os.sync()
    copies = [copy_seconds(source / WEIGHTS, target.with_suffix(".copy"))]
    command = [sys.executable, "-c", CONVERT, str(source), str(target), to]
    here = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=here)
    seconds, peak, idle = (float(number) for number in done.stdout.split())
    copies.append(copy_seconds(source / WEIGHTS, target.with_suffix(".copy")))
    return {
        "preset": preset,
        "to": to,
        "file_bytes": size,
        "peak_bytes": int(peak * 1024),
        "idle_bytes": int(idle * 1024),
        "peak_per_file": round(peak * 1024 / size, 3),
        "seconds": round(seconds, 1),
        "copy_seconds": [round(copy, 1) for copy in copies],
        "seconds_per_copy": round(seconds / min(copies), 2),
    }


def main() -> None:
    if bad := [argument for argument in sys.argv[1:] if "=" not in argument]:
        sys.exit(f"usage: python -m benchmarks conversion [preset=large] [folder=/tmp], not {bad[0]}")
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    preset, where = options.pop("preset", "large"), options.pop("folder", None)
    if options:
        sys.exit(f"error: unknown {', '.join(options)}; known are preset and folder")
    with tempfile.TemporaryDirectory(dir=where) as folder:
        native, hf, back = (Path(folder) / name for name in ("native", "hf", "back"))
        model = build_model(preset)
        save_model(model, native)
        del model
        for source, target, to in ((native, hf, "hf"), (hf, back, "native")):
            result = measure(source, target, to, preset)
            shutil.rmtree(source)
            result |= {"cpus": os.cpu_count(), "python": platform.python_version()}
            result["time"] = datetime.now(UTC).isoformat(timespec="seconds")
            print(json.dumps(result), flush=True)
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
