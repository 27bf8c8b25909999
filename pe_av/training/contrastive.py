"""The contrastive training of PEAudioVideo: which pairings the data allow, their loss, and held-out retrieval."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn

from pe_av.config import HEADS, PAIRINGS, ConfigError, Pairing, TrainConfig
from pe_av.data.clips import open_manifest
from pe_av.data.manifest import Manifest, Modality
from pe_av.evaluation.embedder import EmbeddedClips, Embedder, embed_clips
from pe_av.evaluation.metrics import DIRECTIONS, evaluate_embeddings, public_name
from pe_av.evaluation.report import plot_similarity, print_table, write_metrics
from pe_av.loading.batch import SUBSTITUTES, fits_embedding, text_name
from pe_av.loading.split import EMPTY_MICRO_BATCH, runs_of, split_batch, with_runs
from pe_av.loss import contrastive_loss
from pe_av.ranks import rank, world_size
from pe_av.training.lora import add_adapters
from pe_av.training.optim import freeze
from pe_av.training.run import Evaluation
from pe_av.training.setup import prepare_loaders, prepare_model, training_clips, watch_loader


class Contrastive:
    """The `run.Task` of `python train.py`."""

    figures = ["R@1", "held_out_loss", *(f"R@1/{direction}" for direction in DIRECTIONS)]
    falling = ["held_out_loss"]

    def __init__(self, config: TrainConfig, device: torch.device, console: Console, tokenizer: str | None):
        self.config, self.device, self.console = config, device, console
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
        # held-out clips are compared within batches of the size that is trained with, each by one rank
        self._alone = dist.new_group([rank()], use_local_synchronization=True) if world_size() > 1 else None

    def start(self, embedder: nn.Module) -> dict[str, float]:
        """The biases, if they are to start from the data. Returns the figures of the watched clips before training."""
        if self.config.loss.start_bias:
            self._start_biases(self._embedded(embedder, self.eval_loader, "measuring"))
        return self._watched(embedder)

    def split(self, batch: dict[str, Any], size: int | None) -> list[dict[str, Any]]:
        return split_batch(batch, size)

    def runs_of(self, part: dict[str, Any] | None) -> list[str]:
        return runs_of(part or EMPTY_MICRO_BATCH)

    def with_runs(self, part: dict[str, Any] | None, runs: list[str]) -> dict[str, Any]:
        return with_runs(part or EMPTY_MICRO_BATCH, runs, self.model.config)

    def count(self, batch: dict[str, Any]) -> dict[str, int]:
        """Rows that have both sides, by pairing."""
        valid = batch["valid"]
        sides = {pairing.name: pairing.embeddings for pairing in self.pairings}
        return {name: int((valid[left] & valid[right]).sum()) for name, (left, right) in sides.items()}

    def wanted(self, counts: dict[str, int], runs: list[str]) -> list[str]:
        """What the pairings need of which there are at least two rows: one alone has nothing to be told from."""
        parts = set()
        for pairing in self._present(counts):
            for side in (pairing.left, pairing.right):
                names = {"fusion": "audio_video", "text": text_name(pairing.caption)}
                parts |= {names.get(tower, tower) for tower in HEADS[side]}
        return [run for run in runs if run.partition(":")[0] in parts]

    def loss(
        self, embeds: dict[str, Tensor], batch: dict[str, Any], counts: dict[str, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        valid = {
            name: flags.to(self.device, non_blocking=True) for name, flags in batch["valid"].items() if name in embeds
        }
        keys = {kind: key.to(self.device, non_blocking=True) for kind, key in batch["caption_keys"].items()}
        logits = {name: (pair.scale, pair.bias) for name, pair in self.model.logits.items()}
        out = contrastive_loss(embeds, logits, self._present(counts), valid, keys)
        return out.total, {"loss": out.total.detach()} | {f"{name}_loss": value for name, value in out.losses.items()}

    def evaluate(self, embedder: nn.Module, folder: Path, step: int, history: list[dict[str, Any]]) -> Evaluation:
        """Retrieval on the evaluation clips, their loss, and the same retrieval on the clips of `watch`."""
        found = self._embedded(embedder, self.eval_loader, "evaluating")
        metrics, losses = _retrieval(found), self._losses(found)
        recalls = {direction: row["R@1"] for direction, row in metrics.items()}
        figures = {f"R@1/{direction}": value for direction, value in recalls.items()}
        figures |= {"R@1": sum(recalls.values()) / len(recalls)} if recalls else {}
        line = "R@1 in percent: " + "  ".join(f"{name} {value:.1f}" for name, value in list(recalls.items())[:6])
        if losses:
            metrics["loss"], figures["held_out_loss"] = losses, losses["total"]
            line += f"  held-out loss {losses['total']:.2f}"
        watched = self._watched(embedder)
        if watched:
            line += self._told_of_watched(watched, folder, step, history)
        if rank() == 0:
            plot_similarity(found.embeds, folder / "similarity.png", found.valid)
        return Evaluation(metrics, figures | watched, line, found.read, found.bad, found.partial)

    def line(self, row: dict[str, float]) -> str:
        """loss 12.3 = a·t 2.1 …"""
        there = [p for p in self.pairings if f"{p.name}_loss" in row]
        parts = " ".join(f"{_short(p.left, p.right, p.caption)} {row[f'{p.name}_loss']:.2f}" for p in there)
        return f"loss {row['loss']:.2f} = {parts}"

    def show(self, metrics: dict[str, Any]) -> None:
        print_table(metrics)

    def close(self) -> None:
        for loader in (self.train_loader, self.eval_loader, self.watch_loader):
            if loader is not None:
                loader.close()

    def _present(self, counts: Mapping[str, int]) -> list[Pairing]:
        return [pairing for pairing in self.pairings if counts.get(pairing.name, 0) >= 2]

    def _embedded(self, embedder: nn.Module, loader: Any, title: str) -> EmbeddedClips:
        return embed_clips(embedder, loader, self.processor, self.device, title)

    def _watched(self, embedder: nn.Module) -> dict[str, float]:
        """Retrieval on the clips of `watch`, if there are any: "watch/<direction>" -> R@1."""
        if self.watch_loader is None:
            return {}
        metrics = _retrieval(self._embedded(embedder, self.watch_loader, "watching"))
        return {f"watch/{direction}": row["R@1"] for direction, row in metrics.items()}

    def _told_of_watched(
        self, watched: dict[str, float], folder: Path, step: int, history: list[dict[str, Any]]
    ) -> str:
        """A line beside what it was at the start, before anything could be forgotten; all of it into watch.json."""
        rows = [
            {
                "step": row["step"],
                "R@1": {n.removeprefix("watch/"): v for n, v in row.items() if n.startswith("watch/")},
            }
            for row in [*history, {"step": step, **watched}]
        ]
        rows = [row for row in rows if row["R@1"]]  # a run may begin to watch when it goes on
        if rank() == 0:
            write_metrics(folder / "watch.json", {"evaluations": rows})
        first, now = rows[0]["R@1"], rows[-1]["R@1"]
        shown = "  ".join(f"{name} {now[name]:.1f} ({now[name] - first[name]:+.1f})" for name in list(now)[:6])
        return f"\nstep {step}  watched, and since the start: {shown}"

    @torch.no_grad()
    def _start_biases(self, found: EmbeddedClips) -> None:
        """b = −log(N − 1) − s · mean of x·y over pairs that do not belong together, of each pairing."""
        for name, (left, right) in PAIRINGS.items():
            if name in self.model.logits and left in found.embeds and right in found.embeds:
                rows = found.valid[left] & found.valid[right]
                if rows.sum() < 2:
                    continue
                similarity, pair = found.embeds[left][rows] @ found.embeds[right][rows].T, self.model.logits[name]
                apart = similarity[~torch.eye(len(similarity), dtype=torch.bool)].mean()
                pair.bias.fill_(-math.log(self.config.batch_size - 1) - pair.scale.item() * apart.item())

    @torch.no_grad()
    def _losses(self, found: EmbeddedClips) -> dict[str, float]:
        """The objective on held-out clips: the mean over batches of `batch_size` of them, in their order; by pairing,
        and in "total"."""
        logits = {
            name: (pair.scale.detach().cpu(), pair.bias.detach().cpu()) for name, pair in self.model.logits.items()
        }
        pairings = [p for p in self.pairings if all(side in found.embeds for side in p.embeddings)]
        total = max((len(rows) for rows in found.embeds.values()), default=0)
        size = self.config.batch_size
        starts = range(0, max(total - total % size, min(total, 1)), size)  # a last batch that is not full is left out
        # each rank fills in its own batches, and all are added up in their order: the same to the bit on any number
        found_losses = torch.zeros(len(starts), len(pairings), dtype=torch.float64)
        counted = torch.zeros_like(found_losses)
        for number in range(rank(), len(starts), world_size()):
            rows = slice(starts[number], starts[number] + size)
            embeds = {side: found.embeds[side][rows] for p in pairings for side in p.embeddings}
            valid = {side: found.valid[side][rows] for side in embeds}
            present = [p for p in pairings if (valid[p.embeddings[0]] & valid[p.embeddings[1]]).sum() >= 2]
            if present:
                sides = {side for p in present for side in p.embeddings}
                embeds, valid = ({s: v for s, v in some.items() if s in sides} for some in (embeds, valid))
                keys = {kind: key[rows] for kind, key in found.keys.items()}
                losses = contrastive_loss(embeds, logits, present, valid, keys, self._alone).losses
                for index, pairing in enumerate(pairings):
                    if pairing.name in losses:
                        found_losses[number, index], counted[number, index] = losses[pairing.name].double(), 1
        if world_size() > 1:
            dist.all_reduce(found_losses)
            dist.all_reduce(counted)
        sums, times = found_losses.sum(0).tolist(), counted.sum(0).tolist()
        means = {p.name: loss / n for p, loss, n in zip(pairings, sums, times, strict=True) if n}
        if not means:
            return {}
        return {"total": sum(p.weight * means[p.name] for p in pairings if p.name in means), **means}


def trainable_pairings(pairings: Sequence[Pairing], clips: Manifest, console: Console) -> list[Pairing]:
    """Those of which the clips have both sides at least twice; what is left out is said once.

    Raises:
        ConfigError: none with a weight is left.
    """
    modalities, kinds = clips.modalities(), clips.kinds()
    media = {"audio": modalities & Modality.AUDIO > 0, "video": modalities & Modality.VIDEO > 0}
    kept, left_out = [], []
    for pairing in pairings:
        rows = np.ones(len(modalities), dtype=bool)
        for side in (pairing.left, pairing.right):
            for tower in HEADS[side]:
                rows &= media.get(tower, True)
            if "text" in HEADS[side]:
                rows &= _told(side, pairing.caption, kinds)
        (kept if rows.sum() >= 2 else left_out).append(pairing)
    if not any(pairing.weight for pairing in kept):
        has = [name for name, flags in (media | {"captions": modalities & Modality.TEXT > 0}).items() if flags.any()]
        raise ConfigError(
            f"loss: none of {', '.join(p.name for p in pairings if p.weight)} can be trained: the clips have "
            f"{' and '.join(has)}, and no two clips both sides of one; give such clips, or other pairings or weights"
        )
    if left_out:
        names = ", ".join(pairing.name for pairing in left_out)
        console.print(f"left out, since the clips do not have both sides: {names}", soft_wrap=True)
    return kept


def _told(side: str, kind: str | None, kinds: Mapping[str | None, np.ndarray]) -> np.ndarray:
    """(N,) whether a clip has a caption that stands for `kind` in this embedding, as `Collate` chooses."""
    told = np.zeros(len(kinds[None]), dtype=bool)
    chosen = np.zeros_like(told)
    for own in SUBSTITUTES[kind]:
        if fits_embedding(own, side, kind):
            told |= kinds[own] & ~chosen
        chosen |= kinds[own]
    return told


def _retrieval(found: EmbeddedClips) -> dict[str, dict[str, float | int]]:
    plain = {name: rows for name, rows in found.embeds.items() if "@" not in name}
    return evaluate_embeddings(plain, found.valid, found.texts, found.captions, shared=True)


def _short(left: str, right: str, caption: str | None) -> str:
    """audio_plus_text, video -> a+t·v; with the kind of caption behind it"""
    sides = (public_name(side).replace("_", "+").split("+") for side in (left, right))
    short = "·".join("+".join(word[0] for word in side) for side in sides)
    return short if caption is None else f"{short}@{''.join(word[0] for word in caption.split('_'))}"
