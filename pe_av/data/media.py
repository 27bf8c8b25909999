"""Files to tensors: the audio track, and the frames that a model samples, of a whole file or of a part of it.

PyAV, which carries its own FFmpeg, reads everything. Which frames there are and when each is on screen comes from the
packets alone, so that only the wanted frames are converted, and long stretches between them are passed by seeking. A
seek that does not arrive where it should is not believed: the file is then decoded from its beginning.

A source is the path of a file, or `SHARD.tar#OFFSET+SIZE`: the file that lies there inside an uncompressed tar, which
FFmpeg reads in place.

PyAV is imported when first used and files are opened in the process that reads them, so that the workers of a data
loader can be forked. One thread each: the workers are the parallelism.
"""

import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

CHUNK = 32  # frames that are decoded before the next are asked for: at full HD 0.2 GB


PREROLL = 1.0  # seconds decoded before a part: after a seek, decoders need a few blocks until their output is right
SEEKABLE = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "wav", "flac", "ogg"}  # formats whose times survive a seek
MEMBER = re.compile(r"(.+\.tar)#(\d+)\+(\d+)", re.DOTALL)  # a file inside a tar, by its offset and size in bytes


class MediaError(ValueError):
    """An item that cannot be used; the one-line message names it and the remedy."""


# ---------------------------------------------------------------------------------------------------------------------
# which frames: the rules, on numbers alone


