"""One optimization step: batches in, embeddings, loss, gradients, AdamW and Muon. The page to read first."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from pe_av.config import RunConfig
from pe_av.device import precision_context
from pe_av.training.agreement import AgreedBatch
from pe_av.training.gradient_caching import backward
from pe_av.training.log import mean_of_each
from pe_av.training.optim import AveragedWeights, build_optimizer, set_learning_rate, take_step
from pe_av.training.parallel import clip_gradients
from pe_av.training.profile import count_flops
from pe_av.training.task import Task


class Learner:
    """What learns: the model, its optimizer, and the moving average of its weights if `optim.ema` asks for one."""

    def __init__(self, task: Task, embedder: nn.Module, config: RunConfig, device: torch.device):
        """
        Args:
            embedder: the task's, as `parallelize` returned it.
        """
        self.task, self.embedder, self.config, self.device = task, embedder, config, device
        self.model = task.model
        self.autocast = precision_context(config.precision, device)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(self.model, config.optim)
        self.average = None if config.optim.ema is None else AveragedWeights(self.model, config.optim.ema)
        self.clip_flops: float | None = None  # operations per clip, counted in the first step

    def learn(self, batches: Sequence[AgreedBatch], step: int) -> tuple[dict[str, Tensor], Tensor]:
        """Step number `step`, counted from 0, on the mean loss of the batches, each of which has its own negatives.

        If the loss or the gradient is not finite, the optimizer leaves the weights as they are.

        Returns:
            the values to log, and whether the weights were left as they are: tensors on the device, for which nobody
            has waited yet.
        """
        config = self.config
        set_learning_rate(self.optimizer, config.optim, step, config.steps)
        self.optimizer.zero_grad(set_to_none=True)

        logged = []
        with self._counting_flops(batches):
            for batch in batches:

                def loss_of(embeds: dict[str, Tensor], batch: AgreedBatch = batch) -> tuple[Tensor, dict[str, Tensor]]:
                    loss, values = self.task.loss(embeds, batch.rows, batch.counts)
                    return loss / len(batches), values

                with self.autocast:
                    last = batch is batches[-1]
                    logged.append(backward(self.embedder, batch.micro_batches, loss_of, self.device, last))
        row = mean_of_each(logged)
        row["gradient_norm"] = clip_gradients(self.trained, config.optim.clip_norm)

        skip = ~(row["loss"].isfinite() & row["gradient_norm"].isfinite())
        take_step(self.optimizer, skip)
        if self.average is not None:
            self.average.update(self.model, skip)
        return row, skip

    @property
    def learning_rate(self) -> float:
        """Of the last step, before the factors of `optim.lr_scale` and `optim.layer_decay`."""
        group = self.optimizer.param_groups[0]
        return group["lr"] / (group["scale"] or 1)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has its averaged weights, if there are any."""
        if self.average is None:
            yield
            return
        self.average.swap(self.model)
        try:
            yield
        finally:
            self.average.swap(self.model)

    @contextmanager
    def _counting_flops(self, batches: Sequence[AgreedBatch]) -> Iterator[None]:
        """In the first step of a run, count the operations per clip."""
        with count_flops(self.config.parallel.compile) if self.clip_flops is None else nullcontext() as counter:
            yield
        if counter is not None:
            self.clip_flops = counter.get_total_flops() / max(sum(len(batch.rows["ids"]) for batch in batches), 1)
