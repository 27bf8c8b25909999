"""Public corpora: from the files in which they are published to a manifest.

    python -m pe_av.data.recipes NAME ROOT

reads the corpus's own lists in ROOT, looks for the media files that they name, and writes the clips that exist to
ROOT/manifest.parquet and those that are missing to ROOT/missing.txt. Nothing is downloaded. `data=NAME data.train=…
data.eval=…` then trains and evaluates on it. Where the captions are labels of classes, ROOT/classes.txt lists all of
them, also those of which every clip is missing, so that what is missing makes classification no easier.

To add a corpus:

1. Write a function NAME(root) below. It reads the published lists and yields one `Clip` for each clip, with a unique
   `id`, its `split`, and its captions by kind: "audio" (what is heard), "visual" (what is seen), "audio_visual" (both
   together), or None (one caption of everything, or a label). `audio` and `video` are paths relative to ROOT without
   their endings; a corpus has the one or the other, or, for files with both tracks, the same path twice (`_video`).
   `_csv`, `_table` and `_json` read lists and report what is missing in them.
2. Add it to `RECIPES`; if its captions are labels, also to `LABELLED`, and their templates to configs/prompts.
3. Write configs/data/NAME.yaml, which `data=NAME` selects: in comments, what ROOT must look like and the protocol by
   which the corpus is evaluated; then `train`, `eval`, `train_split` and `eval_split`.
4. Add a miniature of the corpus to tests/test_corpora.py.
"""

import csv
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from pe_av.config import ConfigError
from pe_av.data.manifest import Clip, Manifest

SOUND_ENDINGS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")
ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".mpg", *SOUND_ENDINGS)
CLASSES_FILE = "classes.txt"


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
        folders: dict[str, str] = {}
        for row in _csv(path, "label", "youtube_id", "time_start", "time_end"):
            stem = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
            if row["label"] not in folders:  # the archives of Kinetics-700 have a folder for each class
                by_class = os.path.join(split, row["label"])
                folders[row["label"]] = by_class if (root / by_class).is_dir() else split
            yield _video(stem, f"{folders[row['label']]}/{stem}", split, "visual", [row["label"]])


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


def audioset(root: Path) -> Iterator[Clip]:
    rows = _csv(root / "class_labels_indices.csv", "mid", "display_name")
    names = {row["mid"]: row["display_name"].lower() for row in rows}
    splits = [s for s in ("eval", "balanced_train", "unbalanced_train") if (root / f"{s}_segments.csv").exists()]
    for split in splits or ["eval"]:  # without any, the first one's absence is reported
        path = root / f"{split}_segments.csv"
        # three lines of comment, and blanks behind the commas
        for name, start, end, classes in _table(path, 4, comment="#"):
            unknown = [one for one in classes.split(",") if one not in names]
            if unknown:
                raise ConfigError(f"{path}: {name}: class {unknown[0]} is not in class_labels_indices.csv")
            labels = [names[one] for one in classes.split(",")]
            seconds = float(end) - float(start)
            yield replace(_video(name, f"{split}_segments/{name}", split, "audio", labels), seconds=seconds)


def ucf101(root: Path) -> Iterator[Clip]:
    for fold in "123":
        for split in ("train", "test"):
            for line in _lines(root / "ucfTrainTestlist" / f"{split}list0{fold}.txt"):
                label, _, file = line.split()[0].partition("/")  # lines of trainlist also have the number of the class
                words = re.findall("[A-Z]+(?![a-z])|[A-Z][a-z]*|[0-9]+", label)  # ApplyEyeMakeup
                stem = f"UCF-101/{label}/{os.path.splitext(file)[0]}"
                name = f"{split}{fold}/{os.path.splitext(file)[0]}"
                yield _video(name, stem, f"{split}{fold}", "visual", [" ".join(words).lower()])


def hmdb51(root: Path) -> Iterator[Clip]:
    lists = root / "testTrainMulti_7030_splits"
    paths = sorted(lists.glob("*_test_split[123].txt"))
    if not paths:
        raise ConfigError(f"{lists}: holds no CLASS_test_split1.txt to CLASS_test_split3.txt")
    for path in paths:
        label, _, fold = path.stem.rpartition("_test_split")
        for number, line in enumerate(_lines(path), start=1):
            file, _, use = line.rpartition(" ")
            if use not in ("0", "1", "2"):
                raise ConfigError(f"{path}:{number}: {line!r} is not a file name and 0 (unused), 1 (train) or 2 (test)")
            if use != "0":
                split, stem = f"{'train' if use == '1' else 'test'}{fold}", os.path.splitext(file.strip())[0]
                name = f"{split}/{label}/{stem}"  # files of different classes have equal names
                yield _video(name, f"{label}/{stem}", split, "visual", [label.replace("_", " ")])


