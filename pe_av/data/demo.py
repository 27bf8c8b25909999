"""The demo world: small scenes with a caption, rendered to MP4 files, in which sound and picture belong together.

A scene is one object that does one thing somewhere. Six attributes name it; each is seen, five are also heard:

    shape    outline                 timbre
    size     radius                  pitch (small is high)
    motion   path of the object      loudness and pitch over time
    tempo    events per second       events per second
    place    backdrop                background noise
    colour   fill                    -

The evaluation clips differ pairwise in what is heard, so every one of them can be told from the others by its sound,
by its picture and by its caption. No combination of six attributes is both trained on and evaluated on.
"""

import json
import multiprocessing
import os
import shutil
import uuid
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import cos, pi, sin
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from pe_av.config import ConfigError, DemoConfig

WORLD_VERSION = 2  # raise it with every change of what is rendered: finished folders are found by it

SIDE = 64  # pixels
NUM_FRAMES = 16
FRAME_RATE = 10  # per second
SAMPLE_RATE = 48_000  # Hz
NUM_SAMPLES = SAMPLE_RATE * NUM_FRAMES // FRAME_RATE
FLOOR = 57  # row at which the floor begins

# tips, radius between two tips, radius of the tips: all relative to the object's; the last evens out the areas
SHAPES = {
    "ball": (32, cos(pi / 32), 1.0),
    "box": (4, cos(pi / 4), 1.15),
    "wedge": (3, cos(pi / 3), 1.35),
    "star": (5, 0.48, 1.3),
}
SIZES = {"small": (9.0, 1200.0), "medium": (13.0, 520.0), "large": (18.5, 220.0)}  # radius in pixels, pitch in Hz
MOTIONS = {"bounces": "bouncing", "slides": "sliding", "spins": "spinning", "blinks": "blinking"}
# events per second: contacts, sweeps, turns, flashes; three turns a second are 108° a frame, so that neither a box
# (the same after 90°) nor a wedge (after 120°) seems to stand still
TEMPOS = {"slowly": 1.0, "quickly": 3.0}
PLACES = {"quiet": "on a quiet day", "rain": "in the rain", "factory": "in a factory"}
COLOURS = {
    "red": (225, 35, 35),
    "green": (40, 190, 60),
    "blue": (50, 90, 250),
    "yellow": (240, 215, 40),
    "purple": (185, 50, 220),
    "white": (245, 245, 245),
}
ATTRIBUTES = {  # colour is last: six consecutive combinations sound the same
    "shape": SHAPES,
    "size": SIZES,
    "motion": MOTIONS,
    "tempo": TEMPOS,
    "place": PLACES,
    "colour": COLOURS,
}
COMBINATIONS = list(product(*ATTRIBUTES.values()))
TEMPLATES = (
    "a {size} {colour} {shape} {motion} {tempo} {place}",
    "{place}, a {size} {colour} {shape} is {moving} {tempo}",
    "a {size} {colour} {shape} is {tempo} {moving} {place}",
    "the {shape} is {size} and {colour}, and {motion} {tempo} {place}",
)

TONE_LEVEL = 0.37  # of the object; its peaks stay below 0.8
RAIN_LEVEL, HUM_LEVEL = 0.03, 0.03  # root mean square
HIGHEST_PARTIAL = 8_000  # Hz; far below half the sampling rate, so that no partial folds back
DECAY = 0.07  # seconds in which the tone of a contact falls to 1/e
FADE = 0.005  # seconds; long enough that switching a tone does not click


@dataclass(frozen=True)
class Scene:
    """Everything about one clip: `render_frames` and `render_sound` read nothing else."""

    shape: str
    size: str
    motion: str
    tempo: str
    place: str
    colour: str
    template: int  # of the caption
    stretch: float  # -1 … 1: how large it is within its size, heard as well as seen
    hurry: float  # -1 … 1: how quick it is within its tempo
    phase: float  # events passed at the start, 0 … 2
    x: float  # -1 … 1: where in the free room
    y: float
    seed: int  # of rain drops and noise

    @property
    def rate(self) -> float:
        """Events per second."""
        return TEMPOS[self.tempo] * (1 + 0.05 * self.hurry)

    def events(self, seconds: NDArray) -> NDArray:
        """Events passed at each time: whole numbers at floor contacts, turning points, full turns, appearances."""
        return self.rate * seconds + self.phase


