"""The samples of tar shards that are read once, front to back, from a disk, a server or a command.

fsspec opens the shards, webdataset runs `pipe:` commands and puts the files of a sample together. Reads that fail are
tried again from the byte where they failed.
"""

import os
import re
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from pe_av.config import ConfigError
from pe_av.data.manifest import Clip, measured
from pe_av.data.shards import sample_clip
from pe_av.workers import Item

PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds to wait before each new attempt at a shard that failed
# errors after which another attempt would fail too
FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
BLOCK = 2**23  # bytes to request from a server at a time, if it serves ranges of a file
BUFFER = 2**18  # bytes to take from an open shard at a time; a multiple of the tar's blocks of 512


@dataclass(frozen=True)
class Sample:
    """A clip with its files in memory."""

    number: int  # in its shard, from 0
    name: str  # SHARD-URL#KEY
    clip: Clip  # its `audio` and `video` are keys of `media`
    media: dict[str, bytes]  # extension, e.g. "mp4" -> content

    @property
    def id(self) -> str:
        return self.clip.id

    @property
    def video(self) -> str:
        """The source that a worker's error names: the sample, since it has no file of its own."""
        return self.name


class SampleReader:
    """Reads a `Sample` with a reader of clips. FFmpeg has to seek, so the content becomes files in memory."""

    def __init__(self, read: Callable[[Clip], Item]):
        self.read = read

    def __call__(self, sample: Sample) -> Item:
        try:
            with ExitStack() as files:
                paths = {end: files.enter_context(_memory_file(data, end)) for end, data in sample.media.items()}
                clip = replace(sample.clip, audio=paths.get(sample.clip.audio), video=paths.get(sample.clip.video))
                # a file for both modalities may lack one of them, and no manifest says so
                item = self.read(measured(clip) if clip.audio == clip.video else clip)
        except (OSError, MemoryError) as error:  # no space for the file
            return {"id": sample.clip.id, "error": f"{sample.name}: {error}"}
        if "error" not in item:
            return item
        error = item["error"]
        for path in paths.values():
            error = error.replace(path, sample.name)
        return item | {"error": error if sample.name in error else f"{sample.name}: {error}"}


def first_samples(urls: str | Sequence[str], limit: int) -> Iterator[Sample]:
    """Up to `limit` samples from the beginning of the shards, in the given order.

    Raises:
        ConfigError: there are none; the message has the first reason.
    """
    names = shard_urls(urls)
    count, reason = 0, None
    for result in chain.from_iterable(map(read_shard, names)):
        if isinstance(result, Sample):
            yield result
            count += 1
            if count == limit:
                return
        else:
            reason = reason or result["error"]
    if not count:
        raise ConfigError(f"none of the {len(names)} shards gave a sample: {reason or 'they are empty'}")


def shard_urls(urls: str | Sequence[str]) -> list[str]:
    """The URLs of shards, in order, with {000..127} and {a,b} expanded, and * looked up except in a command.

    Raises:
        ConfigError: there are no such shards, braces do not match, or a library is missing.
    """
    try:
        import fsspec
        import webdataset  # noqa: F401  to fail now if it is missing, not in the middle of a run
        from braceexpand import UnbalancedBracesError, braceexpand
    except ImportError as error:
        raise ConfigError(f"data.shards needs the library {error.name}; pip install 'pe-av[stream]'") from None
    expanded: list[str] = []
    for pattern in [urls] if isinstance(urls, str) else urls:
        try:
            names = list(braceexpand(pattern))
        except UnbalancedBracesError:
            raise ConfigError(f"{pattern}: the braces do not match; write a range as {{000..127}}") from None
        for name in names:
            if "*" not in name or name.startswith("pipe:"):
                expanded.append(name)
                continue
            try:
                filesystem, path = fsspec.core.url_to_fs(name)
                paths = sorted(filesystem.glob(path))
            except Exception as error:  # every protocol has its own library, with its own errors
                raise ConfigError(f"{name}: cannot be looked up ({_one_line(error)})") from error
            if not paths:
                raise ConfigError(f"{name}: no such shards")
            expanded += [filesystem.unstrip_protocol(path) if "://" in name else path for path in paths]
    if not expanded:
        raise ConfigError("no shards are given; name some, e.g. s3://bucket/train-{000000..000127}.tar")
    return expanded


def read_shard(url: str, skip: int = 0, stop: threading.Event | None = None) -> Iterator[Sample | Item]:
    """The samples of a shard after the first `skip`, and an item {"id", "error"} for each that cannot be used.

    A shard that is missing or cut short yields what is complete, and then an item with the error.

    Args:
        stop: lets another thread end the reading, even while it waits; it then raises a ConfigError.
    """
    from webdataset.tariterators import group_by_keys

    shard_errors: list[str] = []
    repeated: list[str] = []

    def note_repeated(error: Exception) -> bool:
        repeated.append(str(error.args[0]))
        return True  # webdataset goes on with the next file

    files = _read_files(url, stop or threading.Event(), shard_errors)
    for number, group in enumerate(group_by_keys(files, handler=note_repeated)):
        if number < skip:
            continue
        try:
            yield _to_sample(url, number, group)
        except ConfigError as error:
            if not shard_errors:  # otherwise the shard ends in the middle of this sample
                yield {"id": f"{url}#{group['__key__']}", "error": str(error)}
    for reason in shard_errors + repeated[:1]:
        yield {"id": url, "error": f"{url}: {reason}"}


