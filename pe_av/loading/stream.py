"""Batches from tar shards that are read once through, front to back, from wherever they are.

    s3://bucket/train-{000000..000127}.tar    http://host/train-*.tar    /data/*.tar    pipe:zcat /data/{0..9}.tar.gz

The shards have webdataset's layout: KEY.mp4, or KEY.wav and the like, with KEY.json in the columns of a manifest
(data/manifest.py) or KEY.txt. data/remote.py opens them.

Every epoch has its own order of shards, of which each rank takes every world-th, and the samples are shuffled in
windows. Shards have no index, so a place in the stream is (epoch, shard, sample). The state of a `StreamLoader` is the
place where reading goes on, and the places of the samples that were read before it and wait in the window. Resuming
therefore reads again from the first of these places: what lies before it in its shard, and a window, or up to two at
the end of an epoch.
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
from pe_av.device import pinned
from pe_av.loading.loader import AHEAD
from pe_av.workers import Item, Pool

Place = tuple[int, int, int]  # epoch, shard in the order of this rank and epoch, sample in the shard
_After = tuple[tuple[Place, ...], Place]  # the state after a batch: places that wait, place where reading goes on
_Step = tuple[list[tuple[Place, Sample]], list[Item], _After]  # a batch's samples, what could not be read, the state


class StreamLoader:
    """The batches of one rank, without end and all of them full: behind its last shard the next epoch begins.

    `state_dict()` is the state after the batch that was handed out last; `load_state_dict()` goes on there, with any
    number of workers and any batch size, but with the same world size. What cannot be read is in the "bad" list of a
    batch: a sample under its id, and a shard, of which the rest is lost, under its URL.
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
            urls: of the shards, as `shard_urls` takes them.
            read: makes an item of a clip, as `ClipReader` does, in a worker, to which it travels by pickle.
            collate: makes a batch of items and of a number for each, which chooses among its captions.
            batch_size: rows of a batch, on this rank.
            num_workers: processes that decode, beside a thread that reads; 0: this process does both, without a time
                limit.
            time_limit: seconds that a worker may take for a sample; then the sample is damaged and the worker replaced.
            shuffle_shards: a new order of the shards in every epoch; otherwise the given order.
            shuffle_window: samples, not decoded, that are in memory to be shuffled; 1: the order of the shards.
        Raises:
            ConfigError: there are no shards or fewer than ranks, or a library to read them is not installed.
        """
        self.urls = shard_urls(urls)
        if len(self.urls) < world:
            raise ConfigError(
                f"{len(self.urls)} shards are too few for {world} ranks, as each needs one of its own: pack smaller "
                f"shards, or use {len(self.urls)} ranks"
            )
        if shuffle_window < 1 or batch_size < 1:
            raise ConfigError(f"shuffle_window={shuffle_window} and batch_size={batch_size} must be at least 1")
        self.read, self.collate, self.batch_size = SampleReader(read), collate, batch_size
        self.seed, self.rank, self.world = seed, rank, world
        self.num_workers, self.time_limit, self.pin_memory = num_workers, time_limit, pin_memory
        self.shuffle_shards, self.window = shuffle_shards, shuffle_window
        self._waiting: tuple[Place, ...] = ()  # samples that were read but not handed out yet, in the order to come
        self._next: Place = (0, 0, 0)  # everything from here on is still to come
        self._pool: Pool | None = None
        self._stop = threading.Event()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._stop = threading.Event()
        plan = self._plan()
        if self.num_workers == 0:
            with closing(plan):
                for samples, bad, after in plan:
                    batch = self._collate([self.read(sample) for _, sample in samples], samples, bad)
                    self._waiting, self._next = after
                    yield batch
            return
        if self._pool is None:
            self._pool = Pool(self.read, self.num_workers)
        # beside the training step, one thread waits for the network and another for the workers
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
        """For JSON; its size grows with `shuffle_window`."""
        return {
            "waiting": [list(place) for place in self._waiting],
            "next": list(self._next),
            "world": self.world,
            "rank": self.rank,
            "seed": self.seed,
            "shuffle_shards": self.shuffle_shards,
            "shards": len(self.urls),
            # the signature of a signed URL changes every time
            "names": hashlib.sha256("\n".join(url.split("?")[0] for url in self.urls).encode()).hexdigest(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ConfigError: the state is of another world size, another seed or other shards.
        """
        now = self.state_dict()
        wording = {
            "world": "number of ranks",
            "rank": "rank",
            "seed": "seed",
            "shuffle_shards": "setting of shuffle_shards",
            "shards": "number of shards",
            "names": "checksum of the shards' names",
        }
        if missing := {"waiting", "next", *wording} - state.keys():
            raise ConfigError(
                f"the data cannot be resumed: the state is not of a stream of shards, as it has no {min(missing)}"
            )
        for key, what in wording.items():
            if state[key] != now[key]:
                raise ConfigError(f"the data cannot be resumed: the {what} was {state[key]}, now {now[key]}")
        self._waiting, self._next = tuple(map(tuple, state["waiting"])), tuple(state["next"])

    def close(self) -> None:
        """End the workers and the thread that reads."""
        self._stop.set()
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _take(self, plan: Iterator[_Step]) -> tuple[_Step, list[Future]]:
        """The samples of the next batch, read from the shards and given to the workers."""
        step = next(plan)
        return step, [self._pool.read(sample, self.time_limit) for _, sample in step[0]]

    def _gather(self, taken: Future) -> tuple[dict[str, Any], _After]:
        (samples, bad, after), reading = taken.result()
        return self._collate([future.result() for future in reading], samples, bad), after

    def _collate(self, items: list[Item], samples: list[tuple[Place, Sample]], bad: list[Item]) -> dict[str, Any]:
        batch = self.collate(items, [self._pick(epoch, sample) for (epoch, _, _), sample in samples])
        batch["bad"] = [*bad, *batch["bad"]]
        return pinned(batch) if self.pin_memory else batch

    def _pick(self, epoch: int, sample: Sample) -> int:
        """A random number that is the same in every process."""
        key = repr((self.seed, epoch, sample.name)).encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big")

    def _plan(self) -> Iterator[_Step]:
        """For each batch its samples, what could not be read since the batch before, and the state after it.

        An epoch is cut into windows, and the samples of each are shuffled. The next window fills as fast as the one
        before is handed out, so no more than a window of samples is in memory, and reading does not come in bursts.
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
        """The samples that wait according to the state, and, in the same pass over the shards, those that follow."""
        waiting, read = set(self._waiting), {}
        samples = self._read_from(min([*waiting, self._next]), bad)
        for place, sample in samples:
            if place >= self._next:
                samples = chain([(place, sample)], samples)
                break
            if place in waiting:
                read[place] = sample
        return deque((place, read[place]) for place in self._waiting if place in read), samples

    def _read_from(self, place: Place, bad: list[Item]) -> Iterator[tuple[Place, Sample]]:
        """The samples of this rank in the order of the shards, epoch after epoch; what is no sample goes to `bad`."""
        epoch, first, skip = place
        # Shards that gave nothing since the last sample. All that a rank has in one epoch may be torn, but the next
        # order brings it others. It can go on until all shards that may come to it have failed.
        failed: set[str] = set()
        reason: str | None = None
        while True:
            order = np.arange(len(self.urls))
            if self.shuffle_shards:
                order = np.random.default_rng((self.seed, epoch)).permutation(order)
            mine = [self.urls[i] for i in order[self.rank :: self.world]]
            candidates = set(self.urls if self.shuffle_shards else mine)
            for shard in range(first, len(mine)):
                if skip == 0:  # otherwise it has given samples
                    failed.add(mine[shard])
                for result in read_shard(mine[shard], skip, self._stop):
                    if isinstance(result, Sample):
                        failed.clear()
                        reason = None
                        yield (epoch, shard, result.number), result
                    else:
                        bad.append(result)
                        reason = reason or result["error"]
                skip = 0
                if failed >= candidates:
                    why = reason or "they are empty"
                    raise ConfigError(f"none of the {len(failed)} shards of rank {self.rank} gave a sample: {why}")
            epoch, first = epoch + 1, 0
