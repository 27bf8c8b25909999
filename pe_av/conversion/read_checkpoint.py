"""One checkpoint in, another out: the published formats and ours, every weight accounted for.

    open_source   finds the format by looking, and gives the config and the weights under our names, still on disk
    convert       writes them as a native folder or as one that transformers loads

Weights are memory-mapped from one file to the other, so a conversion needs little more memory than its largest tensor.
"""

import json
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from pe_av.checkpoint import CONFIG_FILE, WEIGHTS_FILE, CheckpointError, build_model, open_weights
from pe_av.config import ModelConfig, PEAudioFrameConfig
from pe_av.config.compose import model_config_yaml, read_model_config
from pe_av.conversion.names import (
    HF,
    HF_AUDIO,
    HF_FRAME,
    HF_VIDEO,
    ORIGINAL,
    ORIGINAL_FRAME,
    Stored,
    Table,
    renamed,
    same,
    stored,
)
from pe_av.conversion.published import hf_files, hf_model_config, read_published_config
from pe_av.media.tokenizer import read_tokenizer

INDEX_FILE, TOKENIZER_FILE = f"{WEIGHTS_FILE}.index.json", "tokenizer.json"

HEAD_BIAS = "video.vision.proj.bias"  # timm's encoder has it, the original's does not
# transformers holds these twice or thrice; a file may have any of the copies, or all
TIED = (
    ("audio_model.text_model.", "text_model."),
    ("video_model.text_model.", "text_model."),
    ("audio_video_encoder.embedder.audio_encoder.", "audio_model.audio_encoder."),
    ("audio_video_encoder.embedder.video_encoder.", "video_model.video_encoder."),
)
# tables that follow from the config, and the way back from the codec's latent, which only a decoder needs
NOT_NEEDED = re.compile(r"rotary_emb\.(original_)?inv_freq$|\.rope\.pos_embed$|\.bottleneck\.out_proj\.(weight|bias)$")

# how the names of each layout begin, and whose they are; the first that is found is taken
LAYOUTS: tuple[tuple[str, str], ...] = (
    ("audio_visual_model.", "the original's PEAudioVisual"),
    ("audio_model.audio_transformer.", "the original's PEAudioFrame"),
    ("audio_video_encoder.", "transformers' PeAudioVideoModel"),
    ("audio_encoder.", "transformers' PeAudioModel or PeAudioFrameLevelModel"),
    ("video_encoder.", "transformers' PeVideoModel"),
    ("audio.transformer.", "ours"),
    ("video.transformer.", "ours"),
)


@dataclass
class Source:
    """A checkpoint that has been looked at: its weights under our names are read when asked for."""

    config: ModelConfig | PEAudioFrameConfig
    described: str  # whose format it is
    weights: dict[str, Tensor]  # memory-mapped, but for a few that had to be turned round
    tokenizer: Tokenizer | None
    notes: list[str] = field(default_factory=list)  # what a user should know


def convert(source: str | Path, target: str | Path, to: str = "native") -> Source:
    """Write the checkpoint `source` as the new folder `target`, which appears when it is complete and not before.

    Args:
        source: a folder, or a name on the Hugging Face hub, optionally with "@revision".
        to: "native", or "hf" for a folder that transformers' `from_pretrained` loads.
    Raises:
        CheckpointError: unreadable, missing, unknown, misshapen or NaN weights, a target that exists, no space.
        ConfigError: a config that is not understood, or a model that transformers cannot hold.
    """
    target, console = Path(target), Console(stderr=True)
    if to not in ("native", "hf"):  # for those who call this from Python
        raise CheckpointError(f"to={to} is unknown: native or hf")
    if target.exists():
        raise CheckpointError(f"{target} exists: move it away, or choose another target")
    with open_source(source) as found:
        config = hf_model_config(found.config) if to == "hf" else found.config
        _check_finite(found.weights, console)
        weights = _hf_weights(config, found.weights) if to == "hf" else found.weights
        size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        files = _hf_files(config, found.tokenizer, weights) if to == "hf" else {CONFIG_FILE: model_config_yaml(config)}
        with _appearing(target, size) as unfinished, console.status(f"writing {size / 1e9:.1f} GB"):
            for name, content in files.items():
                (unfinished / name).write_text(content, encoding="utf-8")
            if found.tokenizer is not None:
                found.tokenizer.save(str(unfinished / TOKENIZER_FILE))
            save_file(weights, unfinished / WEIGHTS_FILE, metadata={"format": "pt"})
    count = sum(tensor.numel() for tensor in weights.values())
    console.print(f"{found.described}: {count:,} parameters in {len(weights)} tensors", soft_wrap=True)
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"written to {target}", soft_wrap=True)
    return found


