"""Checkpoints in and out: `python convert.py source=DIR target=DIR [to=native|hf]`; the format is found by looking.

`source` may also be a name on the Hugging Face hub, such as facebook/pe-av-large.
"""

import sys

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from pe_av.config import ConvertConfig, check_overrides, from_dict, stop_on_error

ConfigStore.instance().store(name="convert_schema", node=ConvertConfig)


@hydra.main(config_path="configs", config_name="convert", version_base="1.3")
def main(composed: DictConfig) -> None:
    from pe_av.conversion.convert import convert  # after the arguments have been checked: imports torch

    try:
        config = from_dict(ConvertConfig, OmegaConf.to_container(composed), source="config")
        convert(config.source, config.target, config.to)
    except (ValueError, OSError) as error:
        stop_on_error(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    try:
        check_overrides(ConvertConfig, sys.argv[1:])
    except ValueError as error:
        stop_on_error(error)
    main()
