"""Public corpora: from the files in which they are published to a manifest.

    python -m pe_av.data.recipes NAME ROOT

reads the corpus's own lists in ROOT, looks for the media files that they name, and writes the clips that exist to
ROOT/manifest.parquet and those that are missing to ROOT/missing.txt. Nothing is downloaded. `data=NAME data.train=…
data.eval=…` then trains and evaluates on it.

To add a corpus:

1. Write a function NAME(root) below. It reads the published lists and yields one `Clip` for each clip, with a unique
   `id`, its `split`, and its captions by kind: "audio" (what is heard), "visual" (what is seen), "audio_visual" (both
   together), or None (one caption of everything, or a label). `audio` and `video` are paths relative to ROOT without
   their endings; a corpus has the one or the other, or, for files with both tracks, the same path twice (`_video`).
   `_csv`, `_table` and `_json` read lists and report what is missing in them.
2. Add it to `RECIPES`.
3. Write configs/data/NAME.yaml, which `data=NAME` selects: in comments, what ROOT must look like and the protocol by
   which the corpus is evaluated; then `train`, `eval`, `train_split` and `eval_split`.
4. Add a miniature of the corpus to tests/test_corpora.py.
"""

import csv
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from pe_av.config import ConfigError
from pe_av.data.manifest import Clip, Manifest

ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")


def audiocaps(root: Path) -> Iterator[Clip]:
    for split in ("train", "val", "test"):
        captions: dict[str, list[str]] = defaultdict(list)
        for row in _csv(root / f"{split}.csv", "youtube_id", "start_time", "caption"):
            captions[f"{row['youtube_id']}_{int(float(row['start_time']))}"].append(row["caption"])
        for name, texts in captions.items():
            yield Clip(name, audio=f"{split}/{name}", captions={None: texts}, seconds=10.0, split=split)


def clotho(root: Path) -> Iterator[Clip]:
    columns = [f"caption_{number}" for number in range(1, 6)]
    for split in ("development", "validation", "evaluation"):
        for row in _csv(root / f"clotho_captions_{split}.csv", "file_name", *columns):
            stem = f"{split}/{os.path.splitext(row['file_name'])[0]}"
            yield Clip(stem, audio=stem, captions={None: [row[column] for column in columns]}, split=split)


def valor32k(root: Path) -> Iterator[Clip]:
    for split in ("train", "val", "test"):
        captions: dict[str, list[str]] = defaultdict(list)
        for row in _json(root / f"desc_{split}.json"):
            captions[row["video_id"]].append(row["desc"])
        for name, texts in captions.items():
            yield _video(name, f"videos/{name}", split, "audio_visual", texts)


def vggsound(root: Path) -> Iterator[Clip]:
    for name, start, label, split in _table(root / "vggsound.csv", 4):
        stem = f"{name}_{int(start):06d}"
        yield replace(_video(stem, f"video/{stem}", split, None, [label]), seconds=10.0)


def kinetics(root: Path) -> Iterator[Clip]:
    for split in ("train", "val", "test"):
        path = root / "annotations" / f"{split}.csv"
        if split == "test" and not path.exists():
            continue
        for row in _csv(path, "label", "youtube_id", "time_start", "time_end"):
            stem = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
            yield _video(stem, f"{split}/{stem}", split, "visual", [row["label"]])


def msrvtt(root: Path) -> Iterator[Clip]:
    captions: dict[str, list[str]] = defaultdict(list)
    for sentence in _json(root / "MSRVTT_data.json")["sentences"]:
        captions[sentence["video_id"]].append(sentence["caption"])
    for row in _csv(root / "MSRVTT_train.9k.csv", "video_id"):
        name = row["video_id"]
        yield _video(name, f"videos/all/{name}", "train", "visual", captions[name])
    for row in _csv(root / "MSRVTT_JSFUSION_test.csv", "video_id", "sentence"):
        yield _video(row["video_id"], f"videos/all/{row['video_id']}", "test", "visual", [row["sentence"]])


def esc50(root: Path) -> Iterator[Clip]:
    for row in _csv(root / "meta" / "esc50.csv", "filename", "fold", "category"):
        stem = f"audio/{os.path.splitext(row['filename'])[0]}"
        label = row["category"].replace("_", " ")
        yield Clip(row["filename"], audio=stem, captions={None: [label]}, seconds=5.0, split=f"fold{row['fold']}")


