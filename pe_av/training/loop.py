"""The training run: data, model, steps, evaluations, checkpoints, and what is written into the run's folder.

config.yaml, history.jsonl, tensorboard/    what was set and what happened, step by step
metrics.json, loss.png, similarity.png      the last evaluation
checkpoint/                                 the model, to be loaded and shared
state/step-*                                everything a run needs to go on from there (`resume=`)
bad_items.jsonl, skipped.jsonl              clips that could not be read, steps that could not be taken
"""

import json
import math
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.flop_counter import FlopCounterMode

from ..checkpoint import save_weights
from ..config import PAIRINGS, ConfigError, TrainConfig
from ..data.dataset import BadItems, open_manifest, to_device
from ..data.loader import Loader
from ..device import precision_context
from ..evaluation.embed import EmbeddedClips, embed_clips
from ..evaluation.metrics import evaluate_embeddings, public_name
from ..evaluation.report import plot_losses, plot_similarity, print_table, write_metrics
from ..loss import contrastive_loss
from .checkpoints import Checkpointer, check_space, damage, load, whole_checkpoints
from .log import Log, Window, learned, machine_use, summary
from .lora import add_adapters, merged_state_dict
from .microbatch import backward
from .optim import AveragedWeights, build_optimizer, build_schedule, freeze
from .parallel import clip_gradients, parallelize, rank, world_size
from .setup import prepare_loaders, prepare_model, watch_loader

MOST_SKIPPED = 10  # steps in a row without a finite loss and gradient, after which a run gives up


class Stopped(Exception):
    """A signal asked the run to stop; what it had is saved."""

    def __init__(self, number: int, folder: Path):
        super().__init__(f"stopped by {signal.Signals(number).name}; go on with hydra.run.dir={folder} resume=auto")
        self.exit_code = 128 + number  # what shells and schedulers expect of a process that a signal ended


