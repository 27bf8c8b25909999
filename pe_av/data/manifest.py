"""Manifests: which clips there are, where their sound and picture lie, and what is said of them.

One clip per row of a JSONL (.jsonl, .ndjson, .json), CSV or Parquet file, in these columns; any other is left alone:

    path                      file with sound and picture; or, for only one of them or separate files,
    audio, video              file with the sound, file with the picture
    start, end                the part of the file, in seconds; absent: all of it
    caption                   what is said of the clip; in JSONL and Parquet also a list of several
    audio_caption, visual_caption, audio_visual_caption       the same, of what is heard, of what is seen, of both
    seconds                   how long the clip is, for batches of clips of like length
    id, split                 its name (else the path), and the part of the corpus that it belongs to

Relative paths start from the manifest's own folder. `SHARD.tar#OFFSET+SIZE` is a file inside a tar (data/shards.py).
A clip may lack sound, picture or captions, but needs two of the three, unless its row says what it `lacks` or what its
`problem` is, as rows do that were written here: training lists such a clip and goes on.

A manifest of more than ten thousand rows is converted once, a batch of rows at a time, into an Arrow file beside it
(`.clips.jsonl.arrow`; under the user's cache folder where that cannot be written), which is mapped into memory from
then on: every process of a machine reads the same pages, and the system may drop them. The copy knows which file it was
made of, and is made anew when that has changed.

    python -m pe_av.data.manifest IN OUT    converts between the formats, and looks into every file for its length and
                                            for tracks that are missing
"""

import codecs
import csv
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from pe_av.config import CAPTIONS, ConfigError
from pe_av.media.tracks import MediaError, probe

# kind of caption (None: it tells of all) -> column
CAPTION_COLUMNS: dict[str | None, str] = {None: "caption"} | {kind: f"{kind}_caption" for kind in CAPTIONS}
TEXTS = ("id", "audio", "video", "split", "problem", "lacks")
SECONDS = ("start", "end", "seconds")
# 32-bit offsets, half the size of those of large_string, are enough: they begin anew in every batch
SCHEMA = pa.schema(
    {name: pa.string() for name in TEXTS}
    | {name: pa.float64() for name in SECONDS}
    | {name: pa.list_(pa.string()) for name in CAPTION_COLUMNS.values()}
)
FORMATS = {".parquet": "Parquet", ".csv": "CSV", ".jsonl": "JSONL", ".ndjson": "JSONL", ".json": "JSONL"}
BATCH_ROWS, BATCH_CHARACTERS = 10_000, 2**25  # rows that are in memory at a time, and the captions in them
FORMAT = 1  # of the mapped copy: another number makes it anew
SURROGATE = re.compile("[\ud800-\udfff]")  # a lone one, or a byte that is no UTF-8
DAMAGE = re.compile("[\ud800-\udfff\ufffd]")  # in captions also what others have put for such bytes


@dataclass(frozen=True)
class Clip:
    id: str
    audio: str | None = None  # file with the sound
    video: str | None = None  # file with the picture, often the same
    captions: dict[str | None, list[str]] = field(default_factory=dict)  # kind -> texts
    start: float = 0.0  # seconds
    end: float | None = None
    seconds: float | None = None  # how long it is, where the manifest says
    split: str | None = None
    problem: str | None = None  # what of the manifest's row is broken, and so left out
    lacks: str | None = None  # what the row has a place for and is empty: no damage


