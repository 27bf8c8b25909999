"""Files to tensors: the audio track, and the frames that a model samples.

PyAV reads audio and says when each frame is on screen; decord decodes the frames of the files that it reads exactly as
PyAV does, and PyAV those of all others. So what comes back does not depend on whether decord is installed. decord 0.6.0
needs that care: read here and there, files with open groups of pictures (the default of x265) or B-frames in AVI give
it wrong frames, and edit lists, AV1, more than 8 bits and frames 48 pixels wide it gets wrong or refuses.

Decoders are imported when first used and files opened in the process that reads them, which is what lets the workers of
a data loader be forked. One thread each: the workers are the parallelism.
"""

import math
import os
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


def read_audio(path: str | Path, max_seconds: float | None = None) -> tuple[Tensor, int]:
    """The audio track of a media file, as it is: own rate, own channels.

    Args:
        max_seconds: read this much from the start, and do not decode the rest.
    Returns:
        (channels, samples) float32 in [-1, 1], and the rate in Hz.
    Raises:
        MediaError: no such file, not media, damaged, without an audio track, or with an empty one.
    """
    require_positive(max_seconds=max_seconds)
    blocks: list[Tensor] = []
    rate, count = 0, 0
    with _opened(path, "audio") as (container, stream):
        for frame in container.decode(stream):
            block = _float_samples(frame)
            if blocks and (frame.sample_rate != rate or len(block) != len(blocks[0])):
                raise MediaError(f"{path}: rate or channels change midway; re-encode it with fixed ones")
            rate = frame.sample_rate
            blocks.append(block)
            count += block.shape[1]
            if max_seconds is not None and count >= max_seconds * rate:
                break
    if count == 0:
        raise MediaError(f"{path}: the audio track is empty; give the clip in videos= only, or leave it out")
    limit = count if max_seconds is None else max(round(max_seconds * rate), 1)
    return torch.cat(blocks, dim=1)[:, :limit], rate


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
) -> Tensor:
    """Frames of a video file, upright and in RGB, at the file's own size.

    Args:
        num_frames: spread over the clip by `spread_indices`.
        frames_per_second: instead, those that `rate_indices` gives from the frames' own times. Neither: every frame.
        max_seconds: take only what comes on screen in this time from the first frame on.
    Returns:
        (F, 3, H, W) uint8; a picture is a clip of one frame.
    Raises:
        MediaError: no such file, not media, damaged where a wanted frame is, or without a video track.
    """
    return torch.cat(list(iter_frames(path, num_frames, frames_per_second, max_seconds)))


def iter_frames(
    path: str | Path,
    num_frames: int | None = None,
    frames_per_second: float | None = None,
    max_seconds: float | None = None,
) -> Iterator[Tensor]:
    """As `read_frames`, in pieces of at most `CHUNK` frames: a long clip need not fit into memory at its own size."""
    require_positive(num_frames=num_frames, frames_per_second=frames_per_second, max_seconds=max_seconds)
    if num_frames is not None and frames_per_second is not None:
        raise ValueError("num_frames and frames_per_second are two ways to sample: give one")
    timeline = _timeline(path, max_seconds)
    if num_frames is not None:
        index = spread_indices(len(timeline.starts), num_frames)
    elif frames_per_second is not None:
        index = rate_indices(timeline.starts, timeline.end, frames_per_second)
    else:
        index = list(range(len(timeline.starts)))

    done = 0
    if timeline.suits_decord:
        for frames in _decord_frames(path, timeline, index):
            yield frames
            done += len(frames)
    if done < len(index):  # no decord, or it gave up: PyAV goes on from there, or says what is wrong
        yield from _av_frames(path, [timeline.stamps[i] for i in index[done:]])


class _Packet(NamedTuple):
    stamp: int  # when its frame comes on screen, in the stream's own unit
    duration: int  # 0 where the file does not say
    is_key: bool  # can be decoded without the ones before it
    is_discard: bool  # to be decoded and not shown: an edit list cuts it away


class _Timeline(NamedTuple):
    stamps: list[int]  # of every frame, ascending, in the stream's own unit: what a decoded frame is recognized by
    starts: list[Fraction]  # the same in seconds from the first frame
    end: Fraction  # when the last frame leaves the screen
    suits_decord: bool  # decord reads this file as we do


