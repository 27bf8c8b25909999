"""Features of the frozen encoders, computed once: the codec's of the audio, the frame encoder's of the frames.

    python -m pe_av.data.cache CHECKPOINT MANIFEST FOLDER [codec|frames …]

writes them into FOLDER as safetensors shards, with the config and a hash of the weights that made them; started again,
it continues. `data.cache=FOLDER` then trains and evaluates on them, and refuses a model with other weights. Without
"codec" or "frames", both are computed. Do not cache a frame encoder that is still to be trained.

Features belong to a segment of a file with a certain path, size and time of change, and not to an id. So manifests can
share a cache, and features of a file that has changed since are not used.
"""

import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open

from pe_av.checkpoint import load_model, save_tensors
from pe_av.config import ConfigError, DataConfig
from pe_av.data.clips import ClipReader
from pe_av.data.manifest import Clip, Manifest, read_manifest
from pe_av.device import pick_device
from pe_av.media.processor import Processor
from pe_av.media.tracks import source_path
from pe_av.model.pe_audio_video import PEAudioVideo
from pe_av.ranks import of_rank_0, rank
from pe_av.workers import read_all

FEATURES = {"codec": "codec_features", "frames": "frame_features"}  # encoder -> what it makes of a clip
SOURCES = {"codec": "audio", "frames": "video"}  # encoder -> the file of a clip that it reads
NOTES = ("error", "partial")  # what an item says about itself
SHARD_CLIPS = 256  # clips per file, and the most that an interruption costs
TIME_LIMIT = 60.0  # seconds in which a worker must have read a clip
FORMAT = "2"

State = list[list[int] | None]  # of each file of a clip: size, and time of change in ns; None: no such file


class FeatureCache:
    """The features in a folder, read from memory-mapped files when they are asked for."""

    def __init__(self, folder: str | Path, model: PEAudioVideo, max_seconds: float):
        """
        Raises:
            ConfigError: no features there, or features of other weights, of another config or of clips of another
                maximum length.
        """
        self.folder = Path(folder)
        self.shards: dict[str, tuple[str, State]] = {}  # name -> its shard, and the state of its files
        self.notes: dict[str, dict[str, str]] = {}  # name -> its notes
        made_by: dict[str, str] | None = None
        for path in sorted(self.folder.glob("*.safetensors")):
            shard_made_by, states, notes = _read_metadata(path)
            made_by = made_by or shard_made_by
            if shard_made_by != made_by:
                raise ConfigError(f"{path}: made by another model than the shards beside it; delete the folder")
            for name, state in states.items():  # a later shard replaces an earlier one, of a file that has changed
                self.shards[name] = path.name, state
                self.notes[name] = notes.get(name, {})
        if made_by is None:
            raise ConfigError(f"{folder}: no features there; python -m pe_av.data.cache computes them")
        self.encoders = [encoder for encoder in FEATURES if encoder in made_by]
        # rank 0's weights count; other ranks may not have theirs yet
        expected = of_rank_0(fingerprint(model, self.encoders, max_seconds) if rank() == 0 else None)
        for name, value in made_by.items():
            if expected[name] != value:
                what = "clips of another length" if name == "max_seconds" else f"another {name} config or other weights"
                raise ConfigError(f"{folder}: these features are of {what}; compute them again into another folder")
        self._open: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": {}}  # files are opened in the process that reads them

    def get(self, clip: Clip) -> dict[str, Any]:
        """`codec_features` (positions, dim) and `frame_features` (F, dim) as far as the clip has them, with its notes;
        only an "error" if there are none of its files as they are now."""
        name, now = identify(clip, self.encoders)
        shard, then = self.shards.get(name, (None, None))
        if shard is None:
            return {"error": f"{clip.video or clip.audio}: not in the feature cache; run pe_av.data.cache again"}
        if now != then:
            files = dict.fromkeys(filter(None, (getattr(clip, SOURCES[encoder]) for encoder in self.encoders)))
            file, state = next((f, n) for f, n, t in zip(files, now, then, strict=True) if n != t)
            what = "gone" if state is None else "changed"
            return {"error": f"{file}: {what} since its features were computed; run pe_av.data.cache again"}
        if shard not in self._open:
            file = safe_open(self.folder / shard, framework="pt")
            self._open[shard] = file, set(file.keys())
        file, entries = self._open[shard]
        features = [FEATURES[encoder] for encoder in self.encoders if f"{name}.{FEATURES[encoder]}" in entries]
        return {feature: file.get_tensor(f"{name}.{feature}") for feature in features} | self.notes[name]