def vctk(root: Path) -> Iterator[Clip]:
    speakers = sorted(path.name for path in (root / "txt").glob("*") if path.is_dir())
    if not speakers:
        raise ConfigError(f"{root / 'txt'}: holds no folders of speakers")
    for number, speaker in enumerate(speakers):
        split = "test" if number % 10 == 9 else "train"  # whole speakers, so that no test voice occurs in training
        for path in sorted((root / "txt" / speaker).glob("*.txt")):
            text = path.read_text(encoding="utf-8").strip()
            stem = f"wav48_silence_trimmed/{speaker}/{path.stem}_mic1"
            yield Clip(path.stem, audio=stem, captions={None: [text]}, split=split)


RECIPES: dict[str, Callable[[Path], Iterator[Clip]]] = {
    recipe.__name__: recipe for recipe in (audiocaps, clotho, valor32k, vggsound, kinetics, msrvtt, esc50, vctk)
}


def make_manifest(name: str, root: str | Path) -> tuple[Manifest, dict[str, str]]:
    """Make the manifest of a corpus, and write it into its folder.

    Returns:
        the clips whose files exist, and id -> path without ending of the others.
    Raises:
        ConfigError: an unknown corpus, a list that is missing or has another form, or no media files at all.
    """
    root = Path(root)
    if name not in RECIPES:
        raise ConfigError(f"{name} is no recipe; known are {', '.join(RECIPES)}")
    folders: dict[str, dict[str, str]] = {}
    clips, missing = [], {}
    for clip in RECIPES[name](root):
        stems = {modality: stem for modality in ("audio", "video") if (stem := getattr(clip, modality))}
        files = {modality: _find(root, stem, folders) for modality, stem in stems.items()}
        if None in files.values():
            missing[clip.id] = clip.video or clip.audio
        else:
            clips.append(replace(clip, **files))
    (root / "missing.txt").write_text("".join(f"{stem}\n" for stem in missing.values()), encoding="utf-8")
    if not clips:
        first = next(iter(missing.values()), "nothing")
        raise ConfigError(
            f"{root}: none of the {len(missing)} clips of {name} exists; the first would be {first}.*; "
            f"configs/data/{name}.yaml says where the files belong"
        )
    manifest = Manifest.of(clips, root)
    manifest.write(root / "manifest.parquet")
    return manifest, missing


def _video(name: str, stem: str, split: str, kind: str | None, captions: Sequence[str]) -> Clip:
    """A clip whose audio and video are in one file, with captions of one kind."""
    return Clip(name, audio=stem, video=stem, captions={kind: list(captions)} if captions else {}, split=split)


def _find(root: Path, stem: str, folders: dict[str, dict[str, str]]) -> str | None:
    """The file with this stem and any of `ENDINGS`; `folders` keeps what was listed, so each is listed once."""
    folder, name = os.path.split(stem)
    if folder not in folders:
        files = os.listdir(root / folder) if (root / folder).is_dir() else []
        folders[folder] = {os.path.splitext(f)[0]: f for f in files if os.path.splitext(f)[1].lower() in ENDINGS}
    file = folders[folder].get(name)
    return None if file is None else os.path.join(folder, file)


def _csv(path: Path, *columns: str) -> Iterator[dict[str, str]]:
    """The rows of a CSV file that names its columns, among them these."""
    with _open(path) as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or []
        for column in columns:
            if column not in names:
                raise ConfigError(f"{path}: has no column {column}; it has {', '.join(names) or 'none'}")
        yield from reader


def _table(path: Path, columns: int) -> Iterator[list[str]]:
    """The rows of a CSV file without a header."""
    with _open(path) as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if len(row) != columns:
                raise ConfigError(f"{path}:{number}: has {len(row)} columns, not {columns}")
            yield row


def _json(path: Path) -> Any:
    with _open(path) as file:
        try:
            return json.load(file)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: not JSON ({error.msg})") from None


def _open(path: Path) -> TextIO:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; configs/data says what the folder of each corpus must look like")
    return path.open(newline="", encoding="utf-8-sig", errors="replace")


def main(arguments: Sequence[str]) -> None:
    """python -m pe_av.data.recipes NAME ROOT"""
    if len(arguments) != 2:
        sys.exit(f"usage: {main.__doc__}\nNAME is one of {', '.join(RECIPES)}")
    try:
        manifest, missing = make_manifest(*arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for split, count in sorted(Counter(manifest.table["split"].to_pylist()).items()):
        print(f"{split}: {count} clips")
    print(f"{len(missing)} missing, listed in {arguments[1]}/missing.txt")


if __name__ == "__main__":
    main(sys.argv[1:])
