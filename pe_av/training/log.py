"""What a run reports as it goes on: the history, `history.jsonl`, TensorBoard, Weights & Biases, and the terminal."""

import json
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from pe_av.config import ConfigError
from pe_av.ranks import rank, world_size

# bf16 operations per second without sparsity, by a part of the GPU's name
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


class Log:
    """The history of a run, a row for every `log_every` steps. Every rank has it; only rank 0's writes."""

    def __init__(self, folder: Path, step: int, wandb_project: str | None, settings: dict[str, Any]):
        """
        Args:
            step: the step that the run goes on from. Later rows, from before an interruption, are removed.
            settings: of the run, shown at Weights & Biases.
        """
        self.path = folder / "history.jsonl"
        self.rows = _rows_until(step, self.path)
        self._board = self._wandb = None
        if rank() == 0:
            if self.path.is_file():
                self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
            if wandb_project is not None:
                self._wandb = _start_wandb(wandb_project, folder, settings)

    def add(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Append a row to the history, show it on the boards, and return it."""
        row = {"step": step, **values}
        self.rows.append(row)
        if rank() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.show(step, values)
        return row

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show values on the boards, without a row in the history."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)


class Window:
    """The steps since the last row of the history: their values, and where their time went."""

    def __init__(self):
        self.rows: list[dict[str, Tensor]] = []
        self.restart()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time spent inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def add(self, row: dict[str, Tensor], clips: int) -> None:
        """One more step, over `clips` clips of all ranks."""
        self.rows.append(row)
        self.clips += clips

    def restart(self) -> None:
        """Measure the speed from here on, so that an evaluation does not count as time of the steps."""
        self.clips, self.waited, self.started = 0, 0.0, time.perf_counter()

    def means(self) -> dict[str, float]:
        """The mean of every value over the steps that have it. The only copy of values to the host."""
        means = mean_of_each(self.rows)
        return dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))

    def speed(self) -> dict[str, float]:
        """Clips per second of all ranks, and the share of the time that this rank waited for data."""
        seconds = time.perf_counter() - self.started
        return {"clips_per_second": self.clips / seconds, "data_wait": self.waited / seconds}


def mean_of_each(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """For every name, the mean over the rows that have it: scalars, which stay on the device."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: torch.stack([row[name] for row in rows if name in row]).float().mean() for name in names}


@contextmanager
def progress_bar(console: Console, step: int, steps: int) -> Iterator[Callable[[int, str], None]]:
    """Gives a function of (steps taken, line): on a terminal it moves a bar, elsewhere it prints the line."""
    columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[line]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("training", total=steps, completed=step, line="")

        def show(step: int, line: str) -> None:
            progress.update(bar, completed=step, line=line)
            if not console.is_terminal:
                console.print(f"step {step}/{steps}  {line}", soft_wrap=True)

        yield show


def scales_and_biases(logits: nn.Module) -> dict[str, float]:
    """Every learned scale and bias, with the pairing's name in front where there are several pairings."""
    named = {name.replace(".", "_"): parameter.detach() for name, parameter in logits.named_parameters()}
    values = torch.cat([value.flatten() for value in named.values()]).tolist()
    return dict(zip(named, values, strict=True))


def machine_use(device: torch.device, clip_flops: float, clips_per_second: float) -> dict[str, float]:
    """The peak of memory so far in GB and, on GPUs whose peak speed is known, the share of it that is used.

    Args:
        clip_flops: operations for one clip in one step, as they were computed: recomputation counts.
        clips_per_second: of all ranks.
    """
    if device.type != "cuda":
        return {"memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}
    use = {"memory_gb": torch.cuda.max_memory_allocated() / 1e9}
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()), None)
    return use if peak is None else use | {"flop_utilization": clip_flops * clips_per_second / world_size() / peak}


def _rows_until(step: int, path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    # the last line may be torn if the run was killed
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return [row for row in rows if row["step"] <= step]


def _start_wandb(project: str, folder: Path, settings: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError(f"wandb_project={project} needs Weights & Biases: pip install wandb, or unset it") from None
    id_file = folder / "wandb_id.txt"  # makes a resumed run the same run there
    if not id_file.is_file():
        id_file.write_text(wandb.util.generate_id(), encoding="utf-8")
    run_id = id_file.read_text(encoding="utf-8").strip()
    return wandb.init(project=project, dir=str(folder), name=folder.name, id=run_id, resume="allow", config=settings)
