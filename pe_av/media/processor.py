"""What users have (captions, files, arrays) to what the model reads (padded tensors and masks).

One path for everyone: `audio_item` and `video_item` bring one item to the model's rate and size, and `batch_text`,
`batch_audio` and `batch_videos` pad items into a batch. Calling the processor does both; a dataset does the first in
its workers, may keep the results (frames still as bytes), and lets `loading.batch.Collate` do the second.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio.functional as AF
import torchvision.transforms.v2.functional as VF
from einops import rearrange
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pe_av.config import ModelConfig, PEAudioFrameConfig
from pe_av.config.compose import read_model_config
from pe_av.media.decode import CHUNK, MediaError, check_part, iter_frames, read_audio, spread_indices
from pe_av.media.tokenizer import read_tokenizer
from pe_av.model.video import scale_frames

Media = str | Path | Tensor | np.ndarray

# seconds that the filter of `resample` reaches on either side: 6 periods of the lower rate, 1 kHz at least
REACH = 0.01
RATES = (1_000, 1_000_000)  # Hz of a sound; below are kHz that were meant as Hz


class Processor:
    """Captions, audio and video to the keyword arguments of `PEAudioVideo.forward`.

    Args:
        config: of the model; it fixes rates, sizes, frame sampling, vocabulary and the longest caption.
        tokenizer: needed for text only. It is copied, so its own truncation and padding neither matter nor change.
    """

    def __init__(self, config: ModelConfig | PEAudioFrameConfig, tokenizer: Tokenizer | None = None):
        self.config = config
        self.tokenizer = tokenizer
        self._encoder = None
        if tokenizer is not None:
            self._encoder = Tokenizer.from_str(tokenizer.to_str())
            self._encoder.enable_truncation(config.text.max_tokens)  # cuts the words, keeps the special tokens
            self._encoder.no_padding()

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Processor":
        """The processor of a checkpoint folder, from its `config.yaml` and, where there is one, `tokenizer.json`.

        Raises:
            ConfigError: `config.yaml` is missing or wrong.
            ValueError: `tokenizer.json` is not a tokenizer.
        """
        config = read_model_config(Path(path) / "config.yaml")
        return cls(config, read_tokenizer(path) if (Path(path) / "tokenizer.json").exists() else None)

    def save_pretrained(self, path: str | Path) -> None:
        """Write `tokenizer.json`, if there is a tokenizer, into the folder; `config.yaml` comes with the model."""
        if self.tokenizer is not None:
            Path(path).mkdir(parents=True, exist_ok=True)
            self.tokenizer.save(str(Path(path) / "tokenizer.json"))

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        audio: Media | Sequence[Media] | None = None,
        videos: Media | Sequence[Media] | None = None,
        sampling_rate: int | None = None,
        max_seconds: float | None = None,
    ) -> dict[str, Tensor]:
        """A batch of whichever of the three are given, each a single item or a list, all of one length.

        Args:
            text: captions.
            audio: paths of media files, or waveforms as `audio_item` takes them.
            videos: paths of media files, or frames as `video_item` takes them. Sound and picture of one file are on
                one clock, however late either begins (`data.media`); those of two files begin with their own files.
            sampling_rate: Hz of all the waveforms, for which it is required; files bring their own.
            max_seconds: cut files and waveforms to their first part; frames given as a tensor stay as they are.
        Returns:
            text: `input_ids` (B, T) int64, `attention_mask` (B, T) bool.
            audio: `input_values` (B, 1, samples) float32, `padding_mask` (B, samples) bool.
            videos: `pixel_values_videos` (B, F, 3, S, S) float32, `padding_mask_videos` (B, F) bool.
            Masks are True where valid, and valid positions come first.
        Raises:
            ValueError: nothing given, or lists of different lengths.
            MediaError: an item that cannot be used, named by its kind and position, and by its path if it has one.
        """
        given = {"text": _as_list(text), "audio": _as_list(audio), "videos": _as_list(videos)}
        counts = {name: len(items) for name, items in given.items() if items is not None}
        if not counts:
            raise ValueError("nothing to process: give at least one of text=, audio= and videos=")
        if len(set(counts.values())) > 1 or 0 in counts.values():
            found = ", ".join(f"{count} of {name}" for name, count in counts.items())
            raise ValueError(f"the lists must be of one length and not empty, but there are {found}: row i is item i")

        batch: dict[str, Tensor] = {}
        if given["text"] is not None:
            batch |= self.batch_text(given["text"])
        if given["audio"] is not None:
            items = _each("audio", given["audio"], lambda item: self.audio_item(item, sampling_rate, max_seconds))
            batch |= self.batch_audio(items)
        if given["videos"] is not None:
            items = _each("videos", given["videos"], lambda item: self.video_item(item, max_seconds))
            batch |= self.batch_videos(items)
        return batch

    # -----------------------------------------------------------------------------------------------------------------
    # one item

    def audio_item(
        self,
        audio: Media,
        sampling_rate: int | None = None,
        max_seconds: float | None = None,
        start: float = 0.0,
        end: float | None = None,
    ) -> Tensor:
        """One item's waveform as the codec reads it: mono, at the model's rate, in whole hops.

        Args:
            audio: path of a media file, or (samples,) or (channels, samples): floating point in [-1, 1], or int16 or
                int32 at full scale.
            sampling_rate: Hz, required for a waveform; a file brings its own.
            max_seconds: cut to the first part.
            start, end: of a file, the part to take, in seconds. It is what resampling the whole and then cutting gives.
        Returns:
            (samples,) float32, reflect-padded on the right to a multiple of the codec's hop.
        Raises:
            MediaError: the item cannot be used.
        """
        check_part(start, end, max_seconds)
        end = _earlier(end, None if max_seconds is None else start + max_seconds)
        if isinstance(audio, str | Path):
            # read from a whole second on, where the samples of both rates meet, and some more on either side, which
            # the filter of the resampling reaches into
            begin = max(math.floor(start - REACH), 0)
            waveform, rate = read_audio(audio, start=begin, end=None if end is None else end + REACH)
            where = f"{audio}: "
            if not RATES[0] <= rate <= RATES[1]:
                raise MediaError(
                    f"{where}its rate of {rate} Hz is outside {RATES[0]} to {RATES[1]}; resample or leave it out"
                )
        else:
            if start:
                raise ValueError("start and end cut files; cut a waveform before you give it")
            begin = 0
            waveform, rate = _float_waveform(_as_tensor(audio, "a waveform")), _checked_rate(sampling_rate)
            if end is not None:
                waveform = waveform[:, : max(round((end + REACH) * rate), 1)]
            where = ""
        waveform = waveform.mean(dim=0)
        peak = waveform.abs().max().item()  # NaN and Inf, if any, are the largest
        if not math.isfinite(peak):
            raise MediaError(f"{where}samples are NaN or Inf; leave the item out or repair it")
        if peak > 10:  # loud music may exceed 1, but not by this
            raise MediaError(f"{where}samples reach {peak:.0f} where [-1, 1] is full scale; divide, or pass int16")
        codec = self.config.audio.codec
        waveform = resample(waveform, rate, codec.sampling_rate)
        first = round((start - begin) * codec.sampling_rate)
        length = None if end is None else max(round((end - start) * codec.sampling_rate), 1)
        waveform = waveform[first:][:length]
        if len(waveform) == 0:
            raise MediaError(f"{where}the audio track ends before {start:g} s; correct start, or leave the clip out")
        return pad_to_hops(waveform, codec.hop_length)

    def video_item(
        self, video: Media, max_seconds: float | None = None, start: float = 0.0, end: float | None = None
    ) -> Tensor:
        """One item's frames as bytes, sampled as the model wants them and squashed to its square.

        Args:
            video: path of a media file, or (F, 3, H, W) or (F, H, W, 3) uint8. A file is sampled by the model's
                `num_frames` or `frames_per_second`. Frames given as a tensor have no known rate: `num_frames` applies
                to them, `frames_per_second` and `max_seconds` do not, so take them at the model's rate.
            max_seconds: cut a file to its first part.
            start, end: of a file, the part to take, in seconds.
        Returns:
            (F, 3, S, S) uint8.
        Raises:
            MediaError: the item cannot be used.
            ValueError: the model has no video.
        """
        if isinstance(self.config, PEAudioFrameConfig):
            raise ValueError("PEAudioFrame reads text and audio only: leave videos= out")
        config = self.config.video
        if isinstance(video, str | Path):
            pieces = iter_frames(video, config.num_frames, config.frames_per_second, max_seconds, start, end)
        else:
            frames = _checked_frames(_as_tensor(video, "frames"))
            if config.num_frames is not None:
                frames = frames[spread_indices(len(frames), config.num_frames)]
            pieces = iter(frames.split(CHUNK))
        size = [config.vision.image_size] * 2
        resized = [VF.resize(piece, size, VF.InterpolationMode.BILINEAR, antialias=True) for piece in pieces]
        return torch.cat(resized).contiguous()

    # -----------------------------------------------------------------------------------------------------------------
    # items to a batch

    def batch_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions to `input_ids` and `attention_mask` (B, T): the tokenizer's special tokens around the words, cut to
        the model's `max_tokens`, padded on the right to the longest.

        Raises:
            ValueError: no tokenizer, or a tokenizer of another model; a caption that is no text or empty.
        """
        if self._encoder is None:
            raise ValueError("text needs a tokenizer, and the checkpoint has none: put tokenizer.json into its folder")
        rows = []
        for index, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise ValueError(f"text[{index}] is {type(caption).__name__}; give a string")
            # one by one: encode_batch starts threads, after which a data loader's fork is unsafe
            ids = self._encoder.encode(caption, add_special_tokens=True).ids if caption.strip() else []
            if not ids:
                raise ValueError(f"text[{index}] is empty; give a caption or leave the item out")
            if max(ids) >= self.config.text.vocab_size:
                raise ValueError(
                    f"text[{index}] has token {max(ids)}, but the model knows {self.config.text.vocab_size}: "
                    "tokenizer.json is another model's, replace it"
                )
            rows.append(torch.tensor(ids))
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self.config.text.pad_token_id),
            "attention_mask": mask_of(rows),
        }

    def batch_audio(self, waveforms: Sequence[Tensor]) -> dict[str, Tensor]:
        """Waveforms from `audio_item` to `input_values` (B, 1, samples), zero-padded, `padding_mask` (B, samples)."""
        values = pad_sequence(list(waveforms), batch_first=True)
        return {"input_values": rearrange(values, "b s -> b 1 s"), "padding_mask": mask_of(waveforms)}

    def batch_videos(self, clips: Sequence[Tensor]) -> dict[str, Tensor]:
        """Frames from `video_item` to `pixel_values_videos` (B, F, 3, S, S), scaled to [-1, 1] and padded with zeros,
        and `padding_mask_videos` (B, F)."""
        mask = mask_of(clips)
        values = torch.zeros(*mask.shape, *clips[0].shape[1:])
        for row, frames in zip(values, clips, strict=True):
            row[: len(frames)] = scale_frames(frames)
        return {"pixel_values_videos": values, "padding_mask_videos": mask}


