"""Frames by decord or torchcodec, for files that these read as PyAV does.

PyAV says which frames are sampled and when they are on screen. It also reads every file that is not ordinary: any that
is no plain MP4, Matroska or WebM file of 8-bit 4:2:0 video; whose edit list cuts frames out; whose first frames refer
to a keyframe that it lacks; that was filmed sideways; or that lies in a tar. decord gives other frames than those asked
for where frames after a keyframe are shown before it (open groups of pictures, as HEVC has them), so PyAV reads these
files too. Audio is always read by PyAV. What each reader does with which file is measured by benchmarks/readers.py.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pe_av.config import ConfigError
from pe_av.config.data import READERS
from pe_av.media.tracks import TAR_MEMBER, open_track

FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}  # PyAV's names
BATCH = 8  # frames that are decoded at a time


def check_reader(reader: str) -> None:
    """Raise `ConfigError` if a reader of `READERS` cannot be used here. PyAV always can."""
    if reader not in READERS:
        raise ConfigError(f"reader={reader} is none of {', '.join(READERS)}")
    if reader == "pyav":
        return
    try:
        import_module("torchcodec.decoders" if reader == "torchcodec" else reader)
    except ImportError:
        raise ConfigError(f"reader={reader} needs a package: pip install 'pe-av[{reader}]'") from None
    except (RuntimeError, OSError) as error:  # torchcodec finds no FFmpeg, or was built for another torch
        reason = str(error).strip().splitlines()[0].removesuffix(" Likely causes:")
        raise ConfigError(
            f"reader={reader} cannot be loaded ({reason}): install FFmpeg 4 to 8 with its libraries, or use pyav"
        ) from error


def read_by(reader: str, source: str | Path, stamps: Sequence[int]) -> Iterator[np.ndarray]:
    """The (H, W, 3) frame for each of the first timestamps: for all of them if the file is ordinary and undamaged, else
    for fewer or none, and PyAV has to read the rest."""
    file = _ordinary(source)
    if file is None or (reader == "decord" and not file.closed):
        return
    numbers = {stamp: number for number, stamp in enumerate(sorted(file.stamps))}
    read = _decord if reader == "decord" else _torchcodec
    seconds = [float(stamp * file.unit) for stamp in stamps]
    yield from read(str(source), [numbers[stamp] for stamp in stamps], seconds, len(numbers))


class _File(NamedTuple):
    stamps: list[int]  # timestamps of all frames, in the order in which they are decoded
    unit: Fraction  # seconds that the timestamps count in
    closed: bool  # nothing after a keyframe is shown before it


def _ordinary(source: str | Path) -> _File | None:
    """A file that both readers know; None: another."""
    if TAR_MEMBER.fullmatch(str(source)):
        return None
    with open_track(source, "video") as track:
        if track.container.format.name not in FORMATS:
            return None
        packets, frame = [], None
        for packet in track.packets():
            if frame is None:
                frame = next(iter(packet.decode()), None)
            if packet.size == 0:
                continue
            if packet.pts is None or packet.is_discard or packet.is_corrupt:
                return None
            packets.append((packet.pts, packet.is_keyframe))
        if frame is None or frame.rotation or frame.format.name != "yuv420p" or frame.width % 2 or frame.height % 2:
            return None
        stamps = [stamp for stamp, _ in packets]
        if not packets[0][1] or stamps[0] > min(stamps) or len(set(stamps)) < len(stamps):
            return None
        earliest = list(accumulate(reversed(stamps), min))[::-1]  # of a packet and all that follow it
        closed = all(stamp == first for (stamp, is_key), first in zip(packets, earliest, strict=True) if is_key)
        return _File(stamps, track.stream.time_base, closed)


def _decord(source: str, numbers: list[int], _: list[float], total: int) -> Iterator[np.ndarray]:
    import decord

    try:
        video = decord.VideoReader(source, num_threads=1)
        if len(video) == total:
            for begin in range(0, len(numbers), BATCH):
                yield from video.get_batch(numbers[begin : begin + BATCH]).asnumpy()
    except decord.DECORDError:
        return


def _torchcodec(source: str, numbers: list[int], seconds: list[float], total: int) -> Iterator[np.ndarray]:
    from torchcodec.decoders import VideoDecoder

    try:
        video = VideoDecoder(source, dimension_order="NHWC", num_ffmpeg_threads=1)
        if len(video) == total:
            for begin in range(0, len(numbers), BATCH):
                batch = video.get_frames_at(numbers[begin : begin + BATCH])
                if not np.allclose(batch.pts_seconds, seconds[begin : begin + BATCH], rtol=0, atol=1e-3):
                    return
                yield from batch.data.numpy()
    except RuntimeError:
        return
