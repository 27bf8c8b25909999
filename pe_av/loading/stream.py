"""Training from tar shards that are read once through, front to back, from wherever they lie.

    s3://bucket/train-{000000..000127}.tar    http://host/train-*.tar    /data/*.tar    pipe:zcat /data/{0..9}.tar.gz

The shards are in the layout of webdataset: KEY.mp4, or KEY.wav and the like, with KEY.json in the columns of a manifest
(data/manifest.py) or KEY.txt. fsspec opens them, webdataset runs `pipe:` commands and puts a sample's files together.

Every epoch has its own order of shards, of which rank r of w takes each w-th; samples are shuffled in windows. One pass
has no index, so a place in the stream is written down as (epoch, shard, sample), and the state of a `StreamLoader` is
the place where reading goes on, with the places of the samples that were read before it and wait for their turn. Going
on therefore reads again from the first of these: a window (at an epoch's end up to two), and what lies before it in its
shard.
"""

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import chain
from typing import Any

import numpy as np

from pe_av.config import ConfigError
from pe_av.data.manifest import Clip
from pe_av.data.remote import Sample, SampleReader, read_shard, shard_urls
from pe_av.loading.loader import AHEAD, _pinned
from pe_av.workers import Item, Pool, start_pool

Place = tuple[int, int, int]  # epoch, shard in the order of this rank and epoch, sample in the shard


