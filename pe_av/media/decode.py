"""Files to tensors: the audio track, and the frames that a model samples, of a whole file or of a part of it.

PyAV, which carries its own FFmpeg, reads everything. Which frames there are and when each is on screen comes from the
packets alone, so that only the wanted frames are converted, and long stretches between them are passed by seeking. A
seek that does not arrive where it should is not believed: the file is then decoded from its beginning.

Sound and picture of a file share one clock, from the earlier begin to the later end, whichever of them is read: a sound
has silence around it, and a picture holds its first and last frame. A file with one track is what that track is.

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

CHUNK = 32  # frames that are decoded before the next are asked for
CHUNK_BYTES = CHUNK * 3 * 1920 * 1080  # and 0.2 GB of them, if they are larger than full HD
MAX_PIXELS = 2**26  # of a frame, 8K has half as many; a damaged header can ask for all memory
# Seconds: tracks that are no further apart begin, or end, together, each with its own first sample or frame. It is one
# position of the model, and more than what codecs need to begin and containers round to.
TOGETHER = Fraction(1, 25)
MAX_SILENCE = 3600  # seconds that are put in for a sound that is not there; damaged times can ask for centuries
MAX_REPEATS = 2**18  # and frames: an hour at 72 per second
PREROLL = 1.0  # seconds decoded before a part: after a seek, decoders need a few blocks until their output is right
SEEKABLE = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "wav", "flac", "ogg"}  # formats whose times survive a seek
ONLY = {"audio": "give the clip in videos= only", "video": "give the clip in audio= only"}  # where a kind is missing
MEMBER = re.compile(r"(.+\.tar)#(\d+)\+(\d+)", re.DOTALL)  # a file inside a tar, by its offset and size in bytes


class MediaError(ValueError):
    """An item that cannot be used; the one-line message names it and the remedy."""


class MissingTrackError(MediaError):
    """A file that is whole has no sound, or no picture."""


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
    """The sound of a media file, as it is: own rate, own channels. Silence fills what a picture lasts beyond it.

    Args:
        max_seconds: read this much at most, and do not decode the rest.
        start, end: the part to read, in seconds from where the earlier track of the file begins; end None: to the end.
            The part is sought, not decoded towards, where the format allows it.
    Returns:
        (channels, samples) float32 in [-1, 1], and the rate in Hz.
    Raises:
        MissingTrackError: without an audio track, or with nothing in it.
        MediaError: no such file, not media, damaged, or with nothing between start and end.
    """
    check_part(start, end, max_seconds)
    for seek in _ways(start):
        blocks: list[Tensor] = []
        with _opened(path, "audio") as track:
            if seek and not track.seek(track.zero + _exact(start - PREROLL)):
                continue
            rate = channels = at = first = 0  # positions in samples on the file's clock
            stop = math.inf
            for frame in (frame for packet in track.packets() for frame in packet.decode()):
                block = _float_samples(frame)
                if not rate:
                    rate, channels = frame.sample_rate, len(block)
                    at = 0 if frame.pts is None else round((frame.pts * track.stream.time_base - track.zero) * rate)
                    first = round(start * rate) if start else min(at, 0)
                    if track.other is None:
                        first = max(first, at)
                    stop = math.inf if end is None else round(end * rate)
                    stop = stop if max_seconds is None else min(stop, first + max(round(max_seconds * rate), 1))
                    if seek and at > first:
                        break  # arrived too late
                    blocks += _silence(path, channels, min(at, stop) - first, rate)
                if frame.sample_rate != rate or len(block) != channels:
                    raise MediaError(f"{path}: rate or channels change midway; re-encode it with fixed ones")
                if first - block.shape[1] < at < stop:  # what comes before the part is not kept
                    blocks.append(block[:, max(first - at, 0) : min(stop - at, block.shape[1])])
                at += block.shape[1]
                if at >= stop:
                    break
        if seek and not blocks:
            continue
        if not rate:
            raise track.nothing(path)
        missing = min(stop, round((track.other_end - track.zero) * rate)) - max(at, first)
        if not blocks or missing > TOGETHER * rate:
            blocks += _silence(path, channels, missing, rate)
        if not blocks:
            raise MediaError(f"{path}: the audio track is empty after {start:g} s; correct start, or leave it out")
        return torch.cat(blocks, dim=1), rate
    raise AssertionError("the last way is without seeking, and returns or raises")


def _silence(path: str | Path, channels: int, samples: int, rate: int) -> list[Tensor]:
    """A block of them, or none."""
    if samples > MAX_SILENCE * rate:
        wrong = f"the picture lasts {samples / rate:.0f} s without its sound, which are damaged times"
        raise MediaError(f"{path}: {wrong}; re-encode it, or give a shorter part")
    return [torch.zeros(channels, samples)] if samples > 0 else []


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
        num_frames: spread over the frames by `spread_indices`, the published rule. Where the picture begins after the
            sound, that rule is one of times: the frames on screen at the same parts of the way to the last one.
        frames_per_second: instead, those that `rate_indices` gives from the frames' own times. Neither: every frame,
            and a first or last one that is held as often as frames come.
        max_seconds: take only what is on screen in this time from the beginning on.
        start, end: the part to take, in seconds from where the earlier track of the file begins: all frames that are
            on screen in it, so its first frame is the one that is there at `start`. The part is sought where the
            format allows it.
    Returns:
        (F, 3, H, W) uint8; a picture is a clip of one frame.
    Raises:
        MissingTrackError: without a video track, or without a frame in it.
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
    starts, count = timeline.starts, len(timeline.starts)
    wanted = num_frames or timeline.before + count + timeline.after
    if frames_per_second is not None:
        wanted = math.ceil(timeline.end * _exact(frames_per_second))
    if wanted > count + MAX_REPEATS:  # damaged times
        wrong = f"{count} frames would be repeated until they are {wanted}, as if its times were damaged"
        raise MediaError(f"{path}: {wrong}; re-encode it, or give a shorter part")
    if frames_per_second is not None:
        index = rate_indices(starts, timeline.end, frames_per_second)
    elif num_frames is None:
        index = [0] * timeline.before + list(range(count)) + [count - 1] * timeline.after
    elif timeline.before:
        index = [bisect_right(starts, starts[-1] * i / max(num_frames - 1, 1)) - 1 for i in range(num_frames)]
    else:
        index = spread_indices(count, num_frames)
    pictures = _pictures(path, [timeline.stamps[i] for i in index], timeline.keys)
    shape = None
    for first in pictures:
        piece = [first, *islice(pictures, min(CHUNK, max(CHUNK_BYTES // first.nbytes, 1)) - 1)]
        if any(picture.shape != (shape := shape or first.shape) for picture in piece):
            raise MediaError(f"{path}: the picture's size changes midway; re-encode it with a fixed one")
        yield rearrange(torch.from_numpy(np.stack(piece)), "f h w c -> f c h w")


class _Packet(NamedTuple):
    stamp: int  # when its frame comes on screen, in the stream's own unit
    duration: int  # 0 where the file does not say
    is_key: bool  # can be decoded without the ones before it
    is_discard: bool  # to be decoded and not shown: an edit list cuts it away


class _Timeline(NamedTuple):
    stamps: list[int]  # of every frame of the part, ascending, in the stream's own unit: it tells a decoded frame
    starts: list[Fraction]  # when each comes on screen, in seconds from the part's beginning; the first is 0
    end: Fraction  # when the last frame leaves the screen, likewise
    before: int  # frames that would fill the time in which the first one is held
    after: int  # and the last one
    keys: list[int]  # stamps of the frames that decoding can begin with


def _timeline(path: str | Path, start: float, end: float | None, max_seconds: float | None) -> _Timeline:
    """When each frame of the part is on screen, from the packets alone: nothing is decoded."""
    for seek in _ways(start):
        packets: list[_Packet] = []  # in the file's order, which is the decoder's
        with _opened(path, "video") as track:
            unit, zero = track.stream.time_base, track.zero
            if seek and not track.seek(zero + _exact(start - PREROLL)):
                continue
            shared = track.other is not None
            limit = math.inf if end is None else zero + _exact(end)
            longest = math.inf if max_seconds is None else _exact(max_seconds)
            earliest = math.inf
            for packet in track.packets():
                if packet.size == 0:
                    continue
                if packet.pts is None:
                    raise MediaError(f"{path}: frames carry no time; re-encode it, e.g. as MP4")
                packets.append(_Packet(packet.pts, packet.duration or 0, packet.is_keyframe, packet.is_discard))
                earliest = min(earliest, packet.pts)
                # decoding times only grow and no frame is shown before it is decoded: all that follows is too late
                begin = zero + _exact(start)
                last = min(limit, longest + (begin if shared else max(begin, earliest * unit)))
                if packet.dts is not None and packet.dts * unit >= last:
                    break
        # a recording cut from a stream begins in the middle of a group of pictures, which nothing can decode
        keys = sorted(packet.stamp for packet in packets if packet.is_key)
        first = keys[0] if keys else earliest
        if not (seek and first * unit > zero + _exact(start)):  # else the seek arrived too late
            break

    shown = sorted(packet for packet in packets if packet.stamp >= first and not packet.is_discard)
    if not shown:
        raise track.nothing(path)
    stamps = [packet.stamp for packet in shown]
    # without a duration in the file the last frame stays as long as the one before it, or for one unit
    last = shown[-1].duration or (stamps[-1] - stamps[-2] if len(stamps) > 1 else 1)
    times = [stamp * unit for stamp in (*stamps, stamps[-1] + last)]
    # a shared clock may begin before the first frame, and end after the last one; its first frame is never left out
    begin = zero + _exact(start) if start else min(zero, times[0])
    begin = begin if shared else max(begin, times[0])
    interval = max((times[-1] - times[0]) / len(shown), Fraction(1, 120))
    over = track.other_end - times[-1] > max(TOGETHER, interval)
    limit = min(limit, begin + longest, track.other_end if over else times[-1])
    before, after = (max(gap, 0) for gap in (min(times[0], limit) - begin, limit - max(times[-1], begin)))
    times[0], times[-1] = min(times[0], begin), max(times[-1], limit)
    kept = [i for i, (on, off) in enumerate(pairwise(times)) if off > begin and on < limit]
    if not kept or limit <= begin:
        raise MediaError(f"{path}: the video track ends before {start:g} s; correct start, or leave the clip out")
    starts = [max(times[i] - begin, Fraction(0)) for i in kept]
    # one frame fills any time; and one that is late by less than the next would be is not held
    held = [round(gap / interval) if gap > interval and len(kept) > 1 else 0 for gap in (before, after)]
    return _Timeline([stamps[i] for i in kept], starts, limit - begin, *held, keys)


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
    with _opened(path, "video") as track:
        unit = track.stream.time_base
        wanted = set(stamps) if shortcuts else None
        decoded = _decode(track, wanted)
        now, picture = -math.inf, None
        reached = track.zero  # seconds: how far decoding has come
        for stamp in stamps:
            nearest = bisect_right(keys, stamp) - 1
            far = shortcuts and nearest >= 0 and keys[nearest] * unit - reached > PREROLL
            if far and track.seek(keys[nearest] * unit):
                decoded = _decode(track, wanted)
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
                size = (track.stream.codec_context.width, track.stream.codec_context.height)
                rgb = reformatter.reformat(frame, *size, format="rgb24", threads=1).to_ndarray()
                picture = np.rot90(rgb, round(frame.rotation / 90))  # filmed with the camera on its side
            yield picture


def _decode(track: "_Track", wanted: set[int] | None) -> Iterator[Any]:
    """The frames from here on. Of those whose stamp is not wanted, the ones that no other refers to may be missing:
    in H.264 they are marked, and are up to half of all. (In HEVC the mark is only about frames of the same layer.)"""
    context = track.stream.codec_context
    for packet in track.packets():
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
    """Which of the tracks "audio" and "video" a source has, each with the file's seconds (see above) as its header says
    them, or None.

    Raises:
        MissingTrackError: it has neither.
        MediaError: it cannot be opened.
    """
    with _container(path) as container:
        found = dict.fromkeys(_tracks(container), container.duration and container.duration / 1_000_000)
    if not found:
        raise MissingTrackError(f"{path}: has neither an audio nor a video track; leave it out")
    return found


class _Track:
    """The track of an open file that is read, and what is known of the other one, with which it shares a clock."""

    def __init__(self, container: Any, stream: Any, other: Any | None):
        self.container, self.stream, self.other, self.kind = container, stream, other, stream.type
        own = theirs = Fraction(container.start_time or 0, 1_000_000)
        if other is not None and None not in (stream.start_time, other.start_time):
            own, theirs = stream.start_time * stream.time_base, other.start_time * other.time_base
        own, theirs = max(own, Fraction(0)), max(theirs, Fraction(0))  # what lies below, decoders drop
        self.zero = own if own <= theirs + TOGETHER else theirs  # seconds on the tracks' clock at which the file begins
        self.other_end = self.zero  # and at which the other track ends, as far as `packets` has come
        # whether the file says that there is something; in Matroska, whose tracks have no length of their own, FFmpeg
        # gives the whole file's for it, and a tag has the track's
        tagged = container.format.name == "matroska,webm"
        length = stream.metadata.get("DURATION", "").strip("0:.") if tagged else stream.duration
        self.promises = bool(stream.frames or length)

    def packets(self) -> Iterator[Any]:
        """Those of this track, in the file's order, and PyAV's empty one, with which a decoder gives what it holds."""
        for packet in self.container.demux([self.stream] if self.other is None else [self.stream, self.other]):
            if packet.stream_index == self.stream.index:
                self.promises = self.promises or bool(packet.size)
                if packet.size or packet.dts is None:  # an empty one midway would end the decoding
                    yield packet
            elif packet.pts is not None and not packet.is_discard:
                self.other_end = max(self.other_end, (packet.pts + (packet.duration or 0)) * packet.time_base)

    def nothing(self, path: str | Path) -> MediaError:
        """What to raise where it has no sample or frame. By then the file is closed, and PyAV must not look into it."""
        if self.promises:
            return MediaError(f"{path}: damaged, nothing of its {self.kind} can be read; re-encode it or leave it out")
        return MissingTrackError(f"{path}: the {self.kind} track is empty; {ONLY[self.kind]}, or leave it out")

    def seek(self, seconds: Fraction) -> bool:
        """Go to the keyframe at or before `seconds` on the track's clock; False: this format has no exact way to."""
        if self.container.format.name not in SEEKABLE:
            return False
        self.container.seek(int(seconds / self.stream.time_base), stream=self.stream)
        return True