def split(config: DemoConfig) -> tuple[list[Scene], list[Scene]]:
    """The scenes to train on and those to evaluate on.

    Raises:
        ConfigError: the world has fewer scenes than asked for.
    """
    total = len(COMBINATIONS)
    audible = total // len(COLOURS)
    if config.seed < 0:
        raise ConfigError(f"data.demo.seed={config.seed} is negative")
    if not 1 <= config.eval_clips <= audible:
        raise ConfigError(
            f"data.demo.eval_clips={config.eval_clips} is not in 1 … {audible}, the number of distinct sounds"
        )
    if not 1 <= config.train_clips <= total - config.eval_clips:
        raise ConfigError(
            f"data.demo.train_clips={config.train_clips} is not in 1 … {total - config.eval_clips}, "
            f"what eval_clips={config.eval_clips} leaves of {total} scenes"
        )
    rng = np.random.default_rng(config.seed)
    sounds = rng.permutation(audible)[: config.eval_clips]
    colours = rng.permutation(np.arange(config.eval_clips) % len(COLOURS))
    held_out = sounds * len(COLOURS) + colours
    rest = rng.permutation(np.setdiff1d(np.arange(total), held_out))[: config.train_clips]
    return [_scene(config.seed, i) for i in rest], [_scene(config.seed, i) for i in held_out]


def caption(scene: Scene) -> str:
    """One sentence that states all six attributes."""
    words = {name: getattr(scene, name) for name in ATTRIBUTES}
    words |= {"moving": MOTIONS[scene.motion], "place": PLACES[scene.place]}
    return TEMPLATES[scene.template].format(**words)


def render_frames(scene: Scene) -> NDArray[np.uint8]:
    """(16, 64, 64, 3) RGB; each frame shows the middle of the tenth of a second in which it is on screen."""
    seconds = (np.arange(NUM_FRAMES) + 0.5) / FRAME_RATE
    events = scene.events(seconds)
    tips, notch, reach = SHAPES[scene.shape]
    radius = SIZES[scene.size][0] * (1 + 0.08 * scene.stretch) * reach
    rest_y = FLOOR - radius * cos(pi / tips)  # every shape here stands this far below its centre
    room = SIDE / 2 - radius

    x, y, turn = np.repeat([[SIDE / 2 + scene.x * room], [SIDE / 2 + scene.y * room], [0.0]], NUM_FRAMES, axis=1)
    if scene.motion == "bounces":
        since = events % 1
        y = rest_y - (rest_y - radius) * 4 * since * (1 - since)
    elif scene.motion == "slides":
        x, y = SIDE / 2 + room * _sweep(events), np.full(NUM_FRAMES, rest_y)
    elif scene.motion == "spins":
        turn = 2 * pi * events
    shown = _visible(events) if scene.motion == "blinks" else np.ones(NUM_FRAMES)

    # the outline in polar coordinates: every shape is a ring of tips joined to the notches between them
    pixel = np.arange(SIDE) + 0.5
    dx, dy = pixel[None, None, :] - x[:, None, None], pixel[None, :, None] - y[:, None, None]
    angle = np.arctan2(dx, -dy) - turn[:, None, None]  # clockwise from the top
    distance = np.hypot(dx, dy)
    half = pi / tips
    off_tip = np.abs((angle + (half if scene.shape != "box" else 0.0)) % (2 * half) - half)  # a box stands on a side
    outline = radius * notch * sin(half) / (np.sin(off_tip) + notch * np.sin(half - off_tip))
    body = np.clip(outline - distance + 0.5, 0, 1) * shown[:, None, None]
    # a dark dot between the centre and the top, without which a turning ball looks still
    from_dot = np.hypot(distance * np.sin(angle), distance * np.cos(angle) - 0.42 * radius)
    dot = np.clip(0.2 * radius - from_dot + 0.5, 0, 1)

    paint = np.array(COLOURS[scene.colour]) * (1 - 0.85 * dot[..., None])  # (frames, rows, columns, RGB)
    backdrop = _backdrop(scene, seconds)[..., None]
    return np.round(backdrop + body[..., None] * (paint - backdrop)).astype(np.uint8)


