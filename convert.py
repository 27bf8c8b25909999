"""Convert a checkpoint: `python convert.py source=DIR target=DIR [to=native|hf]`.

The source's format is recognized by its contents. `source` may also be a name on the Hugging Face hub, such as
facebook/pe-av-large.
"""

from pathlib import Path

from pe_av.config import ConvertConfig
from pe_av.config.compose import run_command


def run(config: ConvertConfig, _: Path) -> None:
    from pe_av.conversion.write_checkpoint import convert

    convert(config.source, config.target, config.to)


if __name__ == "__main__":
    run_command(ConvertConfig, "convert", run)
