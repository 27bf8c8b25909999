"""Public corpora: from the files that they are published with to a manifest.

    python -m pe_av.data.recipes NAME ROOT

reads the corpus's own lists in ROOT, looks for the media that they name, writes ROOT/manifest.parquet with what is
there, and ROOT/missing.txt with what is not. `data=NAME data.train=… data.eval=…` then trains and evaluates on it. What
ROOT must look like and how the corpus is evaluated stands in configs/data/NAME.yaml. Nothing is downloaded.
"""

import csv
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pe_av.config import ConfigError
from pe_av.data.manifest import Clip, Manifest

# What a recipe yields: clips whose `audio` and `video` are paths relative to ROOT without their endings, or None.
Rows = Iterator[Clip]

ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")


def audiocaps(root: Path) -> Rows:
    for split in ("train", "val", "test"):
        captions: dict[str, list[str]] = defaultdict(list)
        for row in _csv(root / f"{split}.csv", "youtube_id", "start_time", "caption"):
            captions[f"{row['youtube_id']}_{int(float(row['start_time']))}"].append(row["caption"])
        for name, texts in captions.items():
            yield Clip(name, audio=f"{split}/{name}", captions={None: texts}, seconds=10.0, split=split)


def clotho(root: Path) -> Rows:
    for split in ("development", "validation", "evaluation"):
        numbered = [f"caption_{i}" for i in range(1, 6)]
        for row in _csv(root / f"clotho_captions_{split}.csv", "file_name", *numbered):
            texts = [row[name] for name in numbered]
            stem = f"{split}/{os.path.splitext(row['file_name'])[0]}"
            yield Clip(stem, audio=stem, captions={None: texts}, split=split)


def valor32k(root: Path) -> Rows:
    for split in ("train", "val", "test"):
        captions: dict[str, list[str]] = defaultdict(list)
        for row in _json(root / f"desc_{split}.json"):
            captions[row["video_id"]].append(row["desc"])
        for name, texts in captions.items():
            yield _whole(name, f"videos/{name}", split, audio_visual=texts)


def vggsound(root: Path) -> Rows:
    for name, start, label, split in _rows(root / "vggsound.csv", 4):
        stem = f"{name}_{int(start):06d}"
        yield replace(_whole(stem, f"video/{stem}", split, None, label), seconds=10.0)


def kinetics(root: Path) -> Rows:
    for split in ("train", "val", "test"):
        path = root / "annotations" / f"{split}.csv"
        if split == "test" and not path.exists():
            continue
        for row in _csv(path, "label", "youtube_id", "time_start", "time_end"):
            stem = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
            yield _whole(stem, f"{split}/{stem}", split, visual=[row["label"]])


def msrvtt(root: Path) -> Rows:
    told = _json(root / "MSRVTT_data.json")
    captions: dict[str, list[str]] = defaultdict(list)
    for sentence in told["sentences"]:
        captions[sentence["video_id"]].append(sentence["caption"])
    for row in _csv(root / "MSRVTT_train.9k.csv", "video_id"):
        yield _whole(row["video_id"], f"videos/all/{row['video_id']}", "train", visual=captions[row["video_id"]])
    for row in _csv(root / "MSRVTT_JSFUSION_test.csv", "video_id", "sentence"):
        yield _whole(row["video_id"], f"videos/all/{row['video_id']}", "test", visual=[row["sentence"]])


def esc50(root: Path) -> Rows:
    for row in _csv(root / "meta" / "esc50.csv", "filename", "fold", "category"):
        stem = f"audio/{os.path.splitext(row['filename'])[0]}"
        label = row["category"].replace("_", " ")
        yield Clip(row["filename"], audio=stem, captions={None: [label]}, seconds=5.0, split=f"fold{row['fold']}")