def _to_sample(url: str, number: int, group: dict[str, Any]) -> Sample:
    """A sample from webdataset's {"__key__": key, extension: content}."""
    key = group["__key__"]
    name = f"{url}#{key}"
    files = {extension: (extension, data) for extension, data in group.items() if isinstance(data, bytes)}
    # a signed URL has more behind the shard's name, and a command too
    shard = re.findall(r"[^/\s]+\.tar", url) or [url]
    clip, problems = sample_clip(Path(shard[-1]).stem, key, files)
    damaged = [problem for problem in problems if problem.startswith("its .json is not used")]
    if clip is None or damaged:
        raise ConfigError(f"{name}: {(damaged or problems)[-1]}")
    return Sample(number, name, clip, {end: files[end][1] for end in (clip.audio, clip.video) if end is not None})


def _read_files(url: str, stop: threading.Event, errors: list[str]) -> Iterator[dict[str, Any]]:
    """The files of a shard, as webdataset represents them; if the shard ends early, the reason goes to `errors`."""
    source = _Source(url, stop)
    try:
        with tarfile.open(fileobj=source, mode="r|*", bufsize=BUFFER, tarinfo=_StrictHeader) as tar:
            for member in tar:
                if member.isfile():
                    yield {"fname": member.name, "data": tar.extractfile(member).read(), "__url__": url}
                tar.members = []  # otherwise they pile up
    except ConfigError:
        raise
    except Exception as error:  # every protocol has its own library, with its own errors
        errors.append(_one_line(error))
    finally:
        source.close()


class _StrictHeader(tarfile.TarInfo):
    """tarfile takes a damaged header for the end of the archive, which would silently drop the rest."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_StrictHeader":
        try:
            return super().fromtarfile(tar)
        except tarfile.InvalidHeaderError as error:
            raise tarfile.ReadError(f"the tar is damaged ({error})") from None


class _Source:
    """The bytes of a shard. After a failure it is opened again, with growing pauses, at the byte that was reached."""

    def __init__(self, url: str, stop: threading.Event):
        self.url, self.stop = url, stop
        self._reached = 0
        self._file: Any = None

    def read(self, size: int) -> bytes:
        """The next bytes, at least one and at most `size`.

        Raises:
            EOFError: there are no more; the reader of a complete tar never asks for them.
            ConfigError: the URL cannot be used at all, or the loader is closed.
        """
        for pause in (*PAUSES, None):
            if self.stop.is_set():
                raise ConfigError(f"{self.url}: reading stopped, because the loader is closed")
            try:
                if self._file is None:
                    self._file = _open(self.url, self._reached)
                data = self._file.read(size)
                if not data:
                    self._file.close()  # raises if a command has failed
            except Exception as error:  # every protocol has its own library, with its own errors
                self.close()
                error = _http_cause(error)
                if type(error).__name__ == "NoCredentialsError":
                    raise ConfigError(
                        f"{self.url}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                        "FSSPEC_S3_ANON=true if the bucket is public"
                    ) from None
                if pause is None or _is_final(error) or self.stop.wait(pause):
                    raise error from None
                continue
            if not data:
                raise EOFError(f"the tar ends early, after {self._reached:,} bytes")
            self._reached += len(data)
            return data
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        if self._file is not None:
            with suppress(Exception):  # a command that is cut off here complains, but nothing is lost
                self._file.close()
            self._file = None


def _open(url: str, offset: int) -> Any:
    """A file object that reads a shard from byte `offset` on."""
    if url.startswith("pipe:"):
        import webdataset

        file = webdataset.gopen(url)
    else:
        import fsspec

        try:
            filesystem, path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise ConfigError(f"{url}: {_one_line(error)}") from None
        if "http" in filesystem.protocol:
            import aiohttp

            # One response with the whole rest, because not every server serves ranges. It may take as long as training
            # on it does, hence no total timeout.
            options: dict[str, Any] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=60, sock_read=60)}
            if offset:
                options["headers"] = filesystem.kwargs.get("headers", {}) | {"Range": f"bytes={offset}-"}
            # with any size, fsspec does not ask for it first
            file = filesystem.open(path, "rb", block_size=0, size=1, **options)
            offset = 0 if file.r.status == 206 else offset
        else:
            file = filesystem.open(path, "rb", block_size=BLOCK)
            file.seek(offset)
            offset = 0
    # what could not be skipped is read
    while offset and (skipped := file.read(min(offset, BLOCK))):
        offset -= len(skipped)
    return file


def _http_cause(error: Exception) -> Exception:
    """fsspec reports every failure of an HTTP server as a missing file; the cause says what it was."""
    return error.__cause__ if type(error.__cause__).__module__.startswith("aiohttp") else error


def _is_final(error: Exception) -> bool:
    """Whether another attempt would fail in the same way."""
    status = getattr(error, "status", None)  # of HTTP, where 408 and 429 ask for patience
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, FINAL_ERRORS)


def _one_line(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) or getattr(error, "status", None) == 404:
        return "no such shard"
    text = (str(error) or type(error).__name__).splitlines()[0]
    command = re.search(r"\): exit (-?\d+) \(read\)", text)  # webdataset puts its own arguments into the message
    return f"the command ended with exit status {command[1]}" if command else text


@contextmanager
def _memory_file(content: bytes, extension: str) -> Iterator[str]:
    """The path of a file with this content, in memory where the system allows it; it is deleted afterwards."""
    if hasattr(os, "memfd_create"):
        # It is in no folder, so nothing is left behind even if all processes are killed.
        descriptor = os.memfd_create("clip")
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(content)
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"clip.{extension}")
            path.write_bytes(content)
            yield str(path)
