"""Where the time and the memory of a run's steps go: a trace that browsers show (chrome://tracing, ui.perfetto.dev)."""

from pathlib import Path

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile, schedule

FIRST, LAST = 10, 13  # steps of this process that are traced: the first ones are slower than what follows


class Profile:
    """Traces steps 10 to 13 of this process into `folder/trace.json`, and a GPU's memory into `folder/memory.pickle`
    (pytorch.org/memory_viz)."""

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.taken = folder, 0
        self.cuda = device.type == "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
        steps = schedule(wait=FIRST - 2, warmup=1, active=LAST - FIRST + 1, repeat=1)
        self.profiler = profile(activities=activities, schedule=steps, on_trace_ready=self._write, record_shapes=True)
        self.profiler.start()

    def step(self) -> None:
        """After every step of the run."""
        self.taken += 1
        if self.cuda and self.taken == FIRST - 1:
            torch.cuda.memory._record_memory_history()
        if self.taken <= LAST:
            self.profiler.step()
        if self.taken == LAST:
            self.profiler.stop()

    def close(self, console: Console) -> None:
        """At the end of the run; says so if it came before the trace."""
        if self.taken < LAST:
            self.profiler.stop()
            console.print(f"no profile: it needs {LAST} steps in one go, and there were {self.taken}")

    def _write(self, trace: profile) -> None:
        trace.export_chrome_trace(str(self.folder / "trace.json"))
        if self.cuda:
            torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
