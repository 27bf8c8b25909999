"""The embeddings of clips whose captions are labels, for zero-shot classification and for probes."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pe_av.checkpoint import load_model
from pe_av.config import HEADS, ConfigError
from pe_av.config.evaluation import MODALITIES, LabelledConfig
from pe_av.data.cache import reader_for
from pe_av.data.manifest import Clip, Manifest
from pe_av.evaluation.embedder import EmbeddedWindows, embed_manifest
from pe_av.loading.batch import Collate
from pe_av.media.processor import Processor
from pe_av.model.pe_audio_video import PEAudioVideo


@dataclass
class LabelledClips:
    """N clips with at least one label each; the same on every rank."""

    ids: list[str]
    labels: list[list[str]]  # of each clip, all its captions of all kinds
    splits: list[str | None]
    embeds: dict[str, Tensor]  # modality -> (N, D) float32 on the CPU
    valid: dict[str, Tensor]  # modality -> (N,) bool, whether the clip has it; if not, its row means nothing
    record: dict[str, int]  # how many clips were left out, and why
    windows: EmbeddedWindows | None  # if clips are scored by their best windows


def load_for_labels(config: LabelledConfig, device: torch.device, prompts: bool) -> tuple[PEAudioVideo, Processor]:
    """The checkpoint's model and processor.

    Args:
        prompts: whether texts are to be compared with the clips.
    Raises:
        ConfigError, CheckpointError: the checkpoint cannot be loaded, or lacks a tower that is needed.
    """
    model = load_model(config.checkpoint, device)
    if not isinstance(model, PEAudioVideo):
        raise ConfigError(f"{config.checkpoint} is a PEAudioFrame, which has no embedding of a whole clip")
    usable = model_modalities(model, prompts)
    for modality in config.modalities or ():
        if modality not in usable:
            needed = [modality, f"text_{modality}"] if prompts else [modality]
            towers = dict.fromkeys(tower for name in needed for tower in HEADS[name])
            lacks = [t for t in towers if t not in model.config.towers] or [
                f"head {name}" for name in needed if name not in model.config.heads
            ]
            raise ConfigError(
                f"{config.checkpoint}: its model has no {' and no '.join(lacks)}, which modalities={modality} needs; "
                f"it can be evaluated by {', '.join(usable) or 'none'}"
            )
    if not usable:
        raise ConfigError(
            f"{config.checkpoint}: its model has only the embeddings {', '.join(model.config.heads)}, of which none "
            f"can be {'compared with a text of its own' if prompts else 'classified'}"
        )
    return model, Processor.from_pretrained(config.checkpoint, config.data.reader)


def model_modalities(model: PEAudioVideo, prompts: bool) -> list[str]:
    """Those of `MODALITIES` that a model embeds, and, with `prompts`, that it embeds texts for."""
    heads = model.config.heads
    return [name for name in MODALITIES if name in heads and (not prompts or f"text_{name}" in heads)]


@dataclass(frozen=True)
class TracksReader:
    """Reads only those tracks of a clip, "audio" and "video", that are needed: decoding is what takes longest."""

    read: Callable[[Clip], dict[str, Any]]
    tracks: tuple[str, ...]

    def __call__(self, clip: Clip) -> dict[str, Any]:
        return self.read(replace(clip, **{name: None for name in ("audio", "video") if name not in self.tracks}))


def embed_labelled(
    config: LabelledConfig,
    model: PEAudioVideo,
    processor: Processor,
    clips: Manifest,
    source: str,
    folder: Path,
    device: torch.device,
) -> LabelledClips:
    """Embed the audio, video and both of every clip, but not its captions. The ranks share the clips.

    Args:
        model: of `load_for_labels`.
        source: the manifest, for messages and for the titles of progress bars.
        folder: of the lists of damaged and partial clips.
    Raises:
        ConfigError: too many clips are damaged, none has a label, or none has what `modalities` asks for.
    """
    read: Callable[[Clip], dict[str, Any]] = reader_for(config.data, model, processor)
    if config.data.cache is None:
        towers = {
            tower for name in config.modalities or model_modalities(model, prompts=False) for tower in HEADS[name]
        }
        read = TracksReader(read, tuple(towers))
    collate = Collate(processor, kinds=())
    embedded, bad = embed_manifest(config, model, clips, read, collate, folder, device, "embedding")

    known = {clip.id: (labels_of(clip), clip.split) for clip in clips}
    rows = [row for row, name in enumerate(embedded.ids) if known[name][0]]
    if not embedded.ids:
        raise ConfigError(
            f"{source}: none of its {embedded.read} clips, such as {clips[0].id}, has anything that could be read and "
            f"that the model of {config.checkpoint} embeds"
        )
    if not rows:
        raise ConfigError(
            f"{source}: none of the {len(embedded.ids)} clips that could be read has a label, its caption"
        )
    index = torch.tensor(rows)
    ids = [embedded.ids[row] for row in rows]
    result = LabelledClips(
        ids,
        [known[name][0] for name in ids],
        [known[name][1] for name in ids],
        {name: embedded.embeds[name][index] for name in MODALITIES if name in embedded.embeds},
        {name: embedded.valid[name][index] for name in MODALITIES if name in embedded.embeds},
        {f"{name}_items": len(reasons) for name, reasons in bad.reasons.items()}
        | {"without_label": len(embedded.ids) - len(rows)},
        embedded.windows and _of_rows(embedded.windows, index),
    )
    for name, embeds in result.embeds.items():
        broken = (result.valid[name] & ~embeds.isfinite().all(1)).nonzero().flatten().tolist()
        if broken:
            raise ConfigError(
                f"{config.checkpoint}: the {name} embeddings of {len(broken)} clips of {source} are NaN or infinite, "
                f"such as that of {ids[broken[0]]}"
            )
    for name in config.modalities or ():
        if name not in result.valid or not result.valid[name].any():
            raise ConfigError(
                f"{source}: none of the {len(ids)} clips, such as {ids[0]}, has {name.replace('_', ' and ')}, which "
                f"modalities={name} needs"
            )
    return result


def _of_rows(windows: EmbeddedWindows, rows: Tensor) -> EmbeddedWindows:
    """The windows of some clips, whose rows ascend."""
    place = torch.searchsorted(rows, windows.clip).clamp(max=len(rows) - 1)
    used = rows[place] == windows.clip
    embeds, valid = ({name: each[used] for name, each in part.items()} for part in (windows.embeds, windows.valid))
    return EmbeddedWindows(embeds, valid, place[used])


def labels_of(clip: Clip) -> list[str]:
    """The different captions of all kinds."""
    return list(dict.fromkeys(sum(clip.captions.values(), [])))


def class_names(path: Path | None, clips: Manifest, source: str) -> list[str]:
    """The labels of the classes, in their order.

    Args:
        path: a text file with one a line; None: the labels of the clips, sorted.
        source: the manifest, for messages.
    Raises:
        ConfigError: the file cannot be read, is empty or repeats a label, or a clip's label is not in it.
    """
    if path is None:
        return sorted({label for clip in clips for label in labels_of(clip)})
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a list of classes ({error})") from None
    if not names:
        raise ConfigError(f"{path}: holds no classes; it needs one label a line")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(f"{path}: lists {', '.join(map(repr, twice[:5]))} more than once")
    known, unknown = set(names), {}
    for clip in clips:
        for label in labels_of(clip):
            if label not in known:
                unknown.setdefault(label, clip.id)
    if unknown:
        listed = ", ".join(f"{label!r} (of {clip})" for label, clip in list(unknown.items())[:5])
        raise ConfigError(f"{source}: {len(unknown)} of its labels are not in {path}: {listed}")
    return names
