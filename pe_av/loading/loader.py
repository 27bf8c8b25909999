"""Batches in an order that a seed alone decides, decoded by worker processes that may hang, crash and be replaced.

Which clips make up batch b of epoch e, all ranks together, is a pure function of the seed, the epoch and the manifest
(`BatchSampler`). So the state of a loader is two numbers, ranks share every batch without talking to each other, and
the stream is the same for any number of workers and ranks. torchdata's StatefulDataLoader refuses a state that another
number of workers has written; and a worker of torch's own loader that hangs stops the run. In pebble's pool, whose
workers share one pipe, a worker that died while it was idle ended the pool, and on a busy machine 7 crashes of 150 went
unseen. Here each worker has a pipe of its own, so that its death is told at once and of the clip that it was given.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from torch import Tensor

from pe_av.config import ConfigError
from pe_av.data.manifest import Clip
from pe_av.loading.order import BatchSampler
from pe_av.workers import Item, Pool, Threads, _item, read_all, start_pool

# enough that lengths mix over an epoch
AHEAD = 2  # batches that are decoded while the model works on one
NAMES = 1000  # clips whose names tell one set of clips from another


def crop(clip: Any, seconds: float, offset: float) -> Any:
    """A part of a `Clip` that is known to be longer.

    Args:
        seconds: that the part lasts.
        offset: in [0, 1], where it begins: at the clip's start, or as late as it can.
    """
    known = [clip.seconds, None if clip.end is None else clip.end - clip.start]
    length = min((value for value in known if value is not None), default=0.0)
    if length <= seconds:
        return clip
    start = clip.start + offset * (length - seconds)
    return replace(clip, start=start, end=start + seconds)


class Loader:
    """Batches of one epoch per iteration, from where the state says; "number" is the whole batch's in its epoch.

    `state_dict()` counts the batches that were handed out; `load_state_dict()` makes the next iteration go on after
    them, in the same order, with any number of workers and ranks.
    """

    def __init__(
        self,
        clips: Sequence[Any],
        read: Callable[[Any], Item],
        sampler: BatchSampler,
        collate: Callable[[list[Item], list[int]], dict[str, Any]],
        num_workers: int = 0,
        time_limit: float | None = None,
        pin_memory: bool = False,
        crop_seconds: float | None = None,
    ):
        """
        Args:
            clips: what `read` makes items of.
            read: in a worker; it and the clips travel there by pickle, and what it returns comes back. What it raises
                becomes an item with an "error".
            collate: gets the items of this rank, which may be none.
            num_workers: processes; 0: read in this one, without a time limit.
            time_limit: seconds after which a worker that reads one clip is replaced, and the clip is bad.
            crop_seconds: of a `Clip` that is known to last longer a part of this length is read, another in every epoch
                with shuffling, the first without; None: clips are read as they are.
        """
        self.clips, self.read, self.sampler, self.collate = clips, read, sampler, collate
        self.num_workers, self.time_limit, self.pin_memory = num_workers, time_limit, pin_memory
        self.crop_seconds = crop_seconds
        self.epoch, self.position = 0, 0  # whole batches of this epoch that were handed out
        self._pool: Pool | None = None
        self._names_sum: str | None = None

    def __len__(self) -> int:
        """Batches of this rank per epoch; a token budget makes the whole plan to count them."""
        return self.sampler.steps(self.epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = self.epoch
        for batch in self._collated(self._plan(epoch, self.position)):
            self.position += self.sampler.batches_per_step
            yield batch
        self.epoch, self.position = epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        place = {"epoch": self.epoch, "batch": self.position, "names": self._names()}
        return place | self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ConfigError: the state is of another stream: other clips, another seed, size of batch, or mixture.
        """
        for key, now in self.sampler.state_dict().items():
            if state.get(key) != now:
                was, now, what = (state.get(key), now, STREAM[key]) if key != "sets" else _differing(state, now)
                raise ConfigError(f"cannot go on where the data stopped: the {what} was {was}, now {now}")
        if state.get("names") != self._names():
            raise ConfigError(
                "cannot go on where the data stopped: the clips have other names, or another order; use the manifest "
                "that the run began with, or start a new run from its model: checkpoint=…"
            )
        self.epoch, self.position = state["epoch"], state["batch"]

    def _names(self) -> str:
        """A checksum of some of the clips' names, evenly from the first to the last."""
        if self._names_sum is None:
            some = np.linspace(0, len(self.clips) - 1, min(len(self.clips), NAMES)).astype(int)
            clips = (self.clips[int(i)] for i in some)
            told = "\n".join(clip["id"] if isinstance(clip, dict) else clip.id for clip in clips)
            self._names_sum = hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return self._names_sum

    def close(self) -> None:
        """End the workers, within seconds."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _plan(self, epoch: int, first: int) -> Iterator["_Step"]:
        sampler = self.sampler
        own = 0 if sampler.shuffle else sampler.rank
        for step, batch in enumerate(sampler.epoch(epoch, first)):
            number = first + step * sampler.batches_per_step + own
            clips = [self.clips[int(index)] for index in batch]
            if self.crop_seconds is not None:
                offsets = sampler.offsets(epoch, batch, number)
                clips = [crop(clip, self.crop_seconds, offset) for clip, offset in zip(clips, offsets, strict=True)]
            yield _Step(number, clips, sampler.picks(epoch, batch, number))

    def _collated(self, plan: Iterator["_Step"]) -> Iterator[dict[str, Any]]:
        if self.num_workers == 0:
            for step in plan:
                yield self._collate(step, [_item(self.read, clip) for clip in step.clips])
            return
        if self._pool is None:
            self._pool = start_pool(self.read, self.num_workers)
        pending: deque[tuple[Future, list[Future]]] = deque()
        collating = Threads(1)  # beside the training step: collating copies, and lets it run
        try:
            for step in plan:
                reading = [self._pool.read(clip, self.time_limit) for clip in step.clips]
                pending.append((collating.submit(self._gather, step, reading), reading))
                if len(pending) > AHEAD:
                    yield pending.popleft()[0].result()
            while pending:
                yield pending.popleft()[0].result()
        finally:
            collating.stop()
            for _, reading in pending:
                for future in reading:
                    future.cancel()

    def _gather(self, step: "_Step", reading: list[Future]) -> dict[str, Any]:
        return self._collate(step, [future.result() for future in reading])

    def _collate(self, step: "_Step", items: list[Item]) -> dict[str, Any]:
        made = self.collate(items, step.picks) | {"number": step.number}
        return _pinned(made) if self.pin_memory else made


STREAM = {
    "clips": "number of clips",
    "seed": "seed",
    "rows": "rows of a batch over all ranks",
    "tokens": "tokens of a batch over all ranks",
    "sorting": "checksum of the clips' lengths, and of what they have,",
}


def _differing(state: dict[str, Any], now: list[list] | None) -> tuple[str, str, str]:
    """(was, now, what) of the first set that two mixtures do not share, or of their order."""
    before, after = ({name: told for name, *told in sets} for sets in (state.get("sets") or [], now or []))
    for name in before | after:
        if before.get(name) != after.get(name):
            was, is_now = (
                "{} clips with weight {:g}".format(*sets[name]) if name in sets else "none" for sets in (before, after)
            )
            return was, is_now, f"set {name} of data.mix"
    return ", ".join(before), ", ".join(after), "order of data.mix"


@dataclass
class _Step:
    number: int  # of the whole batch in its epoch
    clips: list[Any]
    picks: list[int]


def _pinned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.pin_memory()
    return {key: _pinned(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def load_into_memory(
    clips: Sequence[Clip],
    read: Callable[[Clip], dict[str, Any]],
    num_workers: int,
    encode: Callable[[Tensor], Tensor] | None,
    title: str,
    time_limit: float | None = None,
) -> list[dict[str, Any]]:
    """Decode every clip once, with a progress bar.

    Args:
        encode: the codec where it is frozen, (1, 1, samples) -> (1, frames, dim): its features replace the waveform,
            since they would come out the same in every epoch.
        time_limit: seconds that one clip may take.
    """
    items = []
    done = read_all(clips, read, num_workers, time_limit)
    for item in track(done, title, total=len(clips), console=Console(stderr=True)):
        if encode is not None and "waveform" in item:
            item["codec_features"] = encode(item.pop("waveform")[None, None])[0]
        items.append(item)
    return items
