"""Features of the frozen parts, computed once: what the codec makes of the sound, the frame encoder of the frames.

    python -m pe_av.data.cache CHECKPOINT MANIFEST FOLDER [codec|frames …]

writes safetensors shards into FOLDER, with the config and the hash of the weights that made them; started again, it
goes on. `data.cache=FOLDER` then trains and evaluates on them; a model with other weights there is refused. Without
"codec" or "frames" both are computed; a frame encoder that is still to be trained must not be cached.

Features belong to a part of a file: of this path, size and time of change. So manifests can share a cache, and what was
computed of a file that has changed since is not used.
"""

import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import tee
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pe_av.checkpoint import load_model
from pe_av.config import ConfigError, DataConfig
from pe_av.data.clips import ClipReader
from pe_av.data.manifest import Clip, Manifest, read_manifest
from pe_av.device import pick_device
from pe_av.media.processor import Processor
from pe_av.media.tracks import source_path
from pe_av.model.pe_audio_video import PEAudioVideo
from pe_av.ranks import of_rank_0, rank
from pe_av.workers import read_all

PARTS = {"codec": "codec_features", "frames": "frame_features"}
SOURCES = {"codec": "audio", "frames": "video"}  # the file of a clip that a part is computed from
NOTES = ("error", "partial")  # what an item says of itself
SHARD_CLIPS = 256  # clips per file: what an interruption costs at most
FORMAT = "2"


