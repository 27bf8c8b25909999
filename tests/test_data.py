"""Corpora: manifests, batches of what is there, and a corpus of everything that can be wrong with files."""

import csv
import errno
import json
import multiprocessing
import os
import pickle
import struct
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_media import noise, write_audio, write_frames, write_wav
from test_processor import make_config, make_tokenizer

from pe_av.config import HEADS, ConfigError
from pe_av.data.clips import ClipReader
from pe_av.data.manifest import Clip, Manifest, main, read_manifest
from pe_av.data.manifest_formats import check_row
from pe_av.loading.bad_items import BadItems
from pe_av.loading.batch import Collate
from pe_av.loading.loader import Loader
from pe_av.loading.sampler import BatchSampler
from pe_av.media.processor import Processor


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(make_config(max_tokens=16, num_frames=2), make_tokenizer())


def write_clip(path: Path, seconds: float = 1.0, sound: bool = True, rate: int = 48_000) -> Path:
    """Noise that is seen at 25 frames per second and, unless not wanted, heard in stereo."""
    chance = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        picture = container.add_stream("libx264", rate=25, options={"bf": "0"})
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        if sound:
            audio = container.add_stream("aac", rate=rate, layout="stereo")
        for pixels in chance.integers(0, 256, (round(25 * seconds), 48, 64, 3), dtype=np.uint8):
            container.mux(picture.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(picture.encode(None))
        if sound:
            samples = chance.uniform(-0.3, 0.3, (2, round(rate * seconds))).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# manifests

CLIPS = [
    Clip("a", "x/a.mp4", "x/a.mp4", {None: ["a dog"]}, 1.5, 3.25, 1.75, "train"),
    Clip("b", "x/b.wav", None, {None: ["a dog barks"], "audio": ["barks"]}, seconds=2.0, split="train"),
    Clip("c", None, "x/c.mp4", {"visual": ["a dog"]}, split="eval"),
    Clip("d", "x/d.wav", "x/d.mp4", {}, split="eval"),
    Clip("e", "x/e.mp4", "x/e.mp4", {"audio_visual": ["at night, „loudly“"]}, 0.0, 4.0),
]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_every_format_keeps_every_column(tmp_path, ending):
    Manifest.of(CLIPS).write(tmp_path / f"m.{ending}")
    found = read_manifest(tmp_path / f"m.{ending}")
    sources = {c.id: {k: getattr(c, k) and str(Path.cwd() / getattr(c, k)) for k in ("audio", "video")} for c in CLIPS}
    assert list(found) == [replace(clip, **sources[clip.id]) for clip in CLIPS]
    assert [clip.id for clip in read_manifest(tmp_path / f"m.{ending}", "eval")] == ["c", "d"]
    with pytest.raises(ConfigError, match="no clips of split=test; the manifest has the splits eval, train"):
        found.select("test")
    assert found.modalities().tolist() == [7, 5, 3, 6, 7]
    assert sorted(found.texts()) == sorted(text for c in CLIPS for texts in c.captions.values() for text in texts)
    assert found.lengths(30).tolist() == [1.75, 2.0, 30.0, 30.0, 4.0]  # of c and d nobody knows
    assert found.lengths(1.875).tolist() == [1.75, 1.875, 1.875, 1.875, 1.875]
    assert found.lengths(float("inf")).tolist() == [1.75, 2.0, np.inf, np.inf, 4.0]
    assert found.select("train").lengths(30).tolist() == [1.75, 2.0]
    assert found.select("eval").lengths(30) is None
    assert {kind: has.tolist() for kind, has in found.select("train").kinds().items()} == {
        None: [True, True],
        "audio": [False, True],
        "visual": [False, False],
        "audio_visual": [False, False],
    }


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_several_captions_of_a_kind(tmp_path, ending):
    Manifest.of([Clip("a", "/a.wav", None, {None: ["one", "two"]})]).write(tmp_path / f"m.{ending}")
    assert read_manifest(tmp_path / f"m.{ending}")[0].captions == {None: ["one", "two"]}


def test_files_of_other_programs(tmp_path):
    (tmp_path / "m.csv").write_text('\ufeffpath,caption,start,end,mood\na.mp4,"a, ""dog""",1,2.5,good\na.mp4,b,3,,\n')
    first, second = read_manifest(tmp_path / "m.csv")
    assert first == Clip("a.mp4@1", f"{tmp_path}/a.mp4", f"{tmp_path}/a.mp4", {None: ['a, "dog"']}, 1.0, 2.5)
    assert second.id == "a.mp4@3" and second.end is None
    table = pa.table({"audio": ["a.wav", "b.wav"], "caption": ["one", "two"], "start": [0.0, 2.0], "n": [1, 2]})
    pq.write_table(table, tmp_path / "m.parquet")
    first, second = read_manifest(tmp_path / "m.parquet")
    assert first == Clip("a.wav", f"{tmp_path}/a.wav", None, {None: ["one"]})
    assert second.start == 2.0 and second.id.startswith("b.wav@2")
    with pytest.raises(ConfigError, match=r"m.csv:2: start=soon is not a number"):
        (tmp_path / "m.csv").write_text("path,start\na.mp4,soon\n")
        read_manifest(tmp_path / "m.csv")
    pq.write_table(pa.table({"audio": ["a.wav"], "mood": ["good"]}), tmp_path / "m.parquet")
    with pytest.raises(ConfigError, match="row 1: nothing to pair"):
        read_manifest(tmp_path / "m.parquet")
    (tmp_path / "m.parquet").write_bytes(b"PAR1 not at all")
    with pytest.raises(ConfigError, match="m.parquet: cannot be read as Parquet"):
        read_manifest(tmp_path / "m.parquet")


def test_captions_that_cannot_be_used_are_left_out_and_named(tmp_path):
    lines = [
        b'{"path": "a.mp4", "caption": "  "}',
        b'{"path": "b.mp4", "caption": "caf\xe9"}',
        b'{"path": "c.mp4", "caption": ["", "a dog"], "audio_caption": "barks"}',
        json.dumps({"path": "d.mp4", "caption": "dog " * 25_000}).encode(),
        b'{"path": "e.mp4", "caption": ["\\ud800", "\\ud83d\\ude00"], "visual_caption": ""}',
    ]
    (tmp_path / "m.jsonl").write_bytes(b"\n".join(lines))
    clips = list(read_manifest(tmp_path / "m.jsonl"))
    empty, broken = "the caption is empty", "the caption is not UTF-8"
    assert [clip.lacks for clip in clips] == [empty, None, empty, None, "the visual_caption is empty"]
    assert [clip.problem for clip in clips] == [None, broken, None, None, broken]
    assert clips[0].captions == clips[1].captions == {}
    assert clips[2].captions == {None: ["a dog"], "audio": ["barks"]}
    assert len(clips[3].captions[None][0]) == 100_000
    assert clips[4].captions == {None: ["\U0001f600"]}
    for ending in ("jsonl", "parquet"):  # what was said of them stays with them
        Manifest.of(clips).write(tmp_path / f"copy.{ending}")
        assert list(read_manifest(tmp_path / f"copy.{ending}")) == clips
    (tmp_path / "m.csv").write_bytes(b"path,caption\na.mp4,caf\xe9\nb.mp4,  \nc.mp4,\xed\xa0\x80\n")
    clips = list(read_manifest(tmp_path / "m.csv"))
    assert [(clip.problem, clip.lacks) for clip in clips] == [(broken, None), (None, empty), (broken, None)]
    column = pa.array([b"caf\xe9", b"", b"a dog", None], pa.binary()).cast(pa.string(), safe=False)
    several = pa.ListArray.from_arrays([0, 1, 2, 4, 4], column)
    for captions in (column, column.dictionary_encode(), several):
        table = pa.table({"path": list("abcd"), "caption": captions})
        if captions is several:
            table = table.slice(0, 2)  # a list that holds nothing is no list of captions
        pq.write_table(table, tmp_path / "m.parquet")
        clips = list(read_manifest(tmp_path / "m.parquet"))
        said = [(clip.problem, clip.lacks, clip.captions) for clip in clips]
        expected = [(broken, None, {}), (None, empty, {}), (None, None, {None: ["a dog"]}), (None, None, {})]
        assert said == expected[: len(said)]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("m.jsonl", b'{"path": "a.mp4"}\n{"path": "\\ud800.mp4"}', r"m.jsonl:2: the id '\\ud800.mp4' is not UTF-8"),
        ("m.jsonl", b'{"path": "a.mp4"}\n{"id": "b", "path": "\xe9.mp4"}', "m.jsonl:2: the audio '.udce9.mp4' is not"),
        ("m.jsonl", b'{"path": "a.mp4", "split": "\\udfff"}', "m.jsonl:1: the split '.udfff' is not UTF-8"),
        ("m.csv", b"id,video,audio\na,b.mp4,b.wav\nb,caf\xe9.mp4,b.wav\n", "m.csv:3: the video 'caf.udce9.mp4' is not"),
        ("m.jsonl", b"[" * 100_000, "m.jsonl:1: not JSON"),
        ("m.jsonl", b'{"path": "a.mp4", "end": ' + b"9" * 400 + b"}", "m.jsonl:1: end=9+ is not a number of seconds"),
    ],
)  # fmt: skip
def test_ids_and_paths_that_are_no_text_are_refused(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as refused:
        read_manifest(tmp_path / name)
    str(refused.value).encode()  # can be printed


def test_looking_into_files_finds_lengths_and_missing_tracks(tmp_path, capsys):
    write_clip(tmp_path / "both.mp4", 2.0)
    write_clip(tmp_path / "silent.mp4", 1.0, sound=False)
    write_wav(tmp_path / "blind.wav", np.zeros((1, 24_000), np.int16))
    (tmp_path / "torn.mp4").write_bytes(b"x")
    rows = [{"path": p.name, "caption": "a dog"} for p in sorted(tmp_path.iterdir())]
    rows.append({"path": "both.mp4", "caption": "a dog", "start": 1.5, "end": 9.0})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main([str(tmp_path / "m.jsonl"), str(tmp_path / "out.parquet")])
    # 2.0 + 0.5 + 1.0 + 0.5 s
    assert "5 clips, 0.00 hours, 1 of unknown length, written" in capsys.readouterr().out
    found = {clip.id: clip for clip in read_manifest(tmp_path / "out.parquet")}
    assert found["both.mp4"].seconds == pytest.approx(2.0, abs=0.05)
    assert found["both.mp4@1.5"].seconds == pytest.approx(0.5, abs=0.05)
    assert found["silent.mp4"].audio is None and found["silent.mp4"].video.endswith("silent.mp4")
    assert found["blind.wav"].video is None and found["blind.wav"].seconds == 0.5
    assert found["torn.mp4"].audio and found["torn.mp4"].video and found["torn.mp4"].seconds is None


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_what_could_be_read_can_be_read_after_it_was_written(tmp_path, ending):
    """A silent film without a caption, and what an empty or damaged caption leaves, have only one thing to pair."""
    write_clip(tmp_path / "both.mp4")
    write_clip(tmp_path / "silent.mp4", sound=False)
    write_wav(tmp_path / "a.wav", np.zeros((1, 24_000), np.int16))
    rows = [
        {"path": "both.mp4"},
        {"path": "silent.mp4"},
        {"audio": "silent.mp4", "caption": "x", "id": "no sound"},
        {"audio": "a.wav", "caption": "", "id": "empty"},
        {"audio": "a.wav", "caption": "\ud800", "id": "damaged"},
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = list(read_manifest(tmp_path / "m.jsonl"))
    for _ in range(2):  # and once more what was written
        main([str(tmp_path / "m.jsonl"), str(tmp_path / f"out.{ending}")])
        found = list(read_manifest(tmp_path / f"out.{ending}"))
        assert found[0] == replace(before[0], seconds=found[0].seconds)
        lacking = replace(before[1], audio=None, lacks="its file has no audio track", seconds=found[1].seconds)
        assert found[1] == lacking and found[1].seconds == pytest.approx(1.0, abs=0.05)
        assert found[2] == before[2]  # decoding it names the reason
        assert found[3:] == [replace(clip, seconds=0.5) for clip in before[3:]]
        assert [(clip.problem, clip.lacks) for clip in found[3:]] == [
            (None, "the caption is empty"),
            ("the caption is not UTF-8", None),
        ]
        (tmp_path / f"out.{ending}").rename(tmp_path / f"again.{ending}")
        main([str(tmp_path / f"again.{ending}"), str(tmp_path / "m.jsonl")])


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    rows = [{"path": "a.mp4", "caption": ["one", "two"]}]
    (tmp_path / "m.jsonl").write_text(json.dumps(rows[0]) + "\n")
    for ending in ("csv", "tsv", "pq"):
        (tmp_path / f"out.{ending}").write_text("kept")
    (tmp_path / "folder.jsonl").mkdir()
    for name, reason in (
        ("out.csv", "a.mp4 has several captions of one kind, which CSV cannot hold"),
        ("out.tsv", "unknown format of a manifest; its name must end in .parquet, .csv, .jsonl"),
        ("out.pq", "unknown format of a manifest"),
        ("folder.jsonl", "cannot be written (Is a directory)"),
        ("nowhere/out.csv", "cannot be written (no such folder)"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([str(tmp_path / "m.jsonl"), str(tmp_path / name)])
        assert str(ended.value).startswith(f"error: {tmp_path / name}: {reason}") and "\n" not in str(ended.value)
    assert all((tmp_path / f"out.{ending}").read_text() == "kept" for ending in ("csv", "tsv", "pq"))
    (tmp_path / "m.tsv").write_text("path\na.mp4\n")
    with pytest.raises(ConfigError, match="m.tsv: unknown format of a manifest"):
        read_manifest(tmp_path / "m.tsv")
    (tmp_path / "M.CSV").write_text("path,caption\na.mp4,x\n")
    main([str(tmp_path / "M.CSV"), str(tmp_path / "M.PARQUET")])
    assert pq.read_table(tmp_path / "M.PARQUET")["caption"].to_pylist() == [["x"]]
    assert not list(tmp_path.glob(".*.part"))


def test_tables_of_other_programs(tmp_path):
    (tmp_path / "m.csv").write_text("id , path, caption,,\na,a.mp4,x,,\n")
    assert [(clip.id, clip.captions) for clip in read_manifest(tmp_path / "m.csv")] == [("a", {None: ["x"]})]
    (tmp_path / "m.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"path": "a.mp4"}\r\n\r\n{"path": "b.mp4", "split": ""}\r\n')
    assert [(clip.id, clip.split) for clip in read_manifest(tmp_path / "m.jsonl")] == [("a.mp4", None), ("b.mp4", None)]
    for name in ("start", "seconds"):
        (tmp_path / "m.jsonl").write_text(json.dumps({"path": "a.mp4", "end": np.inf, name: np.inf}) + "\n")
        with pytest.raises(ConfigError, match=f"m.jsonl:1: {name}=inf is not a number of seconds"):
            read_manifest(tmp_path / "m.jsonl")
    (tmp_path / "m.csv").write_text("path,caption, caption\na.mp4,x,y\n")
    columns = [pa.array(["a.mp4"]), pa.array(["x"]), pa.array(["y"])]
    pq.write_table(pa.Table.from_arrays(columns, ["path", "caption", "caption"]), tmp_path / "m.parquet")
    for name in ("m.csv", "m.parquet"):
        with pytest.raises(ConfigError, match=f"{name}: has 2 columns named caption; remove or rename all but one"):
            read_manifest(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------------------
# manifests of many rows


def many_rows(count: int) -> list[dict]:
    """Rows with captions of about 150 bytes, of which some lack this or that."""
    said = "a large dog barks at a passing car while rain falls on"
    rows = []
    for i in range(count):
        row = {"path": f"{i % 97}/{i}.mp4", "caption": f"{said} {i}", "audio_caption": f"{said} the {i}"}
        row |= {"split": "eval" if i % 5 == 0 else "train"} if i % 7 else {}
        row |= {"seconds": i % 30 + 0.5} if i % 3 else {}
        row |= {"start": 1.5, "end": 4.0} if i % 11 == 0 else {}
        rows.append(row)
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        names = dict.fromkeys(key for row in rows for key in row)
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def small_batches(monkeypatch, tmp_path):
    """Manifests of over 100 rows are converted, and nothing outside of the test's folder is written."""
    monkeypatch.setattr("pe_av.data.manifest_formats.BATCH_ROWS", 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_a_mapped_manifest_is_the_one_in_memory(tmp_path, ending, monkeypatch, small_batches):
    path = write_rows(tmp_path / f"m.{ending}", many_rows(1234))
    mapped = read_manifest(path)
    assert mapped.stored == (str(tmp_path / f".m.{ending}.arrow"), mapped.stored[1])
    with monkeypatch.context() as patch:
        patch.setattr("pe_av.data.manifest_formats.BATCH_ROWS", 10_000)
        Path(mapped.stored[0]).rename(tmp_path / "aside")
        memory = read_manifest(path)
        (tmp_path / "aside").rename(mapped.stored[0])
    assert memory.stored is None
    for split in (None, "train", "eval"):
        one, other = (m if split is None else m.select(split) for m in (mapped, memory))
        plain = [clip for clip in memory if split in (None, clip.split)]
        assert list(one) == list(other) == plain
        assert [one[i] for i in range(len(one))] == [one[i - len(one)] for i in range(len(one))] == plain
        assert sorted(one.texts()) == sorted(t for c in plain for texts in c.captions.values() for t in texts)
        lengths = [min([10.0, *filter(None, [c.seconds, c.end and c.end - c.start])]) for c in plain]
        assert one.lengths(10).tolist() == lengths and one.lengths(10).dtype == np.float32
        assert one.modalities().tolist() == [7] * len(plain) and one.modalities().dtype == np.uint8
        assert {kind: has.tolist() for kind, has in one.kinds().items()} == {
            kind: [kind in c.captions for c in plain] for kind in (None, "audio", "visual", "audio_visual")
        }
        again = pickle.loads(pickle.dumps(one))
        assert list(again) == plain and len(pickle.dumps(one)) < 1000 + 4 * len(one)
        with pytest.raises(IndexError):
            one[len(one)]
    for other in ("jsonl", "csv", "parquet"):
        mapped.write(tmp_path / f"copy.{other}")
        assert list(read_manifest(tmp_path / f"copy.{other}")) == list(memory)


def test_a_copy_is_of_the_manifest_as_it_is(tmp_path, small_batches):
    rows = many_rows(300)
    path = write_rows(tmp_path / "m.jsonl", rows)
    first = read_manifest(path)
    made = os.stat(first.stored[0])
    assert os.stat(read_manifest(path).stored[0]) == made  # found again
    assert (made.st_mode & 0o777) == (path.stat().st_mode & 0o777)
    travelling = pickle.dumps(first)
    write_rows(path, rows[:-1])
    assert len(read_manifest(path)) == 299
    assert len(first) == 300 and first[299].id == rows[299]["path"]  # who has it open goes on with it
    with pytest.raises(ConfigError, match=r"\.m\.jsonl\.arrow: gone or replaced, because the manifest has changed"):
        pickle.loads(travelling)
    for damage in (b"", b"ARROW1 not at all", Path(first.stored[0]).read_bytes()[:-100]):
        Path(first.stored[0]).write_bytes(damage)
        assert len(read_manifest(path)) == 299
    assert {p.name for p in tmp_path.iterdir()} == {"m.jsonl", ".m.jsonl.arrow"}


def test_what_an_interrupted_conversion_has_left_is_removed_by_the_next(tmp_path, small_batches):
    path = write_rows(tmp_path / "m[1].jsonl", many_rows(300))
    (tmp_path / ".m[1].jsonl.arrow.abc.part").write_bytes(b"half a copy")
    (tmp_path / ".m1.jsonl.arrow.abc.part").write_bytes(b"of another manifest")
    assert len(read_manifest(path)) == 300
    assert {p.name for p in tmp_path.glob(".m*")} == {".m[1].jsonl.arrow", ".m1.jsonl.arrow.abc.part"}


def test_a_manifest_that_changes_while_it_is_read_is_refused(tmp_path, small_batches, monkeypatch):
    path = write_rows(tmp_path / "m.jsonl", many_rows(300))
    check = check_row

    def slow(row, where):
        if where.endswith(":250"):
            with path.open("a") as file:
                file.write('{"path": "new.mp4"}\n')
        return check(row, where)

    monkeypatch.setattr("pe_av.data.manifest_formats.check_row", slow)
    with pytest.raises(ConfigError, match="m.jsonl: changed while it was read"):
        read_manifest(path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_without_room_beside_it_the_copy_goes_to_the_cache_folder(tmp_path, small_batches, monkeypatch):
    (tmp_path / "corpus").mkdir()
    path = write_rows(tmp_path / "corpus" / "m.jsonl", many_rows(300))
    full = {str(tmp_path / "corpus")}
    new_file = pa.ipc.new_file

    def write(place, schema):
        if os.path.dirname(place) in full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return new_file(place, schema)

    monkeypatch.setattr("pe_av.data.manifest_copy.pa.ipc.new_file", write)
    manifest = read_manifest(path)
    assert Path(manifest.stored[0]).parent == tmp_path / "cache" / "pe_av"
    assert manifest[0].video == f"{path.parent}/0/0.mp4"
    made = os.stat(manifest.stored[0]).st_ino
    assert os.stat(read_manifest(path).stored[0]).st_ino == made
    Path(manifest.stored[0]).unlink()
    full.add(str(tmp_path / "cache" / "pe_av"))
    with pytest.raises(ConfigError) as refused:
        read_manifest(path)
    told = str(refused.value)
    assert told.startswith(f"{path}: no room for its memory-mapped copy") and "No space left on device" in told
    assert "\n" not in told and "XDG_CACHE_HOME" in told
    assert not list(tmp_path.rglob("*.part"))


def test_processes_that_open_it_at_once_share_one_copy(tmp_path):
    path = write_rows(tmp_path / "m.jsonl", many_rows(12_000))
    program = (
        "import os, sys; from pe_av.data.manifest import read_manifest; sys.stdin.readline()\n"
        "m = read_manifest(sys.argv[1]); print(len(m), os.stat(m.stored[0]).st_ino, m[-1].id)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, "-c", program, str(path)], **pipes) for _ in range(2)]
    told = [process.communicate("\n") for process in running]
    assert all(process.returncode == 0 for process in running), told
    copy = os.stat(tmp_path / ".m.jsonl.arrow").st_ino
    assert {out for out, _ in told} == {f"12000 {copy} {11_999 % 97}/11999.mp4\n"}
    assert sum("converting" in error for _, error in told) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"m.jsonl", ".m.jsonl.arrow"}


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_what_is_wrong_far_down_is_named_by_its_line(tmp_path, ending, small_batches):
    rows = many_rows(300)
    where = {"jsonl": ":277", "csv": ":278", "parquet": ": row 277"}[ending]  # the first line of a CSV names columns
    for change, reason in (
        ({"start": 5.0, "end": 4.0}, r"end=4\.0 is not after start=5\.0"),
        ({"seconds": -1.0}, r"seconds=-1\.0 is not a number of seconds"),
        ({"path": None}, "nothing to pair"),
    ):
        path = write_rows(tmp_path / f"m.{ending}", rows[:276] + [rows[276] | change] + rows[277:])
        with pytest.raises(ConfigError, match=f"m.{ending}{where}: {reason}"):
            read_manifest(path)
    path = write_rows(tmp_path / f"m.{ending}", rows + [rows[7], rows[7], rows[250]])
    with pytest.raises(ConfigError, match=f"m.{ending}: 3 repeated ids, such as '.*' in clips 8 and 301"):
        read_manifest(path)
    assert [p.name for p in tmp_path.iterdir()] == [f"m.{ending}"]


def test_ids_of_equal_hashes_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr("pe_av.data.manifest_copy.hash", lambda text: len(text), raising=False)
    names = ["aa", "bb", "ab", "ccc", "dd", "a"]
    path = write_rows(tmp_path / "m.jsonl", [{"id": name, "path": "x.mp4"} for name in names])
    assert [clip.id for clip in read_manifest(path)] == names
    write_rows(path, [{"id": name, "path": "x.mp4"} for name in [*names, "ab", "ab", "ccc"]])
    with pytest.raises(ConfigError, match="3 repeated ids, such as 'ab' in clips 3 and 7; give"):
        read_manifest(path)


def test_many_rows_take_little_memory(tmp_path):
    """Of its own, a process needs a batch while it converts, and then some bytes a row for what a sampler sorts by."""
    rows = 200_000
    path = write_rows(tmp_path / "m.jsonl", many_rows(rows))
    program = (
        "import sys, threading; import numpy as np; from pe_av.data.manifest import read_manifest\n"
        "from importlib.util import find_spec; find_spec('pandas') and __import__('pandas')\n"  # as Arrow does
        "def own(what='RssAnon'): return int(open('/proc/self/status').read().split(what + ':')[1].split()[0]) * 1024\n"
        "peak = [own()]; before = peak[0]; done = threading.Event()\n"
        "def watch():\n"
        "    while not done.wait(0.01): peak[0] = max(peak[0], own())\n"
        "threading.Thread(target=watch).start()\n"
        "m = read_manifest(sys.argv[1]); m.select('train'); m.lengths(30), m.modalities(), m.kinds(); done.set()\n"
        "print(len(m), peak[0] - before)"
    )
    converting, opening = (
        list(map(int, subprocess.check_output([sys.executable, "-c", program, str(path)], text=True).split()))
        for _ in range(2)
    )
    assert converting[0] == opening[0] == rows
    assert converting[1] < 64 * 2**20  # the captions alone are 30 MB, and as Python objects several times that
    assert opening[1] < 8 * 2**20 + 20 * rows
    assert os.path.getsize(tmp_path / ".m.jsonl.arrow") < 2.5 * path.stat().st_size


@pytest.mark.slow
def test_a_column_of_more_than_two_gibibytes(tmp_path):
    caption = "a dog barks at a passing car " * 4000  # 116 kB
    schema = pa.schema([("path", pa.string()), ("caption", pa.list_(pa.string()))])
    with pq.ParquetWriter(tmp_path / "m.parquet", schema) as writer:
        for start in range(0, 19_000, 500):
            rows = [{"path": f"{i}.mp4", "caption": [f"{i} {caption}"]} for i in range(start, start + 500)]
            writer.write_table(pa.Table.from_pylist(rows, schema))
    manifest = read_manifest(tmp_path / "m.parquet")
    assert sum(batch["caption"].flatten().nbytes for batch in manifest.table.to_batches()) > 2**31
    assert manifest[18_999].captions == {None: [f"18999 {caption}"]}
    assert sum(text.startswith(f"{i} ") for i, text in enumerate(manifest.texts())) == 19_000


# ---------------------------------------------------------------------------------------------------------------------
# batches


def item(name: str, sound: bool, picture: bool, captions: dict) -> dict:
    found = {"id": name, "captions": captions}
    if sound:
        found["waveform"] = torch.full((1920 * len(name),), 0.5)
    if picture:
        found["frames"] = torch.full((len(name), 3, 28, 28), 200, dtype=torch.uint8)
    return found


def test_rows_say_what_they_have(processor):
    items = [
        item("a", True, True, {None: ["a dog"]}),
        item("bb", True, False, {"audio": ["a dog barks"]}),
        item("ccc", False, True, {"visual": ["dog", "night"]}),
        item("dd", True, True, {}),
        item("eee", True, True, {"audio": ["dog"], "visual": ["a dog"], "audio_visual": ["night"]}),
        item("f", True, False, {}) | {"error": "torn"},
    ]
    kinds = (None, "audio", "visual", "audio_visual")
    batch = Collate(processor, kinds)(items, [0, 0, 1, 0, 0, 0])
    assert batch["ids"] == ["a", "bb", "ccc", "dd", "eee"] and batch["bad"] == [{"id": "f", "error": "torn"}]
    expected = {
        "audio": "11011", "video": "10111", "audio_video": "10011",
        "text_audio": "11001", "text_video": "10101", "text_audio_video": "10001",
        "audio_plus_text": "11001", "video_plus_text": "10101",
        "text_audio@audio": "11001", "text_video@visual": "10101", "text_audio_video@audio_visual": "10001",
        "text_audio_video@audio": "11001", "audio_plus_text@visual": "10001", "video_plus_text@audio": "10001",
    }  # fmt: skip
    found = {name: "".join(str(int(flag)) for flag in flags) for name, flags in batch["valid"].items()}
    assert expected.items() <= found.items()
    assert found.keys() == {n for n in HEADS if "text" not in n} | {
        n if kind is None else f"{n}@{kind}" for n in HEADS if "text" in n for kind in kinds
    }
    rows = {name: numbers.tolist() for name, numbers in batch["rows"].items()}
    assert rows["audio"] == [0, 1, 3, 4] and rows["video"] == [0, 2, 3, 4] and rows["audio_video"] == [0, 3, 4]
    assert rows["text"] == [0, 1, 2, 4] and rows["text@visual"] == [0, 2, 4] and rows["text@audio"] == [0, 1, 4]
    second = processor.tokenizer.decode(batch["texts"]["visual"]["input_ids"][1].tolist())
    assert second.startswith("[CLS] night")
    keys = batch["caption_keys"]
    assert keys[None][0] == keys["visual"][4] and keys["audio"][1] != keys["audio"][4]
    # rows 2 and 4 both show "night"; row 3, without a caption, equals no other
    assert len(set(keys[None].tolist())) == 4 and keys["visual"][0] == keys["visual"][4]
    # only the rows that have it
    assert batch["inputs"]["padding_mask"].sum(1).tolist() == [1920, 3840, 3840, 5760]
    assert batch["inputs"]["padding_mask_videos"].sum(1).tolist() == [1, 3, 2, 3]


def test_keys_are_the_same_in_every_process(processor):
    one = Collate(processor)([item("a", True, True, {None: ["a dog"]})])["caption_keys"][None].item()
    assert one == 9_151_722_581_430_185_315  # blake2b, as everywhere


def test_what_no_row_has_is_not_there(processor):
    batch = Collate(processor)([item("a", True, False, {None: ["a dog"]}), item("b", True, False, {None: ["dog"]})])
    assert set(batch["inputs"]) == {"input_values", "padding_mask"} and set(batch["texts"]) == {None}
    assert set(batch["rows"]) == {"audio", "text"} and not batch["valid"]["video"].any()
    silent = Collate(processor)([item("a", True, True, {}), item("b", True, True, {})])
    assert silent["texts"] == {} and set(silent["rows"]) == {"audio", "video", "audio_video"}
    nothing = Collate(processor)([{"id": "a", "captions": {}, "error": "torn"}])
    assert nothing["inputs"] == nothing["texts"] == nothing["rows"] == {} and nothing["ids"] == []
    assert nothing["bad"] == [{"id": "a", "error": "torn"}] and nothing["read"] == 1
    assert {flags.shape for flags in nothing["valid"].values()} == {(0,)}


# ---------------------------------------------------------------------------------------------------------------------
# everything that can be wrong


def bad_corpus(folder: Path) -> dict[str, tuple[bool, bool]]:
    """Files of every kind of trouble, and which of (sound, picture) can be read of each."""
    good = write_clip(folder / "good.mp4")
    content = good.read_bytes()
    (folder / "truncated.mp4").write_bytes(content[: len(content) // 2])
    (folder / "zero.mp4").touch()
    (folder / "no-media.mp4").write_text("nothing to see here\n" * 100)
    (folder / "wrong-name.wav").write_bytes(content)
    write_wav(folder / "mono.wav", np.ones((1, 8_000), np.int16), 8_000)
    write_wav(folder / "surround.wav", np.ones((6, 96_000), np.int16), 96_000)
    write_clip(folder / "rate-8000.mp4", rate=8_000)
    write_frames(folder / "uneven.mp4", noise(5), stamps=[0, 50, 60, 200, 210])
    write_frames(folder / "rotated.mp4", noise(5), rotate=90)
    write_frames(folder / "one-frame.mp4", noise(1))
    write_frames(folder / "ten-bit.mp4", noise(5), pixels="yuv420p10le")
    write_clip(folder / "no-sound.mp4", sound=False)
    write_audio(folder / "no-picture.m4a", np.full((1, 48_000), 0.1, np.float32), "aac", "fltp", "mono")
    write_wav(folder / "silence.wav", np.zeros((1, 4_800), np.int16))
    body = bytearray(content)
    body[200 : len(body) // 2] = np.random.default_rng(0).bytes(len(body) // 2 - 200)
    (folder / "scrambled.mp4").write_bytes(bytes(body))
    huge = write_wav(folder / "lies.wav", np.ones((1, 4_800), np.int16)).read_bytes()
    (folder / "lies.wav").write_bytes(huge[:40] + struct.pack("<I", 2**31 - 1) + huge[44:])  # says it has 2 GiB
    both, sound, picture, none = (True, True), (True, False), (False, True), (False, False)
    return {
        "good.mp4": both, "zero.mp4": none, "no-media.mp4": none, "truncated.mp4": none, "wrong-name.wav": both,
        "mono.wav": sound, "surround.wav": sound, "rate-8000.mp4": both, "uneven.mp4": picture, "rotated.mp4": picture,
        "one-frame.mp4": picture, "ten-bit.mp4": picture, "no-sound.mp4": picture, "no-picture.m4a": sound,
        "silence.wav": sound, "missing.mp4": none, "lies.wav": sound,
    }  # fmt: skip


def test_a_corpus_of_trouble_is_used_as_far_as_it_can_be_read(processor, tmp_path):
    expected = bad_corpus(tmp_path)
    rows = [{"path": name, "caption": "a dog barks"} for name in expected]
    rows += [{"id": f"good-{i}", "path": "good.mp4", "caption": "a dog"} for i in range(40)]
    rows += [
        {"id": "empty", "path": "good.mp4", "caption": ""},
        {"id": "long", "path": "good.mp4", "caption": "dog " * 25_000},
    ]
    rows += [{"id": "scrambled", "path": "scrambled.mp4", "caption": "a dog"}]
    lines = [json.dumps(row).encode() for row in rows] + [b'{"id": "latin", "path": "good.mp4", "caption": "caf\xe9"}']
    (tmp_path / "m.jsonl").write_bytes(b"\n".join(lines))
    clips = read_manifest(tmp_path / "m.jsonl")
    loader = Loader(
        clips, ClipReader(processor, 10.0), BatchSampler(len(clips), 8), Collate(processor), 2, time_limit=20.0
    )
    bad = BadItems(tmp_path, len(clips), 1.0)
    has: dict[str, tuple[bool, bool]] = {}
    for batch in loader:
        bad.add(batch["read"], batch["bad"], batch["partial"])
        flags = zip(batch["valid"]["audio"].tolist(), batch["valid"]["video"].tolist(), strict=True)
        has |= dict(zip(batch["ids"], flags, strict=True))
        assert batch["inputs"].get("input_values", torch.zeros(1)).isfinite().all()
    loader.close()
    assert {name: has.get(name, (False, False)) for name in expected} == expected
    assert all(has[f"good-{i}"] == (True, True) for i in range(40))
    assert has["empty"] == has["latin"] == has["long"] == (True, True)  # sound and picture pair without a caption
    assert bad.seen == len(clips)
    damaged, partial = (
        {
            row["id"]: row["error"]
            for row in map(json.loads, (tmp_path / f"{name}_items.jsonl").read_text().splitlines())
        }
        for name in ("bad", "partial")
    )
    assert damaged.keys() - {"scrambled"} == {"zero.mp4", "no-media.mp4", "truncated.mp4", "missing.mp4", "latin"}
    lacking = {name for name, parts in expected.items() if parts in ((True, False), (False, True))} | {"empty"}
    assert partial.keys() == lacking
    for name in expected:
        assert all(name not in named or name in named[name] for named in (damaged, partial))
    assert "has no audio track" in partial["no-sound.mp4"] and "has no video track" in partial["no-picture.m4a"]
    assert damaged["latin"] == "the caption is not UTF-8" and partial["empty"] == "the caption is empty"
    assert not multiprocessing.active_children()