# ---------------------------------------------------------------------------------------------------------------------
# waveforms


def _earlier(one: float | None, other: float | None) -> float | None:
    """The smaller of two limits, where None is no limit."""
    return min((limit for limit in (one, other) if limit is not None), default=None)


def resample(waveform: Tensor, rate: int, target: int) -> Tensor:
    """(samples,) at `rate` Hz to (samples',) at `target` Hz, by a windowed sinc."""
    # The kernel is as large as the product of the ratio's terms: for 11,127 Hz it would take gigabytes. The usual rates
    # and their television kin, 1000/1001 of them, have small terms and stay exact; at odd ones the speed is wrong by
    # 0.05 % at worst, and usually by a millionth.
    ratio = Fraction(target, rate).limit_denominator(1001)
    return AF.resample(waveform, ratio.denominator, ratio.numerator)


def pad_to_hops(waveform: Tensor, hop: int) -> Tensor:
    """(samples,) reflected on the right, to and fro if it is short, up to a multiple of `hop`."""
    length = len(waveform)
    position = torch.arange(length, length + -length % hop)
    period = max(2 * (length - 1), 1)  # there and back, without repeating the ends; a lone sample repeats
    position = position % period
    return torch.cat([waveform, waveform[torch.minimum(position, period - position)]])