def didemo(root: Path) -> Iterator[Clip]:
    for split in ("train", "val", "test"):
        sentences: dict[str, list[str]] = defaultdict(list)
        path = root / f"{split}_data.json"
        for row in _rows(_json(path), path, "video", "description"):
            sentences[row["video"]].append(row["description"].strip())
        for name, texts in sentences.items():
            yield _video(name, f"videos/{os.path.splitext(name)[0]}", split, "visual", [" ".join(texts)])


def msvd(root: Path) -> Iterator[Clip]:
    captions: dict[str, list[str]] = defaultdict(list)
    path = root / "AllVideoDescriptions.txt"
    for number, line in enumerate(_lines(path), start=1):
        if not line.startswith("#"):
            name, _, text = line.partition(" ")
            if not text.strip():
                raise ConfigError(f"{path}: line {number} is not the name of a video and a description: {line!r}")
            captions[name].append(text.strip())
    for split in ("train", "val", "test"):
        names = root / f"{split}_list.txt"
        for name in _lines(names):
            if name not in captions:
                raise ConfigError(f"{names}: {name} has no description in {path.name}")
            yield _video(name, f"YouTubeClips/{name}", split, "visual", captions[name])


def activitynet(root: Path) -> Iterator[Clip]:
    for split in ("train", "val_1"):
        path = root / f"{split}.json"
        found = _json(path)
        if not isinstance(found, dict):
            raise ConfigError(f"{path}: is not an object from names of videos to their sentences")
        for name, row in zip(found, _rows(list(found.values()), path, "sentences", "duration"), strict=True):
            text = " ".join(sentence.strip() for sentence in row["sentences"])
            yield replace(_video(name, f"videos/{name}", split, "visual", [text]), seconds=float(row["duration"]))


def vatex(root: Path) -> Iterator[Clip]:
    files = {"train": "training_v1.0", "val": "validation_v1.0", "test": "public_test_english_v1.1"}
    for split, file in files.items():
        path = root / f"vatex_{file}.json"
        for row in _rows(_json(path), path, "videoID", "enCap"):
            yield _video(row["videoID"], f"videos/{row['videoID']}", split, "visual", row["enCap"])


def youcook2(root: Path) -> Iterator[Clip]:
    path = root / "youcookii_annotations_trainval.json"
    found = _json(path)
    if not isinstance(found, dict) or not isinstance(found.get("database"), dict):
        raise ConfigError(f'{path}: is not an object with a "database" of videos')
    videos = found["database"]
    for name, video in zip(videos, _rows(list(videos.values()), path, "subset", "annotations"), strict=True):
        for row in _rows(video["annotations"], path, "segment", "id", "sentence"):
            start, end = map(float, row["segment"])
            clip = _video(f"{name}_{row['id']}", f"videos/{name}", video["subset"], "visual", [row["sentence"].strip()])
            yield replace(clip, start=start, end=end, seconds=end - start)


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
    recipe.__name__: recipe
    for recipe in (
        *(audiocaps, clotho, valor32k, vctk, msrvtt, didemo, msvd, activitynet, vatex, youcook2),
        *(vggsound, kinetics, esc50, audioset, ucf101, hmdb51),
    )
}
LABELLED = ("vggsound", "kinetics", "esc50", "audioset", "ucf101", "hmdb51")  # their captions are labels of classes


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
    labels: set[str] = set()
    for clip in RECIPES[name](root):
        labels.update(*clip.captions.values())
        stems = {modality: stem for modality in ("audio", "video") if (stem := getattr(clip, modality))}
        files = {modality: _find(root, stem, folders) for modality, stem in stems.items()}
        if None in files.values():
            missing[clip.id] = clip.video or clip.audio
        else:
            if clip.video is not None and files["video"].lower().endswith(SOUND_ENDINGS):
                files["video"] = None  # of a corpus of videos, only the sound was kept
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
    if name in LABELLED:
        (root / CLASSES_FILE).write_text("".join(f"{label}\n" for label in sorted(labels)), encoding="utf-8")
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


def _table(path: Path, columns: int, comment: str | None = None) -> Iterator[list[str]]:
    """The rows of a CSV file without a header; lines that begin with `comment` are none."""
    with _open(path) as file:
        for number, row in enumerate(csv.reader(file, skipinitialspace=True), start=1):
            if comment is not None and row and row[0].startswith(comment):
                continue
            if len(row) != columns:
                raise ConfigError(f"{path}:{number}: has {len(row)} columns, not {columns}")
            yield row


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file that are not blank."""
    with _open(path) as file:
        yield from filter(None, map(str.strip, file))


def _rows(rows: Any, path: Path, *keys: str) -> Iterator[dict[str, Any]]:
    """The objects of a list from a JSON file, each with these keys."""
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: is a JSON {type(rows).__name__}, not a list of objects with {', '.join(keys)}")
    for number, row in enumerate(rows, start=1):
        lacks = [key for key in keys if not isinstance(row, dict) or key not in row]
        if lacks:
            raise ConfigError(f"{path}: entry {number} has no {lacks[0]}")
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
