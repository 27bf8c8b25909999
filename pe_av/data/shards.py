"""Tar shards in the layout of webdataset, for corpora with more files than a file system likes.

    python -m pe_av.data.shards pack MANIFEST FOLDER    files of a manifest -> FOLDER/000000.tar …, manifest.parquet and
                                                        SHA256SUMS (`sha256sum -c` checks them); goes on when restarted
    python -m pe_av.data.shards index FOLDER            manifest.parquet for shards that came without one

Each sample is KEY.json, what the manifest says of it, and its files, KEY.mp4 or KEY.audio.wav and KEY.video.mp4. The
tars are not compressed, so the manifest can say where in them each file lies; training then reads it in place, in any
order, split over ranks and workers like any other manifest. A shard that is cut short costs the samples it lost.
"""

import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from ..config import ConfigError
from .manifest import CAPTION_COLUMNS, Clip, Manifest, read_manifest

AUDIO = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac"}  # all other endings are of files with a picture
NOTES = {".txt", ".cls", ".json"}  # members that are no media; .txt is a caption


def pack(manifest: Manifest, folder: str | Path, shard_bytes: int = 10**9, threads: int = 4) -> dict[str, str]:
    """The files of a manifest into shards; those that are there already stay.

    Args:
        shard_bytes: about how large a shard becomes.
        threads: shards that are written at a time.
    Returns:
        id -> why a clip was left out.
    Raises:
        ConfigError: the folder holds shards of another manifest.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan = list(_plan(manifest, shard_bytes))
    note = folder / "plan.json"
    told = {"clips": len(manifest), "shards": len(plan), "ids": hashlib.sha256(repr(plan).encode()).hexdigest()}
    if note.exists() and json.loads(note.read_text()) != told:
        raise ConfigError(f"{folder}: holds shards of another manifest, or of other sizes; pack into another folder")
    note.write_text(json.dumps(told))
    with ThreadPoolExecutor(threads) as pool:  # reading, hashing and writing all let other threads run
        jobs = pool.map(lambda job: _pack(manifest, folder, *job), enumerate(plan))
        done = list(track(jobs, "packing", total=len(plan), console=Console(stderr=True)))
    (folder / "SHA256SUMS").write_text("".join(f"{entry['sha256']}  {entry['shard']}\n" for entry in done))
    clips = [_clip_from(row, folder) for entry in done for row in entry["rows"]]
    if not clips:
        raise ConfigError(f"{folder}: none of the {len(manifest)} clips could be read")
    _write(Manifest.of(clips, folder), folder)
    return {name: reason for entry in done for name, reason in entry["left_out"].items()}


def index(folder: str | Path) -> tuple[Manifest, list[str]]:
    """The manifest of the shards in a folder, found by reading the headers of the tars.

    A sample's caption is the "caption" of its .json, or its .txt. A file that a shard is too short for is left in, so
    that reading names it.

    Returns:
        the manifest, which is written too, and what was wrong with which shard.
    """
    folder = Path(folder)
    clips, wrong = [], []
    for shard in sorted(folder.glob("*.tar")):
        samples: dict[str, dict[str, tuple[str, bytes | None]]] = {}
        try:
            with tarfile.open(shard) as tar:
                for member in tar:
                    if member.isfile():
                        key, _, ending = member.name.partition(".")
                        place = f"{shard}#{member.offset_data}+{member.size}"
                        note = f".{ending.lower()}" in NOTES
                        content = tar.extractfile(member).read() if note else None
                        samples.setdefault(key, {})[f".{ending.lower()}"] = place, content
        except (tarfile.ReadError, EOFError) as error:
            wrong.append(f"{shard}: {error}")
        clips += [clip for key, files in samples.items() if (clip := _clip_of(shard, key, files)) is not None]
    if not clips:
        raise ConfigError(f"{folder}: no shards with clips there")
    manifest = Manifest.of(clips, folder)
    _write(manifest, folder)
    return manifest, wrong


def _plan(manifest: Manifest, shard_bytes: int) -> Iterator[list[int]]:
    """Rows for each shard."""
    rows, size = [], 0
    for number, clip in enumerate(manifest):
        rows.append(number)
        size += sum(os.path.getsize(path) for path in {clip.audio, clip.video} - {None} if os.path.isfile(path))
        if size >= shard_bytes:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _pack(manifest: Manifest, folder: Path, number: int, rows: list[int]) -> dict[str, Any]:
    """One shard, and beside it what is in it; both get their names when they are complete."""
    shard, note = folder / f"{number:06d}.tar", folder / f"{number:06d}.json"
    if note.exists() and shard.exists():
        return json.loads(note.read_text())
    written, left_out = [], {}
    with tarfile.open(f"{shard}.part", "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            clip = manifest[row]
            files = {"": clip.audio} if clip.audio == clip.video else {".audio": clip.audio, ".video": clip.video}
            files = {f"{row:09d}{part}{Path(path).suffix}": path for part, path in files.items() if path is not None}
            missing = next((path for path in files.values() if not os.path.isfile(path)), None)
            if missing is not None:
                left_out[clip.id] = f"{missing}: no such file"
                continue
            entry = _entry(clip)
            # first, so that a torn sample is still known by its name
            _add(tar, f"{row:09d}.json", io.BytesIO(json.dumps(entry).encode()))
            places = {}
            for name, path in files.items():
                with open(path, "rb") as file:
                    places[path] = f"{shard.name}#{_add(tar, name, file)}+{tar.members[-1].size}"
            written.append(entry | {"audio": places.get(clip.audio), "video": places.get(clip.video)})
            tar.members.clear()  # else they would pile up
    with open(f"{shard}.part", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    os.replace(f"{shard}.part", shard)
    done = {"shard": shard.name, "sha256": digest, "rows": written, "left_out": left_out}
    Path(f"{note}.part").write_text(json.dumps(done))
    os.replace(f"{note}.part", note)
    return done


def _add(tar: tarfile.TarFile, name: str, file: Any) -> int:
    """Where the content begins in the tar."""
    info = tarfile.TarInfo(name)
    info.size = file.seek(0, os.SEEK_END)
    file.seek(0)
    begin = tar.offset + tarfile.BLOCKSIZE  # USTAR: one block of header
    tar.addfile(info, file)
    return begin


def _entry(clip: Clip) -> dict[str, Any]:
    captions = {CAPTION_COLUMNS[kind]: texts for kind, texts in clip.captions.items()}
    rest = {name: getattr(clip, name) for name in ("id", "split", "start", "end", "seconds", "problem")}
    return {name: value for name, value in (rest | captions).items() if value is not None}


def _clip_from(row: dict[str, Any], folder: Path) -> Clip:
    captions = {kind: row[column] for kind, column in CAPTION_COLUMNS.items() if row.get(column)}
    captions = {kind: [texts] if isinstance(texts, str) else texts for kind, texts in captions.items()}
    names = ("audio", "video", "start", "end", "seconds", "split", "problem")
    return Clip(str(row["id"]), captions=captions, **{name: row[name] for name in names if row.get(name) is not None})


def _clip_of(shard: Path, key: str, files: dict[str, tuple[str, bytes | None]]) -> Clip | None:
    row: dict[str, Any] = {"id": f"{shard.stem}/{key}"}
    if ".json" in files:
        told = json.loads(files[".json"][1])
        row |= told if isinstance(told, dict) else {}
    if ".txt" in files:
        row.setdefault("caption", files[".txt"][1].decode("utf-8", "replace").strip())
    row |= {"audio": None, "video": None}
    for ending, (place, _) in files.items():
        place = os.path.relpath(place, shard.parent)
        if ending in NOTES:
            continue
        if ending.startswith(".audio.") or os.path.splitext(f"x{ending}")[1] in AUDIO:
            row["audio"] = place
        elif ending.startswith(".video."):
            row["video"] = place
        else:
            row["audio"], row["video"] = row["audio"] or place, place
    clip = _clip_from(row, shard.parent)
    return clip if clip.audio or clip.video else None


def _write(manifest: Manifest, folder: Path) -> None:
    manifest.write(folder / "manifest.parquet.part.parquet")
    os.replace(folder / "manifest.parquet.part.parquet", folder / "manifest.parquet")


def main(arguments: Sequence[str]) -> None:
    """python -m pe_av.data.shards pack MANIFEST FOLDER | index FOLDER"""
    try:
        match arguments:
            case ["pack", source, folder]:
                left_out = pack(read_manifest(source), folder)
                for name, reason in left_out.items():
                    print(f"left out {name}: {reason}", file=sys.stderr)
            case ["index", folder]:
                for complaint in index(folder)[1]:
                    print(complaint, file=sys.stderr)
            case _:
                sys.exit(f"usage: {main.__doc__}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"written {folder}/manifest.parquet: data.train={folder}/manifest.parquet")


if __name__ == "__main__":
    main(sys.argv[1:])
