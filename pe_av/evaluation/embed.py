"""Embeddings of many clips: of a data set for retrieval, or of a list of files into a safetensors file."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from ..checkpoint import load_model
from ..data.dataset import to_device
from ..data.processor import Processor
from ..model.peav import PEAudioVideo


class Embedder(nn.Module):
    """The model as a function of a batch, which is how evaluation, micro-batches, DDP and FSDP see it."""

    def __init__(self, model: PEAudioVideo):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`batch` as `data.dataset.Collate` makes it: "inputs", and "texts" where there are several kinds."""
        return self.model.embed(batch["inputs"], batch.get("texts"))


@dataclass
class EmbeddedClips:
    """Every embedding of N clips, and of the T different captions that they have."""

    embeds: dict[str, Tensor]  # name (`evaluation.metrics.EMBEDDINGS`) -> (N, D) float32 on the CPU
    valid: dict[str, Tensor]  # name -> (N,) bool, whether the clip has what it is made of; else its row means nothing
    texts: dict[str, Tensor]  # name, of those that are text alone -> (T, D)
    captions: Tensor  # (N, M) int64, filled up with -1: which of the texts are each clip's
    bad: list[dict[str, Any]]  # {"id", "error"} of items of which something could not be read


@torch.no_grad()
def embed_clips(
    embedder: nn.Module, batches: Iterable[dict[str, Any]], processor: Processor, device: torch.device, title: str
) -> EmbeddedClips:
    """Every clip with its first caption, and then every caption, with a progress bar.

    Args:
        embedder: a batch -> name -> (B, D), as `Embedder` is, or is inside of.
        batches: as `data.dataset.Collate` makes them.
    """
    was_training = embedder.training
    embedder.eval()
    parts: list[dict[str, Tensor]] = []
    flags: list[dict[str, Tensor]] = []
    bad: list[dict[str, Any]] = []
    number: dict[str, int] = {}  # caption -> its row in the texts
    captions: list[Tensor] = []  # of each clip
    for batch in track(batches, title, console=Console(stderr=True), transient=True):
        bad += batch["bad"]
        if batch["inputs"] is not None:
            parts.append(_on_cpu(embedder(to_device(batch, device))))
            flags.append(batch["valid"])
            for row in batch["captions"]:
                own = [number.setdefault(text, len(number)) for text in dict.fromkeys(row)]
                captions.append(torch.tensor(own, dtype=torch.long))
    size = max((len(flag["audio"]) for flag in flags), default=1)
    different, texts = list(number), []
    for start in range(0, len(different), size):
        tokens = processor.batch_text(different[start : start + size])
        texts.append(_on_cpu(embedder(to_device({"inputs": {}, "texts": {None: tokens}}, device))))
    embedder.train(was_training)
    widths = {name: value.shape[1] for part in parts for name, value in part.items()}
    # a batch in which no clip has sound, say, has no audio embeddings
    rows = [
        {n: p.get(n, torch.zeros(len(f["audio"]), w)) for n, w in widths.items()}
        for p, f in zip(parts, flags, strict=True)
    ]
    return EmbeddedClips(
        embeds={name: torch.cat([part[name] for part in rows]) for name in widths},
        valid={name: torch.cat([flag[name] for flag in flags]) for name in widths},
        texts={name: torch.cat([part[name] for part in texts]) for name in (texts[0] if texts else ())},
        captions=pad_sequence(captions, batch_first=True, padding_value=-1) if captions else torch.empty(0, 0),
        bad=bad,
    )


def _on_cpu(embeds: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float().cpu() for name, value in embeds.items()}


@torch.no_grad()
def embed_files(
    model: nn.Module,
    processor: Processor,
    paths: Sequence[str | Path],
    output: str | Path,
    batch_size: int = 8,
    max_seconds: float | None = 30.0,
) -> dict[str, str]:
    """Write the audio, video and audio_video embeddings of media files to a safetensors file.

    The file holds `<name>` (N, D) float32 and `<name>_index` (N,), the positions in `paths` that the rows belong to:
    a file without sound has no audio embedding, one without picture no video embedding.

    Args:
        max_seconds: longer files are cut to their first part; None: taken whole.
    Returns:
        path -> why it could not be read, for those from which nothing was.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    rows: dict[str, list[Tensor]] = {"audio": [], "video": [], "audio_video": []}
    index: dict[str, list[int]] = {name: [] for name in rows}
    failed = {}
    loader = DataLoader(_Tracks(paths, processor, max_seconds), batch_size=batch_size, collate_fn=list)
    for items in track(loader, "embedding", console=Console(stderr=True)):
        failed |= {item["path"]: item["error"] for item in items if "error" in item}
        for name in rows:
            wanted = [item for item in items if all(part in item for part in name.split("_"))]
            if not wanted:
                continue
            inputs: dict[str, Tensor] = {}
            if "audio" in name:
                inputs |= processor.batch_audio([item["audio"] for item in wanted])
            if "video" in name:
                inputs |= processor.batch_videos([item["video"] for item in wanted])
            embeds = getattr(model, f"get_{name}_embeds")(**to_device(inputs, device))
            rows[name].append(embeds.float().cpu())
            index[name] += [item["index"] for item in wanted]
    model.train(was_training)
    tensors = {name: torch.cat(parts) for name, parts in rows.items() if parts}
    tensors |= {f"{name}_index": torch.tensor(index[name]) for name in list(tensors)}
    save_file(tensors, output, metadata={f"path_{i}": str(path) for i, path in enumerate(paths)})
    return failed


class _Tracks(torch.utils.data.Dataset):
    """What can be read of each file: {"index", "path"} and "audio", "video", or "error" where there is neither."""

    def __init__(self, paths: Sequence[str | Path], processor: Processor, max_seconds: float | None):
        self.paths, self.processor, self.max_seconds = paths, processor, max_seconds

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        item: dict[str, Any] = {"index": index, "path": str(path)}
        errors = []
        for name, read in (("audio", self.processor.audio_item), ("video", self.processor.video_item)):
            try:
                item[name] = read(path, max_seconds=self.max_seconds)
            except ValueError as error:
                errors.append(str(error))
        return item if len(errors) < 2 else item | {"error": errors[0]}


def main(arguments: Sequence[str]) -> None:
    """python -m pe_av.evaluation.embed CHECKPOINT OUTPUT.safetensors FILE…"""
    if len(arguments) < 3:
        sys.exit(f"usage: {main.__doc__}")
    checkpoint, output, *paths = arguments
    try:
        failed = embed_files(load_model(checkpoint), Processor.from_pretrained(checkpoint), paths, output)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for path, reason in failed.items():
        print(f"left out {path}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
