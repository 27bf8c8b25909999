"""Manifests: which clips there are, where their sound and picture lie, and what is said of them.

One clip per row of a JSONL, CSV or Parquet file, in these columns, of which any other is left alone:

    path                      file with sound and picture; or, for only one of them or separate files,
    audio, video              file with the sound, file with the picture
    start, end                the part of the file, in seconds; absent: all of it
    caption                   what is said of the clip; in JSONL and Parquet also a list of several
    audio_caption, visual_caption, audio_visual_caption       the same, of what is heard, of what is seen, of both
    seconds                   how long the clip is, for batches of clips of like length
    id, split                 its name (else the path), and the part of the corpus that it belongs to

Relative paths start from the manifest's own folder. `SHARD.tar#OFFSET+SIZE` is a file inside a tar (data/shards.py).
A clip may lack sound, picture or captions, but needs two of the three. In memory a manifest is an Arrow table, so ten
million rows take a few gigabytes, not tens.

    python -m pe_av.data.manifest IN OUT    converts between the formats, and looks into every file for its length and
                                            for tracks that are missing
"""

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from ..config import CAPTIONS, ConfigError
from .media import MediaError, probe

# kind of caption (None: it tells of all) -> column
CAPTION_COLUMNS: dict[str | None, str] = {None: "caption"} | {kind: f"{kind}_caption" for kind in CAPTIONS}
SCHEMA = pa.schema(
    {name: pa.string() for name in ("id", "audio", "video", "split", "problem")}
    | {name: pa.float64() for name in ("start", "end", "seconds")}
    | {name: pa.list_(pa.string()) for name in CAPTION_COLUMNS.values()}
)


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
    problem: str | None = None  # why something that the manifest says of it is left out


