"""Zero-shot retrieval with a checkpoint: `python eval.py checkpoint=DIR data=NAME [key=value …]`. The settings are
explained in pe_av/config/run.py."""

from pathlib import Path

from pe_av.config import EvalConfig
from pe_av.config.compose import run_command


def run(config: EvalConfig, folder: Path) -> None:
    # imported only after the arguments have been checked, since this imports torch, which takes seconds
    from pe_av.evaluation.retrieval import evaluate_checkpoint

    evaluate_checkpoint(config, folder)


if __name__ == "__main__":
    run_command(EvalConfig, "eval", run)
