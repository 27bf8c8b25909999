"""A batch in parts, each what a model embeds at a time, and what all ranks must run of it in common.

A part is a dict: "inputs", "texts" and "rows" as `dataset.Collate` makes them, and "size", its number of clips. What it
makes a model run has names: "audio:input_values" or "audio:codec_features", "video:pixel_values_videos" or
"video:frame_features", "audio_video" for the fusion, "text" or "text@<kind>".

On several ranks every tower that one rank runs must run on all, since sharded weights are gathered in its forward and
gradients averaged in its backward. A rank whose clips lack the input runs it on one row of zeros, whose result goes
nowhere.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from pe_av.config import ModelConfig
from pe_av.loading.batch import text_name

# input of the model -> what "rows" calls those that have it
OF_ROWS = dict.fromkeys(("input_values", "padding_mask", "codec_features"), "audio") | dict.fromkeys(
    ("pixel_values_videos", "padding_mask_videos", "frame_features"), "video"
)
EMPTY_PART: dict[str, Any] = {"inputs": {}, "texts": {}, "rows": {}, "size": 0}


def split_batch(batch: dict[str, Any], size: int | None) -> list[dict[str, Any]]:
    """The parts of a batch, none if it has no rows.

    Args:
        size: clips in a part, at most; None: all in one.
    """
    total = len(batch["ids"])
    size = max(total, 1) if size is None else size
    parts = []
    for start in range(0, total, size):
        stop = min(start + size, total)
        where, rows = {}, {}
        for name, numbers in batch["rows"].items():
            first, last = torch.searchsorted(numbers, torch.tensor([start, stop])).tolist()
            if first < last:
                where[name], rows[name] = slice(first, last), numbers[first:last] - start
        inputs = {name: v[where[OF_ROWS[name]]] for name, v in batch["inputs"].items() if OF_ROWS[name] in where}
        texts = {
            kind: {name: value[where[text_name(kind)]] for name, value in tokens.items()}
            for kind, tokens in batch["texts"].items()
            if text_name(kind) in where
        }
        parts.append({"inputs": inputs, "texts": texts, "rows": rows, "size": stop - start})
    return parts


def runs_of(part: dict[str, Any]) -> list[str]:
    """The names of what the part makes a model run."""
    media = [f"{OF_ROWS[name]}:{name}" for name in part["inputs"] if "mask" not in name]
    fusion = ["audio_video"] if "audio_video" in part["rows"] else []
    return media + fusion + [text_name(kind) for kind in part["texts"]]


def with_runs(part: dict[str, Any], runs: Collection[str], config: ModelConfig) -> dict[str, Any]:
    """The part as it must be to run exactly `runs`: without what is not among them, and with a row of zeros for what
    it lacks."""
    inputs, texts, rows = {}, {}, {}
    wanted = {name.partition(":")[0]: name.partition(":")[2] for name in runs}
    for name, value in part["inputs"].items():
        if OF_ROWS[name] in wanted:
            inputs[name] = value
    nothing = torch.zeros(0, dtype=torch.int64)
    for name, form in wanted.items():
        rows[name] = part["rows"].get(name, nothing)
        if name.startswith("text"):
            kind = name.partition("@")[2] or None
            texts[kind] = part["texts"].get(kind) or {"input_ids": torch.tensor([[config.text.pad_token_id]])}
        elif form and form not in inputs:
            inputs[form] = _zeros(form, config)
    return {"inputs": inputs, "texts": texts, "rows": rows, "size": part["size"]}


def to_device(batch: Any, device: torch.device) -> Any:
    """The tensors in a batch or in a part of it; what is no tensor stays."""
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    return batch.to(device, non_blocking=True) if isinstance(batch, Tensor) else batch


def _zeros(form: str, config: ModelConfig) -> Tensor:
    """The shortest input there is, of one row."""
    codec, vision = config.audio.codec, config.video.vision
    size = vision.image_size
    shape = {
        "input_values": (1, 1, codec.hop_length),
        "codec_features": (1, 1, codec.codebook_dim),
        "pixel_values_videos": (1, 1, 3, size, size),
        "frame_features": (1, 1, vision.output_dim),
    }[form]
    return torch.zeros(shape, dtype=torch.uint8 if form == "pixel_values_videos" else torch.float32)