def _tracks(container: Any) -> dict[str, _Track]:
    """The best "audio" and "video" track that there is; the cover of a record is no video."""
    from av.stream import Disposition

    streams = {kind: container.streams.best(kind) for kind in ONLY}
    streams = {k: s for k, s in streams.items() if s is not None and not s.disposition & Disposition.attached_pic}
    others = {"audio": streams.get("video"), "video": streams.get("audio")}
    return {kind: _Track(container, stream, others[kind]) for kind, stream in streams.items()}


@contextmanager
def _opened(path: str | Path, kind: str) -> Iterator[_Track]:
    """The "audio" or "video" track of a source, open to be decoded."""
    with _container(path) as container:
        tracks = _tracks(container)
        if kind not in tracks:
            remedy = f"{ONLY[kind]}, or " if tracks else ""
            raise MissingTrackError(f"{path}: has no {kind} track; {remedy}leave it out")
        context = tracks[kind].stream.codec_context
        if context is None:
            raise MediaError(f"{path}: its {kind} track is in a format that nothing here decodes; re-encode it")
        context.thread_count = 1
        if kind == "video":
            context.options = {"max_pixels": str(MAX_PIXELS)}
        yield tracks[kind]


@contextmanager
def _container(path: str | Path) -> Iterator[Any]:
    """PyAV's container of a source; whatever PyAV and FFmpeg make of a damaged file becomes `MediaError`."""
    import av

    try:
        with av.open(_url(path), metadata_errors="ignore") as container:  # tags in an unknown encoding do not matter
            if container.format.name == "tty":  # FFmpeg would draw a text file as a terminal does
                raise MediaError(f"{path}: a text file, not media; give captions in text=")
            yield container
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


def _ways(start: float) -> tuple[bool, ...]:
    """Whether to seek, in the order to try."""
    return (True, False) if start > PREROLL else (False,)


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
