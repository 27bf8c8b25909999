"""One part of the model on inputs of growing size, ours and transformers': seconds and peak memory of each size.

A series runs in a process of its own, and ends before a size that would take more time or memory than there is.
"""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.peer import PeakMemory, load_theirs, their_audio, their_codec, their_frames, their_text, touch
from pe_av import load_model
from pe_av.config import ModelConfig
from pe_av.config.compose import load_preset

CPU = torch.device("cpu")
Run = Callable[[], Any]
Point = dict[str, float]  # "size", "seconds", and "mib" of memory beyond the weights and the inputs


def codec(model: Any, ours: bool, config: ModelConfig, seconds: int) -> Run:
    waveform = 0.1 * torch.randn(1, 1, config.audio.codec.sampling_rate * seconds)
    return (lambda: model.audio.codec(waveform)) if ours else (lambda: their_codec(model, waveform))


def audio(model: Any, ours: bool, config: ModelConfig, seconds: int, clips: int = 1) -> Run:
    features = torch.randn(clips, 25 * seconds, config.audio.codec.codebook_dim)
    mask = torch.ones(features.shape[:2], dtype=torch.bool)
    return (lambda: model.audio(features, mask)) if ours else (lambda: their_audio(model, features, mask))


def batch(model: Any, ours: bool, config: ModelConfig, clips: int) -> Run:
    return audio(model, ours, config, 10, clips)


def frames(model: Any, ours: bool, config: ModelConfig, count: int) -> Run:
    size = config.video.vision.image_size
    pixels = torch.rand(1, count, 3, size, size) * 2 - 1
    return (lambda: model.video.encode(pixels)) if ours else (lambda: their_frames(model, pixels))


def tokens(model: Any, ours: bool, config: ModelConfig, count: int) -> Run:
    ids = torch.randint(5, config.text.vocab_size, (1, count))
    mask = torch.ones_like(ids, dtype=torch.bool)
    return (lambda: model.text(ids, mask)) if ours else (lambda: their_text(model, ids, mask))


PARTS: dict[str, Callable[[Any, bool, ModelConfig, int], Run]] = {
    "codec": codec,
    "audio": audio,
    "batch": batch,
    "frames": frames,
    "tokens": tokens,
}


@torch.inference_mode()
def series(part: str, ours: bool, preset: str, folder: str, sizes: Iterable[int], budget: float) -> list[Point]:
    """The points of one part; to be called in a process of its own.

    Args:
        folder: the checkpoint, of our format for ours and of transformers' for theirs.
        sizes: ascending. The first one is run once before, to load what is loaded once.
        budget: seconds for all sizes; infinite: all of them are measured, whatever they take.
    """
    model, config = load_model(folder) if ours else load_theirs(folder), load_preset(preset)
    touch(model)
    sizes = list(sizes)
    PARTS[part](model, ours, config, sizes[0])()
    return grow(lambda size: PARTS[part](model, ours, config, size), sizes, budget)


def grow(prepare: Callable[[int], Run], sizes: Iterable[int], budget: float) -> list[Point]:
    """Measure one size after the other; with a budget, while the next one can be expected to fit it and the memory."""
    points: list[Point] = []
    started = time.perf_counter()
    for size in sizes:
        if points and budget < math.inf and not _fits(points, size, budget - (time.perf_counter() - started)):
            break
        run = prepare(size)
        with PeakMemory(CPU) as memory:
            seconds = [_timed(run)]
        while sum(seconds) < 1 and len(seconds) < 5:  # short runs are repeated
            seconds.append(_timed(run))
        points.append({"size": size, "seconds": min(seconds), "mib": memory.mib})
    return points


def exponent(points: list[Point], quantity: str) -> float | None:
    """The slope of log quantity over log size, by least squares on the upper half of the points; None: too few."""
    upper = points[len(points) // 2 :] if len(points) > 3 else points[-2:]
    upper = [point for point in upper if point[quantity] > 0]
    if len(upper) < 2:
        return None
    x, y = ([math.log(point[name]) for point in upper] for name in ("size", quantity))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - mean_x) ** 2 for a in x)


def _fits(points: list[Point], size: int, seconds: float) -> bool:
    """Whether the next size fits the time and the free memory if its cost grows as before, at least linearly."""
    last, factor = points[-1], size / points[-1]["size"]
    grown = {q: last[q] * factor ** max(exponent(points, q) or 1, 1) for q in ("seconds", "mib")}
    free = next(int(line.split()[1]) for line in Path("/proc/meminfo").open() if line.startswith("MemAvailable")) / 1024
    return grown["seconds"] < seconds and grown["mib"] < 0.7 * free


def _timed(run: Run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
