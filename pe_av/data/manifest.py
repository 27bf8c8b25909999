"""Manifests: which clips there are, in which files their audio and video are, and what their captions say.

A manifest is a JSONL (.jsonl, .ndjson, .json), CSV or Parquet file with one clip per row, in these columns; any other
column is ignored:

    path                      file with audio and video; or, if there is only one of them or the files are separate,
    audio, video              file with the audio, file with the video
    start, end                the segment of the file to use, in seconds; absent: the whole file
    caption                   a caption of everything in the clip; in JSONL and Parquet also a list of several
    audio_caption, visual_caption, audio_visual_caption       likewise, of what is heard, of what is seen, of both
    seconds                   how long the clip is; needed to make batches of clips of similar length
    id, split                 its name (by default its path), and the split of the corpus that it belongs to

Relative paths start from the manifest's own folder. `SHARD.tar#OFFSET+SIZE` is a file inside a tar (data/shards.py).
A clip may have no audio, no video or no caption, but needs two of the three. A row with only one of them is accepted
if it says what the clip `lacks` or what its `problem` is, as the rows do that are written here: training lists such a
clip and goes on.

    python -m pe_av.data.manifest IN OUT    converts a manifest to another format, and looks into every file for its
                                            length and for missing tracks

Reading and writing the formats is in data/manifest_formats.py; how millions of rows take little memory, in
data/manifest_copy.py.
"""

import hashlib
import json
import math
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from enum import IntFlag
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import track

from pe_av.config import ConfigError
from pe_av.data.manifest_copy import ArrowCopy, open_table
from pe_av.data.manifest_formats import (
    CAPTION_COLUMNS,
    SCHEMA,
    TEXT_COLUMNS,
    TIME_COLUMNS,
    check_row,
    format_of,
    to_batches,
    write_rows,
)
from pe_av.media.tracks import MediaError, probe, source_path


@dataclass(frozen=True)
class Clip:
    """One row of a manifest."""

    id: str
    audio: str | None = None  # file with the audio
    video: str | None = None  # file with the video, often the same
    captions: dict[str | None, list[str]] = field(default_factory=dict)  # kind -> texts
    start: float = 0.0  # seconds, of the segment to use
    end: float | None = None  # None: up to the end of the file
    seconds: float | None = None  # how long the clip is, if the manifest says so
    split: str | None = None
    problem: str | None = None  # what is damaged in the row, and was therefore dropped
    lacks: str | None = None  # what is merely empty or missing, which is no damage


class Modality(IntFlag):
    """What a clip has, as bits. The sampler sorts by them and their checksum is part of its state: do not renumber."""

    TEXT = 1
    VIDEO = 2
    AUDIO = 4


