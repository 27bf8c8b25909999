"""Tar shards in the layout of webdataset, for corpora with more files than a file system likes.

    python -m pe_av.data.shards pack MANIFEST FOLDER    files of a manifest -> FOLDER/000000.tar …, manifest.parquet and
                                                        SHA256SUMS (`sha256sum -c` checks them); goes on when restarted
    python -m pe_av.data.shards index FOLDER            manifest.parquet for shards that came without one

Each sample is KEY.json, what the manifest says of it, and its files, KEY.mp4 or KEY.audio.wav and KEY.video.mp4; a
key ends at the first dot of a file's name, folders apart, as in webdataset. The
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
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from pe_av.config import ConfigError
from pe_av.data.manifest import Clip, Manifest, checked_clip, read_manifest
from pe_av.data.manifest_formats import CAPTION_COLUMNS

AUDIO = {"wav", "flac", "mp3", "ogg", "opus", "oga", "m4a", "aac", "wma", "aiff", "aif"}
VIDEO = set("mp4 m4v mov mkv webm avi mpg mpeg ts mts m2ts flv wmv ogv 3gp gif".split())  # with or without sound
NOTES = {"txt", "json"}  # a caption; what the manifest says
NAMED = ("audio", "video", "media")  # media: sound and picture; so named, a file may have any ending


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
    if note.exists():
        try:
            known = json.loads(note.read_bytes())
        except ValueError:
            raise ConfigError(f"{note}: damaged; delete it, if the shards beside it are of this manifest") from None
        if known != told:
            wrong = "holds shards of another manifest, or of other sizes"
            raise ConfigError(f"{folder}: {wrong}; pack into another folder")
    _replace(note, json.dumps(told))
    with ThreadPoolExecutor(threads) as pool:  # reading, hashing and writing all let other threads run
        jobs = pool.map(lambda job: _pack(manifest, folder, *job), enumerate(plan))
        done = list(track(jobs, "packing", total=len(plan), console=Console(stderr=True)))
    _replace(folder / "SHA256SUMS", "".join(f"{entry['sha256']}  {entry['shard']}\n" for entry in done))
    clips = [checked_clip(row, entry["shard"]) for entry in done for row in entry["rows"]]
    if not clips:
        raise ConfigError(f"{folder}: none of the {len(manifest)} clips could be read")
    Manifest.of(clips, folder).write(folder / "manifest.parquet")
    return {name: reason for entry in done for name, reason in entry["left_out"].items()}


def index(folder: str | Path) -> tuple[Manifest, list[str]]:
    """The manifest of the shards in a folder, found by reading the headers of the tars.

    A sample's caption is the "caption" of its .json, or its .txt. A file that a shard is too short for is left in, so
    that reading names it.

    Returns:
        the manifest, which is written too, and what of which shard is not in it, and why.
    """
    folder = Path(folder)
    clips, names, wrong = [], set(), []
    for shard in sorted(path for path in folder.glob("*") if ".tar" in path.suffixes or path.suffix == ".tgz"):
        if shard.suffix != ".tar":
            wrong.append(f"{shard}: not read; a shard is a .tar that is not compressed")
            continue
        samples, complaints = _samples(shard)
        wrong += [f"{shard}: {complaint}" for complaint in complaints]
        for key, files in samples.items():
            clip, complaints = clip_of(shard, key, files)
            if clip is not None and clip.id in names:
                complaints.append(f"the id {clip.id} stands more than once; here it is {shard.stem}/{key}")
                clip = replace(clip, id=f"{shard.stem}/{key}")
            if clip is not None:
                clips.append(clip)
                names.add(clip.id)
            wrong += [f"{shard}: {key}: {complaint}" for complaint in complaints]
    if not clips:
        raise ConfigError("; ".join([f"{folder}: no shards with clips there", *wrong[:1]]))
    manifest = Manifest.of(clips, folder)
    manifest.write(folder / "manifest.parquet")
    return manifest, wrong


# ending -> where it lies, and the content of notes
Files = dict[str, tuple[str, bytes | None]]


def _samples(shard: Path) -> tuple[dict[str, Files], list[str]]:
    """(key -> the files of its sample, what was wrong) with a shard."""
    samples: dict[str, Files] = {}
    wrong = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                path, _, name = member.name.rpartition("/")
                stem, dot, ending = name.partition(".")
                if not member.isreg() or member.issparse():
                    wrong.append(f"{member.name}: not used; it is a link or no plain file")
                elif not stem or not dot:
                    wrong.append(f"{member.name}: not used; a file of a sample is named KEY.ENDING")
                else:
                    files = samples.setdefault(os.path.normpath(os.path.join(path, stem)), {})
                    if ending.lower() in files:
                        wrong.append(f"{member.name}: not used; there is one of that name before it")
                        continue
                    content = tar.extractfile(member).read() if ending.lower() in NOTES else None
                    files[ending.lower()] = f"{shard.name}#{member.offset_data}+{member.size}", content
        # a header that is none ends the reading without a word
        with shard.open("rb") as file:
            file.seek(tar.offset)
            rest = file.read(2**20)
            if len(rest) < tarfile.BLOCKSIZE or any(rest):
                wrong.append(f"no end of the tar at byte {tar.offset}, after its last file; the rest is not read")
    except (tarfile.TarError, EOFError) as error:
        wrong.append(f"{error}; the rest is not read")
    return samples, wrong


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
            both = "" if clip.audio and Path(clip.audio).suffix[1:].lower() in VIDEO else ".media"
            files = {both: clip.audio} if clip.audio == clip.video else {".audio": clip.audio, ".video": clip.video}
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
    _replace(note, json.dumps(done))
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
    rest = {name: getattr(clip, name) for name in ("id", "split", "start", "end", "seconds", "problem", "lacks")}
    return {name: value for name, value in (rest | captions).items() if value is not None}


def clip_of(shard: Path, key: str, files: Files) -> tuple[Clip | None, list[str]]:
    """(the clip that a sample makes, what of it is not used, and why)."""
    row: dict[str, Any] = {}
    text = None
    found: dict[str, list[str]] = {part: [] for part in NAMED}
    wrong = []
    for ending, (_, content) in files.items():
        first, _, rest = ending.partition(".")
        last = ending.rpartition(".")[2]
        if ending == "json":
            try:
                told = json.loads(content)
            except RecursionError:
                told = "nested too deeply"
            except ValueError as error:
                told = error
            if isinstance(told, dict):
                row = told
            else:
                wrong.append(f"its .json is not used; it is no JSON object ({told})")
        elif ending == "txt":
            text = content.decode("utf-8", "replace").strip()
        elif first in NAMED:
            found[first].append(ending)
        elif last in AUDIO:
            found["audio"].append(ending)
        elif last in VIDEO:
            found["media"].append(ending)
        else:
            wrong.append(f"its .{ending} is not used; that is no ending of sound, picture, .txt or .json")
    used = {part: next(iter(found[part] + found["media"]), None) for part in ("audio", "video")}
    for ending in (ending for endings in found.values() for ending in endings if ending not in used.values()):
        wrong.append(f"its .{ending} is not used; it has another file for that")
    if not any(used.values()):
        return None, [*wrong, "not used; it has neither sound nor picture"]
    if text is not None and not row.get("caption"):
        row["caption"] = text
    row |= {part: files[ending][0] if ending else None for part, ending in used.items()} | {"path": None}
    row["id"] = str(row.get("id") or f"{shard.stem}/{key}")
    try:
        return checked_clip(row, "not used"), wrong
    except ConfigError as error:
        return None, [*wrong, str(error)]


def _replace(path: Path, text: str) -> None:
    """The file gets its name when it is complete."""
    Path(f"{path}.part").write_text(text)
    os.replace(f"{path}.part", path)


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