class Manifest(Sequence[Clip]):
    """The rows of a manifest, of which `manifest[i]` makes a `Clip`; pickled, one of many rows is only its path."""

    def __init__(
        self,
        table: pa.Table,
        folder: str | Path = ".",
        rows: np.ndarray | None = None,
        stored: tuple[str, bytes] | None = None,
    ):
        """
        Args:
            table: with the columns of `SCHEMA`, in memory or mapped.
            folder: where relative paths start from.
            rows: ascending numbers of those rows of the table that belong to it; None: all.
            stored: the file that the table is mapped from, and what that was made of.
        """
        self.table, self.folder, self.rows, self.stored = table, str(folder), rows, stored
        self._batches = table.to_batches()
        self._starts = [0, *accumulate(len(batch) for batch in self._batches)]

    @classmethod
    def of(cls, clips: Iterable[Clip], folder: str | Path = ".") -> "Manifest":
        return cls(pa.Table.from_batches(_in_batches(_values(clip) for clip in clips), SCHEMA), folder)

    def __len__(self) -> int:
        return len(self.table) if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> Clip:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = index % len(self) if self.rows is None else int(self.rows[index])
        number = bisect_right(self._starts, row) - 1
        return _clip(self._batches[number].slice(row - self._starts[number], 1).to_pylist()[0], self.folder)

    def __iter__(self) -> Iterator[Clip]:
        for batch in self._columns(*SCHEMA.names):
            for piece in range(0, len(batch), 1000):  # as Python objects, a batch is several times as large
                yield from (_clip(row, self.folder) for row in batch.slice(piece, 1000).to_pylist())

    def __reduce__(self) -> tuple[Any, ...]:
        if self.stored is None:
            return Manifest, (self.table, self.folder, self.rows)
        return _reopened, (self.stored, self.folder, self.rows)

    def select(self, split: str) -> "Manifest":
        """The clips of one split, without a copy of them.

        Raises:
            ConfigError: there are none.
        """
        chosen = self._gather(lambda batch: pc.fill_null(pc.equal(batch["split"], split), False), bool, "split")
        if not chosen.any():
            found = {name for batch in self._columns("split") for name in pc.unique(batch["split"]).to_pylist()}
            known = ", ".join(sorted(filter(None, found))) or "none"
            raise ConfigError(f"no clips of split={split}: the manifest has {known}")
        rows = np.flatnonzero(chosen) if self.rows is None else self.rows[chosen]
        smallest = np.int32 if len(self.table) < 2**31 else np.int64
        return Manifest(self.table, self.folder, rows.astype(smallest), self.stored)

    def texts(self) -> Iterator[str]:
        """All captions of all kinds."""
        for column in CAPTION_COLUMNS.values():
            for batch in self._columns(column):
                yield from batch[column].flatten().to_pylist()

    def lengths(self, max_seconds: float) -> np.ndarray | None:
        """(N,) float32 seconds that each clip lasts, `max_seconds` at most, and that where nobody knows: those clips
        are put with the longest. None where the manifest says of no clip how long it is."""

        def known(batch: pa.RecordBatch) -> pa.Array:
            return pc.or_(batch["seconds"].is_valid(), batch["end"].is_valid())

        def length(batch: pa.RecordBatch) -> pa.Array:
            part = pc.subtract(batch["end"], pc.coalesce(batch["start"], 0.0))
            # a part cannot outlast its file
            return pc.min_element_wise(batch["seconds"], part, float(max_seconds), skip_nulls=True)

        if not self._gather(known, bool, "seconds", "end").any():
            return None
        return self._gather(length, np.float32, *SECONDS)

    def modalities(self) -> np.ndarray:
        """(N,) uint8, which of sound (4), picture (2) and captions (1) each clip has."""
        sound, picture = (self._gather(lambda b, n=n: b[n].is_valid(), np.uint8, n) for n in ("audio", "video"))
        return 4 * sound + 2 * picture + np.any(list(self.kinds().values()), axis=0)

    def kinds(self) -> dict[str | None, np.ndarray]:
        """Kind of caption (None: it tells of all) -> (N,) bool, which clips have captions of that kind."""
        return {
            kind: self._gather(lambda b, c=column: pc.greater(pc.list_value_length(b[c]).fill_null(0), 0), bool, column)
            for kind, column in CAPTION_COLUMNS.items()
        }

    def write(self, path: str | Path) -> None:
        """To a file of the format that its name says; paths below its folder are written relative to it.

        Raises:
            ConfigError: it cannot be written there, or the format has no place for what a clip has. A file that was
                there before then still is: the new one takes its place when it is complete.
        """
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.part")
        try:
            self._write(unfinished, _format(path), path)
            os.replace(unfinished, path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from None
        finally:
            with suppress(OSError):
                unfinished.unlink()

    def _write(self, unfinished: Path, form: str, path: Path) -> None:
        folder = os.path.abspath(path.parent)

        def rows() -> Iterator[dict[str, Any]]:
            return ({k: v for k, v in _entry(clip, folder).items() if v is not None} for clip in self)

        if form == "Parquet":
            empty = {name for name in SCHEMA.names if all(b[name].null_count == len(b) for b in self._columns(name))}
            schema = pa.schema([column for column in SCHEMA if column.name not in empty]) if len(self) else SCHEMA
            with pq.ParquetWriter(unfinished, schema) as writer:
                for batch in _in_batches(check_row(row, str(path)) for row in rows()):
                    writer.write_batch(batch.select(schema.names))
        elif form == "CSV":
            with unfinished.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows() for key in _single(row, path))))
                writer.writeheader()
                writer.writerows(rows())
        else:
            with unfinished.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows())

    def _columns(self, *names: str) -> Iterator[pa.RecordBatch]:
        """These columns of its rows, a batch at a time."""
        for batch, start in zip(self._batches, self._starts, strict=False):
            batch = batch.select(names)
            if self.rows is not None:
                first, last = np.searchsorted(self.rows, (start, start + len(batch)))
                batch = batch.take(pa.array(self.rows[first:last] - start))
            yield batch

    def _gather(self, function: Any, dtype: Any, *names: str) -> np.ndarray:
        """(N,) what a function makes of these columns, computed a batch at a time."""
        found, at = np.empty(len(self), dtype), 0
        for batch in self._columns(*names):
            found[at : at + len(batch)] = function(batch).to_numpy(zero_copy_only=False)
            at += len(batch)
        return found


