"""Evaluations during a run: when they are due, what they write, and the models that are exported with them."""

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from pe_av.checkpoint import save_weights
from pe_av.config import ConfigError, RunConfig
from pe_av.evaluation.report import plot_losses, write_metrics
from pe_av.loading.bad_items import BadItems
from pe_av.ranks import rank
from pe_av.training.learner import Learner
from pe_av.training.log import Log
from pe_av.training.lora import merged_state_dict


class Diverged(ConfigError):
    """What was learned is of no use, so it must not become the state that a run resumes from."""


class Evaluator:
    """The evaluations of one run.

    Args:
        rows: {"step", figure: value, …} of the evaluations so far; new ones are appended.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        learner: Learner,
        bad_items: BadItems,
        log: Log,
        console: Console,
        rows: list[dict[str, Any]],
    ):
        self.config, self.folder, self.learner, self.task = config, folder, learner, learner.task
        self.bad_items, self.log, self.console, self.rows = bad_items, log, console, rows
        self.cut_line: str | None = None  # the last one that was printed

    def is_due(self, step: int) -> bool:
        """Whether the run must evaluate after so many steps, and has not done so yet."""
        due = step % self.config.eval_every == 0 or step >= self.config.steps
        return due and not any(row["step"] == step for row in self.rows)

    def evaluate(self, step: int) -> dict[str, Any]:
        """The task's evaluation, with the averaged weights if there are any.

        Exports the model to `checkpoint/`, and to `best/` if no evaluation before was better; writes `metrics.json` and
        `loss.png`.

        Returns:
            the metrics.
        Raises:
            Diverged: a figure is not finite.
            ConfigError: there is nothing to evaluate on, or too much of it is damaged.
        """
        learner = self.learner
        with learner.averaged():
            try:
                with learner.autocast:
                    evaluation = self.task.evaluate(learner.embedder, self.folder, step, self.rows)
                infinite = [name for name, value in evaluation.figures.items() if not math.isfinite(value)]
                if infinite:
                    raise ValueError(f"{', '.join(infinite)} not finite")
            except ConfigError:
                raise
            except ValueError as error:
                raise Diverged(
                    f"the evaluation at step {step} failed ({error}): if the model has diverged, go on from an "
                    f"earlier state (resume=… of {self.folder / 'state'}) with a lower optim.lr"
                ) from error
            self._export("checkpoint")
            is_best = self._is_best(evaluation.figures)
            if is_best:
                self._export("best")
        self.bad_items.add(evaluation.read, evaluation.bad, evaluation.partial, evaluation.cut)
        self.rows.append({"step": step, **evaluation.figures})
        if rank() == 0:
            listed = {f"{name}_items": len(reasons) for name, reasons in self.bad_items.reasons.items()}
            write_metrics(self.folder / "metrics.json", evaluation.metrics, step=step, **listed)
            if is_best:
                write_metrics(self.folder / "best" / "metrics.json", evaluation.metrics, step=step)
            plot_losses(self.log.rows, self.folder / "loss.png", self.rows)
        self.log.show(step, evaluation.figures)
        self.console.print(f"step {step}  {evaluation.line}", soft_wrap=True)
        line = self.bad_items.cut_line()
        if line != self.cut_line:
            self.console.print(line, soft_wrap=True)
            self.cut_line = line
        return evaluation.metrics

    def export_checkpoint(self) -> None:
        """The model as it would be evaluated now, without evaluating it."""
        with self.learner.averaged():
            self._export("checkpoint")

    def _is_best(self, figures: dict[str, float]) -> bool:
        name = self.config.best
        if name is None or name not in figures:
            return False
        sign = -1 if name in self.task.falling else 1
        return all(sign * figures[name] > sign * row[name] for row in self.rows if name in row)

    def _export(self, name: str) -> None:
        """The model, however it is sharded, as a native checkpoint with its tokenizer."""
        model = self.learner.model
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank() == 0:
            save_weights(model.config, merged_state_dict(model, whole), self.folder / name)
            self.task.processor.save_pretrained(self.folder / name)
