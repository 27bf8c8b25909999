"""Timings, each as a ratio to a named peer measured in the same run: `python -m benchmarks SUBJECT [options]`."""

import importlib
import sys
from pathlib import Path

SUBJECTS = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem not in ("peer",))

if len(sys.argv) < 2 or sys.argv[1] not in SUBJECTS:
    sys.exit(f"usage: python -m benchmarks {{{', '.join(SUBJECTS)}}} [--help]")
importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])
