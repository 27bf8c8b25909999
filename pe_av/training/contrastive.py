"""The contrastive training of PEAudioVideo: its clips, the loss over the pairings, and retrieval on held-out clips."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn

from pe_av.config import HEADS, Pairing, TrainConfig
from pe_av.data.clips import open_manifest
from pe_av.device import to_device
from pe_av.evaluation.embedder import EmbeddedClips, Embedder, cut_record, embed_clips
from pe_av.evaluation.metrics import DIRECTIONS, evaluate_embeddings
from pe_av.evaluation.report import plot_similarity, print_table, write_metrics
from pe_av.loading.batch import text_name
from pe_av.loading.split import EMPTY_MICRO_BATCH, passes_of, split_batch, with_passes
from pe_av.loss import contrastive_loss
from pe_av.ranks import rank, world_size
from pe_av.training.held_out import held_out_losses, start_biases
from pe_av.training.lora import add_adapters
from pe_av.training.optim import freeze
from pe_av.training.pairings import short_name, trainable_pairings
from pe_av.training.setup import prepare_loaders, prepare_model, training_clips, watch_loader
from pe_av.training.task import Evaluation

SHOWN = 6  # directions in a line of progress


class Contrastive:
    """The `task.Task` of `python train.py`."""

    figures = ["R@1", "held_out_loss", *(f"R@1/{direction}" for direction in DIRECTIONS)]
    falling = ["held_out_loss"]

    def __init__(self, config: TrainConfig, device: torch.device, console: Console, tokenizer: str | None):
        self.config, self.device = config, device
        train_clips, eval_clips = training_clips(config.data), open_manifest(config.data, "eval")
        self.items = len(eval_clips) + (sys.maxsize if config.data.shards is not None else len(train_clips))
        self.pairings = trainable_pairings(config.loss.weighted(), train_clips, console)
        self.model, self.processor = prepare_model(config, train_clips, device, console, tokenizer)
        self.train_loader, self.eval_loader = prepare_loaders(
            config, self.model, self.processor, device, train_clips, eval_clips
        )
        self.watch_loader = watch_loader(config, self.processor)
        freeze(self.model, config.optim.freeze)
        if config.lora.rank:
            add_adapters(self.model, config.lora)
        self.embedder = Embedder(self.model)
        # a group of this rank alone, which computes the loss of whole held-out batches
        self._alone = dist.new_group([rank()], use_local_synchronization=True) if world_size() > 1 else None

    def start(self, embedder: nn.Module) -> dict[str, float]:
        """Set the biases by the evaluation clips, if `loss.start_bias` is set. Returns the recalls of the watched clips
        before training."""
        if self.config.loss.start_bias:
            clips = self._embedded(embedder, self.eval_loader, "measuring")
            start_biases(clips, self.model.logits, self.config.batch_size)
        return self._evaluate_watched(embedder)

    def split(self, batch: dict[str, Any], size: int | None) -> list[dict[str, Any]]:
        return split_batch(batch, size)

    def passes_of(self, micro_batch: dict[str, Any]) -> list[str]:
        return passes_of(micro_batch)

    def with_passes(self, micro_batch: dict[str, Any] | None, passes: list[str]) -> dict[str, Any]:
        return with_passes(micro_batch or EMPTY_MICRO_BATCH, passes, self.model.config)

    def count(self, batch: dict[str, Any]) -> dict[str, int]:
        """By pairing, the rows that have both sides."""
        valid = batch["valid"]
        sides = {pairing.name: pairing.embeddings for pairing in self.pairings}
        return {name: int((valid[left] & valid[right]).sum()) for name, (left, right) in sides.items()}

    def needed(self, counts: dict[str, int], passes: list[str]) -> list[str]:
        """The passes of pairings that have at least two rows; a single row has no negatives."""
        towers = set()
        for pairing in self._present(counts):
            names = {"fusion": "audio_video", "text": text_name(pairing.caption)}
            towers |= {names.get(tower, tower) for side in (pairing.left, pairing.right) for tower in HEADS[side]}
        return [name for name in passes if name.partition(":")[0] in towers]

    def loss(
        self, embeds: dict[str, Tensor], batch: dict[str, Any], counts: dict[str, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        valid = to_device({name: rows for name, rows in batch["valid"].items() if name in embeds}, self.device)
        keys = to_device(batch["caption_keys"], self.device)
        logits = {name: (pair.scale, pair.bias) for name, pair in self.model.logits.items()}
        out = contrastive_loss(embeds, logits, self._present(counts), valid, keys)
        return out.total, {"loss": out.total.detach()} | {f"{name}_loss": value for name, value in out.losses.items()}

    def evaluate(self, embedder: nn.Module, folder: Path, step: int, history: list[dict[str, Any]]) -> Evaluation:
        """Retrieval among the evaluation clips, the loss on them, and retrieval among the clips of `watch`."""
        clips = self._embedded(embedder, self.eval_loader, "evaluating")
        metrics = _retrieval(clips)
        setting = {"max_seconds": self.config.data.max_seconds, **cut_record(clips.cut)}
        recalls = {direction: row["R@1"] for direction, row in metrics.items()}
        figures = {f"R@1/{direction}": value for direction, value in recalls.items()}
        if recalls:
            figures["R@1"] = sum(recalls.values()) / len(recalls)
        line = "R@1 in percent: " + "  ".join(f"{name} {value:.1f}" for name, value in list(recalls.items())[:SHOWN])
        losses = held_out_losses(clips, self.model.logits, self.pairings, self.config.batch_size, self._alone)
        if losses:
            metrics["loss"], figures["held_out_loss"] = losses, losses["total"]
            line += f"  held-out loss {losses['total']:.2f}"
        metrics["setting"] = setting
        watched = self._evaluate_watched(embedder)
        if watched:
            line += _report_watched([*history, {"step": step, **watched}], folder)
        if rank() == 0:
            plot_similarity(clips.embeds, folder / "similarity.png", clips.valid)
        return Evaluation(metrics, figures | watched, line, clips.read, clips.bad, clips.partial, clips.cut)

    def line(self, row: dict[str, float]) -> str:
        """loss 12.3 = a·t 2.1 …"""
        losses = [f"{short_name(p)} {row[f'{p.name}_loss']:.2f}" for p in self.pairings if f"{p.name}_loss" in row]
        return f"loss {row['loss']:.2f} = {' '.join(losses)}"

    def show(self, metrics: dict[str, Any]) -> None:
        print_table(metrics)

    def close(self) -> None:
        for loader in (self.train_loader, self.eval_loader, self.watch_loader):
            if loader is not None:
                loader.close()

    def _present(self, counts: Mapping[str, int]) -> list[Pairing]:
        """The pairings that a batch can train."""
        return [pairing for pairing in self.pairings if counts.get(pairing.name, 0) >= 2]

    def _embedded(self, embedder: nn.Module, loader: Any, title: str) -> EmbeddedClips:
        return embed_clips(embedder, loader, self.processor, self.device, title)

    def _evaluate_watched(self, embedder: nn.Module) -> dict[str, float]:
        """{"watch/<direction>": R@1} among the clips of `watch`; {} without these."""
        if self.watch_loader is None:
            return {}
        metrics = _retrieval(self._embedded(embedder, self.watch_loader, "watching"))
        return {f"watch/{direction}": row["R@1"] for direction, row in metrics.items()}


def _retrieval(clips: EmbeddedClips) -> dict[str, dict[str, float | int]]:
    """With the captions of everything; a caption of one kind is used in the loss alone."""
    plain = {name: rows for name, rows in clips.embeds.items() if "@" not in name}
    return evaluate_embeddings(plain, clips.valid, clips.texts, clips.captions, shared=True)


def _report_watched(history: list[dict[str, Any]], folder: Path) -> str:
    """Write the recalls of the watched clips over the whole run to watch.json.

    Args:
        history: {"step", figure: value, …} of all evaluations, the one before training and the last one included.
    Returns:
        a line with the last recalls and how they differ from the first.
    """
    rows = [
        {"step": row["step"], "R@1": {n.removeprefix("watch/"): v for n, v in row.items() if n.startswith("watch/")}}
        for row in history
    ]
    rows = [row for row in rows if row["R@1"]]  # `watch` may have been set on resume, after the first evaluations
    if rank() == 0:
        write_metrics(folder / "watch.json", {"evaluations": rows})
    first, now = rows[0]["R@1"], rows[-1]["R@1"]
    shown = "  ".join(f"{name} {now[name]:.1f} ({now[name] - first[name]:+.1f})" for name in list(now)[:SHOWN])
    return f"\nstep {rows[-1]['step']}  watched, and since the start: {shown}"
