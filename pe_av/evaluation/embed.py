"""The embeddings of media files, written to a safetensors file.

    python -m pe_av.evaluation.embed CHECKPOINT OUTPUT.safetensors FILE…

OUTPUT holds `<name>` (N, D) float32 for audio, video and audio_video, and `<name>_index` (N,), which of the files the
rows belong to: a file without audio has no audio embedding, one without video no video embedding.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from pe_av.checkpoint import load_model, save_tensors
from pe_av.config import ConfigError
from pe_av.device import to_device
from pe_av.media.processor import Processor
from pe_av.model.pe_audio_video import PEAudioVideo


@torch.no_grad()
def embed_files(
    model: nn.Module,
    processor: Processor,
    paths: Sequence[str | Path],
    output: str | Path,
    batch_size: int = 8,
    max_seconds: float | None = 30.0,
) -> dict[str, str]:
    """Write the embeddings of media files to a safetensors file, as the head of this module describes it.

    Args:
        max_seconds: longer files are cut; None: files are read whole.
    Returns:
        path -> reason, for the files of which nothing could be read.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    embeds: dict[str, list[Tensor]] = {"audio": [], "video": [], "audio_video": []}
    indices: dict[str, list[int]] = {name: [] for name in embeds}
    failed = {}
    for start in track(range(0, len(paths), batch_size), "embedding", console=Console(stderr=True)):
        numbers = range(len(paths))[start : start + batch_size]
        batch = {number: _tracks(processor, paths[number], max_seconds) for number in numbers}
        failed |= {str(paths[number]): item["error"] for number, item in batch.items() if "error" in item}
        for name in embeds:
            rows = {number: item for number, item in batch.items() if set(name.split("_")) <= item.keys()}
            if not rows:
                continue
            inputs: dict[str, Tensor] = {}
            if "audio" in name:
                inputs |= processor.batch_audio([item["audio"] for item in rows.values()])
            if "video" in name:
                inputs |= processor.batch_videos([item["video"] for item in rows.values()])
            values = getattr(model, f"get_{name}_embeds")(**to_device(inputs, device))
            embeds[name].append(values.float().cpu())
            indices[name] += rows
    model.train(was_training)
    tensors = {name: torch.cat(values) for name, values in embeds.items() if values}
    tensors |= {f"{name}_index": torch.tensor(indices[name]) for name in list(tensors)}
    save_tensors(tensors, output, {f"path_{i}": str(path) for i, path in enumerate(paths)})
    return failed


def _tracks(processor: Processor, path: str | Path, max_seconds: float | None) -> dict[str, Any]:
    """What can be read of "audio" and "video", or "error" if neither can."""
    item: dict[str, Any] = {}
    errors = []
    for name, read in (("audio", processor.audio_item), ("video", processor.video_item)):
        try:
            item[name] = read(path, max_seconds=max_seconds)
        except ValueError as error:
            errors.append(str(error))
    return item or {"error": errors[0]}


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    if len(arguments) < 3:
        sys.exit("usage: python -m pe_av.evaluation.embed CHECKPOINT OUTPUT.safetensors FILE…")
    checkpoint, output, *paths = arguments
    try:
        if not Path(output).parent.is_dir():
            raise ConfigError(f"{output}: its folder does not exist; create it first")
        model = load_model(checkpoint)
        if not isinstance(model, PEAudioVideo):
            raise ConfigError(f"{checkpoint} is a PEAudioFrame, which has no embedding of a whole file")
        failed = embed_files(model, Processor.from_pretrained(checkpoint), paths, output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for path, reason in failed.items():
        print(f"left out {path}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
