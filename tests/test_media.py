"""Files that are written here, with contents known to the sample and to the frame, must come back as they went in,
whole and in parts."""

import bisect
import math
import random
import struct
import subprocess
import sys
import tarfile
import wave
import zlib
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from pe_av.media.audio import read_audio
from pe_av.media.frames import CHUNK, iter_frames
from pe_av.media.timeline import rate_indices, spread_indices
from pe_av.media.tracks import MediaError, MissingTrackError, probe

HEIGHT, WIDTH = 48, 64


def read_frames(*args, **kwargs) -> torch.Tensor:
    return torch.cat(list(iter_frames(*args, **kwargs)))


def grey(index: int) -> int:
    """The level of frame `index` of a `write_greys` file: 8 apart, where no codec here is wrong by more than 3."""
    return 16 + 8 * index


def write_frames(path, frames, codec="libx264", pixels="yuv420p", options=None, stamps=None, rotate=0, head=None):
    """(H, W, 3) uint8 frames to a file, 25 per second or at `stamps` in hundredths of a second."""
    with av.open(str(path), "w", options=head or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        if stamps is not None:
            stream.codec_context.time_base = Fraction(1, 100)
        if rotate:
            stream.set_display_rotation(rotate)
        for index, pixel_rows in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixel_rows), format="rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[index], Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_greys(path, count=25, **how):
    return write_frames(path, [np.full((HEIGHT, WIDTH, 3), grey(i), np.uint8) for i in range(count)], **how)


def shown(frames: torch.Tensor) -> list[int]:
    """Which frames of a `write_greys` file these are."""
    assert frames.dtype == torch.uint8 and frames.shape[1:] == (3, HEIGHT, WIDTH)
    level = frames.float()
    assert (level.amax((1, 2, 3)) - level.amin((1, 2, 3))).max() <= 4  # flat
    return ((level.mean((1, 2, 3)) - grey(0)) / 8).round().int().tolist()