class CachedReader:
    """Like `ClipReader`, but takes from a cache what it holds and decodes only the rest."""

    def __init__(self, cache: FeatureCache, processor: Processor, max_seconds: float):
        self.cache, self.read = cache, ClipReader(processor, max_seconds)
        self.seconds_cut = self.read.seconds_cut

    def __call__(self, clip: Clip) -> dict[str, Any]:
        cached = self.cache.get(clip)
        rest = self.read(replace(clip, **{SOURCES[encoder]: None for encoder in self.cache.encoders}))
        notes = {note: dict.fromkeys(item[note] for item in (rest, cached) if note in item) for note in NOTES}
        item = rest | cached
        cut = self.seconds_cut(clip, item)
        return item | {note: "; ".join(texts) for note, texts in notes.items() if texts} | ({"cut": cut} if cut else {})


def reader_for(config: DataConfig, model: PEAudioVideo, processor: Processor) -> ClipReader | CachedReader:
    """The reader of a data set's clips: the decoder, or the cache if one is set, which freezes the encoders in it.

    Raises:
        ConfigError: the cache is of another model.
    """
    if config.cache is None:
        return ClipReader(processor, config.max_seconds)
    cache = FeatureCache(config.cache, model, config.max_seconds)
    if "frames" in cache.encoders:
        model.video.vision.requires_grad_(False)
    return CachedReader(cache, processor, config.max_seconds)


def write_cache(
    model: PEAudioVideo,
    processor: Processor,
    manifest: Manifest,
    folder: str | Path,
    encoders: Sequence[str] = tuple(FEATURES),
    max_seconds: float = 30.0,
    num_workers: int = 2,
) -> int:
    """Compute the features that are not in the folder yet.

    Returns:
        the number of clips that were added.
    Raises:
        ConfigError: the folder holds features of other weights or encoders, or the codec is to be trained.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if "codec" in encoders and model.config.audio.codec.trainable:
        raise ConfigError("the codec is trainable: its features change with every step, so they cannot be cached")
    made_by = fingerprint(model, encoders, max_seconds)
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        FeatureCache(folder, model, max_seconds)
        if _read_metadata(shards[0])[0] != made_by:
            raise ConfigError(
                f"{folder}: holds features of encoders other than {', '.join(encoders)}; use another folder"
            )
    states = {name: state for path in shards for name, state in _read_metadata(path)[1].items()}
    number = 1 + max((int(path.stem) for path in shards), default=-1)
    # The states are taken before the files are read, so what changes meanwhile is noticed later.
    rows: dict[str, int] = {}  # name -> row of the manifest, the first of those with this segment of these files
    for row, clip in enumerate(manifest):
        name, state = identify(clip, encoders)
        if states.get(name) != state:
            states[name] = state
            rows.setdefault(name, row)
    clips = (manifest[row] for row in rows.values())
    items = _features(model, processor, clips, len(rows), encoders, max_seconds, num_workers)
    pairs = zip(rows, items, strict=True)
    while shard := dict(islice(pairs, SHARD_CLIPS)):
        _write_shard(folder / f"{number:06d}.safetensors", made_by, {name: states[name] for name in shard}, shard)
        number += 1
    return len(rows)


def fingerprint(model: PEAudioVideo, encoders: Sequence[str], max_seconds: float) -> dict[str, str]:
    """What features depend on: for each encoder a hash of its config and weights, and the longest clip."""
    audio, video = model.config.audio, model.config.video
    sources = {
        "codec": (asdict(audio.codec) | {"tile_seconds": None, "trainable": None}, model.audio.codec),
        "frames": ([asdict(video.vision), video.num_frames, video.frames_per_second], model.video.vision),
    }
    hashes = {"max_seconds": f"{max_seconds:g}"}
    for encoder in encoders:
        config, module = sources[encoder]
        digest = hashlib.sha256(json.dumps(config).encode())
        for name, weight in sorted(module.state_dict().items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        hashes[encoder] = digest.hexdigest()
    return hashes


def identify(clip: Clip, encoders: Sequence[str]) -> tuple[str, State]:
    """The name of a clip's features in the cache, made from the paths of its files and its segment of them, and the
    state of the files. Looks once at each file."""
    sources = [getattr(clip, SOURCES[encoder]) for encoder in FEATURES if encoder in encoders]
    looks = {source: _look(source) for source in dict.fromkeys(sources) if source is not None}
    text = json.dumps([[looks[s][0] if s in looks else None for s in sources], clip.start, clip.end])
    name = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return name, [state for _, state in looks.values()]


def _look(source: str) -> tuple[str, list[int] | None]:
    """(path without links, state) of a file, or of a file in a tar, whose state is the tar's."""
    file = source_path(source)
    folder, name = os.path.split(file)
    path = os.path.join(_real_folder(folder), name)
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            path = os.path.realpath(path)
            status = os.stat(path)
        state = [status.st_size, status.st_mtime_ns]
    except OSError:
        state = None
    return path + source[len(file) :], state


