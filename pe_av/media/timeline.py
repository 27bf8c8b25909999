"""The frames of a video: when each is on screen, and which of them to sample.

All of this comes from the packets of the file. Nothing is decoded.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from pe_av.media.tracks import TOGETHER, MediaError, as_fraction, open_track

MAX_REPEATS = 2**18  # repeated frames, an hour at 72 per second; damaged timestamps can ask for any number


class Timeline(NamedTuple):
    """The frames of a segment."""

    stamps: list[int]  # timestamp of every frame, ascending, in the stream's own unit; it identifies a decoded frame
    starts: list[Fraction]  # when each frame comes on screen, in seconds from the segment's begin; the first is 0
    end: Fraction  # when the last frame leaves the screen, likewise
    held_first: int  # how many frames would fit into the time for which the first frame is held before its own time
    held_last: int  # the same for the last frame, after its own time
    keyframes: list[int]  # timestamps of the frames that decoding can start from


def read_timeline(source: str | Path, start: float, end: float | None, max_seconds: float | None) -> Timeline:
    """The frames that are on screen in a segment; limits and errors are those of `frames.iter_frames`."""
    limits = (start, end, max_seconds)
    return _read_timeline(source, *limits, seek=True) or _read_timeline(source, *limits, seek=False)


def sample_stamps(
    source: str | Path, timeline: Timeline, num_frames: int | None, frames_per_second: float | None
) -> list[int]:
    """The timestamps of the frames that a model samples, ascending; a repeated frame has its timestamp repeated.

    With `num_frames`, `spread_indices` decides. If the video begins after the audio, the same fractions are taken of
    the time until the last frame instead. With `frames_per_second`, `rate_indices` decides. With neither, every frame
    is taken, and a first or last frame that is held is repeated at the file's own frame rate.

    Raises:
        MediaError: the frames would have to be repeated very often, as damaged timestamps ask for.
    """
    stamps, starts, end, held_first, held_last, _ = timeline
    total = num_frames or held_first + len(stamps) + held_last
    if frames_per_second is not None:
        total = math.ceil(end * as_fraction(frames_per_second))
    if total > len(stamps) + MAX_REPEATS:
        raise MediaError(
            f"{source}: its {len(stamps)} frames would have to be repeated to make {total}, so its timestamps are "
            "probably damaged; re-encode it or use a shorter segment"
        )
    if frames_per_second is not None:
        indices = rate_indices(starts, end, frames_per_second)
    elif num_frames is None:
        indices = [0] * held_first + list(range(len(stamps))) + [len(stamps) - 1] * held_last
    elif held_first:
        times = (starts[-1] * i / max(num_frames - 1, 1) for i in range(num_frames))
        indices = [bisect_right(starts, time) - 1 for time in times]
    else:
        indices = spread_indices(len(stamps), num_frames)
    return [stamps[i] for i in indices]


def spread_indices(total: int, count: int) -> list[int]:
    """`count` of `total` frames, evenly from the first to the last: int(i·(total − 1)/(count − 1)).

    With count 16 this is the published rule int(i·(n − 1)/15). If there are fewer frames than `count`, some repeat;
    count 1 gives [0].
    """
    return [i * (total - 1) // max(count - 1, 1) for i in range(count)]


def rate_indices(starts: Sequence[Fraction], end: Fraction, rate: float) -> list[int]:
    """The frame that is on screen at 0, 1/rate, 2/rate … seconds, until the end of the video.

    Args:
        starts: when each frame comes on screen, in seconds, ascending from 0. Fractions, so that a video of 25 frames
            per second sampled at 25 gives every frame once; floating point would repeat some and skip others.
        end: when the last frame leaves the screen, in seconds.
        rate: frames per second.
    """
    # for each change of frame, the number of the first tick at or after it
    ticks = [math.ceil(time * as_fraction(rate)) for time in (*starts, end)]
    return [index for index, (first, after) in enumerate(pairwise(ticks)) for _ in range(first, after)]


class _Packet(NamedTuple):
    stamp: int  # when its frame comes on screen, in the stream's own unit
    duration: int  # 0 if the file does not say
    is_key: bool  # can be decoded without earlier packets
    is_discard: bool  # has to be decoded but is not shown, because an edit list cuts it out


def _read_timeline(
    source: str | Path, start: float, end: float | None, max_seconds: float | None, seek: bool
) -> Timeline | None:
    """As `read_timeline`; None if a seek did not arrive before the segment, so the file has to be read without."""
    packets: list[_Packet] = []
    with open_track(source, "video") as track:
        sought = seek and track.seek_segment(start)
        unit, shared = track.stream.time_base, track.other is not None
        # in seconds, as the timestamps count them
        begin = track.zero + as_fraction(start)
        limit = math.inf if end is None else track.zero + as_fraction(end)
        longest = math.inf if max_seconds is None else as_fraction(max_seconds)
        earliest = math.inf
        for packet in track.packets():
            if packet.size == 0:
                continue
            if packet.pts is None:
                raise MediaError(f"{source}: its frames have no timestamps; re-encode it, e.g. as MP4")
            packets.append(_Packet(packet.pts, packet.duration or 0, packet.is_keyframe, packet.is_discard))
            earliest = min(earliest, packet.pts)
            # Decoding times only grow, and no frame is shown before it is decoded: everything that follows is too late.
            last = min(limit, longest + (begin if shared else max(begin, earliest * unit)))
            if packet.dts is not None and packet.dts * unit >= last:
                break

    # Which frames can be decoded and are shown: a recording that was cut out of a stream begins with frames that refer
    # to a keyframe it does not have.
    keyframes = sorted(packet.stamp for packet in packets if packet.is_key)
    first = keyframes[0] if keyframes else earliest
    if sought and first * unit > begin:
        return None
    shown = sorted(packet for packet in packets if packet.stamp >= first and not packet.is_discard)
    if not shown:
        raise track.empty_error(source)

    # When each comes on screen, and when the last one leaves it. If the file does not say that, the last frame stays as
    # long as the one before it, and a lone one for one unit.
    stamps = [packet.stamp for packet in shown]
    duration = shown[-1].duration or (stamps[-1] - stamps[-2] if len(stamps) > 1 else 1)
    times = [stamp * unit for stamp in (*stamps, stamps[-1] + duration)]

    # The segment on the file's clock. The first frame belongs to the file even if it is earlier than the clock's zero.
    begin = begin if start else min(begin, times[0])
    begin = begin if shared else max(begin, times[0])
    interval = max((times[-1] - times[0]) / len(shown), Fraction(1, 120))  # mean time of a frame
    audio_is_longer = track.other_end - times[-1] > max(TOGETHER, interval)
    limit = min(limit, begin + longest, track.other_end if audio_is_longer else times[-1])
    gap_before, gap_after = max(min(times[0], limit) - begin, 0), max(limit - max(times[-1], begin), 0)
    times[0], times[-1] = min(times[0], begin), max(times[-1], limit)
    kept = [i for i, (on, off) in enumerate(pairwise(times)) if off > begin and on < limit]
    if not kept or limit <= begin:
        raise MediaError(f"{source}: the video track ends before {start:g} s; correct start or leave the clip out")
    starts = [max(times[i] - begin, Fraction(0)) for i in kept]
    # a lone frame fills any time without being repeated, and a gap shorter than a frame is none
    held = [round(gap / interval) if gap > interval and len(kept) > 1 else 0 for gap in (gap_before, gap_after)]
    return Timeline([stamps[i] for i in kept], starts, limit - begin, *held, keyframes)