class Manifest(Sequence[Clip]):
    """The rows of a manifest, of which `manifest[i]` makes a `Clip`."""

    def __init__(self, table: pa.Table, folder: str | Path = "."):
        """
        Args:
            table: with the columns of `SCHEMA`.
            folder: where relative paths start from.
        """
        self.table, self.folder = table, str(folder)

    @classmethod
    def of(cls, clips: Iterable[Clip], folder: str | Path = ".") -> "Manifest":
        rows = [
            vars(clip) | {column: clip.captions.get(kind) for kind, column in CAPTION_COLUMNS.items()} for clip in clips
        ]
        return cls(pa.Table.from_pylist(rows, SCHEMA), folder)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Clip:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = self.table.slice(index % len(self), 1).to_pylist()[0]
        captions = {kind: row.pop(column) for kind, column in CAPTION_COLUMNS.items()}
        row["captions"] = {kind: texts for kind, texts in captions.items() if texts}
        for name in ("audio", "video"):
            row[name] = None if row[name] is None else os.path.join(self.folder, row[name])
        return Clip(**row | {"start": row["start"] or 0.0})

    def select(self, split: str) -> "Manifest":
        """The clips of one split.

        Raises:
            ConfigError: there are none.
        """
        chosen = self.table.filter(pc.field("split") == split)
        if not len(chosen):
            known = ", ".join(sorted(filter(None, pc.unique(self.table["split"]).to_pylist()))) or "none"
            raise ConfigError(f"no clips of split={split}: the manifest has {known}")
        return Manifest(chosen, self.folder)

    def texts(self) -> Iterator[str]:
        """All captions of all kinds."""
        for column in CAPTION_COLUMNS.values():
            for batch in self.table.column(column).chunks:
                yield from batch.flatten().to_pylist()

    def lengths(self, max_seconds: float) -> np.ndarray | None:
        """(N,) seconds that each clip lasts, `max_seconds` at most; None where the manifest does not say of all."""
        part = pc.subtract(self.table["end"], pc.coalesce(self.table["start"], 0.0))
        # a part cannot outlast its file
        known = pc.min_element_wise(self.table["seconds"], part, max_seconds, skip_nulls=True)
        unknown = pc.and_(pc.is_null(self.table["seconds"]), pc.is_null(part))
        return None if pc.any(unknown).as_py() else np.asarray(known.to_numpy())

    def parts(self) -> np.ndarray:
        """(N,) which of sound (4), picture (2) and captions (1) each clip has."""
        has_text = [
            pc.greater(pc.coalesce(pc.list_value_length(self.table[c]), 0), 0) for c in CAPTION_COLUMNS.values()
        ]
        parts = 4 * self.table["audio"].is_valid().to_numpy() + 2 * self.table["video"].is_valid().to_numpy()
        return parts + np.any([column.to_numpy() for column in has_text], axis=0)

    def write(self, path: str | Path) -> None:
        """To a file of the format that its name says; paths below its folder are written relative to it."""
        path = Path(path)
        rows = ({k: v for k, v in _entry(clip, path.parent).items() if v is not None} for clip in self)
        if path.suffix == ".parquet":
            table = pa.Table.from_pylist([_columns(_checked(row, str(path))) for row in rows], SCHEMA)
            pq.write_table(table.drop_columns([n for n in SCHEMA.names if table[n].null_count == len(table) > 0]), path)
        elif path.suffix == ".csv":
            rows = [_single(row, path) for row in rows]
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
                writer.writeheader()
                writer.writerows(rows)
        else:
            with path.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_manifest(path: str | Path, split: str | None = None) -> Manifest:
    """The clips of a manifest; its format is told by its name: .parquet, .csv, else JSONL.

    Captions that are empty or not UTF-8 are left out, which the clip's `problem` then says.

    Args:
        split: only the clips of this one; None: all.
    Raises:
        ConfigError: no such file, no clips, a row that cannot be a clip, or ids that stand more than once; the message
            names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such manifest")
    if path.suffix == ".parquet":
        table = _read_parquet(path)
    else:
        rows = _csv_rows(path) if path.suffix == ".csv" else _jsonl_rows(path)
        table = pa.Table.from_pylist([_columns(_checked(row, where)) for where, row in rows], SCHEMA)
    if not len(table):
        raise ConfigError(f"{path}: holds no clips")
    repeated = len(table) - pc.count_distinct(table["id"]).as_py()
    if repeated:
        raise ConfigError(f"{path}: {repeated} ids stand more than once; give every clip its own")
    manifest = Manifest(table, path.parent)
    return manifest if split is None else manifest.select(split)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                # bytes that are no UTF-8 become U+FFFD, and the captions with it are left out
                row = json.loads(line.decode("utf-8", "replace"))
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}:{number}: not JSON ({error.msg}); one object per line") from None
            if not isinstance(row, dict):
                raise ConfigError(f'{path}:{number}: not an object; a line is {{"path": …, "caption": …}}')
            yield f"{path}:{number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**30)
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file)
        for row in reader:
            where = f"{path}:{reader.line_num}"
            yield where, {key: _number(key, value, where) for key, value in row.items() if key and value}


def _number(key: str, value: str, where: str) -> float | str:
    if key not in ("start", "end", "seconds"):
        return value
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"{where}: {key}={value} is not a number of seconds") from None


def _checked(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row with captions as lists, of which those that cannot be used are gone."""
    problems = [row["problem"]] if isinstance(row.get("problem"), str) else []
    for name in ("path", "audio", "video"):
        if row.get(name) is not None and (not isinstance(row[name], str) or not row[name]):
            raise ConfigError(f'{where}: no text under "{name}"; a clip needs "path", or "audio" or "video"')
    for name in ("start", "end", "seconds"):
        value = row.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
            raise ConfigError(f"{where}: {name}={value} is not a number of seconds")
    if row.get("end") is not None and row["end"] <= (row.get("start") or 0):
        raise ConfigError(f"{where}: end={row['end']} is not after start={row.get('start') or 0}")
    row = dict(row)
    said = 0
    for column in CAPTION_COLUMNS.values():
        texts = row.get(column)
        texts = [texts] if isinstance(texts, str) else texts or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f'{where}: no text under "{column}"; it is a caption or a list of them')
        said += len(texts)
        problems += [f"the {column} is empty" for text in texts if not text.strip()]
        problems += [f"the {column} is not UTF-8" for text in texts if "\ufffd" in text]
        row[column] = [text for text in texts if text.strip() and "\ufffd" not in text]
    files = 2 if row.get("path") else sum(row.get(name) is not None for name in ("audio", "video"))
    if not files or files + (said > 0) < 2:
        raise ConfigError(f'{where}: nothing to pair; a clip needs two of sound, picture and caption, e.g. "path": …')
    return row | {"problem": "; ".join(problems) or None}


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `SCHEMA`."""
    audio, video = (row.get(name, row.get("path")) for name in ("audio", "video"))
    named = row.get("id")
    if named is None:
        named = (row.get("path") or audio or video) + (f"@{row['start']:g}" if row.get("start") else "")
    return {name: row.get(name) for name in SCHEMA.names} | {"id": str(named), "audio": audio, "video": video}


def _read_parquet(path: Path) -> pa.Table:
    """By columns: rows would take minutes where there are millions."""
    try:
        table = pq.read_table(path)
        count = len(table)
        columns = {}
        for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True):
            column = table[name] if name in table.column_names else pa.nulls(count, kind)
            if pa.types.is_list(kind) and not pa.types.is_nested(column.type):
                texts = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
                offsets = np.concatenate(
                    [[0], np.cumsum(texts.cast(pa.string()).is_valid().to_numpy(zero_copy_only=False))]
                )
                column = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), texts.cast(pa.string()).drop_null())
            columns[name] = column.cast(kind)
            columns[name].validate(full=True)  # text that is not UTF-8
        if "path" in table.column_names:
            for name in ("audio", "video"):
                if name not in table.column_names:
                    columns[name] = table["path"].cast(pa.string())
                else:
                    columns[name] = pc.coalesce(columns[name], table["path"].cast(pa.string()))
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not a manifest ({str(error).splitlines()[0]})") from error
    if "id" not in table.column_names:
        path_or_part = pc.coalesce(columns["video"], columns["audio"])
        begin = pc.if_else(pc.greater(pc.coalesce(columns["start"], 0.0), 0.0), columns["start"], None)
        suffix = pc.coalesce(pc.binary_join_element_wise("@", begin.cast(pa.string()), ""), "")
        columns["id"] = pc.binary_join_element_wise(path_or_part, suffix, "")
    table = pa.table(columns, SCHEMA)
    manifest = Manifest(table)
    bad = np.flatnonzero(np.isin(manifest.parts(), (0, 1, 2, 4)))
    if len(bad):
        raise ConfigError(f"{path}: row {bad[0] + 1}: nothing to pair; a clip needs two of sound, picture and caption")
    return table


def _entry(clip: Clip, folder: Path) -> dict[str, Any]:
    """A clip as a row of a file in `folder`."""
    audio, video = (None if p is None else _relative(p, folder) for p in (clip.audio, clip.video))
    files = {"path": audio} if audio == video else {"audio": audio, "video": video}
    texts = {CAPTION_COLUMNS[kind]: t[0] if len(t) == 1 else t for kind, t in clip.captions.items()}
    row = {"id": clip.id, "split": clip.split, **files, "start": clip.start or None, "end": clip.end}
    return row | {"seconds": clip.seconds, "problem": clip.problem} | texts


def _relative(path: str, folder: Path) -> str:
    path, folder = os.path.abspath(path), os.path.abspath(folder)
    return os.path.relpath(path, folder) if path.startswith(folder + os.sep) else path


def _single(row: dict[str, Any], path: Path) -> dict[str, Any]:
    if any(isinstance(value, list) for value in row.values()):
        raise ConfigError(
            f"{path}: {row['id']} has several captions of a kind, for which CSV has no place; use .parquet"
        )
    return row


def measure(manifest: Manifest, threads: int = 8) -> Manifest:
    """The same clips with the length of each, and without the tracks that its files lack.

    What cannot be opened stays as it is: decoding it will name the reason.
    """
    clips = []
    with ThreadPoolExecutor(threads) as pool:  # opening a file waits for the disk, and decodes nothing
        for clip in track(pool.map(_measured, manifest), "looking", total=len(manifest), console=Console(stderr=True)):
            clips.append(clip)
    return Manifest.of(clips, manifest.folder)


def _measured(clip: Clip) -> Clip:
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
    if all(name in found for name in ("audio", "video")):
        return clip
    return replace(clip, **found, seconds=max(lengths, default=clip.seconds))


def main(arguments: Sequence[str]) -> None:
    """python -m pe_av.data.manifest IN OUT"""
    if len(arguments) != 2:
        sys.exit(f"usage: {main.__doc__}")
    try:
        manifest = measure(read_manifest(arguments[0]))
        manifest.write(arguments[1])
    except ValueError as error:
        sys.exit(f"error: {error}")
    lengths = manifest.lengths(np.inf)
    known = "not all lengths known" if lengths is None else f"{lengths.sum() / 3600:.2f} hours"
    print(f"{len(manifest)} clips, {known}, written to {arguments[1]}")


if __name__ == "__main__":
    main(sys.argv[1:])
