"""Train PE-AV: `python train.py [key=value …]`; the settings and what they mean stand in pe_av/config.py."""

import os
import sys
from pathlib import Path

from pe_av.config import TrainConfig
from pe_av.config_files import run_command


def run(config: TrainConfig, folder: Path) -> None:
    # after the arguments have been checked, since these import torch
    from pe_av.device import pick_device
    from pe_av.training.loop import Run, Stopped
    from pe_av.training.parallel import process_group

    try:
        with process_group(pick_device(config.device), config.parallel.timeout_minutes) as device:
            Run(config, folder, device).train()
    except ConnectionError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # threads that wait for the lost rank would hold up the end
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    run_command(TrainConfig, "train", run)
