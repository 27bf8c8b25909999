"""Zero-shot retrieval with a checkpoint: `python eval.py checkpoint=DIR data=NAME`."""

from pathlib import Path

from pe_av.config import EvalConfig
from pe_av.config.compose import run_command


def run(config: EvalConfig, folder: Path) -> None:
    from pe_av.evaluation.retrieval import evaluate_checkpoint

    evaluate_checkpoint(config, folder)


if __name__ == "__main__":
    run_command(EvalConfig, "eval", run)
