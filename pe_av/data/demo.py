"""The demo world: scenes (data/demo_scenes.py) rendered to MP4 files on first use, to train and to evaluate on.

The evaluation clips differ pairwise in what is heard, so each can be told from the others by its audio, by its video
and by its caption. No combination of the six attributes is both trained and evaluated on.
"""

import os
from pathlib import Path

import numpy as np

from pe_av.config import ConfigError, DemoConfig
from pe_av.data.demo_scenes import (
    ATTRIBUTES,
    COLOURS,
    COMBINATIONS,
    HEARD,
    SEEN,
    TEMPLATES,
    Scene,
    caption,
    make_scene,
    render_audio,
    render_frames,
)
from pe_av.data.rendering import finished_folder, render_all, write_manifest, write_mp4

WORLD_VERSION = 3  # part of the folder's name; raise it with every change of what is rendered


def prepare_demo(config: DemoConfig) -> tuple[Path, Path]:
    """The manifests (train.jsonl, eval.jsonl) of the demo world, which is rendered if it does not exist yet.

    A script that calls this needs the usual `if __name__ == "__main__":`, because the rendering processes import it.

    Raises:
        ConfigError: the numbers of clips are not possible, or its folder has lost a manifest.
    """
    splits = dict(zip(("train", "eval"), split(config), strict=True))
    name = f"v{WORLD_VERSION}-seed{config.seed}-{config.train_clips}-{config.eval_clips}"
    folder = Path(config.root) / (name + "-validation" * config.validation)
    manifests = folder / "train.jsonl", folder / "eval.jsonl"
    if folder.exists():
        if not all(manifest.is_file() for manifest in manifests):
            raise ConfigError(f"{folder} lacks a manifest: delete the folder, and it is rendered again")
        return manifests
    with finished_folder(folder) as unfinished:
        jobs = []
        for name, scenes in splits.items():
            (unfinished / name).mkdir()
            jobs += [(unfinished / name / f"{i:04d}.mp4", scene) for i, scene in enumerate(scenes)]
        # a process takes seconds to start, in which another one renders dozens of clips
        workers = min(os.cpu_count() or 1, 1 + len(jobs) // 64)
        render_all(_render_clip, jobs, "rendering the demo world", workers)
        for name, scenes in splits.items():
            entries = (_entry(name, i, scene) for i, scene in enumerate(scenes))
            write_manifest(unfinished / f"{name}.jsonl", entries)
    return manifests


def split(config: DemoConfig) -> tuple[list[Scene], list[Scene]]:
    """The scenes to train on and those to evaluate on.

    Training scenes go round the combinations that are not held out, each time in another rendering.

    Raises:
        ConfigError: the numbers of clips are not possible.
    """
    total = len(COMBINATIONS)
    audible = total // len(COLOURS)
    if config.seed < 0:
        raise ConfigError(f"data.demo.seed={config.seed} is negative")
    if not 1 <= config.eval_clips <= audible:
        raise ConfigError(
            f"data.demo.eval_clips={config.eval_clips} is not in 1 … {audible}, the number of distinct sounds"
        )
    if config.train_clips < 1:
        raise ConfigError(f"data.demo.train_clips={config.train_clips} is not positive")
    rng = np.random.default_rng(config.seed)
    sounds = rng.permutation(audible)[: config.eval_clips]
    colours = rng.permutation(np.arange(config.eval_clips) % len(COLOURS))
    held_out = sounds * len(COLOURS) + colours
    rest = rng.permutation(np.setdiff1d(np.arange(total), held_out))
    if config.validation:  # the same sounds in the next colour: disjoint, and as balanced
        held_out = sounds * len(COLOURS) + (colours + 1) % len(COLOURS)
        rest = rest[~np.isin(rest, held_out)]
    renderings, chosen = np.divmod(np.arange(config.train_clips), len(rest))
    train = [make_scene(config.seed, i, rendering) for i, rendering in zip(rest[chosen], renderings, strict=True)]
    return train, [make_scene(config.seed, i) for i in held_out]


def _render_clip(job: tuple[Path, Scene]) -> None:
    path, scene = job
    write_mp4(path, render_audio(scene), render_frames(scene))


def _entry(split: str, number: int, scene: Scene) -> dict[str, str]:
    names = {"id": f"{split}-{number:04d}", "path": f"{split}/{number:04d}.mp4"}
    kinds = {"audio_caption": HEARD, "visual_caption": SEEN, "audio_visual_caption": TEMPLATES}
    captions = {"caption": caption(scene)} | {kind: caption(scene, templates) for kind, templates in kinds.items()}
    return names | captions | {name: getattr(scene, name) for name in ATTRIBUTES}
