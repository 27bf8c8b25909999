"""Open a checkpoint of any known format: its config, and its weights under our names.

The format is recognized by the names of the weights. Every weight of our model must be in the checkpoint in the right
shape, and every weight of the checkpoint must be one of ours or known to be unnecessary; anything else is an error.
Weights stay memory-mapped, so opening a checkpoint needs little memory.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pe_av.checkpoint import CONFIG_FILE, WEIGHTS_FILE, CheckpointError, build_model, open_weights
from pe_av.config import ModelConfig, PEAudioFrameConfig
from pe_av.config.compose import read_model_config
from pe_av.conversion.read_config import read_published_config
from pe_av.conversion.weight_names import (
    FORMATS,
    NOT_NEEDED,
    OURS,
    PE_AUDIO_VIDEO,
    PE_AUDIO_VISUAL,
    TIED,
    TRANSFORMERS,
    Format,
)
from pe_av.hub import download
from pe_av.media.tokenizer import read_tokenizer

INDEX_FILE, TOKENIZER_FILE = f"{WEIGHTS_FILE}.index.json", "tokenizer.json"
VISION_BIAS = "video.vision.proj.bias"  # timm's frame encoder has it, the original's does not


@dataclass
class Source:
    """An open checkpoint."""

    config: ModelConfig | PEAudioFrameConfig
    format: Format
    weights: dict[str, Tensor]  # by our names; memory-mapped, except for the few that had to be transposed or cut
    tokenizer: Tokenizer | None
    notes: list[str] = field(default_factory=list)  # for the user


@contextmanager
def open_source(source: str | Path) -> Iterator[Source]:
    """The checkpoint in the folder `source` or of that name on the hub, valid while the context lasts.

    Raises:
        CheckpointError: unreadable, missing, unknown or misshapen weights, or a config of another class of model.
        ConfigError: a config that cannot be understood.
    """
    folder = find_folder(source)
    with ExitStack() as stack:
        files = _Weights(folder, stack)
        weights_format = next((f for f in FORMATS if any(name.startswith(f.signs) for name in files.names)), None)
        if weights_format is None:
            some = ", ".join(sorted(files.names)[:3])
            raise CheckpointError(
                f"{folder}: the weights are not those of a known PE-AV format; they begin with {some}"
            )
        if (folder / CONFIG_FILE).is_file():
            config, implementation = read_model_config(folder / CONFIG_FILE), OURS
        else:
            config, implementation = read_published_config(folder)
        if not weights_format.holds(config):
            frame = isinstance(config, PEAudioFrameConfig)
            described = "PEAudioFrame" if frame else f"a model with the heads {', '.join(config.heads)}"
            raise CheckpointError(
                f"{folder}: the weights have the names of {weights_format}, but the config describes {described}: "
                "take both from the same download"
            )
        tokenizer = read_tokenizer(folder) if (folder / TOKENIZER_FILE).is_file() else None
        opened = Source(config, weights_format, {}, tokenizer)
        if tokenizer is None:
            opened.notes.append(
                f"{folder} has no {TOKENIZER_FILE}: before using text, put that of the text model into the target"
            )
        if weights_format.implementation != implementation:
            opened.notes.append(
                f"the config is {implementation}, but the weights have the names of {weights_format}: they are of "
                "different branches or downloads. Each was read by its own format, and they fit; make sure that they "
                "belong together"
            )
        _fill(opened, files, folder)
        yield opened


def find_folder(source: str | Path) -> Path:
    """The folder `source`, downloaded first if it is a name on the Hugging Face hub, optionally with "@revision"."""
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists():
        raise CheckpointError(f"{source} is a file: give the folder that it lies in")
    return download(str(source))


class _Weights:
    """The tensors of a folder by name, from one safetensors file or several shards."""

    def __init__(self, folder: Path, stack: ExitStack):
        if (folder / WEIGHTS_FILE).is_file():
            paths = [folder / WEIGHTS_FILE]
        elif (folder / INDEX_FILE).is_file():
            paths = _indexed_files(folder)
        else:
            pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern)]
            why = f"; {pickles[0]} is a pickle, which can run code and is not read" if pickles else ""
            raise CheckpointError(f"{folder}: no {WEIGHTS_FILE} and no {INDEX_FILE}{why}")
        self._files: dict[str, Any] = {}
        for path in paths:
            file = stack.enter_context(open_weights(path))
            self._files |= dict.fromkeys(file.keys(), file)
        self.names = self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)


def _indexed_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: not an index of shards ({error})") from None
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{index}: not an index of shards (it does not name files)")
    for name in sorted(names):
        if Path(name).name != name:
            raise CheckpointError(f"{index}: {name} is outside the folder")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: the shard {name} is missing; download the folder again")
    return [folder / name for name in sorted(names)]


def _fill(source: Source, files: _Weights, folder: Path) -> None:
    """Put the weights into `source`, or raise with the list of all that do not fit."""
    stored_as = _without_copies(files, source.format, folder)
    _settle_vision_bias(source, files, stored_as)
    problems, used = [], set()
    for name, tensor in build_model(source.config, "meta").state_dict().items():
        shape = tuple(tensor.shape)
        entry = source.format.stored(name, shape)
        if entry is None:  # only scales and biases are missing in a format, the original's PEAudioVisual
            start = source.config.logit_scale_init if name.endswith(".scale") else source.config.logit_bias_init
            source.weights[name] = torch.full(shape, start)
            continue
        used.add(entry.name)
        if entry.name not in stored_as:
            problems.append(f"missing {entry.name}")
        elif files.shape(stored_as[entry.name]) != entry.shape:
            problems.append(f"{entry.name} is {files.shape(stored_as[entry.name])}, not {entry.shape}")
        else:
            theirs = files[stored_as[entry.name]]
            ours = entry.take(theirs)
            # a slice or a transposed tensor is copied; everything else stays memory-mapped
            whole = ours.is_contiguous() and ours.numel() == theirs.numel()
            source.weights[name] = ours if whole else ours.clone(memory_format=torch.contiguous_format)
    problems += [f"unknown {name}" for name in stored_as if name not in used and not NOT_NEEDED.search(name)]
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(
            f"{folder}: {len(problems)} weights do not fit the config, so nothing was written:\n  {listed}"
        )
    if source.format is PE_AUDIO_VISUAL and any(name.startswith("logits.") for name in source.weights):
        source.notes.append(
            "the original stores no logit scales and biases: they have their initial values, so use the dot products "
            "of the embeddings and not the probabilities"
        )


def _without_copies(files: _Weights, of: Format, folder: Path) -> dict[str, str]:
    """The name of each weight in the format -> the name of one copy of it in the files; copies must be equal."""
    stored_as: dict[str, str] = {}
    for name in sorted(files.names):
        main_name = name
        for copy, main in TIED if of is PE_AUDIO_VIDEO else ():
            if name.startswith(copy):
                main_name = main + name.removeprefix(copy)
        if main_name in stored_as and not torch.equal(files[name], files[stored_as[main_name]]):
            raise CheckpointError(f"{folder}: {name} and {stored_as[main_name]} are one weight, but differ")
        stored_as.setdefault(main_name, name)
    return stored_as


def _settle_vision_bias(source: Source, files: _Weights, stored_as: dict[str, str]) -> None:
    """Keep the bias that transformers adds to the frame encoder's projection if it was trained, else drop it."""
    if source.format.implementation != TRANSFORMERS or isinstance(source.config, PEAudioFrameConfig):
        return
    video, name = source.config.video, source.format.stored(VISION_BIAS, ()).name
    if name in stored_as and not video.vision.proj_bias:
        if files[stored_as[name]].any():
            vision = replace(video.vision, proj_bias=True)
            source.config = replace(source.config, video=replace(video, vision=vision))
        else:
            del stored_as[name]
