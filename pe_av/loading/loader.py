"""Batches in an order that the seed alone decides, read by worker processes.

The clips of batch b of epoch e, over all ranks, are a pure function of the seed, the epoch and the manifest
(`BatchSampler`). So the state of a loader is little more than two numbers, the ranks share every batch without
messages, and any number of workers and ranks gives the same batches. torchdata's StatefulDataLoader refuses a state
from another number of workers, and a hanging worker of torch's DataLoader stops the run; `workers.py` says why there is
a pool of our own.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from torch import Tensor

from pe_av.config import ConfigError
from pe_av.data.manifest import Clip
from pe_av.device import pinned
from pe_av.loading.sampler import BatchSampler
from pe_av.workers import Item, Pool, Threads, read_all, read_item

AHEAD = 2  # batches that are prefetched while the model computes one
CHECKED_CLIPS = 1000  # clips whose ids go into the checksum that tells one list of clips from another
_Step = tuple[list[Any], list[int]]  # the clips of this rank, and the pick of each


class Loader:
    """The batches of one epoch per iteration, beginning where the state says.

    `state_dict()` counts the batches that were handed out. After `load_state_dict()` the next iteration goes on behind
    them in the same order, with any number of workers and ranks.
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
            clips: the clips, or whatever `read` makes items of.
            read: makes an item of a clip, in a worker; `read`, clips and items travel by pickle. An exception becomes
                an item with an "error".
            collate: makes a batch of the items and picks of this rank, of which there may be none.
            num_workers: processes that read; 0: this process reads, without a time limit.
            time_limit: seconds that a worker may take for a clip; then the clip is damaged and the worker replaced.
            crop_seconds: clips that are known to last longer are cropped to this length: another segment in every epoch
                when shuffling, the first one otherwise. None: clips are read whole.
        """
        self.clips, self.read, self.sampler, self.collate = clips, read, sampler, collate
        self.num_workers, self.time_limit, self.pin_memory = num_workers, time_limit, pin_memory
        self.crop_seconds = crop_seconds
        self.epoch, self.position = 0, 0  # position: batches of the epoch, over all ranks, that were handed out
        self._pool: Pool | None = None
        self._names: str | None = None

    def __len__(self) -> int:
        """Batches of this rank in the current epoch; with a token budget, counting them takes planning the epoch."""
        return self.sampler.steps(self.epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = self.epoch
        for batch in self._collated(self._plan(epoch, self.position)):
            self.position += self.sampler.batches_per_step
            yield batch
        self.epoch, self.position = epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        place = {"epoch": self.epoch, "batch": self.position, "names": self._names_checksum()}
        return place | self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ConfigError: the state is of other clips, another seed, batch size, token budget or mixture.
        """
        for key, now in self.sampler.state_dict().items():
            if state.get(key) != now:
                was, now = (_sets_text(value) if key == "sets" else value for value in (state.get(key), now))
                raise ConfigError(
                    f"the data cannot be resumed: the {_WORDING[key]} was {was}, now {now}; use the data and settings "
                    "that the run began with, or start a new run from its model: checkpoint=…"
                )
        if state.get("names") != self._names_checksum():
            raise ConfigError(
                "the data cannot be resumed: the clips have other ids or another order; use the manifest that the run "
                "began with, or start a new run from its model: checkpoint=…"
            )
        self.epoch, self.position = state["epoch"], state["batch"]

    def close(self) -> None:
        """End the workers, within seconds."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _names_checksum(self) -> str:
        """Of the ids of some clips, evenly spread from the first to the last."""
        if self._names is None:
            indices = np.linspace(0, len(self.clips) - 1, min(len(self.clips), CHECKED_CLIPS)).astype(int)
            clips = (self.clips[int(i)] for i in indices)
            ids = "\n".join(clip["id"] if isinstance(clip, dict) else clip.id for clip in clips)
            self._names = hashlib.sha256(ids.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return self._names

    def _plan(self, epoch: int, first: int) -> Iterator[_Step]:
        sampler = self.sampler
        for number, indices in enumerate(sampler.epoch(epoch, first), first):  # the batch's number when shuffling
            clips = [self.clips[int(index)] for index in indices]
            if self.crop_seconds is not None:
                offsets = sampler.offsets(epoch, indices, number)
                clips = [crop(clip, self.crop_seconds, offset) for clip, offset in zip(clips, offsets, strict=True)]
            yield clips, sampler.picks(epoch, indices, number)

    def _collated(self, plan: Iterator[_Step]) -> Iterator[dict[str, Any]]:
        if self.num_workers == 0:
            for clips, picks in plan:
                yield self._collate([read_item(self.read, clip) for clip in clips], picks)
            return
        if self._pool is None:
            self._pool = Pool(self.read, self.num_workers)
        pending: deque[tuple[Future, list[Future]]] = deque()
        collating = Threads(1)  # beside the training step, which goes on while collating copies
        try:
            for clips, picks in plan:
                reading = [self._pool.read(clip, self.time_limit) for clip in clips]
                pending.append((collating.submit(self._gather, reading, picks), reading))
                if len(pending) > AHEAD:
                    yield pending.popleft()[0].result()
            while pending:
                yield pending.popleft()[0].result()
        finally:
            collating.stop()
            for _, reading in pending:
                for future in reading:
                    future.cancel()

    def _gather(self, reading: list[Future], picks: list[int]) -> dict[str, Any]:
        return self._collate([future.result() for future in reading], picks)

    def _collate(self, items: list[Item], picks: list[int]) -> dict[str, Any]:
        batch = self.collate(items, picks)
        return pinned(batch) if self.pin_memory else batch


# keys of `BatchSampler.state_dict`, as messages name them
_WORDING = {
    "clips": "number of clips",
    "seed": "seed",
    "rows": "number of rows of a batch over all ranks",
    "tokens": "token budget of a batch over all ranks",
    "sets": "mixture data.mix",
    "sorting": "checksum of the lengths and modalities of the clips",
}


def _sets_text(sets: list[list] | None) -> str:
    return ", ".join("{} ({} clips, weight {:g})".format(*each) for each in sets or []) or "none"


def crop(clip: Clip, seconds: float, offset: float) -> Clip:
    """A segment of a clip that is known to be longer than the segment; other clips are returned as they are.

    Args:
        seconds: length of the segment.
        offset: where it begins, from 0, the start of the clip, to 1, as late as possible.
    """
    known = [clip.seconds, None if clip.end is None else clip.end - clip.start]
    length = min((value for value in known if value is not None), default=0.0)
    if length <= seconds:
        return clip
    start = clip.start + offset * (length - seconds)
    return replace(clip, start=start, end=start + seconds)


def load_into_memory(
    clips: Sequence[Clip],
    read: Callable[[Clip], Item],
    num_workers: int,
    encode: Callable[[Tensor], Tensor] | None,
    title: str,
    time_limit: float | None = None,
) -> list[Item]:
    """Read every clip once, with a progress bar.

    Args:
        encode: a frozen codec, (1, 1, samples) -> (1, positions, dim): its features, which no epoch changes, replace
            the waveform. None: the waveform is kept.
        time_limit: seconds that a worker may take for a clip.
    """
    items = []
    reading = read_all(clips, read, num_workers, time_limit)
    for item in track(reading, title, total=len(clips), console=Console(stderr=True)):
        if encode is not None and "waveform" in item:
            item["codec_features"] = encode(item.pop("waveform")[None, None])[0]
        items.append(item)
    return items
