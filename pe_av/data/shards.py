"""Tar shards in webdataset's layout, for corpora with more files than a file system handles well.

    python -m pe_av.data.shards pack MANIFEST FOLDER    packs the files of a manifest into FOLDER/000000.tar …, and
                                                        writes manifest.parquet and SHA256SUMS (for `sha256sum -c`);
                                                        after an interruption the same command goes on
    python -m pe_av.data.shards index FOLDER            writes manifest.parquet for shards that came without one

A sample has KEY.json, with the columns of a manifest, or KEY.txt, with a caption; and its media, for example KEY.mp4,
or KEY.audio.wav and KEY.video.mp4. As in webdataset, a key includes folders and ends at the first dot of the file name.

The tars are not compressed, so the manifest can say where each file lies in them (`SHARD.tar#OFFSET+SIZE`). Training
reads them there, in any order and split over ranks and workers, like the files of any other manifest. If a shard is cut
short, only the samples behind the cut are lost.
"""

import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import track

from pe_av.config import ConfigError
from pe_av.data.manifest import Clip, Manifest, checked_clip, read_manifest
from pe_av.data.manifest_formats import CAPTION_COLUMNS

AUDIO = {"wav", "flac", "mp3", "ogg", "opus", "oga", "m4a", "aac", "wma", "aiff", "aif"}
VIDEO = set("mp4 m4v mov mkv webm avi mpg mpeg ts mts m2ts flv wmv ogv 3gp gif".split())  # with or without audio
ALONE = "something to pair with"
ROLES = ("audio", "video", "media")  # KEY.ROLE.EXTENSION, with any extension; "media" has both audio and video

# the files of a sample: extension -> where the file is, and the content if it is a .json or .txt
Files = dict[str, tuple[str, bytes | None]]


