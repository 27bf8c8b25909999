"""From a clip of a manifest to a batch for the model.

`ClipReader` decodes one clip, in a worker; `Collate` makes a batch of several. What cannot be read is no error here: an
item carries what could be read and, under "error", why the rest could not. If two of sound, picture and caption are
left, the item is used; in any case its reason travels through the batch's "bad" list to whoever drives.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from .parts import caption_key, text_name
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
    """Items -> a batch of B rows, as a dict:

    - "inputs": the model's sound and frames, each only for the rows that have them.
    - "texts": kind of caption -> {"input_ids", "attention_mask"}, of the kinds asked for, likewise.
    - "rows": "audio", "video", "audio_video" (both), "text", "text@<kind>" -> (n,) which rows of the batch have it.
      What no row has is in none of the three.
    - "valid": embedding, as "audio" or "text_video@visual" -> (B,) bool, whether the row has what it is made of.
    - "captions": per row, all captions of the kind that stands for None; none of them if None is not asked for.
    - "caption_keys": kind -> (B,) int64, equal where captions are equal, in every process.
    - "ids": of the rows, of which there may be none. "read": how many items there were.
    - "bad", "partial": [{"id", "error"}] of items that are damaged, and of items that merely lack something.

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
        pairs = [(item, pick) for item, pick in zip(items, picks or [0] * len(items), strict=True) if usable(item)]
        good = [item for item, _ in pairs]
        has = {
            name: torch.tensor([any(key in item for key in keys) for item in good], dtype=torch.bool)
            for name, keys in (("audio", SOUND), ("video", PICTURE))
        }
        has["audio_video"] = has["audio"] & has["video"]
        inputs = self._sound([item for item in good if any(key in item for key in SOUND)])
        inputs |= self._picture([item for item in good if any(key in item for key in PICTURE)])
        valid = {name: torch.stack([has[part] for part in HEADS[name] if part in has]).all(0) for name in MEDIA}
        texts, keys = {}, {}
        captions: list[list[str]] = [[] for _ in good]
        for kind in self.kinds:
            found = [_caption(item["captions"], kind, pick) for item, pick in pairs]
            if kind is None:
                kinds = [None if one is None else one[0] for one in found]
                captions = [item["captions"].get(own, []) for item, own in zip(good, kinds, strict=True)]
            has[text_name(kind)] = torch.tensor([one is not None for one in found], dtype=torch.bool)
            if any(found):
                texts[kind] = self.processor.batch_text([one[1] for one in found if one is not None])
            unique = [-row if one is None else caption_key(one[1]) for row, one in enumerate(found, 1)]
            keys[kind] = torch.tensor(unique, dtype=torch.int64)
            for name in TEXTS:
                told = torch.tensor([one is not None and tells(one[0], name, kind) for one in found], dtype=torch.bool)
                media = [has[part] for part in HEADS[name] if part in has]
                valid[name if kind is None else f"{name}@{kind}"] = torch.stack([told, *media]).all(0)
        return {
            "inputs": inputs,
            "texts": texts,
            "rows": {name: flags.nonzero().flatten() for name, flags in has.items() if flags.any()},
            "valid": valid,
            "captions": captions,
            "caption_keys": keys,
            "ids": [item["id"] for item in good],
            "read": len(items),
            "bad": [{"id": item["id"], "error": item["error"]} for item in items if "error" in item],
            "partial": [{"id": item["id"], "error": item["partial"]} for item in items if "partial" in item],
        }

    def _sound(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        if not items:
            return {}
        if "codec_features" in items[0]:
            return _features("codec_features", "padding_mask", [item["codec_features"] for item in items])
        return self.processor.batch_audio([item["waveform"] for item in items])

    def _picture(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        if not items:
            return {}
        if "frame_features" in items[0]:
            return _features("frame_features", "padding_mask_videos", [item["frame_features"] for item in items])
        frames = [item["frames"] for item in items]
        # as bytes, which the model scales: a quarter of the size on the way, and the work is done where it is cheap
        return {"pixel_values_videos": pad_sequence(frames, batch_first=True), "padding_mask_videos": mask_of(frames)}


MEDIA = [name for name in HEADS if "text" not in HEADS[name]]
TEXTS = [name for name in HEADS if "text" in HEADS[name]]


def _caption(captions: dict[str | None, list[str]], kind: str | None, pick: int) -> tuple[str | None, str] | None:
    """(its own kind, the caption) that stands for `kind`, or None if there is none."""
    for own in SUBSTITUTES[kind]:
        if captions.get(own):
            return own, captions[own][pick % len(captions[own])]
    return None


def tells(own: str | None, embedding: str, kind: str | None) -> bool:
    """Whether a caption of kind `own` may stand in this embedding: what is only seen says nothing of what is heard."""
    if kind is not None or own in (None, "audio_visual"):
        return True
    return TOLD.get(embedding) == own


def _features(name: str, mask_name: str, rows: list[Tensor]) -> dict[str, Tensor]:
    return {name: pad_sequence(rows, batch_first=True).float(), mask_name: mask_of(rows)}


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
    """Items that are damaged, and items that merely lack something: both are listed, and many damaged end the run.

    With several ranks all of them count the items of all, so that all stop at once; rank 0 writes the lists.
    """

    def __init__(
        self,
        folder: Path,
        total: int,
        max_fraction: float,
        writes: bool = True,
        state: Mapping[str, int] | None = None,
    ):
        """
        Args:
            folder: of `bad_items.jsonl` and `partial_items.jsonl`, lists of {"id", "error"}.
            total: items that there are.
            max_fraction: of the items seen, above which `add` raises.
            writes: whether this process writes the lists.
            state: `state_dict()` of the run that goes on, to which the lists are cut back; None: they begin anew.
        """
        self.total, self.max_fraction, self.writes = total, max_fraction, writes
        state = {"seen": 0, "bad": 0, "partial": 0} if state is None else state
        self.seen = state["seen"]  # items read so far
        self.files = {name: folder / f"{name}_items.jsonl" for name in ("bad", "partial")}
        self.reasons = {name: _reasons(path, state[name]) for name, path in self.files.items()}
        if writes:
            for name, path in self.files.items():
                if path.exists():
                    _write_reasons(path, self.reasons[name])

    def state_dict(self) -> dict[str, int]:
        """How much was seen, and how long the lists are."""
        return {"seen": self.seen} | {name: len(reasons) for name, reasons in self.reasons.items()}

    def add(self, read: int, bad: Iterable[dict[str, Any]] = (), partial: Iterable[dict[str, Any]] = ()) -> None:
        """
        Args:
            read: items read since the last time.
            bad, partial: {"id", "error"} of those that are damaged, and of those that lack something.
        Raises:
            ConfigError: too many are damaged.
        """
        self.seen = min(self.seen + read, self.total)
        last = ""
        for name, items in (("bad", bad), ("partial", partial)):
            new = {item["id"]: item["error"] for item in items if item["id"] not in self.reasons[name]}
            if not new:
                continue
            self.reasons[name] |= new
            last = next(reversed(new.values())) if name == "bad" else last
            if self.writes:
                with self.files[name].open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps({"id": key, "error": error}) + "\n" for key, error in new.items())
        count = len(self.reasons["bad"])
        # one bad item among the first few says nothing yet
        judged = max(self.seen, min(self.total, FEWEST_JUDGED))
        if last and count > self.max_fraction * judged:
            raise ConfigError(
                f"{count} of {self.seen} items read cannot be used, more than max_bad_fraction={self.max_fraction:g} "
                f"allows; the last: {last}; all are listed in {self.files['bad']}"
            )


FEWEST_JUDGED = 200  # items that `max_bad_fraction` is a fraction of, at least, if there are as many


def _reasons(path: Path, count: int) -> dict[str, str]:
    """The first `count` items of a list; a line that is torn, as on a full disk, is none."""
    reasons: dict[str, str] = {}
    if count and path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                reasons[row["id"]] = row["error"]
            except (ValueError, TypeError, KeyError):
                continue
            if len(reasons) == count:
                break
    return reasons


def _write_reasons(path: Path, reasons: Mapping[str, str]) -> None:
    if not reasons:
        path.unlink()
        return
    unfinished = path.with_name(f"{path.name}.tmp")
    lines = (json.dumps({"id": key, "error": error}) + "\n" for key, error in reasons.items())
    unfinished.write_text("".join(lines), encoding="utf-8")
    os.replace(unfinished, path)
