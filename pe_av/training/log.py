"""What a run tells of itself as it goes on: the history, `history.jsonl`, TensorBoard, Weights & Biases, one line."""

import json
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from pe_av.config import ConfigError
from pe_av.ranks import rank, world_size

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}  # bf16 per second, dense, by name


class Log:
    """The rows of a run, one per `log_every` steps. Every rank has them; that of rank 0 writes."""

    def __init__(self, folder: Path, step: int, wandb_project: str | None, settings: dict[str, Any]):
        """
        Args:
            step: that the run goes on from: what was logged after it is forgotten.
            settings: of the run, for Weights & Biases.
        """
        self.path = folder / "history.jsonl"
        self.rows = _rows_until(step, self.path)
        self._board = self._wandb = None
        if rank() == 0:
            if self.path.is_file():
                self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
            # what was shown of later steps, before a kill, is taken back
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
            if wandb_project is not None:
                self._wandb = _start_wandb(wandb_project, folder, settings)

    def add(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """One more row, which is returned."""
        row = {"step": step, **values}
        self.rows.append(row)
        if rank() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.show(step, values)
        return row

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """On the boards alone."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)


class Window:
    """The steps since the last row: means of what they gave, and where their time went."""

    def __init__(self):
        self.rows: list[dict[str, Tensor]] = []
        self.clips, self.waited = 0, 0.0
        self.started = time.perf_counter()

    def timed(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """The next batch; the time until it is there counts as waiting."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        return batch

    def add(self, row: dict[str, Tensor], clips: int) -> None:
        self.rows.append(row)
        self.clips += clips

    def restart(self) -> None:
        """Measure the speed from here on: an evaluation is not the steps' time."""
        self.clips, self.waited, self.started = 0, 0.0, time.perf_counter()

    def means(self) -> dict[str, float]:
        """Of every figure over the steps that have it; what none has is not there. The only copy to the host."""
        keys = dict.fromkeys(key for row in self.rows for key in row)
        means = [torch.stack([row[key] for row in self.rows if key in row]).float().mean() for key in keys]
        return dict(zip(keys, torch.stack(means).tolist(), strict=True))

    def speed(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.started
        return {"clips_per_second": self.clips / seconds, "data_wait": self.waited / seconds}


def learned(logits: nn.Module) -> dict[str, float]:
    """Every scale and bias of the logits, by pairing where there are several."""
    found = {name.replace(".", "_"): value for name, value in logits.named_parameters()}
    return dict(zip(found, torch.cat([value.detach().flatten() for value in found.values()]).tolist(), strict=True))


def machine_use(device: torch.device, clip_flops: float, clips_per_second: float) -> dict[str, float]:
    """The most memory so far in GB and, on GPUs of which it is known, the share of the peak in bf16.

    Args:
        clip_flops: of one clip in one step, as they were computed: recomputation counts.
        clips_per_second: of all ranks.
    """
    if device.type != "cuda":
        return {"memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}
    used = {"memory_gb": torch.cuda.max_memory_allocated() / 1e9}
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()), None)
    return used if peak is None else used | {"flop_utilization": clip_flops * clips_per_second / world_size() / peak}


def _rows_until(step: int, path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    # a kill may have torn the last line
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return [row for row in rows if row["step"] <= step]


def _start_wandb(project: str, folder: Path, settings: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError(f"wandb_project={project} needs Weights & Biases: pip install wandb, or unset it") from None
    noted = folder / "wandb_id.txt"  # by which a run that goes on is the same run there
    if not noted.is_file():
        noted.write_text(wandb.util.generate_id(), encoding="utf-8")
    name = noted.read_text(encoding="utf-8").strip()
    return wandb.init(project=project, dir=str(folder), name=folder.name, id=name, resume="allow", config=settings)
