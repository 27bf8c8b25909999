"""A batch of recordings with their spans, for `PEAudioFrame`."""

from collections.abc import Sequence
from typing import Any

import torch

from pe_av.loading.batch import audio_inputs, caption_key, reading_report
from pe_av.media.processor import Processor


class SpanCollate:
    """Makes a batch of B rows of items {"id", "caption", "spans", "waveform" or "codec_features"}.

    It is a dict: "inputs" of `PEAudioFrame` (empty without rows), "targets" (B, T) bool, whether the middle of a
    position lies in one of the spans, "mask" (B, T) bool, False where a row is padded, and "captions" (B,) int64, the
    `caption_key` of each, and "spans" a list of those of each. "ids", "read", "bad" and "partial" are those of
    `loading.batch`.

    Args:
        seconds_per_position: of the model.
    """

    def __init__(self, processor: Processor, seconds_per_position: float):
        self.processor, self.seconds_per_position = processor, seconds_per_position

    def __call__(self, items: Sequence[dict[str, Any]], picks: Sequence[int] | None = None) -> dict[str, Any]:
        clips = [item for item in items if "error" not in item]
        hop = self.processor.config.audio.codec.hop_length
        lengths = [
            len(item["codec_features"]) if "codec_features" in item else len(item["waveform"]) // hop for item in clips
        ]
        positions = torch.arange(max(lengths, default=0))
        middle = (positions + 0.5) * self.seconds_per_position
        targets = torch.zeros(len(clips), len(positions), dtype=torch.bool)
        for row, item in enumerate(clips):
            for start, end in item["spans"]:
                targets[row] |= (start <= middle) & (middle < end)
        return {
            "inputs": audio_inputs(self.processor, clips)
            | (self.processor.batch_text([item["caption"] for item in clips]) if clips else {}),
            "targets": targets,
            "mask": positions < torch.tensor(lengths, dtype=torch.int64)[:, None],
            "captions": torch.tensor([caption_key(item["caption"]) for item in clips], dtype=torch.int64),
            "spans": [item["spans"] for item in clips],
            "ids": [item["id"] for item in clips],
            **reading_report(items),
        }
