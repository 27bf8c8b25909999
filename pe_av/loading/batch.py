"""From a clip of a manifest to a batch for the model.

`ClipReader` decodes one clip, in a worker; `Collate` makes a batch of several. What cannot be read is no error here: an
item carries what could be read and, under "error", why the rest could not. If two of sound, picture and caption are
left, the item is used; in any case its reason travels through the batch's "bad" list to whoever drives.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pe_av.config import HEADS
from pe_av.media.processor import Processor, mask_of

# which of a clip's kinds of caption can stand for a kind, best first; None: a caption that tells of everything
SUBSTITUTES: dict[str | None, tuple[str | None, ...]] = {
    None: (None, "audio_visual", "audio", "visual"),
    "audio": ("audio", None),
    "visual": ("visual", None),
    "audio_visual": ("audio_visual", None),
}
# what the text of an embedding is compared with, and so must not be silent about
TOLD = {"text_audio": "audio", "audio_plus_text": "audio", "text_video": "visual", "video_plus_text": "visual"}


def usable(item: dict[str, Any]) -> bool:
    """Whether there are two things to pair."""
    sound, picture = (any(name in item for name in names) for names in (SOUND, PICTURE))
    return sound + picture + bool(item.get("captions")) >= 2


SOUND = ("waveform", "codec_features")
PICTURE = ("frames", "frame_features")


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


def text_name(kind: str | None) -> str:
    """What "rows" calls the captions of a kind."""
    return "text" if kind is None else f"text@{kind}"


def caption_key(caption: str) -> int:
    """A number that is the same for equal captions in every process, as `hash` is not; int64."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "big") >> 1
