"""A training run, whatever it trains: the loop of steps, evaluations and saved states.

What is trained, on which data and with which loss, is a `task.Task`: contrastive.py or frame.py. One step is in
learner.py. Everything that a run writes is in its folder:

config.yaml, history.jsonl, tensorboard/    the settings, and what happened step by step
metrics.json, loss.png, …                   the last evaluation
checkpoint/, best/                          the models of the last and of the best evaluation, to be loaded and shared
state/step-*                                everything that a run needs to go on from there (`resume=`)
bad_items.jsonl, partial_items.jsonl        items that are damaged, and items that merely lack something
skipped.jsonl                               steps that were not taken, since their loss or gradient was not finite
"""

import os
import random
import signal
import sys
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from pe_av.config import ConfigError, RunConfig, nearest
from pe_av.device import computes_in_bf16, pick_device, precision_context
from pe_av.loading.bad_items import BadItems
from pe_av.ranks import of_rank_0, process_group, rank, world_size
from pe_av.training.agreement import agreed_batches
from pe_av.training.evaluating import Diverged, Evaluator
from pe_av.training.learner import Learner
from pe_av.training.log import Log, Window, machine_use, progress_bar, scales_and_biases
from pe_av.training.parallel import parallelize
from pe_av.training.profile import profiled
from pe_av.training.resume import check_settings, state_to_resume
from pe_av.training.skipped import SkippedSteps
from pe_av.training.states import StateWriter, check_space, load, ranks_of, read_progress
from pe_av.training.stopping import Requests, Stopped, locked
from pe_av.training.task import Task


def train(config: RunConfig, folder: Path, task_class: type[Task]) -> None:
    """A whole run on this rank, as a command: what ends it early costs one line and has its own exit code."""
    try:
        with process_group(pick_device(config.device), config.parallel.timeout_minutes) as device:
            Trainer(config, folder, device, task_class).train()
    except ConnectionError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # threads that still wait for the lost rank would keep the process from ending
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)


