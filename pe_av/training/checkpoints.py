"""The state of a run, to go on from exactly: model, optimizer, schedule, data position and random numbers.

Written by torch.distributed.checkpoint, every rank its shard, in the background; a checkpoint gets its name
`step-000100` when every file is on the disk and its checksums stand beside them, so one that has the name is whole. It
can be read on another number of ranks.
"""

import hashlib
import json
import os
import random
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from ..checkpoint import CheckpointError
from .optim import AveragedWeights
from .parallel import rank, world_size

CHECKSUMS = "checksums.json"
# one process needs no group, which it would be reminded of at every checkpoint
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Checkpointer:
    """The checkpoints of one run, in `folder/step-*`.

    Args:
        keep: the newest this many stay.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._pending: tuple[Future, Path, Path] | None = None
        # gathering what to write is collective, and must not meet the training's own messages
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for torn in folder.glob("*.part"):
                shutil.rmtree(torn)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        average: AveragedWeights | None,
        progress: dict[str, Any],
    ) -> None:
        """Copy the state to memory and write it in the background; the run goes on meanwhile.

        Args:
            progress: of this rank, as JSON can hold it: whatever else the run must know to go on.
        """
        self.wait()
        unfinished = self.folder / f"step-{step:08d}.part"
        unfinished.mkdir(parents=True, exist_ok=True)
        (unfinished / f"rank-{rank()}.json").write_text(json.dumps(progress | {"random": random_state()}))
        state = _state(model, optimizer, average)
        writer = dcp.FileSystemWriter(unfinished)
        future = dcp.async_save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        self._pending = (future, unfinished, self.folder / f"step-{step:08d}")

    def wait(self) -> None:
        """Until what was saved last is whole on the disk, under its name."""
        if self._pending is None:
            return
        future, unfinished, final = self._pending
        self._pending = None
        try:
            future.result()
        except CheckpointException as error:  # no Exception, and a page of tracebacks
            first, _ = next(iter(error.failures.values()))
            free = shutil.disk_usage(self.folder).free / 1e9
            raise CheckpointError(
                f"{unfinished}: cannot be written, with {free:.1f} GB left on the disk ({first}); the older states are "
                "whole: make room, and go on with resume=auto"
            ) from error
        if self._group is not None:
            dist.barrier(self._group)
        if rank() == 0:
            sums = {path.name: _checksum(path) for path in sorted(unfinished.iterdir())}
            (unfinished / CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
            for path in unfinished.iterdir():
                _to_disk(path)
            if final.exists():  # saved at the same step before
                shutil.rmtree(final)
            unfinished.rename(final)
            _to_disk(self.folder)
            for old in whole_checkpoints(self.folder, verify=False)[: -self.keep]:
                shutil.rmtree(old)
        if self._group is not None:
            dist.barrier(self._group)


def check_space(
    folder: Path, keep: int, model: nn.Module, optimizer: Optimizer, average: AveragedWeights | None
) -> None:
    """Refuse a run whose checkpoints the disk has no room for.

    Raises:
        CheckpointError: it says how much there is and how much there must be.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = sum(2 * p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
    averages = 0 if average is None else sum(a.numel() * a.element_size() for a in average.average.values())
    there = len(whole_checkpoints(folder / "state", verify=False))
    # a new state is whole before the oldest goes, and so is the model that is handed on
    needed = max(keep + 1 - there, 1) * (weights + moments + averages) + 2 * weights
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: the disk has {free / 1e9:.1f} GB left and the checkpoints need {needed / 1e9:.1f}: make room, "
            f"use another hydra.run.dir, or keep fewer than keep_checkpoints={keep}"
        )


def load(path: Path, model: nn.Module, optimizer: Optimizer, average: AveragedWeights | None) -> dict[str, Any]:
    """Put the state of the checkpoint `path` into model, optimizer and average.

    Returns:
        this rank's `progress`; on another number of ranks rank 0's, and the random numbers start anew.
    Raises:
        CheckpointError: a damaged checkpoint, or one of another model.
    """
    reason = damage(path)
    if reason:
        raise CheckpointError(f"{path}: {reason}; resume from an older one")
    state = _state(model, optimizer, average)
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    for name, tensor in state["model"].items():
        shape = getattr(stored.get(f"model.{name}"), "size", None)
        if shape != tensor.shape:
            found = "nothing" if shape is None else tuple(shape)
            raise CheckpointError(
                f"{path}: is of another model: {name} is {tuple(tensor.shape)} here and {found} there; "
                "resume with the config that it was made with"
            )
    dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=world_size() == 1)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    same_ranks = len(list(path.glob("rank-*.json"))) == world_size()
    progress = json.loads((path / f"rank-{rank() if same_ranks else 0}.json").read_text())
    if same_ranks:
        set_random_state(progress["random"])
    return progress


def _state(model: nn.Module, optimizer: Optimizer, average: AveragedWeights | None) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments} | ({} if average is None else {"average": average.average})


def whole_checkpoints(folder: Path, verify: bool = True) -> list[Path]:
    """The checkpoints in `folder`, oldest first; with `verify` only those whose checksums are right."""
    found = sorted(path for path in folder.glob("step-*") if path.suffix != ".part")
    return [path for path in found if not verify or not damage(path)]


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not (path / CHECKSUMS).is_file():
        return f"no {CHECKSUMS} there, so this is no checkpoint of a run"
    sums = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
    for name, expected in sums.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _checksum(path / name) != expected:
            return f"{name} is damaged: its checksum is not the recorded one"
    return None


def random_state() -> dict[str, Any]:
    """Of this process: Python's and PyTorch's random numbers, as JSON can hold them."""
    state = {"torch": torch.get_rng_state().numpy().tobytes().hex(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(_bytes(state["torch"]))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(digits: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(digits), dtype=torch.uint8)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