def fingerprint(model: PEAudioVideo, parts: Sequence[str], max_seconds: float) -> dict[str, str]:
    """What features depend on: part -> hash of its config and weights, and the longest clip."""
    audio, video = model.config.audio, model.config.video
    sources = {
        "codec": (asdict(audio.codec) | {"tile_seconds": None, "trainable": None}, model.audio.codec),
        "frames": ([asdict(video.vision), video.num_frames, video.frames_per_second], model.video.vision),
    }
    found = {"max_seconds": f"{max_seconds:g}"}
    for part in parts:
        config, module = sources[part]
        digest = hashlib.sha256(json.dumps(config).encode())
        for name, weight in sorted(module.state_dict().items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        found[part] = digest.hexdigest()
    return found


State = list[list[int] | None]  # of each file of a clip: size and time of change in ns; None: not there


def identify(clip: Clip, parts: Sequence[str]) -> tuple[str, State]:
    """The name that the features of a clip have in the cache, which follows from its files' paths and its part of
    them, and the state of the files; for one look at each file."""
    sources = [getattr(clip, SOURCES[part]) for part in PARTS if part in parts]
    seen = {source: _look(source) for source in dict.fromkeys(sources) if source is not None}
    told = json.dumps([[seen[s][0] if s in seen else None for s in sources], clip.start, clip.end])
    name = hashlib.blake2b(told.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return name, [state for _, state in seen.values()]


def _look(source: str) -> tuple[str, list[int] | None]:
    """(its path without links, its state) of a file, or of one in a tar, whose state is the tar's."""
    file = source_path(source)
    folder, name = os.path.split(file)
    path = os.path.join(_resolved(folder), name)
    try:
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            path = os.path.realpath(path)
            found = os.stat(path)
        state = [found.st_size, found.st_mtime_ns]
    except OSError:
        state = None
    return path + source[len(file) :], state


_resolved = lru_cache(2**16)(os.path.realpath)  # of folders: it looks at every part of a path


class FeatureCache:
    """The features in a folder, read from memory-mapped files as they are asked for."""

    def __init__(self, folder: str | Path, model: PEAudioVideo, max_seconds: float):
        """
        Raises:
            ConfigError: nothing cached there, or by other weights, another config or for another length of clips.
        """
        self.folder = Path(folder)
        self.where: dict[str, tuple[str, State]] = {}  # name -> shard, and the files as they were
        self.notes: dict[str, dict[str, str]] = {}  # name -> "error" and "partial" where it has them
        made_by: dict[str, str] | None = None
        for path in sorted(self.folder.glob("*.safetensors")):
            stored, clips, notes = _describe(path)
            made_by = made_by or stored
            if stored != made_by:
                raise ConfigError(f"{path} was made by another model than its neighbours: delete the folder")
            for name, state in clips.items():  # computed again in a later shard, it counts as there
                self.where[name] = path.name, state
                self.notes[name] = notes.get(name, {})
        if made_by is None:
            raise ConfigError(f"{folder}: no features there; python -m pe_av.data.cache computes them")
        self.parts = [part for part in PARTS if part in made_by]
        # the weights that count are rank 0's; others may not have them yet
        now = of_rank_0(fingerprint(model, self.parts, max_seconds) if rank() == 0 else None)
        for name, value in made_by.items():
            if now[name] != value:
                what = "clips of another length" if name == "max_seconds" else f"another {name} config or other weights"
                raise ConfigError(f"{folder}: these features are of {what}; compute them again into another folder")
        self._open: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": {}}  # files are opened in the process that reads them

    def get(self, clip: Clip) -> dict[str, Any]:
        """`codec_features` (frames, dim) and `frame_features` (F, dim) as far as the clip has them, with its "error"
        and "partial"; nothing but an "error" where they are not of the files that are there now."""
        name, now = identify(clip, self.parts)
        shard, then = self.where.get(name, (None, None))
        if shard is None:
            return {"error": f"{clip.video or clip.audio}: not in the feature cache; run pe_av.data.cache again"}
        if now != then:
            files = dict.fromkeys(filter(None, (getattr(clip, SOURCES[part]) for part in self.parts)))
            file, state = next((f, n) for f, n, t in zip(files, now, then, strict=True) if n != t)
            what = "gone" if state is None else "changed"
            return {"error": f"{file}: {what} since its features were computed; run pe_av.data.cache again"}
        if shard not in self._open:
            file = safe_open(self.folder / shard, framework="pt")
            self._open[shard] = file, set(file.keys())
        file, entries = self._open[shard]
        features = [PARTS[part] for part in self.parts if f"{name}.{PARTS[part]}" in entries]
        return {feature: file.get_tensor(f"{name}.{feature}") for feature in features} | self.notes[name]


class CachedReader:
    """As `ClipReader`, but from a cache what it holds; only what it does not is decoded."""

    def __init__(self, cache: FeatureCache, processor: Processor, max_seconds: float):
        self.cache, self.read = cache, ClipReader(processor, max_seconds)

    def __call__(self, clip: Clip) -> dict[str, Any]:
        found = self.cache.get(clip)
        audio = None if "codec" in self.cache.parts else clip.audio
        video = None if "frames" in self.cache.parts else clip.video
        rest = self.read(replace(clip, audio=audio, video=video))
        notes = {note: dict.fromkeys(item[note] for item in (rest, found) if note in item) for note in NOTES}
        return rest | found | {note: "; ".join(told) for note, told in notes.items() if told}


def reader_for(config: DataConfig, model: PEAudioVideo, processor: Processor) -> ClipReader | CachedReader:
    """What reads the clips of a data set: the decoder, or the cache if one is set; what is cached is then frozen.

    Raises:
        ConfigError: the cache is of another model.
    """
    if config.cache is None:
        return ClipReader(processor, config.max_seconds)
    cache = FeatureCache(config.cache, model, config.max_seconds)
    if "frames" in cache.parts:
        model.video.vision.requires_grad_(False)
    return CachedReader(cache, processor, config.max_seconds)


def write_cache(
    model: PEAudioVideo,
    processor: Processor,
    manifest: Manifest,
    folder: str | Path,
    parts: Sequence[str] = tuple(PARTS),
    max_seconds: float = 30.0,
    num_workers: int = 2,
    time_limit: float = 60.0,
) -> int:
    """Compute what is not in the folder yet.

    Returns:
        how many clips were added.
    Raises:
        ConfigError: the folder holds features of other weights, or a part is to be trained.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if "codec" in parts and model.config.audio.codec.trainable:
        raise ConfigError("the codec is trainable: its features change with every step, so they cannot be cached")
    made_by = fingerprint(model, parts, max_seconds)
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        FeatureCache(folder, model, max_seconds)
        if _describe(shards[0])[0] != made_by:
            raise ConfigError(f"{folder}: holds other parts than {', '.join(parts)}; use another folder")
    done = {name: state for path in shards for name, state in _describe(path)[1].items()}
    number = 1 + max((int(path.stem) for path in shards), default=-1)
    rows = []  # of the clips to compute; of several with one part of a file, the first
    for row, clip in enumerate(manifest):
        name, state = identify(clip, parts)
        if name not in done or done[name] != state:
            rows.append(row)
            done[name] = state
    tensors: dict[str, Tensor] = {}
    clips: dict[str, State] = {}
    notes: dict[str, dict[str, str]] = {}

    def write() -> None:
        told = {"made_by": made_by, "clips": clips, "notes": notes}
        path = folder / f"{number:06d}.safetensors"
        # an empty file is no safetensors file
        metadata = {"format": FORMAT} | {name: json.dumps(value) for name, value in told.items()}
        save_file(tensors or {"nothing": torch.zeros(1)}, f"{path}.part", metadata=metadata)
        os.replace(f"{path}.part", path)

    # the files' state is taken before they are read: what changes meanwhile is then seen as changed
    read, named = tee((clip, identify(clip, parts)) for clip in (manifest[row] for row in rows))
    to_read = (clip for clip, _ in read)
    made = _features(model, processor, to_read, len(rows), parts, max_seconds, num_workers, time_limit)
    for item, (_, (name, state)) in zip(made, named, strict=True):
        clips[name] = state
        tensors |= {f"{name}.{feature}": item[feature].contiguous() for feature in PARTS.values() if feature in item}
        if told := {note: item[note] for note in NOTES if note in item}:
            notes[name] = told
        if len(clips) == SHARD_CLIPS:
            write()
            number, tensors, clips, notes = number + 1, {}, {}, {}
    if clips:
        write()
    return len(rows)


@torch.no_grad()
def _features(
    model: PEAudioVideo,
    processor: Processor,
    clips: Iterable[Clip],
    total: int,
    parts: Sequence[str],
    max_seconds: float,
    num_workers: int,
    time_limit: float,
) -> Iterator[dict[str, Any]]:
    """What goes into the cache of every clip; each by itself, so that nothing depends on its neighbours."""
    device = next(model.parameters()).device
    lacking = {SOURCES[part]: None for part in PARTS if part not in parts}
    wanted = (replace(clip, captions={}, problem=None, lacks=None, **lacking) for clip in clips)
    items = read_all(wanted, ClipReader(processor, max_seconds), num_workers, time_limit)
    for item in track(items, "computing features", total=total, console=Console(stderr=True)):
        made = {note: item[note] for note in NOTES if note in item}
        if "waveform" in item:
            made["codec_features"] = model.audio.encode(item["waveform"][None, None].to(device))[0][0].cpu()
        if "frames" in item:
            frames = processor.batch_videos([item["frames"]])["pixel_values_videos"].to(device)
            pieces = [model.video.encode(piece)[0] for piece in frames.split(64, dim=1)]
            made["frame_features"] = torch.cat(pieces).cpu()
        yield made


def _describe(path: Path) -> tuple[dict[str, str], dict[str, State], dict[str, dict[str, str]]]:
    """(what made it, name -> state of the files, name -> notes) of a shard."""
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata()
            if "made_by" in told and told.get("format") != FORMAT:
                raise ConfigError(
                    f"{path}: features in another format of the cache, which told files apart less well; compute them "
                    "again into another folder"
                )
            made_by, clips, notes = (json.loads(told[name]) for name in ("made_by", "clips", "notes"))
            return made_by, clips, notes
    except (SafetensorError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not a shard of cached features ({error}); delete it, and compute it again"
        ) from None


def main(arguments: Sequence[str]) -> None:
    """python -m pe_av.data.cache CHECKPOINT MANIFEST FOLDER [codec|frames …]"""
    if len(arguments) < 3 or not set(arguments[3:]) <= set(PARTS):
        sys.exit(f"usage: {main.__doc__}")
    checkpoint, manifest, folder, *parts = arguments
    try:
        model = load_model(checkpoint, pick_device("auto"))
        processor = Processor.from_pretrained(checkpoint)
        added = write_cache(model, processor, read_manifest(manifest), folder, parts or tuple(PARTS))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{added} clips added to {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
