"""Frame-level training of PEAudioFrame: at which times of a recording is what its caption describes?

`python -m pe_av.training.frame`; without data it renders a small world of sounds. It is a `task.Task` like the
contrastive training, so ranks, states, signals and logs are the same. The model classifies the positions of the audio
tower, 40 ms each; those in a caption's spans are the caption's targets.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer
from torch import Tensor, nn

from pe_av.config import ConfigError, SpanTrainConfig
from pe_av.config.compose import run_command
from pe_av.data.span_demo import prepare_span_demo
from pe_av.data.spans import SpanClip, SpanReader, read_span_manifest
from pe_av.device import to_device
from pe_av.evaluation.events import event_metrics, plot_recordings
from pe_av.evaluation.localization import localization_metrics
from pe_av.loading.loader import Loader, load_into_memory
from pe_av.loading.sampler import BatchSampler
from pe_av.loading.span_batch import SpanCollate
from pe_av.media.processor import Processor
from pe_av.model.pe_audio_frame import PEAudioFrame
from pe_av.ranks import of_all_ranks, rank, world_size
from pe_av.training.optim import freeze
from pe_av.training.setup import calibrate, frozen_codec, start_model, tokenizer_of_rank_0
from pe_av.training.span_loss import gather_rows, span_loss, sum_gradient
from pe_av.training.task import Evaluation
from pe_av.training.trainer import train

FIGURES = ("AP", "F1", "best F1", "IoU", "event F1", "best event F1", "PSDS 0.7")
SHOWN = ("AP", "chance AP", "AUROC", "best F1", "best event F1", "PSDS 0.7", "IoU", "loss")  # in a line for people
THRESHOLD = 0.5  # of the probability
DRAWN = 4  # recordings


class SpanDetection:
    """The `task.Task` of `python -m pe_av.training.frame`."""

    figures = [*FIGURES, "held_out_loss"]
    falling = ["held_out_loss"]

    def __init__(self, config: SpanTrainConfig, device: torch.device, console: Console, tokenizer: str | None):
        self.config, self.device = config, device
        demo = config.train is None
        manifests = prepare_span_demo(config.demo) if demo else (Path(config.train), Path(config.eval))
        train_clips, eval_clips = (read_span_manifest(path) for path in manifests)
        self.items = len(train_clips) + len(eval_clips)
        self.eval_clips = {clip.id: clip for clip in eval_clips}
        if len(train_clips) < config.batch_size:
            raise ConfigError(f"{len(train_clips)} recordings do not fill batch_size={config.batch_size}: lower it")
        self.model, self.processor = self._model(train_clips, tokenizer)
        freeze(self.model, config.optim.freeze)
        self.embedder = FrameEmbedder(self.model)
        self.train_loader = self._loader(train_clips, training=True, in_memory=demo)
        self.eval_loader = self._loader(eval_clips, training=False, in_memory=demo)

    def start(self, embedder: nn.Module) -> dict[str, float]:
        return {}

    def split(self, batch: dict[str, Any], size: int | None) -> list[dict[str, Any]]:
        total = len(batch["ids"])
        size = max(total, 1) if size is None else size
        return [
            {
                "inputs": {name: value[start : start + size] for name, value in batch["inputs"].items()},
                "texts": {},
                "size": min(size, total - start),
            }
            for start in range(0, total, size)
        ]

    def passes_of(self, micro_batch: dict[str, Any]) -> list[str]:
        return [name for name in ("input_values", "codec_features") if name in micro_batch["inputs"]]

    def with_passes(self, micro_batch: dict[str, Any] | None, passes: list[str]) -> dict[str, Any]:
        if micro_batch is not None:
            return micro_batch
        if not passes:
            return {"inputs": {}, "texts": {}, "size": 0}
        # the shortest recording, of one row whose embeddings are dropped
        codec = self.model.config.audio.codec
        shape = {"input_values": (1, 1, codec.hop_length), "codec_features": (1, 1, codec.codebook_dim)}[passes[0]]
        inputs = {"input_ids": torch.tensor([[self.model.config.text.pad_token_id]]), passes[0]: torch.zeros(shape)}
        return {"inputs": inputs, "texts": {}, "size": 0}

    def count(self, batch: dict[str, Any]) -> dict[str, int]:
        return {"positions": int(batch["mask"].sum())}

    def needed(self, counts: dict[str, int], passes: list[str]) -> list[str]:
        return passes if counts["positions"] else []

    def loss(
        self, embeds: dict[str, Tensor], batch: dict[str, Any], counts: dict[str, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's positions with the captions of all ranks. As with `loss.contrastive_loss`, the gradients of scale
        and bias are those of the whole loss on every rank; those of embeddings are the world size times those of the
        whole loss, since the gradients of parameters are averaged over the ranks later."""
        labels = self._labels(batch)
        rows = of_all_ranks(len(embeds["text"]))
        text, labels["captions"] = gather_rows(embeds["text"], rows), gather_rows(labels["captions"], rows)
        scale, bias = sum_gradient(self.model.logits.scale), sum_gradient(self.model.logits.bias)
        first = sum(rows[: rank()])
        loss = span_loss(embeds["audio"], text, scale, bias, **labels, first=first, positions=counts["positions"])
        total = loss.detach().clone()
        if world_size() > 1:
            dist.all_reduce(total)
        return loss * world_size(), {"loss": total}

    @torch.no_grad()
    def evaluate(self, embedder: nn.Module, folder: Path, step: int, history: list[dict[str, Any]]) -> Evaluation:
        """The figures of `localization` and `events` on held-out recordings, the first few drawn in `spans.png`."""
        was_training = embedder.training
        embedder.eval()
        console = Console(stderr=True, quiet=rank() > 0)
        own = [
            self._evaluate_batch(embedder, batch)
            for batch in track(self.eval_loader, "evaluating", console=console, transient=True)
        ]
        embedder.train(was_training)
        # batch b of rank r is number b · world + r of all
        batches = [batch for turn in zip(*of_all_ranks(own), strict=True) for batch in turn]
        rows = [row for batch in batches for row in batch["rows"]]
        if not rows:
            raise ConfigError("none of the recordings to evaluate on can be read: see bad_items.jsonl")
        ids, scores, targets, spans = zip(*rows, strict=True)
        losses = [batch["loss"] for batch in batches if batch["loss"] is not None]
        metrics = localization_metrics(scores, targets, THRESHOLD)
        metrics |= event_metrics(scores, spans, self.model.seconds_per_position, THRESHOLD)
        metrics["loss"] = sum(losses) / len(losses)
        if rank() == 0:
            self._draw(ids, scores, folder / "spans.png")
        return Evaluation(
            metrics=metrics,
            figures={name: metrics[name] for name in FIGURES if name in metrics} | {"held_out_loss": metrics["loss"]},
            line=_line(metrics),
            read=sum(batch["read"] for batch in batches),
            bad=sum((batch["bad"] for batch in batches), []),
            partial=sum((batch["partial"] for batch in batches), []),
            cut=sum((batch["cut"] for batch in batches), []),
        )

    def line(self, row: dict[str, float]) -> str:
        return f"loss {row['loss']:.3f}"

    def show(self, metrics: dict[str, Any]) -> None:
        print(_line(metrics))

    def close(self) -> None:
        self.train_loader.close()
        self.eval_loader.close()

    def _labels(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The arguments of `span_loss` that say what is right."""
        return to_device({name: batch[name] for name in ("targets", "mask", "captions")}, self.device)

    def _evaluate_batch(self, embedder: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """Evaluate one batch of this rank: "loss", "rows" of (id, probabilities, targets, spans), and what was read."""
        result = {name: batch[name] for name in ("read", "bad", "partial", "cut")} | {"rows": [], "loss": None}
        (micro_batch,) = self.split(batch, None) or [None]
        own = [] if micro_batch is None else self.passes_of(micro_batch)
        passes = sorted({name for of_rank in of_all_ranks(own) for name in of_rank})
        if not passes:
            return result
        embeds = embedder(to_device(self.with_passes(micro_batch, passes), self.device))
        if micro_batch is not None:
            loss = span_loss(
                embeds["audio"], embeds["text"], self.model.logits.scale, self.model.logits.bias, **self._labels(batch)
            )
            result["loss"] = loss.item()
            probability, lengths = embeds["logits"].float().sigmoid().cpu(), batch["mask"].sum(1).tolist()
            result["rows"] = [
                (batch["ids"][i], probability[i, :n], batch["targets"][i, :n], batch["spans"][i])
                for i, n in enumerate(lengths)
            ]
        return result

    def _model(self, clips: Sequence[SpanClip], tokenizer: str | None) -> tuple[PEAudioFrame, Processor]:
        """From the checkpoint, or with random weights and a tokenizer trained on the captions."""
        config, device = self.config, self.device
        model = start_model(config, device)
        if not isinstance(model, PEAudioFrame):
            raise ConfigError(f"{config.checkpoint} is no PEAudioFrame: convert or train one")
        if config.checkpoint is not None:
            return model, Processor.from_pretrained(config.checkpoint)
        if tokenizer is not None:
            words = Tokenizer.from_str(tokenizer)
        else:
            words = tokenizer_of_rank_0(lambda: (c.caption for c in clips), config.model.text.vocab_size)
        processor = Processor(config.model, words)
        if rank() == 0 and not config.model.audio.codec.trainable:
            read = SpanReader(processor, config.max_seconds)
            waveforms = (item["waveform"] for item in map(read, clips) if "waveform" in item)
            calibrate(model.audio.codec, waveforms, config.model.audio.codec.sampling_rate, device)
        return model, processor

    def _loader(self, clips: Sequence[SpanClip], training: bool, in_memory: bool) -> Loader:
        config = self.config
        read: Callable[[Any], dict[str, Any]] = SpanReader(self.processor, config.max_seconds)
        items: Sequence[Any] = clips
        workers = config.num_workers
        if in_memory:
            title = f"reading the {'training' if training else 'evaluation'} recordings"
            encode = frozen_codec(self.model, self.device)
            items = load_into_memory(clips, read, workers, encode, title, config.time_limit)
            read, workers = dict, 0
        size = config.batch_size if training else config.eval_batch_size
        sampler = BatchSampler(len(clips), size, shuffle=training, seed=config.seed, rank=rank(), world=world_size())
        collate = SpanCollate(self.processor, self.model.seconds_per_position)
        return Loader(items, read, sampler, collate, workers, config.time_limit, self.device.type == "cuda")

    def _draw(self, ids: Sequence[str], scores: Sequence[Tensor], path: Path) -> None:
        """The first recordings, whose sound is read again: a batch may hold features instead."""
        read, recordings = SpanReader(self.processor, self.config.max_seconds), []
        rate = self.model.config.audio.codec.sampling_rate
        for name, score in zip(ids[:DRAWN], scores, strict=False):
            item = read(self.eval_clips[name])
            if "waveform" in item:
                recordings.append(item | {"sampling_rate": rate, "scores": score})
        if recordings:
            plot_recordings(recordings, self.model.seconds_per_position, THRESHOLD).savefig(path)


class FrameEmbedder(nn.Module):
    """The model as a function of a micro-batch: "audio" (rows, T, D), "text" (rows, D), "logits" (rows, T)."""

    def __init__(self, model: PEAudioFrame):
        super().__init__()
        self.model = model

    def forward(self, micro_batch: dict[str, Any]) -> dict[str, Tensor]:
        out = self.model(**micro_batch["inputs"])
        embeds = {"audio": out.audio_embeds, "text": out.text_embeds, "logits": out.logits}
        # a micro-batch without rows has one as its input (`SpanDetection.with_passes`)
        return {name: value[: micro_batch["size"]] for name, value in embeds.items()}


def _line(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {metrics[name]:.3g}" for name in SHOWN if name in metrics)


def main(config: SpanTrainConfig, folder: Path) -> None:
    train(config, folder, SpanDetection)


if __name__ == "__main__":
    run_command(SpanTrainConfig, "train_frame", main)
