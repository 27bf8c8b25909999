"""Timings, each as a ratio to a named peer measured in the same run: `python -m benchmarks SUBJECT [options]`."""

import runpy
import sys
from pathlib import Path

SUBJECTS = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem != "peer")

if len(sys.argv) < 2 or sys.argv[1] not in SUBJECTS:
    sys.exit(f"usage: python -m benchmarks {{{', '.join(SUBJECTS)}}} [options; --help shows them]")
sys.argv = sys.argv[1:]
runpy.run_module(f"benchmarks.{sys.argv[0]}", run_name="__main__")
