"""States, from which a run resumes exactly: weights, moments, average, position in the data, random numbers.

torch.distributed.checkpoint writes them in a background thread: every rank its shards, of which it then takes the
checksums. A state gets its name, `step-00000100`, only when all of it is on the disk, so a state that has its name is
complete, and `resume=auto` finds it. It can be loaded on another number of ranks. Learning rate, weight decay and the
like are not part of it: they are settings, and a resumed run uses its own.
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
# a single process needs no process group, but would be warned of that at every state
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class StateWriter:
    """Writes the states of one run, to `folder/step-*`, and removes old ones.

    Args:
        keep: how many of the newest states to keep.
        milestone_every: also keep the states of steps that are a multiple of this.
        timeout_minutes: how long a rank waits for the others while writing, before it gives them up as lost.
    """

    def __init__(self, folder: Path, keep: int, milestone_every: int | None = None, timeout_minutes: float = 10.0):
        self.folder, self.keep, self.milestone_every = folder, keep, milestone_every
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="states")
        self._pending: Future | None = None
        # a group of its own, so that the messages of writing and of training do not mix
        timeout = timedelta(minutes=timeout_minutes)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world_size() > 1 else None
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, step: int) -> list[Path]:
        """Tidy up before the first step: remove half-written states, and set aside those after `step`.

        Such later states are damaged, or from training that this run does not continue. Left in place, they would count
        as the newest, and this run's own would be removed first.

        Args:
            step: the step that the run goes on from.
        Returns:
            the new paths of the states that were set aside.
        """
        aside = []
        if rank() == 0:
            for unfinished in self.folder.glob("*.part"):
                shutil.rmtree(unfinished)
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
        """Copy the state in memory, and write the copy in the background while the run goes on.

        Args:
            progress: everything else that this rank needs to resume; JSON can hold it.
        Raises:
            CheckpointError: the state before this one could not be written.
        """
        self.wait()
        copied = BlockingAsyncStager().stage(_state(model, optimizer, average))
        progress = json.dumps(progress | {"random": random_state()})
        self._pending = self._writer.submit(self._write, step, copied, progress)

    def problem(self) -> str | None:
        """Why the last state could not be written; None if it was, or is still being written."""
        if self._pending is not None and self._pending.done() and self._pending.exception() is not None:
            return str(self._pending.exception())
        return None

    def wait(self) -> None:
        """Wait until the last state is complete on the disk.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, step: int, copied: dict[str, Any], progress: str) -> None:
        """Runs in the background thread of every rank: write the files, then their checksums, then give the name."""
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
        except CheckpointException as error:  # a BaseException, whose message is a page of tracebacks
            first, _ = next(iter(error.failures.values()))
            raise self._cannot_write(unfinished, first) from error
        files = [unfinished / f"rank-{rank()}.json", *unfinished.glob(f"__{rank()}_*")]
        if rank() == 0:
            files.append(unfinished / ".metadata")
        everyone = self._of_all({path.name: _checksum(path) for path in sorted(files)})
        if rank() == 0:
            checksums = {name: checksum for of_rank in everyone for name, checksum in of_rank.items()}
            try:
                _write_text(unfinished / CHECKSUMS, json.dumps(checksums, indent=1))
                if final.exists():  # an earlier state of the same step
                    shutil.rmtree(final)
                unfinished.rename(final)
                _flush_folder(self.folder)
                self._remove_old()
            except OSError as error:
                failed = error
        reason = next((reason for reason in self._of_all(failed and str(failed)) if reason), None)
        if reason is not None:
            raise self._cannot_write(unfinished, reason)

    def _remove_old(self) -> None:
        for old in named_states(self.folder)[: -self.keep]:
            if self.milestone_every is None or _step_of(old) % self.milestone_every:
                # renamed first, so that a kill while removing leaves nothing that looks like a state
                shutil.rmtree(old.rename(old.with_suffix(".part")))

    def _of_all(self, value: Any) -> list[Any]:
        """What every rank gives, on every rank."""
        values = [value]
        if self._group is not None:
            values = [None] * world_size()
            dist.all_gather_object(values, value, group=self._group)
        return values

    def _cannot_write(self, path: Path, reason: object) -> CheckpointError:
        free = shutil.disk_usage(self.folder).free / 1e9
        return CheckpointError(
            f"{path}: cannot be written, with {free:.1f} GB left on the disk ({reason}); the older states are intact: "
            "make room, and go on with resume=auto"
        )


