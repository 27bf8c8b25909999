"""From the settings of a data set to its clips, and from a clip to what is decoded of it."""

from typing import Any

from pe_av.config import ConfigError, DataConfig
from pe_av.data.demo import prepare_demo
from pe_av.data.manifest import Clip, Manifest, read_manifest
from pe_av.data.manifest_formats import CAPTION_COLUMNS
from pe_av.data.stamps import prepare_stamps
from pe_av.media.decode import MediaError, MissingTrackError
from pe_av.media.processor import Processor


class ClipReader:
    """Decodes a clip: {"id", "captions", "waveform", "frames"} as far as it has them, and where there is something to
    tell, "error": what is damaged or cannot be read, and "partial": what merely is not there, a track or a caption."""

    def __init__(self, processor: Processor, max_seconds: float):
        self.processor, self.max_seconds = processor, max_seconds

    def __call__(self, clip: Clip) -> dict[str, Any]:
        errors, absent = ([told] if told else [] for told in (clip.problem, clip.lacks))
        item: dict[str, Any] = {"id": clip.id, "captions": {}}
        for kind, texts in clip.captions.items():
            absent += [f"the {CAPTION_COLUMNS[kind]} is empty" for text in texts if not text.strip()]
            errors += [f"the {CAPTION_COLUMNS[kind]} is not UTF-8" for text in texts if not _is_text(text)]
            if good := [text for text in texts if text.strip() and _is_text(text)]:
                item["captions"][kind] = good
        readers = (
            ("waveform", clip.audio, self.processor.audio_item),
            ("frames", clip.video, self.processor.video_item),
        )
        for name, source, read in readers:
            if source is not None:
                try:
                    item[name] = read(source, max_seconds=self.max_seconds, start=clip.start, end=clip.end)
                except Exception as error:  # whatever a decoder does to one clip of millions, the others go on
                    (absent if isinstance(error, MissingTrackError) else errors).append(_reason(source, error))
        told = {"error": errors, "partial": absent}
        return item | {key: "; ".join(dict.fromkeys(texts)) for key, texts in told.items() if texts}


def _is_text(caption: str) -> bool:
    """Whether it is Unicode; half of a surrogate pair, which JSON can hold, is not, and no tokenizer takes it."""
    return not any("\ud800" <= character <= "\udfff" for character in caption)


def _reason(source: str, error: Exception) -> str:
    """One line that begins with the source and can be printed."""
    text = str(error) if isinstance(error, MediaError) else f"{type(error).__name__}: {error}"
    text = text if text.startswith(source) else f"{source}: {text}"
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def open_manifest(config: DataConfig, split: str) -> Manifest:
    """The clips of a data set to "train" or to "eval"uate on; demo and stamps are rendered if they are not there.

    Raises:
        ConfigError: no such data set, or a manifest that is none.
    """
    path, part = getattr(config, split), getattr(config, f"{split}_split")
    if config.demo is not None:
        path, part = prepare_demo(config.demo)[("train", "eval").index(split)], None
    if config.stamps is not None:
        path, part = prepare_stamps(config.stamps)[("train", "eval").index(split)], None
    if path is None:
        raise ConfigError(f"data.{split} is not set: give a manifest, e.g. data.{split}=clips.jsonl, or use data=demo")
    return read_manifest(path, part)