class Trainer:
    """One run, from its config to its folder. Every rank has a trainer; only rank 0's writes files and prints."""

    def __init__(self, config: RunConfig, folder: Path, device: torch.device, task_class: type[Task]):
        """Set everything up, and put the state that the run resumes from in place.

        Raises:
            ConfigError: the settings do not fit together, or not with the data or the state.
            CheckpointError: a state of another model, or a disk without room for the checkpoints.
        """
        _check(config, device, task_class)
        self.config, self.device, self.folder = config, device, of_rank_0(folder)
        self.console = Console(stderr=True, quiet=rank() > 0)
        self.requests = Requests(config.max_minutes, config.save_minutes, self.console)
        self.folder.mkdir(parents=True, exist_ok=True)
        state = state_to_resume(self.folder / "state", config.resume, self.console)
        progress = {} if state is None else read_progress(state)

        # the model and the data
        random.seed(config.seed)
        torch.manual_seed(config.seed)  # the same on all ranks, so that all start from the same weights
        # a resumed run keeps its tokenizer: one trained anew on corrected captions would number the tokens differently
        self.task = task_class(config, device, self.console, of_rank_0(progress.get("tokenizer")))
        self.model, words = self.task.model, self.task.processor.tokenizer
        self.tokenizer = words.to_str() if rank() == 0 and words is not None else None
        # with `checkpoint=` the model's settings came from there
        self.settings = asdict(config) | {"model": asdict(self.model.config)}
        if state is not None:
            check_settings(state, progress, self.settings)
        counts = self.model.parameter_counts()
        listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        self.console.print(f"{sum(counts.values()):,} parameters: {listed}", soft_wrap=True)
        self.bad_items = BadItems(
            self.folder, self.task.items, config.max_bad_fraction, rank() == 0, progress.get("items")
        )
        embedder = parallelize(self.model, self.task.embedder, config.parallel, device)
        evaluations = progress.get("evaluations", [])
        if state is None:
            with precision_context(config.precision, device):
                figures = self.task.start(embedder)  # may set biases, so it comes before the average of the weights
            evaluations = [{"step": 0, **figures}] if figures else []
        self.learner = Learner(self.task, embedder, config, device)

        # the states
        self.states = StateWriter(
            self.folder / "state", config.keep_checkpoints, config.milestone_every, config.parallel.timeout_minutes
        )
        learned = self.model, self.learner.optimizer, self.learner.average
        check_space(self.folder, config.keep_checkpoints, 1 if config.best is None else 2, *learned)
        self.step = progress.get("step", 0)  # steps taken so far
        if rank():
            torch.manual_seed(config.seed + rank())  # every rank has dropout of its own
        if state is not None:
            load(state, *learned)
            self.learner.clip_flops = progress["clip_flops"]
            self.task.train_loader.load_state_dict(progress["data"])
            if ranks_of(state) != world_size():  # then the state's random numbers are not this rank's
                torch.manual_seed(config.seed + rank() + 1_000_003 * self.step)
            self.console.print(f"resumed at step {self.step} from {state}", soft_wrap=True)

        # what is written
        if rank() == 0:
            (self.folder / "config.yaml").write_text(yaml.safe_dump(self.settings, sort_keys=False), encoding="utf-8")
        self.log = Log(self.folder, self.step, config.wandb_project, self.settings)
        self.skipped = SkippedSteps(self.folder, self.console)
        self.evaluator = Evaluator(
            config, self.folder, self.learner, self.bad_items, self.log, self.console, evaluations
        )

    def train(self) -> dict[str, Any]:
        """Take all the steps that are left. SIGINT, SIGTERM and SIGUSR1 save a state and leave; a second SIGINT leaves
        at once.

        Returns:
            the metrics of the last evaluation; {} if there was nothing left to do.
        Raises:
            Stopped: a signal came, or the time is up.
            ConfigError: ten steps in a row had no finite loss and gradient, too many items are damaged, nothing can be
                learned from the data, or another run trains in this folder.
            CheckpointError: a state could not be written.
        """
        with locked(self.folder):
            for aside in self.states.begin(self.step):
                self.console.print(f"set aside {aside}: it is later than what this run goes on from", soft_wrap=True)
            with self.requests.from_signals(), closing(self.task):
                try:
                    metrics = self._loop()
                except ConfigError:
                    self.states.wait()  # so that the newest state, from which one can go on, is whole
                    raise
        self.console.print(f"written to {self.folder}")
        if rank() == 0 and metrics:
            self.task.show(metrics)
        return metrics

    def _loop(self) -> dict[str, Any]:
        config, loader, metrics = self.config, self.task.train_loader, {}
        profile_folder = self.folder / "profile" if config.profile and rank() == 0 else None
        with (
            profiled(profile_folder, self.device, self.console) as count_step,
            progress_bar(self.console, self.step, config.steps) as show,
        ):
            self.model.train()
            if self.step and self.evaluator.is_due(self.step):  # the run was stopped before it
                metrics = self.evaluator.evaluate(self.step)
                self._save(loader.state_dict())
            if self.step >= config.steps:
                self.console.print(f"all of steps={config.steps} have been taken: set more to go on")

            batches = agreed_batches(self.task, config.micro_batch_size, self.bad_items, self.requests, self.states)
            window = Window()
            position = loader.state_dict()  # in the data; a state of step n goes on from the position after step n
            while self.step < config.steps:
                with window.waiting():
                    taken = list(islice(batches, config.accumulate))
                if len(taken) < config.accumulate:  # the run was asked to stop while there was nothing to learn from
                    self._leave(position)
                row, skip = self.learner.learn(taken, self.step)
                self.skipped.add(self.step, row, skip, [name for batch in taken for name in batch.rows["ids"]])
                window.add(row, sum(batch.clips for batch in taken))
                self.step += 1
                position = loader.state_dict()
                count_step()

                last = self.step == config.steps
                if self.step % config.log_every == 0 or last:
                    figures = self._log(window)
                    show(self.step, f"{self.task.line(figures)}  {figures['clips_per_second']:.0f} clips/s")
                    window = Window()
                if self.requests.stop:
                    self._leave(position)
                if self.evaluator.is_due(self.step):
                    self.skipped.read()
                    try:
                        metrics = self.evaluator.evaluate(self.step)
                    except Diverged:
                        raise
                    except ConfigError:  # the held-out clips are at fault, not what was learned
                        self._save(position)
                        raise
                    window.restart()
                if self.requests.save or self.step % config.save_every == 0 or last:
                    self._save(position)
        self.states.wait()
        return metrics

    def _log(self, window: Window) -> dict[str, float]:
        """A row of the history: means over the steps of the window, and what these took."""
        speed = window.speed()
        row = window.means() | {"lr": self.learner.learning_rate} | speed | scales_and_biases(self.model.logits)
        row |= machine_use(self.device, self.learner.clip_flops, speed["clips_per_second"])
        return self.log.add(self.step, row)

    def _save(self, position: dict[str, Any]) -> None:
        """Write, in the background, the state to go on from."""
        self.skipped.read()
        progress = {
            "step": self.step,
            "data": position,
            "evaluations": self.evaluator.rows,
            "items": self.bad_items.state_dict(),
            "tokenizer": self.tokenizer,
            "clip_flops": self.learner.clip_flops,
            "settings": self.settings,
        }
        self.states.save(self.step, self.model, self.learner.optimizer, self.learner.average, progress)
        self.requests.note_save()

    def _leave(self, position: dict[str, Any]) -> None:
        """Save the state, and end the run as it was asked to."""
        self._save(position)
        self.states.wait()
        if self.requests.stop == signal.SIGINT:  # someone is there who may want to look at the model
            self.evaluator.export_checkpoint()
        raise Stopped(self.requests.stop, self.folder)


def _check(config: RunConfig, device: torch.device, task_class: type[Task]) -> None:
    """Refuse settings that fit neither the device nor the task, before anything is built."""
    if config.parallel.shard_bf16 and not computes_in_bf16(config.precision, device):
        raise ConfigError("parallel.shard_bf16 gathers weights in bfloat16 and needs precision=bf16 to use them")
    if config.best is not None and config.best not in task_class.figures:
        hint = nearest(config.best, task_class.figures)
        raise ConfigError(f"best={config.best} is no figure of the evaluation{hint}")
