"""Clips that are longer than the model was trained for, in windows."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from pe_av.config import WindowsConfig
from pe_av.data.manifest import Clip, Manifest, measured
from pe_av.ranks import of_rank_0, rank

LEAST = 0.1  # seconds beyond a window that are worth another one; headers round


def window_starts(length: float, seconds: float, hop: float) -> list[float]:
    """When the windows of a clip begin, in seconds: every `hop`, and the last so that it ends where the clip ends."""
    if length <= seconds + LEAST:
        return [0.0]
    count = math.ceil((length - seconds - LEAST) / hop)
    return [number * hop for number in range(count)] + [length - seconds]


@dataclass
class WindowedClips(Sequence[Clip]):
    """The windows of the clips of a manifest, clip after clip. A clip that needs no windows is its own one."""

    clips: Manifest
    rows: NDArray[np.int64]  # (W,) the clip of each window
    starts: NDArray[np.float64]  # (W,) seconds from the clip's begin
    lengths: NDArray[np.float64]  # (N,) of the clips in seconds, infinite if unknown
    seconds: float  # of a window

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Clip:
        return self._window(self.clips[int(self.rows[index])], index)

    def __iter__(self) -> Iterator[Clip]:
        clips = enumerate(self.clips)
        number, clip = next(clips, (0, None))
        for index, row in enumerate(self.rows):
            while number < row:
                number, clip = next(clips)
            yield self._window(clip, index)

    def _window(self, clip: Clip, index: int) -> Clip:
        row, start = self.rows[index], float(self.starts[index])
        is_last = index + 1 == len(self.rows) or self.rows[index + 1] != row
        if start == 0 and is_last:
            return clip
        # the last one reaches to the end of the file, where the header's length is a little too short
        length = float(self.lengths[row]) - start if is_last else self.seconds
        begin = clip.start + start
        name = f"{clip.id} [{start:.2f}–{start + length:.2f} s]"
        return replace(clip, id=name, start=begin, end=clip.end if is_last else begin + length, seconds=length)


def windowed(clips: Manifest, config: WindowsConfig, threads: int = 8) -> WindowedClips:
    """The windows of clips. Rank 0 reads lengths that the manifest does not give from the headers of files."""
    lengths = None
    if rank() == 0:
        measuring = iter(track(clips, "measuring", total=len(clips), console=Console(stderr=True), transient=True))
        with ThreadPoolExecutor(threads) as pool:  # which would take all clips at once
            chunks = iter(lambda: list(islice(measuring, 1000)), [])
            lengths = np.array([length for chunk in chunks for length in pool.map(_length, chunk)], dtype=np.float64)
    lengths = of_rank_0(lengths)
    hop = config.hop or config.seconds
    starts = [window_starts(length, config.seconds, hop) if length < math.inf else [0.0] for length in lengths.tolist()]
    rows = np.repeat(np.arange(len(clips)), [len(each) for each in starts])
    return WindowedClips(clips, rows, np.array([start for each in starts for start in each]), lengths, config.seconds)


def _length(clip: Clip) -> float:
    known = clip.seconds, None if clip.end is None else clip.end - clip.start
    if known == (None, None):
        known = (measured(clip).seconds,)
    return min((length for length in known if length is not None), default=math.inf)
