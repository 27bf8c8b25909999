"""The training run: data, model, steps, evaluations, and everything that is written into the run's folder."""

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..checkpoint import build_model, load_model, save_model
from ..config import PAIRINGS, ConfigError, TrainConfig
from ..conversion.warm_start import warm_start
from ..data.cache import reader_for
from ..data.dataset import (
    BadItems,
    ClipReader,
    Collate,
    load_into_memory,
    open_manifest,
    to_device,
)
from ..data.loader import BatchSampler, Loader
from ..data.manifest import Manifest
from ..data.processor import Processor
from ..data.tokenizer import read_tokenizer, train_tokenizer
from ..device import pick_device, precision_context
from ..evaluation.embed import embed_batches
from ..evaluation.metrics import evaluate_embeddings, public_name
from ..evaluation.report import plot_losses, plot_similarity, print_table, write_metrics
from ..model.peav import PEAudioVideo
from .optim import build_optimizer, build_schedule, clip_gradients

CALIBRATION_CLIPS = 12  # clips of which a random codec hears the first second


class Run:
    """One training run, from its config to its folder."""

    def __init__(self, config: TrainConfig, folder: Path):
        self.config, self.folder = config, folder
        self.console = Console(stderr=True)
        self.device = pick_device(config.device)
        self.autocast = precision_context(config.precision, self.device)
        folder.mkdir(parents=True, exist_ok=True)
        seed_everything(config.seed)

        train_clips, eval_clips = (open_manifest(config.data, split) for split in ("train", "eval"))
        self.bad = BadItems(folder / "bad_items.jsonl", len(train_clips) + len(eval_clips), config.max_bad_fraction)
        self.model, self.processor = self._model(train_clips)
        counts = self.model.parameter_counts()
        listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        self.console.print(f"{sum(counts.values()):,} parameters: {listed}", soft_wrap=True)
        if config.gradient_checkpointing:
            recompute_blocks(self.model)
        self.train_loader, self.eval_loader = self._loaders(train_clips, eval_clips)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.schedule = build_schedule(self.optimizer, config.optim, config.steps)
        # the model's section is the model's own: with `checkpoint=` it came from there
        resolved = asdict(config) | {"model": asdict(self.model.config)}
        (folder / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.recalls: list[dict[str, Any]] = []

    def train(self) -> dict[str, dict[str, float]]:
        """All the steps. Ctrl-C saves what has been learned and leaves.

        Returns:
            the last evaluation: direction -> `evaluation.metrics.retrieval_metrics`.
        """
        config, metrics = self.config, {}
        try:
            with self._progress() as progress:
                task = progress.add_task("training", total=config.steps, line="")
                window: list[dict[str, Tensor]] = []
                started, clips = time.perf_counter(), 0
                for batch in self._batches():
                    window.append(self._step(batch["inputs"]))
                    self.step += 1
                    clips += len(batch["ids"])
                    if self.step % config.log_every == 0 or self.step == config.steps:
                        row = self._log(window, clips / (time.perf_counter() - started))
                        progress.update(task, completed=self.step, line=_line(row))
                        if not self.console.is_terminal:
                            self.console.print(f"step {self.step}/{config.steps}  {_line(row)}", soft_wrap=True)
                        window, started, clips = [], time.perf_counter(), 0
                    if self.step % config.eval_every == 0 or self.step == config.steps:
                        metrics = self.evaluate()
                        self.save()
                        started, clips = time.perf_counter(), 0
                    if self.step == config.steps:
                        break
        except KeyboardInterrupt:
            self.save()
            self.console.print(f"stopped at step {self.step}; saved to {self.folder / 'checkpoint'}")
            raise
        self.console.print(f"written to {self.folder}")
        print_table(metrics)
        return metrics

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Retrieval on the evaluation set; writes `metrics.json`, the loss plot and the similarity matrices."""
        with self.autocast:
            embeds, valid, bad = embed_batches(self.model, self.eval_loader, self.device, "evaluating")
        self.bad.add(bad)
        metrics = evaluate_embeddings(embeds, valid)
        recalls = {direction: row["R@1"] for direction, row in metrics.items()}
        self.recalls.append({"step": self.step, "R@1": recalls})
        write_metrics(self.folder / "metrics.json", metrics, step=self.step, bad_items=len(self.bad.reasons))
        plot_losses(self.history, self.folder / "loss.png", self.recalls)
        plot_similarity(embeds, self.folder / "similarity.png")
        shown = "  ".join(f"{name} {value:.1f}" for name, value in list(recalls.items())[:6])
        self.console.print(f"step {self.step}  R@1 in percent: {shown}")
        return metrics

    def save(self) -> None:
        """The native checkpoint, complete with its tokenizer."""
        save_model(self.model, self.folder / "checkpoint")
        self.processor.save_pretrained(self.folder / "checkpoint")

    def _step(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """One optimizer step. Returns the losses and the gradient's norm, still on the device."""
        with self.autocast:
            out = self.model(**to_device(inputs, self.device), return_loss=True, loss_weights=self.config.loss.weights)
        self.optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        norm = clip_gradients(self.model, self.config.optim.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        losses = {f"{pairing}_loss": getattr(out, f"{pairing}_loss").detach() for pairing in PAIRINGS}
        return {"loss": out.loss.detach(), "gradient_norm": norm} | losses

    def _log(self, window: list[dict[str, Tensor]], clips_per_second: float) -> dict[str, float]:
        """Means over the last steps into the history and `history.jsonl`."""
        means = {key: torch.stack([row[key] for row in window]).mean().item() for key in window[0]}
        if not np.isfinite(means["loss"]):
            raise ConfigError(
                f"the loss is {means['loss']} before step {self.step}: lower optim.lr or optim.clip_norm; "
                f"the last good weights are in {self.folder / 'checkpoint'}"
            )
        rate = self.schedule.get_last_lr()[0]
        row = {"step": self.step, **means, "lr": rate, "clips_per_second": clips_per_second}
        self.history.append(row)
        with (self.folder / "history.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Shuffled batches without end; items that cannot be used are listed and left out."""
        while True:
            for batch in self.train_loader:
                self.bad.add(batch["bad"])
                if len(batch["ids"]) >= 2:  # one clip alone has nothing to be told from
                    yield batch

    def _model(self, train_clips: Manifest) -> tuple[PEAudioVideo, Processor]:
        """From the checkpoint, or with random weights and a tokenizer made from the captions."""
        config = self.config
        if config.checkpoint is not None:
            return load_model(config.checkpoint, self.device).train(), Processor.from_pretrained(config.checkpoint)
        model = build_model(config.model, self.device).train()
        for line in warm_start(model, config.init):
            self.console.print(line, soft_wrap=True)
        if config.init.text is not None:
            tokenizer = read_tokenizer(config.init.text)
        else:
            tokenizer = train_tokenizer(train_clips.texts(), config.model.text.vocab_size)
        processor = Processor(config.model, tokenizer)
        if not config.model.audio.codec.trainable and config.init.codec is None:
            self._calibrate_codec(model, processor, train_clips)
        return model, processor

    def _calibrate_codec(self, model: PEAudioVideo, processor: Processor, clips: Manifest) -> None:
        """A random codec stays as it starts, so it starts with its channels scaled to the sounds that are there."""
        codec = model.audio.codec
        second = model.config.audio.codec.sampling_rate // codec.hop_length * codec.hop_length
        heard = []
        for item in map(ClipReader(processor, self.config.data.max_seconds), clips):
            if "waveform" in item and len(item["waveform"]) >= second:
                heard.append(item["waveform"][:second])
            if len(heard) == CALIBRATION_CLIPS:
                break
        if heard:
            codec.calibrate(torch.stack(heard)[:, None].to(self.device))

    def _loaders(self, train_clips: Manifest, eval_clips: Manifest) -> tuple[Loader, Loader]:
        config, data = self.config, self.config.data
        train = BatchSampler(
            len(train_clips),
            config.batch_size,
            shuffle=True,
            seed=config.seed,
            lengths=train_clips.lengths(data.max_seconds),
            parts=train_clips.parts(),
            max_tokens=data.batch_tokens,
        )
        loaders = []
        for title, clips, sampler in (
            ("training", train_clips, train),
            ("evaluation", eval_clips, BatchSampler(len(eval_clips), config.eval_batch_size)),
        ):
            read = reader_for(data, self.model, self.processor)
            items: Sequence[Any] = clips
            if data.in_memory:
                encode = codec_encoder(self.model, self.device)
                title = f"reading the {title} clips"
                items = load_into_memory(clips, read, data.num_workers, encode, title, data.time_limit)
                self.bad.add(item for item in items if "error" in item)
                read = dict
            workers = 0 if data.in_memory else data.num_workers
            pin = self.device.type == "cuda"
            collate = Collate(self.processor)
            loaders.append(Loader(items, read, sampler, collate, workers, data.time_limit, pin))
        return loaders[0], loaders[1]

    def _progress(self) -> Progress:
        columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[line]}"))
        return Progress(*columns, console=self.console, disable=not self.console.is_terminal)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def recompute_blocks(model: PEAudioVideo) -> None:
    """Keep only the inputs of the repeated layers for the backward pass, and compute the rest again there."""
    for block in model.blocks():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def codec_encoder(model: PEAudioVideo, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """What to replace waveforms with when clips are kept in memory: a frozen codec's features, else nothing."""
    if model.config.audio.codec.trainable:
        return None
    return lambda waveform: model.audio.encode(waveform.to(device))[0].cpu()


def _line(row: dict[str, float]) -> str:
    """loss 12.3 (audio-text 2.1 …)  830 clips/s"""
    parts = " ".join(f"{_short(pairing)} {row[f'{pairing}_loss']:.2f}" for pairing in PAIRINGS)
    return f"loss {row['loss']:.2f} = {parts}  {row['clips_per_second']:.0f} clips/s"


def _short(pairing: str) -> str:
    """audio_plus_text_video -> a+t·v"""
    sides = (public_name(side).replace("_", "+").split("+") for side in PAIRINGS[pairing])
    return "·".join("+".join(word[0] for word in side) for side in sides)
