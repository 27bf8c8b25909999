"""Run one tower on inputs that are checked first; both models use these functions, so both report the same errors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pe_av.config import TextConfig
from pe_av.model.audio import AudioEncoder
from pe_av.model.text import ModernBERT
from pe_av.model.transformer import TemporalTransformer
from pe_av.model.video import VideoEncoder


@dataclass
class Features:
    """The output of a tower: pooled (B, D), sequence (B, T, D), its mask (B, T) or None, attention weights by layer."""

    pooled: Tensor
    sequence: Tensor
    mask: Tensor | None
    attentions: list[Tensor | None]

    def select(self, rows: Tensor, chosen: Tensor) -> "Features":
        """The features of the clips `chosen`, where entry i of these features belongs to clip `rows[i]` (ascending).

        With no clip chosen, the first entry is returned, so that the fusion still has an input to run on.
        """
        index = torch.searchsorted(rows, chosen) if len(chosen) else rows.new_zeros(1)
        mask = None if self.mask is None else self.mask[index]
        return Features(self.pooled[index], self.sequence[index], mask, self.attentions)


@contextmanager
def keep_states(towers: Mapping[str, ModernBERT | TemporalTransformer | None]) -> Iterator[dict[str, list[Tensor]]]:
    """While the context lasts, these transformers put their hidden states into the dict that it gives, by name.

    The transformers are told by an attribute, because what one of them computes passes through several functions, of
    which none else has a use for hidden states. So no other thread may run the model meanwhile.
    """
    kept: dict[str, list[Tensor]] = {}
    present = {name: tower for name, tower in towers.items() if tower is not None}
    for name, tower in present.items():
        tower.states = kept[name] = []
    try:
        yield kept
    finally:
        for tower in present.values():
            tower.states = None


def text_features(tower: ModernBERT | None, config: TextConfig, input_ids: Tensor, mask: Tensor | None) -> Features:
    """(B, T) token ids and their mask -> token 0 and the sequence, both before the final norm."""
    _require_tower(tower, "text")
    _check(tower, "input_ids", input_ids, 2, mask, "attention_mask", dim=1)
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids are {input_ids.dtype}: pass the tokenizer's integers")
    limit = config.max_position_embeddings
    if input_ids.shape[1] > limit:
        raise ValueError(f"input_ids have {input_ids.shape[1]} tokens, more than max_position_embeddings={limit}")
    if input_ids.shape[1] == 0:
        raise ValueError("input_ids have no tokens: the tokenizer adds one even to an empty caption")
    if _values_can_be_read(tower, input_ids):
        unknown = input_ids[(input_ids < 0) | (input_ids >= config.vocab_size)]
        if unknown.numel():
            raise ValueError(
                f"input_ids contain {unknown[0]}, which is not in the vocabulary of {config.vocab_size}: "
                "use the tokenizer of this checkpoint"
            )
    sequence, attentions = tower(input_ids, mask)
    return Features(sequence[:, 0], sequence, mask, attentions)


def audio_features(tower: AudioEncoder | None, input_values: Tensor, mask: Tensor | None) -> Features:
    """(B, 1, samples) and the mask (B, samples) -> a sequence of one position per hop of the codec."""
    _require_tower(tower, "audio")
    _check(tower, "input_values", input_values, 3, mask, "padding_mask", dim=2)
    hop = tower.codec.hop_length
    if input_values.shape[1] != 1:
        raise ValueError(f"input_values are {tuple(input_values.shape)}: average the channels to (B, 1, samples)")
    if input_values.shape[2] % hop or input_values.shape[2] == 0:
        raise ValueError(
            f"input_values have {input_values.shape[2]} samples, not whole hops of {hop}: the Processor pads them"
        )
    return codec_to_features(tower, *tower.encode(input_values.to(tower.codec.to_mean.weight.dtype), mask))


def codec_to_features(tower: AudioEncoder | None, codec_features: Tensor, mask: Tensor | None) -> Features:
    """`audio_features` from the output of the codec: (B, positions, codebook_dim) and the mask (B, positions)."""
    _require_tower(tower, "audio")
    _check(tower, "codec_features", codec_features, 3, mask, "padding_mask", dim=1)
    width = tower.data_proj.in_features
    if codec_features.shape[2] != width or codec_features.shape[1] == 0:
        shape = tuple(codec_features.shape)
        raise ValueError(f"codec_features are {shape}, not (B, positions >= 1, codebook_dim={width})")
    pooled, sequence, attentions = tower(codec_features.to(tower.data_proj.weight.dtype), mask)
    return Features(pooled, sequence, mask, attentions)


def video_features(tower: VideoEncoder | None, pixel_values_videos: Tensor, mask: Tensor | None) -> Features:
    """(B, F, 3, S, S), in [-1, 1] or uint8, and the mask (B, F) -> a sequence of one position per frame."""
    _require_tower(tower, "video")
    _check(tower, "pixel_values_videos", pixel_values_videos, 5, mask, "padding_mask_videos", dim=1)
    size = tower.vision.image_size
    if pixel_values_videos.shape[2:] != (3, size, size) or pixel_values_videos.shape[1] == 0:
        raise ValueError(
            f"pixel_values_videos are {tuple(pixel_values_videos.shape)}, not (B, frames >= 1, 3, {size}, {size}): "
            "the Processor resizes them"
        )
    return frames_to_features(tower, tower.encode(pixel_values_videos, mask), mask)


def frames_to_features(tower: VideoEncoder | None, frame_features: Tensor, mask: Tensor | None) -> Features:
    """`video_features` from the output of the frame encoder: (B, F, vision_dim) and the mask (B, F)."""
    _require_tower(tower, "video")
    _check(tower, "frame_features", frame_features, 3, mask, "padding_mask_videos", dim=1)
    width = tower.proj.in_features
    if frame_features.shape[2] != width or frame_features.shape[1] == 0:
        shape = tuple(frame_features.shape)
        raise ValueError(f"frame_features are {shape}, not (B, frames >= 1, output_dim={width} of the frame encoder)")
    pooled, sequence, attentions = tower(frame_features.to(tower.proj.weight.dtype), mask)
    return Features(pooled, sequence, mask, attentions)


def check_combination(inputs: Mapping[str, Tensor]) -> None:
    """Refuse inputs of `PEAudioVideo.forward`, by name, that do not go together.

    Raises:
        ValueError: one modality twice, fewer than two modalities, or different batch sizes.
    """
    given = {}
    for modality, names in (
        ("text", ("input_ids",)),
        ("audio", ("input_values", "codec_features")),
        ("video", ("pixel_values_videos", "frame_features")),
    ):
        present = [name for name in names if name in inputs]
        if len(present) == 2:
            raise ValueError(f"{present[0]} and {present[1]} are the same {modality} twice: pass one of them")
        if present:
            given[modality] = inputs[present[0]]
    if len(given) < 2:
        use = {"text": "get_text_audio_embeds, get_text_video_embeds or get_text_audio_video_embeds"}
        only = next(iter(given), None)
        remedy = f"for {only} alone use {use.get(only, f'get_{only}_embeds')}" if only else "got none"
        raise ValueError(f"forward needs two of text, audio and video: {remedy}")
    first, *others = (value.shape[0] for value in given.values() if value.dim())
    if any(other != first for other in others):
        counts = ", ".join(f"{len(value)} of {name}" for name, value in given.items())
        raise ValueError(f"inputs of different batch size ({counts}): pair them, or embed each with its get_* method")


def check_attentions(wanted: bool, attention: str) -> None:
    """Raise `ValueError` if attention weights are wanted that this implementation of attention does not have."""
    if wanted and attention != "eager":
        raise ValueError(f"attention={attention} keeps no weights: build the model with attention=eager")


def _require_tower(tower: nn.Module | None, name: str) -> None:
    if tower is None:
        raise ValueError(f"this model was loaded without {name}: load it with towers that include it")


def _values_can_be_read(model: nn.Module, value: Tensor) -> bool:
    return not (model.training or value.is_meta or torch.compiler.is_compiling())


def _check(
    model: nn.Module, name: str, value: Tensor, dims: int, mask: Tensor | None, mask_name: str, dim: int
) -> None:
    """Check shapes and dtypes always, values only outside training, where waiting for the GPU costs little.

    Args:
        dims: number of dimensions that `value` must have.
        dim: the dimension of `value` that the mask covers.
    """
    if value.dim() != dims:
        raise ValueError(f"{name} has {value.dim()} dimensions {tuple(value.shape)}, not {dims}")
    is_bytes = name == "pixel_values_videos" and value.dtype == torch.uint8
    if dims > 2 and not value.is_floating_point() and not is_bytes:
        raise ValueError(f"{name} is {value.dtype}: pass floating point values, as the Processor makes them")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"{mask_name} is {mask.dtype}: pass bool, True where valid")
        if mask.shape != (value.shape[0], value.shape[dim]):
            raise ValueError(
                f"{mask_name} is {tuple(mask.shape)}, not {(value.shape[0], value.shape[dim])} as {name} needs"
            )
    if not _values_can_be_read(model, value):
        return
    if dims > 2 and not value.isfinite().all():
        rows = (~value.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        raise ValueError(f"{name} has NaN or infinite values in rows {rows}: look at the files of these clips")
    if mask is not None:
        if not mask.any(1).all():
            rows = (~mask.any(1)).nonzero().flatten().tolist()
            raise ValueError(f"{mask_name} masks the whole of rows {rows}: drop them from the batch")
        if (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError(f"{mask_name} has valid positions after padding: put the valid ones first")
