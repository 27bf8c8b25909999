"""Audio: reading the track of a file, resampling it, and padding it to what the codec takes."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torchaudio.functional as AF
from einops import rearrange
from torch import Tensor

from pe_av.media.tracks import TOGETHER, MediaError, check_segment, open_track

MAX_SILENCE = 3600  # seconds of silence beside a video; damaged timestamps can ask for centuries


def read_audio(
    source: str | Path, max_seconds: float | None = None, start: float = 0.0, end: float | None = None
) -> tuple[Tensor, int]:
    """The audio of a media file or of a segment of it, with the file's own rate and channels.

    Silence fills the time in which the file has video but no audio (see `tracks`).

    Args:
        source: path of a file, or of a file inside a tar (see `tracks`).
        max_seconds: longest duration to read; what comes later is not decoded.
        start, end: the segment, in seconds on the file's clock; end None: to the end of the file. It is found by
            seeking where the format allows it.
    Returns:
        (channels, samples) float32 in [-1, 1], and the sampling rate in Hz.
    Raises:
        MissingTrackError: the file has no audio track, or an empty one.
        MediaError: no such file, not media, damaged, or nothing between start and end.
    """
    check_segment(start, end, max_seconds)
    limits = (max_seconds, start, end)
    return _read_audio(source, *limits, seek=True) or _read_audio(source, *limits, seek=False)


def _read_audio(
    source: str | Path, max_seconds: float | None, start: float, end: float | None, seek: bool
) -> tuple[Tensor, int] | None:
    """As `read_audio`; None if a seek did not arrive before the segment, so the file has to be read without seeking."""
    blocks: list[Tensor] = []
    with open_track(source, "audio") as track:
        sought = seek and track.seek_segment(start)
        rate = channels = 0
        # numbers of samples on the file's clock: of the next block, and of the segment's begin and end
        now = begin = 0
        stop: float = math.inf
        for frame in (frame for packet in track.packets() for frame in packet.decode()):
            block = _to_float(frame)
            if not rate:
                rate, channels = frame.sample_rate, len(block)
                now = 0 if frame.pts is None else round((frame.pts * track.stream.time_base - track.zero) * rate)
                begin = round(start * rate) if start else min(now, 0)
                if track.other is None:
                    begin = max(begin, now)
                stop = math.inf if end is None else round(end * rate)
                stop = stop if max_seconds is None else min(stop, begin + max(round(max_seconds * rate), 1))
                if sought and now > begin:
                    return None
                blocks += _silence(source, channels, min(now, stop) - begin, rate)
            if frame.sample_rate != rate or len(block) != channels:
                raise MediaError(f"{source}: its sampling rate or channels change midway; re-encode it with fixed ones")
            if begin - block.shape[1] < now < stop:
                blocks.append(block[:, max(begin - now, 0) : min(stop - now, block.shape[1])])
            now += block.shape[1]
            if now >= stop:
                break
    if sought and not blocks:
        return None
    if not rate:
        raise track.empty_error(source)
    gap = min(stop, round((track.other_end - track.zero) * rate)) - max(now, begin)
    if not blocks or gap > TOGETHER * rate:
        blocks += _silence(source, channels, gap, rate)
    if not blocks:
        raise MediaError(f"{source}: the audio track ends before {start:g} s; correct start or leave the clip out")
    return torch.cat(blocks, dim=1), rate


def _silence(source: str | Path, channels: int, samples: int, rate: int) -> list[Tensor]:
    """One block of so many samples, or no block if there are none to fill."""
    if samples > MAX_SILENCE * rate:
        raise MediaError(
            f"{source}: {samples / rate:.0f} s of its video have no audio, so its timestamps are probably damaged; "
            "re-encode it or use a shorter segment"
        )
    return [torch.zeros(channels, samples)] if samples > 0 else []


def _to_float(frame: Any) -> Tensor:
    """PyAV's audio frame in any of FFmpeg's sample formats -> (channels, samples) float32; full scale becomes 1."""
    samples = torch.from_numpy(frame.to_ndarray())  # planar: (channels, samples); packed: (1, samples·channels)
    if not frame.format.is_planar:
        samples = rearrange(samples, "1 (s c) -> c s", c=frame.layout.nb_channels)
    if samples.dtype == torch.uint8:  # the only unsigned format; 128 is silence
        return (samples.float() - 128) / 128
    scale = 1.0 if samples.is_floating_point() else -float(torch.iinfo(samples.dtype).min)
    return samples.float() / scale


def resample(waveform: Tensor, rate: int, target: int) -> Tensor:
    """(samples,) at `rate` Hz -> (samples',) at `target` Hz, by a windowed sinc."""
    # The kernel grows with the terms of the ratio; for 11,127 Hz it would take gigabytes. The usual rates, also times
    # 1000/1001 as in television, have small terms and stay exact. For odd rates, the rounded ratio changes the speed by
    # 0.05 % at most, and usually by a millionth.
    ratio = Fraction(target, rate).limit_denominator(1001)
    return AF.resample(waveform, ratio.denominator, ratio.numerator)


def pad_to_hops(waveform: Tensor, hop: int) -> Tensor:
    """(samples,) -> the same, padded on the right by reflection to a multiple of `hop`.

    As in `np.pad(mode="reflect")`, a short waveform is reflected again and again; torch's padding refuses that.
    """
    length = len(waveform)
    index = torch.arange(length, length + -length % hop)
    period = max(2 * (length - 1), 1)  # to the beginning and back, without repeating the ends; a lone sample repeats
    index = index % period
    return torch.cat([waveform, waveform[torch.minimum(index, period - index)]])
