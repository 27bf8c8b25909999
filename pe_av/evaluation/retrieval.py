"""Zero-shot retrieval on a data set: a table, `metrics.json` and the similarity matrices."""

from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from pe_av.checkpoint import load_model
from pe_av.config import ConfigError, EvalConfig
from pe_av.data.cache import reader_for
from pe_av.data.clips import open_manifest
from pe_av.device import pick_device
from pe_av.evaluation.embedder import EmbeddedClips, cut_record, embed_manifest
from pe_av.evaluation.html_report import Evaluation, write_report
from pe_av.evaluation.metrics import Ranked, evaluate_embeddings
from pe_av.evaluation.report import plot_similarity, print_table, write_metrics
from pe_av.evaluation.setting import evaluation_setting
from pe_av.loading.batch import Collate
from pe_av.media.processor import Processor
from pe_av.model.pe_audio_video import PEAudioVideo
from pe_av.ranks import process_group, rank


def evaluate_checkpoint(config: EvalConfig, folder: Path) -> dict[str, dict[str, float | int]]:
    """Retrieval in both directions of the six pairings; the results are written to `folder`.

    Returns:
        direction -> `metrics.retrieval_metrics`.
    Raises:
        ConfigError, CheckpointError: the settings, the data or the checkpoint cannot be used.
    """
    with process_group(pick_device(config.device), config.timeout_minutes) as device:
        return evaluate(config, folder, device).metrics


def evaluate(config: EvalConfig, folder: Path, device: torch.device) -> Evaluation:
    """As `evaluate_checkpoint`, in a process group that exists already. The results are the same on every rank."""
    model = load_model(config.checkpoint, device)
    if not isinstance(model, PEAudioVideo):
        raise ConfigError(
            f"{config.checkpoint} is a PEAudioFrame, which has no embedding of a whole clip to retrieve with"
        )
    processor = Processor.from_pretrained(config.checkpoint, config.data.reader)
    clips = open_manifest(config.data, "eval")
    folder.mkdir(parents=True, exist_ok=True)
    read = reader_for(config.data, model, processor)
    embedded, bad = embed_manifest(config, model, clips, read, Collate(processor), folder, device, "evaluating")
    check_embedded(embedded, config)
    arguments = embedded.embeds, embedded.valid, embedded.texts, embedded.captions, True
    ranked: dict[str, Ranked] = {}
    metrics = evaluate_embeddings(
        *arguments, protocol=config.protocol, intervals=True, ranked=ranked, windows=embedded.windows
    )
    reweighted = evaluate_embeddings(*arguments, protocol="reweighted", intervals=True) if config.reweighted else {}
    setting = {}
    if rank() == 0:
        setting = {"protocol": config.protocol, **evaluation_setting(config, model.config, clips, device)}
        setting |= cut_record(embedded.cut)
        kinds = clips.kinds()
        several = (np.sum(list(kinds.values()), axis=0) > 1) & ~kinds[None]
        setting["clips_with_unused_captions"] = int(several.sum())
    evaluation = Evaluation(config, metrics, reweighted, ranked, embedded, clips, setting)
    if rank() == 0:
        extra = {f"{name}_items": len(reasons) for name, reasons in bad.reasons.items()}
        extra |= {"reweighted": reweighted} if reweighted else {}
        write_metrics(folder / "metrics.json", metrics, checkpoint=str(config.checkpoint), setting=setting, **extra)
        plot_similarity(embedded.embeds, folder / "similarity.png", embedded.valid)
        if config.report:
            write_report(evaluation, folder)
        print_table(metrics | {"reweighted": reweighted})
        console = Console(stderr=True)
        if several.any():
            console.print(
                f"{several.sum()} clips have captions of several kinds, of which one is used: audio_visual_caption, or "
                "else audio_caption, or else visual_caption; docs/evaluation.md says how to evaluate by another",
                soft_wrap=True,
            )
        if line := bad.cut_line():
            console.print(line, soft_wrap=True)
        console.print(f"written to {folder}")
    return evaluation


def check_embedded(embedded: EmbeddedClips, config: EvalConfig) -> None:
    """Raise ConfigError if there is nothing to rank, or something that has no rank."""
    source = config.data.eval or "the evaluation clips"
    if not embedded.ids:
        raise ConfigError(f"{source}: none of its {embedded.read} clips has two of audio, video and a caption to pair")
    for name, rows in embedded.embeds.items():
        bad = (embedded.valid[name] & ~rows.isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            listed = ", ".join(embedded.ids[row] for row in bad[:5]) + (", …" if len(bad) > 5 else "")
            raise ConfigError(
                f"{config.checkpoint}: the {name} embeddings of {len(bad)} clips of {source} are NaN or infinite "
                f"({listed}): the model has diverged, or precision={config.precision} is too coarse for it"
            )
