"""The files that a manifest can be: JSONL, CSV and Parquet, how they are read, checked and written.

Every format becomes rows of the one `SCHEMA`. A row with a caption that cannot be used keeps its place and says what is
wrong; a row that cannot be a clip is an error that names the file and the line.
"""

import codecs
import csv
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pe_av.config import CAPTIONS, ConfigError

# kind of caption (None: one caption of everything) -> column
CAPTION_COLUMNS: dict[str | None, str] = {None: "caption"} | {kind: f"{kind}_caption" for kind in CAPTIONS}
TEXT_COLUMNS = ("id", "audio", "video", "split", "problem", "lacks")
TIME_COLUMNS = ("start", "end", "seconds")
# string has 32-bit offsets, half the size of large_string's; they suffice, because they start anew in every batch
SCHEMA = pa.schema(
    {name: pa.string() for name in TEXT_COLUMNS}
    | {name: pa.float64() for name in TIME_COLUMNS}
    | {name: pa.list_(pa.string()) for name in CAPTION_COLUMNS.values()}
)
FORMATS = {".parquet": "Parquet", ".csv": "CSV", ".jsonl": "JSONL", ".ndjson": "JSONL", ".json": "JSONL"}
BATCH_ROWS, BATCH_CHARACTERS = 10_000, 2**25  # the most rows, and characters of captions, in memory at a time
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, which also stands for a byte that is not UTF-8
REPLACED = re.compile("[\ud800-\udfff\ufffd]")  # or the character that another program put in place of such a byte

Rows = Iterator[tuple[str, dict[str, Any]]]  # (file and line, column -> value)


def format_of(path: Path) -> str:
    """The format that the ending of a name stands for: "Parquet", "CSV" or "JSONL".

    Raises:
        ConfigError: an unknown ending.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{path}: unknown format of a manifest; its name must end in {', '.join(FORMATS)}")
    return FORMATS[path.suffix.lower()]


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The checked rows of a manifest, a bounded number at a time.

    Raises:
        ConfigError: the file cannot be read, or a row cannot be a clip.
    """
    read = {"Parquet": _parquet_rows, "CSV": _csv_rows, "JSONL": jsonl_rows}[format_of(path)]
    try:
        yield from to_batches(check_row(row, where) for where, row in read(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None


def to_batches(rows: Iterable[list[Any]]) -> Iterator[pa.RecordBatch]:
    """Rows, each a list of values in the order of `SCHEMA`, to Arrow batches."""
    rows = iter(rows)
    while True:
        # collected by column: ten thousand lists that stay alive would keep the garbage collector busy half the time
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


# ---------------------------------------------------------------------------------------------------------------------
# checking


def check_row(row: dict[str, Any], where: str) -> list[Any]:
    """The values of a row in the order of `SCHEMA`.

    Captions that are empty or not UTF-8 are dropped, and noted under "lacks" or "problem".

    Args:
        where: file and line, for messages.
    Raises:
        ConfigError: the row cannot be a clip.
    """
    for name in ("path", "audio", "video"):
        source = row.get(name)
        if source is not None and (not isinstance(source, str) or not source):
            raise ConfigError(f'{where}: no text under "{name}"; a clip needs "path", or "audio" or "video"')
    path = row.get("path")
    audio, video = row.get("audio") or path, row.get("video") or path
    start, end, _ = times = [row.get(name) for name in TIME_COLUMNS]
    for name, value in zip(TIME_COLUMNS, times, strict=True):
        if value is not None and not (_is_time(value) or (name == "end" and value == math.inf)):
            raise ConfigError(f"{where}: {name}={value} is not a number of seconds")
    if end is not None and end <= (start or 0):
        raise ConfigError(f"{where}: end={end} is not after start={start or 0}")
    problems, lacks = ([row[name]] if isinstance(row.get(name), str) else [] for name in ("problem", "lacks"))
    captions = [_usable(row.get(column), column, where, problems, lacks) for column in CAPTION_COLUMNS.values()]
    # A row whose only caption was dropped has been accepted once; so is what was written of it, which has the note.
    has_text = bool(any(captions) or problems or lacks)
    if not (audio or video) or (audio is not None) + (video is not None) + has_text < 2:
        raise ConfigError(f'{where}: nothing to pair; a clip needs two of audio, video and caption, e.g. "path": …')
    clip_id, split = (None if row.get(key) == "" else row.get(key) for key in ("id", "split"))  # CSV leaves gaps empty
    if clip_id is None:
        clip_id = (path or audio or video) + (f"@{start:g}" if start else "")
    texts = [str(clip_id), audio, video, None if split is None else str(split)]
    texts += ["; ".join(problems) or None, "; ".join(lacks) or None]
    for name, text in zip(TEXT_COLUMNS, texts, strict=True):
        if text is not None and not text.isascii() and SURROGATE.search(text):
            raise ConfigError(f"{where}: the {name} {ascii(text)} is not UTF-8; correct it, or save the file as UTF-8")
    return texts + times + captions


def _usable(value: Any, column: str, where: str, problems: list[str], lacks: list[str]) -> list[str] | None:
    """The captions in a column that can be used, if any; why others cannot is added to `problems` or `lacks`."""
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f'{where}: no text under "{column}"; it is a caption or a list of captions')
    usable = []
    for text in texts:
        if not text.isascii() and REPLACED.search(text):
            problems.append(f"the {column} is not UTF-8")
        elif not text or text.isspace():
            lacks.append(f"the {column} is empty")
        else:
            usable.append(text)
    return usable or None


def _is_time(value: Any) -> bool:
    """Whether it is a number of seconds that float64 can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 2**53


def _refuse_repeated_columns(names: Sequence[str], path: Path) -> None:
    for name in ("path", *SCHEMA.names):
        if names.count(name) > 1:
            raise ConfigError(f"{path}: has {names.count(name)} columns named {name}; remove or rename all but one")


# ---------------------------------------------------------------------------------------------------------------------
# reading


def jsonl_rows(path: Path) -> Rows:
    """The objects of a JSONL file, without blank lines. Bytes that are not UTF-8 become lone surrogates.

    Raises:
        ConfigError: a line is not an object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            try:
                # the JSON itself may also spell out lone surrogates ("\ud800")
                row = json.loads(line.decode("utf-8", "surrogateescape"))
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                raise ConfigError(f"{path}:{number}: not JSON ({reason}); write one object per line") from None
            if not isinstance(row, dict):
                raise ConfigError(f'{path}:{number}: not an object; a line is {{"path": …, "caption": …}}')
            yield f"{path}:{number}", row


def _csv_rows(path: Path) -> Rows:
    csv.field_size_limit(2**30)
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        try:
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            _refuse_repeated_columns(reader.fieldnames, path)
            for row in reader:
                where = f"{path}:{reader.line_num}"
                yield where, {key: _number(key, value, where) for key, value in row.items() if key and value}
        except csv.Error as error:
            raise ConfigError(f"{path}:{reader.line_num}: not CSV ({error})") from None


def _number(key: str, value: str, where: str) -> float | str:
    if key not in TIME_COLUMNS:
        return value
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"{where}: {key}={value} is not a number of seconds") from None


