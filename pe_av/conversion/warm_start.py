"""Warm start: initialize single towers of a new model with weights that were trained elsewhere.

    init.text     ModernBERT: a transformers folder or safetensors file
    init.vision   PE-Core: timm's safetensors or the original's .pt
    init.codec    DAC: a transformers folder or safetensors file; weight normalization is folded

Weights that fit by name and shape are taken. The report says which were taken, which of ours stayed random, and which
of theirs were not used.
"""

import re
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pe_av.checkpoint import WEIGHTS_FILE, CheckpointError, open_weights
from pe_av.config import InitConfig
from pe_av.conversion.weight_names import (
    CODEC,
    MODERNBERT,
    PE_CORE,
    TIMM,
    Rows,
    StoredWeight,
    rename,
    stored_by_pe_core,
)
from pe_av.model.pe_audio_video import PEAudioVideo

OUTSIDE = "../"  # put before the names of weights that a larger model has beside the part we want


def warm_start(model: PEAudioVideo, config: InitConfig) -> list[str]:
    """Fill the parts of `model` that `config` names files for.

    Returns:
        one line of report for each part.
    Raises:
        CheckpointError: a file that cannot be read or in which nothing fits, or a tower that the model does not have.
    """
    lines = []
    prefixes = {("text", "text"): "model.", ("vision", "video"): "visual.", ("codec", "audio"): "encoder."}
    for (key, tower_name), prefix in prefixes.items():
        path, tower = getattr(config, key), getattr(model, tower_name)
        if path is None:
            continue
        if tower is None:
            raise CheckpointError(
                f"init.{key}: the model has no {tower_name} tower: leave the setting out, or add a head that needs it"
            )
        weights = _strip(_read(Path(path)), prefix)
        if key == "text":
            part, rows = tower, MODERNBERT
        elif key == "vision":
            part, rows = tower.vision, TIMM if any(name.startswith("blocks.") for name in weights) else PE_CORE
        else:
            part, rows, weights = tower.codec, CODEC, fold_weight_norm(weights)
        lines.append(_take(key, part, path, weights, rows))
    return lines


def fold_weight_norm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace weight normalization, in either of torch's two spellings, by the plain weight g · v / ‖v‖."""
    folded = dict(weights)
    for name in weights:
        match = re.fullmatch(r"(.+)\.(weight_g|parametrizations\.weight\.original0)", name)
        if match is None:
            continue
        other = "weight_v" if match[2] == "weight_g" else "parametrizations.weight.original1"
        if f"{match[1]}.{other}" not in weights:
            raise CheckpointError(f"{name} has no {other} beside it, so its weight normalization cannot be folded")
        gain, direction = folded.pop(name), folded.pop(f"{match[1]}.{other}")
        norm = direction.flatten(1).norm(dim=1).reshape(gain.shape)  # per output channel
        folded[f"{match[1]}.weight"] = direction * (gain / norm)
    return folded


def _take(key: str, part: nn.Module, path: str, weights: dict[str, Tensor], rows: Rows) -> str:
    """Load into `part` the weights that fit; `rows` maps its names to theirs. Returns the line of report."""
    taken, misshapen, absent, used = {}, [], [], set()
    for name, tensor in part.state_dict().items():
        theirs, shape = rename(name, rows), tuple(tensor.shape)
        entry = stored_by_pe_core(name, theirs, shape) if rows is PE_CORE else StoredWeight(theirs, shape)
        if theirs not in weights:
            absent.append(name)
        elif tuple(weights[theirs].shape) != entry.shape:
            misshapen.append(f"{name} ({theirs} is {tuple(weights[theirs].shape)}, not {entry.shape})")
            used.add(theirs)
        else:
            taken[name] = entry.take(weights[theirs])
            used.add(theirs)
    if not taken:
        reason = f"{misshapen[0]} does not fit" if misshapen else f"it has names like {', '.join(sorted(weights)[:3])}"
        raise CheckpointError(f"init.{key}={path}: nothing in it is a weight of this model's {key}: {reason}")
    broken = [name for name in used if not weights[name].isfinite().all()]
    if broken:
        raise CheckpointError(f"init.{key}={path}: NaN or Inf in {_some(sorted(broken))}")
    part.load_state_dict(taken, strict=False)  # copied into the model's dtype and device
    unused = Counter(name.removeprefix(OUTSIDE).split(".")[0] for name in weights if name not in used)
    line = f"init.{key}: took {len(taken)} of {len(taken) + len(misshapen) + len(absent)} tensors from {path}"
    if misshapen:
        line += f"; still random, because the shape differs: {_some(misshapen)}"
    if absent:
        line += f"; still random, because not in the file: {_some(absent)}"
    if unused:
        line += f"; not used: {', '.join(f'{count} of {name}' for name, count in unused.most_common())}"
    return line


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        path = path / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a folder with {WEIGHTS_FILE}, or the file itself")
    if path.suffix == ".safetensors":
        with open_weights(path):  # raises if the file is damaged
            return load_file(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes can raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: neither safetensors nor a pickle of weights only ({reason})") from None
    weights = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    weights = weights if isinstance(weights, dict) else {}
    weights = {name: value for name, value in weights.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not weights:
        raise CheckpointError(f"{path}: contains no weights by name")
    return weights


def _strip(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove the prefix that the part has inside a larger model, and mark all other weights with OUTSIDE, because a
    CLIP's text tower uses the same names as its `visual.` part does."""
    if not any(name.startswith(prefix) for name in weights):
        return weights
    return {
        name.removeprefix(prefix) if name.startswith(prefix) else OUTSIDE + name: tensor
        for name, tensor in weights.items()
    }


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
