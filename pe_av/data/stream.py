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
import os
import re
import tarfile
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ConfigError
from .loader import AHEAD, Item, Pool, _pinned, start_pool
from .manifest import Clip, measured
from .shards import clip_of

PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds before a shard that failed is opened again
FINAL = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ValueError,
)  # waiting changes nothing
BLOCK = 2**23  # bytes that are asked of a server at a time, where it gives parts of a file
BUFFER = 2**18  # bytes that are taken from an open shard at a time

Place = tuple[int, int, int]  # epoch, shard in the order of this rank and epoch, sample in the shard


@dataclass(frozen=True)
class Sample:
    number: int  # in its shard, from 0
    name: str  # SHARD-URL#KEY
    clip: Clip  # whose audio and video are the endings of the files below
    media: dict[str, bytes]  # ending, as "mp4" -> content

    @property
    def id(self) -> str:
        return self.clip.id

    @property
    def video(self) -> str:
        """What a loader names where reading fails: the clip's own file is only in memory."""
        return self.name


class SampleReader:
    """Reads a `Sample` with what reads the clips of a manifest, by way of files in memory, as FFmpeg must seek."""

    def __init__(self, read: Callable[[Clip], Item]):
        self.read = read

    def __call__(self, sample: Sample) -> Item:
        try:
            with ExitStack() as files:
                paths = {end: files.enter_context(_file(content, f".{end}")) for end, content in sample.media.items()}
                clip = replace(sample.clip, audio=paths.get(sample.clip.audio), video=paths.get(sample.clip.video))
                # no manifest has told which of sound and picture the one file has
                item = self.read(measured(clip) if clip.audio == clip.video else clip)
        except (OSError, MemoryError) as error:  # no room for the file
            return {"id": sample.clip.id, "error": f"{sample.name}: {error}"}
        if "error" not in item:
            return item
        error = item["error"]
        for path in paths.values():
            error = error.replace(path, sample.name)
        return item | {"error": error if sample.name in error else f"{sample.name}: {error}"}


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


# ---------------------------------------------------------------------------------------------------------------------
# what a stream begins with


def first_samples(urls: str | Sequence[str], limit: int) -> Iterator[Sample]:
    """The first samples of the shards in the order in which they are given.

    Raises:
        ConfigError: there are none; with the first reason.
    """
    names = shard_urls(urls)
    count, reasons = 0, []
    for found in chain.from_iterable(map(read_shard, names)):
        if isinstance(found, Sample):
            yield found
            count += 1
            if count == limit:
                return
        else:
            reasons = reasons or [found["error"]]
    if not count:
        raise ConfigError(f"none of the {len(names)} shards gave a sample: {(reasons or ['they are empty'])[0]}")


# ---------------------------------------------------------------------------------------------------------------------
# shards


def shard_urls(urls: str | Sequence[str]) -> list[str]:
    """Braces as {000..127} and {a,b} written out, and names with * in them looked up; in order.

    Raises:
        ConfigError: nothing there, braces that do not match, or a library that is missing.
    """
    try:
        import fsspec
        import webdataset  # noqa: F401  so that it is missed now, and not in the middle of a run
        from braceexpand import UnbalancedBracesError, braceexpand
    except ImportError as error:
        raise ConfigError(f"reading shards as a stream needs {error.name}: pip install 'pe-av[stream]'") from None
    found: list[str] = []
    for given in [urls] if isinstance(urls, str) else urls:
        try:
            names = list(braceexpand(given))
        except UnbalancedBracesError:
            raise ConfigError(f"{given}: the braces do not match; a range is {{000..127}}") from None
        for name in names:
            if "*" not in name or name.startswith("pipe:"):
                found.append(name)
                continue
            try:
                filesystem, path = fsspec.core.url_to_fs(name)
                there = sorted(filesystem.glob(path))
            except Exception as error:  # each protocol has a library, and that its own errors
                raise ConfigError(f"{name}: cannot be looked up: {_line(error)}") from error
            if not there:
                raise ConfigError(f"{name}: no such shards")
            found += [filesystem.unstrip_protocol(path) if "://" in name else path for path in there]
    if not found:
        raise ConfigError("no shards are given: name some, e.g. s3://bucket/train-{000000..000127}.tar")
    return found


def read_shard(url: str, skip: int = 0, stop: threading.Event | None = None) -> Iterator[Sample | Item]:
    """The samples of a shard after the first `skip`, and an item with an "error" for what is none.

    Network errors are waited for. A shard that is not there or is torn gives what was whole, and then an error.

    Args:
        stop: ends the reading, with a ConfigError, when another thread sets it.
    """
    from webdataset.tariterators import group_by_keys

    torn: list[str] = []
    repeated: list[str] = []

    def again(error: Exception) -> bool:
        repeated.append(str(error.args[0]))
        return True  # webdataset goes on with the next file

    files = _files(url, stop or threading.Event(), torn)
    for number, found in enumerate(group_by_keys(files, handler=again)):
        if number < skip:
            continue
        try:
            yield _sample(url, number, found)
        except ConfigError as error:
            if not torn:  # else this is the one in which the shard ends
                yield {"id": f"{url}#{found['__key__']}", "error": str(error)}
    for reason in torn + repeated[:1]:
        yield {"id": url, "error": f"{url}: {reason}"}


