"""The state of a run, to go on from exactly: weights, moments, average, data position and random numbers.

Written by torch.distributed.checkpoint, every rank its shards, in the background, where every rank also takes the
checksums of its own files. A state gets its name `step-00000100` when all of that is on the disk, so one that has the
name is whole, and is found by the next `resume=auto` at once. It can be read on another number of ranks. Learning rate,
decay and the like are no part of it: they are settings, and those of the run that goes on hold.
"""

import hashlib
import json
import os
import random
import re
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.optim import Optimizer

from pe_av.checkpoint import CheckpointError
from pe_av.ranks import rank, world_size
from pe_av.training.optim import AveragedWeights

CHECKSUMS = "checksums.json"
# one process needs no group, which it would be reminded of at every checkpoint
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Checkpointer:
    """The states of one run, in `folder/step-*`.

    Args:
        keep: the newest this many stay.
        milestone_every: states of steps that are a multiple of this stay, too.
        timeout_minutes: a rank that the others wait for longer than this, in writing, is lost.
    """

    def __init__(self, folder: Path, keep: int, milestone_every: int | None = None, timeout_minutes: float = 10.0):
        self.folder, self.keep, self.milestone_every = folder, keep, milestone_every
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        # writing is collective, and must not meet the training's own messages
        timeout = timedelta(minutes=timeout_minutes)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world_size() > 1 else None
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, step: int) -> list[Path]:
        """Remove what an earlier process left half written, and set aside the states after `step`, from which this run
        goes on: they are damaged, or of a course that it leaves. Else they would be the newest.

        Returns:
            what was set aside, under its new name.
        """
        aside = []
        if rank() == 0:
            for torn in self.folder.glob("*.part"):
                shutil.rmtree(torn)
            for later in named_states(self.folder):
                if _step_of(later) > step:
                    place = later.with_suffix(".abandoned")
                    if place.exists():
                        shutil.rmtree(place)
                    aside.append(later.rename(place))
        if self._group is not None:
            dist.barrier(self._group)
        return aside

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
        Raises:
            CheckpointError: the state before this one could not be written.
        """
        self.wait()
        copied = BlockingAsyncStager().stage(_state(model, optimizer, average))
        progress = json.dumps(progress | {"random": random_state()})
        self._pending = self._writer.submit(self._write, step, copied, progress)

    def problem(self) -> str | None:
        """Why the last state could not be written, as far as is known by now."""
        if self._pending is not None and self._pending.done() and self._pending.exception() is not None:
            return str(self._pending.exception())
        return None

    def wait(self) -> None:
        """Until what was saved last is whole on the disk, under its name.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, step: int, copied: dict[str, Any], progress: str) -> None:
        final = self.folder / f"step-{step:08d}"
        unfinished = self.folder / f"{final.name}.part"
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            _write_text(unfinished / f"rank-{rank()}.json", progress)
            failed = None
        except OSError as error:
            failed = error
        if any(self._of_all(failed is not None)):
            raise self._cannot_write(unfinished, failed or "on another rank")
        writer = dcp.FileSystemWriter(unfinished)
        try:
            dcp.save(copied, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        except CheckpointException as error:  # no Exception, and a page of tracebacks
            first, _ = next(iter(error.failures.values()))
            raise self._cannot_write(unfinished, first) from error
        mine = [unfinished / f"rank-{rank()}.json", *unfinished.glob(f"__{rank()}_*")]
        if rank() == 0:
            mine.append(unfinished / ".metadata")
        sums = {path.name: _checksum(path) for path in sorted(mine)}
        everyone = self._of_all(sums)
        if rank() == 0:
            whole = {name: checksum for part in everyone for name, checksum in part.items()}
            try:
                _write_text(unfinished / CHECKSUMS, json.dumps(whole, indent=1))
                if final.exists():  # saved at the same step before
                    shutil.rmtree(final)
                unfinished.rename(final)
                _to_disk(self.folder)
                self._remove_old()
            except OSError as error:
                failed = error
        failed = next((theirs for theirs in self._of_all(None if failed is None else str(failed)) if theirs), None)
        if failed is not None:
            raise self._cannot_write(unfinished, failed)

    def _remove_old(self) -> None:
        for old in named_states(self.folder)[: -self.keep]:
            if self.milestone_every is None or _step_of(old) % self.milestone_every:
                # renamed first: a kill on the way leaves nothing that looks like a state
                torn = old.rename(old.with_suffix(".part"))
                shutil.rmtree(torn)

    def _of_all(self, value: Any) -> list[Any]:
        found = [value]
        if self._group is not None:
            found = [None] * world_size()
            dist.all_gather_object(found, value, group=self._group)
        return found

    def _cannot_write(self, path: Path, reason: object) -> CheckpointError:
        free = shutil.disk_usage(self.folder).free / 1e9
        return CheckpointError(
            f"{path}: cannot be written, with {free:.1f} GB left on the disk ({reason}); the older states are whole: "
            "make room, and go on with resume=auto"
        )


def check_space(
    folder: Path, keep: int, models: int, model: nn.Module, optimizer: Optimizer, average: AveragedWeights | None
) -> None:
    """Refuse a run whose checkpoints the disk has no room for.

    Args:
        keep: states that stay.
        models: copies of the model that are handed on.
    Raises:
        CheckpointError: it says how much there is and how much there must be.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = sum(2 * p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
    averages = 0 if average is None else sum(a.numel() * a.element_size() for a in average.average.values())
    there = len(named_states(folder / "state"))
    # a new state is whole before the oldest goes, and so is a model that replaces another
    needed = max(keep + 1 - there, 1) * (weights + moments + averages) + (models + 1) * weights
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: the disk has {free / 1e9:.1f} GB left and the checkpoints need {needed / 1e9:.1f}: make room, "
            f"use another hydra.run.dir, or keep fewer than keep_checkpoints={keep}"
        )


def load(path: Path, model: nn.Module, optimizer: Optimizer, average: AveragedWeights | None) -> None:
    """Put the state `path` into model, optimizer and average, and its random numbers into this process if it was
    written by as many ranks.

    Raises:
        CheckpointError: a state of another model.
    """
    state = _state(model, optimizer, average)
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    for part, tensors in state.items():
        for name, tensor in tensors.items():
            found = stored.get(f"{part}.{name}")
            shape = getattr(found, "size", None)
            if shape != tensor.shape:
                there = "nothing" if shape is None else tuple(shape)
                raise CheckpointError(
                    f"{path}: is of another model: {part} of {name} is {tuple(tensor.shape)} here and {there} there; "
                    "resume with the config that it was made with"
                )
    # in place: what `_state` gives are the tensors of model, optimizer and average themselves
    dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=world_size() == 1)
    if ranks_of(path) == world_size():
        set_random_state(read_progress(path)["random"])


def read_progress(path: Path) -> dict[str, Any]:
    """This rank's `progress` in the state `path`; written by another number of ranks, that of rank 0."""
    same = ranks_of(path) == world_size()
    return json.loads((path / f"rank-{rank() if same else 0}.json").read_text(encoding="utf-8"))


def ranks_of(path: Path) -> int:
    """How many ranks wrote the state `path`."""
    return len(list(path.glob("rank-*.json")))


def _state(model: nn.Module, optimizer: Optimizer, average: AveragedWeights | None) -> dict[str, dict[str, Tensor]]:
    """Every tensor of the state by its name; under FSDP, shards."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {f"{names[p]}.{key}": value for p, values in optimizer.state.items() for key, value in values.items()}
    state = {"model": model.state_dict(), "optimizer": moments}
    return state | ({} if average is None else {"average": average.average})


def named_states(folder: Path) -> list[Path]:
    """The states in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def newest_whole(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest state in `folder` whose checksums are right, and those that are newer, each with what is wrong."""
    damaged = []
    for path in reversed(named_states(folder)):
        reason = damage(path)
        if reason is None:
            return path, damaged
        damaged.append((path, reason))
    return None, damaged


def damage(path: Path) -> str | None:
    """What is wrong with a state, or None."""
    if not (path / CHECKSUMS).is_file():
        hint = "; its states are in state/step-*" if (path / "state").is_dir() else ""
        return f"no {CHECKSUMS} there, so this is no checkpoint of a run{hint}"
    try:
        sums = dict(json.loads((path / CHECKSUMS).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return f"{CHECKSUMS} is damaged"
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


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _to_disk(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
