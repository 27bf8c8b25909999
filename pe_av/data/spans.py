"""Recordings with a caption and the spans of time that it is about, for frame-level training: manifest and reader."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pe_av.config import ConfigError
from pe_av.data.clips import seconds_cut
from pe_av.data.manifest_formats import SURROGATE, jsonl_rows
from pe_av.media.processor import Processor


@dataclass(frozen=True)
class SpanClip:
    """One line of a manifest."""

    id: str
    audio: str  # file with the audio
    caption: str
    spans: list[list[float]]  # [start_s, end_s] of what the caption is about
    video: str | None = None  # never read: a loader's messages name it, where a clip has one


def read_span_manifest(path: Path) -> list[SpanClip]:
    """The lines {"path", "caption", "spans"} of a JSONL file; relative paths start from its folder.

    Raises:
        ConfigError: no such file, no lines, or a line of another form, which the message names.
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
        number = where.rpartition(":")[2]  # part of the id, because several lines may be about one recording
        spans = [[float(start), float(end)] for start, end in spans]
        clips.append(SpanClip(f"{number}:{source}", str(path.parent / source), caption, spans))
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


class SpanReader:
    """Decodes a recording: {"id", "caption", "spans", "waveform"}, or "error" instead of the waveform."""

    def __init__(self, processor: Processor, max_seconds: float):
        self.processor, self.max_seconds = processor, max_seconds

    def __call__(self, clip: SpanClip) -> dict[str, Any]:
        item: dict[str, Any] = {"id": clip.id, "caption": clip.caption, "spans": clip.spans}
        try:
            item["waveform"] = self.processor.audio_item(clip.audio, max_seconds=self.max_seconds)
            read = len(item["waveform"]) / self.processor.config.audio.codec.sampling_rate
            cut = seconds_cut(clip.audio, read, self.max_seconds)
            return item | ({"cut": cut} if cut else {})
        except Exception as error:  # whatever a decoder raises costs this recording, and not the run
            return item | {"error": str(error) or f"{clip.audio}: {type(error).__name__}"}