# ---------------------------------------------------------------------------------------------------------------------
# opening


def read_manifest(path: str | Path, split: str | None = None) -> Manifest:
    """The clips of a manifest; its format is told by its name.

    Captions that are not UTF-8 are left out, which the clip's `problem` then says, and so are empty ones, which its
    `lacks` says.

    Args:
        split: only the clips of this one; None: all.
    Raises:
        ConfigError: no such file or format, no clips, a row that cannot be a clip, ids that stand more than once, or
            no room for the copy that is mapped; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such manifest")
    manifest = _opened(path)
    return manifest if split is None else manifest.select(split)


def _format(path: Path) -> str:
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{path}: no format of a manifest is named so; its name must end in {', '.join(FORMATS)}")
    return FORMATS[path.suffix.lower()]


def _opened(path: Path) -> Manifest:
    stamp = _stamp(path)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pe_av"
    name = hashlib.blake2b(os.fsencode(os.path.realpath(path)), digest_size=8).hexdigest()
    places = [path.with_name(f".{path.name}.arrow"), cache / f"{path.name}.{name}.arrow"]
    if (copy := _copy(path, places, stamp)) is not None:
        return copy
    with path.open("rb") as file:
        # One process of a machine converts while the others wait. The lock is on the manifest itself, so that nothing
        # is left behind, and it ends with its process. Some network file systems have none: then each converts.
        locked = False
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        if (copy := _copy(path, places, stamp)) is not None:  # made by another process, while this one waited
            return copy
        start = list(islice(_batches(path), 2))
        if not start:
            raise ConfigError(f"{path}: holds no clips")
        if len(start) == 1:
            manifest = Manifest(pa.Table.from_batches(start), path.parent)
            _refuse_repeated(manifest, path)
            return manifest
        reasons = []
        for place in places:
            if locked:  # so nobody is at work on what an interrupted conversion has left
                with suppress(OSError):
                    for left in place.parent.glob(f"{glob.escape(place.name)}.*.part"):
                        left.unlink()
            try:
                return _converted(path, place, stamp)
            except OSError as error:
                reasons.append(f"{place.parent}: {error.strerror or error}")
    raise ConfigError(
        f"{path}: no room for the copy of it that is mapped into memory ({'; '.join(reasons)}); make room there, or "
        "set XDG_CACHE_HOME to a folder that has some"
    )


def _stamp(path: Path) -> bytes:
    """Which file it is, as far as that can be told without reading it."""
    status = path.stat()
    return json.dumps({"format": FORMAT, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}).encode()


def _mapped(place: Path, stamp: bytes) -> pa.Table | None:
    """The table in a copy; None where it is not there, or not of this file."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(place)))
        return reader.read_all() if (reader.schema.metadata or {}).get(b"made_of") == stamp else None
    except (OSError, pa.ArrowException):
        return None


def _copy(path: Path, places: Sequence[Path], stamp: bytes) -> Manifest | None:
    """The manifest from the first of the places that has a copy of it."""
    for place in places:
        if (table := _mapped(place, stamp)) is not None:
            return Manifest(table, path.parent, stored=(str(place.absolute()), stamp))
    return None


def _reopened(stored: tuple[str, bytes], folder: str, rows: np.ndarray | None) -> Manifest:
    """What a pickled manifest becomes in another process."""
    table = _mapped(Path(stored[0]), stored[1])
    if table is None:
        raise ConfigError(f"{stored[0]}: gone, or made anew, because the manifest has changed: start again")
    return Manifest(table, folder, rows, stored)