def render_sound(scene: Scene) -> NDArray[np.float32]:
    """(76800,) mono at 48 kHz. Levels are absolute, so loudness says the same in every clip."""
    seconds = np.arange(NUM_SAMPLES) / SAMPLE_RATE
    events = scene.events(seconds)
    since = events % 1 / scene.rate  # seconds since the last event
    pitch = np.full(NUM_SAMPLES, SIZES[scene.size][1] / (1 + 0.05 * scene.stretch))
    if scene.motion == "bounces":
        loudness = np.minimum(since / 0.002, 1) * np.exp(-since / DECAY)
    elif scene.motion == "slides":
        pitch *= 2 ** (_sweep(events) / 4)  # three semitones up at the right end, three down at the left
        loudness = np.ones(NUM_SAMPLES)
    elif scene.motion == "spins":
        loudness = 0.55 + 0.45 * np.cos(2 * pi * events)  # loudest with the dot at the top
    else:
        ramp = np.ones(round(FADE * SAMPLE_RATE))
        loudness = np.convolve(_visible(events), ramp / ramp.size, mode="same")

    cycles = np.cumsum(pitch) / SAMPLE_RATE
    ratios, weights = _partials(scene.shape, HIGHEST_PARTIAL / pitch.max())
    tone = sum(weight * np.sin(2 * pi * ratio * cycles) for ratio, weight in zip(ratios, weights, strict=True))
    sound = TONE_LEVEL * loudness * tone + _background(scene, seconds)
    ends = np.clip(np.minimum(seconds, seconds[::-1]) / FADE, 0, 1)
    return (sound * ends).astype(np.float32)


def write_mp4(path: Path, frames: NDArray[np.uint8], sound: NDArray[np.float32]) -> None:
    """H.264 at crf 20 and AAC at 64 kb/s; `frames` (F, H, W, 3) at 10 per second, `sound` (samples,) at 48 kHz."""
    with av.open(str(path), "w", format="mp4") as container:
        # one thread: the processes are parallel already; no B-frames: presentation order is file order
        options = {"crf": "20", "preset": "veryfast", "threads": "1", "bf": "0"}
        video = container.add_stream("libx264", rate=FRAME_RATE, options=options)
        video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        # on these tones the default coder takes twice the time and leaves ten times the noise
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono", options={"aac_coder": "fast"})
        audio.bit_rate = 64_000
        for picture in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        wave = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        wave.sample_rate, wave.time_base, wave.pts = SAMPLE_RATE, Fraction(1, SAMPLE_RATE), 0  # else 21 ms late
        container.mux(audio.encode(wave))
        container.mux(audio.encode())


