"""A training run: steps, evaluations, states to go on from, and what is written into the run's folder.

What is trained, on which data and with which loss is the business of a `Task`: `contrastive.py` and `frame.py`.

config.yaml, history.jsonl, tensorboard/    what was set and what happened, step by step
metrics.json, loss.png, …                   the last evaluation
checkpoint/, best/                          the model of the last and of the best evaluation, to be loaded and shared
state/step-*                                everything a run needs to go on from there (`resume=`)
bad_items.jsonl, partial_items.jsonl        items that are damaged, and items that merely lack something
skipped.jsonl                               steps that could not be taken
"""

import fcntl
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.flop_counter import FlopCounterMode

from pe_av.checkpoint import CheckpointError, save_weights
from pe_av.config import FIXED_ON_RESUME, ConfigError, RunConfig, nearest
from pe_av.device import computes_in_bf16, pick_device, precision_context
from pe_av.evaluation.report import plot_losses, write_metrics
from pe_av.loading.bad_items import BadItems
from pe_av.media.processor import Processor
from pe_av.ranks import of_all_ranks, of_rank_0, process_group, rank, world_size
from pe_av.training.log import Log, Window, learned, machine_use
from pe_av.training.lora import merged_state_dict
from pe_av.training.microbatch import backward
from pe_av.training.optim import AveragedWeights, build_optimizer, set_learning_rate, take_step
from pe_av.training.parallel import clip_gradients, parallelize
from pe_av.training.profile import Profile
from pe_av.training.states import (
    Checkpointer,
    check_space,
    damage,
    load,
    named_states,
    newest_whole,
    ranks_of,
    read_progress,
)

MOST_SKIPPED = 10  # steps in a row without a finite loss and gradient, after which a run gives up
MOST_FRUITLESS = 100_000  # items in a row without two clips to pair, if there are as many, after which it does so too
# USR1 is for schedulers: torchrun, which ends its ranks 30 s after TERM whatever is left to write, does not act on it
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
TIME_IS_UP = 1000  # beside the numbers of signals
TIMEOUT_EXIT_CODE = 124  # that of `timeout`


@dataclass
class Evaluation:
    """What a task found out about its model; the same on every rank."""

    metrics: dict[str, Any]  # for metrics.json
    figures: dict[str, float]  # by name, for the boards and for choosing the best
    line: str  # the same for people
    read: int  # items that were read, and of those
    bad: list[dict[str, Any]]  # {"id", "error"} of the damaged ones
    partial: list[dict[str, Any]]  # and of those that lack something