class StreamLoader:
    """Batches of one rank without end, all of them full: after the rank's last shard its next epoch begins.

    `state_dict()` is the place after the batch that was handed out last, and `load_state_dict()` goes on there, with
    any number of workers and any size of batch, on the same number of ranks. What cannot be read is in a batch's "bad"
    list: samples under their id, and shards, which cost what was not read of them, under their URL.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        read: Callable[[Clip], Item],
        collate: Callable[[list[Item], list[int]], dict[str, Any]],
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        time_limit: float | None = None,
        shuffle_shards: bool = True,
        shuffle_window: int = 1000,
        pin_memory: bool = False,
    ):
        """
        Args:
            urls: what `shard_urls` makes a list of.
            read: makes an item of a clip, as `ClipReader` does; in a worker, where it travels by pickle.
            collate: makes a batch of items; it also gets a number for each, to choose among its captions by.
            batch_size: rows of a batch, on this rank.
            num_workers: processes that decode, beside a thread that reads; 0: all in this one, without a time limit.
            time_limit: seconds after which a worker that reads one sample is replaced, and the sample is bad.
            shuffle_shards: a new order of the shards every epoch; else as they are given.
            shuffle_window: samples in memory, undecoded, whose order is random; 1: as they lie in the shards.
        Raises:
            ConfigError: no shards, fewer than ranks, or no library to read them with.
        """
        self.urls = shard_urls(urls)
        if len(self.urls) < world:
            raise ConfigError(
                f"{len(self.urls)} shards for {world} ranks, of which each needs its own: pack smaller shards, or use "
                f"{len(self.urls)} ranks"
            )
        if shuffle_window < 1 or batch_size < 1:
            raise ConfigError(f"shuffle_window={shuffle_window} and batch_size={batch_size} must be at least 1")
        self.read, self.collate, self.batch_size = SampleReader(read), collate, batch_size
        self.seed, self.rank, self.world = seed, rank, world
        self.num_workers, self.time_limit, self.pin_memory = num_workers, time_limit, pin_memory
        self.shuffle_shards, self.window = shuffle_shards, shuffle_window
        self._waiting: tuple[Place, ...] = ()  # read and not handed out yet, in the order in which they will be
        self._next: Place = (0, 0, 0)  # from where on everything is still to come
        self._pool: Pool | None = None
        self._stop = threading.Event()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._stop = threading.Event()
        plan = self._plan()
        if self.num_workers == 0:
            with closing(plan):
                for rows, bad, after in plan:
                    batch = self._collate([self.read(sample) for _, sample in rows], rows, bad)
                    self._waiting, self._next = after
                    yield batch
            return
        if self._pool is None:
            self._pool = start_pool(self.read, self.num_workers)
        # one thread waits for the network, another for the workers, both beside the training step
        reader, assembler = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        pending: deque[Future] = deque()
        try:
            while True:
                while len(pending) <= AHEAD:
                    pending.append(assembler.submit(self._gather, reader.submit(self._take, plan)))
                batch, after = pending.popleft().result()
                self._waiting, self._next = after
                yield batch
        finally:
            self._stop.set()
            for executor in (reader, assembler):
                executor.shutdown(cancel_futures=True)
            plan.close()

    def state_dict(self) -> dict[str, Any]:
        """As JSON can hold it; it grows with `shuffle_window`."""
        return {
            "waiting": [list(place) for place in self._waiting],
            "next": list(self._next),
            "world": self.world,
            "rank": self.rank,
            "seed": self.seed,
            "shuffle_shards": self.shuffle_shards,
            "shards": len(self.urls),
            # what follows the name may be a signature, which is another one every time
            "names": hashlib.sha256("\n".join(url.split("?")[0] for url in self.urls).encode()).hexdigest(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ConfigError: the state is of another stream: another number of ranks, another seed or other shards.
        """
        now = self.state_dict()
        whats = {
            "world": "number of ranks",
            "rank": "rank",
            "seed": "seed",
            "shuffle_shards": "setting of shuffle_shards",
            "shards": "number of shards",
            "names": "checksum of the shards' names",
        }
        if missing := {"waiting", "next", *whats} - state.keys():
            raise ConfigError(f"cannot go on where the data stopped: that was no stream of shards (no {min(missing)})")
        for key, what in whats.items():
            if state[key] != now[key]:
                raise ConfigError(f"cannot go on where the data stopped: the {what} was {state[key]}, now {now[key]}")
        self._waiting, self._next = tuple(map(tuple, state["waiting"])), tuple(state["next"])

    def close(self) -> None:
        """End the workers and the reading."""
        self._stop.set()
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _take(self, plan: Iterator[Any]) -> tuple[Any, ...]:
        """The next batch, read from the shards and on its way to the workers."""
        rows, bad, after = next(plan)
        return rows, bad, after, [self._pool.read(sample, self.time_limit) for _, sample in rows]

    def _gather(self, taken: Future) -> tuple[dict[str, Any], tuple[tuple[Place, ...], Place]]:
        rows, bad, after, futures = taken.result()
        return self._collate([future.result() for future in futures], rows, bad), after

    def _collate(self, items: list[Item], rows: list[tuple[Place, Sample]], bad: list[Item]) -> dict[str, Any]:
        picks = [_number(self.seed, epoch, sample.name) for (epoch, _, _), sample in rows]
        batch = self.collate(items, picks)
        batch["bad"] = [*bad, *batch["bad"]]
        return _pinned(batch) if self.pin_memory else batch

    def _plan(self) -> Iterator[tuple[list[tuple[Place, Sample]], list[Item], tuple[tuple[Place, ...], Place]]]:
        """For each batch its samples, what could not be read since the one before, and the state after it.

        The samples of an epoch are taken by windows, each of which is shuffled by itself. While one is handed out, the
        next fills, so there is never more than a window in memory and reading does not come in bursts.
        """
        bad: list[Item] = []
        begin, filling, rows = self._next, [], []
        waiting, samples = self._read_again(bad)
        for place, sample in samples:
            if filling and (len(filling) == self.window or place[0] != begin[0]):
                order = np.random.default_rng((self.seed, self.rank, *begin)).permutation(len(filling))
                waiting.extend(filling[i] for i in order)
                filling = []
            if not filling:
                begin = place
            filling.append((place, sample))
            if waiting:
                rows.append(waiting.popleft())
            if len(rows) == self.batch_size:
                yield rows, bad[:], (tuple(place for place, _ in waiting), begin)
                rows = []
                bad.clear()

    def _read_again(self, bad: list[Item]) -> tuple[deque[tuple[Place, Sample]], Iterator[tuple[Place, Sample]]]:
        """What waits for its turn according to the state, and, in the same pass over the shards, what comes after."""
        wanted, found = set(self._waiting), {}
        samples = self._read_from(min([*wanted, self._next]), bad)
        for place, sample in samples:
            if place >= self._next:
                samples = chain([(place, sample)], samples)
                break
            if place in wanted:
                found[place] = sample
        return deque((place, found[place]) for place in self._waiting if place in found), samples

    def _read_from(self, place: Place, bad: list[Item]) -> Iterator[tuple[Place, Sample]]:
        """The samples of this rank as they lie in the shards, epoch after epoch; `bad` hears of what is no sample."""
        epoch, first, skip = place
        # Shards that gave nothing since the last sample. A torn one may be all that a rank has in an epoch; others come
        # to it with the next order, and only when all that can come have failed is there nothing to go on with.
        failed: set[str] = set()
        reason: str | None = None
        while True:
            order = np.arange(len(self.urls))
            if self.shuffle_shards:
                order = np.random.default_rng((self.seed, epoch)).permutation(order)
            mine = [self.urls[i] for i in order[self.rank :: self.world]]
            candidates = set(self.urls if self.shuffle_shards else mine)
            for shard in range(first, len(mine)):
                if skip == 0:  # else it gave samples before
                    failed.add(mine[shard])
                for found in read_shard(mine[shard], skip, self._stop):
                    if isinstance(found, Sample):
                        failed.clear()
                        reason = None
                        yield (epoch, shard, found.number), found
                    else:
                        bad.append(found)
                        reason = reason or found["error"]
                skip = 0
                if failed >= candidates:
                    why = reason or "they are empty"
                    raise ConfigError(f"none of the {len(failed)} shards of rank {self.rank} gave a sample: {why}")
            epoch, first = epoch + 1, 0


def _number(*parts: Any) -> int:
    """The same for the same parts, in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big")