def _converted(path: Path, place: Path, stamp: bytes) -> Manifest:
    """The manifest, from a copy that it is converted into.

    Raises:
        OSError: no room or no permission there.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(".part", f"{place.name}.", place.parent)
    os.close(descriptor)
    try:
        with pa.ipc.new_file(unfinished, SCHEMA.with_metadata({"made_of": stamp})) as file:
            for batch in track(_batches(path), f"converting {path.name}", console=Console(stderr=True)):
                file.write_batch(batch)
        if _stamp(path) != stamp:
            raise ConfigError(f"{path}: changed while it was read; start again when it is complete")
        _refuse_repeated(Manifest(_mapped(Path(unfinished), stamp)), path)
        shutil.copymode(path, unfinished)  # who may read the manifest may read the copy
        os.replace(unfinished, place)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return _copy(path, [place], stamp)


def _refuse_repeated(manifest: Manifest, path: Path) -> None:
    """
    Raises:
        ConfigError: ids that stand more than once.
    """
    # 64-bit hashes, so that the memory is bounded; ids are compared where those are equal
    names = (name for batch in manifest._columns("id") for name in batch["id"].to_pylist())
    hashes = np.fromiter(map(hash, names), np.int64, len(manifest))
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    same = np.flatnonzero(hashes[1:] == hashes[:-1])
    repeated, example, last = 0, (len(manifest), 0, ""), None
    seen: dict[str, int] = {}
    for at in np.union1d(same, same + 1):
        if hashes[at] != last:
            last, seen = hashes[at], {}
        row = int(order[at])
        name = manifest[row].id
        if name in seen:
            repeated += 1
            example = min(example, (seen[name], row, name))
        seen.setdefault(name, row)
    if repeated:
        first, second, name = example
        raise ConfigError(
            f"{path}: {repeated} ids stand more than once, such as {name!r} in the clips {first + 1} and {second + 1}; "
            "give every clip its own"
        )


# ---------------------------------------------------------------------------------------------------------------------
# rows


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    read = {"Parquet": _parquet_rows, "CSV": _csv_rows, "JSONL": jsonl_rows}[_format(path)]
    try:
        yield from _in_batches(check_row(row, where) for where, row in read(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None


def _in_batches(rows: Iterable[list[Any]]) -> Iterator[pa.RecordBatch]:
    """Rows of `SCHEMA`, as lists, a bounded number at a time."""
    rows = iter(rows)
    while True:
        # by columns at once: ten thousand lists that live on would keep the garbage collector busy half of the time
        columns: list[list[Any]] = [[] for _ in SCHEMA]
        characters = 0
        for row in islice(rows, BATCH_ROWS):
            for column, value in zip(columns, row, strict=True):
                column.append(value)
            characters += sum(sum(map(len, texts)) for texts in row[-len(CAPTION_COLUMNS) :] if texts)
            if characters >= BATCH_CHARACTERS:
                break
        if not columns[0]:
            return
        arrays = [pa.array(values, kind) for values, kind in zip(columns, SCHEMA.types, strict=True)]
        yield pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def _values(clip: Clip) -> list[Any]:
    told = [getattr(clip, name) for name in (*TEXTS, *SECONDS)]
    return told + [clip.captions.get(kind) or None for kind in CAPTION_COLUMNS]


def jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, its object) for every line that is not blank. Bytes that are no UTF-8 become lone surrogates.

    Raises:
        ConfigError: a line is no object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            try:
                # JSON may hold lone surrogates too ("\ud800")
                row = json.loads(line.decode("utf-8", "surrogateescape"))
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                raise ConfigError(f"{path}:{number}: not JSON ({reason}); one object per line") from None
            if not isinstance(row, dict):
                raise ConfigError(f'{path}:{number}: not an object; a line is {{"path": …, "caption": …}}')
            yield f"{path}:{number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**30)
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        try:
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            _refuse_twins(reader.fieldnames, path)
            for row in reader:
                where = f"{path}:{reader.line_num}"
                yield where, {key: _number(key, value, where) for key, value in row.items() if key and value}
        except csv.Error as error:
            raise ConfigError(f"{path}:{reader.line_num}: not CSV ({error})") from None


def _refuse_twins(names: Sequence[str], path: Path) -> None:
    for name in ("path", *SCHEMA.names):
        if names.count(name) > 1:
            raise ConfigError(f"{path}: has {names.count(name)} columns named {name}; leave one, or name it otherwise")


def _number(key: str, value: str, where: str) -> float | str:
    if key not in SECONDS:
        return value
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"{where}: {key}={value} is not a number of seconds") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        # a buffer: else whole row groups are held, and there are files with only one
        with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            names = [name for name in file.schema_arrow.names if name == "path" or name in SCHEMA.names]
            if not names:
                raise ConfigError(f"{path}: has no column of a manifest, such as path or caption")
            _refuse_twins(names, path)
            number = 0
            for batch in file.iter_batches(1000, columns=names):
                columns = [
                    batch[name].cast(pa.float64()).to_pylist() if name in SECONDS else _texts(batch[name])
                    for name in names
                ]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield f"{path}: row {number}", dict(zip(names, values, strict=True))
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not a manifest ({str(error).splitlines()[0]})") from error


def _texts(column: pa.Array) -> list[Any]:
    """The values of a Parquet column, in which bytes that are no UTF-8 become lone surrogates."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        is_list = pa.types.is_nested(column.type)
        rows = column.cast(pa.list_(pa.binary()) if is_list else pa.binary()).to_pylist()
        return [[_decoded(text) for text in row] if isinstance(row, list) else _decoded(row) for row in rows]