class Manifest(Sequence[Clip]):
    """The clips of a manifest, each made from its row when it is asked for.

    Pickled, a large manifest is only the path of its Arrow copy.
    """

    def __init__(
        self,
        table: pa.Table,
        folder: str | Path = ".",
        rows: np.ndarray | None = None,
        stored: ArrowCopy | None = None,
    ):
        """
        Args:
            table: with the columns of `SCHEMA`, in memory or mapped.
            folder: where relative paths start from.
            rows: ascending numbers of the rows of the table that belong to the manifest; None: all.
            stored: the file that the table is mapped from.
        """
        self.table, self.folder, self.rows, self.stored = table, str(folder), rows, stored
        self._batches = table.to_batches()
        self._starts = [0, *accumulate(len(batch) for batch in self._batches)]

    @classmethod
    def of(cls, clips: Iterable[Clip], folder: str | Path = ".") -> "Manifest":
        """A manifest in memory; relative paths of the clips start from `folder`."""
        return cls(pa.Table.from_batches(to_batches(_values(clip) for clip in clips), SCHEMA), folder)

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
            for start in range(0, len(batch), 1000):  # a whole batch as Python objects is several times as large
                yield from (_clip(row, self.folder) for row in batch.slice(start, 1000).to_pylist())

    def __reduce__(self) -> tuple[Any, ...]:
        if self.stored is None:
            return Manifest, (self.table, self.folder, self.rows)
        return _reopen, (self.stored, self.folder, self.rows)

    def select(self, split: str) -> "Manifest":
        """The clips of one split, without copying them.

        Raises:
            ConfigError: the split has none.
        """
        chosen = self._gather(lambda batch: pc.fill_null(pc.equal(batch["split"], split), False), bool, "split")
        if not chosen.any():
            splits = {name for batch in self._columns("split") for name in pc.unique(batch["split"]).to_pylist()}
            known = ", ".join(sorted(filter(None, splits))) or "none"
            raise ConfigError(f"no clips of split={split}; the manifest has the splits {known}")
        rows = np.flatnonzero(chosen) if self.rows is None else self.rows[chosen]
        smallest = np.int32 if len(self.table) < 2**31 else np.int64
        return Manifest(self.table, self.folder, rows.astype(smallest), self.stored)

    def texts(self) -> Iterator[str]:
        """All captions of all kinds."""
        for column in CAPTION_COLUMNS.values():
            for batch in self._columns(column):
                yield from batch[column].flatten().to_pylist()

    def lengths(self, max_seconds: float) -> np.ndarray | None:
        """(N,) float32, the seconds that each clip lasts, at most `max_seconds`.

        A clip of unknown length counts as `max_seconds`. None if no length is known.
        """

        def is_known(batch: pa.RecordBatch) -> pa.Array:
            return pc.or_(batch["seconds"].is_valid(), batch["end"].is_valid())

        def length(batch: pa.RecordBatch) -> pa.Array:
            segment = pc.subtract(batch["end"], pc.coalesce(batch["start"], 0.0))
            # the minimum, because a segment may reach beyond the end of its file
            return pc.min_element_wise(batch["seconds"], segment, float(max_seconds), skip_nulls=True)

        if not self._gather(is_known, bool, "seconds", "end").any():
            return None
        return self._gather(length, np.float32, *TIME_COLUMNS)

    def modalities(self) -> np.ndarray:
        """(N,) uint8 bits of `Modality`, what each clip has."""
        present = {
            Modality.AUDIO: self._gather(lambda batch: batch["audio"].is_valid(), np.uint8, "audio"),
            Modality.VIDEO: self._gather(lambda batch: batch["video"].is_valid(), np.uint8, "video"),
            Modality.TEXT: np.any(list(self.kinds().values()), axis=0).astype(np.uint8),
        }
        return sum(modality.value * flags for modality, flags in present.items())

    def kinds(self) -> dict[str | None, np.ndarray]:
        """Kind of caption (None: one caption of everything) -> (N,) bool, which clips have captions of that kind."""
        return {
            kind: self._gather(lambda b, c=column: pc.greater(pc.list_value_length(b[c]).fill_null(0), 0), bool, column)
            for kind, column in CAPTION_COLUMNS.items()
        }

    def sha256(self) -> str:
        """Of the rows: equal for manifests of any format, in any folder, whose clips are the same in the same order."""
        digest = hashlib.sha256()
        for batch in self._columns(*SCHEMA.names):
            for start in range(0, len(batch), 1000):
                for row in batch.slice(start, 1000).to_pylist():
                    given = {name: value for name, value in row.items() if value is not None}
                    digest.update(json.dumps(given, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()

    def write(self, path: str | Path) -> None:
        """Write the manifest in the format that the file's name says; paths below its folder become relative to it.

        Raises:
            ConfigError: the file cannot be written there, or its format cannot hold what a clip has. An existing file
                then stays as it is.
        """
        path = Path(path)
        folder = os.path.abspath(path.parent)
        used = [name for name in SCHEMA.names if any(b[name].null_count < len(b) for b in self._columns(name))]
        write_rows(path, lambda: (_row(clip, folder) for clip in self), used or SCHEMA.names)

    def _columns(self, *names: str) -> Iterator[pa.RecordBatch]:
        """These columns of the manifest's rows, a batch at a time."""
        for batch, start in zip(self._batches, self._starts, strict=False):
            batch = batch.select(names)
            if self.rows is not None:
                first, end = np.searchsorted(self.rows, (start, start + len(batch)))
                batch = batch.take(pa.array(self.rows[first:end] - start))
            yield batch

    def _gather(self, function: Callable[[pa.RecordBatch], pa.Array], dtype: Any, *names: str) -> np.ndarray:
        """(N,) what a function makes of these columns, computed a batch at a time."""
        values, at = np.empty(len(self), dtype), 0
        for batch in self._columns(*names):
            values[at : at + len(batch)] = function(batch).to_numpy(zero_copy_only=False)
            at += len(batch)
        return values


def read_manifest(path: str | Path, split: str | None = None) -> Manifest:
    """The clips of a manifest; the ending of its name says in which format it is.

    Captions that are not UTF-8 are dropped, which the clip's `problem` says; so are empty ones, which its `lacks` says.

    Args:
        split: only the clips of this split; None: all.
    Raises:
        ConfigError: no such file, an unknown format, no clips, a row that cannot be a clip (the message names the
            line), repeated ids, or no room for the memory-mapped copy.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such manifest")
    table, stored = open_table(path)
    manifest = Manifest(table, path.parent, stored=stored)
    return manifest if split is None else manifest.select(split)


def checked_clip(row: dict[str, Any], where: str) -> Clip:
    """The clip of a row, with its paths as they are written there.

    Raises:
        ConfigError: the row cannot be a clip; the message begins with `where`.
    """
    return _clip(dict(zip(SCHEMA.names, check_row(row, where), strict=True)), "")


def _reopen(stored: ArrowCopy, folder: str, rows: np.ndarray | None) -> Manifest:
    """What a pickled manifest becomes in another process."""
    if (table := stored.table()) is None:
        raise ConfigError(f"{stored.path}: gone or replaced, because the manifest has changed; start the run again")
    return Manifest(table, folder, rows, stored)


def _clip(row: dict[str, Any], folder: str) -> Clip:
    """The clip of a row of `SCHEMA`."""
    captions = {kind: row.pop(column) for kind, column in CAPTION_COLUMNS.items()}
    row["captions"] = {kind: texts for kind, texts in captions.items() if texts}
    for name in ("audio", "video"):
        row[name] = None if row[name] is None else os.path.join(folder, row[name])
    return Clip(**row | {"start": row["start"] or 0.0})


def _values(clip: Clip) -> list[Any]:
    """The inverse: the values of `SCHEMA`, in its order."""
    values = [getattr(clip, name) for name in (*TEXT_COLUMNS, *TIME_COLUMNS)]
    return values + [clip.captions.get(kind) or None for kind in CAPTION_COLUMNS]


def _row(clip: Clip, folder: str) -> dict[str, Any]:
    """A clip as a row of a file in `folder`, an absolute path."""
    root = os.path.join(folder, "")
    audio, video = (path and os.path.abspath(path).removeprefix(root) for path in (clip.audio, clip.video))
    sources = {"path": audio} if audio == video else {"audio": audio, "video": video}
    captions = {CAPTION_COLUMNS[kind]: texts[0] if len(texts) == 1 else texts for kind, texts in clip.captions.items()}
    row = {"id": clip.id, "split": clip.split, **sources, "start": clip.start or None, "end": clip.end}
    row |= {"seconds": clip.seconds, "problem": clip.problem, "lacks": clip.lacks, **captions}
    return {name: value for name, value in row.items() if value is not None}


# ---------------------------------------------------------------------------------------------------------------------
# looking into files


def measure(manifest: Manifest, threads: int = 8) -> Manifest:
    """The manifest with every clip `measured`."""
    clips = iter(track(manifest, "measuring", total=len(manifest), console=Console(stderr=True)))
    with ThreadPoolExecutor(threads) as pool:  # opening a file waits for the disk and decodes nothing
        chunks = iter(lambda: list(islice(clips, 1000)), [])  # the pool would take all clips at once
        return Manifest.of((clip for chunk in chunks for clip in pool.map(measured, chunk)), manifest.folder)


def measured(clip: Clip) -> Clip:
    """The clip with its length, and without the tracks that its files turn out not to have.

    If that leaves only one thing to pair, the clip's `lacks` says so. If it leaves no file, or a file cannot be opened,
    the clip keeps it: decoding will give the reason.
    """
    missing, lengths = [], []
    for modality in ("audio", "video"):
        source = getattr(clip, modality)
        if source is None:
            continue
        try:
            tracks = probe(source)
        except MediaError:
            continue
        if modality not in tracks:
            missing.append(modality)
        elif (length := tracks[modality]) is not None:
            lengths.append(max(min(length, clip.end or length) - clip.start, 0.0))
    result = replace(clip, **dict.fromkeys(missing), seconds=max(lengths, default=clip.seconds))
    if result.audio is None and result.video is None:
        return clip
    if missing and not clip.captions:
        lacks = [clip.lacks] if clip.lacks else []
        return replace(result, lacks="; ".join([*lacks, f"its file has no {missing[0]} track"]))
    return result


LOOKED_FOR = 1000  # clips whose files the command looks for, since a wrong folder is a frequent mistake


def _is_there(clip: Clip) -> bool:
    return all(os.path.exists(source_path(source)) for source in (clip.audio, clip.video) if source is not None)


def main(arguments: Sequence[str]) -> None:
    """python -m pe_av.data.manifest IN OUT"""
    if len(arguments) != 2:
        sys.exit(f"usage: {main.__doc__}")
    try:
        out = Path(arguments[1])
        format_of(out)  # checked now, because looking into every file can take hours
        if not out.parent.is_dir():
            raise ConfigError(f"{out}: cannot be written (no such folder)")
        if out.exists() and out.samefile(arguments[0]):
            raise ConfigError(
                f"{out}: is the manifest that is read, and would lose its other columns: name another file"
            )
        manifest = measure(read_manifest(arguments[0]))
        manifest.write(out)
    except ValueError as error:
        sys.exit(f"error: {error}")
    lengths = manifest.lengths(math.inf)
    known = np.zeros(0) if lengths is None else lengths[np.isfinite(lengths)]
    unknown = f", {len(manifest) - len(known)} of unknown length" if len(known) < len(manifest) else ""
    gone = [clip.id for clip in islice(manifest, LOOKED_FOR) if not _is_there(clip)]
    if gone:
        print(
            f"warning: of the first {min(len(manifest), LOOKED_FOR)} clips {len(gone)} have no file, such as {gone[0]}"
        )
    hours = known.sum(dtype=float) / 3600
    print(f"{len(manifest)} clips, {hours:.2f} hours{unknown}, written to {arguments[1]}")


if __name__ == "__main__":
    main(sys.argv[1:])