def noise(count, height=HEIGHT, width=WIDTH, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def remux(source, target, first=0, shift=0, options=None):
    """Copy packets without decoding: from packet `first` on, and `shift` seconds earlier."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options or {}) as new:
        stream = old.streams[0]
        copy = new.add_stream_from_template(stream)
        for packet in list(old.demux(stream))[first:]:
            if packet.dts is None:
                continue
            packet.pts -= int(shift / stream.time_base)
            packet.dts -= int(shift / stream.time_base)
            packet.stream = copy
            new.mux(packet)
    return target


def write_wav(path, samples, rate=48_000):
    """(channels, samples) integers to a WAV file of their width; uint8 is FFmpeg's and WAV's unsigned format."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(samples.dtype.itemsize)
        file.setframerate(rate)
        file.writeframes(np.ascontiguousarray(samples.T).tobytes())
    return path


def write_audio(path, samples, codec, form, layout, rate=48_000, head=None):
    """(channels, samples) of the planar sample format `form` through a codec of PyAV."""
    with av.open(str(path), "w", options=head or {}) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        stream.format = stream.codec.audio_formats[0].name
        frame = av.AudioFrame.from_ndarray(samples, format=form, layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        blocks = av.AudioResampler(format=stream.format.name, frame_size=stream.frame_size or 4096)
        for block in (*blocks.resample(frame), *blocks.resample(None)):
            container.mux(stream.encode(block))
        container.mux(stream.encode(None))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# which frames


def test_spread_indices_by_hand():
    assert spread_indices(337, 16) == [0, 22, 44, 67, 89, 112, 134, 156, 179, 201, 224, 246, 268, 291, 313, 336]
    assert spread_indices(16, 16) == list(range(16))
    assert spread_indices(5, 16) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4]
    assert spread_indices(1, 16) == [0] * 16
    assert spread_indices(10, 1) == [0]
    assert spread_indices(10, 2) == [0, 9]
    assert spread_indices(10, 4) == [0, 3, 6, 9]


def test_spread_indices_follow_the_published_rule():
    for total in range(1, 3000):
        assert spread_indices(total, 16) == [int(i * (total - 1) / 15) for i in range(16)]


def test_rate_indices_by_hand():
    second = [Fraction(i, 25) for i in range(25)]
    assert rate_indices(second, Fraction(1), 25) == list(range(25))
    assert rate_indices(second, Fraction(1), 10) == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]
    assert rate_indices(second, Fraction(1), 50) == [i // 2 for i in range(50)]
    assert rate_indices(second, Fraction(1), 0.5) == [0]
    uneven = [Fraction(0), Fraction(1, 2), Fraction(3, 5), Fraction(2)]
    assert rate_indices(uneven, Fraction(3), 2) == [0, 1, 2, 2, 3, 3]
    minute = [Fraction(i) for i in range(60)]
    assert rate_indices(minute, Fraction(60), 0.1) == [0, 10, 20, 30, 40, 50]
    film = [Fraction(1001 * i, 24_000) for i in range(337)]
    assert rate_indices(film, Fraction(1001 * 337, 24_000), 24_000 / 1001) == list(range(337))
    assert rate_indices([Fraction(0)], Fraction(1, 25), 25) == [0]


def test_rate_indices_are_the_frames_on_screen():
    chance = random.Random(0)
    for _ in range(200):
        starts = [Fraction(0)] + sorted(Fraction(n, 100) for n in chance.sample(range(1, 400), chance.randrange(30)))
        end = starts[-1] + Fraction(chance.randrange(1, 100), 100)
        rate = chance.randrange(1, 40)
        times = [Fraction(k, rate) for k in range(math.ceil(end * rate))]
        assert times[-1] < end <= times[-1] + Fraction(1, rate)
        assert rate_indices(starts, end, rate) == [bisect.bisect_right(starts, time) - 1 for time in times]


# ---------------------------------------------------------------------------------------------------------------------
# audio


@pytest.mark.parametrize("rate", [8_000, 44_100, 96_000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_wav_comes_back_exactly(tmp_path, rate, channels):
    for kind, scale in ((np.int16, 2**15), (np.int32, 2**31)):
        limits = np.iinfo(kind)
        samples = np.random.default_rng(0).integers(limits.min, limits.max, (channels, 1000), dtype=kind, endpoint=True)
        samples[0, :3] = limits.min, 0, limits.max
        found, found_rate = read_audio(write_wav(tmp_path / "a.wav", samples, rate))
        assert found_rate == rate and found.dtype == torch.float32
        assert torch.equal(found, torch.from_numpy(samples).float() / scale)


def test_unsigned_bytes_are_silent_at_128(tmp_path):
    samples = np.arange(256, dtype=np.uint8)[None]
    found, _ = read_audio(write_wav(tmp_path / "a.wav", samples))
    assert found[0, [0, 64, 128, 255]].tolist() == [-1.0, -0.5, 0.0, 127 / 128]


def test_names_and_tags_do_not_matter(tmp_path, monkeypatch):
    samples = np.arange(-50, 50, dtype=np.int16)[None]
    path = write_wav(tmp_path / "take:1.wav", samples)  # FFmpeg knows protocols like "take:"
    content = path.read_bytes() + b"LIST" + struct.pack("<I", 16) + b"INFOINAM" + struct.pack("<I", 4) + b"caf\xe9"
    path.write_bytes(content[:4] + struct.pack("<I", len(content) - 8) + content[8:])
    monkeypatch.chdir(tmp_path)
    assert torch.equal(read_audio("take:1.wav")[0], torch.from_numpy(samples) / 2**15)


def test_flac_with_surround_sound_comes_back_exactly(tmp_path):
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, (6, 10_000), dtype=np.int16)
    found, rate = read_audio(write_audio(tmp_path / "a.flac", samples, "flac", "s16p", "5.1", rate=44_100))
    assert rate == 44_100
    assert torch.equal(found, torch.from_numpy(samples) / 2**15)


def test_floating_point_comes_back_exactly(tmp_path):
    samples = np.random.default_rng(0).normal(0, 1, (2, 5000)).astype(np.float32)  # beyond 1 too: not clipped
    found, _ = read_audio(write_audio(tmp_path / "a.wav", samples, "pcm_f32le", "fltp", "stereo"))
    assert torch.equal(found, torch.from_numpy(samples))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_compressed_audio_is_on_time(tmp_path, name):
    # AAC begins with 1024 samples that are not the sound, which the file tells the reader to drop. The sweep has no
    # period, so that only the right start fits; coding costs 0.01 (RMS), a single sample late would be 0.05.
    time = np.arange(48_000) / 48_000
    sweep = (0.5 * np.sin(2 * np.pi * (200 * time + 900 * time**2))).astype(np.float32)
    found, rate = read_audio(write_audio(tmp_path / name, sweep[None], "aac", "fltp", "mono"))
    assert rate == 48_000 and len(found) == 1
    assert np.square(found[0, 2000:46_000].numpy() - sweep[2000:46_000]).mean() ** 0.5 < 0.015
    assert np.square(found[0, 2001:46_001].numpy() - sweep[2000:46_000]).mean() ** 0.5 > 0.04


def test_audio_stops_at_max_seconds_without_decoding_the_rest(tmp_path):
    # an index at the front and the second half of the file missing, as after a broken download
    samples = np.random.default_rng(0).integers(-(2**23), 2**23, (2, 48_000), dtype=np.int32) * 2**8  # 24 bits
    path = write_audio(tmp_path / "a.m4a", samples, "alac", "s32p", "stereo", head={"movflags": "faststart"})
    assert torch.equal(read_audio(path)[0], torch.from_numpy(samples) / 2**31)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert torch.equal(read_audio(path, max_seconds=0.1)[0], torch.from_numpy(samples[:, :4800]) / 2**31)
    with pytest.raises(MediaError, match="a.m4a: not a media file, or damaged .*; re-encode it or leave it out"):
        read_audio(path)


# ---------------------------------------------------------------------------------------------------------------------
# frames: the right pixels


@pytest.mark.parametrize(
    "name, codec, pixels, options",
    [("a.mkv", "ffv1", "bgr0", {}), ("a.mp4", "libx264rgb", "rgb24", {"crf": "0"}), ("a.avi", "ffv1", "bgr0", {})],
)
@pytest.mark.parametrize("size", [(48, 64), (47, 63), (33, 118)])
def test_lossless_frames_come_back_exactly(tmp_path, name, codec, pixels, options, size):
    frames = noise(CHUNK + 3, *size)
    found = read_frames(write_frames(tmp_path / name, frames, codec, pixels, options=options))
    assert torch.equal(found, torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2))


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_frames_are_upright(tmp_path, degrees):
    frames = noise(2, 64, 128)
    path = write_frames(tmp_path / "a.mp4", frames, "libx264rgb", "rgb24", options={"crf": "0"}, rotate=degrees)
    # the file says: turn me counterclockwise by this much
    upright = np.stack([np.rot90(frame, degrees // 90) for frame in frames])
    assert torch.equal(read_frames(path), torch.from_numpy(upright).permute(0, 3, 1, 2))


def test_a_picture_is_a_clip_of_one_frame(tmp_path):
    frames = noise(1)
    found = read_frames(write_frames(tmp_path / "a.png", frames, "png", "rgb24"), num_frames=2)
    assert torch.equal(found, torch.from_numpy(np.stack(frames * 2)).permute(0, 3, 1, 2))


# ---------------------------------------------------------------------------------------------------------------------
# frames: the right ones, whatever the file

OPEN_GROUPS = {"bf": "3", "x264-params": "open-gop=1:keyint=8:min-keyint=8:scenecut=0:b-adapt=0"}
FILES = {  # codecs and containers that order, time and group their frames each in its own way
    "plain.mp4": {},
    "b-frames.mp4": dict(options={"bf": "3", "g": "8"}),
    "matroska.mkv": dict(options={"bf": "2", "g": "8"}),
    "vp9.webm": dict(codec="libvpx-vp9"),
    "odd.mp4": dict(pixels="yuv444p"),
    "open-groups.mp4": dict(options=OPEN_GROUPS),
    "ten-bit.mp4": dict(pixels="yuv420p10le"),
    "b-frames.avi": dict(codec="mpeg4", options={"bf": "2", "g": "8", "qmax": "2"}),
    "av1.mp4": dict(codec="libsvtav1", options={"preset": "12", "svtav1-params": "lp=1"}),
    "transport.ts": dict(options={"bf": "0"}),
    "picture.gif": dict(codec="gif", pixels="gray"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {name: write_greys(folder / name, **how) for name, how in FILES.items()}


@pytest.mark.parametrize("name", FILES)
def test_every_selection_gives_the_right_frames(files, name):
    selections = [
        ({}, list(range(25))),
        (dict(num_frames=16), [0, 1, 3, 4, 6, 8, 9, 11, 12, 14, 16, 17, 19, 20, 22, 24]),
        (dict(num_frames=3), [0, 12, 24]),
        (dict(num_frames=40), [i * 24 // 39 for i in range(40)]),
        (dict(frames_per_second=10), [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]),
        (dict(frames_per_second=50), [i // 2 for i in range(50)]),
        (dict(max_seconds=0.4), list(range(10))),
        (dict(max_seconds=0.41, num_frames=3), [0, 5, 10]),
        (dict(max_seconds=0.5, frames_per_second=5), [0, 5, 10]),
    ]
    for selection, expected in selections:
        assert shown(read_frames(files[name], **selection)) == expected, selection


def test_uneven_frames_are_sampled_by_their_times(tmp_path):
    path = write_greys(tmp_path / "a.mp4", count=5, stamps=[0, 50, 60, 200, 210])
    assert shown(read_frames(path)) == [0, 1, 2, 3, 4]
    # on screen at 0, 0.5, 1.0, 1.5, 2.0; the last frame stays for less than half a second
    assert shown(read_frames(path, frames_per_second=2)) == [0, 1, 2, 2, 3]
    assert shown(read_frames(path, frames_per_second=10, max_seconds=0.8)) == [0, 0, 0, 0, 0, 1, 2, 2]
    assert shown(read_frames(path, num_frames=3, max_seconds=2)) == [0, 1, 2]


def test_a_clip_that_starts_late_starts_at_its_first_frame(tmp_path):
    path = write_greys(tmp_path / "a.mp4", count=4, stamps=[700, 720, 740, 760])
    assert shown(read_frames(path, frames_per_second=5)) == [0, 1, 2, 3]
    assert shown(read_frames(path, max_seconds=0.4)) == [0, 1]


def test_frames_that_an_edit_list_cuts_away_are_not_shown(tmp_path):
    whole = write_greys(tmp_path / "whole.mp4", options={"bf": "0", "g": "50"})
    cut = remux(whole, tmp_path / "cut.mp4", shift=Fraction(5, 25))  # as `ffmpeg -ss 0.2 -c copy` does
    assert shown(read_frames(cut)) == list(range(5, 25))
    assert shown(read_frames(cut, num_frames=3)) == [5, 14, 24]
    assert shown(read_frames(cut, frames_per_second=5)) == [5, 10, 15, 20]


def test_a_recording_that_starts_between_keyframes(tmp_path):
    whole = write_greys(tmp_path / "whole.mkv", options={"bf": "0", "g": "8", "keyint_min": "8"})
    cut = remux(whole, tmp_path / "cut.mkv", first=3)
    assert shown(read_frames(cut)) == list(range(8, 25))


@pytest.mark.parametrize(
    "selection, count",
    [({}, 1), ({"num_frames": 16}, 16), ({"frames_per_second": 25}, 1), ({"frames_per_second": 100}, 4)],
)
def test_a_clip_of_one_frame(tmp_path, selection, count):
    found = shown(read_frames(write_greys(tmp_path / "a.mp4", count=1), **selection))
    assert found == [0] * count


def test_pieces_are_small_and_make_up_the_whole(tmp_path):
    frames = noise(2 * CHUNK + 5, 16, 32)
    path = write_frames(tmp_path / "a.mkv", frames, "ffv1", "bgr0")
    pieces = list(iter_frames(path))
    assert [len(piece) for piece in pieces] == [CHUNK, CHUNK, 5]
    assert torch.equal(torch.cat(pieces), torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2))


def test_only_the_wanted_frames_are_converted(tmp_path, monkeypatch):
    from av.video import reformatter

    converted = []

    class Counted:
        def __init__(self, real=reformatter.VideoReformatter):
            self.real = real()

        def reformat(self, frame, *args, **kwargs):
            converted.append(frame.pts)
            return self.real.reformat(frame, *args, **kwargs)

    monkeypatch.setattr(reformatter, "VideoReformatter", Counted)
    path = write_greys(tmp_path / "a.mp4")
    assert shown(read_frames(path, num_frames=2)) == [0, 24]
    assert len(converted) == 2
    assert len(read_frames(path, num_frames=40)) == 40
    assert len(converted) == 2 + 25


def test_nothing_is_decoded_after_max_seconds(tmp_path):
    # an index at the front and the second half of the file missing, as after a broken download
    path = write_frames(tmp_path / "a.mp4", noise(40), options={"g": "10"}, head={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert len(read_frames(path, max_seconds=0.4)) == 10
    with pytest.raises(MediaError, match="a.mp4: .*damaged.*; re-encode it or leave it out"):
        read_frames(path)


def test_nothing_is_read_after_max_seconds(files, monkeypatch):
    read = []

    class Counted:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.container.close()

        def demux(self, stream):
            for packet in self.container.demux(stream):
                read.append(packet.pts)
                yield packet

    open_file = av.open
    monkeypatch.setattr(av, "open", lambda *args, **kwargs: Counted(open_file(*args, **kwargs)))
    assert shown(read_frames(files["b-frames.mp4"], max_seconds=0.4)) == list(range(10))
    # three B-frames put off what is shown by as many, and one packet says that it is enough; for times, then pictures
    assert len(read) <= 2 * (10 + 4)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize(
    "structure",
    ["bframes=3:b-pyramid=2:ref=4", "bframes=3:b-pyramid=0", "bframes=8:open-gop=1:keyint=12", "bframes=0", "tff=1"],
)
def test_what_is_left_out_between_wanted_frames_changes_no_pixel(tmp_path, codec, structure):
    """Beside FFmpeg's own decoding of all frames; moving pictures with grain, so that every frame refers to others."""
    if codec == "libx265":
        structure = structure.replace("b-pyramid=2", "b-pyramid=1:temporal-layers=3").replace("tff=1", "interlace=tff")
    chance = np.random.default_rng(0)
    ramp = 3 * np.add.outer(np.arange(96), np.arange(128))[..., None] + np.zeros(3, int)
    frames = [((ramp + 9 * i + chance.integers(0, 40, ramp.shape)) % 256).astype(np.uint8) for i in range(60)]
    options = {f"{codec.removeprefix('lib')}-params": structure + ":log-level=none" * (codec == "libx265")}
    path = write_frames(tmp_path / "a.mp4", frames, codec, options=options)
    with av.open(str(path)) as container:
        everything = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(everything) == 60
    for count in (4, 7, 16, 31):
        expected = np.stack([everything[i] for i in spread_indices(60, count)]).transpose(0, 3, 1, 2)
        assert np.array_equal(read_frames(path, count).numpy(), expected), count


# ---------------------------------------------------------------------------------------------------------------------
# parts of files


@pytest.fixture(params=[1.0, 0.1], ids=["from the start", "seeking"])
def preroll(request, monkeypatch):
    """With the smaller one, even files of a second are sought in."""
    monkeypatch.setattr("pe_av.media.tracks.PREROLL", request.param)


@pytest.mark.parametrize("name", FILES)
def test_a_part_is_what_is_on_screen_in_it(files, preroll, name):
    late = name.endswith("avi")  # by the frame that its B-frames hold up: on the file's own clock
    times = [Fraction(i + late, 25) if i else Fraction(0) for i in range(25)]
    for start, end in [(0, 0.4), (0.2, 0.6), (0.21, 0.6), (0.5, None), (0.64, 0.65), (0.75, 0.76), (0.88, 9.0)]:
        first = max(i for i in range(25) if times[i] <= Fraction(str(start)))
        last = max(i for i in range(25) if end is None or times[i] < Fraction(str(end)))
        expected = list(range(first, last + 1))
        assert shown(read_frames(files[name], start=start, end=end)) == expected, (start, end)
        spread = [expected[i] for i in spread_indices(len(expected), 3)]
        assert shown(read_frames(files[name], num_frames=3, start=start, end=end)) == spread
        # cutting, then sampling at a rate, is sampling first and then cutting
        ticks = [max(Fraction(str(start)), Fraction(late, 25)) + Fraction(k, 50) for k in range(50)]
        stop = min(1 + Fraction(late, 25), 9 if end is None else Fraction(str(end)))
        on_screen = [int(t * 25) - late for t in ticks if t < stop]
        assert shown(read_frames(files[name], frames_per_second=50, start=start, end=end)) == on_screen
    assert shown(read_frames(files[name], start=0.4, max_seconds=0.2)) == list(range(10 - late, 15 - late))
    with pytest.raises(MediaError, match=f"{name}: the video track ends before 2 s"):
        read_frames(files[name], start=2.0)


def test_a_part_of_a_long_file_is_sought_and_not_decoded_towards(tmp_path, monkeypatch):
    frames = [np.full((HEIGHT, WIDTH, 3), grey(i % 25), np.uint8) for i in range(1000)]  # 40 s
    path = write_frames(tmp_path / "a.mp4", frames, options={"g": "25", "bf": "2"})
    opened, decoded = av.open, []

    class Counted:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.container.close()

        def demux(self, stream):
            return (decoded.append(1) or packet for packet in self.container.demux(stream))

        def decode(self, stream):
            return (decoded.append(1) or frame for frame in self.container.decode(stream))

    monkeypatch.setattr(av, "open", lambda *args, **kwargs: Counted(opened(*args, **kwargs)))
    assert shown(read_frames(path, start=33.0, end=33.4)) == list(range(10))
    assert len(decoded) < 150  # packets and frames of three seconds, not of thirty-three
    decoded.clear()
    assert shown(read_frames(path, num_frames=3)) == [0, 999 // 2 % 25, 24]
    assert len(decoded) < 1000 + 80  # all packets, for the count, and few frames


@pytest.mark.parametrize(
    "name, codec, form, exact",
    [
        ("a.wav", "pcm_s16le", "s16p", True),
        ("a.flac", "flac", "s16p", True),
        ("a.mkv", "flac", "s16p", True),
        ("a.m4a", "alac", "s16p", True),
        ("a.mp4", "aac", "fltp", False),
        ("a.mp3", "libmp3lame", "fltp", False),
        ("a.ogg", "libopus", "fltp", False),
        ("a.webm", "libopus", "fltp", False),
    ],
)
def test_a_part_of_the_sound_is_where_it_is_in_the_whole(tmp_path, name, codec, form, exact):
    time = np.arange(5 * 48_000) / 48_000
    sweep = 0.5 * np.sin(2 * np.pi * (200 * time + 100 * time**2))
    samples = (sweep * 2**15).astype(np.int16) if form == "s16p" else sweep.astype(np.float32)
    path = write_audio(tmp_path / name, np.ascontiguousarray(samples[None]), codec, form, "mono")
    whole, _ = read_audio(path)
    for start, end in [(0.0, 1.0), (0.5, 0.7), (2.0, 3.0), (3.3, None), (4.001, 4.002)]:
        part, rate = read_audio(path, start=start, end=end)
        lo, hi = round(start * rate), whole.shape[1] if end is None else round(end * rate)
        assert abs(part.shape[1] - (hi - lo)) <= (60 if name.endswith("webm") else 0)  # its clock ticks in milliseconds
        hi = lo + part.shape[1]
        if exact:
            assert torch.equal(part, whole[:, lo:hi])
            continue
        # decoders that carry a state differ by their noise
        slack = 60 if name.endswith("webm") else 0
        errors = [
            (part - whole[:, max(lo + by, 0) : max(lo + by, 0) + hi - lo])[:, 50:-50].square().mean().item() ** 0.5
            for by in range(-slack, slack + 1)
            if max(lo + by, 0) + hi - lo <= whole.shape[1]
        ]
        assert hi - lo < 200 or min(errors) < 0.01, (start, end, min(errors))
    assert torch.equal(read_audio(path, start=0.5, max_seconds=0.2)[0], read_audio(path, start=0.5, end=0.7)[0])
    with pytest.raises(MediaError, match="the audio track ends before 60 s"):
        read_audio(path, start=60.0)


def test_sound_and_picture_of_a_part_stay_together(tmp_path):
    """A file whose picture begins half a second after its sound: times count from the sound."""
    path = tmp_path / "late.mkv"
    with av.open(str(path), "w") as container:
        picture = container.add_stream("ffv1", rate=25)
        picture.width, picture.height, picture.pix_fmt = WIDTH, HEIGHT, "bgr0"
        picture.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("pcm_s16le", rate=8_000, layout="mono")
        count = np.arange(16_000, dtype=np.int16)[None]
        for index in range(25):
            frame = av.VideoFrame.from_ndarray(np.full((HEIGHT, WIDTH, 3), grey(index), np.uint8), format="rgb24")
            frame.pts, frame.time_base = 500 + 40 * index, Fraction(1, 1000)
            container.mux(picture.encode(frame))
        frame = av.AudioFrame.from_ndarray(count, format="s16", layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = 8_000, Fraction(1, 8_000), 0
        container.mux(sound.encode(frame))
        for stream in (picture, sound):
            container.mux(stream.encode(None))
    assert shown(read_frames(path, start=1.0, end=1.2)) == [12, 13, 14, 15, 16, 17]  # 12 came on at 0.98 s
    assert (read_audio(path, start=1.0, end=1.2)[0] * 2**15).int().tolist() == [list(range(8_000, 9_600))]
    # the first frame is held from the sound's beginning on, for as long as 12 frames
    assert shown(read_frames(path, end=0.6)) == [0] * 12 + [0, 1, 2]


@dataclass
class Clock:
    """A file with both tracks, and what there is at each time; in seconds, the picture with 25 frames per second."""

    picture: float  # when it begins
    frames: int
    sound: float  # when it begins
    seconds: float  # how long the sound is
    rate: int = 8_000

    def write(self, path, base=0.0):
        """Lossless, so that every sample tells which one it is; the whole file `base` seconds late."""
        sound_codec = "alac" if path.suffix == ".mp4" else "pcm_s16le"
        with av.open(str(path), "w") as container:
            picture = container.add_stream("libx264", rate=25, options={"g": "5", "bf": "2"})
            picture.width, picture.height, picture.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            picture.codec_context.time_base = Fraction(1, 1000)
            sound = container.add_stream(sound_codec, rate=self.rate, layout="mono")
            sound.format = sound.codec.audio_formats[0].name
            for index in range(self.frames):
                frame = av.VideoFrame.from_ndarray(np.full((HEIGHT, WIDTH, 3), grey(index), np.uint8), format="rgb24")
                frame.pts, frame.time_base = round(1000 * (base + self.picture)) + 40 * index, Fraction(1, 1000)
                container.mux(picture.encode(frame))
            frame = av.AudioFrame.from_ndarray(self.samples()[None], format="s16p", layout="mono")
            frame.sample_rate, frame.time_base = self.rate, Fraction(1, self.rate)
            frame.pts = round((base + self.sound) * self.rate)
            blocks = av.AudioResampler(format=sound.format.name, frame_size=sound.frame_size or 800)
            for block in (*blocks.resample(frame), *blocks.resample(None)):
                container.mux(sound.encode(block))
            for stream in (picture, sound):
                container.mux(stream.encode(None))
        return path

    def samples(self):
        return np.arange(1, round(self.seconds * self.rate) + 1, dtype=np.int16)

    @property
    def end(self):
        return max(self.picture + self.frames / 25, self.sound + self.seconds)

    def heard(self):
        found = np.zeros(round(self.end * self.rate), np.int16)
        found[round(self.sound * self.rate) :][: len(self.samples())] = self.samples()
        return found.tolist()

    def seen(self, times):
        return [min(max(math.floor((time - self.picture) * 25 + 1e-6), 0), self.frames - 1) for time in times]


CLOCKS = {
    "together": Clock(0.0, 25, 0.0, 1.0),
    "sound late": Clock(0.0, 25, 0.6, 0.4),
    "sound late and long": Clock(0.0, 15, 0.6, 0.8),
    "sound late and short": Clock(0.0, 25, 0.2, 0.4),
    "picture late": Clock(0.52, 12, 0.0, 1.0),
    "picture late and long": Clock(0.52, 20, 0.0, 1.0),
    "picture late and short": Clock(0.2, 10, 0.0, 1.0),
    "sound ends early": Clock(0.0, 25, 0.0, 0.5),
    "picture ends early": Clock(0.0, 10, 0.0, 1.0),
    "apart": Clock(0.0, 10, 0.8, 0.4),
}


def heard(path, **part):
    waveform, rate = read_audio(path, **part)
    assert rate == 8_000 and len(waveform) == 1
    return (waveform[0] * 2**15).int().tolist()


@pytest.mark.parametrize("clock", CLOCKS.values(), ids=CLOCKS)
@pytest.mark.parametrize("name, base", [("a.mp4", 0.0), ("a.mkv", 0.0), ("a.mkv", 2.0)])
def test_sound_and_picture_share_one_clock(tmp_path, preroll, clock, name, base):
    path = clock.write(tmp_path / name, base)
    assert heard(path) == clock.heard()
    ticks = [k / 50 for k in range(round(clock.end * 50))]
    assert shown(read_frames(path, frames_per_second=50)) == clock.seen(ticks)
    assert shown(read_frames(path)) == clock.seen(ticks[::2])
    if clock.picture == 0:  # the published rule, of the frames that there are
        spread = [int(i * (clock.frames - 1) / 15) for i in range(16)]
    else:
        last = clock.picture + (clock.frames - 1) / 25
        spread = clock.seen([last * i / 15 for i in range(16)])
    assert shown(read_frames(path, num_frames=16)) == spread

    for start, end in [(0.0, 0.32), (0.2, 0.6), (0.4, None), (0.6, 0.8), (0.88, 9.0), (0.0, 9.0)]:
        stop = min(clock.end, end or clock.end)
        assert heard(path, start=start, end=end) == clock.heard()[round(start * 8_000) : round(stop * 8_000)]
        inside = [k / 50 for k in range(round(start * 50), round(stop * 50))]
        assert shown(read_frames(path, frames_per_second=50, start=start, end=end)) == clock.seen(inside)
        pictures = shown(read_frames(path, start=start, end=end))
        on_screen = clock.seen(inside[::2])
        assert pictures == (on_screen if len(set(on_screen)) > 1 else on_screen[:1])  # a single frame fills any time
        length = stop - start
        assert heard(path, start=start, max_seconds=length) == heard(path, start=start, end=stop)
    for read in (read_audio, read_frames):
        with pytest.raises(MediaError, match="after 2 s|before 2 s"):
            read(path, start=2.0)
    assert max(probe(path).values()) == pytest.approx(clock.end, abs=0.002 + base)  # Matroska's length counts from 0


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("late", [0.005, 0.024, 0.04])
def test_tracks_that_begin_within_a_frame_of_each_other_begin_together(tmp_path, name, late):
    """What codecs need to begin and containers round is no silence: nothing is put in, and parts fit the whole."""
    for clock in (Clock(0.0, 25, late, 1.0), Clock(late, 25, 0.0, 1.0)):
        path = clock.write(tmp_path / name)
        samples = clock.samples().tolist()
        assert heard(path) == samples
        assert heard(path, start=0.25, end=0.5) == samples[2000:4000]
        assert shown(read_frames(path)) == list(range(25))
        assert shown(read_frames(path, num_frames=16)) == [int(i * 24 / 15) for i in range(16)]
        assert shown(read_frames(path, frames_per_second=25)) == list(range(25))
        assert shown(read_frames(path, start=0.2, end=0.4)) == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_compressed_sound_that_begins_late_is_on_time(tmp_path, name):
    """As `test_compressed_audio_is_on_time`, beside a picture that begins 1.18 s before the sound."""
    time = np.arange(48_000) / 48_000
    sweep = (0.5 * np.sin(2 * np.pi * (200 * time + 900 * time**2))).astype(np.float32)
    with av.open(str(tmp_path / name), "w") as container:
        picture, sound = container.add_stream("libx264", rate=25), container.add_stream("aac", rate=48_000)
        picture.width, picture.height, picture.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        sound.layout = "mono"
        for index in range(25):
            pixels = np.full((HEIGHT, WIDTH, 3), grey(index), np.uint8)
            container.mux(picture.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        frame = av.AudioFrame.from_ndarray(sweep[None], format="fltp", layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = 48_000, Fraction(1, 48_000), round(1.18 * 48_000)
        blocks = av.AudioResampler(format="fltp", frame_size=1024)
        for block in (*blocks.resample(frame), *blocks.resample(None)):
            container.mux(sound.encode(block))
        for stream in (picture, sound):
            container.mux(stream.encode(None))
    found = read_audio(tmp_path / name)[0][0].numpy()
    first = round(1.18 * 48_000)
    assert np.abs(found[: first - 1100]).max() == 0  # this MP4 does not say to drop the codec's own 1024 samples
    errors = [
        np.square(found[first + by + 2000 : first + by + 46_000] - sweep[2000:46_000]).mean() ** 0.5
        for by in range(-48, 49)
    ]
    assert min(errors) < 0.015  # within a millisecond, to which the writing rounds


def test_a_file_with_one_track_is_what_that_track_is(tmp_path):
    """However late it begins: there is nothing that it could be late for."""
    clock = Clock(0.0, 10, 0.6, 0.4)
    for name in ("a.mp4", "a.mkv"):
        path = clock.write(tmp_path / name)
        alone = tmp_path / f"alone-{name}"
        with av.open(str(path)) as old, av.open(str(alone), "w") as new:
            copy = new.add_stream_from_template(old.streams.audio[0])
            for packet in old.demux(old.streams.audio[0]):
                if packet.dts is not None:
                    packet.stream = copy
                    new.mux(packet)
        assert heard(alone) == clock.samples().tolist()
    late = write_greys(tmp_path / "b.mp4", count=4, stamps=[700, 720, 740, 760])
    assert shown(read_frames(late)) == shown(read_frames(late, num_frames=4)) == [0, 1, 2, 3]


def test_damaged_times_do_not_ask_for_all_memory(tmp_path):
    far = Clock(0.0, 5, 90_000.0, 0.2).write(tmp_path / "far.mkv")
    with pytest.raises(MediaError, match="far.mkv: 90000 s of its video have no audio, .* damaged"):
        read_audio(far)
    for how in ({}, {"frames_per_second": 25}):
        with pytest.raises(
            MediaError, match="far.mkv: its 5 frames would have to be repeated to make 2250005, .* damaged"
        ):
            read_frames(far, **how)
    assert heard(far, max_seconds=0.5) == [0] * 4000
    assert shown(read_frames(far, num_frames=5)) == [0, 1, 2, 3, 4]
    assert shown(read_frames(far, frames_per_second=5, max_seconds=0.8)) == [0, 4, 4, 4]


def test_a_file_inside_a_tar_is_read_in_place(tmp_path):
    inner = {
        "a.mp4": write_greys(tmp_path / "a.mp4"),
        "b.png": write_frames(tmp_path / "b.png", noise(1), "png", "rgb24"),
        "c.wav": write_wav(tmp_path / "c.wav", np.arange(1000, dtype=np.int16)[None]),
    }
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        for name, path in inner.items():
            shard.add(path, name)
    with tarfile.open(tmp_path / "s.tar") as shard:
        where = {m.name: f"{tmp_path}/s.tar#{m.offset_data}+{m.size}" for m in shard}
    assert torch.equal(read_frames(where["a.mp4"]), read_frames(inner["a.mp4"]))
    assert torch.equal(read_frames(where["b.png"]), read_frames(inner["b.png"]))
    assert torch.equal(read_audio(where["c.wav"])[0], read_audio(inner["c.wav"])[0])
    (tmp_path / "s.tar").write_bytes((tmp_path / "s.tar").read_bytes()[:-11_000])
    with pytest.raises(MediaError, match="the tar is cut short before the end of this file"):
        read_audio(where["c.wav"])
    assert shown(read_frames(where["a.mp4"])) == list(range(25))


# ---------------------------------------------------------------------------------------------------------------------
# what cannot be read


@pytest.fixture
def broken(tmp_path):
    """Files that are no media at all."""
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "words.mp4").write_text("this is not a video\n" * 50)
    (tmp_path / "words.txt").write_text("nor is this\n" * 50)
    (tmp_path / "noise.wav").write_bytes(random.Random(0).randbytes(5000))
    return tmp_path


@pytest.mark.parametrize("read", [read_audio, read_frames])
@pytest.mark.parametrize(
    "name, message",
    [
        ("missing.mp4", "missing.mp4: no such file"),
        (".", "no such file"),
        ("https://example.org/a.mp4", "no such file"),
        ("empty.mp4", "empty.mp4: not a media file, or damaged .*; re-encode it or leave it out"),
        ("words.mp4", "words.mp4: not a media file, or damaged .*; re-encode it or leave it out"),
        ("noise.wav", "noise.wav: not a media file, or damaged .*; re-encode it or leave it out"),
        ("words.txt", "words.txt: is a text file, not media; pass captions as text="),
    ],
)
def test_what_is_no_media_is_refused_in_one_line(broken, read, name, message):
    with pytest.raises(MediaError, match=message) as caught:
        read(broken / name)
    assert "\n" not in str(caught.value)


def test_a_missing_track_is_named(tmp_path):
    silent = write_greys(tmp_path / "silent.mp4")
    with pytest.raises(MissingTrackError, match="silent.mp4: has no audio track; pass the file as videos= only"):
        read_audio(silent)
    sound = write_wav(tmp_path / "sound.wav", np.zeros((1, 100), np.int16))
    with pytest.raises(MissingTrackError, match="sound.wav: has no video track; pass the file as audio= only"):
        read_frames(sound)
    nothing = write_wav(tmp_path / "nothing.wav", np.zeros((1, 0), np.int16))
    with pytest.raises(MissingTrackError, match="nothing.wav: its audio track is empty; pass the file as videos= only"):
        read_audio(nothing)


@pytest.mark.parametrize("name, codecs", [("a.mkv", ("mpeg4", "pcm_s16le")), ("a.webm", ("libvpx", "libopus"))])
@pytest.mark.parametrize("tags", [True, False], ids=["tags", "no tags"])
@pytest.mark.parametrize("empty", ["audio", "video"])
def test_an_empty_track_beside_a_full_one_is_missing_and_not_damaged(tmp_path, name, codecs, tags, empty):
    """Matroska has no length of a track, and FFmpeg gives that of the file; recordings of browsers have no tags."""
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        picture = container.add_stream(codecs[0], rate=25)
        picture.width, picture.height, picture.pix_fmt = 32, 32, "yuv420p"
        sound = container.add_stream(codecs[1], rate=48_000, layout="mono")
        if empty == "audio":
            frames = [av.VideoFrame.from_ndarray(image, format="rgb24") for image in noise(5, 32, 32)]
        else:
            frames = [av.AudioFrame.from_ndarray(np.zeros((1, 9600), np.int16), format="s16", layout="mono")]
            frames[0].sample_rate = 48_000
        full = picture if empty == "audio" else sound
        for packet in [packet for frame in [*frames, None] for packet in full.encode(frame)]:
            container.mux(packet)
    if not tags:
        path.write_bytes(path.read_bytes().replace(b"DURATION", b"NOTATION"))
    with av.open(str(path)) as container:
        assert {stream.type for stream in container.streams if stream.duration} == {empty}  # FFmpeg's estimate
        assert any("DURATION" in stream.metadata for stream in container.streams) == tags
    reads = {"audio": read_audio, "video": read_frames}
    with pytest.raises(MissingTrackError, match=f"{name}: its {empty} track is empty"):
        reads.pop(empty)(path)
    for read in reads.values():
        read(path)


@pytest.mark.parametrize("tags", [True, False], ids=["tags", "no tags"])
def test_a_track_of_which_nothing_decodes_is_damaged_and_not_missing(tmp_path, tags):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("vorbis", rate=48_000, layout="stereo", options={"strict": "-2"})
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 9600), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 48_000
        container.mux([*sound.encode(frame), *sound.encode(None)][0])  # with which a decoder has half a block
    if not tags:
        path.write_bytes(path.read_bytes().replace(b"DURATION", b"NOTATION"))
    with pytest.raises(MediaError, match="a.mkv: .*damaged") as caught:
        read_audio(path)
    assert not isinstance(caught.value, MissingTrackError)


def test_the_cover_of_a_song_is_no_video(tmp_path):
    path = tmp_path / "song.mp3"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("libmp3lame", rate=48_000, layout="mono")
        cover = container.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(noise(1, 32, 32)[0], format="rgb24")))
        container.mux(cover.encode(None))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48_000
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    assert read_audio(path)[1] == 48_000
    with pytest.raises(MissingTrackError, match="song.mp3: has no video track"):
        read_frames(path)


def test_words_to_read_are_no_track(tmp_path):
    (tmp_path / "a.srt").write_text("1\n00:00:00,000 --> 00:00:02,000\nhello\n")
    with av.open(str(tmp_path / "a.srt")) as old, av.open(str(tmp_path / "words.mkv"), "w") as new:
        copy = new.add_stream_from_template(old.streams[0])
        for packet in old.demux():
            if packet.size:
                packet.stream = copy
                new.mux(packet)
    for read, kind in ((read_audio, "audio"), (read_frames, "video")):
        with pytest.raises(MissingTrackError, match=f"words.mkv: has no {kind} track; leave it out"):
            read(tmp_path / "words.mkv")
    with pytest.raises(MissingTrackError, match="words.mkv: has neither an audio nor a video track"):
        probe(tmp_path / "words.mkv")


def test_a_format_that_nothing_decodes_is_named(tmp_path):
    path = CLOCKS["together"].write(tmp_path / "a.mp4")
    content = path.read_bytes()
    where = content.rindex(b"avc1")
    path.write_bytes(content[:where] + b"zzzz" + content[where + 4 :])
    message = "a.mp4: FFmpeg has no decoder for its video track; re-encode it"
    with pytest.raises(MediaError, match=message) as caught:
        read_frames(path)
    assert not isinstance(caught.value, MissingTrackError)
    assert heard(path) == CLOCKS["together"].heard()
    assert probe(path) == {"audio": 1.0, "video": 1.0}  # it is there


def test_a_track_whose_content_is_gone_is_damaged_and_not_missing(tmp_path):
    path = write_audio(tmp_path / "a.ogg", np.zeros((1, 9600), np.float32), "libopus", "fltp", "mono")
    whole = path.read_bytes()
    for cut in (len(whole) // 3, len(whole) // 2):
        path.write_bytes(whole[:cut])
        with pytest.raises(MediaError, match="a.ogg: .*damaged") as caught:
            read_audio(path)
        assert not isinstance(caught.value, MissingTrackError)


def png(width, height):
    """A picture that says it is of this size, and has nothing in it."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    packed = [struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("size", [(2**31 - 1, 2**31 - 1), (60_000, 30_000), (16_000, 16_000), (0, 5)])
def test_a_size_that_cannot_be_is_refused(tmp_path, size):
    (tmp_path / "big.png").write_bytes(png(*size))
    with pytest.raises(MediaError, match="big.png: .*; re-encode it or leave it out"):
        read_frames(tmp_path / "big.png")


def test_large_frames_come_in_smaller_pieces(tmp_path, monkeypatch):
    path = write_greys(tmp_path / "a.mp4", count=7)
    monkeypatch.setattr("pe_av.media.frames.CHUNK_BYTES", 3 * 3 * HEIGHT * WIDTH)
    assert [len(piece) for piece in iter_frames(path)] == [3, 3, 1]
    monkeypatch.setattr("pe_av.media.frames.CHUNK_BYTES", 1)
    assert [len(piece) for piece in iter_frames(path)] == [1] * 7
    monkeypatch.setattr("pe_av.media.tracks.MAX_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(MediaError, match="a.mp4: .*damaged"):
        read_frames(path)


def test_a_picture_whose_size_changes_is_refused(tmp_path):
    first = write_greys(tmp_path / "a.ts", count=8, options={"bf": "0"})
    second = write_frames(tmp_path / "b.ts", noise(8, 96, 128), stamps=[4 * i + 32 for i in range(8)])
    (tmp_path / "both.ts").write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(MediaError, match="both.ts: the size of the frames changes midway; re-encode it with one size"):
        read_frames(tmp_path / "both.ts")


def test_whatever_happened_to_a_file_its_reading_ends_in_one_line(tmp_path):
    """Bytes overwritten, taken out and put in at random, most of them where the headers are."""
    seeds = [CLOCKS["apart"].write(tmp_path / name) for name in ("seed.mp4", "seed.mkv")]
    seeds.append(write_wav(tmp_path / "seed.wav", np.arange(300, dtype=np.int16)[None]))
    seeds.append(write_frames(tmp_path / "seed.avi", noise(3), "ffv1", "bgr0"))
    reads = (
        probe,
        read_audio,
        partial(read_audio, start=0.3, max_seconds=0.2),
        partial(read_frames, num_frames=4),
        partial(read_frames, frames_per_second=5, max_seconds=2),
        partial(read_frames, start=0.1, end=0.5),
    )
    read, refused = 0, 0
    for seed in seeds:
        whole = seed.read_bytes()
        for number in range(60):
            chance, content = random.Random(number), bytearray(whole)
            for _ in range(chance.choice((1, 1, 2, 8))):
                at = min(int(chance.expovariate(1 / 200)), len(content) - 1)
                at = chance.choice((at, len(content) - 1 - at))  # MP4 has its header at the end
                gone = chance.choice((0, 1, 1, 4, 4, 30))
                content[at : at + gone] = chance.choice(
                    (b"", b"\0" * gone, b"\xff" * gone, chance.randbytes(gone or 9))
                )
            path = seed.with_name("mutated" + seed.suffix)
            path.write_bytes(content)
            for one in reads:
                try:
                    one(path)
                    read += 1
                except MediaError as error:
                    assert str(error).startswith(str(path)) and "\n" not in str(error)
                    refused += 1
    assert read > 200 and refused > 200


@pytest.mark.parametrize("name", ["a\ud800.wav", "a\udce9.wav"])  # half a character, and a byte that is no UTF-8
def test_names_that_are_no_unicode(tmp_path, name):
    for read in (read_audio, read_frames, probe):
        with pytest.raises(MediaError, match="no such file"):
            read(tmp_path / name)
    if name == "a\udce9.wav":  # which a file may well have
        content = write_wav(tmp_path / "a.wav", np.arange(100, dtype=np.int16)[None]).read_bytes()
        (tmp_path / name).write_bytes(content)
        assert read_audio(tmp_path / name)[0].shape == (1, 100)


def test_frames_without_times_are_refused(tmp_path):
    path = write_greys(tmp_path / "raw.h264")
    with pytest.raises(MediaError, match="raw.h264: its frames have no timestamps; re-encode it, e.g. as MP4"):
        read_frames(path)


def test_impossible_limits_are_refused(tmp_path):
    path = write_greys(tmp_path / "a.mp4", count=1)
    for wrong in ({"num_frames": 0}, {"frames_per_second": -1.0}, {"max_seconds": 0.0}, {"max_seconds": math.nan}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* is not positive"):
            read_frames(path, **wrong)
    with pytest.raises(ValueError, match="max_seconds=-1 is not positive"):
        read_audio(path, max_seconds=-1)
    with pytest.raises(ValueError, match="two ways to sample: give one"):
        read_frames(path, num_frames=2, frames_per_second=2)


def test_importing_the_processor_loads_no_codec():
    code = "import sys, pe_av.media.processor; print([name for name in ('av',) if name in sys.modules])"
    root = Path(__file__).parent.parent
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