def _decoded(text: bytes | None) -> str | None:
    return None if text is None else text.decode("utf-8", "surrogateescape")


def check_row(row: dict[str, Any], where: str) -> list[Any]:
    """The values of a row of `SCHEMA`, without the captions that cannot be used.

    Raises:
        ConfigError: it cannot be a clip.
    """
    path, audio, video = files = row.get("path"), row.get("audio"), row.get("video")
    for name, file in zip(("path", "audio", "video"), files, strict=True):
        if file is not None and (not isinstance(file, str) or not file):
            raise ConfigError(f'{where}: no text under "{name}"; a clip needs "path", or "audio" or "video"')
    start, end, _ = seconds = [row.get(name) for name in SECONDS]
    for name, value in zip(SECONDS, seconds, strict=True):
        if value is not None and not (_is_time(value) or (name == "end" and value == math.inf)):
            raise ConfigError(f"{where}: {name}={value} is not a number of seconds")
    if end is not None and end <= (start or 0):
        raise ConfigError(f"{where}: end={end} is not after start={start or 0}")
    problems, lacks = ([row[name]] if isinstance(row.get(name), str) else [] for name in ("problem", "lacks"))
    captions: list[list[str] | None] = []
    for column in CAPTION_COLUMNS.values():
        texts = row.get(column)
        texts = [texts] if isinstance(texts, str) else texts or []
        if not isinstance(texts, list):
            raise ConfigError(f'{where}: no text under "{column}"; it is a caption or a list of them')
        kept = []
        for text in texts:
            if not isinstance(text, str):
                raise ConfigError(f'{where}: no text under "{column}"; it is a caption or a list of them')
            if not text.isascii() and DAMAGE.search(text):
                problems.append(f"the {column} is not UTF-8")
            elif not text or text.isspace():
                lacks.append(f"the {column} is empty")
            else:
                kept.append(text)
        captions.append(kept or None)
    audio, video = audio or path, video or path
    # what an empty or damaged caption leaves has said so: it was read once, and so must what is written of it
    told = bool(any(captions) or problems or lacks)
    if not (audio or video) or (audio is not None) + (video is not None) + told < 2:
        raise ConfigError(f'{where}: nothing to pair; a clip needs two of sound, picture and caption, e.g. "path": …')
    # in CSV, what is empty is not there
    name, split = (None if row.get(key) == "" else row.get(key) for key in ("id", "split"))
    if name is None:
        name = (path or audio or video) + (f"@{start:g}" if start else "")
    texts = [str(name), audio, video, None if split is None else str(split)]
    texts += ["; ".join(problems) or None, "; ".join(lacks) or None]
    for name, text in zip(TEXTS, texts, strict=True):
        if text is not None and not text.isascii() and SURROGATE.search(text):
            raise ConfigError(f"{where}: the {name} {ascii(text)} is not UTF-8; correct it, or save the file as UTF-8")
    return texts + seconds + captions


