"""Convert a checkpoint of any known format to ours or to one that transformers loads: `python convert.py`."""

import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from torch import Tensor

from pe_av.checkpoint import CONFIG_FILE, WEIGHTS_FILE, CheckpointError, build_model, save_tensors
from pe_av.config import ModelConfig, PEAudioFrameConfig
from pe_av.config.compose import model_config_yaml
from pe_av.conversion.read_checkpoint import TOKENIZER_FILE, VISION_BIAS, Source, open_source
from pe_av.conversion.weight_names import transformers_format
from pe_av.conversion.write_config import hf_files, hf_model_config


def convert(source: str | Path, target: str | Path, to: str = "native") -> Source:
    """Write the checkpoint `source` as the new folder `target`, which appears only when it is complete.

    Weights are streamed from file to file, so the memory needed is about that of the largest tensor.

    Args:
        source: a folder, or a name on the Hugging Face hub, optionally with "@revision".
        to: "native", or "hf" for a folder that transformers' `from_pretrained` loads.
    Returns:
        the source, for its config and its notes.
    Raises:
        CheckpointError: unreadable, missing, unknown, misshapen or NaN weights, a target that exists, no space.
        ConfigError: a config that cannot be understood, or a model that transformers cannot hold.
    """
    target, console = Path(target), Console(stderr=True)
    if to not in ("native", "hf"):
        raise CheckpointError(f"to={to} is unknown: native or hf")
    if target.exists():
        raise CheckpointError(f"{target} exists: move it away, or choose another target")
    with open_source(source) as opened:
        config = hf_model_config(opened.config) if to == "hf" else opened.config
        _check_finite(opened.weights, console)
        if to == "hf":
            weights = _hf_weights(config, opened.weights)
            dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in weights.values())
            files = hf_files(config, opened.tokenizer, dtype=dtypes.most_common(1)[0][0])
        else:
            weights, files = opened.weights, {CONFIG_FILE: model_config_yaml(config)}
        size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        with _new_folder(target, size) as unfinished, console.status(f"writing {size / 1e9:.1f} GB"):
            for name, content in files.items():
                (unfinished / name).write_text(content, encoding="utf-8")
            if opened.tokenizer is not None:
                opened.tokenizer.save(str(unfinished / TOKENIZER_FILE))
            save_tensors(weights, unfinished / WEIGHTS_FILE, {"format": "pt"})
    console.print(f"read: {opened.format}", soft_wrap=True)
    count = sum(tensor.numel() for tensor in weights.values())
    console.print(f"written: {count:,} parameters in {len(weights)} tensors", soft_wrap=True)
    for note in opened.notes:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"written to {target}", soft_wrap=True)
    return opened


def _check_finite(weights: dict[str, Tensor], console: Console) -> None:
    bad = [
        name
        for name, tensor in track(weights.items(), "checking", console=console, transient=True)
        if not tensor.isfinite().all()
    ]
    if bad:
        listed = ", ".join(bad[:5]) + (", …" if len(bad) > 5 else "")
        raise CheckpointError(f"NaN or Inf in {len(bad)} weights, so nothing was written: {listed}")


def _hf_weights(config: ModelConfig | PEAudioFrameConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model of this config under transformers' names and in its shapes."""
    target, theirs = transformers_format(config), {}
    for name in build_model(config, "meta").state_dict():
        entry = target.stored(name, tuple(weights[name].shape))
        theirs[entry.name] = weights[name].reshape(entry.shape)
    if isinstance(config, ModelConfig) and "video" in config.towers and VISION_BIAS not in weights:
        width = (config.video.vision.output_dim,)
        theirs[target.stored(VISION_BIAS, width).name] = weights["video.vision.proj.weight"].new_zeros(width)
    return theirs


@contextmanager
def _new_folder(target: Path, size: int) -> Iterator[Path]:
    """A temporary folder to write `size` bytes into; becomes `target` at the end, or is removed after an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise CheckpointError(f"{target}: {size / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free: make room")
    unfinished = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.rename(target)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise CheckpointError(f"{target}: could not be written ({error}); nothing was left behind") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