class Task(Protocol):
    """What a run trains. Batches have at least "ids", "read", "bad" and "partial" (`loading.batch.Collate`)."""

    model: nn.Module  # on the device, with everything frozen that is to be, and adapters in place
    embedder: nn.Module  # part of a batch -> name -> (rows, …); calls the model
    processor: Processor
    train_loader: Any  # endless by epochs: iterating gives the rest of one; `state_dict`, `load_state_dict`
    items: int  # that there are, to train and to evaluate on; of a stream more than anyone will read
    figures: list[str]  # names of an evaluation's figures
    falling: list[str]  # those of which less is better

    def start(self, embedder: nn.Module) -> dict[str, float]:
        """Once, before the first step of a run, with the embedder as it is spread over the ranks; its figures."""

    def split(self, batch: dict[str, Any], size: int | None) -> list[dict[str, Any]]:
        """The parts of a batch, of at most `size` rows; none of an empty one."""

    def runs_of(self, part: dict[str, Any] | None) -> list[str]:
        """Names of what a part makes the model run; None: an empty one."""

    def with_runs(self, part: dict[str, Any] | None, runs: list[str]) -> dict[str, Any]:
        """The part as it must be to run exactly `runs`."""

    def count(self, batch: dict[str, Any]) -> dict[str, int]:
        """How much there is to learn from this rank's rows, by objective."""

    def wanted(self, counts: dict[str, int], runs: list[str]) -> list[str]:
        """Those of `runs` that the objectives need which can be trained, given the counts of all ranks; [] if none."""

    def loss(
        self, embeds: dict[str, Tensor], batch: dict[str, Any], counts: dict[str, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss over all ranks, scaled as `loss.contrastive_loss` says, and what to log, "loss" among it."""

    def evaluate(self, embedder: nn.Module, folder: Path, step: int, history: list[dict[str, Any]]) -> Evaluation:
        """On every rank; rank 0 draws its pictures into the folder. `history`: {"step", figure: value, …} until now."""

    def line(self, row: dict[str, float]) -> str:
        """A row of the history in short, for people."""

    def show(self, metrics: dict[str, Any]) -> None:
        """The last metrics, on standard output."""

    def close(self) -> None:
        """End the workers."""


class Stopped(Exception):
    """A signal or the time limit asked the run to stop; what it had is saved."""

    def __init__(self, number: int, folder: Path):
        by = "max_minutes" if number == TIME_IS_UP else signal.Signals(number).name
        super().__init__(f"stopped by {by}; go on with hydra.run.dir={folder} resume=auto")
        # what shells and schedulers expect of a process that a signal ended
        self.exit_code = TIMEOUT_EXIT_CODE if number == TIME_IS_UP else 128 + number


class _Batch(NamedTuple):
    """A batch on which all ranks have agreed."""

    rows: dict[str, Any]  # this rank's
    parts: list[dict[str, Any]]  # as many on every rank, each running the same on all
    counts: dict[str, int]  # of all ranks
    clips: int  # of all ranks


class Run:
    """One training run, from its config to its folder. Every rank has one; that of rank 0 writes and speaks."""

    def __init__(self, config: RunConfig, folder: Path, device: torch.device, make_task: type[Task]):
        """
        Args:
            make_task: is given the config, the device, a console and, if the run goes on, its tokenizer.
        """
        self.started = self.saved_at = time.monotonic()
        self.config, self.device, self.folder = config, device, of_rank_0(folder)
        self.console = Console(stderr=True, quiet=rank() > 0)
        self.autocast = precision_context(config.precision, device)
        if config.parallel.shard_bf16 and not computes_in_bf16(config.precision, device):
            raise ConfigError("parallel.shard_bf16 gathers weights in bfloat16 and needs precision=bf16 to use them")
        if config.best is not None and config.best not in make_task.figures:
            near = nearest(config.best, make_task.figures)
            raise ConfigError(f"best={config.best} is no figure of the evaluation{near}")
        self.folder.mkdir(parents=True, exist_ok=True)
        state = self._state_to_resume()
        random.seed(config.seed)
        torch.manual_seed(config.seed)  # all ranks start from the same weights

        progress = None if state is None else read_progress(state)
        # that of the run from its start on: a corrected caption must not give the words other numbers
        tokenizer = of_rank_0(None if progress is None else progress.get("tokenizer"))
        self.task = make_task(config, device, self.console, tokenizer)
        words = self.task.processor.tokenizer
        self.tokenizer = None if words is None else words.to_str()
        model = self.model = self.task.model
        # the model's section is the model's own: with `checkpoint=` it came from there
        self.settings = asdict(config) | {"model": asdict(model.config)}
        if progress is not None:
            self._check(state, progress)
        counts = model.parameter_counts()
        listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        self.console.print(f"{sum(counts.values()):,} parameters: {listed}", soft_wrap=True)

        seen = None if progress is None else progress["items"]
        self.bad = BadItems(self.folder, self.task.items, config.max_bad_fraction, rank() == 0, seen)
        self.embedder = parallelize(model, self.task.embedder, config.parallel, device)
        self.evaluations: list[dict[str, Any]] = []  # {"step", figure: value, …}
        if state is None:
            with self.autocast:
                figures = self.task.start(self.embedder)  # before the average begins, which is of what it leaves
            self.evaluations += [{"step": 0, **figures}] if figures else []
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(model, config.optim)
        self.average = None if config.optim.ema is None else AveragedWeights(model, config.optim.ema)
        self.checkpointer = Checkpointer(
            self.folder / "state", config.keep_checkpoints, config.milestone_every, config.parallel.timeout_minutes
        )
        models = 1 if config.best is None else 2
        check_space(self.folder, config.keep_checkpoints, models, model, self.optimizer, self.average)

        self.step, self.skipped, self.signal, self.stop = 0, 0, 0, 0
        self.save_due, self.position = False, self.task.train_loader.state_dict()
        self.clip_flops: float | None = None  # of one clip in one step, counted in the first
        if rank():
            torch.manual_seed(config.seed + rank())  # ranks drop out other units
        if state is not None:
            load(state, model, self.optimizer, self.average)
            self.step, self.evaluations = progress["step"], progress["evaluations"]
            self.clip_flops = progress["clip_flops"]
            self.task.train_loader.load_state_dict(progress["data"])
            self.position = progress["data"]
            if ranks_of(state) != world_size():
                torch.manual_seed(config.seed + rank() + 1_000_003 * self.step)  # of another number of ranks
            self.console.print(f"resumed at step {self.step} from {state}", soft_wrap=True)
        if rank() == 0:
            (self.folder / "config.yaml").write_text(yaml.safe_dump(self.settings, sort_keys=False), encoding="utf-8")
        self.log = Log(self.folder, self.step, config.wandb_project, self.settings)
        self._unread: tuple[int, dict[str, Tensor], Tensor, list[str]] | None = None

    def train(self) -> dict[str, Any]:
        """All the steps that are left. SIGINT, SIGTERM and SIGUSR1 save what has been learned and leave; a second
        SIGINT leaves at once.

        Returns:
            the metrics of the last evaluation.
        Raises:
            Stopped: a signal came, or the time is up.
            ConfigError: ten steps in a row had no finite loss and gradient, too many items are damaged, or nothing can
                be learned from the data.
            CheckpointError: a state could not be written.
        """
        config, metrics = self.config, {}
        lock = self._locked()
        for aside in self.checkpointer.begin(self.step):
            self.console.print(f"set aside {aside}: it is later than what this run goes on from", soft_wrap=True)
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        self.model.train()
        profile = Profile(self.folder / "profile", self.device) if config.profile and rank() == 0 else None
        try:
            with self._progress() as progress:
                bar = progress.add_task("training", total=config.steps, completed=self.step, line="")
                if self._evaluation_is_due() and self.step:  # where the run stopped before it
                    metrics = self.evaluate()
                    self.save()
                elif self.step >= config.steps:
                    self.console.print(f"all of steps={config.steps} have been taken: set more to go on")
                window = Window()
                batches = self._batches()
                while self.step < config.steps:
                    self.position = self.task.train_loader.state_dict()
                    taken = [window.timed(batches) for _ in range(config.accumulate)]
                    if None in taken:  # asked to stop while there was nothing to learn from
                        self._leave()
                    window.add(self._step(taken), sum(batch.clips for batch in taken))
                    self.step += 1
                    last = self.step == config.steps
                    if profile is not None:
                        profile.step()
                    if self.step % config.log_every == 0 or last:
                        line = f"{self.task.line(row := self._log(window))}  {row['clips_per_second']:.0f} clips/s"
                        progress.update(bar, completed=self.step, line=line)
                        if not self.console.is_terminal:
                            self.console.print(f"step {self.step}/{config.steps}  {line}", soft_wrap=True)
                        window = Window()
                    self.position = self.task.train_loader.state_dict()
                    if self.stop:
                        self._leave()
                    if self._evaluation_is_due():
                        self._read_last_step()
                        metrics = self.evaluate()
                        window.restart()
                    if self.save_due or self.step % config.save_every == 0 or last:
                        self._read_last_step()
                        self.save()
            self.checkpointer.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.task.close()
            if profile is not None:
                profile.close(self.console)
            os.close(lock)
        self.console.print(f"written to {self.folder}")
        if rank() == 0 and metrics:
            self.task.show(metrics)
        return metrics

    def evaluate(self) -> dict[str, Any]:
        """The task's evaluation, with the averaged weights if there are any, and the model itself into `checkpoint`,
        and into `best` if none was better; writes `metrics.json` and `loss.png`."""
        with self._averaged():
            with self.autocast:
                try:
                    found = self.task.evaluate(self.embedder, self.folder, self.step, self.evaluations)
                    wrong = [name for name, value in found.figures.items() if not math.isfinite(value)]
                    if wrong:
                        raise ValueError(f"{', '.join(wrong)} not finite")
                except ConfigError:
                    raise
                except ValueError as error:
                    raise ConfigError(
                        f"the evaluation at step {self.step} failed ({error}): if the model has diverged, go on from "
                        f"an earlier state (resume=… of {self.folder / 'state'}) with a lower optim.lr"
                    ) from error
            self._export("checkpoint")
            better = self._is_best(found.figures)
            if better:
                self._export("best")
        self.bad.add(found.read, found.bad, found.partial)
        self.evaluations.append({"step": self.step, **found.figures})
        if rank() == 0:
            listed = {f"{name}_items": len(reasons) for name, reasons in self.bad.reasons.items()}
            write_metrics(self.folder / "metrics.json", found.metrics, step=self.step, **listed)
            if better:
                write_metrics(self.folder / "best" / "metrics.json", found.metrics, step=self.step)
            plot_losses(self.log.rows, self.folder / "loss.png", self.evaluations)
        self.log.show(self.step, found.figures)
        self.console.print(f"step {self.step}  {found.line}", soft_wrap=True)
        return found.metrics

    def _evaluation_is_due(self) -> bool:
        due = self.step % self.config.eval_every == 0 or self.step >= self.config.steps
        return due and not any(row["step"] == self.step for row in self.evaluations)

    def _leave(self) -> None:
        """Save the state, and end the run as it was asked to."""
        self._read_last_step()
        self.save()
        self.checkpointer.wait()
        if self.stop == signal.SIGINT:  # who asks for it is there to look at it
            with self._averaged():
                self._export("checkpoint")
        raise Stopped(self.stop, self.folder)

    def save(self) -> None:
        """In the background, the state to go on from."""
        progress = {
            "step": self.step,
            "data": self.position,
            "evaluations": self.evaluations,
            "items": self.bad.state_dict(),
            "tokenizer": self.tokenizer if rank() == 0 else None,
            "clip_flops": self.clip_flops,
            "settings": self.settings,
        }
        self.checkpointer.save(self.step, self.model, self.optimizer, self.average, progress)
        self.saved_at, self.save_due = time.monotonic(), False

    def _step(self, batches: list[_Batch]) -> dict[str, Tensor]:
        """One optimizer step, or none where loss or gradient is not finite. Returns what is to be logged."""
        config, rows = self.config, {}
        set_learning_rate(self.optimizer, config.optim, self.step, config.steps)
        self.optimizer.zero_grad(set_to_none=True)
        with _counting(config.parallel.compile) if self.clip_flops is None else nullcontext() as flops:
            for number, batch in enumerate(batches, start=1):

                def loss_of(embeds: dict[str, Tensor], batch: _Batch = batch) -> tuple[Tensor, dict[str, Tensor]]:
                    total, logged = self.task.loss(embeds, batch.rows, batch.counts)
                    return total / len(batches), logged

                with self.autocast:
                    found = backward(self.embedder, batch.parts, loss_of, self.device, last=number == len(batches))
                for name, value in found.items():
                    rows.setdefault(name, []).append(value)
        if self.clip_flops is None:
            self.clip_flops = flops.get_total_flops() / max(sum(len(batch.rows["ids"]) for batch in batches), 1)
        rows = {name: torch.stack(values).mean() for name, values in rows.items()}
        norm = clip_gradients(self.trained, config.optim.clip_norm)
        wrong = ~(rows["loss"].isfinite() & norm.isfinite())
        take_step(self.optimizer, wrong)
        if self.average is not None:
            self.average.update(self.model, wrong)
        rows["gradient_norm"] = norm
        self._read_last_step()
        self._unread = self.step, rows, wrong, [name for batch in batches for name in batch.rows["ids"]]
        return rows

    def _read_last_step(self) -> None:
        """Whether the step before this one was left out: asked only now, when the device has long been through it."""
        if self._unread is None:
            return
        (step, rows, wrong, ids), self._unread = self._unread, None
        if not wrong.item():
            self.skipped = 0
            return
        self.skipped += 1
        everyone = of_all_ranks(ids)
        loss, norm = rows["loss"].item(), rows["gradient_norm"].item()
        if rank() == 0:
            row = {"step": step, "loss": str(loss), "gradient_norm": str(norm), "ids": sum(everyone, [])}
            with (self.folder / "skipped.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        told = f"skipped step {step}: loss {loss}, gradient norm {norm}; clips in skipped.jsonl"
        self.console.print(told, soft_wrap=True)
        if self.skipped >= MOST_SKIPPED:
            self.checkpointer.wait()
            raise ConfigError(
                f"{MOST_SKIPPED} steps in a row had no finite loss and gradient (their clips are in "
                f"{self.folder / 'skipped.jsonl'}): resume with a lower optim.lr; the last good state is in "
                f"{self.folder / 'state'}"
            )

    def _log(self, window: Window) -> dict[str, float]:
        """Means over the last steps, and what they took."""
        speed = window.speed()
        use = machine_use(self.device, self.clip_flops, speed["clips_per_second"])
        rate = {"lr": self.optimizer.param_groups[0]["lr"] / (self.optimizer.param_groups[0]["scale"] or 1)}
        return self.log.add(self.step, window.means() | rate | speed | learned(self.model.logits) | use)

    def _batches(self) -> Iterator[_Batch | None]:
        """Shuffled batches without end, each agreed on by all ranks: how many parts it has, what those run, and whether
        there is anything to learn from it at all. Ranks also tell each other here of signals and of damaged items. None
        in place of a batch with nothing to learn from, if the run is to stop."""
        task, fruitless, empty_epochs = self.task, 0, 0
        while True:
            epoch = 0
            for batch in task.train_loader:
                epoch += 1
                parts = task.split(batch, self.config.micro_batch_size)
                everyone = of_all_ranks(
                    {
                        "runs": [task.runs_of(part) for part in parts],
                        "counts": task.count(batch),
                        "clips": len(batch["ids"]),
                        "items": (batch["read"], batch["bad"], batch["partial"]),
                        "stop": self.signal or self._time_is_up(),
                        "save_due": self._save_is_due(),
                        "problem": self.checkpointer.problem(),
                    }
                )
                problem = next((theirs["problem"] for theirs in everyone if theirs["problem"]), None)
                if problem is not None:
                    raise CheckpointError(problem)
                read, bad, partial = zip(*(theirs["items"] for theirs in everyone), strict=True)
                self.bad.add(sum(read), sum(bad, []), sum(partial, []))
                self.stop = max(self.stop, *(theirs["stop"] for theirs in everyone))
                self.save_due |= everyone[0]["save_due"]
                counts: dict[str, int] = {}
                for theirs in everyone:
                    for name, value in theirs["counts"].items():
                        counts[name] = counts.get(name, 0) + value
                number = max(len(theirs["runs"]) for theirs in everyone)
                agreed = []
                for index in range(number):
                    runs = {run for theirs in everyone for run in dict(enumerate(theirs["runs"])).get(index, ())}
                    agreed.append(task.wanted(counts, sorted(runs)))
                fruitless = 0 if any(agreed) else fruitless + sum(read)
                if fruitless > min(task.items, MOST_FRUITLESS):
                    raise ConfigError(
                        f"the last {fruitless} items gave no batch with two clips to pair: partial_items.jsonl and "
                        f"bad_items.jsonl in {self.folder} say what they lack"
                    )
                if any(agreed):
                    mine = dict(enumerate(parts))
                    ready = [task.with_runs(mine.get(index), runs) for index, runs in enumerate(agreed)]
                    yield _Batch(batch, ready, counts, sum(theirs["clips"] for theirs in everyone))
                elif self.stop:
                    yield None
            # the rest of an epoch, with which a run goes on, may have none
            empty_epochs = 0 if epoch else empty_epochs + 1
            if empty_epochs == 2:
                raise ConfigError("the data give no batch at all: lower batch_size, or raise data.batch_tokens")

    def _is_best(self, figures: dict[str, float]) -> bool:
        name = self.config.best
        if name is None or name not in figures:
            return False
        earlier = [row[name] for row in self.evaluations if name in row]
        if name in self.task.falling:
            return figures[name] < min(earlier, default=float("inf"))
        return figures[name] > max(earlier, default=-float("inf"))

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the model has its averaged weights, if there are any."""
        if self.average is None:
            yield
            return
        self.average.swap(self.model)
        try:
            yield
        finally:
            self.average.swap(self.model)

    def _export(self, name: str) -> None:
        """The model as a native checkpoint with its tokenizer, from whatever shards it lies in."""
        whole = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank() == 0:
            save_weights(self.model.config, merged_state_dict(self.model, whole), self.folder / name)
            self.task.processor.save_pretrained(self.folder / name)

    def _locked(self) -> int:
        """A descriptor of the run's folder; until it is closed, by whatever end of this process, no other run trains
        there.

        Raises:
            ConfigError: one does already.
        """
        descriptor, problem = os.open(self.folder, os.O_RDONLY), None
        if rank() == 0:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problem = f"{self.folder}: another process trains there; wait for it, or use another hydra.run.dir"
            except OSError:
                pass  # a file system without locks
        if problem := of_rank_0(problem):
            os.close(descriptor)
            raise ConfigError(problem)
        return descriptor

    def _state_to_resume(self) -> Path | None:
        """The state that `resume` names; "auto": the newest whole one, if there is any. Checked by rank 0 alone."""
        states, resume = self.folder / "state", self.config.resume
        found, problem = None, None
        if rank() == 0:
            if resume is None:
                if named_states(states):
                    problem = f"{states} is of an earlier run: go on with it by resume=auto, or use another folder"
            elif resume == "auto":
                found, damaged = newest_whole(states)
                for path, reason in damaged:
                    self.console.print(f"passed over {path}: {reason}", soft_wrap=True)
                if found is None:
                    self.console.print(f"nothing to resume in {states}: starting at step 0", soft_wrap=True)
            elif reason := damage(Path(resume)):
                problem = f"{resume}: {reason}; resume from another state"
            else:
                found = Path(resume)
        found, problem = of_rank_0((found, problem))
        if problem is not None:
            raise ConfigError(problem)
        return found

    def _check(self, state: Path, progress: dict[str, Any]) -> None:
        """What the state says of the run must be true of this one."""
        if "items" not in progress:
            raise CheckpointError(
                f"{state}: an earlier version wrote it, with other contents; start from its model: checkpoint=…"
            )
        before, now = _flat(progress["settings"]), _flat(json.loads(json.dumps(self.settings)))
        changed = [
            f"{name} was {before.get(name)}, now {now.get(name)}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
            and any(name == fixed or name.startswith(f"{fixed}.") for fixed in FIXED_ON_RESUME)
        ]
        if (before.get("optim.ema") is None) != (now.get("optim.ema") is None):
            changed.append(f"optim.ema was {before.get('optim.ema')}, now {now.get('optim.ema')}")
        if (before.get("data.cache") is None) != (now.get("data.cache") is None):  # what is cached is frozen
            changed.append(f"data.cache was {before.get('data.cache')}, now {now.get('data.cache')}")
        if changed:
            raise ConfigError(
                f"{state}: cannot go on with other settings of what it fixes: {'; '.join(changed[:5])}. Set them "
                "back, or start a new run from its model: checkpoint=…"
            )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number
        self.console.print(f"\n{signal.Signals(number).name}: saving after this step")

    def _time_is_up(self) -> int:
        limit = self.config.max_minutes
        return TIME_IS_UP if limit is not None and time.monotonic() - self.started > 60 * limit else 0

    def _save_is_due(self) -> bool:
        minutes = self.config.save_minutes
        return minutes is not None and time.monotonic() - self.saved_at > 60 * minutes

    def _progress(self) -> Progress:
        columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[line]}"))
        return Progress(*columns, console=self.console, disable=not self.console.is_terminal)


def train(config: RunConfig, folder: Path, make_task: type[Task]) -> None:
    """A whole run on this rank, as a command: what ends it early costs one line and has its exit code."""
    try:
        with process_group(pick_device(config.device), config.parallel.timeout_minutes) as device:
            Run(config, folder, device, make_task).train()
    except ConnectionError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # threads that wait for the lost rank would hold up the end
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}"""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


@contextmanager
def _counting(compiled: bool) -> Iterator[FlopCounterMode]:
    """Count operations, of compiled blocks too: inside they run as they are written."""
    # the compiler takes seconds to import, which a run without it need not wait for
    stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with stance, FlopCounterMode(display=False) as flops:
        yield flops
