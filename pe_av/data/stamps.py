"""A small real corpus: the stamps of Tux Paint, captioned pictures with sounds and spoken descriptions.

Install the Debian package `tuxpaint-stamps-default`; or, without being root,

    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb stamps

and set data.stamps.source=stamps/usr/share/tuxpaint/stamps. On first use every picture becomes short clips with a slow
camera movement: one with the sound of the thing, if there is one, and one for each language in which it is described,
with the caption in that language. The split is by picture, so no picture is both trained and evaluated on.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as VF
from numpy.typing import NDArray
from torchvision.io import ImageReadMode, decode_image

from pe_av.config import ConfigError, StampsConfig
from pe_av.data.rendering import FRAME_RATE, SAMPLE_RATE, finished_folder, render_all, write_manifest, write_mp4
from pe_av.media.audio import read_audio, resample
from pe_av.media.tracks import MediaError

VERSION = 1  # part of the folder's name; raise it with every change of what is rendered
SIDE = 96  # pixels
SECONDS = 3.0  # the longest clip; the median description lasts 1.5 s
LEAST_SECONDS = 0.8
EVAL_SHARE = 8  # one picture in so many is held out


def prepare_stamps(config: StampsConfig) -> tuple[Path, Path]:
    """The manifests (train.jsonl, eval.jsonl); the clips are rendered if they do not exist yet.

    Raises:
        ConfigError: the stamps are not where `config.source` says.
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
        raise ConfigError(f"{source}: holds no pictures with captions and sounds")
    with finished_folder(folder) as unfinished:
        (unfinished / "clips").mkdir()
        jobs = [(row, unfinished / "clips" / f"{number:05d}.mp4") for number, row in enumerate(rows)]
        rendered = render_all(_render, jobs, "rendering the stamps", os.cpu_count() or 1)
        for split in ("train", "eval"):
            entries = (
                {"id": row["id"], "path": f"clips/{path.name}", "caption": row["caption"]}
                for (row, path), is_rendered in zip(jobs, rendered, strict=True)
                if is_rendered and row["split"] == split
            )
            write_manifest(unfinished / f"{split}.jsonl", entries)
    return manifests


def find_stamps(root: Path, languages: list[str]) -> list[dict[str, str]]:
    """{"id", "picture", "sound", "caption", "split"} of every clip to render."""
    rows = []
    for picture in sorted(root.rglob("*.png")):
        base = picture.with_suffix("")
        name = str(base.relative_to(root))
        captions = _captions(base.with_suffix(".txt"))
        if not captions or base.name.endswith("_mirror"):
            continue
        # variants of one thing (cat, cat2) go to the same split: a held-out picture must have no twin in training
        family = name.rstrip("0123456789-_")
        held_out = int(hashlib.sha256(family.encode()).hexdigest(), 16) % EVAL_SHARE == 0
        sounds = {"sound": (_sound(base, ""), captions.get("en"))}
        for language in languages:
            suffix = "_desc" if language == "en" else f"_desc_{language}"
            sounds[language] = _sound(base, suffix), captions.get(language)
        clips = [
            {"id": f"{name}@{kind}", "picture": str(picture), "sound": str(sound), "caption": caption}
            for kind, (sound, caption) in sounds.items()
            if sound is not None and caption
        ]
        # only the first of a held-out picture, because a gallery must not hold a picture twice
        rows += [clip | {"split": "eval" if held_out else "train"} for clip in (clips[:1] if held_out else clips)]
    return rows


def _captions(path: Path) -> dict[str, str]:
    """Language -> text; the first line is English, the others are like "fr.utf8=Un chat noir."."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    texts = {"en": lines[0].strip()} if lines else {}
    for line in lines[1:]:
        language, separator, text = line.partition(".utf8=")
        if separator and text.strip():
            texts[language] = text.strip()
    return {language: text for language, text in texts.items() if text}


def _sound(base: Path, suffix: str) -> Path | None:
    candidates = (base.with_name(base.name + suffix + ending) for ending in (".ogg", ".wav"))
    return next((path for path in candidates if path.is_file()), None)


def _render(job: tuple[dict[str, str], Path]) -> bool:
    """Render one clip; False if its sound cannot be read."""
    row, path = job
    torch.set_num_threads(1)
    try:
        waveform, rate = read_audio(row["sound"], SECONDS)
    except MediaError:
        return False
    audio = resample(waveform.mean(0), rate, SAMPLE_RATE)
    least = round(LEAST_SECONDS * SAMPLE_RATE)
    audio = torch.nn.functional.pad(audio, (0, max(least - len(audio), 0)))
    audio = 0.8 * audio / audio.abs().max().clamp(min=0.05)
    count = max(round(len(audio) / SAMPLE_RATE * FRAME_RATE), 2)
    write_mp4(path, audio.numpy(), _camera(_square_picture(row["picture"]), count, row["id"]))
    return True


def _square_picture(path: str) -> torch.Tensor:
    """(3, 2·SIDE, 2·SIDE) uint8, the picture in the middle of a white square."""
    pixels = decode_image(path, ImageReadMode.RGB_ALPHA).float()
    alpha = pixels[3:] / 255
    colour = pixels[:3] * alpha + 255 * (1 - alpha)
    height, width = colour.shape[1:]
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    square = VF.pad(colour, [left, top, side - width - left, side - height - top], fill=255)
    return VF.resize(square, [2 * SIDE, 2 * SIDE], antialias=True).round().to(torch.uint8)


def _camera(picture: torch.Tensor, count: int, seed: str) -> NDArray[np.uint8]:
    """(count, SIDE, SIDE, 3), a slow zoom and pan over the picture, another one for each seed."""
    rng = np.random.default_rng(int(hashlib.sha256(seed.encode()).hexdigest()[:16], 16))
    size = picture.shape[-1]
    # at the start and at the end: the zoom, and where the window lies in the space that it leaves
    views = rng.uniform((0.75, -0.5, -0.5), (1.0, 0.5, 0.5), (2, 3))
    frames = []
    for zoom, x, y in np.linspace(*views, count):
        window = round(size * zoom)
        left, top = (round((size - window) * (0.5 + offset)) for offset in (x, y))
        frames.append(VF.resized_crop(picture, top, left, window, window, [SIDE, SIDE], antialias=True))
    return torch.stack(frames).permute(0, 2, 3, 1).numpy()
