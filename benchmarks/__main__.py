"""Timings, each as a ratio to a named peer measured in the same run: `python -m benchmarks SUBJECT [options]`."""

import importlib
import sys
from pathlib import Path

SHARED = ("growing", "peer")  # what the subjects share
SUBJECTS = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem not in SHARED)

if len(sys.argv) < 2 or sys.argv[1] not in SUBJECTS:
    sys.exit(f"usage: python -m benchmarks {{{', '.join(SUBJECTS)}}} [options; --help shows them]")
sys.argv = sys.argv[1:]
importlib.import_module(f"benchmarks.{sys.argv[0]}").main()
