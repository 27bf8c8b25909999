"""What the corpora that are rendered on first use share: their folder, the processes that render, and the files."""

import json
import multiprocessing
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

FRAME_RATE = 10  # per second
SAMPLE_RATE = 48_000  # Hz


@contextmanager
def finished_folder(folder: Path) -> Iterator[Path]:
    """A folder to render into. It gets the name `folder` when the block ends, so a folder with that name is complete.

    If the block fails, nothing is left behind. If another process, which renders the same, has finished first, its
    folder stays.
    """
    unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def render_all(render: Callable[[Any], Any], jobs: Sequence[Any], title: str, workers: int) -> list[Any]:
    """What `render` returns for each job, with a progress bar; one worker renders in this process."""
    # spawn, because forking a process in which torch has threads can hang
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = pool.map(render, jobs, chunksize=8) if workers > 1 else map(render, jobs)
        try:
            return list(track(results, title, total=len(jobs), console=Console(stderr=True)))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # leaving the block would first wait for every job
            raise


def write_manifest(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Write the rows of a manifest as JSONL."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def write_mp4(path: Path, audio: NDArray[np.float32], frames: NDArray[np.uint8] | None = None) -> None:
    """Write AAC at 64 kb/s and, where there are frames, H.264 at crf 20.

    Args:
        audio: (samples,) at 48 kHz.
        frames: (F, H, W, 3) at 10 per second.
    """
    with av.open(str(path), "w", format="mp4") as container:
        if frames is not None:
            # one thread: the processes are parallel already; no B-frames: presentation order is file order
            options = {"crf": "20", "preset": "veryfast", "threads": "1", "bf": "0"}
            video_track = container.add_stream("libx264", rate=FRAME_RATE, options=options)
            video_track.height, video_track.width, video_track.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        # on these tones the default coder takes twice the time and leaves ten times the noise
        audio_track = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono", options={"aac_coder": "fast"})
        audio_track.bit_rate = 64_000
        if frames is not None:
            for frame in frames:
                container.mux(video_track.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(video_track.encode())
        wave = av.AudioFrame.from_ndarray(audio[None], format="fltp", layout="mono")
        wave.sample_rate, wave.time_base, wave.pts = SAMPLE_RATE, Fraction(1, SAMPLE_RATE), 0  # else it is 21 ms late
        container.mux(audio_track.encode(wave))
        container.mux(audio_track.encode())
