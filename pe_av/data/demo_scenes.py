"""The scenes of the demo world: a caption, frames and audio that belong together.

A scene is one object that does one thing somewhere. Six attributes describe it; each is seen, five are also heard:

    shape    outline                 timbre
    size     radius                  pitch (small is high)
    motion   path of the object      loudness and pitch over time
    tempo    events per second       events per second
    place    backdrop                background noise
    colour   fill                    -
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import cos, pi, sin

import numpy as np
from numpy.typing import NDArray

from pe_av.data.rendering import FRAME_RATE, SAMPLE_RATE

SIDE = 64  # pixels
NUM_FRAMES = 16
NUM_SAMPLES = SAMPLE_RATE * NUM_FRAMES // FRAME_RATE
FLOOR = 57  # row of pixels at which the floor begins

# number of tips, radius between two tips, radius of the tips, both relative to the object's; the last evens out areas
SHAPES = {
    "ball": (32, cos(pi / 32), 1.0),
    "box": (4, cos(pi / 4), 1.15),
    "wedge": (3, cos(pi / 3), 1.35),
    "star": (5, 0.48, 1.3),
}
SIZES = {"small": (9.0, 1200.0), "medium": (13.0, 520.0), "large": (18.5, 220.0)}  # radius in pixels, pitch in Hz
MOTIONS = {"bounces": "bouncing", "slides": "sliding", "spins": "spinning", "blinks": "blinking"}
# Events per second: floor contacts, sweeps, turns or flashes. Three turns a second are 108° a frame, so neither a box
# (the same after 90°) nor a wedge (after 120°) seems to stand still.
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
ATTRIBUTES = {  # colour is last, so that six consecutive combinations sound the same
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
# the same without what is not heard, and without the place, which a caption of a picture leaves out
HEARD = tuple(template.replace(" {colour}", "").replace(" and,", ",") for template in TEMPLATES)
SEEN = tuple(template.removeprefix("{place}, ").removesuffix(" {place}") for template in TEMPLATES)

TONE_LEVEL = 0.37  # of the object; its peaks stay below 0.8
RAIN_LEVEL, HUM_LEVEL = 0.03, 0.03  # root mean square
HIGHEST_PARTIAL = 8_000  # Hz; far below half the sampling rate, so that no partial is aliased
DECAY = 0.07  # seconds in which the tone of a floor contact falls to 1/e
FADE = 0.005  # seconds; long enough that switching a tone on or off does not click


@dataclass(frozen=True)
class Scene:
    """Everything about one clip: `render_frames` and `render_audio` read nothing else."""

    shape: str
    size: str
    motion: str
    tempo: str
    place: str
    colour: str
    template: int  # of the caption
    stretch: float  # -1 … 1: how large the object is within its size; heard as well as seen
    hurry: float  # -1 … 1: how fast it is within its tempo
    phase: float  # events passed at the start, 0 … 2
    x: float  # -1 … 1: where in the free space
    y: float
    seed: int  # of rain drops and noise

    @property
    def rate(self) -> float:
        """Events per second."""
        return TEMPOS[self.tempo] * (1 + 0.05 * self.hurry)

    def events(self, seconds: NDArray) -> NDArray:
        """Events passed at each time: whole numbers at floor contacts, turning points, full turns, appearances."""
        return self.rate * seconds + self.phase


def make_scene(seed: int, index: int, rendering: int = 0) -> Scene:
    """A scene of combination `index`, of which every `rendering` has another caption, place, phase, … within its
    attributes; with a random generator of its own, so it depends on no other scene."""
    rng = np.random.default_rng((seed, index, rendering))
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


def caption(scene: Scene, templates: Sequence[str] = TEMPLATES) -> str:
    """One sentence that states all six attributes; with `HEARD` all but the colour, with `SEEN` all but the place."""
    words = {name: getattr(scene, name) for name in ATTRIBUTES}
    words |= {"moving": MOTIONS[scene.motion], "place": PLACES[scene.place]}
    return templates[scene.template].format(**words)


def render_frames(scene: Scene) -> NDArray[np.uint8]:
    """(16, 64, 64, 3) RGB; each frame shows the middle of the tenth of a second in which it is on screen."""
    seconds = (np.arange(NUM_FRAMES) + 0.5) / FRAME_RATE
    events = scene.events(seconds)
    tips, notch, reach = SHAPES[scene.shape]
    radius = SIZES[scene.size][0] * (1 + 0.08 * scene.stretch) * reach
    rest_y = FLOOR - radius * cos(pi / tips)  # of the centre of an object on the floor, which stands on a flat side
    space = SIDE / 2 - radius

    x, y, turn = np.repeat([[SIDE / 2 + scene.x * space], [SIDE / 2 + scene.y * space], [0.0]], NUM_FRAMES, axis=1)
    if scene.motion == "bounces":
        since = events % 1
        y = rest_y - (rest_y - radius) * 4 * since * (1 - since)
    elif scene.motion == "slides":
        x, y = SIDE / 2 + space * _sweep(events), np.full(NUM_FRAMES, rest_y)
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
    # a dark dot between the centre and the top, without which a spinning ball would look still
    from_dot = np.hypot(distance * np.sin(angle), distance * np.cos(angle) - 0.42 * radius)
    dot = np.clip(0.2 * radius - from_dot + 0.5, 0, 1)

    paint = np.array(COLOURS[scene.colour]) * (1 - 0.85 * dot[..., None])  # (frames, rows, columns, RGB)
    backdrop = _backdrop(scene, seconds)[..., None]
    return np.round(backdrop + body[..., None] * (paint - backdrop)).astype(np.uint8)


def render_audio(scene: Scene) -> NDArray[np.float32]:
    """(76800,) mono at 48 kHz. Levels are absolute: the same loudness means the same in every clip."""
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
    audio = TONE_LEVEL * loudness * tone + _background(scene, seconds)
    ends = np.clip(np.minimum(seconds, seconds[::-1]) / FADE, 0, 1)
    return (audio * ends).astype(np.float32)


def _sweep(events: NDArray) -> NDArray:
    """Position between the left end (-1) and the right end (1), moving steadily from one to the other per event."""
    return 2 * np.abs(events % 2 - 1) - 1


def _visible(events: NDArray) -> NDArray:
    return (events % 1 < 0.5).astype(np.float64)


def _backdrop(scene: Scene, seconds: NDArray) -> NDArray:
    """(frames, rows, columns) grey levels without a hue, so that only the object has a colour."""
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
    if shape == "star":  # a bell, whose partials are inharmonic
        ratios, weights = np.array([1, 1.41, 2.27, 3.1, 4.3]), np.array([1, 0.8, 0.65, 0.5, 0.35])
    else:  # sine, square wave, sawtooth
        step = {"ball": highest, "box": 2, "wedge": 1}[shape]
        ratios = np.arange(1, highest, step)
        weights = 1 / ratios
    return ratios, weights / np.linalg.norm(weights)
