"""Models from a preset, from a native checkpoint, and back: a folder of `config.yaml` and `model.safetensors`.

Nothing in the folder can run code: the config is checked against dataclasses, and no pickle is read.
"""

import os
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import ModelConfig, load_preset, read_yaml
from .model.peav import PEAudioVideo

CONFIG_FILE, WEIGHTS_FILE = "config.yaml", "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the remedy."""


def build_model(
    config: str | ModelConfig, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> PEAudioVideo:
    """A model with random weights, in eval mode.

    Args:
        config: the name of a file in `configs/model/`, e.g. "large", or a config.
        device: "meta" gives the shapes without the memory.
        dtype: of the weights; None: float32.
    """
    if isinstance(config, str):
        config = load_preset(config)
    with torch.device(device):
        model = PEAudioVideo(config)
    return model.to(dtype=dtype).eval()


def load_model(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> PEAudioVideo:
    """The model of a native checkpoint folder, in eval mode.

    Args:
        dtype: of the weights; None: as stored.
    Raises:
        CheckpointError: no such folder, unreadable weights, or weights that do not fit the config.
        ConfigError: the config has an unknown key or an impossible value.
    """
    path = Path(path)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: no {name} there, so this is no native checkpoint folder")
    config = read_yaml(ModelConfig, path / CONFIG_FILE)
    try:
        with safe_open(path / WEIGHTS_FILE, framework="pt", device=str(device)) as file:
            weights = {name: file.get_tensor(name).to(dtype=dtype) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path / WEIGHTS_FILE}: not a whole safetensors file ({error})") from error
    with torch.device("meta"):
        model = PEAudioVideo(config)
    _check_fit(model, weights, path)
    model.load_state_dict(weights, assign=True)  # which keeps what is frozen frozen
    return model.eval()


def save_model(model: PEAudioVideo, path: str | Path) -> None:
    """Write a native checkpoint folder, replacing the files of an older one each at once."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    # written beside and renamed, so that a crash never leaves half a file under the final name
    save_file(weights, path / f"{WEIGHTS_FILE}.part", metadata={"format": "pt"})
    os.replace(path / f"{WEIGHTS_FILE}.part", path / WEIGHTS_FILE)
    text = yaml.safe_dump(asdict(model.config), sort_keys=False)
    (path / f"{CONFIG_FILE}.part").write_text(text, encoding="utf-8")
    os.replace(path / f"{CONFIG_FILE}.part", path / CONFIG_FILE)


def _check_fit(model: PEAudioVideo, weights: dict[str, torch.Tensor], path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [f"missing {name}" for name in expected.keys() - found.keys()]
    wrong += [f"unknown {name}" for name in found.keys() - expected.keys()]
    wrong += [
        f"{name} is {found[name]}, not {expected[name]}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if wrong:
        listed = ", ".join(sorted(wrong)[:5]) + (", …" if len(wrong) > 5 else "")
        raise CheckpointError(f"{path}: {len(wrong)} weights do not fit {CONFIG_FILE}: {listed}")