def prepare_demo(config: DemoConfig) -> tuple[Path, Path]:
    """The manifests (train.jsonl, eval.jsonl) of the demo world, which is rendered if it is not there yet.

    The folder gets its name only when everything is in it, so one that has it is complete. Processes that render at
    the same time do not disturb each other: the first to finish wins. A script that calls this needs the usual
    `if __name__ == "__main__":`, since the rendering processes import it.

    Raises:
        ConfigError: the world has fewer scenes than asked for, or the folder was tampered with.
    """
    splits = dict(zip(("train", "eval"), split(config), strict=True))
    name = f"v{WORLD_VERSION}-seed{config.seed}-{config.train_clips}-{config.eval_clips}"
    folder = Path(config.root) / name
    manifests = folder / "train.jsonl", folder / "eval.jsonl"
    if folder.exists():
        if not all(manifest.is_file() for manifest in manifests):
            raise ConfigError(f"{folder} lacks a manifest: delete the folder, and it is rendered anew")
        return manifests

    unfinished = folder.with_name(f".{name}-{uuid.uuid4().hex[:8]}")
    try:
        jobs = []
        for part, scenes in splits.items():
            (unfinished / part).mkdir(parents=True)
            jobs += [(unfinished / part / f"{i:04d}.mp4", scene) for i, scene in enumerate(scenes)]
        # a process takes seconds to start, in which another one renders dozens of clips
        _render(jobs, workers=min(os.cpu_count() or 1, 1 + len(jobs) // 64))
        for part, scenes in splits.items():
            lines = [json.dumps(_entry(part, i, scene)) + "\n" for i, scene in enumerate(scenes)]
            (unfinished / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster, with the same result
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return manifests


def _render(jobs: list[tuple[Path, Scene]], workers: int) -> None:
    # spawn: forking a process in which torch already has threads can hang
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = pool.map(_render_clip, jobs, chunksize=8) if workers > 1 else map(_render_clip, jobs)
        try:
            for _ in track(done, "rendering the demo world", total=len(jobs), console=Console(stderr=True)):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)  # leaving the block would first wait for every clip
            raise


def _render_clip(job: tuple[Path, Scene]) -> None:
    path, scene = job
    write_mp4(path, render_frames(scene), render_sound(scene))


def _entry(part: str, number: int, scene: Scene) -> dict[str, str]:
    attributes = {name: getattr(scene, name) for name in ATTRIBUTES}
    names = {"id": f"{part}-{number:04d}", "path": f"{part}/{number:04d}.mp4", "caption": caption(scene)}
    return names | attributes


def _scene(seed: int, index: int) -> Scene:
    rng = np.random.default_rng((seed, index))  # of its own: a clip is the same whatever else is rendered
    stretch, hurry, x, y = rng.uniform(-1, 1, size=4).tolist()
    return Scene(
        *COMBINATIONS[index],
        template=int(rng.integers(len(TEMPLATES))),
        stretch=stretch,
        hurry=hurry,
        phase=float(rng.uniform(0, 2)),
        x=x,
        y=y,
        seed=int(rng.integers(2**32)),
    )


def _sweep(events: NDArray) -> NDArray:
    """Position between the left end (-1) and the right end (1), which steadily changes sides from event to event."""
    return 2 * np.abs(events % 2 - 1) - 1


def _visible(events: NDArray) -> NDArray:
    return (events % 1 < 0.5).astype(np.float64)


def _backdrop(scene: Scene, seconds: NDArray) -> NDArray:
    """(frames, rows, columns) grey levels; never a hue, so that colours are the object's alone."""
    rng = np.random.default_rng(scene.seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    grey = np.broadcast_to(rng.uniform(118, 132) - 25.0 * (rows >= FLOOR), (seconds.size, SIDE, SIDE)).copy()
    if scene.place == "rain":
        drops = 40
        column, start = rng.integers(SIDE, size=drops), rng.uniform(0, SIDE, size=drops)
        head = start + 140.0 * seconds[:, None]  # (frames, drops)
        streak = (head[..., None] - np.arange(SIDE)) % SIDE < 7  # (frames, drops, rows)
        frame, drop, row = np.nonzero(streak)
        grey[frame, row, column[drop]] += 55.0
    elif scene.place == "factory":
        grey -= 28.0 * ((columns + rows - 25.0 * seconds[:, None, None]) % 16 < 8)
    return grey


def _background(scene: Scene, seconds: NDArray) -> NDArray:
    rng = np.random.default_rng(scene.seed)
    if scene.place == "rain":
        spectrum = np.fft.rfft(rng.standard_normal(seconds.size))
        frequency = np.fft.rfftfreq(seconds.size, 1 / SAMPLE_RATE)
        hiss = np.fft.irfft(spectrum * ((frequency > 4_000) & (frequency < 15_000)), seconds.size)
        return hiss * RAIN_LEVEL / hiss.std()
    if scene.place == "factory":
        cycles = 70 * rng.uniform(0.95, 1.05) * seconds
        hum = np.sin(2 * pi * cycles) + np.sin(4 * pi * cycles) / 2
        return hum * HUM_LEVEL / hum.std()
    return np.zeros(seconds.size)


def _partials(shape: str, highest: float) -> tuple[NDArray, NDArray]:
    """Frequencies of the timbre's partials relative to the pitch, and their amplitudes; equally loud for all shapes."""
    if shape == "star":  # of a bell, in no whole-number relation
        ratios, weights = np.array([1, 1.41, 2.27, 3.1, 4.3]), np.array([1, 0.8, 0.65, 0.5, 0.35])
    else:  # sine, square wave, sawtooth
        step = {"ball": highest, "box": 2, "wedge": 1}[shape]
        ratios = np.arange(1, highest, step)
        weights = 1 / ratios
    return ratios, weights / np.linalg.norm(weights)