def spread_indices(total: int, count: int) -> list[int]:
    """`count` of `total` frames, evenly from the first to the last: int(i·(total − 1)/(count − 1)).

    With count 16 this is the published rule int(i·(n − 1)/15). Too few frames repeat; count 1 gives [0].
    """
    return [i * (total - 1) // max(count - 1, 1) for i in range(count)]


def rate_indices(starts: Sequence[Fraction], end: Fraction, rate: float) -> list[int]:
    """The frame on screen at 0, 1/rate, 2/rate … seconds, for as long as the clip lasts.

    Args:
        starts: when each frame comes on screen, in seconds, ascending from 0. Exact numbers: a file of 25 frames per
            second read at 25 gives every frame once, where floating point would repeat some and lose others.
        end: when the last one leaves it.
        rate: frames per second.
    """
    # the first tick at or after each change of frame
    ticks = [math.ceil(time * _exact(rate)) for time in (*starts, end)]
    return [index for index, (first, after) in enumerate(pairwise(ticks)) for _ in range(first, after)]


def _exact(value: float) -> Fraction:
    """The fraction that is meant: 0.1 is a tenth, 23.976023976023978 is 24000/1001."""
    return Fraction(float(value)).limit_denominator(10**9)


# ---------------------------------------------------------------------------------------------------------------------
# audio


def read_audio(
    path: str | Path, max_seconds: float | None = None, start: float = 0.0, end: float | None = None
) -> tuple[Tensor, int]:
    """The audio track of a media file, as it is: own rate, own channels.

    Args:
        max_seconds: read this much at most, and do not decode the rest.
        start, end: the part to read, in seconds from where the earliest track of the file begins; end None: to the
            end. The part is sought, not decoded towards, where the format allows it.
    Returns:
        (channels, samples) float32 in [-1, 1], and the rate in Hz.
    Raises:
        MediaError: no such file, not media, damaged, without an audio track, or with nothing in it between start and
            end.
    """
    check_part(start, end, max_seconds)
    for seek in _ways(start):
        blocks: list[Tensor] = []
        with _opened(path, "audio") as (container, stream):
            zero = _begin(container)
            if seek and not _seek(container, stream, zero + _exact(start - PREROLL)):
                continue
            rate, at, first, stop = 0, 0, 0, math.inf  # positions in samples on the file's clock
            for frame in container.decode(stream):
                block = _float_samples(frame)
                if not rate:
                    rate, channels = frame.sample_rate, len(block)
                    at = 0 if frame.pts is None else round((frame.pts * stream.time_base - zero) * rate)
                    first = at if start == 0 else max(round(start * rate), at)
                    stop = math.inf if end is None else round(end * rate)
                    stop = stop if max_seconds is None else min(stop, first + max(round(max_seconds * rate), 1))
                if frame.sample_rate != rate or len(block) != channels:
                    raise MediaError(f"{path}: rate or channels change midway; re-encode it with fixed ones")
                if at + block.shape[1] > first:  # what comes before the part is not kept
                    blocks.append(block[:, max(first - at, 0) : min(stop - at, block.shape[1])])
                at += block.shape[1]
                if at >= stop:
                    break
        if seek and (not blocks or first > round(start * rate)):
            continue  # arrived too late
        if not blocks or blocks[0].shape[1] == 0:
            where = f" after {start:g} s" if start else ""
            raise MediaError(f"{path}: the audio track is empty{where}; give the clip in videos= only, or leave it out")
        return torch.cat(blocks, dim=1), rate
    raise AssertionError("the last way is without seeking, and returns or raises")


def _float_samples(frame: Any) -> Tensor:
    """(channels, samples) of a PyAV frame in any of FFmpeg's sample formats; full scale becomes 1."""
    samples = torch.from_numpy(frame.to_ndarray())  # planar: (channels, samples); packed: (1, samples·channels)
    if not frame.format.is_planar:
        samples = rearrange(samples, "1 (s c) -> c s", c=frame.layout.nb_channels)
    if samples.dtype == torch.uint8:  # the one unsigned format, silent at 128
        return (samples.float() - 128) / 128
    scale = 1.0 if samples.is_floating_point() else -float(torch.iinfo(samples.dtype).min)
    return samples.float() / scale


# ---------------------------------------------------------------------------------------------------------------------
# frames


def read_frames(
    path: str | Path,
    num_frames: int | None = None,
    frames_per_second: float | None = None,
    max_seconds: float | None = None,
    start: float = 0.0,
    end: float | None = None,
) -> Tensor:
    """Frames of a video file, upright and in RGB, at the file's own size.

    Args:
        num_frames: spread over the clip by `spread_indices`.
        frames_per_second: instead, those that `rate_indices` gives from the frames' own times. Neither: every frame.
        max_seconds: take only what comes on screen in this time from the first frame on.
        start, end: the part to take, in seconds from where the earliest track of the file begins: all frames that are
            on screen in it, so its first frame is the one that is there at `start`. The part is sought where the
            format allows it.
    Returns:
        (F, 3, H, W) uint8; a picture is a clip of one frame.
    Raises:
        MediaError: no such file, not media, damaged where a wanted frame is, or without a frame between start and end.
    """
    return torch.cat(list(iter_frames(path, num_frames, frames_per_second, max_seconds, start, end)))


def iter_frames(
    path: str | Path,
    num_frames: int | None = None,
    frames_per_second: float | None = None,
    max_seconds: float | None = None,
    start: float = 0.0,
    end: float | None = None,
) -> Iterator[Tensor]:
    """As `read_frames`, in pieces of at most `CHUNK` frames: a long clip need not fit into memory at its own size."""
    check_part(start, end, max_seconds)
    require_positive(num_frames=num_frames, frames_per_second=frames_per_second)
    if num_frames is not None and frames_per_second is not None:
        raise ValueError("num_frames and frames_per_second are two ways to sample: give one")
    timeline = _timeline(path, start, end, max_seconds)
    if num_frames is not None:
        index = spread_indices(len(timeline.starts), num_frames)
    elif frames_per_second is not None:
        index = rate_indices(timeline.starts, timeline.end, frames_per_second)
    else:
        index = list(range(len(timeline.starts)))
    pictures = _pictures(path, [timeline.stamps[i] for i in index], timeline.keys)
    while piece := list(islice(pictures, CHUNK)):
        yield rearrange(torch.from_numpy(np.stack(piece)), "f h w c -> f c h w")


class _Packet(NamedTuple):
    stamp: int  # when its frame comes on screen, in the stream's own unit
    duration: int  # 0 where the file does not say
    is_key: bool  # can be decoded without the ones before it
    is_discard: bool  # to be decoded and not shown: an edit list cuts it away


class _Timeline(NamedTuple):
    stamps: list[int]  # of every frame of the part, ascending, in the stream's own unit: it tells a decoded frame
    starts: list[Fraction]  # when each comes on screen, in seconds from the first
    end: Fraction  # when the last frame leaves the screen, likewise
    keys: list[int]  # stamps of the frames that decoding can begin with


def _timeline(path: str | Path, start: float, end: float | None, max_seconds: float | None) -> _Timeline:
    """When each frame of the part is on screen, from the packets alone: nothing is decoded."""
    for seek in _ways(start):
        packets: list[_Packet] = []  # in the file's order, which is the decoder's
        with _opened(path, "video") as (container, stream):
            unit, zero = stream.time_base, _begin(container)
            if seek and not _seek(container, stream, zero + _exact(start - PREROLL)):
                continue
            begin = zero + _exact(start) if start else None  # None: where the first frame is
            limit = math.inf if end is None else zero + _exact(end)
            longest = math.inf if max_seconds is None else _exact(max_seconds)
            earliest = math.inf
            for packet in container.demux(stream):
                if packet.size == 0:  # PyAV's mark of the end
                    continue
                if packet.pts is None:
                    raise MediaError(f"{path}: frames carry no time; re-encode it, e.g. as MP4")
                packets.append(_Packet(packet.pts, packet.duration or 0, packet.is_keyframe, packet.is_discard))
                earliest = min(earliest, packet.pts)
                # decoding times only grow and no frame is shown before it is decoded: all that follows is too late
                last = min(limit, longest + max(earliest * unit, begin or -math.inf))
                if packet.dts is not None and packet.dts * unit >= last:
                    break
        # a recording cut from a stream begins in the middle of a group of pictures, which nothing can decode
        keys = sorted(packet.stamp for packet in packets if packet.is_key)
        first = keys[0] if keys else earliest
        if not (seek and first * unit > begin):  # else the seek arrived too late
            break

    shown = sorted(packet for packet in packets if packet.stamp >= first and not packet.is_discard)
    if not shown:
        raise MediaError(f"{path}: the video track is empty; give the clip in audio= only, or leave it out")
    stamps = [packet.stamp for packet in shown]
    # without a duration in the file the last frame stays as long as the one before it, or for one unit
    last = shown[-1].duration or (stamps[-1] - stamps[-2] if len(stamps) > 1 else 1)
    times = [stamp * unit for stamp in (*stamps, stamps[-1] + last)]
    begin = times[0] if begin is None else max(begin, times[0])
    limit = min(limit, begin + longest, times[-1])
    kept = [i for i, (on, off) in enumerate(pairwise(times)) if off > begin and on < limit]
    if not kept:
        raise MediaError(f"{path}: the video track ends before {start:g} s; correct start, or leave the clip out")
    starts = [max(times[i] - begin, Fraction(0)) for i in kept]
    return _Timeline([stamps[i] for i in kept], starts, limit - begin, keys)


def _pictures(path: str | Path, stamps: list[int], keys: list[int]) -> Iterator[np.ndarray]:
    """The (H, W, 3) picture for each stamp; stamps ascend and may repeat."""
    done = 0
    for shortcuts in (True, False):
        try:
            for picture in _decoded(path, stamps[done:], keys, shortcuts):
                done += 1
                yield picture
            return
        except _ShortcutError:
            pass  # and now what is left, from the beginning


class _ShortcutError(Exception):
    """After a shortcut, a frame did not come that the packets promise."""


def _decoded(path: str | Path, stamps: list[int], keys: list[int], shortcuts: bool) -> Iterator[np.ndarray]:
    """As `_pictures`.

    Shortcuts are to seek the keyframe before a stamp where that leaves out more than `PREROLL`, and not to decode what
    is not wanted and nothing depends on. What else comes between the wanted frames is decoded and not converted.
    """
    from av.video.reformatter import VideoReformatter

    # one for all frames: `frame.to_ndarray(format="rgb24")` sets a converter up anew for each, at six times the cost
    reformatter = VideoReformatter()
    with _opened(path, "video") as (container, stream):
        unit = stream.time_base
        wanted = set(stamps) if shortcuts else None
        decoded = _decode(container, stream, wanted)
        now, picture = -math.inf, None
        reached = _begin(container)  # seconds: how far decoding has come
        for stamp in stamps:
            nearest = bisect_right(keys, stamp) - 1
            far = shortcuts and nearest >= 0 and keys[nearest] * unit - reached > PREROLL
            if far and _seek(container, stream, keys[nearest] * unit):
                decoded = _decode(container, stream, wanted)
            while now < stamp:
                frame = next(decoded, None)
                if frame is not None and frame.pts is None:
                    continue
                now, picture = math.inf if frame is None else frame.pts, None
            if now != stamp:
                if shortcuts:
                    raise _ShortcutError
                when = float(stamp * unit)
                raise MediaError(f"{path}: damaged, no frame decodes at {when:.2f} s; re-encode it or leave it out")
            reached = now * unit
            if picture is None:
                size = (stream.codec_context.width, stream.codec_context.height)
                rgb = reformatter.reformat(frame, *size, format="rgb24", threads=1).to_ndarray()
                picture = np.rot90(rgb, round(frame.rotation / 90))  # filmed with the camera on its side
            yield picture


def _decode(container: Any, stream: Any, wanted: set[int] | None) -> Iterator[Any]:
    """The frames from here on. Of those whose stamp is not wanted, the ones that no other refers to may be missing:
    in H.264 they are marked, and are up to half of all. (In HEVC the mark is only about frames of the same layer.)"""
    context = stream.codec_context
    for packet in container.demux(stream):
        if wanted is not None and context.name == "h264":
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        yield from packet.decode()


# ---------------------------------------------------------------------------------------------------------------------
# files


def source_path(source: str | Path) -> str:
    """The file that a source lies in: itself, or the tar that holds it."""
    member = MEMBER.fullmatch(str(source))
    return member[1] if member else str(source)


def probe(path: str | Path) -> dict[str, float | None]:
    """Which of the tracks "audio" and "video" a source has, each with its seconds as the header says them, or None.

    Raises:
        MediaError: it cannot be opened, or has neither.
    """
    found: dict[str, float | None] = {}
    errors = []
    for kind in ("audio", "video"):
        try:
            with _opened(path, kind) as (container, stream):
                if stream.duration is not None:
                    found[kind] = float(stream.duration * stream.time_base)
                else:
                    found[kind] = None if container.duration is None else container.duration / 1_000_000
        except MediaError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


@contextmanager
def _opened(path: str | Path, kind: str) -> Iterator[tuple[Any, Any]]:
    """PyAV's container of a source and its best "audio" or "video" stream; FFmpeg's complaints become `MediaError`."""
    import av

    try:
        with av.open(
            _url(path), metadata_errors="ignore"
        ) as container:  # tags in an unknown encoding are nothing to us
            if container.format.name == "tty":  # FFmpeg would draw a text file as a terminal does
                raise MediaError(f"{path}: a text file, not media; give captions in text=")
            stream = container.streams.best(kind)
            # the cover of a record is no video
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                other = "videos" if kind == "audio" else "audio"
                raise MediaError(f"{path}: has no {kind} track; give the clip in {other}= only, or leave it out")
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.FFmpegError as error:
        reason = error.strerror or type(error).__name__
        raise MediaError(f"{path}: not a media file, or damaged ({reason}); re-encode it or leave it out") from error


def _url(source: str | Path) -> str:
    """What FFmpeg calls a source; absolute, or it would take "a:b.mp4" for a protocol."""
    file = os.path.abspath(source_path(source))
    if not os.path.isfile(file):
        raise MediaError(f"{source}: no such file")
    member = MEMBER.fullmatch(str(source))
    if member is None:
        return file
    first, after = int(member[2]), int(member[2]) + int(member[3])
    if os.path.getsize(file) < after:
        raise MediaError(f"{source}: torn, the tar ends before the file in it does; pack it again")
    return f"subfile,,start,{first},end,{after},,:{file}"


def _begin(container: Any) -> Fraction:
    """Seconds on the tracks' clocks at which the earliest of them begins."""
    return Fraction(max(container.start_time or 0, 0), 1_000_000)  # below zero is what decoders drop, not played


def _ways(start: float) -> tuple[bool, ...]:
    """Whether to seek, in the order to try."""
    return (True, False) if start > PREROLL else (False,)


def _seek(container: Any, stream: Any, seconds: Fraction) -> bool:
    """Go to the keyframe at or before `seconds` on the track's clock; False: this format has no exact way to."""
    if container.format.name not in SEEKABLE:
        return False
    container.seek(int(seconds / stream.time_base), stream=stream)
    return True


def check_part(start: float, end: float | None, max_seconds: float | None) -> None:
    """Raise `ValueError` unless these limit a part of a file."""
    require_positive(max_seconds=max_seconds)
    if not 0 <= start < math.inf:
        raise ValueError(f"start={start} is not a time in seconds from the beginning of the file")
    if end is not None and not end > start:
        raise ValueError(f"end={end} is not after start={start}")


def require_positive(**values: float | None) -> None:
    """Raise `ValueError` for a named limit that is given and not above zero."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} is not positive; leave it out to take all")