class Run:
    """One training run, from its config to its folder. Every rank has one; that of rank 0 writes and speaks."""

    def __init__(self, config: TrainConfig, folder: Path, device: torch.device):
        self.config, self.device, self.folder = config, device, _of_rank_0(folder)
        self.console = Console(stderr=True, quiet=rank() > 0)
        self.autocast = precision_context(config.precision, device)
        if config.batch_size % world_size():
            raise ConfigError(
                f"batch_size={config.batch_size} is that of all ranks together and does not divide over {world_size()}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        seed_everything(config.seed)

        train_clips, eval_clips = (open_manifest(config.data, split) for split in ("train", "eval"))
        bad_items = self.folder / ("bad_items.jsonl" if rank() == 0 else f"bad_items-{rank()}.jsonl")
        self.bad = BadItems(bad_items, len(train_clips) + len(eval_clips), config.max_bad_fraction)
        self.model, self.processor = prepare_model(config, train_clips, device, self.console)
        counts = self.model.parameter_counts()
        listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        self.console.print(f"{sum(counts.values()):,} parameters: {listed}", soft_wrap=True)
        self.train_loader, self.eval_loader = prepare_loaders(
            config, self.model, self.processor, device, train_clips, eval_clips, self.bad
        )
        self.watch_loader, self.watched = watch_loader(config, self.processor), []

        freeze(self.model, config.optim.freeze)
        if config.lora.rank:
            add_adapters(self.model, config.lora)
        self.embedder = parallelize(self.model, config.parallel, device)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.schedule = build_schedule(self.optimizer, config.optim, config.steps)
        self.average = None if config.optim.ema is None else AveragedWeights(self.model, config.optim.ema)
        self.pairings = config.loss.weighted()

        self.step, self.skipped, self.signal = 0, 0, 0
        self.clip_flops: float | None = None  # of one clip in one step, counted in the first
        self.recalls: list[dict[str, Any]] = []
        self.checkpointer = Checkpointer(self.folder / "state", config.keep_checkpoints)
        check_space(self.folder, config.keep_checkpoints, self.model, self.optimizer, self.average)
        self._resume()
        if config.loss.start_bias and self.step == 0:
            self._start_biases()
        # the model's section is the model's own: with `checkpoint=` it came from there
        resolved = asdict(config) | {"model": asdict(self.model.config)}
        if rank() == 0:
            (self.folder / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")
        self.log = Log(self.folder, self.step, config.wandb_project, resolved)

    def train(self) -> dict[str, dict[str, float]]:
        """All the steps. SIGINT and SIGTERM save what has been learned and leave; a second SIGINT leaves at once.

        Returns:
            the last evaluation: direction -> `evaluation.metrics.retrieval_metrics`; on rank 0.
        Raises:
            Stopped: a signal came.
            ConfigError: ten steps in a row had no finite loss and gradient.
        """
        config, metrics = self.config, {}
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self._progress() as progress:
                task = progress.add_task("training", total=config.steps, completed=self.step, line="")
                if self.watch_loader is not None and self.step == 0:
                    self._evaluate_watched()
                window = Window()
                batches = self._batches()
                while self.step < config.steps:
                    taken = [window.timed(batches) for _ in range(config.accumulate)]
                    window.add(self._step(taken), sum(len(batch["ids"]) for batch in taken) * world_size())
                    self.step += 1
                    last = self.step == config.steps
                    if self.step % config.log_every == 0 or last:
                        line = summary(self._log(window), self.pairings)
                        progress.update(task, completed=self.step, line=line)
                        if not self.console.is_terminal:
                            self.console.print(f"step {self.step}/{config.steps}  {line}", soft_wrap=True)
                        window = Window()
                    if number := self._any_rank(self.signal):
                        self.save()
                        self.checkpointer.wait()
                        raise Stopped(number, self.folder)
                    if self.step % config.eval_every == 0 or last:
                        metrics = self.evaluate()
                        self.save()
                        window.restart()
            self.checkpointer.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.train_loader.close()
            self.eval_loader.close()
            if self.watch_loader is not None:
                self.watch_loader.close()
        self.console.print(f"written to {self.folder}")
        if rank() == 0:
            print_table(metrics)
        return metrics

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Retrieval on the evaluation set; writes `metrics.json`, the loss plot and the similarity matrices."""
        if self.average is not None:
            self.average.swap(self.model)
        found = self._embedded(self.eval_loader, "evaluating")
        self._evaluate_watched()
        if self.average is not None:
            self.average.swap(self.model)
        self.bad.add(found.bad)
        metrics = evaluate_embeddings(found.embeds, found.valid, found.texts, found.captions)
        recalls = {direction: row["R@1"] for direction, row in metrics.items()}
        self.recalls.append({"step": self.step, "R@1": recalls})
        if rank() == 0:
            write_metrics(self.folder / "metrics.json", metrics, step=self.step, bad_items=len(self.bad.reasons))
            plot_losses(self.log.rows, self.folder / "loss.png", self.recalls)
            plot_similarity(found.embeds, self.folder / "similarity.png")
        self.log.show(self.step, {f"R@1/{direction}": value for direction, value in recalls.items()})
        shown = "  ".join(f"{name} {value:.1f}" for name, value in list(recalls.items())[:6])
        self.console.print(f"step {self.step}  R@1 in percent: {shown}", soft_wrap=True)
        return metrics

    def _evaluate_watched(self) -> None:
        """The same on the clips of `watch`, beside what it was at the start, before anything could be forgotten."""
        if self.watch_loader is None:
            return
        found = self._embedded(self.watch_loader, "watching")
        metrics = evaluate_embeddings(found.embeds, found.valid, found.texts, found.captions)
        recalls = {direction: row["R@1"] for direction, row in metrics.items()}
        self.watched.append({"step": self.step, "R@1": recalls})
        if rank() == 0:
            write_metrics(self.folder / "watch.json", {"evaluations": self.watched})
        self.log.show(self.step, {f"watch/{direction}": value for direction, value in recalls.items()})
        changes = {name: value - self.watched[0]["R@1"][name] for name, value in recalls.items()}
        shown = "  ".join(f"{name} {recalls[name]:.1f} ({changes[name]:+.1f})" for name in list(recalls)[:6])
        self.console.print(f"step {self.step}  watched, and since the start: {shown}", soft_wrap=True)

    def _embedded(self, loader: Loader, title: str) -> EmbeddedClips:
        with self.autocast:
            return embed_clips(self.embedder, loader, self.processor, self.device, title)

    @torch.no_grad()
    def _start_biases(self) -> None:
        """b = −log(N − 1) − s · mean of x·y over pairs that do not belong together, of each pairing."""
        embeds = self._embedded(self.eval_loader, "measuring").embeds
        for name, (left, right) in PAIRINGS.items():
            if name in self.model.logits and left in embeds and right in embeds and len(embeds[left]) > 1:
                similarity, pair = embeds[left] @ embeds[right].T, self.model.logits[name]
                apart = similarity[~torch.eye(len(similarity), dtype=torch.bool)].mean()
                pair.bias.fill_(-math.log(self.config.batch_size - 1) - pair.scale.item() * apart.item())

    def save(self) -> None:
        """The model as a native checkpoint with its tokenizer, and, in the background, the state to go on from."""
        if self.average is not None:
            self.average.swap(self.model)
        whole = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank() == 0:
            save_weights(self.model.config, merged_state_dict(self.model, whole), self.folder / "checkpoint")
            self.processor.save_pretrained(self.folder / "checkpoint")
        if self.average is not None:
            self.average.swap(self.model)
        progress = {
            "step": self.step,
            "schedule": self.schedule.state_dict(),
            "data": self.train_loader.state_dict(),
            "recalls": self.recalls,
            "watched": self.watched,
            "clip_flops": self.clip_flops,
        }
        self.checkpointer.save(self.step, self.model, self.optimizer, self.average, progress)

    def _step(self, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One optimizer step, or none where loss or gradient is not finite. Returns what is to be logged."""
        logits = {name: (pair.scale, pair.bias) for name, pair in self.model.logits.items()}
        rows: dict[str, Tensor] = {}
        self.optimizer.zero_grad(set_to_none=True)
        with _counting() if self.clip_flops is None else nullcontext() as flops:
            for number, batch in enumerate(batches, start=1):

                def loss_of(
                    embeds: dict[str, Tensor], batch: dict[str, Any] = batch
                ) -> tuple[Tensor, dict[str, Tensor]]:
                    out = contrastive_loss(
                        embeds,
                        logits,
                        self.pairings,
                        {name: flags for name, flags in batch["valid"].items() if name in embeds},
                        batch["caption_keys"],
                    )
                    return out.total / len(batches), {"loss": out.total.detach()} | {
                        f"{name}_loss": value for name, value in out.losses.items()
                    }

                with self.autocast:
                    parts = split_batch(to_device(batch, self.device), self.config.micro_batch_size)
                    found = backward(self.embedder, parts, loss_of, last=number == len(batches))
                rows = {name: rows.get(name, 0) + value / len(batches) for name, value in found.items()}
        if self.clip_flops is None:
            self.clip_flops = flops.get_total_flops() / sum(len(batch["ids"]) for batch in batches)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norm = clip_gradients(trained, self.config.optim.clip_norm)
        if math.isfinite(rows["loss"].item()) and math.isfinite(norm.item()):
            self.optimizer.step()
            if self.average is not None:
                self.average.update(self.model)
            self.skipped = 0
        else:
            self._skip(rows["loss"].item(), norm.item(), [name for batch in batches for name in batch["ids"]])
        self.schedule.step()
        return rows | {"gradient_norm": norm}

    def _skip(self, loss: float, norm: float, ids: list[str]) -> None:
        """Leave the weights as they are, and say with which clips that was."""
        self.skipped += 1
        everyone = [ids]
        if world_size() > 1:
            everyone = [[] for _ in range(world_size())]
            dist.all_gather_object(everyone, ids)
        if rank() == 0:
            row = {"step": self.step, "loss": str(loss), "gradient_norm": str(norm), "ids": sum(everyone, [])}
            with (self.folder / "skipped.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.console.print(f"skipped step {self.step}: loss {loss}, gradient norm {norm}; clips in skipped.jsonl")
        if self.skipped >= MOST_SKIPPED:
            self.checkpointer.wait()
            raise ConfigError(
                f"{MOST_SKIPPED} steps in a row had no finite loss and gradient (their clips are in "
                f"{self.folder / 'skipped.jsonl'}): lower optim.lr; the last good weights are in "
                f"{self.folder / 'checkpoint'}, the last good state in {self.folder / 'state'}"
            )

    def _log(self, window: Window) -> dict[str, float]:
        """Means over the last steps, and what they took."""
        speed = window.speed()
        use = machine_use(self.device, self.clip_flops, speed["clips_per_second"])
        rate = {"lr": self.schedule.get_last_lr()[0]}
        return self.log.add(self.step, window.means() | rate | speed | learned(self.model.logits) | use)

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Shuffled batches without end; items that cannot be used are listed and left out."""
        while True:
            for batch in self.train_loader:
                self.bad.add(batch["bad"])
                if len(batch["ids"]) * world_size() >= 2:  # one clip alone has nothing to be told from
                    yield batch

    def _resume(self) -> None:
        """Go on from the checkpoint that `resume` names; "auto": the newest whole one, if there is any."""
        states, found = self.folder / "state", None
        if self.config.resume is None:
            if any(states.glob("step-*")):
                raise ConfigError(f"{states} is of an earlier run: go on with it by resume=auto, or use another folder")
        elif self.config.resume == "auto":
            for path in sorted(states.glob("step-*")):
                if reason := damage(path):
                    self.console.print(f"passed over {path}: {reason}", soft_wrap=True)
            found = _of_rank_0(next(reversed(whole_checkpoints(states)), None))
            if found is None:
                self.console.print(f"nothing to resume in {states}: starting at step 0", soft_wrap=True)
        else:
            found = Path(self.config.resume)
        if found is not None:
            progress = load(found, self.model, self.optimizer, self.average)
            self.step, self.recalls, self.watched = (progress[name] for name in ("step", "recalls", "watched"))
            # counted once in a run: the step in which it is done rounds otherwise in the last digit
            self.clip_flops = progress["clip_flops"]
            self.schedule.load_state_dict(progress["schedule"])
            self.train_loader.load_state_dict(progress["data"])
            self.console.print(f"resumed at step {self.step} from {found}", soft_wrap=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number
        self.console.print(f"\n{signal.Signals(number).name}: saving after this step")

    def _any_rank(self, number: int) -> int:
        """The largest of the ranks' numbers, since a signal may reach only one of them."""
        if world_size() == 1:
            return number
        shared = torch.tensor(number, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def _progress(self) -> Progress:
        columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[line]}"))
        return Progress(*columns, console=self.console, disable=not self.console.is_terminal)


def seed_everything(seed: int) -> None:
    """All ranks start from the same weights; they differ in their data alone."""
    random.seed(seed)
    torch.manual_seed(seed)


def split_batch(batch: dict[str, Any], rows: int | None) -> list[dict[str, Any]]:
    """The "inputs" and "texts" of a batch in parts of at most so many rows."""
    total = len(batch["ids"])
    rows = total if rows is None else rows

    def part(tensors: dict[str, Tensor], start: int) -> dict[str, Tensor]:
        return {name: tensor[start : start + rows] for name, tensor in tensors.items()}

    return [
        {
            "inputs": part(batch["inputs"], start),
            "texts": {kind: part(tokens, start) for kind, tokens in batch["texts"].items()},
        }
        for start in range(0, total, rows)
    ]


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """Count operations, of compiled blocks too: inside they run as they are written."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as flops:
        yield flops


def _of_rank_0(value: Any) -> Any:
    """Rank 0's value on every rank."""
    shared = [value]
    if world_size() > 1:
        dist.broadcast_object_list(shared)
    return shared[0]


def _short(left: str, right: str, caption: str | None) -> str:
    """audio_plus_text, video -> a+t·v; with the kind of caption behind it"""
    sides = (public_name(side).replace("_", "+").split("+") for side in (left, right))
    short = "·".join("+".join(word[0] for word in side) for side in sides)
    return short if caption is None else f"{short}@{''.join(word[0] for word in caption.split('_'))}"
