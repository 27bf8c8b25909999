"""Steps that were skipped because their loss or gradient was not finite: listed, and too many in a row end the run."""

import json
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from pe_av.config import ConfigError
from pe_av.ranks import of_all_ranks, rank

MOST_SKIPPED = 10  # in a row, before a run gives up


class SkippedSteps:
    """Finds out which steps were skipped, each one step late: by then the device has finished it while it computes the
    next, and reading its result makes nobody wait."""

    def __init__(self, folder: Path, console: Console):
        self.folder, self.console = folder, console
        self.in_a_row = 0
        # step, its figures on their way to the host, the event of their arrival, ids
        self._unread: tuple[int, Tensor, torch.cuda.Event | None, list[str]] | None = None

    def add(self, step: int, row: dict[str, Tensor], skip: Tensor, ids: list[str]) -> None:
        """Note a step, and read the one before it.

        Args:
            row: "loss" and "gradient_norm" of the step. skip: whether it was skipped; still on the device.
            ids: of this rank's clips in it.
        Raises:
            ConfigError: see `read`.
        """
        # Copied now: `item()` on the device one step later would wait for all that has been launched by then.
        values = torch.stack([value.float() for value in (skip, row["loss"], row["gradient_norm"])])
        copied, arrived = values.to("cpu", non_blocking=True), None
        if values.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self.read()
        self._unread = step, copied, arrived, ids

    def read(self) -> None:
        """Look at the step that was noted last. Every rank comes to the same result at the same time.

        Raises:
            ConfigError: it is the tenth in a row that was skipped.
        """
        if self._unread is None:
            return
        (step, values, arrived, ids), self._unread = self._unread, None
        if arrived is not None:
            arrived.synchronize()
        skip, loss, norm = values.tolist()
        if not skip:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        everyone = sum(of_all_ranks(ids), [])
        path = self.folder / "skipped.jsonl"
        if rank() == 0:
            with path.open("a", encoding="utf-8") as file:
                line = {"step": step, "loss": str(loss), "gradient_norm": str(norm), "ids": everyone}
                file.write(json.dumps(line) + "\n")
        self.console.print(
            f"skipped step {step}: loss {loss}, gradient norm {norm}; clips in skipped.jsonl", soft_wrap=True
        )
        if self.in_a_row >= MOST_SKIPPED:
            raise ConfigError(
                f"{MOST_SKIPPED} steps in a row had no finite loss and gradient (their clips are in {path}): resume "
                f"with a lower optim.lr; the last good state is in {self.folder / 'state'}"
            )
