"""Train PE-AV: `python train.py [key=value …]`; the settings and what they mean stand in pe_av/config.py."""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from pe_av.config import TrainConfig, check_overrides, from_dict, stop_on_error

ConfigStore.instance().store(name="train_schema", node=TrainConfig)


@hydra.main(config_path="configs", config_name="train", version_base="1.3")
def main(composed: DictConfig) -> None:
    # after the arguments have been checked, since these import torch
    from pe_av.device import pick_device
    from pe_av.training.loop import Run, Stopped
    from pe_av.training.parallel import process_group

    try:
        config = from_dict(TrainConfig, OmegaConf.to_container(composed), source="config")
        with process_group(pick_device(config.device), config.parallel.timeout_minutes) as device:
            Run(config, Path(HydraConfig.get().runtime.output_dir), device).train()
    except ConnectionError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # threads that wait for the lost rank would hold up the end
    except (ValueError, OSError) as error:
        stop_on_error(error)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    try:
        check_overrides(TrainConfig, sys.argv[1:])
    except ValueError as error:
        stop_on_error(error)
    main()
