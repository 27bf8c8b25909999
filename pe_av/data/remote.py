"""Samples of tar shards that are read once through, front to back, from wherever they lie."""

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
    clip, wrong = sample_clip(Path(shard[-1]).stem, key, files)
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
