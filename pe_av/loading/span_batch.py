"""From decoded recordings and their spans to a batch for `PEAudioFrame`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pe_av.loading.batch import caption_key
from pe_av.media.processor import Processor, mask_of


class SpanCollate:
    """Items -> a batch of B rows, as a dict: "inputs" of `PEAudioFrame` (none without rows), "targets" (B, T) bool,
    "mask" (B, T) bool, "captions" (B,) int64, equal where captions are in every process; "ids", "read", "bad" and
    "partial" as `dataset.Collate` has them.

    Args:
        seconds_per_position: of the model.
    """

    def __init__(self, processor: Processor, seconds_per_position: float):
        self.processor, self.seconds_per_position = processor, seconds_per_position

    def __call__(self, items: Sequence[dict[str, Any]], picks: Sequence[int] | None = None) -> dict[str, Any]:
        good = [item for item in items if "error" not in item]
        inputs: dict[str, Tensor] = {}
        lengths = torch.zeros(0, dtype=torch.int64)
        if good and "codec_features" in good[0]:
            features = [item["codec_features"] for item in good]
            lengths = torch.tensor([len(feature) for feature in features])
            inputs = {"codec_features": pad_sequence(features, batch_first=True), "padding_mask": mask_of(features)}
        elif good:
            hop = self.processor.config.audio.codec.hop_length
            lengths = torch.tensor([len(item["waveform"]) // hop for item in good])
            inputs = self.processor.batch_audio([item["waveform"] for item in good])
        frames = torch.arange(int(lengths.max()) if good else 0)
        middle = (frames + 0.5) * self.seconds_per_position
        targets = torch.zeros(len(good), len(frames), dtype=torch.bool)
        for row, item in enumerate(good):
            for start, end in item["spans"]:
                targets[row] |= (start <= middle) & (middle < end)
        return {
            "inputs": inputs | (self.processor.batch_text([item["caption"] for item in good]) if good else {}),
            "targets": targets,
            "mask": frames < lengths[:, None],
            "captions": torch.tensor([caption_key(item["caption"]) for item in good], dtype=torch.int64),
            "ids": [item["id"] for item in good],
            "read": len(items),
            "bad": [{"id": item["id"], "error": item["error"]} for item in items if "error" in item],
            "partial": [],
        }