@contextmanager
def open_source(source: str | Path) -> Iterator[Source]:
    """The checkpoint folder or hub name `source`, as long as the context lasts."""
    folder = find_folder(source)
    with ExitStack() as stack:
        files = _Weights(folder, stack)
        layout = next((whose for start, whose in LAYOUTS if any(name.startswith(start) for name in files.names)), None)
        if layout is None:
            some = ", ".join(sorted(files.names)[:3])
            raise CheckpointError(f"{folder}: the weights are no PE-AV's that is known; they begin with {some}")
        if (folder / CONFIG_FILE).is_file():
            config, library = read_model_config(folder / CONFIG_FILE), "ours"
        else:
            config, library = read_published_config(folder)
        tokenizer = read_tokenizer(folder) if (folder / TOKENIZER_FILE).is_file() else None
        found = Source(config, layout, {}, tokenizer)
        if tokenizer is None:
            found.notes.append(
                f"{folder} has no {TOKENIZER_FILE}: put the text model's into the target before using text"
            )
        if not layout.startswith({"hf": "transformers", "original": "the original", "ours": "ours"}[library]):
            found.notes.append(
                f"the config is {_whose[library]}, but the weights have the names of {layout}: they are of "
                "different branches or downloads. Each was read by its own format, and they fit; make sure that they "
                "belong together"
            )
        _take(files, found, _table(config, layout, folder), folder)
        yield found


_whose = {"hf": "transformers'", "original": "the original's", "ours": "ours"}


def find_folder(source: str | Path) -> Path:
    """The folder `source`, downloaded first if it is a name on the hub."""
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists():
        raise CheckpointError(f"{source} is a file: give the folder that it lies in")
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", str(source))
    if match is None:
        raise CheckpointError(f"{source}: no such folder")
    name, revision = match.groups()
    by_hand = f"or download it elsewhere (hf download {name}) and give the folder"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{source} is no folder here; to fetch it from the hub: pip install 'pe-av[hub]', {by_hand}"
        ) from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # its errors have no common base, and all mean the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{source} is no folder here and could not be downloaded ({reason}): check name and network, {by_hand}"
        ) from None


class _Weights:
    """The tensors of a folder, in one safetensors file or several, by name."""

    def __init__(self, folder: Path, stack: ExitStack):
        if (folder / WEIGHTS_FILE).is_file():
            paths = [folder / WEIGHTS_FILE]
        elif (folder / INDEX_FILE).is_file():
            paths = _shards(folder)
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


def _shards(folder: Path) -> list[Path]:
    try:
        names = set(json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX_FILE}: not an index of shards ({error})") from None
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{folder / INDEX_FILE}: not an index of shards (it does not name files)")
    for name in sorted(names):
        if Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX_FILE}: {name} is outside the folder")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: the shard {name} is missing; download the folder again")
    return [folder / name for name in sorted(names)]


def _table(config: ModelConfig | PEAudioFrameConfig, layout: str, folder: Path) -> Table | None:
    """The names to expect; None: our own.

    Raises:
        CheckpointError: the config describes another model than the weights are of.
    """
    frame = isinstance(config, PEAudioFrameConfig)
    heads = set() if frame else set(config.heads)
    if layout == "ours":
        return None
    fitting: dict[str, Table | None] = {
        "the original's PEAudioVisual": ORIGINAL if len(heads) == 8 else None,
        "the original's PEAudioFrame": ORIGINAL_FRAME if frame else None,
        "transformers' PeAudioVideoModel": HF if len(heads) == 8 else None,
        "transformers' PeAudioModel or PeAudioFrameLevelModel": (
            HF_FRAME if frame else HF_AUDIO if heads == {"audio", "text_audio"} else None
        ),
        "transformers' PeVideoModel": HF_VIDEO if heads == {"video", "text_video"} else None,
    }
    if fitting[layout] is None:
        described = "PEAudioFrame" if frame else f"a model with the heads {', '.join(config.heads)}"
        raise CheckpointError(
            f"{folder}: the weights have the names of {layout}, but the config describes {described}: "
            "take both from the same download"
        )
    return fitting[layout]


