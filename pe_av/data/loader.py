"""Batches in an order that a seed alone decides, decoded by worker processes that may hang, crash and be replaced.

Which clips make up batch b of epoch e, all ranks together, is a pure function of the seed, the epoch and the manifest
(`BatchSampler`). So the state of a loader is two numbers, ranks share every batch without talking to each other, and
the stream is the same for any number of workers and ranks. torchdata's StatefulDataLoader refuses a state that another
number of workers has written; and a worker of torch's own loader that hangs stops the run. In pebble's pool, whose
workers share one pipe, a worker that died while it was idle ended the pool, and on a busy machine 7 crashes of 150 went
unseen. Here each worker has a pipe of its own, so that its death is told at once and of the clip that it was given.
"""

import atexit
import hashlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import ConfigError
from .mix import Mixture

Item = dict[str, Any]

TOKENS_PER_SECOND = 25  # positions that the model has for a second of sound
WINDOW = 64  # batches' worth of clips that are sorted by length at a time: large enough for little padding, small
# enough that lengths mix over an epoch
AHEAD = 2  # batches that are decoded while the model works on one
NAMES = 1000  # clips whose names tell one set of clips from another


class BatchSampler:
    """Which clips make up each batch.

    In an epoch with shuffling, the clips are permuted, taken by windows, and within a window sorted by what they have
    (sound, picture, captions) and by length; the batches cut from it come in random order. So the rows of a batch are
    of like length and pair the same things. The ranks share every batch.

    Without, the clips come in order, and the ranks take whole batches in turn, so that each is computed as one process
    alone would.
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
        mixture: Mixture | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        """
        Args:
            size: clips that there are.
            batch_size: rows of a batch, of all ranks together.
            shuffle: in a new order every epoch, in which every batch is full: up to a batch of clips, other ones every
                epoch, is left out. Else all of them, the last batch with what is left.
            lengths: (N,) seconds of each clip, to put like to like.
            parts: (N,) what each clip has (`Manifest.parts`), likewise.
            max_tokens: with shuffling, instead of batch_size: as many rows, of all ranks together, as fit if each is
                padded to the longest; 25 tokens per second.
            mixture: with shuffling, what an epoch takes of which set; None: every clip once.
            rank, world: this process and how many there are. With shuffling its rows of a batch are every world-th,
                which may be none.
        Raises:
            ConfigError: fewer clips than one batch takes, or a clip longer than max_tokens allows.
        """
        self.size, self.shuffle, self.seed, self.rank, self.world = size, shuffle, seed, rank, world
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.mixed = mixture is not None
        self.mixture = mixture or Mixture({"data": size}, {"data": 1.0})
        self.tokens = None if lengths is None else _tokens(lengths)
        self.parts = None if parts is None else parts.astype(np.uint8)
        self.batches_per_step = 1 if shuffle else world
        self.rows = batch_size
        if max_tokens is not None:
            if self.tokens is None:
                raise ConfigError(
                    "a token budget needs the length of every clip: python -m pe_av.data.manifest IN OUT finds them"
                )
            self.rows = max(max_tokens // int(np.median(self.tokens)), 1)  # about, for the windows
            least = 2 * self.tokens.max()
            if shuffle and least > max_tokens:
                raise ConfigError(f"{max_tokens} tokens do not hold two of the longest clips: give at least {least}")
        elif shuffle and size - len(self.mixture.sizes) + 1 < batch_size:
            raise ConfigError(f"{size} clips do not fill batch_size={batch_size}: lower it")

    def epoch(self, number: int, first: int = 0) -> Iterator[np.ndarray]:
        """The clips of this rank in every step of epoch `number`, from whole batch `first` on; they may be none.

        All ranks have as many steps. Without reading anything, so that going on in the middle costs no more than the
        plan of the epoch: about a second for a million clips.
        """
        if self.shuffle:
            yield from (batch[self.rank :: self.world] for batch in islice(self._batches(number), first, None))
            return
        for begin in range(first * self.batch_size, self.size, self.world * self.batch_size):
            bounds = [min(begin + (self.rank + i) * self.batch_size, self.size) for i in (0, 1)]
            yield np.arange(*bounds, dtype=np.int32)

    def steps(self, number: int) -> int:
        """How many there are in an epoch; for a token budget the whole plan is made to count them."""
        if not self.shuffle:
            return -(-self.size // (self.world * self.batch_size))
        if self.max_tokens is not None:
            return sum(1 for _ in self._batches(number))
        return sum(end - first for first, end in self.mixture.spans(number)) // self.batch_size

    def picks(self, number: int, clips: np.ndarray, batch: int = 0) -> list[int]:
        """For each clip a number that decides which of its captions it shows in this epoch; 0 without shuffling.

        Args:
            batch: the whole batch, which matters in a mixture, where a clip may come several times in an epoch.
        """
        return [int(bits >> np.uint64(32)) for bits in self._chance(number, clips, batch)]

    def offsets(self, number: int, clips: np.ndarray, batch: int = 0) -> list[float]:
        """As `picks`, and independent of it: in [0, 1), which part of each clip is read in this epoch."""
        return [int(bits & np.uint64(2**32 - 1)) / 2**32 for bits in self._chance(number, clips, batch)]

    def state_dict(self) -> dict[str, Any]:
        """What identifies the stream of batches."""
        sets = self.mixture
        return {
            "clips": self.size,
            "seed": self.seed,
            "rows": self.batch_size if self.max_tokens is None else None,
            "tokens": self.max_tokens,
            "sets": [[name, size, sets.weights[name]] for name, size in sets.sizes.items()] if self.mixed else None,
            "sorting": self._sorting() if self.shuffle else None,
        }

    def _sorting(self) -> str:
        """A checksum of what the clips are sorted by."""
        digest = hashlib.sha256()
        for values in (self.tokens, self.parts):
            digest.update(b"none" if values is None else values.tobytes())
        return digest.hexdigest()[:16]

    def _chance(self, number: int, clips: np.ndarray, batch: int) -> np.ndarray:
        """(N,) uint64 random bits, which depend on neither a clip's neighbours nor the ranks: a hash (splitmix64)."""
        if not self.shuffle:
            return np.zeros(len(clips), np.uint64)
        turn = batch if len(self.mixture.sizes) > 1 else 0
        start = (self.seed * 1_000_003 + number + 1) * 0x9E3779B97F4A7C15 + turn * 0xD1B54A32D192ED03
        x = clips.astype(np.uint64) + np.uint64(start % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    def _batches(self, number: int) -> Iterator[np.ndarray]:
        """The clips of all ranks in each batch of an epoch with shuffling."""
        chance = np.random.default_rng((self.seed, number))
        order = self.mixture.clips(self.seed, number)
        chance.shuffle(order)
        rest = order[:0]
        for start in range(0, len(order), WINDOW * self.rows):
            batches, rest = self._cut(np.concatenate([rest, order[start : start + WINDOW * self.rows]]))
            yield from (batches[i] for i in chance.permutation(len(batches)))
        if self.max_tokens is not None and len(rest) >= 2:
            room = self.max_tokens // int(self.tokens[rest].max())
            fewest = -(-len(rest) // room)
            yield from (batch for batch in _dealt(rest, max(fewest, self._repeats(rest))) if len(batch) >= 2)

    def _cut(self, clips: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Full batches of like clips, and the clips that are left."""
        repeats = self._repeats(clips)
        if self.max_tokens is None:
            # random ones are left, not the longest
            count = len(clips) // self.rows
            clips, rest = np.split(clips, [count * self.rows])
            groups = np.array_split(self._sorted(clips).reshape(count, self.rows), max(count // repeats, 1))
            return [batch for group in groups for batch in _dealt(group.ravel(), len(group))], rest
        clips = self._sorted(clips)
        tokens, batches, first = self.tokens[clips], [], 0
        while first < len(clips):
            most = self.max_tokens // int(tokens[first]) * repeats  # if all were as short as the first
            longest = np.maximum.accumulate(tokens[first : first + most + 1])
            full = np.flatnonzero(np.arange(len(longest)) >= self.max_tokens // longest * repeats)
            if not len(full):
                break
            batches += _dealt(clips[first : first + full[0]], repeats)
            first += full[0]
        return batches, clips[first:]

    def _sorted(self, clips: np.ndarray) -> np.ndarray:
        keys = [values[clips] for values in (self.tokens, self.parts) if values is not None]
        if self._may_repeat:
            keys.insert(0, clips)  # among alike ones, the copies of a clip side by side
        return clips[np.lexsort(keys)] if keys else clips

    def _repeats(self, clips: np.ndarray) -> int:
        """How often the clip comes that comes most often."""
        return int(np.unique(clips, return_counts=True)[1].max()) if self._may_repeat and len(clips) else 1

    @property
    def _may_repeat(self) -> bool:
        return len(self.mixture.sizes) > 1


def _tokens(lengths: np.ndarray) -> np.ndarray:
    """(N,) seconds -> (N,) int32 positions, in the memory of one copy: there may be many millions of clips."""
    tokens = lengths * TOKENS_PER_SECOND
    np.ceil(tokens, out=tokens)
    return np.maximum(tokens, 1, out=tokens).astype(np.int32)


def _dealt(clips: np.ndarray, count: int) -> list[np.ndarray]:
    """Sorted clips -> batches, as cards are dealt, so that a clip that comes `count` times or less is in none twice.

    Its copies stand side by side, and in a contrastive loss one would be the other's wrong answer.
    """
    return [clips[i::count] for i in range(count)]


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


def read_all(
    clips: Sequence[Any], read: Callable[[Any], Item], num_workers: int, time_limit: float | None = None
) -> Iterator[Item]:
    """Every clip read, in order; the arguments are those of `Loader`."""
    if num_workers == 0:
        yield from (_item(read, clip) for clip in clips)
        return
    pool = start_pool(read, num_workers)
    pending: deque[Future] = deque()
    try:
        for clip in clips:
            pending.append(pool.read(clip, time_limit))
            if len(pending) >= 8 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.close()


def _item(read: Callable[[Any], Item], clip: Any) -> Item:
    try:
        return read(clip)
    except Exception as error:  # whatever it is, it costs this clip and not the run
        return _bad(clip, _told(error))


def _bad(clip: Any, why: str) -> Item:
    return {"id": clip.id, "error": f"{clip.video or clip.audio}: {why}"}


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _pinned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.pin_memory()
    return {key: _pinned(inner) for key, inner in value.items()} if isinstance(value, dict) else value


# ---------------------------------------------------------------------------------------------------------------------
# workers

SECONDS_TO_START = 120.0
SECONDS_TO_END = 5.0  # after SIGKILL; a process that waits for a dead network drive is then left behind

# multiprocessing looks after all its processes whenever it starts one, and not thread by thread
_processes = threading.Lock()


def start_pool(read: Callable[[Any], Item], num_workers: int) -> "Pool":
    """Processes that wait for clips, of which `Pool.read` gives them one."""
    return Pool(read, num_workers)


class Threads:
    """Threads that do tasks in the order in which they come. Unlike those of ThreadPoolExecutor, they do not keep the
    interpreter from ending."""

    def __init__(self, count: int):
        self._tasks: queue.SimpleQueue[tuple[Future, Callable, tuple] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, do: Callable, *arguments: Any) -> Future:
        future: Future = Future()
        self._tasks.put((future, do, arguments))
        return future

    def stop(self) -> None:
        """Tasks that have not begun are cancelled, the threads end after the ones that have."""
        while not self._tasks.empty():
            task = self._tasks.get()
            if task is not None:
                task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)

    def join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, do, arguments = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(do(*arguments))
            except BaseException as error:
                future.set_exception(error)
            del task, future, do, arguments  # not held while waiting for the next


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection


class Pool:
    """Processes that read clips, one thread here for each, which waits for it and replaces it when it is gone.

    They are forked from a server that has no threads and no CUDA, so that starting one, at any time, is safe and quick.
    """

    def __init__(self, read: Callable[[Any], Item], num_workers: int):
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pe_av.data.dataset"])
        _start_server()
        self._read = read
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(num_workers):
            self._idle.put(None)  # started when there is something to read
        self._workers: list[_Worker] = []
        self._closed, self._close = multiprocessing.Pipe(duplex=False)  # readable once the pool is closed
        self._threads = Threads(num_workers)
        atexit.register(self.close)  # else multiprocessing would wait for workers that hang

    def read(self, clip: Any, time_limit: float | None = None) -> Future:
        """The item that a worker makes of a clip, or {"id", "error"}.

        Args:
            time_limit: seconds, from when a worker begins.
        """
        return self._threads.submit(self._read_one, clip, time_limit)

    def close(self) -> None:
        """Kill the workers, whatever they do; what is not read is cancelled. Takes seconds at most."""
        atexit.unregister(self.close)
        self._threads.stop()
        with _processes:
            self._close.close()
            for worker in self._workers:
                worker.process.kill()
        self._threads.join(SECONDS_TO_END)
        with _processes:
            deadline = time.monotonic() + SECONDS_TO_END
            while self._workers:
                _end(self._workers.pop(), max(deadline - time.monotonic(), 0.0))

    def _read_one(self, clip: Any, time_limit: float | None) -> Item:
        worker = self._idle.get()
        try:
            if worker is not None and multiprocessing.connection.wait([worker.process.sentinel], 0):
                self._retire(worker)  # killed while it was idle, as where memory is short
                worker = None
            if worker is None:
                worker = self._start()
            try:
                answer = self._ask(worker, pickle.dumps(clip), time_limit)
            except TimeoutError:
                self._retire(worker)
                worker = None
                return _bad(clip, f"reading it took more than {time_limit:g} s")
            except (EOFError, OSError):
                code = self._retire(worker)
                worker = None
                return _bad(clip, f"reading it ended the process ({code})")
            return _unpacked(clip, answer)
        finally:
            self._idle.put(worker)

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        with _processes:
            if self._close.closed:
                raise CancelledError("the pool is closed")
            process = self._context.Process(target=_serve, args=[self._read, theirs])
            process.start()
            worker = _Worker(process, ours)
            self._workers.append(worker)
        theirs.close()
        try:
            self._ask(worker, None, SECONDS_TO_START)
        except (EOFError, OSError) as error:
            raise RuntimeError(
                f"a process that reads clips did not start (exit code {self._retire(worker)})"
            ) from error
        return worker

    def _ask(self, worker: _Worker, question: bytes | None, time_limit: float | None) -> bytes:
        """What a worker says next.

        Raises:
            TimeoutError: it has not done so in time.
            EOFError, OSError: it has died.
            CancelledError: the pool was closed.
        """
        if question is not None:
            worker.pipe.send_bytes(question)
        ready = multiprocessing.connection.wait([worker.pipe, worker.process.sentinel, self._closed], time_limit)
        if self._closed in ready:
            raise CancelledError("the pool was closed")
        if not ready:
            raise TimeoutError
        if worker.pipe not in ready:  # not to be read from: a process that this one has started may hold the other end
            raise EOFError
        return worker.pipe.recv_bytes()

    def _retire(self, worker: _Worker) -> int | None:
        """Its exit code."""
        with _processes:
            if worker not in self._workers:
                raise CancelledError("the pool was closed")
            self._workers.remove(worker)
            return _end(worker, SECONDS_TO_END)


def _start_server() -> None:
    """The process that workers are forked from, deaf to the signals that are for the process that trains."""
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread may set signals
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        forkserver.ensure_running()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(worker: _Worker, seconds: float) -> int | None:
    worker.process.kill()
    worker.process.join(seconds)
    worker.pipe.close()
    code = worker.process.exitcode
    if code is not None:
        worker.process.close()
    return code


def _unpacked(clip: Any, answer: bytes) -> Item:
    try:
        item = pickle.loads(answer)
    except Exception as error:
        return _bad(clip, _told(error))
    if isinstance(item, str):
        return _bad(clip, item)
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in item.items()}


def _serve(read: Callable[[Any], Item], pipe: Connection) -> None:
    """A worker's life: a clip comes, what was read of it goes, or as text why nothing was."""
    torch.set_num_threads(1)  # the workers are the parallelism
    # they are for the process that trains, which has a step to finish; schedulers send them to everyone
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        pipe.send_bytes(b"ready")
        while True:
            pipe.send_bytes(_answer(read, pipe.recv_bytes()))
    except (EOFError, OSError):
        return  # the pool is closed


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _answer(read: Callable[[Any], Item], question: bytes) -> bytes:
    try:
        item = read(pickle.loads(question))
        # arrays instead of tensors, which pickle slowly
        return pickle.dumps({k: v.numpy() if isinstance(v, Tensor) else v for k, v in item.items()})
    except BaseException as error:  # also SystemExit, which some library may think is its to raise
        return pickle.dumps(_told(error))
