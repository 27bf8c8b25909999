"""From what users have (captions, files, arrays) to what the model reads (padded tensors and masks).

It takes two steps. `audio_item` and `video_item` bring one item to the model's rate and size; `batch_text`,
`batch_audio` and `batch_videos` pad items to a batch. Calling the processor does both. In training, the data loader's
workers do the first step, whose results can be cached, and `loading.batch.Collate` does the second.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pe_av.config import ConfigError, ModelConfig, PEAudioFrameConfig
from pe_av.config.compose import read_model_config
from pe_av.device import to_device
from pe_av.media.audio import pad_to_hops, read_audio, resample
from pe_av.media.frames import CHUNK, iter_frames
from pe_av.media.inputs import MAX_RATE, MIN_RATE, to_frames, to_rate, to_waveform
from pe_av.media.readers import check_reader
from pe_av.media.timeline import spread_indices
from pe_av.media.tokenizer import read_tokenizer
from pe_av.media.tracks import MediaError, check_segment
from pe_av.model.outputs import described

# The model's own function, because the model scales frames too: data loaders send them as bytes, a quarter of the size.
from pe_av.model.video import scale_frames

if TYPE_CHECKING:
    from PIL.Image import Image

Media = str | Path | Tensor | np.ndarray
# seconds that the filter of `resample` reaches to either side: 6 periods of the lower rate, which is 1 kHz at least
FILTER_REACH = 0.01


class Batch(dict[str, Tensor]):
    """Arguments of a model's `forward` by name, to be passed as `model(**batch)`."""

    def to(self, device: str | torch.device) -> "Batch":
        """A batch with the same tensors on the device. They keep their dtypes; a model casts its input itself."""
        return Batch(to_device(dict(self), torch.device(device)))

    def __repr__(self) -> str:
        return described("Batch", self)


