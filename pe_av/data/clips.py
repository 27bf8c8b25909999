"""From the settings of a data set to its clips, and from a clip to what is decoded of it."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pe_av.config import ConfigError, DataConfig
from pe_av.data.demo import prepare_demo
from pe_av.data.manifest import Clip, Manifest, read_manifest
from pe_av.data.manifest_formats import CAPTION_COLUMNS, SURROGATE
from pe_av.data.stamps import prepare_stamps
from pe_av.media.processor import Processor
from pe_av.media.tracks import MediaError, MissingTrackError, probe


class ClipReader:
    """Decodes a clip into an item: {"id", "captions"}, "waveform" and "frames" as far as the clip has them, and notes:
    "error" says what is damaged or cannot be read, "partial" what is merely missing, a track or a caption; "cut" is the
    number of seconds by which a clip is longer than `max_seconds`."""

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
        if cut := self.seconds_cut(clip, item):
            item["cut"] = cut
        notes = {"error": errors, "partial": missing}
        return item | {note: "; ".join(dict.fromkeys(reasons)) for note, reasons in notes.items() if reasons}

    def seconds_cut(self, clip: Clip, item: dict[str, Any]) -> float:
        """How many seconds of a clip are not in the item that was read or cached of it."""
        codec, read = self.processor.config.audio.codec, None
        if "waveform" in item:
            read = len(item["waveform"]) / codec.sampling_rate
        elif "codec_features" in item:
            read = len(item["codec_features"]) * codec.hop_length / codec.sampling_rate
        source = clip.audio if read is not None else clip.video
        if source is None or (read is None and not item.keys() & {"frames", "frame_features"}):
            return 0.0
        lengths = clip.seconds, None if clip.end is None else clip.end - clip.start
        return seconds_cut(source, read, self.max_seconds, clip.start, lengths)


def seconds_cut(
    source: str, read: float | None, max_seconds: float, start: float = 0.0, lengths: Sequence[float | None] = ()
) -> float:
    """How many seconds of a clip are beyond `max_seconds` and were not read; what is below a tenth counts as nothing,
    because headers round.

    Args:
        source: its file, whose header is read if that is needed.
        read: the seconds of audio that were read, if they are known: fewer than `max_seconds` reached the clip's end.
        start: where in the file the clip begins.
        lengths: the seconds that the clip lasts, as far as the manifest says so.
    """
    if read is not None and read < max_seconds - 0.1:
        return 0.0
    known = [length for length in lengths if length is not None]
    if not known or min(known) > max_seconds:  # a segment may reach beyond the end of its file
        with suppress(MediaError):
            known += [seconds - start for seconds in probe(source).values() if seconds is not None][:1]
    cut = round(min(known, default=0.0) - max_seconds, 3)
    return cut if cut >= 0.1 else 0.0


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
