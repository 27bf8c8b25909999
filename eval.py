"""Zero-shot retrieval with a checkpoint: `python eval.py checkpoint=DIR data=NAME [key=value …]`. The settings are
explained in pe_av/config/run.py. checkpoint=[A,B] compares checkpoints, and data=[x,y] goes through data sets."""

from pathlib import Path

from pe_av.config import EvalConfig
from pe_av.config.compose import run_command


def run(config: EvalConfig, folder: Path) -> None:
    # imported only after the arguments have been checked, since this imports torch, which takes seconds
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


if __name__ == "__main__":
    run_command(EvalConfig, "eval", run)
