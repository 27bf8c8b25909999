"""Reading the frames of a video that a model samples.

`timeline` says which they are. Only these are converted to RGB, and long stretches between them are skipped by seeking.
If a frame then does not arrive, the rest is decoded from the file's beginning without any shortcut.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from pe_av.media.readers import read_by
from pe_av.media.timeline import read_timeline, sample_stamps
from pe_av.media.tracks import MediaError, Track, check_positive, check_segment, open_track

CHUNK = 32  # frames that are handed over at a time
CHUNK_BYTES = CHUNK * 3 * 1920 * 1080  # and fewer if they are larger than full HD: 0.2 GB


def iter_frames(
    source: str | Path,
    num_frames: int | None = None,
    frames_per_second: float | None = None,
    max_seconds: float | None = None,
    start: float = 0.0,
    end: float | None = None,
    reader: str = "pyav",
) -> Iterator[Tensor]:
    """The frames of a video file or of a segment of it, upright, in RGB and at the file's own size.

    Args:
        source: path of a file, or of a file inside a tar (see `tracks`). An image is a video of one frame.
        num_frames, frames_per_second: how to sample, one at most; see `timeline.sample_stamps`.
        max_seconds: longest duration to read; what comes later is not decoded.
        start, end: the segment, in seconds on the file's clock; end None: to the end of the file. Its frames are all
            that are on screen in it, so the first is the one on screen at `start`. It is found by seeking where the
            format allows it.
        reader: what decodes the frames of an ordinary file: pyav, decord or torchcodec; see `readers`.
    Yields:
        (F, 3, H, W) uint8, with F at most `CHUNK`, so that a long video need not fit into memory at its own size.
    Raises:
        MissingTrackError: the file has no video track, or an empty one.
        MediaError: no such file, not media, damaged where a sampled frame is, or no frame between start and end.
    """
    check_segment(start, end, max_seconds)
    check_positive(num_frames=num_frames, frames_per_second=frames_per_second)
    if num_frames is not None and frames_per_second is not None:
        raise ValueError("num_frames and frames_per_second are two ways to sample: give one of them")
    timeline = read_timeline(source, start, end, max_seconds)
    stamps = sample_stamps(source, timeline, num_frames, frames_per_second)
    frames = _read_frames(source, stamps, timeline.keyframes, reader)
    shape = None
    for first in frames:
        chunk = [first, *islice(frames, min(CHUNK, max(CHUNK_BYTES // first.nbytes, 1)) - 1)]
        if any(frame.shape != (shape := shape or first.shape) for frame in chunk):
            raise MediaError(f"{source}: the size of the frames changes midway; re-encode it with one size")
        yield rearrange(torch.from_numpy(np.stack(chunk)), "f h w c -> f c h w")


class _ShortcutError(Exception):
    """A frame that the packets promise did not arrive after a shortcut."""


def _read_frames(source: str | Path, stamps: list[int], keyframes: list[int], reader: str) -> Iterator[np.ndarray]:
    """The (H, W, 3) frame for each timestamp; timestamps ascend and may repeat."""
    done = 0
    if reader != "pyav":
        for frame in read_by(reader, source, stamps):
            done += 1
            yield frame
        stamps, done = stamps[done:], 0
        if not stamps:
            return
    try:
        for frame in _decode_stamps(source, stamps, keyframes, shortcuts=True):
            done += 1
            yield frame
    except _ShortcutError:
        yield from _decode_stamps(source, stamps[done:], keyframes, shortcuts=False)


def _decode_stamps(
    source: str | Path, stamps: list[int], keyframes: list[int], shortcuts: bool
) -> Iterator[np.ndarray]:
    """As `_read_frames`. There are two shortcuts: seeking the keyframe before a distant frame, and not decoding frames
    that are neither sampled nor referred to."""
    from av.video.reformatter import VideoReformatter

    # `frame.to_ndarray(format="rgb24")` would set up a new converter for every frame, at six times the cost
    reformatter = VideoReformatter()
    with open_track(source, "video") as track:
        unit = track.stream.time_base
        sampled = set(stamps) if shortcuts else None
        decoded = _decode(track, sampled)
        now, rgb = -math.inf, None  # timestamp of the last decoded frame, and its pixels if they were needed
        reached = track.zero  # the same in seconds
        for stamp in stamps:
            nearest = bisect_right(keyframes, stamp) - 1
            if shortcuts and nearest >= 0 and track.skip_to(keyframes[nearest] * unit, reached):
                decoded = _decode(track, sampled)
            while now < stamp:
                frame = next(decoded, None)
                if frame is not None and frame.pts is None:
                    continue
                now, rgb = math.inf if frame is None else frame.pts, None
            if now != stamp:
                if shortcuts:
                    raise _ShortcutError
                when = f"{float(stamp * unit):.2f} s"
                raise MediaError(f"{source}: damaged, no frame can be decoded at {when}; re-encode it or leave it out")
            reached = now * unit
            if rgb is None:
                size = (track.stream.codec_context.width, track.stream.codec_context.height)
                rgb = reformatter.reformat(frame, *size, format="rgb24", threads=1).to_ndarray()
                rgb = np.rot90(rgb, round(frame.rotation / 90))  # the camera was held sideways
            yield rgb


def _decode(track: Track, sampled: set[int] | None) -> Iterator[Any]:
    """PyAV's frames from here on. Given the timestamps of the sampled ones, others may be left out if no frame refers
    to them: up to half of all in H.264, which marks them. (HEVC's mark only speaks of frames of the same layer.)"""
    context = track.stream.codec_context
    for packet in track.packets():
        if sampled is not None and context.name == "h264":
            context.skip_frame = "DEFAULT" if packet.pts in sampled else "NONREF"
        yield from packet.decode()
