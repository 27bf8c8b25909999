"""Embeddings of many items in memory."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pe_av.config import HEADS, nearest
from pe_av.media.processor import Batch, Processor, mask_of
from pe_av.media.tracks import MediaError, probe
from pe_av.model.pe_audio_video import PEAudioVideo

MODALITIES = ("text", "audio", "video")
LONG = 20  # batches from which on a progress bar is shown


@torch.no_grad()
def embed_items(
    model: PEAudioVideo,
    processor: Processor,
    items: Sequence[Mapping[str, Any]],
    batch_size: int = 16,
    sampling_rate: int | None = None,
    max_seconds: float | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every embedding that the model makes of N items, each of which has text, audio, video, or several of them.

    Items that have the same and are of similar length are embedded together, whatever their order in the list. They are
    read by several threads, a batch at a time, so that memory holds one batch and the embeddings.

    Args:
        model: on any device and in any dtype.
        items: dicts with any of the keys "text" (a caption), "audio" and "video" (paths, tensors or arrays as the
            `Processor` takes them; an image is a video of one frame).
        sampling_rate, max_seconds: of audio and video, as of `Processor.__call__`.
    Returns:
        embedding, such as "audio" or "text_video" -> (N, D) float32 on the CPU, zeros for items that lack what it is
        made of; and embedding -> (N,) bool, whether the item has it. What no item has is left out.
    Raises:
        ValueError: an item that has none of the keys or another one, or text that cannot be used.
        MediaError: an audio or video that cannot be used; the message has the item's number.
    """
    if not isinstance(model, PEAudioVideo):
        raise ValueError(f"embed_items is for PEAudioVideo; a {type(model).__name__} embeds positions: call it")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not positive")
    if isinstance(items, Mapping | str):
        raise ValueError(f'items is of type {type(items).__name__}; pass a list of dicts such as [{{"text": "a dog"}}]')
    for index, item in enumerate(items):
        _check(index, item)

    def read(index: int) -> dict[str, Any]:
        ready = dict(items[index])
        try:
            if "audio" in ready:
                ready["audio"] = processor.audio_item(ready["audio"], sampling_rate, max_seconds)
            if "video" in ready:
                ready["video"] = processor.video_item(ready["video"], max_seconds)
        except MediaError as error:
            raise type(error)(f"items[{index}]: {error}") from error
        return ready

    order = sorted(range(len(items)), key=lambda index: _sorting_key(items[index], sampling_rate))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if len(batches) >= LONG:
        from rich.console import Console
        from rich.progress import track

        batches = track(batches, "embedding", console=Console(stderr=True), transient=True)

    device, was_training = next(model.parameters()).device, model.training
    embeds: dict[str, Tensor] = {}
    valid: dict[str, Tensor] = {}
    model.eval()
    try:
        with ThreadPoolExecutor(min(batch_size, 16)) as readers:
            for batch in batches:
                ready = list(readers.map(read, batch))
                has = {m: torch.tensor([m in item for item in ready]) for m in MODALITIES}
                inputs = _inputs(processor, ready)
                has["audio_video"] = has["audio"] & has["video"]
                rows = Batch({name: flags.nonzero()[:, 0] for name, flags in has.items() if flags.any()})
                found = model.embed(inputs.to(device), rows=rows.to(device), batch_size=len(batch))
                for name, values in found.items():
                    made = torch.stack([has[tower] for tower in HEADS[name] if tower in has]).all(0)
                    places = torch.tensor(batch)[made]
                    if name not in embeds and len(places):
                        embeds[name] = torch.zeros(len(items), values.shape[1])
                        valid[name] = torch.zeros(len(items), dtype=torch.bool)
                    if len(places):
                        embeds[name][places] = values.float().cpu()[made]
                        valid[name][places] = True
    finally:
        model.train(was_training)
    names = [name for name in HEADS if name in embeds]
    return {name: embeds[name] for name in names}, {name: valid[name] for name in names}


def _check(index: int, item: Mapping[str, Any]) -> None:
    if not isinstance(item, Mapping):
        raise ValueError(f'items[{index}] is of type {type(item).__name__}; pass a dict such as {{"text": "a dog"}}')
    for key in item:
        if key not in MODALITIES:
            raise ValueError(f"items[{index}] has the unknown key {key}{nearest(str(key), MODALITIES)}")
    if not item:
        raise ValueError(f"items[{index}] is empty; give it text, audio or video, or leave it out")
    text = item.get("text", "x")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"items[{index}]: text is {text!r}; pass a caption, or leave the key out")


def _sorting_key(item: Mapping[str, Any], sampling_rate: int | None) -> tuple:
    """Which modalities an item has, and about how long they are."""
    seconds = 0.0
    for modality in ("audio", "video"):
        media = item.get(modality)
        if isinstance(media, str | Path):
            try:
                seconds = max(seconds, *(known or 0.0 for known in probe(media).values()))
            except MediaError:
                continue  # reading it will raise the same, with the item's number
        elif modality == "audio" and hasattr(media, "shape"):
            seconds = max(seconds, media.shape[-1] / (sampling_rate or 48_000))
        elif hasattr(media, "shape") and len(media.shape) == 4:
            seconds = max(seconds, float(len(media)))  # the more frames the longer, at whatever rate
    return *(modality in item for modality in MODALITIES), seconds, len(item.get("text", ""))


def _inputs(processor: Processor, ready: Sequence[Mapping[str, Any]]) -> Batch:
    """The model's inputs; each has a row for the items that have it."""
    texts, waveforms, videos = ([item[m] for item in ready if m in item] for m in MODALITIES)
    inputs = Batch()
    if texts:
        inputs |= processor.batch_text(texts)
    if waveforms:
        inputs |= processor.batch_audio(waveforms)
    if videos:  # as bytes, a quarter of the size of floats, until the model scales them on its device
        inputs |= {
            "pixel_values_videos": pad_sequence(videos, batch_first=True),
            "padding_mask_videos": mask_of(videos),
        }
    return inputs
