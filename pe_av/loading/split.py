"""Micro-batches: a batch split into the rows that one forward computes, and what all ranks must run for them.

A micro-batch is a dict: "inputs", "texts" and "rows" as in a batch (`loading.batch`), and "size", its number of rows.
The passes that it makes through the model have names: "audio:input_values" or "audio:codec_features",
"video:pixel_values_videos" or "video:frame_features", "audio_video" for the fusion, "text" or "text@<kind>".

All ranks must make the passes that one of them makes, since sharded weights are gathered in the forward and gradients
averaged in the backward. A rank whose clips lack the input makes the pass with one row of zeros, and drops the result.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from pe_av.config import ModelConfig
from pe_av.loading.batch import text_name

# input of the model -> the name under which "rows" has the clips that it is of
_ROWS_OF = dict.fromkeys(("input_values", "padding_mask", "codec_features"), "audio") | dict.fromkeys(
    ("pixel_values_videos", "padding_mask_videos", "frame_features"), "video"
)
EMPTY_MICRO_BATCH: dict[str, Any] = {"inputs": {}, "texts": {}, "rows": {}, "size": 0}


def split_batch(batch: dict[str, Any], size: int | None) -> list[dict[str, Any]]:
    """The micro-batches of a batch, in the order of its rows; none if it has no rows.

    Args:
        size: rows of a micro-batch, at most; None: all of them in one.
    """
    total = len(batch["ids"])
    size = max(total, 1) if size is None else size
    micro_batches = []
    for start in range(0, total, size):
        stop = min(start + size, total)
        places, rows = {}, {}
        for name, numbers in batch["rows"].items():
            first, end = torch.searchsorted(numbers, torch.tensor([start, stop])).tolist()
            if first < end:
                places[name], rows[name] = slice(first, end), numbers[first:end] - start
        inputs = {
            name: value[places[_ROWS_OF[name]]] for name, value in batch["inputs"].items() if _ROWS_OF[name] in places
        }
        texts = {
            kind: {name: value[places[text_name(kind)]] for name, value in tokens.items()}
            for kind, tokens in batch["texts"].items()
            if text_name(kind) in places
        }
        micro_batches.append({"inputs": inputs, "texts": texts, "rows": rows, "size": stop - start})
    return micro_batches


def joined(embedded: Sequence[dict[str, Tensor]], sizes: Sequence[int]) -> dict[str, Tensor]:
    """The embeddings of consecutive micro-batches, by name, one after the other; zeros where one lacks a name.

    If no micro-batch has rows, the embeddings are those of one of them: also without rows, but of the right shape.

    Args:
        sizes: rows of each micro-batch.
    """
    with_rows = [(embeds, size) for embeds, size in zip(embedded, sizes, strict=True) if size]
    like = {name: value for embeds in embedded for name, value in embeds.items()}
    like |= {name: value for embeds, _ in with_rows for name, value in embeds.items()}
    if not with_rows:
        return like
    return {
        name: torch.cat(
            [embeds[name] if name in embeds else value.new_zeros(n, *value.shape[1:]) for embeds, n in with_rows]
        )
        for name, value in like.items()
    }


def passes_of(micro_batch: dict[str, Any]) -> list[str]:
    """The names of the passes that the micro-batch makes through the model."""
    media = [f"{_ROWS_OF[name]}:{name}" for name in micro_batch["inputs"] if "mask" not in name]
    fusion = ["audio_video"] if "audio_video" in micro_batch["rows"] else []
    return media + fusion + [text_name(kind) for kind in micro_batch["texts"]]


def with_passes(micro_batch: dict[str, Any], passes: Collection[str], config: ModelConfig) -> dict[str, Any]:
    """The micro-batch changed so that it makes exactly these passes: inputs of others are left out, and a pass for
    which it has no input gets a row of zeros."""
    forms = dict(one.partition(":")[::2] for one in passes)  # name in "rows" -> input, "" for the fusion and for text
    inputs = {name: value for name, value in micro_batch["inputs"].items() if _ROWS_OF[name] in forms}
    texts, rows = {}, {}
    for name, form in forms.items():
        rows[name] = micro_batch["rows"].get(name, torch.zeros(0, dtype=torch.int64))
        if name.startswith("text"):
            kind = name.partition("@")[2] or None
            texts[kind] = micro_batch["texts"].get(kind) or {"input_ids": torch.tensor([[config.text.pad_token_id]])}
        elif form and form not in inputs:
            inputs[form] = _zeros(form, config)
    return {"inputs": inputs, "texts": texts, "rows": rows, "size": micro_batch["size"]}


def _zeros(form: str, config: ModelConfig) -> Tensor:
    """The shortest possible input of one row."""
    codec, vision = config.audio.codec, config.video.vision
    shape = {
        "input_values": (1, 1, codec.hop_length),
        "codec_features": (1, 1, codec.codebook_dim),
        "pixel_values_videos": (1, 1, 3, vision.image_size, vision.image_size),
        "frame_features": (1, 1, vision.output_dim),
    }[form]
    return torch.zeros(shape, dtype=torch.uint8 if form == "pixel_values_videos" else torch.float32)
