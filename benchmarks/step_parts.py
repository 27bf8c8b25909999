"""Where the time of a training step goes: `python -m benchmarks step_parts [--preset tiny] [setting=value …]`

Takes steps of `python train.py` on the demo world, which is rendered on first use, on a CPU. Clips per second and the
wait for data are measured over `--steps` steps; then three more are profiled, and their time is divided among the
parts. The demo keeps the codec's output in memory, so the codec has no part unless data.in_memory=false is given.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.peer import chip, save
from pe_av.config import TrainConfig
from pe_av.config.compose import config_dir, from_dict
from pe_av.training.agreement import agreed_batches
from pe_av.training.contrastive import Contrastive
from pe_av.training.trainer import Trainer

CPU = torch.device("cpu")
PROFILED = 3  # steps


@contextmanager
def named_parts(model: nn.Module, task: object) -> Iterator[None]:
    """Inside, the profiler sees the forwards of the model's parts, and the loss, under their names."""
    parts = {"codec": model.audio.codec, "frames": model.video.vision, "text": model.text, "heads": model.heads}
    parts |= {f"transformer of {n}": getattr(model, n).transformer for n in ("audio", "video", "fusion")}
    with ExitStack() as stack:
        for name, part in parts.items():
            for module in part.values() if isinstance(part, nn.ModuleDict) else [part]:
                ranges: list[record_function] = []

                def enter(*_: object, name: str = name, ranges: list = ranges) -> None:
                    ranges.append(record_function(f"part: {name}"))
                    ranges[-1].__enter__()

                def leave(*_: object, ranges: list = ranges) -> None:
                    ranges.pop().__exit__(None, None, None)

                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave).remove)
        loss = task.loss

        def named_loss(*arguments: object) -> object:
            with record_function("part: loss"):
                return loss(*arguments)

        task.loss = named_loss
        stack.callback(setattr, task, "loss", loss)
        yield


def seconds_of_parts(trace: profile) -> dict[str, float]:
    """Seconds of the forward and the backward of every part. An operation of the backward pass belongs to the part in
    whose range the operation of the forward pass with the same sequence number was."""
    events = trace.events()
    ranges = [event for event in events if event.name.startswith("part: ")]
    seconds: dict[str, float] = defaultdict(float)
    owner: dict[int, str] = {}
    for part in ranges:
        name, span = part.name.removeprefix("part: "), part.time_range
        seconds[name] += span.elapsed_us() / 1e6
        for event in events:
            inside = span.start <= event.time_range.start and event.time_range.end <= span.end
            if inside and event.sequence_nr >= 0 and not event.name.startswith("autograd::"):
                owner.setdefault(event.sequence_nr, name)
    for event in events:
        if event.name.startswith("autograd::engine::evaluate_function: ") and "AccumulateGrad" not in event.name:
            name = owner.get(event.sequence_nr, "the rest of the backward pass")
            seconds[f"{name}, backward" if event.sequence_nr in owner else name] += event.time_range.elapsed_us() / 1e6
        elif event.name.startswith("Optimizer.step"):
            seconds["optimizer"] += event.time_range.elapsed_us() / 1e6
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, default=20, help="that are timed without the profiler")
    parser.add_argument("overrides", nargs="*", help="settings of train.py, such as data.in_memory=false")
    options = parser.parse_args()
    overrides = [f"model={options.preset}", f"device={CPU}", *options.overrides]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        ConfigStore.instance().store(name="train_schema", node=TrainConfig)
        composed = compose("train", overrides=overrides)
    config = from_dict(TrainConfig, OmegaConf.to_container(composed), source="config")

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder), CPU, Contrastive)
        task, learner = trainer.task, trainer.learner
        trainer.model.train()
        batches = agreed_batches(task, config.micro_batch_size, trainer.bad_items, trainer.requests, trainer.states)
        learner.learn([next(batches)], 0)  # counts operations, and loads what is loaded once

        started, waited = time.perf_counter(), 0.0  # without the profiler, which slows small operations down
        for step in range(1, 1 + options.steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            learner.learn([batch], step)
        whole = time.perf_counter() - started
        profiled = list(islice(batches, PROFILED))
        with named_parts(trainer.model, task), profile(activities=[ProfilerActivity.CPU]) as trace:
            began = time.perf_counter()
            for step, batch in enumerate(profiled, 1 + options.steps):
                learner.learn([batch], step)
            traced = time.perf_counter() - began
        task.close()
    found = seconds_of_parts(trace)
    found["everything else"] = traced - sum(found.values())
    rows = [{"part": name, "share": seconds / traced * (1 - waited / whole)} for name, seconds in found.items()]
    rows.append({"part": "waiting for data", "share": waited / whole})
    rows.sort(key=lambda row: -row["share"])

    speed = options.steps * config.batch_size / whole
    title = f"{options.preset} on the demo, {chip(CPU)}: {speed:.1f} clips/s, batches of {config.batch_size}"
    table = Table("part", "share of the time", title=title)
    for row in rows:
        table.add_row(row["part"], f"{row['share']:.1%}")
    Console().print(table)
    setting = {"preset": options.preset, "overrides": options.overrides}
    save("step_parts", [{"clips_per_second": speed, "batch_size": config.batch_size}, *rows], setting, CPU)


if __name__ == "__main__":
    main()
