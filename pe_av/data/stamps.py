"""A small real corpus: the stamps of Tux Paint, captioned pictures with sounds and spoken descriptions.

Install the Debian package `tuxpaint-stamps-default`; or, without being root,

    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb stamps

and say where it is: data.stamps.source=stamps/usr/share/tuxpaint/stamps. On first use every picture becomes short clips
with slow camera motion: one with the sound of the thing, where there is one, and one per language in which it is
described, with the caption in that language. Split by picture: what is evaluated on was never seen.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as VF
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torchvision.io import ImageReadMode, decode_image

from pe_av.config import ConfigError, StampsConfig
from pe_av.data.demo import FRAME_RATE, SAMPLE_RATE, write_mp4
from pe_av.media.audio import read_audio, resample
from pe_av.media.tracks import MediaError

VERSION = 1  # of what is rendered
SIDE = 96  # pixels
SECONDS = 3.0  # at most; the median description lasts 1.5
LEAST_SECONDS = 0.8
EVAL_SHARE = 8  # one picture in so many


def find_stamps(root: Path, languages: list[str]) -> list[dict[str, str]]:
    """{"id", "picture", "sound", "caption", "split"} of every clip to be made."""
    rows = []
    for picture in sorted(root.rglob("*.png")):
        base = picture.with_suffix("")
        name = str(base.relative_to(root))
        captions = _captions(base.with_suffix(".txt"))
        if not captions or base.name.endswith("_mirror"):
            continue
        # variants of one thing (cat, cat2) stand beside each other, and a test picture must not have a twin in training
        family = name.rstrip("0123456789-_")
        held_out = int(hashlib.sha256(family.encode()).hexdigest(), 16) % EVAL_SHARE == 0
        sounds = {"sound": (_existing(base, ""), captions.get("en"))}
        for language in languages:
            ending = "_desc" if language == "en" else f"_desc_{language}"
            sounds[language] = _existing(base, ending), captions.get(language)
        found = [
            {"id": f"{name}@{kind}", "picture": str(picture), "sound": str(sound), "caption": caption}
            for kind, (sound, caption) in sounds.items()
            if sound is not None and caption
        ]
        # a gallery must not hold a picture twice
        rows += [row | {"split": "eval" if held_out else "train"} for row in (found[:1] if held_out else found)]
    return rows


def prepare_stamps(config: StampsConfig) -> tuple[Path, Path]:
    """The manifests (train.jsonl, eval.jsonl); the clips are rendered if they are not there yet.

    Raises:
        ConfigError: the stamps are not where they should be.
    """
    source = Path(config.source)
    if not source.is_dir():
        raise ConfigError(
            f"{source}: no such folder; apt-get install tuxpaint-stamps-default, or apt-get download it, unpack it "
            "with dpkg -x FILE DIR, and set data.stamps.source=DIR/usr/share/tuxpaint/stamps"
        )
    folder = Path(config.root) / f"v{VERSION}-{'-'.join(config.languages)}"
    manifests = folder / "train.jsonl", folder / "eval.jsonl"
    if folder.exists():
        return manifests
    rows = find_stamps(source, config.languages)
    if not rows:
        raise ConfigError(f"{source}: no pictures with captions and sounds there")
    unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        (unfinished / "clips").mkdir(parents=True)
        jobs = [(row, unfinished / "clips" / f"{number:05d}.mp4") for number, row in enumerate(rows)]
        made = list(track(_render(jobs), "rendering the stamps", total=len(jobs), console=Console(stderr=True)))
        for manifest, split in zip(manifests, ("train", "eval"), strict=True):
            lines = [
                json.dumps({"id": row["id"], "path": f"clips/{path.name}", "caption": row["caption"]}) + "\n"
                for (row, path), done in zip(jobs, made, strict=True)
                if done and row["split"] == split
            ]
            (unfinished / manifest.name).write_text("".join(lines), encoding="utf-8")
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster, with the same result
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return manifests


def _render(jobs: list[tuple[dict[str, str], Path]]) -> Iterator[bool]:
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(render, jobs, chunksize=16)


def render(job: tuple[dict[str, str], Path]) -> bool:
    """One clip; False if its sound or its picture cannot be read."""
    row, path = job
    torch.set_num_threads(1)
    try:
        waveform, rate = read_audio(row["sound"], SECONDS)
    except MediaError:
        return False
    sound = resample(waveform.mean(0), rate, SAMPLE_RATE)
    least = round(LEAST_SECONDS * SAMPLE_RATE)
    sound = torch.nn.functional.pad(sound, (0, max(least - len(sound), 0)))
    sound = 0.8 * sound / sound.abs().max().clamp(min=0.05)
    count = max(round(len(sound) / SAMPLE_RATE * FRAME_RATE), 2)
    write_mp4(path, camera(picture_of(row["picture"]), count, row["id"]), sound.numpy())
    return True


def picture_of(path: str | Path) -> torch.Tensor:
    """(3, H, W) uint8: the picture in the middle of a white square."""
    pixels = decode_image(str(path), ImageReadMode.RGB_ALPHA).float()
    alpha = pixels[3:] / 255
    colour = pixels[:3] * alpha + 255 * (1 - alpha)
    height, width = colour.shape[1:]
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    square = VF.pad(colour, [left, top, side - width - left, side - height - top], fill=255)
    return VF.resize(square, [2 * SIDE, 2 * SIDE], antialias=True).round().to(torch.uint8)


def camera(picture: torch.Tensor, count: int, seed: str) -> NDArray[np.uint8]:
    """(count, SIDE, SIDE, 3): a slow zoom and pan over the picture, its own for each clip."""
    chance = np.random.default_rng(int(hashlib.sha256(seed.encode()).hexdigest()[:16], 16))
    size = picture.shape[-1]
    views = chance.uniform((0.75, -0.5, -0.5), (1.0, 0.5, 0.5), (2, 3))  # zoom, and where in the room that it leaves
    frames = []
    for zoom, x, y in np.linspace(*views, count):
        window = round(size * zoom)
        left, top = (round((size - window) * (0.5 + where)) for where in (x, y))
        frames.append(VF.resized_crop(picture, top, left, window, window, [SIDE, SIDE], antialias=True))
    return torch.stack(frames).permute(0, 2, 3, 1).numpy()


def _captions(path: Path) -> dict[str, str]:
    """Language -> text; the first line is English, the others are like "fr.utf8=Un chat noir."."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    texts = {"en": lines[0].strip()} if lines else {}
    for line in lines[1:]:
        language, found, text = line.partition(".utf8=")
        if found and text.strip():
            texts[language] = text.strip()
    return {language: text for language, text in texts.items() if text}


def _existing(base: Path, ending: str) -> Path | None:
    candidates = (base.with_name(base.name + ending + suffix) for suffix in (".ogg", ".wav"))
    return next((path for path in candidates if path.is_file()), None)