def _sample(url: str, number: int, found: dict[str, Any]) -> Sample:
    """Of what webdataset has put together: {"__key__", ending without dot: content}."""
    key = found["__key__"]
    name = f"{url}#{key}"
    files = {end: (end, content) for end, content in found.items() if isinstance(content, bytes)}
    shard = re.findall(r"[^/\s]+\.tar", url) or [url]  # a command may say more after it, and a signed URL too
    clip, wrong = clip_of(Path(shard[-1]), key, files)
    damaged = [complaint for complaint in wrong if complaint.startswith("its .json")]
    if clip is None or damaged:
        raise ConfigError(f"{name}: {(damaged or wrong)[-1]}")
    media = {end: files[end][1] for end in (clip.audio, clip.video) if end is not None}
    return Sample(number, name, clip, media)


def _files(url: str, stop: threading.Event, torn: list[str]) -> Iterator[dict[str, Any]]:
    """The files in a shard, as webdataset passes them on; `torn` gets the reason where it ends early."""
    source = _Source(url, stop)
    try:
        with tarfile.open(fileobj=source, mode="r|*", tarinfo=_Header) as tar:
            for member in tar:
                if member.isfile():
                    yield {"fname": member.name, "data": tar.extractfile(member).read(), "__url__": url}
                tar.members = []  # else they would pile up
    except ConfigError:
        raise
    except Exception as error:  # each protocol has a library, and that its own errors
        torn.append(_line(error))
    finally:
        source.close()


class _Header(tarfile.TarInfo):
    """tarfile takes a damaged header for the end of the archive, and would lose the rest without a word."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(tar)
        except tarfile.InvalidHeaderError as error:
            raise tarfile.ReadError(f"the tar is damaged ({error})") from None


class _Source:
    """The bytes of a shard; where reading fails, it is opened again after a pause and read on from the same byte."""

    def __init__(self, url: str, stop: threading.Event):
        self.url, self.stop = url, stop
        self._at = 0
        self._file: Any = None
        self._block, self._begin = b"", 0  # what was read at once, and how much of it was handed out

    def read(self, size: int) -> bytes:
        """Some of the next bytes, `size` at most.

        Raises:
            EOFError: there are no more. A whole tar is known to end before its last.
            ConfigError: the URL cannot be used at all.
        """
        if self._begin == len(self._block):
            self._block, self._begin = self._read_block(), 0
        part = self._block[self._begin : self._begin + size]
        self._begin += len(part)
        return part

    def _read_block(self) -> bytes:
        for pause in (*PAUSES, None):
            if self.stop.is_set():
                raise ConfigError(f"{self.url}: not read any more, as the loader is closed")
            try:
                if self._file is None:
                    self._file = _open(self.url, self._at)
                data = self._file.read(BUFFER)
                if not data:
                    self._file.close()  # raises if a command has failed
            except Exception as error:  # each protocol has a library, and that its own errors
                self.close()
                error = _cause(error)
                if type(error).__name__ == "NoCredentialsError":
                    raise ConfigError(
                        f"{self.url}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                        "FSSPEC_S3_ANON=true if everyone may read it"
                    ) from None
                if pause is None or _is_final(error) or self.stop.wait(pause):
                    raise error from None
                continue
            if not data:
                raise EOFError(f"the tar ends early, after {self._at:,} bytes")
            self._at += len(data)
            return data
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        if self._file is not None:
            with suppress(Exception):  # a command that is cut off here complains, though nothing is lost
                self._file.close()
            self._file = None


def _open(url: str, at: int) -> Any:
    """A file to be read from byte `at` on."""
    if url.startswith("pipe:"):
        import webdataset

        file = webdataset.gopen(url)
    else:
        import fsspec

        try:
            filesystem, path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise ConfigError(f"{url}: {_line(error)}") from None
        if "http" in filesystem.protocol:
            import aiohttp

            # one answer with all of it, since not every server gives parts; it may take as long as training on it does
            how: dict[str, Any] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=60, sock_read=60)}
            if at:
                how["headers"] = filesystem.kwargs.get("headers", {}) | {"Range": f"bytes={at}-"}
            file = filesystem.open(path, "rb", block_size=0, size=1, **how)  # any size: it is not asked for beforehand
            at = 0 if file.r.status == 206 else at
        else:
            file = filesystem.open(path, "rb", block_size=BLOCK)
            file.seek(at)
            at = 0
    while at and (passed := file.read(min(at, BLOCK))):
        at -= len(passed)
    return file


def _cause(error: Exception) -> Exception:
    """fsspec calls whatever an HTTP server fails in a missing file; what it was is the cause."""
    return error.__cause__ if type(error.__cause__).__module__.startswith("aiohttp") else error


def _is_final(error: Exception) -> bool:
    """Whether to try again would change nothing."""
    status = getattr(error, "status", None)  # of HTTP; 408 and 429 ask for patience
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, FINAL)


def _line(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) or getattr(error, "status", None) == 404:
        return "no such shard"
    text = (str(error) or type(error).__name__).splitlines()[0]
    command = re.search(r"\): exit (-?\d+) \(read\)", text)  # webdataset's message shows its own arguments
    return f"the command ended with exit status {command[1]}" if command else text


# ---------------------------------------------------------------------------------------------------------------------
# samples


@contextmanager
def _file(content: bytes, ending: str) -> Iterator[str]:
    """The path of a file in memory with this content, which is gone afterwards."""
    if hasattr(os, "memfd_create"):
        # has no name in any folder, so nothing stays behind even if this process and all others are killed
        descriptor = os.memfd_create("clip")
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(content)
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"clip{ending}")
            path.write_bytes(content)
            yield str(path)


def _number(*parts: Any) -> int:
    """The same for the same parts, in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big")
