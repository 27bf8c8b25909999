"""From a clip of a manifest to a batch for the model.

`ClipReader` decodes one clip, in a worker; `Collate` makes a batch of several. What cannot be read is no error here: an
item carries what could be read and, under "error", why the rest could not. If two of sound, picture and caption are
left, the item is used; in any case its reason travels through the batch's "bad" list to whoever drives.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..config import HEADS, ConfigError, DataConfig
from .demo import prepare_demo
from .loader import read_all
from .manifest import CAPTION_COLUMNS, Clip, Manifest, read_manifest
from .media import MediaError, MissingTrackError
from .processor import Processor, mask_of
from .stamps import prepare_stamps

# which of a clip's kinds of caption can stand for a kind, best first; None: a caption that tells of everything
SUBSTITUTES: dict[str | None, tuple[str | None, ...]] = {
    None: (None, "audio_visual", "audio", "visual"),
    "audio": ("audio", None),
    "visual": ("visual", None),
    "audio_visual": ("audio_visual", None),
}
# what the text of an embedding is compared with, and so must not be silent about
TOLD = {"text_audio": "audio", "audio_plus_text": "audio", "text_video": "visual", "video_plus_text": "visual"}


class ClipReader:
    """Decodes a clip: {"id", "captions", "waveform", "frames"} as far as it has them, and where there is something to
    tell, "error": what is damaged or cannot be read, and "partial": what merely is not there, a track or a caption."""

    def __init__(self, processor: Processor, max_seconds: float):
        self.processor, self.max_seconds = processor, max_seconds

    def __call__(self, clip: Clip) -> dict[str, Any]:
        problems = clip.problem.split("; ") if clip.problem else []
        absent = [problem for problem in problems if problem.endswith(" is empty")]
        errors = [problem for problem in problems if problem not in absent]
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


def usable(item: dict[str, Any]) -> bool:
    """Whether there are two things to pair."""
    sound, picture = (any(name in item for name in names) for names in (SOUND, PICTURE))
    return sound + picture + bool(item.get("captions")) >= 2


SOUND = ("waveform", "codec_features")
PICTURE = ("frames", "frame_features")


def load_into_memory(
    clips: Sequence[Clip],
    read: Callable[[Clip], dict[str, Any]],
    num_workers: int,
    encode: Callable[[Tensor], Tensor] | None,
    title: str,
    time_limit: float | None = None,
) -> list[dict[str, Any]]:
    """Decode every clip once, with a progress bar.

    Args:
        encode: the codec where it is frozen, (1, 1, samples) -> (1, frames, dim): its features replace the waveform,
            since they would come out the same in every epoch.
        time_limit: seconds that one clip may take.
    """
    items = []
    done = read_all(clips, read, num_workers, time_limit)
    for item in track(done, title, total=len(clips), console=Console(stderr=True)):
        if encode is not None and "waveform" in item:
            item["codec_features"] = encode(item.pop("waveform")[None, None])[0]
        items.append(item)
    return items


class Collate:
    """Items -> a batch, as a dict:

    - "inputs": the model's arguments, or None if no item can be used. A row that lacks sound, picture or caption has
      the shortest possible placeholder there; what no row has is left out.
    - "texts": kind of caption -> {"input_ids", "attention_mask"}, of the kinds asked for. Kind None is in "inputs" too.
    - "valid": embedding, as "audio" or "text_video@visual" -> (B,) bool, whether the row has what it is made of.
    - "captions": per row, all captions of the kind that stands for None; none of them if None is not asked for.
    - "caption_keys": kind -> (B,) int64, equal where captions are equal, in every process.
    - "has_audio", "has_video": (B,) bool. "ids": of the rows. "bad": [{"id", "error"}], of what could not be read.

    Args:
        kinds: the kinds of caption that the loss compares with; None: one caption for all.
    """

    def __init__(self, processor: Processor, kinds: Sequence[str | None] = (None,)):
        self.processor, self.kinds = processor, tuple(kinds)

    def __call__(self, items: Sequence[dict[str, Any]], picks: Sequence[int] | None = None) -> dict[str, Any]:
        """
        Args:
            picks: per item, a number that decides which of several captions of one kind it shows; None: the first.
        """
        bad = [{"id": item["id"], "error": item["error"]} for item in items if "error" in item]
        rows = [(item, pick) for item, pick in zip(items, picks or [0] * len(items), strict=True) if usable(item)]
        batch = {"inputs": None, "ids": [item["id"] for item, _ in rows], "bad": bad}
        if not rows:
            return batch
        good = [item for item, _ in rows]
        inputs = self._sound(good) | self._picture(good)
        has = {
            "audio": torch.tensor([any(name in item for name in SOUND) for item in good]),
            "video": torch.tensor([any(name in item for name in PICTURE) for item in good]),
        }
        valid = {name: torch.stack([has[part] for part in HEADS[name] if part in has]).all(0) for name in MEDIA}
        texts, keys = {}, {}
        captions: list[list[str]] = [[] for _ in rows]
        for kind in self.kinds:
            found = [_caption(item["captions"], kind, pick) for item, pick in rows]
            if kind is None:
                kinds = [None if one is None else one[0] for one in found]
                captions = [item["captions"].get(own, []) for item, own in zip(good, kinds, strict=True)]
            if any(found):
                texts[kind] = self.processor.batch_text([EMPTY if one is None else one[1] for one in found])
            unique = [-row if one is None else _key(one[1]) for row, one in enumerate(found, 1)]
            keys[kind] = torch.tensor(unique)
            for name in TEXTS:
                told = torch.tensor([one is not None and _tells(one[0], name, kind) for one in found])
                media = [has[part] for part in HEADS[name] if part in has]
                valid[name if kind is None else f"{name}@{kind}"] = torch.stack([told, *media]).all(0)
        flags = {"has_audio": has["audio"], "has_video": has["video"]}
        inputs |= texts.get(None, {})
        text = {"texts": texts, "captions": captions, "caption_keys": keys}
        return batch | flags | text | {"inputs": inputs, "valid": valid}

    def _sound(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        features = [item["codec_features"] for item in items if "codec_features" in item]
        if features:
            empty = torch.zeros_like(features[0][:1])
            return _features("codec_features", "padding_mask", [i.get("codec_features", empty) for i in items])
        if not any("waveform" in item for item in items):
            return {}
        empty = torch.zeros(self.processor.config.audio.codec.hop_length)
        return self.processor.batch_audio([item.get("waveform", empty) for item in items])

    def _picture(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        features = [item["frame_features"] for item in items if "frame_features" in item]
        if features:
            empty = torch.zeros_like(features[0][:1])
            return _features("frame_features", "padding_mask_videos", [i.get("frame_features", empty) for i in items])
        frames = [item["frames"] for item in items if "frames" in item]
        if not frames:
            return {}
        empty = torch.zeros_like(frames[0][:1])
        rows = [item.get("frames", empty) for item in items]
        # as bytes, which the model scales: a quarter of the size on the way, and the work is done where it is cheap
        return {"pixel_values_videos": pad_sequence(rows, batch_first=True), "padding_mask_videos": mask_of(rows)}


EMPTY = "-"  # the text of rows without a caption, which no loss counts
MEDIA = [name for name in HEADS if "text" not in HEADS[name]]
TEXTS = [name for name in HEADS if "text" in HEADS[name]]


def _caption(captions: dict[str | None, list[str]], kind: str | None, pick: int) -> tuple[str | None, str] | None:
    """(its own kind, the caption) that stands for `kind`, or None if there is none."""
    for own in SUBSTITUTES[kind]:
        if captions.get(own):
            return own, captions[own][pick % len(captions[own])]
    return None


def _tells(own: str | None, embedding: str, kind: str | None) -> bool:
    """Whether a caption of kind `own` may stand in this embedding: what is only seen says nothing of what is heard."""
    if kind is not None or own in (None, "audio_visual"):
        return True
    return TOLD.get(embedding) == own


def _features(name: str, mask_name: str, rows: list[Tensor]) -> dict[str, Tensor]:
    return {name: pad_sequence(rows, batch_first=True).float(), mask_name: mask_of(rows)}


def _key(caption: str) -> int:
    """The same in every process, as `hash` is not; int64."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "big") >> 1


def to_device(batch: Any, device: torch.device) -> Any:
    """The tensors in a batch or in a part of it; what is no tensor stays."""
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    return batch.to(device, non_blocking=True) if isinstance(batch, Tensor) else batch


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


class BadItems:
    """Items of which something could not be used: listed in a file, counted, and too many of them end the run."""

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