def check_space(
    folder: Path, keep: int, models: int, model: nn.Module, optimizer: Optimizer, average: AveragedWeights | None
) -> None:
    """Refuse a run if the disk has no room for its states and checkpoints.

    Args:
        folder: of the run.
        keep: number of states that it keeps.
        models: number of checkpoints that it exports: 2 with `best/`, else 1.
    Raises:
        CheckpointError: the disk has too little room; says how much there is and how much is needed.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = sum(m.numel() * m.element_size() for each in optimizer.state.values() for m in each.values())
    averages = 0 if average is None else sum(a.numel() * a.element_size() for a in average.average.values())
    present = len(named_states(folder / "state"))
    # a new state is complete before the oldest is removed, and so is a checkpoint before the one that it replaces
    needed = max(keep + 1 - present, 1) * (weights + moments + averages) + (models + 1) * weights
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: the disk has {free / 1e9:.1f} GB left and the checkpoints need {needed / 1e9:.1f}: make room, "
            f"use another hydra.run.dir, or keep fewer than keep_checkpoints={keep}"
        )


def load(path: Path, model: nn.Module, optimizer: Optimizer, average: AveragedWeights | None) -> None:
    """Load the state `path` into model, optimizer and average; and its random numbers into this process, if as many
    ranks as now wrote it.

    Raises:
        CheckpointError: the state is of another model.
    """
    state = _state(model, optimizer, average)
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    for part, tensors in state.items():
        for name, tensor in tensors.items():
            shape = getattr(stored.get(f"{part}.{name}"), "size", None)
            if shape != tensor.shape:
                stored_shape = "nothing" if shape is None else tuple(shape)
                raise CheckpointError(
                    f"{path}: is of another model: {part} of {name} is {tuple(tensor.shape)} here and {stored_shape} "
                    "there; resume with the config that it was made with"
                )
    # in place: `_state` gives the very tensors of model, optimizer and average
    dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=world_size() == 1)
    if ranks_of(path) == world_size():
        set_random_state(read_progress(path)["random"])


def read_progress(path: Path) -> dict[str, Any]:
    """The `progress` that this rank saved in the state `path`; if another number of ranks wrote it, that of rank 0."""
    same = ranks_of(path) == world_size()
    return json.loads((path / f"rank-{rank() if same else 0}.json").read_text(encoding="utf-8"))


def ranks_of(path: Path) -> int:
    """How many ranks wrote the state `path`."""
    return len(list(path.glob("rank-*.json")))


def _state(model: nn.Module, optimizer: Optimizer, average: AveragedWeights | None) -> dict[str, dict[str, Tensor]]:
    """Every tensor of the state, by its name; with FSDP, this rank's shards."""
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
    """The newest undamaged state in `folder`, and the newer ones, which are damaged, each with the reason."""
    damaged = []
    for path in reversed(named_states(folder)):
        reason = damage(path)
        if reason is None:
            return path, damaged
        damaged.append((path, reason))
    return None, damaged


def damage(path: Path) -> str | None:
    """What is wrong with a state; None if its files are all there and have the recorded checksums."""
    if not (path / CHECKSUMS).is_file():
        hint = "; its states are in state/step-*" if (path / "state").is_dir() else ""
        return f"no {CHECKSUMS} there, so this is no state of a run{hint}"
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
    """The state of Python's and PyTorch's random numbers in this process, in a form that JSON can hold."""
    state = {"torch": torch.get_rng_state().numpy().tobytes().hex(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` gave."""
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


def _flush_folder(folder: Path) -> None:
    """Make the renaming inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
