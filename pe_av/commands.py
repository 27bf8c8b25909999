"""The console command of an installed package, `pe-av train|eval|convert|embed|search …`. The scripts train.py, eval.py
and convert.py of a checkout are its first three."""

import sys
from functools import partial
from pathlib import Path
from runpy import run_module

from pe_av.config import ConvertConfig, EvalConfig, TrainConfig, nearest
from pe_av.config.compose import run_command


def main() -> None:
    """`pe-av COMMAND …`"""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: pe-av COMMAND …", *(f"  {name:8} {what}" for name, (_, what) in COMMANDS.items()), sep="\n")
        print("`pe-av COMMAND --help` explains a command.")
        return
    if name not in COMMANDS:
        sys.exit(f"error: pe-av has no command {name}{nearest(name, COMMANDS)}")
    sys.argv[:2] = [f"pe-av {name}"]
    COMMANDS[name][0]()


def train() -> None:
    run_command(TrainConfig, "train", _train)


def evaluate() -> None:
    run_command(EvalConfig, "eval", _evaluate)


def convert() -> None:
    run_command(ConvertConfig, "convert", _convert)


# What the commands need is imported only after the arguments have been checked, since it takes seconds.


def _train(config: TrainConfig, folder: Path) -> None:
    from pe_av.training.contrastive import Contrastive
    from pe_av.training.trainer import train

    train(config, folder, Contrastive)


def _evaluate(config: EvalConfig, folder: Path) -> None:
    if isinstance(config.checkpoint, list):
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        from pe_av.evaluation.paired import evaluate_checkpoints

        hydra = HydraConfig.get()  # data=[x,y] is a sweep, whose jobs come one after the other
        number = hydra.job.num if hydra.mode == RunMode.MULTIRUN else 0
        evaluate_checkpoints(config, folder, before=[folder.parent / str(i) for i in range(number)])
    else:
        from pe_av.evaluation.retrieval import evaluate_checkpoint

        evaluate_checkpoint(config, folder)


def _convert(config: ConvertConfig, _: Path) -> None:
    from pe_av.conversion.write_checkpoint import convert

    convert(config.source, config.target, config.to)


_run = partial(run_module, run_name="__main__", alter_sys=True)  # as `python -m` does

# name -> what runs it with the arguments in sys.argv, and what it does
COMMANDS = {
    "train": (train, "train a model"),
    "eval": (evaluate, "zero-shot retrieval with a checkpoint"),
    "convert": (convert, "convert a published checkpoint to our format, or ours to theirs"),
    "embed": (partial(_run, "pe_av.embed"), "embed a corpus into a folder"),
    "search": (partial(_run, "pe_av.search"), "search such a folder"),
}


if __name__ == "__main__":
    main()