def _float_waveform(waveform: Tensor) -> Tensor:
    """(samples,) or (channels, samples) of a user to (channels, samples) float32."""
    shape = tuple(waveform.shape)
    if waveform.ndim not in (1, 2):
        raise MediaError(f"a waveform of shape {shape}; give (samples,) or (channels, samples), and a list for a batch")
    if 0 in shape:
        raise MediaError(f"a waveform of shape {shape} has no samples; leave the item out")
    if waveform.ndim == 2 and shape[0] > shape[1]:
        raise MediaError(f"a waveform of shape {shape} has more channels than samples; transpose it")
    if waveform.dtype in (torch.int16, torch.int32):
        waveform = waveform.float() / -float(torch.iinfo(waveform.dtype).min)
    elif not waveform.is_floating_point():
        raise MediaError(f"a waveform of {waveform.dtype}; give floating point in [-1, 1], int16 or int32")
    return waveform.float() if waveform.ndim == 2 else waveform.float()[None]


def _checked_rate(rate: int | None) -> int:
    if rate is None:
        raise MediaError("a waveform needs its rate: pass sampling_rate= in Hz")
    whole = isinstance(rate, int | float | np.number) and float(rate).is_integer()
    if not whole or not RATES[0] <= rate <= RATES[1]:
        limits = f"{RATES[0]} to {RATES[1]}"
        raise MediaError(f"sampling_rate={rate} is not a rate in Hz, {limits}; pass the one it was recorded at")
    return int(rate)


