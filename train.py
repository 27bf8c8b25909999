"""Train PE-AV: `python train.py [key=value …]`. The settings are explained in pe_av/config/run.py."""

from pathlib import Path

from pe_av.config import TrainConfig
from pe_av.config.compose import run_command


def run(config: TrainConfig, folder: Path) -> None:
    # imported only after the arguments have been checked, since these import torch, which takes seconds
    from pe_av.training.contrastive import Contrastive
    from pe_av.training.trainer import train

    train(config, folder, Contrastive)


if __name__ == "__main__":
    run_command(TrainConfig, "train", run)
