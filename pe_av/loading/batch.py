"""A batch: what it is, and how it is made of the items that were read.

An item is a dict of what was read of one clip: "id", "captions" (kind -> texts), and, as far as the clip has them, its
audio ("waveform" or "codec_features") and its video ("frames" or "frame_features"). "error" says what of it is damaged,
"partial" what it lacks, "cut" how many of its seconds were not read. An item is used if two of audio, video and
captions are left (or one, where nothing is to be paired); the others take no row.

A batch of B rows is a dict:

- "inputs": arguments of the model for audio and video, by name. They have a row only for the clips that have them.
- "texts": kind of caption -> {"input_ids", "attention_mask"}, again only for the clips that have such a caption.
- "rows": which rows of the batch those are: "audio", "video", "audio_video" (the clips that have both), "text" and
  "text@<kind>" -> (n,) ascending row numbers. What no clip has is missing from "inputs", "texts" and "rows".
- "valid": embedding, such as "audio" or "text_video@visual" -> (B,) bool, whether the clip has what it is made of.
- "captions": for each row all captions of the kind that stands for None; empty lists if None is not asked for.
- "caption_keys": kind -> (B,) int64, equal in rows with equal captions, also on different ranks.
- "ids": those of the B clips. B may be 0.
- "read": the number of items that were read. "bad", "partial": {"id", "error"} of the damaged and the partial ones.
- "cut": {"id", "error", "seconds"} of the items that were longer than `data.max_seconds`, and by how much.

Three clips, of which the second has no video, give with captions of kind None (T tokens, F frames):

    inputs        input_values (3, 1, samples), padding_mask (3, samples),
                  pixel_values_videos (2, F, 3, S, S), padding_mask_videos (2, F)
    texts         {None: {input_ids (3, T), attention_mask (3, T)}}
    rows          audio [0, 1, 2], video [0, 2], audio_video [0, 2], text [0, 1, 2]
    valid         audio 111, video 101, audio_video 101, text_audio 111, text_video 111, text_audio_video 111,
                  audio_plus_text 111, video_plus_text 101
    captions      [["a dog"], ["rain", "heavy rain"], ["a street"]]
    caption_keys  {None: three numbers}

`split.py` splits a batch into micro-batches; the batches of PEAudioFrame are in `span_batch.py`.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pe_av.config import HEADS
from pe_av.media.processor import Processor, mask_of

# kind of caption -> the kinds of a clip's own captions that can stand for it, best first; None describes everything
SUBSTITUTES: dict[str | None, tuple[str | None, ...]] = {
    None: (None, "audio_visual", "audio", "visual"),
    "audio": ("audio", None),
    "visual": ("visual", None),
    "audio_visual": ("audio_visual", None),
}
# embedding with text -> the kind of caption that describes what it is compared with or joined to
_DESCRIBED = {"text_audio": "audio", "audio_plus_text": "audio", "text_video": "visual", "video_plus_text": "visual"}
_ITEM_KEYS = {"audio": ("waveform", "codec_features"), "video": ("frames", "frame_features")}


class Collate:
    """Makes a batch of items.

    Args:
        kinds: the kinds of caption that the loss compares with; None: one caption of everything.
        least: how many of audio, video and captions an item must have to be used: two to pair, one to be embedded.
    """

    def __init__(self, processor: Processor, kinds: Sequence[str | None] = (None,), least: int = 2):
        self.processor, self.kinds, self.least = processor, tuple(kinds), least

    def __call__(self, items: Sequence[dict[str, Any]], picks: Sequence[int] | None = None) -> dict[str, Any]:
        """
        Args:
            picks: a number for each item, which chooses among its captions of one kind; None: the first is taken.
        """
        picked = zip(items, picks or [0] * len(items), strict=True)
        usable = [(item, pick) for item, pick in picked if _count(item) >= self.least]
        clips = [item for item, _ in usable]
        has = {name: _flags(_has(item, name) for item in clips) for name in _ITEM_KEYS}
        has["audio_video"] = has["audio"] & has["video"]
        everywhere = torch.ones(len(clips), dtype=torch.bool)
        # whether a clip has the audio and the video that an embedding is made of
        media = {name: torch.stack([everywhere, *(has[t] for t in HEADS[name] if t in has)]).all(0) for name in HEADS}
        valid = {name: flags for name, flags in media.items() if "text" not in HEADS[name]}
        texts, keys = {}, {}
        captions: list[list[str]] = [[] for _ in clips]
        for kind in self.kinds:
            chosen = [_choose(item["captions"], kind, pick) for item, pick in usable]
            if kind is None:
                captions = [
                    [] if choice is None else item["captions"][choice[0]]
                    for item, choice in zip(clips, chosen, strict=True)
                ]
            has[text_name(kind)] = _flags(choice is not None for choice in chosen)
            if any(chosen):
                texts[kind] = self.processor.batch_text([choice[1] for choice in chosen if choice is not None])
            # a row without a caption gets a negative number of its own
            numbers = [-row if choice is None else caption_key(choice[1]) for row, choice in enumerate(chosen, 1)]
            keys[kind] = torch.tensor(numbers, dtype=torch.int64)
            for name in (name for name in HEADS if "text" in HEADS[name]):
                fits = _flags(choice is not None and fits_embedding(choice[0], name, kind) for choice in chosen)
                valid[name if kind is None else f"{name}@{kind}"] = media[name] & fits
        return {
            "inputs": audio_inputs(self.processor, [item for item in clips if _has(item, "audio")])
            | _video_inputs([item for item in clips if _has(item, "video")]),
            "texts": texts,
            "rows": {name: flags.nonzero().flatten() for name, flags in has.items() if flags.any()},
            "valid": valid,
            "captions": captions,
            "caption_keys": keys,
            "ids": [item["id"] for item in clips],
            **reading_report(items),
        }


def audio_inputs(processor: Processor, items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The model's inputs of items with audio: `input_values` or `codec_features`, and `padding_mask`; {} of none."""
    if not items:
        return {}
    if "codec_features" in items[0]:
        features = [item["codec_features"] for item in items]
        return {"codec_features": pad_sequence(features, batch_first=True).float(), "padding_mask": mask_of(features)}
    return processor.batch_audio([item["waveform"] for item in items])


