"""Single towers of a new model from weights that were trained elsewhere, for training PE-AV from scratch.

    text     ModernBERT, a transformers folder or safetensors file
    vision   PE-Core, timm's safetensors or the original's .pt
    codec    DAC, a transformers folder or safetensors file; weight normalization is folded

What fits by name and shape is taken; the report says what that was, what stayed random, and what was of no use.
"""

import re
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pe_av.checkpoint import WEIGHTS_FILE, CheckpointError, open_weights
from pe_av.config import InitConfig
from pe_av.conversion.names import CODEC, MODERNBERT, PE_CORE, TIMM, Rules, Stored, renamed, same, stored_by_pe_core
from pe_av.model.pe_audio_video import PEAudioVideo

OUTSIDE = "../"  # begins the names of what a larger model has beside the part


def warm_start(model: PEAudioVideo, config: InitConfig) -> list[str]:
    """Fill towers of `model` as `config` says.

    Returns:
        one line for each, to be shown.
    Raises:
        CheckpointError: a file that cannot be read, or of which nothing fits; a tower that the model does not have.
    """
    lines = []
    for key, tower in (("text", model.text), ("vision", model.video), ("codec", model.audio)):
        if tower is None and getattr(config, key) is not None:
            needed = {"vision": "video", "codec": "audio"}.get(key, key)
            raise CheckpointError(f"init.{key}: the model has no {needed} tower: leave it out, or add a head of it")
    if config.text is not None:
        weights = _stripped(_read(Path(config.text)), "model.")
        lines.append(_take("text", model.text, config.text, weights, MODERNBERT))
    if config.vision is not None:
        weights = _stripped(_read(Path(config.vision)), "visual.")
        rules = TIMM if any(name.startswith("blocks.") for name in weights) else PE_CORE
        lines.append(_take("vision", model.video.vision, config.vision, weights, rules))
    if config.codec is not None:
        weights = fold_weight_norm(_stripped(_read(Path(config.codec)), "encoder."))
        lines.append(_take("codec", model.audio.codec, config.codec, weights, CODEC))
    return lines


def fold_weight_norm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every g · v / ‖v‖ in its two spellings as the plain weight that it stands for; the rest unchanged."""
    folded = dict(weights)
    for name in weights:
        match = re.fullmatch(r"(.+)\.(weight_g|parametrizations\.weight\.original0)", name)
        if match is None:
            continue
        other = "weight_v" if match[2] == "weight_g" else "parametrizations.weight.original1"
        if f"{match[1]}.{other}" not in weights:
            raise CheckpointError(f"{name} has no {other} beside it, so the weight cannot be folded")
        gain, direction = folded.pop(name), folded.pop(f"{match[1]}.{other}")
        norm = direction.flatten(1).norm(dim=1).reshape(gain.shape)  # per output channel
        folded[f"{match[1]}.weight"] = direction * (gain / norm)
    return folded


def _take(key: str, part: nn.Module, path: str, weights: dict[str, Tensor], rules: Rules) -> str:
    taken, misshapen, absent = {}, [], []
    used = set()
    for name, tensor in part.state_dict().items():
        theirs, shape = renamed(name, [("", "", rules)]), tuple(tensor.shape)
        entry = stored_by_pe_core(name, theirs, shape) if rules is PE_CORE else Stored(theirs, shape, same)
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
    part.load_state_dict(taken, strict=False)  # into the model's own dtype and device
    unused = Counter(name.removeprefix(OUTSIDE).split(".")[0] for name in weights if name not in used)
    line = f"init.{key}: took {len(taken)} of {len(taken) + len(misshapen) + len(absent)} tensors from {path}"
    if misshapen:
        line += f"; of another shape and so random: {_some(misshapen)}"
    if absent:
        line += f"; not there and so random: {_some(absent)}"
    if unused:
        line += f"; left in the file: {', '.join(f'{count} of {name}' for name, count in unused.most_common())}"
    return line


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        path = path / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a folder with {WEIGHTS_FILE}, or the file itself")
    if path.suffix == ".safetensors":
        with open_weights(path):  # which refuses a damaged one
            return load_file(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise whatever they come to when they are read as a pickle
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: neither safetensors nor a pickle of nothing but weights ({reason})") from None
    weights = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    weights = weights if isinstance(weights, dict) else {}
    weights = {name: value for name, value in weights.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not weights:
        raise CheckpointError(f"{path}: holds no weights by name")
    return weights


def _stripped(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights without the prefix that the part has inside a larger model. What stands outside of the part is put
    aside: a CLIP's text tower has the names that its `visual.` has within."""
    if not any(name.startswith(prefix) for name in weights):
        return weights
    return {
        name.removeprefix(prefix) if name.startswith(prefix) else OUTSIDE + name: tensor
        for name, tensor in weights.items()
    }


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
