"""Frame-level training (PE-A-Frame): which frames of a sound a caption is about. `python -m pe_av.training.frame`

With no data given it renders a small world of sounds and learns to find the one that is asked for. It is a `run.Task`
like the contrastive training, so ranks, states, signals and logs are the same.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pe_av.config import ConfigError, SpanTrainConfig
from pe_av.config.compose import run_command
from pe_av.data.span_demo import prepare_span_demo
from pe_av.data.spans import SpanClip, SpanReader, read_span_manifest
from pe_av.device import to_device
from pe_av.evaluation.localization import localization_metrics
from pe_av.loading.loader import Loader, load_into_memory
from pe_av.loading.sampler import BatchSampler
from pe_av.loading.span_batch import SpanCollate
from pe_av.media.processor import Processor
from pe_av.model.pe_audio_frame import PEAudioFrame
from pe_av.ranks import of_all_ranks, rank, world_size
from pe_av.training.optim import freeze
from pe_av.training.parallel import share_weights
from pe_av.training.run import Evaluation, train
from pe_av.training.setup import calibrate, start_model, tokenizer_of_rank_0

FIGURES = ("AP", "F1", "best F1", "IoU")


def span_loss(
    audio: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    targets: Tensor,
    mask: Tensor,
    captions: Tensor,
    first: int = 0,
    frames: int | None = None,
) -> Tensor:
    """Sigmoid loss of every frame with every caption of the batch.

    L = −(1 / frames) Σ_{i,t,j} log σ(z_itj (s · x_it · y_j + b)), where z is +1 in the spans of caption i in its own
    recording and −1 elsewhere: outside of them, and for the captions of other recordings. A recording may hold what
    another row's equal caption asks for, so pairs of different rows with the same caption are left out.

    Args:
        audio: (B, T, D) frame embeddings; text: (N, D), all captions of the batch; scale, bias: (1,).
        targets: (B, T) bool, frames of row i that its caption is about.
        mask: (B, T) bool, valid frames.
        captions: (N,) integers, equal where captions are.
        first: the caption of row i is number `first` + i.
        frames: of the whole batch, the 1 / frames above; None: those of `mask`.
    """
    with torch.autocast(audio.device.type, enabled=False):
        logits = scale.float() * torch.einsum("itd,jd->itj", audio.float(), text.float()) + bias.float()
    mine = torch.arange(first, first + len(audio), device=text.device)
    own = (mine[:, None] == torch.arange(len(text), device=text.device))[:, None]  # (B, 1, N)
    positive = own & targets[..., None]
    counted = mask[..., None] & (own | (captions[mine][:, None] != captions)[:, None])
    losses = F.softplus(torch.where(positive, -logits, logits))
    return losses.masked_fill(~counted, 0).sum() / (mask.sum() if frames is None else frames)


class FrameEmbedder(nn.Module):
    """The model as a function of a part of a batch: "audio" (rows, T, D), "text" (rows, D), "logits" (rows, T)."""

    def __init__(self, model: PEAudioFrame):
        super().__init__()
        self.model = model

    def forward(self, part: dict[str, Any]) -> dict[str, Tensor]:
        out = self.model(**part["inputs"])
        found = {"audio": out.audio_embeds, "text": out.text_embeds, "logits": out.logits}
        return {name: value[: part["size"]] for name, value in found.items()}


class SpanDetection:
    """The `run.Task` of `python -m pe_av.training.frame`."""

    figures = [*FIGURES, "held_out_loss"]
    falling = ["held_out_loss"]

    def __init__(self, config: SpanTrainConfig, device: torch.device, console: Console, tokenizer: str | None):
        self.config, self.device = config, device
        demo = config.train is None
        manifests = prepare_span_demo(config.demo) if demo else (Path(config.train), Path(config.eval))
        clips = [read_span_manifest(path) for path in manifests]
        self.items = sum(map(len, clips))
        if len(clips[0]) < config.batch_size:
            raise ConfigError(f"{len(clips[0])} recordings do not fill batch_size={config.batch_size}: lower it")
        self.model, self.processor = self._model(clips[0], tokenizer)
        freeze(self.model, config.optim.freeze)
        self.embedder = FrameEmbedder(self.model)
        self.train_loader, self.eval_loader = (
            self._loader(some, training=number == 0, in_memory=demo) for number, some in enumerate(clips)
        )

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

    def runs_of(self, part: dict[str, Any] | None) -> list[str]:
        return [] if part is None else [name for name in ("input_values", "codec_features") if name in part["inputs"]]

    def with_runs(self, part: dict[str, Any] | None, runs: list[str]) -> dict[str, Any]:
        if part is not None or not runs:
            return part or {"inputs": {}, "texts": {}, "size": 0}
        codec = self.model.config.audio.codec
        shape = {"input_values": (1, 1, codec.hop_length), "codec_features": (1, 1, codec.codebook_dim)}[runs[0]]
        nothing = {"input_ids": torch.tensor([[self.model.config.text.pad_token_id]]), runs[0]: torch.zeros(shape)}
        return {"inputs": nothing, "texts": {}, "size": 0}

    def count(self, batch: dict[str, Any]) -> dict[str, int]:
        return {"frames": int(batch["mask"].sum())}

    def wanted(self, counts: dict[str, int], runs: list[str]) -> list[str]:
        return runs if counts["frames"] else []

    def loss(
        self, embeds: dict[str, Tensor], batch: dict[str, Any], counts: dict[str, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Every rank's frames with the captions of all ranks. The gradients of the scale and the bias are the whole
        ones on every rank, those of embeddings `world_size` times theirs, since they are averaged later."""
        given = to_device({name: batch[name] for name in ("targets", "mask", "captions")}, self.device)
        rows, pair = of_all_ranks(len(embeds["text"])), self.model.logits
        text, captions = (_TextsOfAll.apply(value, rows) for value in (embeds["text"], given["captions"]))
        scale, bias = _OfAllFrames.apply(pair.scale), _OfAllFrames.apply(pair.bias)
        first = sum(rows[: rank()])
        mine = span_loss(
            embeds["audio"], text, scale, bias, given["targets"], given["mask"], captions, first, counts["frames"]
        )
        total = mine.detach().clone()
        if world_size() > 1:
            dist.all_reduce(total)
        return mine * world_size(), {"loss": total}

    @torch.no_grad()
    def evaluate(self, embedder: nn.Module, folder: Path, step: int, history: list[dict[str, Any]]) -> Evaluation:
        """Figures on held-out recordings, and the first of them as a picture, `spans.png`."""
        was_training = embedder.training
        embedder.eval()
        pair, mine = self.model.logits, []
        shown = Console(stderr=True, quiet=rank() > 0)
        for batch in track(self.eval_loader, "evaluating", console=shown, transient=True):
            (part,) = self.split(batch, None) or [None]
            runs = sorted({run for theirs in of_all_ranks(self.runs_of(part)) for run in theirs})
            told = {"bad": batch["bad"], "partial": batch["partial"], "read": batch["read"], "rows": [], "loss": None}
            if runs:
                found = embedder(to_device(self.with_runs(part, runs), self.device))
            if part is not None:
                given = to_device({name: batch[name] for name in ("targets", "mask", "captions")}, self.device)
                target, mask = given["targets"], given["mask"]
                loss = span_loss(found["audio"], found["text"], pair.scale, pair.bias, target, mask, given["captions"])
                lengths, probability = mask.sum(1).tolist(), found["logits"].float().sigmoid().cpu()
                told["loss"] = loss.item()
                told["rows"] = [(probability[i, :n], batch["targets"][i, :n]) for i, n in enumerate(lengths)]
            mine.append(told)
        embedder.train(was_training)
        batches = [batch for turn in zip(*of_all_ranks(mine), strict=True) for batch in turn]
        rows = [row for batch in batches for row in batch["rows"]]
        if not rows:
            raise ConfigError("none of the recordings to evaluate on can be read: see bad_items.jsonl")
        scores, targets = zip(*rows, strict=True)
        losses = [batch["loss"] for batch in batches if batch["loss"] is not None]
        metrics = localization_metrics(scores, targets, threshold=0.5) | {"loss": sum(losses) / len(losses)}
        if rank() == 0:
            self._draw(scores, targets, folder / "spans.png")
        bad, partial = (sum((batch[name] for batch in batches), []) for name in ("bad", "partial"))
        figures = {name: metrics[name] for name in FIGURES} | {"held_out_loss": metrics["loss"]}
        line = "  ".join(f"{name} {value:.3g}" for name, value in metrics.items())
        return Evaluation(metrics, figures, line, sum(batch["read"] for batch in batches), bad, partial)

    def line(self, row: dict[str, float]) -> str:
        return f"loss {row['loss']:.3f}"

    def show(self, metrics: dict[str, Any]) -> None:
        print("  ".join(f"{name} {value:.3g}" for name, value in metrics.items()))

    def close(self) -> None:
        self.train_loader.close()
        self.eval_loader.close()

    def _loader(self, clips: Sequence[SpanClip], training: bool, in_memory: bool) -> Loader:
        config, read, workers = (
            self.config,
            SpanReader(self.processor, self.config.max_seconds),
            self.config.num_workers,
        )
        items: Sequence[Any] = clips
        if in_memory:

            def encode(waveform: Tensor) -> Tensor:
                return self.model.audio.encode(waveform.to(self.device))[0].cpu()

            title = f"reading the {'training' if training else 'evaluation'} recordings"
            share_weights(self.model.audio.codec, self.device)
            encoder = None if self.model.config.audio.codec.trainable else encode
            items, read, workers = load_into_memory(clips, read, workers, encoder, title, config.time_limit), dict, 0
        size = config.batch_size if training else config.eval_batch_size
        sampler = BatchSampler(len(clips), size, shuffle=training, seed=config.seed, rank=rank(), world=world_size())
        collate = SpanCollate(self.processor, self.model.seconds_per_position)
        return Loader(items, read, sampler, collate, workers, config.time_limit, self.device.type == "cuda")

    def _model(self, clips: Sequence[SpanClip], tokenizer: str | None) -> tuple[PEAudioFrame, Processor]:
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

    def _draw(self, scores: Sequence[Tensor], targets: Sequence[Tensor], path: Path) -> None:
        figure = Figure(figsize=(9, 6), layout="constrained")
        for axis, score, target in zip(figure.subplots(6, 1, sharex=True), scores, targets, strict=False):
            seconds = torch.arange(len(score)) * self.model.seconds_per_position
            axis.fill_between(seconds, target.float(), step="post", color="tab:green", alpha=0.3, label="asked for")
            axis.step(seconds, score, where="post", color="tab:blue", label="probability")
            axis.set_ylim(0, 1)
        figure.axes[0].legend(loc="upper right")
        figure.axes[-1].set_xlabel("seconds")
        figure.savefig(path)


class _TextsOfAll(torch.autograd.Function):
    """(B, …) of every rank -> (N, …); the gradient of a rank's rows is what all ranks have for them."""

    @staticmethod
    def forward(ctx, mine: Tensor, rows: list[int]) -> Tensor:
        ctx.first, ctx.count = sum(rows[: rank()]), len(mine)
        if world_size() == 1:
            return mine.clone()
        padded = mine.new_zeros(max(rows), *mine.shape[1:])
        padded[: len(mine)] = mine
        found = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(found, padded)
        return torch.cat([part[:count] for part, count in zip(found, rows, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        if world_size() > 1:
            gradient = gradient.contiguous()
            dist.all_reduce(gradient)
        return gradient[ctx.first : ctx.first + ctx.count], None


class _OfAllFrames(torch.autograd.Function):
    """A scalar that every rank uses with its own frames; its gradient, on every rank, is that of the whole loss."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        if world_size() > 1:
            gradient = gradient.contiguous()
            dist.all_reduce(gradient)
            gradient = gradient / world_size()
        return gradient


def main(config: SpanTrainConfig, folder: Path) -> None:
    train(config, folder, SpanDetection)


if __name__ == "__main__":
    run_command(SpanTrainConfig, "train_frame", main)