def _timeline(path: str | Path, max_seconds: float | None) -> _Timeline:
    """When each frame of the first `max_seconds` is on screen, from the packets alone: nothing is decoded."""
    packets: list[_Packet] = []  # in the file's order, which is the decoder's
    limit = math.inf if max_seconds is None else _exact(max_seconds)
    with _opened(path, "video") as (container, stream):
        unit = stream.time_base
        pixel = stream.codec_context.format
        suits_decord = pixel is not None and all(component.bits == 8 for component in pixel.components)
        earliest = math.inf
        for packet in container.demux(stream):
            if packet.size == 0:  # PyAV's mark of the end
                continue
            if packet.pts is None:
                raise MediaError(f"{path}: frames carry no time; re-encode it, e.g. as MP4")
            packets.append(_Packet(packet.pts, packet.duration or 0, packet.is_keyframe, packet.is_discard))
            earliest = min(earliest, packet.pts)
            # decoding times only grow and no frame is shown before it is decoded: all that follows is too late
            if packet.dts is not None and (packet.dts - earliest) * unit >= limit:
                suits_decord = False  # it would read the whole of a file of which we want the beginning
                break

    # a recording cut from a stream begins in the middle of a group of pictures, which nothing can decode
    first = next((packet.stamp for packet in packets if packet.is_key), earliest)
    shown = sorted(packet for packet in packets if packet.stamp >= first and not packet.is_discard)
    if not shown:
        raise MediaError(f"{path}: the video track is empty; give the clip in audio= only, or leave it out")
    # decord counts every packet as a frame, and keyframes where they come in the file instead of on the screen
    suits_decord = suits_decord and len(shown) == len(packets)
    suits_decord = suits_decord and all(a.stamp == b.stamp for a, b in zip(packets, shown, strict=True) if a.is_key)

    stamps = [packet.stamp for packet in shown]
    # without a duration in the file the last frame stays as long as the one before it, or for one unit
    last = shown[-1].duration or (stamps[-1] - stamps[-2] if len(stamps) > 1 else 1)
    starts = [(stamp - stamps[0]) * unit for stamp in stamps]
    kept = sum(start < limit for start in starts)
    return _Timeline(stamps[:kept], starts[:kept], min(starts[-1] + last * unit, limit), suits_decord)


def _decord_frames(path: str | Path, timeline: _Timeline, index: list[int]) -> Iterator[Tensor]:
    """(<= CHUNK, 3, H, W) pieces of the frames at `index`, as far as decord gets."""
    try:
        import decord
    except ImportError:
        return
    try:
        # fault_tol: an undecodable frame is an error, not a copy of its neighbour
        reader = decord.VideoReader(os.path.abspath(path), ctx=decord.cpu(0), num_threads=1, fault_tol=0.0001)
        starts = reader.get_frame_timestamp(range(len(reader)))[:, 0]  # float32 seconds
        ours = np.array([float(start) for start in timeline.starts])
        if len(starts) < len(ours) or not np.allclose(starts[: len(ours)], ours, atol=1e-3):
            return
        for at in range(0, len(index), CHUNK):
            frames = torch.from_numpy(reader.get_batch(index[at : at + CHUNK]).asnumpy())
            yield rearrange(frames, "f h w c -> f c h w")
    except Exception:  # of half a dozen types; PyAV, which comes next, does better or knows the reason
        return


def _av_frames(path: str | Path, stamps: list[int]) -> Iterator[Tensor]:
    """(<= CHUNK, 3, H, W) pieces of the frames with these stamps, which ascend and may repeat."""
    pictures = _av_pictures(path, stamps)
    while piece := list(islice(pictures, CHUNK)):
        yield rearrange(torch.from_numpy(np.stack(piece)), "f h w c -> f c h w")


def _av_pictures(path: str | Path, stamps: list[int]) -> Iterator[np.ndarray]:
    """The (H, W, 3) picture for each stamp; the frames between them are decoded but not converted."""
    from av.video.reformatter import VideoReformatter

    # one for all frames: `frame.to_ndarray(format="rgb24")` sets a converter up anew for each, at six times the cost
    reformatter = VideoReformatter()
    with _opened(path, "video") as (container, stream):
        decoded = (frame for frame in container.decode(stream) if frame.pts is not None)
        now, picture = None, None
        for stamp in stamps:
            while now is None or now < stamp:
                frame = next(decoded, None)
                now, picture = math.inf if frame is None else frame.pts, None
            if now != stamp:
                when = float(stamp * stream.time_base)
                raise MediaError(f"{path}: damaged, no frame decodes at {when:.2f} s; re-encode it or leave it out")
            if picture is None:
                size = (stream.codec_context.width, stream.codec_context.height)
                rgb = reformatter.reformat(frame, *size, format="rgb24", threads=1).to_ndarray()
                picture = np.rot90(rgb, round(frame.rotation / 90))  # filmed with the camera on its side
            yield picture


@contextmanager
def _opened(path: str | Path, kind: str) -> Iterator[tuple[Any, Any]]:
    """PyAV's container of a file and its best "audio" or "video" stream; any complaint of FFmpeg is a `MediaError`."""
    import av

    if not os.path.isfile(path):
        raise MediaError(f"{path}: no such file")
    try:
        # absolute: FFmpeg would take "a:b.mp4" for a protocol; tags in an unknown encoding are nothing to us
        with av.open(os.path.abspath(path), metadata_errors="ignore") as container:
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


def require_positive(**values: float | None) -> None:
    """Raise `ValueError` for a named limit that is given and not above zero."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} is not positive; leave it out to take all")
