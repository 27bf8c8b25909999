"""The frame-level demo: sounds of the demo world, two at different times in one recording, and the caption of one.

What is asked for sounds once, for 1.6 of the 6.4 s; the other sound differs in shape, size or motion. Held-out
recordings ask for combinations of shape, size, motion, tempo and place that were never asked for in training.
"""

import json
import shutil
import uuid
from dataclasses import replace
from itertools import product
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from pe_av.config import SpanDemoConfig
from pe_av.data.demo import ATTRIBUTES, MOTIONS, NUM_SAMPLES, PLACES, SAMPLE_RATE, Scene, render_sound

WORLD_VERSION = 1  # raise it with every change of what is rendered
LENGTH = 4 * NUM_SAMPLES  # 6.4 s
AUDIBLE = [name for name in ATTRIBUTES if name != "colour"]
COMBINATIONS = list(product(*(ATTRIBUTES[name] for name in AUDIBLE)))
HISS = 0.003  # of the room, root mean square


def caption(scene: Scene) -> str:
    """What is heard, in words: all but the colour."""
    return f"a {scene.size} {scene.shape} {MOTIONS[scene.motion]} {scene.tempo} {PLACES[scene.place]}"


def prepare_span_demo(config: SpanDemoConfig) -> tuple[Path, Path]:
    """The manifests (train.jsonl, eval.jsonl), rendered on first use; lines are {"path", "caption", "spans"}."""
    folder = Path(config.root) / f"v{WORLD_VERSION}-seed{config.seed}-{config.train_clips}-{config.eval_clips}"
    manifests = folder / "train.jsonl", folder / "eval.jsonl"
    if folder.exists():
        return manifests
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(len(COMBINATIONS))
    held_out = len(COMBINATIONS) // 6
    unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        jobs = []
        for part, count, asked in (
            ("train", config.train_clips, order[held_out:]),
            ("eval", config.eval_clips, order[:held_out]),
        ):
            (unfinished / part).mkdir(parents=True)
            jobs += [(part, i, int(asked[i % len(asked)])) for i in range(count)]
        lines: dict[str, list[str]] = {"train": [], "eval": []}
        for part, number, asked in track(jobs, "rendering the frame demo", console=Console(stderr=True)):
            target, other, start, sound = _recording(rng, asked)
            path = f"{part}/{number:04d}.m4a"
            _write_m4a(unfinished / path, sound)
            span = [round(start / SAMPLE_RATE, 3), round((start + NUM_SAMPLES) / SAMPLE_RATE, 3)]
            entry = {"path": path, "caption": caption(target), "spans": [span], "other": caption(other)}
            lines[part].append(json.dumps(entry) + "\n")
        for part, written in lines.items():
            (unfinished / f"{part}.jsonl").write_text("".join(written), encoding="utf-8")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return manifests


def _recording(rng: np.random.Generator, asked: int) -> tuple[Scene, Scene, int, NDArray[np.float32]]:
    """The scene that is asked for, another one, the sample at which the first starts, and the sound of both."""
    target = _scene(rng, COMBINATIONS[asked])
    while True:
        other = _scene(rng, COMBINATIONS[rng.integers(len(COMBINATIONS))])
        if any(getattr(other, name) != getattr(target, name) for name in ("shape", "size", "motion")):
            break
    room = LENGTH - 2 * NUM_SAMPLES
    first, gap = sorted(rng.integers(room + 1, size=2).tolist())
    starts = [first, gap + NUM_SAMPLES]  # never at the same time
    if rng.integers(2):
        starts.reverse()
    sound = HISS * rng.standard_normal(LENGTH).astype(np.float32)
    for scene, start in zip((target, other), starts, strict=True):
        sound[start : start + NUM_SAMPLES] += render_sound(scene)
    return target, other, starts[0], sound


def _scene(rng: np.random.Generator, combination: tuple[str, ...]) -> Scene:
    stretch, hurry = rng.uniform(-1, 1, size=2).tolist()
    scene = Scene(*combination, "white", 0, stretch, hurry, 0.0, 0.0, 0.0, 0)
    return replace(scene, phase=float(rng.uniform(0, 2)), seed=int(rng.integers(2**32)))


def _write_m4a(path: Path, sound: NDArray[np.float32]) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono", options={"aac_coder": "fast"})
        stream.bit_rate = 64_000
        wave = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        wave.sample_rate, wave.pts = SAMPLE_RATE, 0
        container.mux(stream.encode(wave))
        container.mux(stream.encode())
