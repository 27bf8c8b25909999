"""Build models, load and save them. A checkpoint is a folder with `config.yaml` and `model.safetensors`.

Nothing in the folder can run code: the config is checked against dataclasses, and pickles are never read.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pe_av.config import ConfigError, ModelConfig, PEAudioFrameConfig
from pe_av.config.compose import load_preset, model_config_yaml, read_model_config
from pe_av.model.pe_audio_frame import PEAudioFrame
from pe_av.model.pe_audio_video import PEAudioVideo

CONFIG_FILE, WEIGHTS_FILE = "config.yaml", "model.safetensors"
ON_HUB = "hf:"  # stands before a name on the Hugging Face hub

Model = PEAudioVideo | PEAudioFrame


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the remedy."""


def build_model(
    config: str | ModelConfig | PEAudioFrameConfig, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Model:
    """A model with random weights, in eval mode.

    Args:
        config: the name of a file in `configs/model/`, e.g. "large", or a config, which decides the class.
        device: "meta" gives the shapes without allocating memory.
        dtype: of the weights; None: float32.
    """
    if isinstance(config, str):
        config = load_preset(config)
    without_values = _Uninitialized() if torch.device(device).type == "meta" else nullcontext()
    with torch.device(device), without_values:
        model = PEAudioVideo(config) if isinstance(config, ModelConfig) else PEAudioFrame(config)
    return model.to(dtype=dtype).eval()


class _Uninitialized(TorchFunctionMode):
    """Leaves out random weights, of which the meta device has no values: asking it for them imports PyTorch's compiler,
    which takes ten times as long as building the model."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "erfinv_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    towers: Sequence[str] | None = None,
) -> Model:
    """Load the model of a checkpoint folder in our own format, in eval mode.

    Args:
        path: the folder; or "hf:user/name", optionally with "@revision", for a checkpoint of any known format on the
            Hugging Face hub, which is downloaded and converted once (see `pe_av.hub`).
        dtype: of the weights; None: as stored.
        towers: which of "text", "audio", "video" and "fusion" to load, e.g. ("audio", "text"). The others are neither
            read nor built, and the model has the heads that the loaded towers allow. None: everything.
    Raises:
        CheckpointError: no such folder, unreadable weights, weights that do not fit the config, or no download.
        ConfigError: an unknown key or an impossible value in the config, or `towers` that the model does not have.
    """
    path = checkpoint_folder(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give that of a checkpoint, such as runs/<date>/checkpoint")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise CheckpointError(
                f"{path}: has no {name}, so it is not a checkpoint folder in our own format{_hint(path)}"
            )
    config = read_model_config(path / CONFIG_FILE)
    model = build_model(config, "meta")
    with open_weights(path / WEIGHTS_FILE, device) as file:
        _check_fit(model, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, path)  # noqa: SIM118
        if isinstance(towers, str):
            raise ConfigError(f'towers="{towers}" is a string: give a tuple, such as towers=("{towers}",)')
        if towers is not None:
            if isinstance(config, PEAudioFrameConfig):
                raise ConfigError("towers: PEAudioFrame always needs both of its towers; leave the argument out")
            model = build_model(config.keep(towers), "meta")
        # the file is memory-mapped, so weights that are not requested are never read from the disk
        weights = {name: file.get_tensor(name).to(dtype=dtype) for name in model.state_dict()}
    model.load_state_dict(weights, assign=True)  # keeps frozen parameters frozen
    return model.eval()


def checkpoint_folder(path: str | Path) -> Path:
    """`path`, or where the cache has the checkpoint "hf:user/name" of the Hugging Face hub."""
    if not str(path).startswith(ON_HUB):
        return Path(path)
    from pe_av.hub import cached  # which imports the converter

    return cached(path)


def save_model(model: Model, path: str | Path, push_to: str | None = None) -> None:
    """Write a checkpoint folder, or replace the files of an existing one, each atomically.

    Args:
        push_to: also upload the folder to this repository of the Hugging Face hub, "user/name", with a model card. If
            the folder is the `checkpoint/` or `best/` of a run and already has these weights, the card has the run's
            data, settings and metrics.
    Raises:
        CheckpointError: the weights cannot be written, or the folder cannot be uploaded.
    """
    if push_to is None:
        return save_weights(model.config, model.state_dict(), path)
    from pe_av.hub import publish

    publish(model, Path(path), push_to)


def save_weights(config: ModelConfig | PEAudioFrameConfig, weights: dict[str, Tensor], path: str | Path) -> None:
    """`save_model` for weights that are not in a model, such as those gathered from shards."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
    # write under another name and rename, so that a crash never leaves half a file under the final name
    try:
        save_tensors(weights, path / f"{WEIGHTS_FILE}.part", {"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(f"{path}: the weights could not be written ({error})") from error
    os.replace(path / f"{WEIGHTS_FILE}.part", path / WEIGHTS_FILE)
    (path / f"{CONFIG_FILE}.part").write_text(model_config_yaml(config), encoding="utf-8")
    os.replace(path / f"{CONFIG_FILE}.part", path / CONFIG_FILE)


def save_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """A safetensors file with the permissions that new files have; the library alone makes it readable for one user."""
    path = Path(path)
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


@contextmanager
def open_weights(path: Path, device: str | torch.device = "cpu"):
    """Open the safetensors file at `path`, memory-mapped.

    Raises:
        CheckpointError: the file is truncated, damaged or no safetensors file; a pickle is never read.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error})") from error


def _hint(path: Path) -> str:
    if (path / "checkpoint" / CONFIG_FILE).is_file():
        return f"; it is the folder of a run, whose model is in {path / 'checkpoint'}"
    if (path / "config.json").is_file():
        return "; it has the config.json of a published format: convert it with python convert.py source=… target=…"
    return ""


def _check_fit(model: Model, stored: dict[str, tuple[int, ...]], path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"missing {name}" for name in expected.keys() - stored.keys()]
    problems += [f"unknown {name}" for name in stored.keys() - expected.keys()]
    problems += [
        f"{name} is {stored[name]}, not {expected[name]}"
        for name in expected.keys() & stored.keys()
        if stored[name] != expected[name]
    ]
    if problems:
        listed = ", ".join(sorted(problems)[:5]) + (", …" if len(problems) > 5 else "")
        raise CheckpointError(f"{path}: {len(problems)} weights do not fit {CONFIG_FILE}: {listed}")
