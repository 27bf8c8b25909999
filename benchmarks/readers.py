"""The frames of PyAV, decord and torchcodec: which of 16 sampled frames are right, and the seconds that they take.

Files of many kinds are made on the spot. Right is what PyAV gives when it decodes the whole file from its beginning.
decord and torchcodec are asked for the frames of the same numbers without our rule on which files they may read
(pe_av/media/readers.py); `ours` is iter_frames with the reader, and has to be right always. All decode on one thread.
Times are processor times, which other work on the machine disturbs little, the best of several turns.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.peer import positive, save
from pe_av.config import ConfigError
from pe_av.media.frames import iter_frames
from pe_av.media.readers import check_reader
from pe_av.media.timeline import spread_indices

SAMPLED = 16
# name -> codec, options, pixel format, seconds, height; the last are the ones whose time is of interest
KINDS = {
    "h264.mp4": ("libx264", {"bf": "2", "g": "25"}, "yuv420p", 4, 144),
    "h264.mkv": ("libx264", {"bf": "2", "g": "25"}, "yuv420p", 4, 144),
    "vp9.webm": ("libvpx-vp9", {}, "yuv420p", 4, 144),
    "open_groups.mp4": ("libx264", {"bf": "2", "g": "25", "x264-params": "open-gop=1"}, "yuv420p", 4, 144),
    "hevc.mp4": ("libx265", {"x265-params": "keyint=25:log-level=0"}, "yuv420p", 4, 144),
    "mpeg4.mp4": ("mpeg4", {"bf": "2"}, "yuv420p", 4, 144),
    "b_frames.avi": ("mpeg4", {"bf": "2"}, "yuv420p", 4, 144),
    "h264.ts": ("libx264", {"bf": "2", "g": "25"}, "yuv420p", 4, 144),
    "10_bit.mp4": ("libx265", {"x265-params": "log-level=0"}, "yuv420p10le", 4, 144),
    "edit_list.mp4": ("libx264", {"bf": "2", "g": "25"}, "yuv420p", 4, 144),
    "5_s_720p.mp4": ("libx264", {"preset": "veryfast"}, "yuv420p", 5, 720),
    "60_s_360p.mp4": ("libx264", {"preset": "veryfast"}, "yuv420p", 60, 360),
}


def write(path: Path, codec: str, options: dict[str, str], pixels: str, seconds: int, height: int) -> None:
    """A picture that moves, 25 frames per second."""
    width = height * 16 // 9
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8 + 32, width // 8 + 32, 3), dtype=np.uint8)
    wide = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        for i in range(25 * seconds):
            y, x = i * 2 % 248, i * 3 % 248
            picture = np.ascontiguousarray(wide[y : y + height, x : x + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def cut_by_edit_list(source: Path, target: Path, seconds: float) -> None:
    """Copy the packets, moved before the zero of the clock, as `ffmpeg -ss … -c copy` does."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.pts -= int(seconds / stream.time_base)
                packet.dts -= int(seconds / stream.time_base)
                packet.stream = copy
                new.mux(packet)


def decode_all(path: Path) -> tuple[np.ndarray, list[int]]:
    """The sampled (F, H, W, 3) frames of the whole file, decoded without a shortcut, and their numbers."""
    with av.open(str(path)) as container:
        numbers = spread_indices(sum(1 for _ in container.decode(video=0)), SAMPLED)
    wanted, frames = set(numbers), {}
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                frames[number] = frame.to_ndarray(format="rgb24")
    return np.stack([frames[number] for number in numbers]), numbers


def by_decord(path: Path, numbers: Sequence[int]) -> np.ndarray:
    import decord

    return decord.VideoReader(str(path), num_threads=1).get_batch(numbers).asnumpy()


def by_torchcodec(path: Path, numbers: Sequence[int]) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    video = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1)
    return video.get_frames_at(list(numbers)).data.numpy()


def ours(path: Path, reader: str) -> np.ndarray:
    return torch.cat(list(iter_frames(path, SAMPLED, reader=reader))).permute(0, 2, 3, 1).numpy()


def wrong(read: Callable[[], np.ndarray], right: np.ndarray) -> str:
    """How many of the frames differ, and by how much: the range of the mean difference of those, of 255."""
    try:
        found = read()
    except (RuntimeError, IndexError) as error:  # decord's errors are RuntimeErrors too
        return f"refused ({type(error).__name__})"
    if found.shape != right.shape:
        return "another size"
    apart = np.abs(found.astype(int) - right).mean((1, 2, 3))
    apart = sorted(apart[apart > 0])
    return f"{len(apart)} wrong, by {apart[0]:.1f} to {apart[-1]:.1f}" if apart else "right"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=positive, default=5)
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    alone = {"decord": by_decord, "torchcodec": by_torchcodec}
    for reader in list(alone):
        try:
            check_reader(reader)
        except ConfigError as error:
            print(f"left out: {error}")
            del alone[reader]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, how in KINDS.items():
            path = Path(folder) / name
            if name == "edit_list.mp4":
                cut_by_edit_list(Path(folder) / "h264.mp4", path, 0.6)
            else:
                write(path, *how)
            right, numbers = decode_all(path)
            ways: dict[str, Callable[[], np.ndarray]] = {"PyAV": lambda path=path: ours(path, "pyav")}
            for reader, read in alone.items():
                ways[reader] = lambda read=read, path=path, numbers=numbers: read(path, numbers)
                ways[f"ours with {reader}"] = lambda reader=reader, path=path: ours(path, reader)
            row = {"file": name} | {way: {"frames": wrong(read, right)} for way, read in ways.items()}
            best = {way: float("inf") for way in ways if not row[way]["frames"].startswith("refused")}
            for _ in range(turns):
                for way in best:
                    started = time.process_time()
                    ways[way]()
                    best[way] = min(best[way], time.process_time() - started)
            for way, seconds in best.items():
                row[way]["cpu_seconds"] = round(seconds, 4)
            rows.append(row)
    table = Table(*rows[0])
    for row in rows:
        cells = [f"{cell['frames']}\n{1000 * cell.get('cpu_seconds', 0):.0f} ms" for cell in list(row.values())[1:]]
        table.add_row(row["file"], *cells)
    Console(width=160).print(table)
    for row in rows:
        assert all(cell["frames"] == "right" for way, cell in row.items() if way.startswith(("PyAV", "ours"))), row
    save("readers", rows, {"sampled": SAMPLED, "turns": turns, "threads": 1}, torch.device("cpu"))


if __name__ == "__main__":
    main()
