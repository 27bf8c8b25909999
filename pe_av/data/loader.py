"""Batches in an order that a seed alone decides, decoded by worker processes that may hang, crash and be replaced.

Which clips make up batch b of epoch e is a pure function of the seed, the epoch and the manifest (`BatchSampler`). So
the state of a loader is two numbers, ranks share every batch without talking to each other, and the stream is the same
for any number of workers. torchdata's StatefulDataLoader refuses a state that another number of workers has written;
and a worker of torch's own loader that hangs stops the run. Hence the pool of pebble, which gives every clip its time
limit and replaces the process of one that exceeds it.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from typing import Any

import numpy as np
import torch
from pebble import ProcessExpired, ProcessPool
from torch import Tensor

from ..config import ConfigError

Item = dict[str, Any]

TOKENS_PER_SECOND = 25  # positions that the model has for a second of sound
WINDOW = 64  # batches' worth of clips that are sorted by length at a time: large enough for little padding, small
# enough that lengths mix over an epoch
AHEAD = 2  # batches that are decoded while the model works on one


class BatchSampler:
    """Which clips make up each batch.

    In an epoch with shuffling, the clips are permuted, taken by windows, and within a window sorted by what they have
    (sound, picture, captions) and by length; the batches cut from it come in random order. So the rows of a batch are
    of like length and pair the same things.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        lengths: np.ndarray | None = None,
        parts: np.ndarray | None = None,
        max_tokens: int | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        """
        Args:
            size: clips that there are.
            batch_size: rows of a batch, on each rank.
            shuffle: in a new order every epoch, in which every batch is full: up to a batch of clips, other ones every
                epoch, is left out. Else in order, all of them, the last batch with what is left.
            lengths: (N,) seconds of each clip, to put like to like.
            parts: (N,) what each clip has (`Manifest.parts`), likewise.
            max_tokens: instead of batch_size: as many rows as fit if each is padded to the longest; 25 per second.
            rank, world: this process and how many there are; together they read every clip once.
        Raises:
            ConfigError: fewer clips than one batch takes, or a clip longer than max_tokens allows.
        """
        self.size, self.shuffle, self.seed, self.rank, self.world = size, shuffle, seed, rank, world
        self.rows, self.max_tokens = batch_size * world, max_tokens
        self.tokens = None if lengths is None else np.maximum(np.ceil(lengths * TOKENS_PER_SECOND), 1).astype(int)
        self.parts = parts
        if max_tokens is not None:
            if self.tokens is None:
                raise ConfigError(
                    "a token budget needs the length of every clip: python -m pe_av.data.manifest IN OUT finds them"
                )
            self.rows = max(max_tokens // int(np.median(self.tokens)), 1) * world  # about, for the windows
            least = self.tokens.max() * (1 if world > 1 else 2)
            if shuffle and least > max_tokens:
                raise ConfigError(f"{max_tokens} tokens do not hold two of the longest clips: give at least {least}")
        elif shuffle and size < self.rows:
            raise ConfigError(f"{size} clips do not fill batch_size={batch_size} on {world} ranks: lower it")

    def epoch(self, number: int) -> Iterator[np.ndarray]:
        """The clips of this rank in each batch of epoch `number`; may be none in the last without shuffling."""
        return (batch[self.rank :: self.world] for batch in self._batches(number))

    def picks(self, number: int, batch: np.ndarray) -> list[int]:
        """For each clip a number that decides which of its captions it shows in this epoch; 0 without shuffling."""
        if not self.shuffle:
            return [0] * len(batch)
        # a hash, so that a clip's number depends on neither its neighbours nor the ranks (splitmix64)
        x = batch.astype(np.uint64) + np.uint64((self.seed * 1_000_003 + number + 1) * 0x9E3779B97F4A7C15 % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return [int(pick) for pick in (x ^ (x >> np.uint64(31))) >> np.uint64(32)]

    def _batches(self, number: int) -> Iterator[np.ndarray]:
        """The clips of all ranks in each batch."""
        if not self.shuffle:
            yield from (np.arange(i, min(i + self.rows, self.size)) for i in range(0, self.size, self.rows))
            return
        chance = np.random.default_rng((self.seed, number))
        order = chance.permutation(self.size)
        rest = order[:0]
        for start in range(0, self.size, WINDOW * self.rows):
            batches, rest = self._cut(np.concatenate([rest, order[start : start + WINDOW * self.rows]]))
            yield from (batches[i] for i in chance.permutation(len(batches)))
        if self.max_tokens is not None and len(rest) >= 2 * self.world:
            yield rest[: len(rest) // self.world * self.world]

    def _cut(self, clips: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Full batches of like clips, and the clips that are left."""
        if self.max_tokens is None:
            # random ones are left, not the longest
            clips, rest = np.split(clips, [len(clips) // self.rows * self.rows])
            return np.split(self._sorted(clips), len(clips) // self.rows) if len(clips) else [], rest
        clips = self._sorted(clips)
        batches, first = [], 0
        longest = 0
        for at, tokens in enumerate(self.tokens[clips]):
            longest = max(longest, int(tokens))
            room = self.max_tokens // longest * self.world
            if at - first >= room:
                last = first + (at - first) // self.world * self.world
                batches.append(clips[first:last])
                first, longest = last, int(self.tokens[clips[last : at + 1]].max())
        return batches, clips[first:]

    def _sorted(self, clips: np.ndarray) -> np.ndarray:
        keys = [values[clips] for values in (self.tokens, self.parts) if values is not None]
        return clips[np.lexsort(keys)] if keys else clips


class Loader:
    """Batches of one epoch per iteration, from where the state says.

    `state_dict()` counts the batches that were handed out; `load_state_dict()` makes the next iteration go on after
    them, in the same order, with any number of workers, and on any number of ranks that share the same whole batch.
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
    ):
        """
        Args:
            clips: what `read` makes items of.
            read: in a worker; it and the clips travel there by pickle, and what it returns comes back.
            num_workers: processes; 0: read in this one, without a time limit.
            time_limit: seconds after which a worker that reads one clip is replaced, and the clip is bad.
        """
        self.clips, self.read, self.sampler, self.collate = clips, read, sampler, collate
        self.num_workers, self.time_limit, self.pin_memory = num_workers, time_limit, pin_memory
        self.epoch, self.position = 0, 0  # batches of this epoch that were handed out
        self._pool: ProcessPool | None = None

    def __len__(self) -> int:
        """Batches of this rank per epoch."""
        sampler = self.sampler
        if sampler.max_tokens is not None:
            return sum(1 for _ in sampler.epoch(self.epoch))
        return sampler.size // sampler.rows if sampler.shuffle else -(-sampler.size // sampler.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, first = self.epoch, self.position
        plan = (batch for at, batch in enumerate(self.sampler.epoch(epoch)) if at >= first)
        for batch in self._collated(plan, epoch):
            self.position += 1
            yield batch
        self.epoch, self.position = epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        sampler = self.sampler
        return {
            "epoch": self.epoch,
            "batch": self.position,
            "clips": sampler.size,
            "seed": sampler.seed,
            "rows": sampler.rows if sampler.max_tokens is None else sampler.max_tokens * sampler.world,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """
        Raises:
            ConfigError: the state is of another stream: other clips, another seed or another size of batch.
        """
        now = self.state_dict()
        for key, what in (("clips", "number of clips"), ("seed", "seed"), ("rows", "rows of a batch over all ranks")):
            if state[key] != now[key]:
                raise ConfigError(f"cannot go on where the data stopped: the {what} was {state[key]}, now {now[key]}")
        self.epoch, self.position = state["epoch"], state["batch"]

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def _collated(self, plan: Iterator[np.ndarray], epoch: int) -> Iterator[dict[str, Any]]:
        if self.num_workers == 0:
            for batch in plan:
                yield self._collate([self.read(self.clips[int(i)]) for i in batch], epoch, batch)
            return
        if self._pool is None:
            self._pool = start_pool(self.read, self.num_workers)
        pending: deque[Future] = deque()
        with ThreadPoolExecutor(1) as assembler:  # beside the training step: collating copies, and lets it run
            try:
                for batch in plan:
                    clips = [self.clips[int(i)] for i in batch]
                    futures = [_schedule(self._pool, clip, self.time_limit) for clip in clips]
                    pending.append(assembler.submit(self._gather, clips, futures, epoch, batch))
                    if len(pending) > AHEAD:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def _gather(self, clips: list[Any], futures: list[Future], epoch: int, batch: np.ndarray) -> dict[str, Any]:
        items = [_result(clip, future, self.time_limit) for clip, future in zip(clips, futures, strict=True)]
        return self._collate(items, epoch, batch)

    def _collate(self, items: list[Item], epoch: int, batch: np.ndarray) -> dict[str, Any]:
        made = self.collate(items, self.sampler.picks(epoch, batch))
        return _pinned(made) if self.pin_memory else made


def read_all(
    clips: Sequence[Any], read: Callable[[Any], Item], num_workers: int, time_limit: float | None = None
) -> Iterator[Item]:
    """Every clip read, in order; the arguments are those of `Loader`."""
    if num_workers == 0:
        yield from (read(clip) for clip in clips)
        return
    pool = start_pool(read, num_workers)
    pending: deque[tuple[Any, Future]] = deque()
    try:
        for clip in clips:
            pending.append((clip, _schedule(pool, clip, time_limit)))
            if len(pending) >= 8 * num_workers:
                yield _result(*pending.popleft(), time_limit)
        while pending:
            yield _result(*pending.popleft(), time_limit)
    finally:
        pool.stop()
        pool.join()


# ---------------------------------------------------------------------------------------------------------------------
# workers


def start_pool(read: Callable[[Any], Item], num_workers: int) -> ProcessPool:
    """Processes that wait for clips. They are forked from a server that has no threads and no CUDA, so that starting
    one, at any time, is safe and quick."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pe_av.data.dataset"])
    return ProcessPool(num_workers, context=context, initializer=_start_worker, initargs=[read])


_read: Callable[[Any], Item]  # of this worker


def _start_worker(read: Callable[[Any], Item]) -> None:
    global _read
    _read = read
    torch.set_num_threads(1)  # the workers are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that trains
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _read_here(clip: Any) -> Item:
    # arrays instead of tensors: torch would pass each through a file descriptor, of which a process has few
    return {name: value.numpy() if isinstance(value, Tensor) else value for name, value in _read(clip).items()}


def _schedule(pool: ProcessPool, clip: Any, time_limit: float | None) -> Future:
    return pool.schedule(_read_here, args=[clip], timeout=time_limit)


def _result(clip: Any, future: Future, time_limit: float | None) -> Item:
    try:
        item = future.result()
    except TimeoutError:
        return {"id": clip.id, "error": f"{clip.video or clip.audio}: reading it took more than {time_limit:g} s"}
    except ProcessExpired as error:
        return {"id": clip.id, "error": f"{clip.video or clip.audio}: reading it ended the process ({error.exitcode})"}
    return {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in item.items()}


def _pinned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.pin_memory()
    return {key: _pinned(inner) for key, inner in value.items()} if isinstance(value, dict) else value