# ---------------------------------------------------------------------------------------------------------------------
# frames


def _checked_frames(frames: Tensor) -> Tensor:
    """(F, 3, H, W) or (F, H, W, 3) uint8 of a user to (F, 3, H, W)."""
    shape = tuple(frames.shape)
    if frames.ndim != 4:
        raise MediaError(f"frames of shape {shape}; give (F, 3, H, W) or (F, H, W, 3), and a list for a batch")
    if frames.dtype != torch.uint8:
        raise MediaError(f"frames of {frames.dtype}; give uint8 from 0 to 255, the processor scales them")
    if 0 in shape:
        raise MediaError(f"frames of shape {shape} hold no picture; leave the item out")
    if (shape[1] == 3) == (shape[3] == 3):
        raise MediaError(f"frames of shape {shape}; one of the second and last dimension must be 3, and only one")
    return frames if shape[1] == 3 else rearrange(frames, "f h w c -> f c h w")


# ---------------------------------------------------------------------------------------------------------------------
# of all kinds


def _as_list(items: Any) -> list | None:
    """What the user gave for one kind, as a list; a tensor, an array, a path or a string is one item."""
    if items is None:
        return None
    return list(items) if isinstance(items, list | tuple) else [items]


def _as_tensor(item: Any, what: str) -> Tensor:
    if isinstance(item, np.ndarray) and item.dtype.kind in "biuf" and item.dtype.itemsize <= 8:
        # torch shares memory with writable arrays in the machine's byte order and without negative strides
        return torch.from_numpy(np.require(item, item.dtype.newbyteorder("="), ["C", "W"]))
    if isinstance(item, Tensor):
        return item.detach().cpu()
    kind = f"an array of {item.dtype}" if isinstance(item, np.ndarray) else type(item).__name__
    raise MediaError(f"is {kind}; give a path, or {what} as a tensor or array")


def _each(kind: str, items: list, process: Callable[[Any], Tensor]) -> list[Tensor]:
    """Every item processed; errors say which."""
    done = []
    for index, item in enumerate(items):
        try:
            done.append(process(item))
        except MediaError as error:
            raise type(error)(f"{kind}[{index}]: {error}") from error  # a track that is missing stays one
    return done


def mask_of(rows: Sequence[Tensor]) -> Tensor:
    """(B, longest) bool, True where a row has something."""
    lengths = torch.tensor([len(row) for row in rows])
    return torch.arange(int(lengths.max())) < lengths[:, None]
