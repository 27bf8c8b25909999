"""Zero-shot retrieval with a checkpoint: `python eval.py checkpoint=DIR data=NAME`."""

import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from pe_av.config import EvalConfig, check_overrides, from_dict, stop_on_error

ConfigStore.instance().store(name="eval_schema", node=EvalConfig)


@hydra.main(config_path="configs", config_name="eval", version_base="1.3")
def main(composed: DictConfig) -> None:
    from pe_av.evaluation.retrieval import evaluate_checkpoint  # after the arguments have been checked: imports torch

    try:
        config = from_dict(EvalConfig, OmegaConf.to_container(composed), source="config")
        evaluate_checkpoint(config, Path(HydraConfig.get().runtime.output_dir))
    except (ValueError, OSError) as error:
        stop_on_error(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    try:
        check_overrides(EvalConfig, sys.argv[1:])
    except ValueError as error:
        stop_on_error(error)
    main()