def pack(manifest: Manifest, folder: str | Path, shard_bytes: int = 10**9) -> dict[str, str]:
    """Pack the files of a manifest into shards. Shards that are already complete in the folder are kept.

    Args:
        shard_bytes: approximate size of a shard.
    Returns:
        id -> reason, for clips that were left out.
    Raises:
        ConfigError: the folder has shards of another manifest, or no clip could be packed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan = list(_plan(manifest, shard_bytes))
    summary = {"clips": len(manifest), "shards": len(plan), "ids": hashlib.sha256(repr(plan).encode()).hexdigest()}
    summary_file = folder / "plan.json"
    if summary_file.exists():
        try:
            known = json.loads(summary_file.read_bytes())
        except ValueError:
            advice = "delete it if the shards beside it were packed from this manifest"
            raise ConfigError(f"{summary_file}: damaged; {advice}") from None
        if known != summary:
            raise ConfigError(f"{folder}: has shards of another manifest, or of other sizes; pack into another folder")
    _write_text(summary_file, json.dumps(summary))
    with ThreadPoolExecutor(4) as pool:  # reading, hashing and writing all release the GIL
        jobs = pool.map(lambda job: _pack_shard(manifest, folder, *job), enumerate(plan))
        shards = list(track(jobs, "packing", total=len(plan), console=Console(stderr=True)))
    _write_text(folder / "SHA256SUMS", "".join(f"{shard['sha256']}  {shard['shard']}\n" for shard in shards))
    clips = [checked_clip(row, shard["shard"]) for shard in shards for row in shard["rows"]]
    if not clips:
        raise ConfigError(f"{folder}: none of the {len(manifest)} clips could be packed, since their files are missing")
    Manifest.of(clips, folder).write(folder / "manifest.parquet")
    return {name: reason for shard in shards for name, reason in shard["left_out"].items()}


def index(folder: str | Path) -> tuple[Manifest, list[str]]:
    """Write the manifest of the shards in a folder, from the headers of the tars and the .json and .txt in them.

    A sample whose file is cut off stays in the manifest, so that training names it.

    Returns:
        The manifest, and a line for everything that is not in it.
    Raises:
        ConfigError: no shard has a usable sample.
    """
    folder = Path(folder)
    clips, problems = clips_of_shards(sorted(filter(is_shard, folder.glob("*"))), folder)
    if not clips:
        raise ConfigError("; ".join([f"{folder}: no shards with usable samples", *problems[:1]]))
    manifest = Manifest.of(clips, folder)
    manifest.write(folder / "manifest.parquet")
    return manifest, problems


def is_shard(path: Path) -> bool:
    """Whether a file is a tar by its name, compressed or not."""
    return ".tar" in path.suffixes or path.suffix == ".tgz"


def clips_of_shards(
    shards: Iterable[Path], folder: Path, pairs: bool = True, taken: Iterable[str] = ()
) -> tuple[list[Clip], list[str]]:
    """The clips in tars, whose places in them are relative to `folder`, and a line for everything that is not used.

    Args:
        pairs: whether a clip needs two of audio, video and caption.
        taken: ids of other clips.
    """
    clips: list[Clip] = []
    ids = set(taken)
    problems: list[str] = []
    for shard in shards:
        if shard.suffix != ".tar":
            problems.append(f"{shard}: not read: it is compressed; decompress it, or stream it with data.shards=")
            continue
        samples, shard_problems = _list_samples(shard, os.path.relpath(shard, folder))
        problems += [f"{shard}: {problem}" for problem in shard_problems]
        for key, files in samples.items():
            clip, sample_problems = sample_clip(shard.stem, key, files, pairs)
            if clip is not None:
                if clip.id in ids:
                    unique = f"{shard.stem}/{key}"
                    unique = unique if unique not in ids else f"{os.path.relpath(shard, folder)}/{key}"
                    sample_problems.append(f"the id {clip.id} is taken by an earlier clip; this one is named {unique}")
                    clip = replace(clip, id=unique)
                clips.append(clip)
                ids.add(clip.id)
            problems += [f"{shard}: {key}: {problem}" for problem in sample_problems]
    return clips, problems


def sample_clip(shard: str, key: str, files: Files, pairs: bool = True) -> tuple[Clip | None, list[str]]:
    """The clip that a sample makes, None if it cannot be used, and a reason for everything in it that is not used.

    A caption comes from the "caption" of KEY.json, or else from KEY.txt.

    Args:
        shard: the shard's name, which is a part of the clip's id if KEY.json has none.
        key: the sample's key in the shard.
        files: what the shard has under this key; the places become the clip's `audio` and `video`.
        pairs: whether the clip needs two of audio, video and caption.
    """
    row: dict[str, Any] = {}
    text = ""
    media: dict[str, list[str]] = {role: [] for role in ROLES}
    problems = []
    for extension, (_, content) in files.items():
        first, last = extension.split(".")[0], extension.split(".")[-1]
        if extension == "json":
            try:
                row = _json_object(content)
            except ValueError as error:
                problems.append(f"its .json is not used: not a JSON object ({error})")
        elif extension == "txt":
            text = content.decode("utf-8", "replace").strip()
        elif first in ROLES:
            media[first].append(extension)
        elif last in AUDIO:
            media["audio"].append(extension)
        elif last in VIDEO:
            media["media"].append(extension)
        else:
            problems.append(f"its .{extension} is not used: no known extension of audio, video or text")
    used = {modality: next(iter(media[modality] + media["media"]), None) for modality in ("audio", "video")}
    for extension in (extension for extensions in media.values() for extension in extensions):
        if extension not in used.values():
            problems.append(f"its .{extension} is not used: another file has the same modality")
    if not any(used.values()):
        return None, [*problems, "not used: it has neither audio nor video"]
    if not row.get("caption") and "txt" in files:
        row["caption"] = text
    row |= {modality: extension and files[extension][0] for modality, extension in used.items()} | {"path": None}
    row["id"] = str(row.get("id") or f"{shard}/{key}")
    if not pairs and not row.get("lacks"):
        row["lacks"] = ALONE  # with which a row of one thing is accepted
    try:
        clip = checked_clip(row, "not used")
        return replace(clip, lacks=None) if clip.lacks == ALONE else clip, problems
    except ConfigError as error:
        return None, [*problems, str(error)]


def _json_object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"of type {type(value).__name__}")
    return value


def _list_samples(shard: Path, name_of_shard: str) -> tuple[dict[str, Files], list[str]]:
    """Key -> the files of its sample, for all samples of a shard, whose places begin with the name that the shard is
    given; and what is wrong with the shard."""
    samples: dict[str, Files] = {}
    problems = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                extension = extension.lower()
                if not member.isreg() or member.issparse():
                    problems.append(f"{member.name}: not used: a link or another special file")
                elif not stem or not dot:
                    problems.append(f"{member.name}: not used: its name is not KEY.EXTENSION")
                else:
                    files = samples.setdefault(os.path.normpath(os.path.join(folder, stem)), {})
                    if extension in files:
                        problems.append(f"{member.name}: not used: an earlier file has the same name")
                        continue
                    content = tar.extractfile(member).read() if extension in ("txt", "json") else None
                    files[extension] = f"{name_of_shard}#{member.offset_data}+{member.size}", content
        # tarfile takes a damaged header for the end of the archive; a real end is a block of zeros
        with shard.open("rb") as file:
            file.seek(tar.offset)
            rest = file.read(2**20)
            if len(rest) < tarfile.BLOCKSIZE or any(rest):
                problems.append(
                    f"damaged or cut short: the archive has no end at byte {tar.offset}; the rest is not read"
                )
    except (tarfile.TarError, EOFError) as error:
        problems.append(f"damaged ({error}); the rest is not read")
    return samples, problems


def _plan(manifest: Manifest, shard_bytes: int) -> Iterator[list[int]]:
    """The rows of the manifest that go into each shard."""
    rows, size = [], 0
    for row, clip in enumerate(manifest):
        rows.append(row)
        size += sum(os.path.getsize(path) for path in {clip.audio, clip.video} - {None} if os.path.isfile(path))
        if size >= shard_bytes:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _pack_shard(manifest: Manifest, folder: Path, number: int, rows: list[int]) -> dict[str, Any]:
    """Write a shard, and beside it a list of what is in it. Both get their names when they are complete."""
    shard, contents_file = folder / f"{number:06d}.tar", folder / f"{number:06d}.json"
    if contents_file.exists() and shard.exists():
        return json.loads(contents_file.read_text())
    written, left_out = [], {}
    with tarfile.open(f"{shard}.part", "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            clip = manifest[row]
            paths = {".audio": clip.audio, ".video": clip.video}
            if clip.audio == clip.video:  # ".media" if its extension does not say that it has video
                is_plain = clip.audio and Path(clip.audio).suffix[1:].lower() in VIDEO
                paths = {"" if is_plain else ".media": clip.audio}
            files = {f"{row:09d}{role}{Path(path).suffix}": path for role, path in paths.items() if path is not None}
            missing = next((path for path in files.values() if not os.path.isfile(path)), None)
            if missing is not None:
                left_out[clip.id] = f"{missing}: no such file"
                continue
            entry = _entry(clip)
            # first, so that the name of a sample that is cut off is known
            _add(tar, f"{row:09d}.json", io.BytesIO(json.dumps(entry).encode()))
            places = {}
            for name, path in files.items():
                with open(path, "rb") as file:
                    places[path] = f"{shard.name}#{_add(tar, name, file)}"
            written.append(entry | {"audio": places.get(clip.audio), "video": places.get(clip.video)})
    with open(f"{shard}.part", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    os.replace(f"{shard}.part", shard)
    contents = {"shard": shard.name, "sha256": digest, "rows": written, "left_out": left_out}
    _write_text(contents_file, json.dumps(contents))
    return contents


def _add(tar: tarfile.TarFile, name: str, file: BinaryIO) -> str:
    """Add a file to a tar; returns where its content is, as OFFSET+SIZE."""
    info = tarfile.TarInfo(name)
    info.size = file.seek(0, os.SEEK_END)
    file.seek(0)
    offset = tar.offset + tarfile.BLOCKSIZE  # a USTAR header is one block
    tar.addfile(info, file)
    tar.members.clear()  # otherwise they pile up
    return f"{offset}+{info.size}"


def _entry(clip: Clip) -> dict[str, Any]:
    """The columns of a clip's row, apart from its files."""
    captions = {CAPTION_COLUMNS[kind]: texts for kind, texts in clip.captions.items()}
    rest = {name: getattr(clip, name) for name in ("id", "split", "start", "end", "seconds", "problem", "lacks")}
    return {name: value for name, value in (rest | captions).items() if value is not None}


def _write_text(path: Path, text: str) -> None:
    """Write a file that gets its name when it is complete."""
    Path(f"{path}.part").write_text(text)
    os.replace(f"{path}.part", path)


def main(arguments: Sequence[str]) -> None:
    """python -m pe_av.data.shards pack MANIFEST FOLDER | index FOLDER"""
    try:
        match arguments:
            case ["pack", source, folder]:
                for name, reason in pack(read_manifest(source), folder).items():
                    print(f"left out {name}: {reason}", file=sys.stderr)
            case ["index", folder]:
                for problem in index(folder)[1]:
                    print(problem, file=sys.stderr)
            case _:
                sys.exit(f"usage: {main.__doc__}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"written: {folder}/manifest.parquet; train with data.train={folder}/manifest.parquet")


if __name__ == "__main__":
    main(sys.argv[1:])
