"""From the settings of a data set to its clips, and from a clip to what is decoded of it."""

from typing import Any

from pe_av.config import ConfigError, DataConfig
from pe_av.data.demo import prepare_demo
from pe_av.data.manifest import Clip, Manifest, read_manifest
from pe_av.data.manifest_formats import CAPTION_COLUMNS, SURROGATE
from pe_av.data.stamps import prepare_stamps
from pe_av.media.processor import Processor
from pe_av.media.tracks import MediaError, MissingTrackError


class ClipReader:
    """Decodes a clip into an item: {"id", "captions"}, "waveform" and "frames" as far as the clip has them, and notes:
    "error" says what is damaged or cannot be read, "partial" what is merely missing, a track or a caption."""

    def __init__(self, processor: Processor, max_seconds: float):
        self.processor, self.max_seconds = processor, max_seconds

    def __call__(self, clip: Clip) -> dict[str, Any]:
        errors, missing = ([note] if note else [] for note in (clip.problem, clip.lacks))
        item: dict[str, Any] = {"id": clip.id, "captions": {}}
        for kind, texts in clip.captions.items():
            missing += [f"the {CAPTION_COLUMNS[kind]} is empty" for text in texts if not text.strip()]
            errors += [f"the {CAPTION_COLUMNS[kind]} is not UTF-8" for text in texts if SURROGATE.search(text)]
            if usable := [text for text in texts if text.strip() and not SURROGATE.search(text)]:
                item["captions"][kind] = usable
        sources = (
            ("waveform", clip.audio, self.processor.audio_item),
            ("frames", clip.video, self.processor.video_item),
        )
        for name, source, read in sources:
            if source is not None:
                try:
                    item[name] = read(source, max_seconds=self.max_seconds, start=clip.start, end=clip.end)
                except Exception as error:  # whatever a decoder raises costs this clip, and not the run
                    (missing if isinstance(error, MissingTrackError) else errors).append(_reason(source, error))
        notes = {"error": errors, "partial": missing}
        return item | {note: "; ".join(dict.fromkeys(reasons)) for note, reasons in notes.items() if reasons}


def _reason(source: str, error: Exception) -> str:
    """One printable line that begins with the source."""
    text = str(error) if isinstance(error, MediaError) else f"{type(error).__name__}: {error}"
    text = text if text.startswith(source) else f"{source}: {text}"
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def open_manifest(config: DataConfig, name: str) -> Manifest:
    """The clips to train on ("train") or to evaluate on ("eval"); demo and stamps are rendered if they do not exist.

    Raises:
        ConfigError: no data set is given, or its manifest cannot be used.
    """
    if config.stamps is not None or config.demo is not None:
        train, held_out = prepare_demo(config.demo) if config.stamps is None else prepare_stamps(config.stamps)
        return read_manifest(train if name == "train" else held_out)
    path = getattr(config, name)
    if path is None:
        raise ConfigError(f"data.{name} is not set: give a manifest, e.g. data.{name}=clips.jsonl, or use data=demo")
    return read_manifest(path, getattr(config, f"{name}_split"))