def vctk(root: Path) -> Rows:
    speakers = sorted(path.name for path in (root / "txt").glob("*") if path.is_dir())
    if not speakers:
        raise ConfigError(f"{root / 'txt'}: no folders of speakers there")
    for number, speaker in enumerate(speakers):
        split = "test" if number % 10 == 9 else "train"  # whole speakers: a voice in the test was never heard
        for path in sorted((root / "txt" / speaker).glob("*.txt")):
            text = path.read_text(encoding="utf-8").strip()
            stem = f"wav48_silence_trimmed/{speaker}/{path.stem}_mic1"
            yield Clip(path.stem, audio=stem, captions={None: [text]}, split=split)


RECIPES: dict[str, Callable[[Path], Rows]] = {
    "audiocaps": audiocaps,
    "clotho": clotho,
    "valor32k": valor32k,
    "vggsound": vggsound,
    "kinetics": kinetics,
    "msrvtt": msrvtt,
    "esc50": esc50,
    "vctk": vctk,
}


def make_manifest(name: str, root: str | Path) -> tuple[Manifest, dict[str, str]]:
    """The manifest of a corpus, which is also written into its folder.

    Returns:
        the clips that are there, and id -> path without ending, of those that are not.
    Raises:
        ConfigError: an unknown corpus, a list of it that is missing or of another form, or no media at all.
    """
    root = Path(root)
    if name not in RECIPES:
        raise ConfigError(f"{name} is no recipe; there are {', '.join(RECIPES)}")
    folders: dict[str, dict[str, str]] = {}
    clips, missing = [], {}
    for clip in RECIPES[name](root):
        found = {kind: _find(root, stem, folders) for kind in ("audio", "video") if (stem := getattr(clip, kind))}
        if None in found.values():
            missing[clip.id] = clip.video or clip.audio
        else:
            clips.append(replace(clip, **found))
    (root / "missing.txt").write_text("".join(f"{stem}\n" for stem in missing.values()), encoding="utf-8")
    if not clips:
        first = next(iter(missing.values()), "nothing")
        raise ConfigError(f"{root}: none of the {len(missing)} clips of {name} is there; the first would be {first}.*")
    manifest = Manifest.of(clips, root)
    manifest.write(root / "manifest.parquet")
    return manifest, missing


def _whole(
    name: str,
    stem: str,
    split: str,
    audio_visual: Sequence[str] | None = None,
    label: str | None = None,
    visual: Sequence[str] | None = None,
) -> Clip:
    captions = {None: [label] if label else None, "visual": visual, "audio_visual": audio_visual}
    captions = {kind: list(texts) for kind, texts in captions.items() if texts}
    return Clip(name, audio=stem, video=stem, captions=captions, split=split)


def _find(root: Path, stem: str, folders: dict[str, dict[str, str]]) -> str | None:
    """The file of this stem, whatever its ending; each folder is listed once."""
    folder, name = os.path.split(stem)
    if folder not in folders:
        listed = os.listdir(root / folder) if (root / folder).is_dir() else []
        folders[folder] = {os.path.splitext(f)[0]: f for f in listed if os.path.splitext(f)[1].lower() in ENDINGS}
    found = folders[folder].get(name)
    return None if found is None else os.path.join(folder, found)


def _csv(path: Path, *columns: str) -> Iterator[dict[str, str]]:
    with _open(path) as file:
        reader = csv.DictReader(file)
        lacking = [column for column in columns if column not in (reader.fieldnames or [])]
        if lacking:
            raise ConfigError(f"{path}: has no column {lacking[0]}; it has {', '.join(reader.fieldnames or ['none'])}")
        yield from reader


def _rows(path: Path, columns: int) -> Iterator[list[str]]:
    with _open(path) as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if len(row) != columns:
                raise ConfigError(f"{path}:{number}: {len(row)} columns, not {columns}")
            yield row


def _json(path: Path):
    with _open(path) as file:
        try:
            return json.load(file)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: not JSON ({error.msg})") from None


def _open(path: Path):
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; what the corpus must look like stands in configs/data")
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
