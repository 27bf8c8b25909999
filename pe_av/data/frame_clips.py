"""Recordings with captions and the times that they are about, for frame-level training: manifest, reader, batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..config import ConfigError
from .manifest import SURROGATE, jsonl_rows
from .parts import caption_key
from .processor import Processor, mask_of


@dataclass(frozen=True)
class FrameClip:
    """One line of a manifest."""

    id: str
    audio: str  # file with the sound
    caption: str
    spans: list[list[float]]  # [start_s, end_s] of what the caption is about
    video: str | None = None  # never read: what a loader names in errors, where a clip has one


def read_frame_manifest(path: Path) -> list[FrameClip]:
    """The lines {"path", "caption", "spans"} of a JSONL file; relative paths start from its folder.

    Raises:
        ConfigError: no such file, no lines, or a line that is not like that, which is named.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such manifest")
    clips = []
    for where, line in jsonl_rows(path):
        source, caption, spans = (line.get(name) for name in ("path", "caption", "spans"))
        if not (_is_text(source) and _is_text(caption) and isinstance(spans, list) and all(map(_is_span, spans))):
            raise ConfigError(
                f'{where}: not {{"path": …, "caption": …, "spans": [[start_s, end_s], …]}} with start < end'
            )
        for text in (source, caption):
            if SURROGATE.search(text):
                raise ConfigError(f"{where}: {ascii(text)} is not UTF-8; correct it, or save the file as UTF-8")
        # a recording may stand in several lines, with other captions
        number = where.rpartition(":")[2]
        spans = [[float(start), float(end)] for start, end in spans]
        clips.append(FrameClip(f"{number}:{source}", str(path.parent / source), caption, spans))
    if not clips:
        raise ConfigError(f"{path}: holds no recordings")
    return clips


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_span(value: Any) -> bool:
    """Whether it is [start_s, end_s], of numbers that float64 can hold."""
    if not (isinstance(value, list) and len(value) == 2 and all(type(time) in (int, float) for time in value)):
        return False
    start, end = value
    return -(2**53) < start < end and (end < 2**53 or end == math.inf)


class FrameReader:
    """Decodes a recording: {"id", "caption", "spans", "waveform"}, or "error" in place of the last."""

    def __init__(self, processor: Processor, max_seconds: float):
        self.processor, self.max_seconds = processor, max_seconds

    def __call__(self, clip: FrameClip) -> dict[str, Any]:
        item: dict[str, Any] = {"id": clip.id, "caption": clip.caption, "spans": clip.spans}
        try:
            return item | {"waveform": self.processor.audio_item(clip.audio, max_seconds=self.max_seconds)}
        except Exception as error:  # whatever a decoder comes up with is one bad item and never the end
            return item | {"error": str(error) or f"{clip.audio}: {type(error).__name__}"}


class FrameCollate:
    """Items -> a batch of B rows, as a dict: "inputs" of `PEAudioFrame` (none without rows), "targets" (B, T) bool,
    "mask" (B, T) bool, "captions" (B,) int64, equal where captions are in every process; "ids", "read", "bad" and
    "partial" as `dataset.Collate` has them.

    Args:
        seconds_per_frame: of the model.
    """

    def __init__(self, processor: Processor, seconds_per_frame: float):
        self.processor, self.seconds_per_frame = processor, seconds_per_frame

    def __call__(self, items: Sequence[dict[str, Any]], picks: Sequence[int] | None = None) -> dict[str, Any]:
        good = [item for item in items if "error" not in item]
        inputs: dict[str, Tensor] = {}
        lengths = torch.zeros(0, dtype=torch.int64)
        if good and "codec_features" in good[0]:
            features = [item["codec_features"] for item in good]
            lengths = torch.tensor([len(feature) for feature in features])
            inputs = {"codec_features": pad_sequence(features, batch_first=True), "padding_mask": mask_of(features)}
        elif good:
            hop = self.processor.config.audio.codec.hop_length
            lengths = torch.tensor([len(item["waveform"]) // hop for item in good])
            inputs = self.processor.batch_audio([item["waveform"] for item in good])
        frames = torch.arange(int(lengths.max()) if good else 0)
        middle = (frames + 0.5) * self.seconds_per_frame
        targets = torch.zeros(len(good), len(frames), dtype=torch.bool)
        for row, item in enumerate(good):
            for start, end in item["spans"]:
                targets[row] |= (start <= middle) & (middle < end)
        return {
            "inputs": inputs | (self.processor.batch_text([item["caption"] for item in good]) if good else {}),
            "targets": targets,
            "mask": frames < lengths[:, None],
            "captions": torch.tensor([caption_key(item["caption"]) for item in good], dtype=torch.int64),
            "ids": [item["id"] for item in good],
            "read": len(items),
            "bad": [{"id": item["id"], "error": item["error"]} for item in items if "error" in item],
            "partial": [],
        }
