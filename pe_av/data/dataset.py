"""Clips with captions: a JSONL manifest, a dataset that decodes, and batches for the model.

An item that cannot be read is not an error here: it becomes `{"id", "error"}`, travels through the batch's "bad" list
to whoever drives, and is skipped.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from ..config import ConfigError, DataConfig
from .demo import prepare_demo
from .processor import Processor


@dataclass(frozen=True)
class Clip:
    id: str
    path: str
    caption: str


def read_manifest(path: str | Path) -> list[Clip]:
    """The clips of a JSONL manifest: one {"path", "caption"} per line, "id" optional; other keys are left alone.

    Relative paths start from the manifest's own folder.

    Raises:
        ConfigError: no such file, no clips, or a line that is not JSON or lacks a key; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such manifest")
    clips = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{number}: not JSON ({error.msg}); one object per line") from None
        for key in ("path", "caption"):
            if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
                raise ConfigError(f'{path}:{number}: no text under "{key}"; a line is {{"path": …, "caption": …}}')
        clips.append(Clip(str(entry.get("id", entry["path"])), str(path.parent / entry["path"]), entry["caption"]))
    if not clips:
        raise ConfigError(f"{path}: holds no clips")
    repeated = len(clips) - len({clip.id for clip in clips})
    if repeated:
        raise ConfigError(f"{path}: {repeated} ids stand more than once; give every clip its own")
    return clips


class ClipDataset(Dataset):
    """Decodes clip i when asked for it: {"id", "caption", "waveform", "frames"}, or {"id", "error"} if it cannot."""

    def __init__(self, clips: list[Clip], processor: Processor, max_seconds: float):
        self.clips, self.processor, self.max_seconds = clips, processor, max_seconds

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        clip = self.clips[index]
        try:
            if not clip.caption.strip():
                raise ValueError("the caption is empty")
            return {"id": clip.id, "caption": clip.caption} | self.processor.load_clip(clip.path, self.max_seconds)
        except (ValueError, OSError) as error:  # MediaError is a ValueError
            return {"id": clip.id, "error": str(error)}


class MemoryDataset(Dataset):
    """Items that are all decoded already."""

    def __init__(self, items: list[dict[str, Any]]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def load_into_memory(
    dataset: ClipDataset, num_workers: int, encode: Callable[[Tensor], Tensor] | None, title: str
) -> MemoryDataset:
    """Decode every clip once, with a progress bar.

    Args:
        encode: the codec where it is frozen, (1, 1, samples) -> (1, frames, dim): its features replace the waveform,
            since they would come out the same in every epoch.
    """
    # each worker decodes one clip at a time, in order: the items do not depend on how many workers there are
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
    items = []
    for item in track(loader, title, total=len(dataset), console=Console(stderr=True)):
        if encode is not None and "waveform" in item:
            item["codec_features"] = encode(item.pop("waveform")[None, None])[0]
        items.append(item)
    return MemoryDataset(items)


class Collate:
    """Items -> {"inputs": the model's arguments, "ids": …, "bad": items that cannot be used}."""

    def __init__(self, processor: Processor):
        self.processor = processor

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        good = [item for item in items if "error" not in item]
        bad = [item for item in items if "error" in item]
        return {"inputs": self._inputs(good) if good else None, "ids": [item["id"] for item in good], "bad": bad}

    def _inputs(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.processor.batch_text([item["caption"] for item in items])
        batch |= self.processor.batch_videos([item["frames"] for item in items])
        if "waveform" in items[0]:
            return batch | self.processor.batch_audio([item["waveform"] for item in items])
        features = [item["codec_features"] for item in items]
        lengths = torch.tensor([len(feature) for feature in features])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return batch | {"codec_features": pad_sequence(features, batch_first=True), "padding_mask": mask}


def to_device(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def manifest_paths(config: DataConfig) -> tuple[Path | None, Path | None]:
    """(train, eval) manifests of a data set; the demo world is rendered if it is not there yet."""
    if config.demo is not None:
        return prepare_demo(config.demo)
    return tuple(None if path is None else Path(path) for path in (config.train, config.eval))


class BadItems:
    """Items that could not be used: listed in a file, counted, and too many of them end the run."""

    def __init__(self, path: Path, total: int, max_fraction: float):
        """
        Args:
            path: JSONL file of {"id", "error"}.
            total: items that there are.
            max_fraction: of `total`, above which `add` raises.
        """
        self.path, self.total, self.max_fraction = path, total, max_fraction
        self.reasons: dict[str, str] = {}

    def add(self, items: Iterable[dict[str, Any]]) -> None:
        new = [item for item in items if item["id"] not in self.reasons]
        if not new:
            return
        self.reasons |= {item["id"]: item["error"] for item in new}
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"id": item["id"], "error": item["error"]}) + "\n" for item in new)
        if len(self.reasons) > self.max_fraction * self.total:
            raise ConfigError(
                f"{len(self.reasons)} of {self.total} items cannot be used, more than "
                f"max_bad_fraction={self.max_fraction:g}; the last: {new[-1]['error']}; all are listed in {self.path}"
            )