class Processor:
    """Captions, audio and video to the keyword arguments of `PEAudioVideo.forward`.

    Args:
        config: the model's; it determines rates, sizes, frame sampling, vocabulary and the longest caption.
        tokenizer: only needed for text. It is copied, so its own truncation and padding neither matter nor change.
        reader: what decodes the frames of ordinary files: pyav, decord or torchcodec; see `readers`.
    Raises:
        ConfigError: this reader is not installed.
    """

    def __init__(
        self, config: ModelConfig | PEAudioFrameConfig, tokenizer: Tokenizer | None = None, reader: str = "pyav"
    ):
        check_reader(reader)
        self.config = config
        self.reader = reader
        self.tokenizer = tokenizer
        self._encoder = None
        if tokenizer is not None:
            self._encoder = Tokenizer.from_str(tokenizer.to_str())
            self._encoder.enable_truncation(config.text.max_tokens)  # cuts the words, keeps the special tokens
            self._encoder.no_padding()

    @classmethod
    def from_pretrained(cls, path: str | Path, reader: str = "pyav") -> "Processor":
        """The processor of a checkpoint folder, from its `config.yaml` and, if there is one, its `tokenizer.json`.

        Args:
            path: the folder, or a name on the hub, "hf:user/name", as `load_model` takes it.
        Raises:
            ConfigError: `config.yaml` is missing or wrong, or the reader of frames is not installed.
            ValueError: `tokenizer.json` is not a tokenizer.
        """
        from pe_av.checkpoint import checkpoint_folder  # a download also converts, for which this module is needed

        path = checkpoint_folder(path)
        if not path.is_dir():
            raise ConfigError(f"{path}: no such folder; give that of a checkpoint, such as runs/<date>/checkpoint")
        config = read_model_config(path / "config.yaml")
        return cls(config, read_tokenizer(path) if (path / "tokenizer.json").exists() else None, reader)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the tokenizer, if there is one, to `tokenizer.json` in a folder; the model writes `config.yaml`."""
        if self.tokenizer is not None:
            Path(path).mkdir(parents=True, exist_ok=True)
            self.tokenizer.save(str(Path(path) / "tokenizer.json"))

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        audio: Media | Sequence[Media] | None = None,
        videos: "Media | Image | Sequence[Media | Image] | None" = None,
        sampling_rate: int | None = None,
        max_seconds: float | None = None,
    ) -> Batch:
        """A batch from at least one of text, audio and videos: a single item, or lists of equal length.

        Args:
            text: captions.
            audio: paths of media files, or waveforms as `audio_item` takes them.
            videos: paths of media files, or frames or images as `video_item` takes them. Audio and video from the same
                file are on the same clock, even if one of them begins late (see `media.tracks`).
            sampling_rate: Hz of all waveforms, required for them. Files know their own.
            max_seconds: cut files and waveforms to this duration. Frames that are passed as a tensor are not cut.
        Returns:
            text: `input_ids` (B, T) int64, `attention_mask` (B, T) bool.
            audio: `input_values` (B, 1, samples) float32, `padding_mask` (B, samples) bool.
            videos: `pixel_values_videos` (B, F, 3, S, S) float32, `padding_mask_videos` (B, F) bool.
            Masks are True where valid, and valid positions come first.
        Raises:
            ValueError: nothing was given, or lists of different lengths, or text that cannot be used.
            MediaError: an audio or video that cannot be used; the message has its number, and its path if it has one.
        """
        arguments = {"text": text, "audio": audio, "videos": videos}
        # a string, path, tensor or array is a single item
        given = {
            name: list(items) if isinstance(items, list | tuple) else [items]
            for name, items in arguments.items()
            if items is not None
        }
        counts = {name: len(items) for name, items in given.items()}
        if not counts:
            raise ValueError("nothing to process: pass at least one of text=, audio= and videos=")
        if len(set(counts.values())) > 1 or 0 in counts.values():
            listed = ", ".join(f"{count} of {name}" for name, count in counts.items())
            raise ValueError(
                f"got {listed}; pass equally many of each, and at least one: row i of the batch is item i of each"
            )

        batch = Batch()
        if "text" in given:
            batch |= self.batch_text(given["text"])
        if "audio" in given:
            items = _map("audio", given["audio"], lambda item: self.audio_item(item, sampling_rate, max_seconds))
            batch |= self.batch_audio(items)
        if "videos" in given:
            items = _map("videos", given["videos"], lambda item: self.video_item(item, max_seconds))
            batch |= self.batch_videos(items)
        return batch

    def audio_item(
        self,
        audio: Media,
        sampling_rate: int | None = None,
        max_seconds: float | None = None,
        start: float = 0.0,
        end: float | None = None,
    ) -> Tensor:
        """One audio as the codec reads it: mono, at the model's rate, in whole hops.

        Args:
            audio: path of a media file; or (samples,) or (channels, samples), either floating point in [-1, 1], or
                int16 or int32 at full scale.
            sampling_rate: Hz, required for a waveform. A file knows its own.
            max_seconds: longest duration to read.
            start, end: segment of a file, in seconds. The result is that of resampling the whole file and cutting then.
        Returns:
            (samples,) float32, padded on the right by reflection to a multiple of the codec's hop.
        Raises:
            MediaError: the audio cannot be used.
        """
        check_segment(start, end, max_seconds)
        if max_seconds is not None:
            end = min(start + max_seconds, math.inf if end is None else end)
        is_file = isinstance(audio, str | Path)
        name = f"{audio}: " if is_file else ""
        if is_file:
            # begin at a whole second, where samples of both rates coincide, and read on both sides what the filter of
            # the resampling reaches
            begin = max(math.floor(start - FILTER_REACH), 0)
            waveform, rate = read_audio(audio, start=begin, end=None if end is None else end + FILTER_REACH)
            if not MIN_RATE <= rate <= MAX_RATE:
                limits = f"{MIN_RATE} and {MAX_RATE} Hz"
                raise MediaError(f"{name}its rate of {rate} Hz is not between {limits}; resample it or leave it out")
        else:
            if start:
                raise ValueError("start= is for files; cut a waveform before passing it")
            begin = 0
            waveform, rate = to_waveform(audio), to_rate(sampling_rate)
            if end is not None:
                waveform = waveform[:, : max(round((end + FILTER_REACH) * rate), 1)]
        waveform = waveform.mean(dim=0)
        peak = waveform.abs().max().item()  # NaN or Inf if there is any
        if not math.isfinite(peak):
            raise MediaError(f"{name}has samples that are NaN or Inf; repair it or leave it out")
        if peak > 10:  # loud music exceeds 1, but not by this much
            raise MediaError(f"{name}samples reach {peak:.0f}, but full scale is [-1, 1]; divide them or pass int16")
        codec = self.config.audio.codec
        waveform = resample(waveform, rate, codec.sampling_rate)
        first = round((start - begin) * codec.sampling_rate)
        length = None if end is None else max(round((end - start) * codec.sampling_rate), 1)
        waveform = waveform[first:][:length]
        if len(waveform) == 0:
            raise MediaError(f"{name}the audio track ends before {start:g} s; correct start or leave the clip out")
        return pad_to_hops(waveform, codec.hop_length)

    def video_item(
        self, video: "Media | Image", max_seconds: float | None = None, start: float = 0.0, end: float | None = None
    ) -> Tensor:
        """The frames of one video as the model samples them, as bytes, squashed to the model's square.

        Args:
            video: path of a media file, or (F, 3, H, W) or (F, H, W, 3) uint8. An image is a video of one frame: path
                of an image, PIL image, or (3, H, W) or (H, W, 3) uint8. A file is sampled by the model's
                `num_frames` or `frames_per_second`. A tensor's frame rate is unknown, so only `num_frames` applies to
                it: pass frames at the model's rate.
            max_seconds: longest duration to read of a file.
            start, end: segment of a file, in seconds.
        Returns:
            (F, 3, S, S) uint8.
        Raises:
            MediaError: the video cannot be used.
            ValueError: the model has no video.
        """
        if isinstance(self.config, PEAudioFrameConfig):
            raise ValueError("PEAudioFrame reads only text and audio: leave videos= out")
        config = self.config.video
        if isinstance(video, str | Path):
            sampling = (config.num_frames, config.frames_per_second)
            chunks = iter_frames(video, *sampling, max_seconds, start, end, self.reader)
        else:
            frames = to_frames(video)
            if config.num_frames is not None:
                frames = frames[spread_indices(len(frames), config.num_frames)]
            chunks = iter(frames.split(CHUNK))
        size = [config.vision.image_size] * 2
        resized = [F.interpolate(chunk, size, mode="bilinear", antialias=True) for chunk in chunks]
        return torch.cat(resized).contiguous()

    def batch_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions -> `input_ids` and `attention_mask` (B, T), padded on the right to the longest.

        The tokenizer puts its special tokens around the words and cuts them to the model's `max_tokens`.

        Raises:
            ValueError: a caption that is empty or not a string, no tokenizer, or another model's tokenizer.
        """
        if self._encoder is None:
            raise ValueError(
                "text needs a tokenizer, and this processor has none: put tokenizer.json into its folder, beside "
                "config.yaml, or pass tokenizer= to Processor"
            )
        rows = []
        for index, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise ValueError(f"text[{index}] is of type {type(caption).__name__}; pass a string")
            # one by one, because encode_batch starts threads, after which a data loader cannot fork safely
            ids = self._encoder.encode(caption, add_special_tokens=True).ids if caption.strip() else []
            if not ids:
                raise ValueError(f"text[{index}] is empty; pass a caption or leave the item out")
            if max(ids) >= self.config.text.vocab_size:
                raise ValueError(
                    f"text[{index}] has token id {max(ids)}, but the model's vocabulary ends at "
                    f"{self.config.text.vocab_size - 1}: tokenizer.json is another model's, replace it by this model's"
                )
            rows.append(torch.tensor(ids))
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self.config.text.pad_token_id),
            "attention_mask": mask_of(rows),
        }

    def batch_audio(self, waveforms: Sequence[Tensor]) -> dict[str, Tensor]:
        """Waveforms of `audio_item` -> `input_values` (B, 1, samples), zero-padded, and `padding_mask` (B, samples)."""
        values = pad_sequence(list(waveforms), batch_first=True)
        return {"input_values": rearrange(values, "b s -> b 1 s"), "padding_mask": mask_of(waveforms)}

    def batch_videos(self, videos: Sequence[Tensor]) -> dict[str, Tensor]:
        """Frames of `video_item` -> `pixel_values_videos` (B, F, 3, S, S), scaled to [-1, 1] and zero-padded, and
        `padding_mask_videos` (B, F)."""
        mask = mask_of(videos)
        values = torch.zeros(*mask.shape, *videos[0].shape[1:])
        for row, frames in zip(values, videos, strict=True):
            row[: len(frames)] = scale_frames(frames)
        return {"pixel_values_videos": values, "padding_mask_videos": mask}


def mask_of(rows: Sequence[Tensor]) -> Tensor:
    """(B, longest) bool, True where a row has a value, for rows that will be padded on the right."""
    lengths = torch.tensor([len(row) for row in rows])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def _map(modality: str, items: list, process: Callable[[Any], Tensor]) -> list[Tensor]:
    """Every item processed; an error says which item it was."""
    results = []
    for index, item in enumerate(items):
        try:
            results.append(process(item))
        except MediaError as error:
            raise type(error)(f"{modality}[{index}]: {error}") from error  # a MissingTrackError stays one
    return results
