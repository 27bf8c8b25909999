"""Embeddings of many clips: of a data set for retrieval, or of a list of files into a safetensors file."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from pe_av.checkpoint import load_model
from pe_av.config import ConfigError
from pe_av.loading.micro_batch import EMPTY_PART, runs_of, split_batch, to_device, with_runs
from pe_av.media.processor import Processor
from pe_av.model.pe_audio_video import PEAudioVideo
from pe_av.ranks import of_all_ranks, rank, world_size


class Embedder(nn.Module):
    """The model as a function of a part of a batch, which is how training, evaluation, DDP and FSDP see it."""

    def __init__(self, model: PEAudioVideo):
        super().__init__()
        self.model = model

    def forward(self, part: dict[str, Any]) -> dict[str, Tensor]:
        """`part` as `data.parts` describes it."""
        return self.model.embed(part["inputs"], part["texts"], part["rows"], part["size"])


@dataclass
class EmbeddedClips:
    """Every embedding of N clips, and of the T different captions that they have; the same on every rank."""

    embeds: dict[str, Tensor]  # name, with "@<kind>" for captions of a kind -> (N, D) float32 on the CPU
    valid: dict[str, Tensor]  # name -> (N,) bool, whether the clip has what it is made of; else its row means nothing
    keys: dict[str | None, Tensor]  # kind of caption -> (N,) int64, equal where captions are equal
    texts: dict[str, Tensor]  # name, of those that are text alone -> (T, D)
    captions: Tensor  # (N, M) int64, filled up with -1: which of the texts are each clip's
    read: int  # items that were read
    bad: list[dict[str, Any]]  # {"id", "error"} of items that are damaged
    partial: list[dict[str, Any]]  # {"id", "error"} of items that lack something


@torch.no_grad()
def embed_clips(
    embedder: nn.Module, batches: Iterable[dict[str, Any]], processor: Processor, device: torch.device, title: str
) -> EmbeddedClips:
    """Every clip with its first caption, and then every caption, with a progress bar.

    Several ranks share the batches and the captions out. Each batch is embedded whole by one rank, so the embeddings
    are the same to the bit whatever the number of ranks.

    Args:
        embedder: a part of a batch -> name -> (B, D), as `Embedder` is, or is inside of.
        batches: those of this rank, as `loading.batch.Collate` makes them; as many on every rank, of which the last may
            be empty. Batch b of rank r is number b · world + r of all.
    """
    was_training = embedder.training
    embedder.eval()
    mine: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
    # only rank 0 has a bar to show
    shown = Console(stderr=True, quiet=rank() > 0)
    for batch in track(batches, title, console=shown, transient=True):
        (part,) = split_batch(batch, None) or [EMPTY_PART]
        embeds = _embedded(embedder, part, processor, device)
        told = {name: batch[name] for name in ("ids", "valid", "captions", "caption_keys", "read", "bad", "partial")}
        mine.append((told, embeds))
    # batch b of rank r is number b · world + r of all
    told = [batch for turn in zip(*of_all_ranks([told for told, _ in mine]), strict=True) for batch in turn]
    sizes = [len(batch["ids"]) for batch in told]
    embeds = _in_order([embeds for _, embeds in mine], sizes)
    number: dict[str, int] = {}  # caption -> its row in the texts
    captions = [
        torch.tensor([number.setdefault(text, len(number)) for text in dict.fromkeys(row)], dtype=torch.long)
        for batch in told
        for row in batch["captions"]
    ]
    different, size = list(number), max(sizes, default=1) or 1
    starts = range(0, len(different), size)
    texts = []
    for turn in range(-(-len(starts) // world_size())):
        at = turn * world_size() + rank()
        part = EMPTY_PART
        if at < len(starts):
            tokens = processor.batch_text(different[starts[at] :][:size])
            rows = torch.arange(len(tokens["input_ids"]))
            part = {"inputs": {}, "texts": {None: tokens}, "rows": {"text": rows}, "size": len(rows)}
        texts.append(_embedded(embedder, part, processor, device))
    text_sizes = [min(size, len(different) - start) for start in starts]
    text_sizes += [0] * (len(texts) * world_size() - len(text_sizes))
    embedder.train(was_training)
    return EmbeddedClips(
        embeds=embeds,
        valid={name: torch.cat([batch["valid"][name] for batch in told]) for name in embeds},
        keys={kind: torch.cat([batch["caption_keys"][kind] for batch in told]) for kind in told[0]["caption_keys"]},
        texts=_in_order(texts, text_sizes),
        captions=pad_sequence(captions, batch_first=True, padding_value=-1) if captions else torch.empty(0, 0),
        read=sum(batch["read"] for batch in told),
        bad=[item for batch in told for item in batch["bad"]],
        partial=[item for batch in told for item in batch["partial"]],
    )


def _embedded(
    embedder: nn.Module, part: dict[str, Any], processor: Processor, device: torch.device
) -> dict[str, Tensor]:
    """Name -> (size, D) float32 on the CPU; every rank calls it with a part of its own, which may be empty."""
    runs = sorted({run for theirs in of_all_ranks(runs_of(part)) for run in theirs})
    if not runs:
        return {}
    found = embedder(to_device(with_runs(part, runs, processor.config), device))
    return {name: value.float().cpu() for name, value in found.items()}


def _in_order(mine: list[dict[str, Tensor]], sizes: list[int]) -> dict[str, Tensor]:
    """The batches of all ranks, one of each at a time, joined by name; zeros where a batch lacks a name.

    Args:
        mine: of this rank's batches; as many on every rank.
        sizes: rows of every batch of all ranks, in order.
    """
    world = world_size()
    own = sizes[rank() :: world]
    widths = {
        name: width for theirs in of_all_ranks([{n: v.shape[1] for n, v in b.items()} for b in mine])
        for batch in theirs for name, width in batch.items()
    }  # fmt: skip
    joined = {}
    for name in sorted(widths):
        width = widths[name]
        rows = [batch[name] if name in batch else torch.zeros(n, width) for batch, n in zip(mine, own, strict=True)]
        rows = torch.cat(rows) if rows else torch.zeros(0, width)
        parts = [part.split(sizes[r::world]) for r, part in enumerate(_rows_of_all_ranks(rows, sizes))]
        joined[name] = torch.cat([batch for turn in zip(*parts, strict=True) for batch in turn])
    return joined


def _rows_of_all_ranks(rows: Tensor, sizes: list[int]) -> list[Tensor]:
    world = world_size()
    if world == 1:
        return [rows]
    counts = [sum(sizes[r::world]) for r in range(world)]
    padded = F.pad(rows, (0, 0, 0, max(counts) - len(rows)))
    found = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(found, padded)
    return [part[:count] for part, count in zip(found, counts, strict=True)]


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
        if not Path(output).parent.is_dir():
            raise ConfigError(f"{output}: there is no such folder; make it first")
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
