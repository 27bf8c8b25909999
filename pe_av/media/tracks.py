"""Media files, their audio and video tracks, and the clock that the two tracks of a file share.

A source is the path of a file, or `SHARD.tar#OFFSET+SIZE`: a file inside an uncompressed tar, which is read in place.

The audio and the video of a file share one clock, whichever of them is read. It starts where the earlier track begins
and stops where the later one ends: where audio is missing there is silence, and the first and last frames of a video
are held. Tracks that begin (or end) within `TOGETHER` of each other begin (or end) together. A file with a single track
starts where that track begins.

Everything is read by PyAV, which brings its own FFmpeg. It is imported on first use, and a file is opened in the
process that reads it, so data loaders can fork their workers. Decoders run on one thread: the workers are the
parallelism.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

# seconds; one position of the model, and more than the delay of any codec or the rounding of any container
TOGETHER = Fraction(1, 25)
PREROLL = 1.0  # seconds decoded before a segment, because decoders need a few blocks after a seek to be exact again
SEEKABLE = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "wav", "flac", "ogg"}  # formats with exact times after a seek
MAX_PIXELS = 2**26  # of a frame, twice those of 8K; a damaged header can ask for all memory
TAR_MEMBER = re.compile(r"(.+\.tar)#(\d+)\+(\d+)", re.DOTALL)
ADVICE = {"audio": "pass the file as videos= only", "video": "pass the file as audio= only"}  # if this track is missing


class MediaError(ValueError):
    """An item that cannot be used. The message is one line: the item, what is wrong with it, and what to do."""


class MissingTrackError(MediaError):
    """An undamaged file that has no audio, or no video."""


class Track:
    """A track of an open file, with what is known of the file's other track.

    Attributes:
        stream: PyAV's stream. Its timestamps count in units of `stream.time_base` seconds.
        other: the stream that shares the clock with this one; None if this is the only track.
        zero: where the clock of the file starts, in seconds as the timestamps count them.
        other_end: where the other track ends, likewise, as far as `packets` has read.
    """

    def __init__(self, container: Any, stream: Any, other: Any | None):
        self.container, self.stream, self.other, self.modality = container, stream, other, stream.type
        begin = other_begin = Fraction(container.start_time or 0, 1_000_000)
        if other is not None and None not in (stream.start_time, other.start_time):
            begin, other_begin = (s.start_time * s.time_base for s in (stream, other))
        # decoders drop what lies before 0
        begin, other_begin = max(begin, Fraction(0)), max(other_begin, Fraction(0))
        self.zero = begin if begin <= other_begin + TOGETHER else other_begin
        self.other_end = self.zero
        # Does the header say that the track has content? Matroska's tracks have no duration, so FFmpeg reports the
        # file's for each of them; the track's own, if any, is in a tag.
        is_matroska = container.format.name == "matroska,webm"
        duration = stream.metadata.get("DURATION", "").strip("0:.") if is_matroska else stream.duration
        self._has_content = bool(stream.frames or duration)

    def packets(self) -> Iterator[Any]:
        """The track's packets in the order of the file, then PyAV's empty one, which flushes the decoder."""
        for packet in self.container.demux([self.stream] if self.other is None else [self.stream, self.other]):
            if packet.stream_index == self.stream.index:
                self._has_content = self._has_content or bool(packet.size)
                if packet.size or packet.dts is None:  # any other empty packet would end the decoding midway
                    yield packet
            elif packet.pts is not None and not packet.is_discard:
                self.other_end = max(self.other_end, (packet.pts + (packet.duration or 0)) * packet.time_base)

    def seek(self, seconds: Fraction) -> bool:
        """Go to the keyframe at or before a time, as the timestamps count it; False if the format is not exact."""
        if self.container.format.name not in SEEKABLE:
            return False
        self.container.seek(int(seconds / self.stream.time_base), stream=self.stream)
        return True

    def seek_segment(self, start: float) -> bool:
        """Go to `PREROLL` before a segment that starts `start` seconds into the file; False if it has to be read from
        the beginning."""
        return start > PREROLL and self.seek(self.zero + as_fraction(start - PREROLL))

    def skip_to(self, keyframe: Fraction, reached: Fraction) -> bool:
        """Go to a keyframe if that skips more than `PREROLL` from what was reached; False if decoding goes on."""
        return keyframe - reached > PREROLL and self.seek(keyframe)

    def empty_error(self, source: str | Path) -> MediaError:
        """The error for a track in which nothing was found. It may be made when the file is closed."""
        if self._has_content:
            return MediaError(f"{source}: damaged, no {self.modality} can be decoded; re-encode it or leave it out")
        advice = ADVICE[self.modality]
        return MissingTrackError(f"{source}: its {self.modality} track is empty; {advice}, or leave it out")


@contextmanager
def open_track(source: str | Path, modality: str) -> Iterator[Track]:
    """The "audio" or "video" track of a source, ready to be decoded.

    Raises:
        MissingTrackError: there is no such track.
        MediaError: no such file, not media, damaged, or in a format without a decoder.
    """
    with _open_container(source) as container:
        tracks = _find_tracks(container)
        if modality not in tracks:
            advice = f"{ADVICE[modality]}, or " if tracks else ""
            raise MissingTrackError(f"{source}: has no {modality} track; {advice}leave it out")
        context = tracks[modality].stream.codec_context
        if context is None:
            raise MediaError(f"{source}: FFmpeg has no decoder for its {modality} track; re-encode it, e.g. as MP4")
        context.thread_count = 1
        if modality == "video":
            context.options = {"max_pixels": str(MAX_PIXELS)}
        yield tracks[modality]


def probe(source: str | Path) -> dict[str, float | None]:
    """The tracks of a source, from its header: "audio" and/or "video" -> seconds of the file, None if unknown.

    Raises:
        MissingTrackError: it has neither.
        MediaError: it cannot be opened.
    """
    with _open_container(source) as container:
        durations = dict.fromkeys(_find_tracks(container), container.duration and container.duration / 1_000_000)
    if not durations:
        raise MissingTrackError(f"{source}: has neither an audio nor a video track; leave it out")
    return durations


def source_path(source: str | Path) -> str:
    """The file that has to be opened for a source: itself, or the tar that holds it."""
    member = TAR_MEMBER.fullmatch(str(source))
    return member[1] if member else str(source)


def check_segment(start: float, end: float | None, max_seconds: float | None) -> None:
    """Raise `ValueError` unless these limits, in seconds, are a segment of a file."""
    check_positive(max_seconds=max_seconds)
    if not 0 <= start < math.inf:
        raise ValueError(f"start={start} is not a time in a file; give seconds from its beginning, 0 or more")
    if end is not None and not end > start:
        raise ValueError(f"end={end} is not after start={start}; give both in seconds from the file's beginning")


def check_positive(**limits: float | None) -> None:
    """Raise `ValueError` for a limit that is neither None nor above zero."""
    for name, value in limits.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} is not positive; leave it out for no limit")


def as_fraction(value: float) -> Fraction:
    """The fraction that was meant: 0.1 is a tenth, 23.976023976023978 is 24000/1001."""
    return Fraction(float(value)).limit_denominator(10**9)


def _find_tracks(container: Any) -> dict[str, Track]:
    """The best "audio" and "video" track of a file. The cover picture of a song is not a video."""
    from av.stream import Disposition

    streams = {modality: container.streams.best(modality) for modality in ADVICE}
    streams = {m: s for m, s in streams.items() if s is not None and not s.disposition & Disposition.attached_pic}
    others = {"audio": streams.get("video"), "video": streams.get("audio")}
    return {modality: Track(container, stream, others[modality]) for modality, stream in streams.items()}


@contextmanager
def _open_container(source: str | Path) -> Iterator[Any]:
    """PyAV's container of a source. Every error that PyAV raises while it is open becomes a `MediaError`."""
    import av

    try:
        with av.open(_ffmpeg_url(source), metadata_errors="ignore") as container:  # the encoding of tags is irrelevant
            if container.format.name == "tty":  # FFmpeg renders text files as a terminal would
                raise MediaError(f"{source}: is a text file, not media; pass captions as text=")
            yield container
    except av.FFmpegError as error:
        reason = error.strerror or type(error).__name__
        raise MediaError(f"{source}: not a media file, or damaged ({reason}); re-encode it or leave it out") from error


def _ffmpeg_url(source: str | Path) -> str:
    """FFmpeg's name for a source: absolute, because it takes "a:b.mp4" for a URL."""
    path = os.path.abspath(source_path(source))
    if not os.path.isfile(path):
        # a relative path or a URL shows here how it was understood
        raise MediaError(f"{source}: no such file" + ("" if path == str(source) else f"; looked for {path}"))
    member = TAR_MEMBER.fullmatch(str(source))
    if member is None:
        return path
    begin, end = int(member[2]), int(member[2]) + int(member[3])
    if os.path.getsize(path) < end:
        raise MediaError(f"{source}: the tar is cut short before the end of this file; copy or pack it again")
    return f"subfile,,start,{begin},end,{end},,:{path}"
