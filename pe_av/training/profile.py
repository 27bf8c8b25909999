"""Where the time and the memory of the steps go: a trace, a memory snapshot, and a count of operations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils.flop_counter import FlopCounterMode

FIRST, LAST = 10, 13  # the steps of this process that are traced: the first ones are slower than all that follow


@contextmanager
def profiled(folder: Path | None, device: torch.device, console: Console) -> Iterator[Callable[[], None]]:
    """Gives a function to call after every step. Steps 10 to 13 of this process are traced into `folder/trace.json`
    (for chrome://tracing and ui.perfetto.dev), and a GPU's memory in them into `folder/memory.pickle` (for
    pytorch.org/memory_viz). Without a folder, nothing is traced.
    """
    if folder is None:
        yield lambda: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    on_gpu, taken = device.type == "cuda", 0

    def write(trace: profile) -> None:
        trace.export_chrome_trace(str(folder / "trace.json"))
        if on_gpu:
            torch.cuda.memory._dump_snapshot(str(folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    profiler = profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu,
        schedule=schedule(wait=FIRST - 2, warmup=1, active=LAST - FIRST + 1, repeat=1),
        on_trace_ready=write,
        record_shapes=True,
    )

    def count_step() -> None:
        nonlocal taken
        taken += 1
        if on_gpu and taken == FIRST - 1:
            torch.cuda.memory._record_memory_history()
        if taken <= LAST:
            profiler.step()
        if taken == LAST:
            profiler.stop()

    profiler.start()
    try:
        yield count_step
    finally:
        if taken < LAST:
            profiler.stop()
            console.print(f"no profile: it needs {LAST} steps in one go, and there were {taken}")


@contextmanager
def count_flops(compiled: bool) -> Iterator[FlopCounterMode]:
    """Count the operations of what is computed inside. Compiled blocks run uncompiled there, or nothing would be seen.

    Args:
        compiled: whether there are compiled blocks; if not, the compiler, which takes seconds to import, is not needed.
    """
    stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with stance, FlopCounterMode(display=False) as counter:
        yield counter
