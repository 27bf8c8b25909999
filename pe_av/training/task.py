"""What the trainer needs to know about what it trains. `contrastive.py` and `frame.py` are the two tasks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from pe_av.media.processor import Processor


@dataclass
class Evaluation:
    """The result of an evaluation; the same on every rank."""

    metrics: dict[str, Any]  # written to metrics.json
    figures: dict[str, float]  # by name: logged, and what the best model is chosen by
    line: str  # the same in short, for people
    read: int  # items that were read
    bad: list[dict[str, Any]]  # {"id", "error"} of the damaged ones among them
    partial: list[dict[str, Any]]  # {"id", "error"} of those that lack something
    cut: list[dict[str, Any]]  # {"id", "error", …} of those that were longer than data.max_seconds


class Task(Protocol):
    """A model, its data and its loss.

    A task is made from the config, the device, a console and, when a run is resumed, the tokenizer of that run as a
    string. Its batches have at least "ids", "read", "bad", "partial" and "cut" (`loading.batch.Collate`).

    A pass is what one tower computes for one kind of input, e.g. "audio:input_values" or "text@visual". Every pass that
    a micro-batch needs on one rank must be made on all ranks, because FSDP gathers weights in it and DDP averages
    gradients after it.
    """

    model: nn.Module  # on the device, with its frozen parameters frozen and its adapters in place
    embedder: nn.Module  # micro-batch -> name -> (rows, …) embeddings; calls the model
    processor: Processor
    train_loader: Any  # iterating gives the rest of an epoch; has `state_dict` and `load_state_dict`
    items: int  # number of items to train and evaluate on; for a stream, more than will ever be read
    figures: list[str]  # the names of an evaluation's figures
    falling: list[str]  # the figures of which a lower value is better

    def start(self, embedder: nn.Module) -> dict[str, float]:
        """Called once, before the first step of a new run, with the embedder that `parallelize` returned.

        Returns:
            the figures of the evaluation before training, if the task makes one.
        """

    def split(self, batch: dict[str, Any], size: int | None) -> list[dict[str, Any]]:
        """The micro-batches of a batch, each of at most `size` rows; an empty batch has none."""

    def passes_of(self, micro_batch: dict[str, Any]) -> list[str]:
        """The names of the passes that a micro-batch needs."""

    def with_passes(self, micro_batch: dict[str, Any] | None, passes: list[str]) -> dict[str, Any]:
        """The micro-batch (None: one without rows) changed so that the embedder makes exactly these passes for it."""

    def count(self, batch: dict[str, Any]) -> dict[str, int]:
        """How much of this rank's batch each objective can use, by the objective's name."""

    def needed(self, counts: dict[str, int], passes: list[str]) -> list[str]:
        """Those of `passes` that some objective needs which can be trained, given the counts of all ranks; or []."""

    def loss(
        self, embeds: dict[str, Tensor], batch: dict[str, Any], counts: dict[str, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss over all ranks, scaled as `loss.contrastive_loss` says, and the values to log, "loss" among them."""

    def evaluate(self, embedder: nn.Module, folder: Path, step: int, history: list[dict[str, Any]]) -> Evaluation:
        """Called on every rank; rank 0 draws figures into `folder`. `history`: {"step", figure: value, …} so far."""

    def line(self, row: dict[str, float]) -> str:
        """A row of the training history in short, for people."""

    def show(self, metrics: dict[str, Any]) -> None:
        """Print the metrics of the last evaluation on standard output."""

    def close(self) -> None:
        """End the workers of the loaders."""