_real_folder = lru_cache(2**16)(os.path.realpath)  # remembered, because it looks at every component of a path


@torch.no_grad()
def _features(
    model: PEAudioVideo,
    processor: Processor,
    clips: Iterable[Clip],
    total: int,
    encoders: Sequence[str],
    max_seconds: float,
    num_workers: int,
) -> Iterator[dict[str, Any]]:
    """The features and notes of every clip; computed one by one, so that nothing depends on a clip's neighbours."""
    device = next(model.parameters()).device
    unused = {source: None for encoder, source in SOURCES.items() if encoder not in encoders}
    bare = (replace(clip, captions={}, problem=None, lacks=None, **unused) for clip in clips)
    items = read_all(bare, ClipReader(processor, max_seconds), num_workers, TIME_LIMIT)
    for item in track(items, "computing features", total=total, console=Console(stderr=True)):
        features = {note: item[note] for note in NOTES if note in item}
        if "waveform" in item:
            features["codec_features"] = model.audio.encode(item["waveform"][None, None].to(device))[0][0].cpu()
        if "frames" in item:
            frames = processor.batch_videos([item["frames"]])["pixel_values_videos"].to(device)
            pieces = [model.video.encode(piece)[0] for piece in frames.split(64, dim=1)]
            features["frame_features"] = torch.cat(pieces).cpu()
        yield features


def _write_shard(path: Path, made_by: dict[str, str], states: dict[str, State], items: dict[str, Any]) -> None:
    """Write a shard, which gets its name when it is complete. `states` and `items` are by the clips' names."""
    tensors = {
        f"{name}.{feature}": item[feature].contiguous()
        for name, item in items.items()
        for feature in FEATURES.values()
        if feature in item
    }
    notes = {name: {note: item[note] for note in NOTES if note in item} for name, item in items.items()}
    about = {"made_by": made_by, "clips": states, "notes": {name: texts for name, texts in notes.items() if texts}}
    metadata = {"format": FORMAT} | {key: json.dumps(value) for key, value in about.items()}
    # safetensors needs at least one tensor
    save_tensors(tensors or {"nothing": torch.zeros(1)}, f"{path}.part", metadata)
    os.replace(f"{path}.part", path)


def _read_metadata(path: Path) -> tuple[dict[str, str], dict[str, State], dict[str, dict[str, str]]]:
    """(what made a shard, name -> state of the files, name -> notes)."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if "made_by" in metadata and metadata.get("format") != FORMAT:
                raise ConfigError(
                    f"{path}: features in another format of the cache, which did not tell files apart reliably; "
                    "compute them again into another folder"
                )
            made_by, states, notes = (json.loads(metadata[key]) for key in ("made_by", "clips", "notes"))
            return made_by, states, notes
    except (SafetensorError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a shard of cached features ({error}); delete it and compute it again") from None


def main(arguments: Sequence[str]) -> None:
    """python -m pe_av.data.cache CHECKPOINT MANIFEST FOLDER [codec|frames …]"""
    if len(arguments) < 3 or not set(arguments[3:]) <= set(FEATURES):
        sys.exit(f"usage: {main.__doc__}")
    checkpoint, manifest, folder, *encoders = arguments
    try:
        model = load_model(checkpoint, pick_device("auto"))
        if not isinstance(model, PEAudioVideo):
            raise ConfigError(f"{checkpoint} is a PEAudioFrame, whose training uses no cache: give a PEAudioVideo")
        processor = Processor.from_pretrained(checkpoint)
        added = write_cache(model, processor, read_manifest(manifest), folder, encoders or tuple(FEATURES))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{added} clips added to {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
