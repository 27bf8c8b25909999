"""Manifests as Arrow tables; a large one is converted once and from then on mapped into memory.

A manifest of more than one batch of rows (`BATCH_ROWS`) is converted into an Arrow file beside it
(`.clips.jsonl.arrow`), or under the user's cache folder where that cannot be written. All processes of a machine then
share the pages of that file, and the system may drop them. The copy notes the size and time of change of the manifest
that it was made from, and is made again when they differ.
"""

import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import track

from pe_av.config import ConfigError
from pe_av.data.manifest_formats import SCHEMA, read_batches

FORMAT = 1  # of the copies; raise it, and existing ones are made again


class ArrowCopy(NamedTuple):
    """An Arrow file, and the manifest that it has to be a copy of."""

    path: str
    made_of: bytes  # see `_stamp`

    def table(self) -> pa.Table | None:
        """The mapped table; None if there is no such file, or it is damaged or of another state of the manifest."""
        try:
            reader = pa.ipc.open_file(pa.memory_map(self.path))
            return reader.read_all() if (reader.schema.metadata or {}).get(b"made_of") == self.made_of else None
        except (OSError, pa.ArrowException):
            return None


def open_table(path: Path) -> tuple[pa.Table, ArrowCopy | None]:
    """The rows of a manifest, and the copy from which they are mapped; None for a small one, which is in memory.

    Raises:
        ConfigError: no clips, a row that cannot be a clip, repeated ids, or no room for the copy.
    """
    stamp = _stamp(path)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pe_av"
    digest = hashlib.blake2b(os.fsencode(os.path.realpath(path)), digest_size=8).hexdigest()
    places = path.with_name(f".{path.name}.arrow"), cache / f"{path.name}.{digest}.arrow"
    copies = [ArrowCopy(str(place.absolute()), stamp) for place in places]
    if (opened := _first_valid(copies)) is not None:
        return opened
    with path.open("rb") as file:
        # One process of a machine converts while the others wait. The lock is on the manifest itself, so no lock file
        # is left behind, and it ends with its process. Some network file systems have no locks: then each converts.
        locked = False
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        if (opened := _first_valid(copies)) is not None:  # made by another process while this one waited
            return opened
        start = list(islice(read_batches(path), 2))
        if not start:
            raise ConfigError(f"{path}: holds no clips")
        if len(start) == 1:
            table = pa.Table.from_batches(start)
            _refuse_repeated_ids(table, path)
            return table, None
        reasons = []
        for copy in copies:
            if locked:  # no other process is converting, so what is there was left by one that was interrupted
                with suppress(OSError):
                    for leftover in Path(copy.path).parent.glob(f"{glob.escape(Path(copy.path).name)}.*.part"):
                        leftover.unlink()
            try:
                return _convert(path, copy), copy
            except OSError as error:
                reasons.append(f"{Path(copy.path).parent}: {error.strerror or error}")
    raise ConfigError(
        f"{path}: no room for its memory-mapped copy ({'; '.join(reasons)}); free some space there, or set "
        "XDG_CACHE_HOME to a folder that has some"
    )


def _stamp(path: Path) -> bytes:
    """What tells, without reading it, whether a manifest has changed."""
    status = path.stat()
    return json.dumps({"format": FORMAT, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}).encode()


def _first_valid(copies: Sequence[ArrowCopy]) -> tuple[pa.Table, ArrowCopy] | None:
    return next(((table, copy) for copy in copies if (table := copy.table()) is not None), None)


def _convert(path: Path, copy: ArrowCopy) -> pa.Table:
    """Convert a manifest, and return the mapped table.

    Raises:
        ConfigError: a row that cannot be a clip, repeated ids, or a manifest that changes meanwhile.
        OSError: no space or no permission to write the copy.
    """
    place = Path(copy.path)
    place.parent.mkdir(parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(".part", f"{place.name}.", place.parent)
    os.close(descriptor)
    try:
        with pa.ipc.new_file(unfinished, SCHEMA.with_metadata({"made_of": copy.made_of})) as file:
            for batch in track(read_batches(path), f"converting {path.name}", console=Console(stderr=True)):
                file.write_batch(batch)
        if _stamp(path) != copy.made_of:
            raise ConfigError(f"{path}: changed while it was read; start again once it is complete")
        table = copy._replace(path=unfinished).table()
        _refuse_repeated_ids(table, path)
        shutil.copymode(path, unfinished)  # whoever may read the manifest may read the copy
        os.replace(unfinished, place)
        return table  # mapped by its inode, which the new name does not change
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _refuse_repeated_ids(table: pa.Table, path: Path) -> None:
    """
    Raises:
        ConfigError: several clips have the same id.
    """
    # by 64-bit hashes, to bound the memory; the ids themselves are compared only where hashes are equal
    ids = (clip_id for batch in table.select(["id"]).to_batches() for clip_id in batch["id"].to_pylist())
    hashes = np.fromiter(map(hash, ids), np.int64, len(table))
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    equal = hashes[1:] == hashes[:-1]
    first_rows: dict[str, int] = {}
    repeated: list[tuple[int, int, str]] = []
    for row in np.sort(order[np.append(equal, False) | np.append(False, equal)]).tolist():
        clip_id = table["id"][row].as_py()
        if clip_id in first_rows:
            repeated.append((first_rows[clip_id], row, clip_id))
        first_rows.setdefault(clip_id, row)
    if repeated:
        first, second, clip_id = min(repeated)
        raise ConfigError(
            f"{path}: {len(repeated)} repeated ids, such as {clip_id!r} in clips {first + 1} and {second + 1}; "
            "give every clip an id of its own"
        )