def _parquet_rows(path: Path) -> Rows:
    try:
        # with a buffer, because otherwise whole row groups are held in memory, and some files have only one
        with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            names = [name for name in file.schema_arrow.names if name == "path" or name in SCHEMA.names]
            if not names:
                raise ConfigError(f"{path}: has no column of a manifest, such as path or caption")
            _refuse_repeated_columns(names, path)
            number = 0
            for batch in file.iter_batches(1000, columns=names):
                columns = [
                    batch[name].cast(pa.float64()).to_pylist() if name in TIME_COLUMNS else _texts(batch[name])
                    for name in names
                ]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield f"{path}: row {number}", dict(zip(names, values, strict=True))
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]})") from error


def _texts(column: pa.Array) -> list[Any]:
    """The values of a Parquet column; bytes that are not UTF-8 become lone surrogates."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        is_list = pa.types.is_nested(column.type)
        values = column.cast(pa.list_(pa.binary()) if is_list else pa.binary()).to_pylist()
        return [[_decoded(text) for text in value] if isinstance(value, list) else _decoded(value) for value in values]


def _decoded(text: bytes | None) -> str | None:
    return None if text is None else text.decode("utf-8", "surrogateescape")


# ---------------------------------------------------------------------------------------------------------------------
# writing


def write_rows(path: Path, rows: Callable[[], Iterator[dict[str, Any]]], columns: Sequence[str]) -> None:
    """Write a manifest in the format that its name says. An existing file is replaced once the new one is complete.

    Args:
        rows: called once or twice, gives the rows, without empty values.
        columns: the columns of `SCHEMA` that a Parquet file gets.
    Raises:
        ConfigError: the file cannot be written there, or its format cannot hold what a row has.
    """
    unfinished = path.with_name(f".{path.name}.part")
    try:
        match format_of(path):
            case "Parquet":
                schema = pa.schema([SCHEMA.field(name) for name in columns])
                with pq.ParquetWriter(unfinished, schema) as writer:
                    for batch in to_batches(check_row(row, str(path)) for row in rows()):
                        writer.write_batch(batch.select(schema.names))
            case "CSV":
                names: dict[str, None] = {}
                for row in rows():
                    if any(isinstance(value, list) for value in row.values()):
                        raise ConfigError(
                            f"{path}: {row['id']} has several captions of one kind, which CSV cannot hold; "
                            "write .jsonl or .parquet"
                        )
                    names |= dict.fromkeys(row)
                with unfinished.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, list(names))
                    writer.writeheader()
                    writer.writerows(rows())
            case "JSONL":
                with unfinished.open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows())
        os.replace(unfinished, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):
            unfinished.unlink()
