"""Features of the frozen parts, computed once: what the codec makes of the sound, the frame encoder of the frames.

    python -m pe_av.data.cache CHECKPOINT MANIFEST FOLDER [codec|frames …]

writes safetensors shards into FOLDER, with the config and the hash of the weights that made them; started again, it
goes on. `data.cache=FOLDER` then trains and evaluates on them; a model with other weights there is refused. Without
"codec" or "frames" both are computed; a frame encoder that is still to be trained must not be cached.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint import load_model
from ..config import ConfigError, DataConfig
from ..device import pick_device
from ..model.peav import PEAudioVideo
from .dataset import ClipReader
from .loader import read_all
from .manifest import Clip, Manifest, read_manifest
from .processor import Processor

PARTS = {"codec": "codec_features", "frames": "frame_features"}
SHARD_CLIPS = 256  # clips per file: what an interruption costs at most


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


def key_of(clip: Clip) -> str:
    """A clip's name in the cache; it changes with the part of the file and the file's name, not with its folder."""
    files = [None if path is None else os.path.basename(path) for path in (clip.audio, clip.video)]
    told = json.dumps([clip.id, *files, clip.start, clip.end])
    return hashlib.blake2b(told.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class FeatureCache:
    """The features in a folder, read from memory-mapped files as they are asked for."""

    def __init__(self, folder: str | Path, model: PEAudioVideo, max_seconds: float):
        """
        Raises:
            ConfigError: nothing cached there, or by other weights, another config or for another length of clips.
        """
        self.folder = Path(folder)
        self.where: dict[str, str] = {}  # key -> file
        self.errors: dict[str, str] = {}
        self.parts: list[str] = []
        made_by: dict[str, str] | None = None
        for path in sorted(self.folder.glob("*.safetensors")):
            stored, errors, keys = _describe(path)
            made_by = made_by or stored
            if stored != made_by:
                raise ConfigError(f"{path} was made by another model than its neighbours: delete the folder")
            self.where |= dict.fromkeys(keys, path.name)
            self.errors |= errors
        if made_by is None:
            raise ConfigError(f"{folder}: no features there; python -m pe_av.data.cache computes them")
        self.parts = [part for part in PARTS if part in made_by]
        now = fingerprint(model, self.parts, max_seconds)
        for name, value in made_by.items():
            if now[name] != value:
                what = "clips of another length" if name == "max_seconds" else f"another {name} config or other weights"
                raise ConfigError(f"{folder}: these features are of {what}; compute them again into another folder")
        self._open: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": {}}  # files are opened in the process that reads them

    def get(self, clip: Clip) -> dict[str, Any] | None:
        """`codec_features` (frames, dim) and `frame_features` (F, dim) as far as the clip has them, and its "error"."""
        key = key_of(clip)
        if key not in self.where:
            return None
        name = self.where[key]
        if name not in self._open:
            file = safe_open(self.folder / name, framework="pt")
            self._open[name] = file, set(file.keys())
        file, entries = self._open[name]
        features = [PARTS[part] for part in self.parts if f"{key}.{PARTS[part]}" in entries]
        item = {feature: file.get_tensor(f"{key}.{feature}") for feature in features}
        return item | ({"error": self.errors[key]} if key in self.errors else {})


class CachedReader:
    """As `ClipReader`, but from a cache what it holds; only what it does not is decoded."""

    def __init__(self, cache: FeatureCache, processor: Processor, max_seconds: float):
        self.cache, self.read = cache, ClipReader(processor, max_seconds)

    def __call__(self, clip: Clip) -> dict[str, Any]:
        found = self.cache.get(clip)
        if found is None:
            return {"id": clip.id, "captions": {}, "error": "not in the feature cache; run pe_av.data.cache again"}
        audio = None if "codec" in self.cache.parts else clip.audio
        video = None if "frames" in self.cache.parts else clip.video
        rest = self.read(Clip(clip.id, audio, video, clip.captions, clip.start, clip.end, problem=clip.problem))
        errors = dict.fromkeys(item["error"] for item in (rest, found) if "error" in item)
        return rest | found | ({"error": "; ".join(errors)} if errors else {})


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
    done = {key for path in shards for key in _describe(path)[2]}
    clips = [clip for clip in manifest if key_of(clip) not in done]
    number = 1 + max((int(path.stem) for path in shards), default=-1)
    tensors: dict[str, Tensor] = {}
    keys: list[str] = []
    errors: dict[str, str] = {}

    def write() -> None:
        told = {"made_by": json.dumps(made_by), "keys": json.dumps(keys), "errors": json.dumps(errors)}
        path = folder / f"{number:06d}.safetensors"
        # an empty file is no safetensors file
        save_file(tensors or {"nothing": torch.zeros(1)}, f"{path}.part", metadata=told)
        os.replace(f"{path}.part", path)

    made = _features(model, processor, clips, parts, max_seconds, num_workers, time_limit)
    for clip, item in zip(clips, made, strict=True):
        key = key_of(clip)
        keys.append(key)
        tensors |= {f"{key}.{name}": item[name].contiguous() for name in PARTS.values() if name in item}
        if "error" in item:
            errors[key] = item["error"]
        if len(keys) == SHARD_CLIPS:
            write()
            number, tensors, keys, errors = number + 1, {}, [], {}
    if keys:
        write()
    return len(clips)


@torch.no_grad()
def _features(
    model: PEAudioVideo,
    processor: Processor,
    clips: Sequence[Clip],
    parts: Sequence[str],
    max_seconds: float,
    num_workers: int,
    time_limit: float,
) -> Iterator[dict[str, Any]]:
    """What goes into the cache of every clip; each by itself, so that nothing depends on its neighbours."""
    device = next(model.parameters()).device
    wanted = [
        Clip(c.id, c.audio if "codec" in parts else None, c.video if "frames" in parts else None, {}, c.start, c.end)
        for c in clips
    ]
    items = read_all(wanted, ClipReader(processor, max_seconds), num_workers, time_limit)
    for item in track(items, "computing features", total=len(clips), console=Console(stderr=True)):
        made = {"error": item["error"]} if "error" in item else {}
        if "waveform" in item:
            made["codec_features"] = model.audio.encode(item["waveform"][None, None].to(device))[0][0].cpu()
        if "frames" in item:
            frames = processor.batch_videos([item["frames"]])["pixel_values_videos"].to(device)
            pieces = [model.video.encode(piece)[0] for piece in frames.split(64, dim=1)]
            made["frame_features"] = torch.cat(pieces).cpu()
        yield made


def _describe(path: Path) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """(what made it, key -> error, keys) of a shard."""
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata()
            return json.loads(told["made_by"]), json.loads(told["errors"]), json.loads(told["keys"])
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