def _is_time(value: Any) -> bool:
    """Whether it is seconds that float64 can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 2**53


def checked_clip(row: dict[str, Any], where: str) -> Clip:
    """The clip that a row makes, with its paths as they stand there.

    Raises:
        ConfigError: it cannot be one.
    """
    return _clip(dict(zip(SCHEMA.names, check_row(row, where), strict=True)), "")


def _clip(row: dict[str, Any], folder: str) -> Clip:
    """Of the values of `SCHEMA`, by name."""
    captions = {kind: row.pop(column) for kind, column in CAPTION_COLUMNS.items()}
    row["captions"] = {kind: texts for kind, texts in captions.items() if texts}
    for name in ("audio", "video"):
        row[name] = None if row[name] is None else os.path.join(folder, row[name])
    return Clip(**row | {"start": row["start"] or 0.0})


def _entry(clip: Clip, folder: str) -> dict[str, Any]:
    """A clip as a row of a file in `folder`, an absolute path."""
    audio, video = (None if p is None else _relative(p, folder) for p in (clip.audio, clip.video))
    files = {"path": audio} if audio == video else {"audio": audio, "video": video}
    texts = {CAPTION_COLUMNS[kind]: t[0] if len(t) == 1 else t for kind, t in clip.captions.items()}
    row = {"id": clip.id, "split": clip.split, **files, "start": clip.start or None, "end": clip.end}
    return row | {"seconds": clip.seconds, "problem": clip.problem, "lacks": clip.lacks} | texts


def _relative(path: str, folder: str) -> str:
    path = os.path.abspath(path)
    return path.removeprefix(os.path.join(folder, ""))


def _single(row: dict[str, Any], path: Path) -> dict[str, Any]:
    if any(isinstance(value, list) for value in row.values()):
        raise ConfigError(
            f"{path}: {row['id']} has several captions of a kind, for which CSV has no place; use .parquet"
        )
    return row


# ---------------------------------------------------------------------------------------------------------------------
# looking into files


def measure(manifest: Manifest, threads: int = 8) -> Manifest:
    """The same clips with the length of each, and without the tracks that its files lack.

    What cannot be opened stays as it is: decoding it will name the reason.
    """
    clips = iter(track(manifest, "looking", total=len(manifest), console=Console(stderr=True)))
    with ThreadPoolExecutor(threads) as pool:  # opening a file waits for the disk, and decodes nothing
        pieces = iter(lambda: list(islice(clips, 1000)), [])  # the pool would take all clips at once
        return Manifest.of((clip for piece in pieces for clip in pool.map(measured, piece)), manifest.folder)


def measured(clip: Clip) -> Clip:
    """The clip with its length, and without the tracks that its files lack.

    Where that leaves less than two things to pair, its `lacks` says so; where it leaves no file, the clip stays as
    it is, and decoding it will name the reason.
    """
    found: dict[str, Any] = {}
    lengths = []
    for kind in ("audio", "video"):
        source = getattr(clip, kind)
        if source is None:
            continue
        try:
            tracks = probe(source)
        except MediaError:
            continue
        if kind not in tracks:
            found[kind] = None
        elif tracks[kind] is not None:
            lengths.append(max(min(tracks[kind], clip.end or tracks[kind]) - clip.start, 0.0))
    clean = replace(clip, **found, seconds=max(lengths, default=clip.seconds))
    left = (clean.audio is not None) + (clean.video is not None)
    if not left:
        return clip
    if found and left + bool(clip.captions) < 2:
        told = [clip.lacks] if clip.lacks else []
        return replace(clean, lacks="; ".join([*told, f"its file has no {next(iter(found))} track"]))
    return clean


def main(arguments: Sequence[str]) -> None:
    """python -m pe_av.data.manifest IN OUT"""
    if len(arguments) != 2:
        sys.exit(f"usage: {main.__doc__}")
    try:
        out = Path(arguments[1])
        _format(out)  # looking into every file can take hours
        if not out.parent.is_dir():
            raise ConfigError(f"{out}: cannot be written (no such folder)")
        manifest = measure(read_manifest(arguments[0]))
        manifest.write(out)
    except ValueError as error:
        sys.exit(f"error: {error}")
    lengths = manifest.lengths(math.inf)
    known = np.zeros(0) if lengths is None else lengths[np.isfinite(lengths)]
    unknown = f", {len(manifest) - len(known)} of unknown length" if len(known) < len(manifest) else ""
    hours = known.sum(dtype=float) / 3600
    print(f"{len(manifest)} clips, {hours:.2f} hours{unknown}, written to {arguments[1]}")


if __name__ == "__main__":
    main(sys.argv[1:])
