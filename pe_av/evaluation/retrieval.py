"""Zero-shot retrieval on a data set: a table, `metrics.json` and the similarity matrices."""

from pathlib import Path

import torch
from rich.console import Console

from pe_av.checkpoint import load_model
from pe_av.config import ConfigError, EvalConfig
from pe_av.data.cache import reader_for
from pe_av.data.clips import open_manifest
from pe_av.device import pick_device, precision_context
from pe_av.evaluation.embedder import Embedder, embed_clips
from pe_av.evaluation.metrics import evaluate_embeddings
from pe_av.evaluation.report import plot_similarity, print_table, write_metrics
from pe_av.loading.bad_items import BadItems
from pe_av.loading.batch import Collate
from pe_av.loading.loader import Loader
from pe_av.loading.sampler import BatchSampler
from pe_av.media.processor import Processor
from pe_av.model.pe_audio_video import PEAudioVideo
from pe_av.ranks import process_group, rank, world_size


def evaluate_checkpoint(config: EvalConfig, folder: Path) -> dict[str, dict[str, float | int]]:
    """Retrieval in both directions of the six pairings; the results are written to `folder`.

    Returns:
        direction -> `metrics.retrieval_metrics`.
    Raises:
        ConfigError, CheckpointError: the settings, the data or the checkpoint cannot be used.
    """
    with process_group(pick_device(config.device), config.timeout_minutes) as device:
        return _evaluate(config, folder, device)


def _evaluate(config: EvalConfig, folder: Path, device: torch.device) -> dict[str, dict[str, float | int]]:
    model = load_model(config.checkpoint, device)
    if not isinstance(model, PEAudioVideo):
        raise ConfigError(
            f"{config.checkpoint} is a PEAudioFrame, which has no embedding of a whole clip to retrieve with"
        )
    processor = Processor.from_pretrained(config.checkpoint)
    clips = open_manifest(config.data, "eval")
    folder.mkdir(parents=True, exist_ok=True)
    loader = Loader(
        clips,
        reader_for(config.data, model, processor),
        BatchSampler(len(clips), config.batch_size, rank=rank(), world=world_size()),
        Collate(processor),
        config.data.num_workers,
        config.data.time_limit,
    )
    bad = BadItems(folder, len(clips), config.max_bad_fraction, writes=rank() == 0)
    with precision_context(config.precision, device):
        embedded = embed_clips(Embedder(model), loader, processor, device, "evaluating")
    loader.close()
    bad.add(embedded.read, embedded.bad, embedded.partial)
    metrics = evaluate_embeddings(embedded.embeds, embedded.valid, embedded.texts, embedded.captions, shared=True)
    if rank() == 0:
        listed = {f"{name}_items": len(reasons) for name, reasons in bad.reasons.items()}
        write_metrics(folder / "metrics.json", metrics, checkpoint=str(config.checkpoint), **listed)
        plot_similarity(embedded.embeds, folder / "similarity.png", embedded.valid)
        print_table(metrics)
        Console(stderr=True).print(f"written to {folder}")
    return metrics
