"""The frame-level demo: recordings of two sounds of the demo world at different times, and the caption of one of them.

The sound that is asked for lasts 1.6 of the 6.4 s; the other one differs in shape, size or motion. The evaluation
recordings ask for combinations of shape, size, motion, tempo and place that training never asks for.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from pe_av.config import SpanDemoConfig
from pe_av.data.demo_scenes import ATTRIBUTES, MOTIONS, NUM_SAMPLES, PLACES, Scene, render_audio
from pe_av.data.rendering import SAMPLE_RATE, finished_folder, write_manifest, write_mp4

WORLD_VERSION = 1  # part of the folder's name; raise it with every change of what is rendered
LENGTH = 4 * NUM_SAMPLES  # 6.4 s
AUDIBLE = [name for name in ATTRIBUTES if name != "colour"]
COMBINATIONS = list(product(*(ATTRIBUTES[name] for name in AUDIBLE)))
HISS = 0.003  # of the room, root mean square


def caption(scene: Scene) -> str:
    """What is heard, in words: every attribute but the colour."""
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
    targets = {"train": (config.train_clips, order[held_out:]), "eval": (config.eval_clips, order[:held_out])}
    jobs = [(split, i, int(of[i % len(of)])) for split, (count, of) in targets.items() for i in range(count)]
    with finished_folder(folder) as unfinished:
        entries: dict[str, list[dict[str, Any]]] = {split: [] for split in targets}
        for split in targets:
            (unfinished / split).mkdir()
        for split, number, combination in track(jobs, "rendering the frame demo", console=Console(stderr=True)):
            target, other, start, audio = _recording(rng, combination)
            path = f"{split}/{number:04d}.m4a"
            write_mp4(unfinished / path, audio)
            span = [round(start / SAMPLE_RATE, 3), round((start + NUM_SAMPLES) / SAMPLE_RATE, 3)]
            entry = {"path": path, "caption": caption(target), "spans": [span], "other": caption(other)}
            entries[split].append(entry)
        for split in targets:
            write_manifest(unfinished / f"{split}.jsonl", entries[split])
    return manifests


def _recording(rng: np.random.Generator, combination: int) -> tuple[Scene, Scene, int, NDArray[np.float32]]:
    """The scene that is asked for, another one, the sample at which the first starts, and the audio of both."""
    target = _scene(rng, COMBINATIONS[combination])
    while True:
        other = _scene(rng, COMBINATIONS[rng.integers(len(COMBINATIONS))])
        if any(getattr(other, name) != getattr(target, name) for name in ("shape", "size", "motion")):
            break
    slack = LENGTH - 2 * NUM_SAMPLES
    first, second = sorted(rng.integers(slack + 1, size=2).tolist())
    starts = [first, second + NUM_SAMPLES]  # so that the two never overlap
    if rng.integers(2):
        starts.reverse()
    audio = HISS * rng.standard_normal(LENGTH).astype(np.float32)
    for scene, start in zip((target, other), starts, strict=True):
        audio[start : start + NUM_SAMPLES] += render_audio(scene)
    return target, other, starts[0], audio


def _scene(rng: np.random.Generator, combination: tuple[str, ...]) -> Scene:
    stretch, hurry = rng.uniform(-1, 1, size=2).tolist()
    scene = Scene(*combination, "white", 0, stretch, hurry, 0.0, 0.0, 0.0, 0)
    return replace(scene, phase=float(rng.uniform(0, 2)), seed=int(rng.integers(2**32)))