def _take(files: _Weights, found: Source, table: Table | None, folder: Path) -> None:
    """Fill in the weights, or refuse with the list of what does not fit."""
    canonical: dict[str, str] = {}  # the name that tied copies share -> one that is there
    for name in sorted(files.names):
        shared = name
        for copy, main in TIED if table is HF else ():
            if name.startswith(copy):
                shared = main + name.removeprefix(copy)
        if shared in canonical and not torch.equal(files[name], files[canonical[shared]]):
            raise CheckpointError(f"{folder}: {name} and {canonical[shared]} are one weight, but differ")
        canonical.setdefault(shared, name)

    head_bias = renamed(HEAD_BIAS, table) if table in (HF, HF_VIDEO) else None
    if head_bias in canonical and not found.config.video.vision.proj_bias:
        if files[canonical[head_bias]].any():  # it was trained there
            vision = replace(found.config.video.vision, proj_bias=True)
            found.config = replace(found.config, video=replace(found.config.video, vision=vision))
        else:
            del canonical[head_bias]

    wrong, used = [], set()
    for name, tensor in build_model(found.config, "meta").state_dict().items():
        shape = tuple(tensor.shape)
        entry = Stored(name, shape, same) if table is None else stored(name, shape, table)
        if entry is None:  # of scales and biases only, which the original's PEAudioVisual does not have
            start = found.config.logit_scale_init if name.endswith(".scale") else found.config.logit_bias_init
            found.weights[name] = torch.full(shape, start)
        elif entry.name not in canonical:
            wrong.append(f"missing {entry.name}")
        elif files.shape(canonical[entry.name]) != entry.shape:
            wrong.append(f"{entry.name} is {files.shape(canonical[entry.name])}, not {entry.shape}")
        else:
            theirs = files[canonical[entry.name]]
            ours = entry.take(theirs)
            # a part of a tensor, or one turned round, is copied; the rest stays where it is on the disk
            whole = ours.is_contiguous() and ours.numel() == theirs.numel()
            found.weights[name] = ours if whole else ours.clone(memory_format=torch.contiguous_format)
        used.add(entry.name if entry else None)
    wrong += [f"unknown {name}" for name in canonical if name not in used and not NOT_NEEDED.search(name)]
    if wrong:
        listed = "\n  ".join(wrong)
        raise CheckpointError(
            f"{folder}: {len(wrong)} weights do not fit the config, so nothing was written:\n  {listed}"
        )
    if any(name.startswith("logits.") for name in found.weights) and table is ORIGINAL:
        found.notes.append(
            "the original keeps no logit scales and biases: they have their start values, so use the embeddings' dot "
            "products and not the probabilities"
        )


def _check_finite(weights: dict[str, Tensor], console: Console) -> None:
    wrong = [
        name
        for name, tensor in track(weights.items(), "checking", console=console, transient=True)
        if not tensor.isfinite().all()
    ]
    if wrong:
        listed = ", ".join(wrong[:5]) + (", …" if len(wrong) > 5 else "")
        raise CheckpointError(f"NaN or Inf in {len(wrong)} weights, so nothing was written: {listed}")


def _hf_table(config: ModelConfig | PEAudioFrameConfig) -> Table:
    if isinstance(config, PEAudioFrameConfig):
        return HF_FRAME
    return HF if "fusion" in config.towers else HF_AUDIO if "audio" in config.towers else HF_VIDEO


def _hf_weights(config: ModelConfig | PEAudioFrameConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    table, theirs = _hf_table(config), {}
    for name in build_model(config, "meta").state_dict():
        tensor = weights[name]
        theirs[renamed(name, table)] = tensor[..., None] if name == "fusion.video_proj.weight" else tensor
    if isinstance(config, ModelConfig) and "video" in config.towers and HEAD_BIAS not in weights:
        theirs[renamed(HEAD_BIAS, table)] = weights["video.vision.proj.weight"].new_zeros(
            config.video.vision.output_dim
        )
    return theirs


def _hf_files(
    config: ModelConfig | PEAudioFrameConfig, tokenizer: Tokenizer | None, weights: dict[str, Tensor]
) -> dict[str, str]:
    dtype, _ = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()).most_common(1)[0]
    return hf_files(config, tokenizer, dtype)


@contextmanager
def _appearing(target: Path, size: int) -> Iterator[Path]:
    """A folder to write into, which becomes `target` at the end and vanishes if there is an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise CheckpointError(f"{target}: {size / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free: make room")
    unfinished = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.rename(target)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own way
        raise CheckpointError(f"{target}: could not be written ({error}); nothing was left behind") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
