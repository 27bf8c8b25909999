"""Corpora: manifests, batches of what is there, and a corpus of everything that can be wrong with files."""

import json
import multiprocessing
import struct
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
from pe_av.data.dataset import BadItems, ClipReader, Collate
from pe_av.data.loader import BatchSampler, Loader
from pe_av.data.manifest import Clip, Manifest, main, read_manifest
from pe_av.data.processor import Processor


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
    with pytest.raises(ConfigError, match="no clips of split=test: the manifest has eval, train"):
        found.select("test")
    assert found.parts().tolist() == [7, 5, 3, 6, 7]
    assert sorted(found.texts()) == sorted(text for c in CLIPS for texts in c.captions.values() for text in texts)
    assert found.lengths(30) is None  # of d nothing is known
    assert found.select("train").lengths(30).tolist() == [1.75, 2.0]
    assert found.select("train").lengths(1.8).tolist() == [1.75, 1.8]


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
    with pytest.raises(ConfigError, match="m.parquet: not a manifest"):
        read_manifest(tmp_path / "m.parquet")


def test_captions_that_cannot_be_used_are_left_out_and_named(tmp_path):
    lines = [
        b'{"path": "a.mp4", "caption": "  "}',
        b'{"path": "b.mp4", "caption": "caf\xe9"}',
        b'{"path": "c.mp4", "caption": ["", "a dog"], "audio_caption": "barks"}',
        json.dumps({"path": "d.mp4", "caption": "dog " * 25_000}).encode(),
    ]
    (tmp_path / "m.jsonl").write_bytes(b"\n".join(lines))
    clips = list(read_manifest(tmp_path / "m.jsonl"))
    assert [clip.problem for clip in clips] == [
        "the caption is empty",
        "the caption is not UTF-8",
        "the caption is empty",
        None,
    ]
    assert clips[0].captions == clips[1].captions == {}
    assert clips[2].captions == {None: ["a dog"], "audio": ["barks"]}
    assert len(clips[3].captions[None][0]) == 100_000


def test_looking_into_files_finds_lengths_and_missing_tracks(tmp_path, capsys):
    write_clip(tmp_path / "both.mp4", 2.0)
    write_clip(tmp_path / "silent.mp4", 1.0, sound=False)
    write_wav(tmp_path / "blind.wav", np.zeros((1, 24_000), np.int16))
    (tmp_path / "torn.mp4").write_bytes(b"x")
    rows = [{"path": p.name, "caption": "a dog"} for p in sorted(tmp_path.iterdir())]
    rows.append({"path": "both.mp4", "caption": "a dog", "start": 1.5, "end": 9.0})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main([str(tmp_path / "m.jsonl"), str(tmp_path / "out.parquet")])
    assert "5 clips" in capsys.readouterr().out
    found = {clip.id: clip for clip in read_manifest(tmp_path / "out.parquet")}
    assert found["both.mp4"].seconds == pytest.approx(2.0, abs=0.05)
    assert found["both.mp4@1.5"].seconds == pytest.approx(0.5, abs=0.05)
    assert found["silent.mp4"].audio is None and found["silent.mp4"].video.endswith("silent.mp4")
    assert found["blind.wav"].video is None and found["blind.wav"].seconds == 0.5
    assert found["torn.mp4"].audio and found["torn.mp4"].video and found["torn.mp4"].seconds is None


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
    bad = BadItems(tmp_path / "bad.jsonl", len(clips), 1.0)
    has: dict[str, tuple[bool, bool]] = {}
    for batch in loader:
        bad.add(batch["bad"])
        if batch["inputs"] is not None:
            flags = zip(batch["has_audio"].tolist(), batch["has_video"].tolist(), strict=True)
            has |= dict(zip(batch["ids"], flags, strict=True))
            assert batch["inputs"]["input_values"].isfinite().all()
    loader.close()
    assert {name: has.get(name, (False, False)) for name in expected} == expected
    assert all(has[f"good-{i}"] == (True, True) for i in range(40))
    assert has["empty"] == has["latin"] == has["long"] == (True, True)  # sound and picture pair without a caption
    named = {
        json.loads(line)["id"]: json.loads(line)["error"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()
    }
    troubled = {name for name, parts in expected.items() if parts != (True, True)} | {"empty", "latin"}
    assert named.keys() - {"scrambled"} == troubled
    for name in expected:
        assert name not in named or name in named[name]
    assert "has no audio track" in named["no-sound.mp4"] and "has no video track" in named["no-picture.m4a"]
    assert named["latin"] == "the caption is not UTF-8"
    assert not multiprocessing.active_children()
