"""A folder of embeddings, which `python -m pe_av.embed` writes and `python -m pe_av.search` reads.

    index.json            what the embeddings depend on (`evaluation/setting.py`), and how many rows there are
    part-000000.arrow …   the rows, `part_rows` each: Arrow IPC files, not compressed, so that they are read by mapping
    bad_items.jsonl       {"id", "error"} of the rows of which something could not be read, if there are any

A row is a clip, or a window of one:

    id                    of the clip, and of the window if the clip has several
    audio, video          the files; null if the clip has none
    start, end            seconds in the files; `end` is null where the row reaches to their end
    split, captions       as the manifest has them
    error, partial        what of it is damaged, and what it lacks; null if nothing
    cut                   seconds beyond `max_seconds`, which were not read; null if none
    audio, video, …_embeds    each embedding, D float32; null where the row lacks what it is made of

Everything that knows Arrow reads the parts, such as polars, DuckDB and pandas. Parquet is made of them by
`pyarrow.parquet.write_table(Index(folder).table(), "all.parquet")`.
"""

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pe_av.config import ConfigError, nearest

RECORD = "index.json"
FORMAT = 1
_COLUMNS = pa.schema(
    {
        "id": pa.string(),
        "audio": pa.string(),
        "video": pa.string(),
        "start": pa.float64(),
        "end": pa.float64(),
        "split": pa.string(),
        "captions": pa.list_(pa.string()),
        "error": pa.string(),
        "partial": pa.string(),
        "cut": pa.float64(),
    }
)
SUFFIX = "_embeds"


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.arrow"


def write_part(
    path: Path, rows: Sequence[Mapping[str, Any]], embeds: Mapping[str, np.ndarray], valid: Mapping[str, np.ndarray]
) -> None:
    """Write a part, which gets its name when it is complete.

    Args:
        rows: the columns of each row but for the embeddings; missing ones are null.
        embeds: embedding -> (rows, D) float32.
        valid: embedding -> (rows,) bool, whether the row has it.
    """
    columns = [pa.array([row.get(field.name) for row in rows], field.type) for field in _COLUMNS]
    names = list(_COLUMNS.names)
    for name, values in embeds.items():
        flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
        columns.append(pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=pa.array(~valid[name])))
        names.append(name + SUFFIX)
    batch = pa.RecordBatch.from_arrays(columns, names)
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
    except OSError:
        unfinished.unlink(missing_ok=True)  # what a full disk leaves
        raise
    os.replace(unfinished, path)


class Index:
    """The rows that are finished, mapped into memory."""

    def __init__(self, folder: str | Path):
        """
        Raises:
            ConfigError: no such folder, not an index, or no part of it is finished yet.
        """
        self.folder = Path(folder)
        self.record = read_record(self.folder)
        if self.record is None:
            raise ConfigError(f"{folder}: no {RECORD} in it; python -m pe_av.embed writes one")
        self.parts: list[pa.RecordBatch] = []
        for number in range(part_count(self.record)):
            if (path := part_path(self.folder, number)).exists():
                self.parts.append(_read_part(path))
        self.missing = part_count(self.record) - len(self.parts)
        if not self.parts:
            raise ConfigError(f"{folder}: no part of it is finished yet; start python -m pe_av.embed again")

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def embeddings(self) -> list[str]:
        """The names of the embeddings that it has, such as "audio"."""
        return [name.removesuffix(SUFFIX) for name in self.parts[0].schema.names if name.endswith(SUFFIX)]

    def count(self, name: str) -> int:
        """How many rows have an embedding."""
        self.check(name)
        return sum(len(part) - part.column(name + SUFFIX).null_count for part in self.parts)

    def table(self) -> pa.Table:
        """All rows and columns, without copying them."""
        return pa.Table.from_batches(self.parts)

    def rows(self) -> pa.Table:
        """All rows, without the embeddings."""
        return self.table().select(_COLUMNS.names)

    def check(self, name: str) -> None:
        """Raise ConfigError if the index does not have this embedding."""
        if name not in self.embeddings:
            raise ConfigError(f"{self.folder}: has no {name} embeddings{nearest(name, self.embeddings)}")

    def blocks(self, name: str, size: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """An embedding, a block at a time, without copying it: (first row, (n, D) float32, (n,) bool of those that
        have it).

        Raises:
            ConfigError: the index does not have this embedding.
        """
        self.check(name)
        first = 0
        for part in self.parts:
            values, valid = _values(part, name), part.column(name + SUFFIX).is_valid().to_numpy(zero_copy_only=False)
            for start in range(0, len(part), size):
                yield first + start, values[start : start + size], valid[start : start + size]
            first += len(part)

    def vectors(self, name: str, rows: np.ndarray) -> np.ndarray:
        """(n, D) float32, an embedding of some rows, which must be ascending."""
        self.check(name)
        pieces, first = [np.empty((0, self.record["embeddings"][name]), np.float32)], 0
        for part in self.parts:
            begin, end = np.searchsorted(rows, (first, first + len(part)))
            if begin < end:
                pieces.append(_values(part, name)[rows[begin:end] - first])
            first += len(part)
        return np.concatenate(pieces)


def _values(part: pa.RecordBatch, name: str) -> np.ndarray:
    """(rows, D), mapped; what null rows have means nothing. `flatten` would leave them out."""
    column = part.column(name + SUFFIX)
    return column.values.to_numpy().reshape(len(part), column.type.list_size)


def list_bad(folder: Path) -> None:
    """Write bad_items.jsonl, from the parts that are finished."""
    lines = [
        json.dumps({"id": name, "error": error}) + "\n"
        for path in sorted(folder.glob("part-*.arrow"))
        for name, error in zip(*(_read_part(path)[column].to_pylist() for column in ("id", "error")), strict=True)
        if error is not None
    ]
    if not lines:
        (folder / "bad_items.jsonl").unlink(missing_ok=True)
    else:
        # a name of its own, because several ranks may write it at the same time
        unfinished = folder / f"bad_items.{socket.gethostname()}-{os.getpid()}.tmp"
        unfinished.write_text("".join(lines), encoding="utf-8")
        os.replace(unfinished, folder / "bad_items.jsonl")


def read_record(folder: Path) -> dict[str, Any] | None:
    """What index.json says; None if there is none.

    Raises:
        ConfigError: it is damaged, or of another format.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ConfigError(f"{path}: of format {record['format']}, but this version reads format {FORMAT}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: damaged ({error}); delete the folder, and embed again") from None
    return record


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write index.json.

    Raises:
        ConfigError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"target={folder}: no folder can be made there ({error.strerror}); give another") from None
    unfinished = folder / f"{RECORD}.tmp"
    unfinished.write_text(json.dumps({"format": FORMAT, **record}, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / RECORD)


def part_count(record: Mapping[str, Any]) -> int:
    return -(-record["rows"] // record["part_rows"])


def _read_part(path: Path) -> pa.RecordBatch:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: damaged ({error}); delete it, and start python -m pe_av.embed again") from None