def _video_inputs(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    if not items:
        return {}
    features = "frame_features" in items[0]
    rows = [item["frame_features" if features else "frames"] for item in items]
    values = pad_sequence(rows, batch_first=True)
    # frames stay bytes, a quarter of the size of floats, until the model scales them on its device
    inputs = {"frame_features": values.float()} if features else {"pixel_values_videos": values}
    return inputs | {"padding_mask_videos": mask_of(rows)}


def reading_report(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The "read", "bad", "partial" and "cut" of a batch."""
    return {
        "read": len(items),
        "bad": [{"id": item["id"], "error": item["error"]} for item in items if "error" in item],
        "partial": [{"id": item["id"], "error": item["partial"]} for item in items if "partial" in item],
        "cut": [
            {"id": item["id"], "error": f"its last {item['cut']:g} s were not read", "seconds": item["cut"]}
            for item in items
            if "cut" in item
        ],
    }


def text_name(kind: str | None) -> str:
    """The name under which "rows" has the captions of a kind."""
    return "text" if kind is None else f"text@{kind}"


def caption_key(caption: str) -> int:
    """A non-negative int64 that is the same for equal captions in every process, which `hash` is not."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "big") >> 1


def fits_embedding(own: str | None, embedding: str, kind: str | None) -> bool:
    """Whether a caption of kind `own`, standing for `kind`, may be used in an embedding.

    Where no kind is asked for, a caption of what is only seen must not be compared with audio, nor a caption of what is
    only heard with video. Where the loss asks for a kind, every substitute of that kind may be used.
    """
    if kind is not None or own in (None, "audio_visual"):
        return True
    return _DESCRIBED.get(embedding) == own


def _choose(captions: dict[str | None, list[str]], kind: str | None, pick: int) -> tuple[str | None, str] | None:
    """(its own kind, the caption) that stands for `kind`, or None if the clip has none."""
    for own in SUBSTITUTES[kind]:
        if captions.get(own):
            return own, captions[own][pick % len(captions[own])]
    return None


def _count(item: dict[str, Any]) -> int:
    """How many of audio, video and captions are there."""
    return _has(item, "audio") + _has(item, "video") + bool(item.get("captions"))


def _has(item: dict[str, Any], modality: str) -> bool:
    return any(key in item for key in _ITEM_KEYS[modality])


def _flags(values: Iterable[bool]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.bool)
