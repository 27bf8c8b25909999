"""How signals and clocks ask a run to save and to stop; and the lock that keeps a second run out of its folder."""

import fcntl
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from pe_av.config import ConfigError
from pe_av.ranks import of_rank_0, rank

# USR1 is for schedulers: torchrun does not react to it, whereas 30 s after TERM it kills its ranks in mid-write
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
TIME_IS_UP = 1000  # stands for the time limit where the numbers of signals stand
TIMEOUT_EXIT_CODE = 124  # as the `timeout` command has it


class Stopped(Exception):
    """The run was stopped by a signal or by its time limit, after saving its state."""

    def __init__(self, number: int, folder: Path):
        by = "max_minutes" if number == TIME_IS_UP else signal.Signals(number).name
        super().__init__(f"stopped by {by}; go on with hydra.run.dir={folder} resume=auto")
        # what shells and schedulers expect of a process that a signal ended
        self.exit_code = TIMEOUT_EXIT_CODE if number == TIME_IS_UP else 128 + number


class Requests:
    """Requests to save and to stop. Each rank has its own signals and clocks; with every batch the ranks agree."""

    def __init__(self, max_minutes: float | None, save_minutes: float | None, console: Console):
        self.max_minutes, self.save_minutes, self.console = max_minutes, save_minutes, console
        self.started = self.saved = time.monotonic()
        self.signal = 0  # the last one that this rank received
        self.stop = 0  # agreed by all ranks: the number of a signal, or TIME_IS_UP; 0: none
        self.save = False  # agreed by all ranks

    def own(self) -> tuple[int, bool]:
        """What this rank has been asked: to stop (a number as in `stop`), and to save."""
        now = time.monotonic()
        time_is_up = self.max_minutes is not None and now - self.started > 60 * self.max_minutes
        save_is_due = self.save_minutes is not None and now - self.saved > 60 * self.save_minutes
        return self.signal or TIME_IS_UP * time_is_up, save_is_due

    def agree(self, everyone: Sequence[tuple[int, bool]]) -> None:
        """Take in what `own` gave on every rank: any rank can stop the run, and rank 0's clock decides on saving."""
        self.stop = max(self.stop, *(stop for stop, _ in everyone))
        self.save |= everyone[0][1]

    def note_save(self) -> None:
        """A state has been saved: the next one is due `save_minutes` from now."""
        self.saved, self.save = time.monotonic(), False

    @contextmanager
    def from_signals(self) -> Iterator[None]:
        """Inside, signals are requests to stop. A second SIGINT raises KeyboardInterrupt."""
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number
        self.console.print(f"\n{signal.Signals(number).name}: saving after this step")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other run can train in `folder`. The system gives the lock back however this process ends.

    Raises:
        ConfigError: another run trains there.
    """
    descriptor, problem = os.open(folder, os.O_RDONLY), None
    try:
        if rank() == 0:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problem = f"{folder}: another process trains there; wait for it, or use another hydra.run.dir"
            except OSError:
                pass  # the file system has no locks
        if problem := of_rank_0(problem):
            raise ConfigError(problem)
        yield
    finally:
        os.close(descriptor)
