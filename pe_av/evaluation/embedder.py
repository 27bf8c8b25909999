"""The embeddings of a data set, for retrieval: of every clip, and of every different caption."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pe_av.config.evaluation import EmbeddingConfig
from pe_av.data.manifest import Clip, Manifest
from pe_av.device import precision_context, to_device
from pe_av.evaluation.windows import WindowedClips, windowed
from pe_av.loading.bad_items import BadItems
from pe_av.loading.batch import Collate
from pe_av.loading.loader import Loader
from pe_av.loading.sampler import BatchSampler
from pe_av.loading.split import EMPTY_MICRO_BATCH, joined, passes_of, split_batch, with_passes
from pe_av.media.processor import Processor
from pe_av.model.pe_audio_video import PEAudioVideo
from pe_av.ranks import of_all_ranks, rank, world_size

# what the ranks tell each other about a batch, beside its embeddings
INFO = ("ids", "valid", "captions", "caption_keys", "read", "bad", "partial", "cut")


class Embedder(nn.Module):
    """The model as a function of a micro-batch, which is what training, evaluation, DDP and FSDP call."""

    def __init__(self, model: PEAudioVideo):
        super().__init__()
        self.model = model

    def forward(self, micro_batch: dict[str, Any]) -> dict[str, Tensor]:
        """A micro-batch (`loading.split`) of B rows -> embedding -> (B, D)."""
        return self.model.embed(micro_batch["inputs"], micro_batch["texts"], micro_batch["rows"], micro_batch["size"])


@dataclass
class EmbeddedWindows:
    """The embeddings of the W windows of some clips; as in `EmbeddedClips`."""

    embeds: dict[str, Tensor]  # name -> (W, D)
    valid: dict[str, Tensor]  # name -> (W,)
    clip: Tensor  # (W,) ascending, the row of the clip that each window is of


@dataclass
class EmbeddedClips:
    """The embeddings of N clips and of their T different captions; the same on every rank."""

    embeds: dict[str, Tensor]  # name, with "@<kind>" for captions of a kind -> (N, D) float32 on the CPU
    valid: dict[str, Tensor]  # name -> (N,) bool, whether the clip has it; if not, its row means nothing
    keys: dict[str | None, Tensor]  # kind of caption -> (N,) int64, equal where captions are equal
    texts: dict[str, Tensor]  # name of an embedding of text alone -> (T, D)
    ids: list[str]  # of the N clips
    captions: Tensor  # (N, M) int64, which of the T texts are captions of each clip, padded with -1
    read: int  # number of items that were read
    bad: list[dict[str, Any]]  # {"id", "error"} of the damaged items
    partial: list[dict[str, Any]]  # {"id", "error"} of the partial items
    cut: list[dict[str, Any]]  # {"id", "error", "seconds"} of the items that were longer than data.max_seconds
    sentences: list[str]  # the T captions
    windows: EmbeddedWindows | None = None  # if pairs are scored by the best windows; `embeds` has their means


def embed_manifest(
    config: EmbeddingConfig,
    model: PEAudioVideo,
    clips: Manifest,
    read: Callable[[Clip], dict[str, Any]],
    collate: Collate,
    folder: Path,
    device: torch.device,
    title: str,
) -> tuple[EmbeddedClips, BadItems]:
    """Embed the clips of a manifest, which the ranks share, and list in `folder` the damaged, partial and cut ones.

    With `windows.seconds`, long clips are embedded in windows, and the lists are of windows.

    Args:
        read: what is read of a clip.
        title: of the progress bar.
    Raises:
        ConfigError: too many clips are damaged.
    """
    windows = None if config.windows.seconds is None else windowed(clips, config.windows)
    read_clips = clips if windows is None else windows
    loader = Loader(
        read_clips,
        read,
        BatchSampler(len(read_clips), config.batch_size, rank=rank(), world=world_size()),
        collate,
        config.data.num_workers,
        config.data.time_limit,
    )
    bad = BadItems(folder, len(read_clips), config.max_bad_fraction, writes=rank() == 0)
    with precision_context(config.precision, device):
        embedded = embed_clips(Embedder(model), loader, collate.processor, device, title)
    loader.close()
    bad.add(embedded.read, embedded.bad, embedded.partial, embedded.cut)
    return embedded if windows is None else of_clips(embedded, windows, config.windows.combine), bad


@torch.no_grad()
def embed_clips(
    embedder: nn.Module, batches: Iterable[dict[str, Any]], processor: Processor, device: torch.device, title: str
) -> EmbeddedClips:
    """Embed every clip with its first caption, and then every different caption, with a progress bar.

    The ranks share the batches and the captions. Each batch is embedded whole by one rank, so the embeddings are the
    same to the bit for any world size.

    Args:
        embedder: micro-batch -> name -> (B, D): an `Embedder`, or what DDP or FSDP makes of one.
        batches: those of this rank, as `loading.batch.Collate` makes them. Batch b of rank r is batch b · world size
            + r of the data set; every rank has as many, and the last may be empty.
    """
    was_training = embedder.training
    embedder.eval()
    infos: list[dict[str, Any]] = []  # of the batches of all ranks, in the order of the data set
    embeds: list[dict[str, Tensor]] = []
    console = Console(stderr=True, quiet=rank() > 0)  # one progress bar is enough
    for batch in track(batches, title, console=console, transient=True):
        (micro_batch,) = split_batch(batch, None) or [EMPTY_MICRO_BATCH]
        info = {name: batch[name] for name in INFO}
        infos += of_all_ranks(info)
        embeds += _embed_of_all_ranks(embedder, micro_batch, processor, device)
    sizes = [len(info["ids"]) for info in infos]

    numbers: dict[str, int] = {}  # caption -> its row in the texts
    captions = [
        torch.tensor([numbers.setdefault(text, len(numbers)) for text in dict.fromkeys(row)], dtype=torch.long)
        for info in infos
        for row in info["captions"]
    ]
    different, size = list(numbers), max(sizes, default=1) or 1
    chunks = [different[start : start + size] for start in range(0, len(different), size)]
    chunks += [[]] * (-len(chunks) % world_size())  # as many for every rank
    texts: list[dict[str, Tensor]] = []
    for chunk in chunks[rank() :: world_size()]:
        micro_batch = EMPTY_MICRO_BATCH
        if chunk:
            tokens, rows = {None: processor.batch_text(chunk)}, {"text": torch.arange(len(chunk))}
            micro_batch = {"inputs": {}, "texts": tokens, "rows": rows, "size": len(chunk)}
        texts += _embed_of_all_ranks(embedder, micro_batch, processor, device)
    embedder.train(was_training)

    embeddings = joined(embeds, sizes)
    return EmbeddedClips(
        embeds=embeddings,
        valid={name: torch.cat([info["valid"][name] for info in infos]) for name in embeddings},
        keys={kind: torch.cat([info["caption_keys"][kind] for info in infos]) for kind in infos[0]["caption_keys"]},
        texts=joined(texts, [len(chunk) for chunk in chunks]),
        ids=[name for info in infos for name in info["ids"]],
        captions=pad_sequence(captions, batch_first=True, padding_value=-1) if captions else torch.empty(0, 0),
        read=sum(info["read"] for info in infos),
        bad=[item for info in infos for item in info["bad"]],
        partial=[item for info in infos for item in info["partial"]],
        cut=[item for info in infos for item in info["cut"]],
        sentences=different,
    )


def _embed_of_all_ranks(
    embedder: nn.Module, micro_batch: dict[str, Any], processor: Processor, device: torch.device
) -> list[dict[str, Tensor]]:
    """For the micro-batch of each rank, which may be empty: name -> (rows, D) float32 on the CPU."""
    passes = sorted({one for theirs in of_all_ranks(passes_of(micro_batch)) for one in theirs})
    embeds = embedder(to_device(with_passes(micro_batch, passes, processor.config), device)) if passes else {}
    return of_all_ranks({name: value.float().cpu() for name, value in embeds.items()})


def of_clips(embedded: EmbeddedClips, windows: WindowedClips, combine: str) -> EmbeddedClips:
    """The embeddings of clips from those of their windows: for each name the mean over the windows that have it.

    Args:
        embedded: of the windows, in their order; those that could not be read are missing.
        combine: mean | best. With "best" the result also keeps the windows.
    """
    remaining = iter(embedded.ids)
    next_id = next(remaining, None)
    rows = []
    for row, window in zip(windows.rows.tolist(), windows, strict=True):
        if window.id == next_id:
            rows.append(row)
            next_id = next(remaining, None)
    used, clip = torch.tensor(rows, dtype=torch.int64).unique_consecutive(return_inverse=True)
    first = torch.searchsorted(clip, torch.arange(len(used)))
    means, valid = {}, {}
    for name, values in embedded.embeds.items():
        has = embedded.valid[name]
        counts = clip[has].bincount(minlength=len(used))
        sums = torch.zeros(len(used), values.shape[1], dtype=torch.float64)
        sums.index_add_(0, clip[has], values[has].double())
        means[name] = (sums / counts.clamp(min=1)[:, None]).to(values.dtype)
        valid[name] = counts > 0
    return replace(
        embedded,
        embeds=means,
        valid=valid,
        keys={kind: keys[first] for kind, keys in embedded.keys.items()},
        ids=[windows.clips[row].id for row in used.tolist()],
        captions=embedded.captions[first],
        windows=EmbeddedWindows(embedded.embeds, embedded.valid, clip) if combine == "best" else None,
    )


def cut_record(cut: Sequence[dict[str, Any]]) -> dict[str, float | int]:
    """What `metrics.json` says about the clips that were longer than `data.max_seconds`."""
    return {"cut_clips": len(cut), "cut_seconds": round(sum(item["seconds"] for item in cut), 1)}
