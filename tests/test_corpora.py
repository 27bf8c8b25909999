"""Shards, cached features, recipes and stamps: each on a miniature made on the spot."""

import io
import json
import os
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import webdataset
from conftest import small_config
from safetensors import safe_open
from safetensors.torch import save_file
from test_data import write_clip
from test_media import noise, write_frames, write_wav
from test_processor import make_config, make_tokenizer

from pe_av import build_model
from pe_av.config import ConfigError, DataConfig, StampsConfig
from pe_av.config.compose import config_dir, read_yaml
from pe_av.config.evaluation import PromptsConfig
from pe_av.data.cache import CachedReader, FeatureCache, identify, write_cache
from pe_av.data.clips import ClipReader
from pe_av.data.manifest import Clip, Manifest, read_manifest
from pe_av.data.recipes import LABELLED, RECIPES, make_manifest
from pe_av.data.recipes import main as recipes_main
from pe_av.data.shards import index, pack
from pe_av.data.stamps import find_stamps, prepare_stamps
from pe_av.loading.batch import Collate
from pe_av.loading.loader import Loader
from pe_av.loading.sampler import BatchSampler
from pe_av.media.processor import Processor


def equal(one: dict, other: dict) -> bool:
    same = one.keys() == other.keys()
    return same and all(
        torch.equal(v, other[k]) if isinstance(v, torch.Tensor) else v == other[k] for k, v in one.items()
    )


# ---------------------------------------------------------------------------------------------------------------------
# shards


@pytest.fixture
def corpus(tmp_path):
    """A manifest of 12 clips: one file for both, separate files, sound alone, and one that is missing."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    clips = []
    for number in range(10):
        path = write_frames(folder / f"{number}.mkv", noise(3, seed=number), "ffv1", "bgr0")
        sound = write_wav(folder / f"{number}.wav", np.full((1, 4800), number + 1, np.int16))
        audio = {0: None, 1: str(path)}.get(number, str(sound))
        clips.append(
            Clip(f"clip {number}", audio, str(path), {None: [f"a dog {number}"], "audio": ["x"]}, split="train")
        )
    clips.append(Clip("alone", str(folder / "3.wav"), None, {None: ["one", "two"]}, start=0.02))
    clips.append(Clip("missing", str(folder / "no.wav"), None, {None: ["a"]}))
    return Manifest.of(clips, folder)


def test_packed_clips_are_the_ones_that_went_in(corpus, tmp_path):
    processor = Processor(make_config(), make_tokenizer())
    left_out = pack(corpus, tmp_path / "shards", shard_bytes=60_000)
    assert left_out == {"missing": f"{tmp_path}/corpus/no.wav: no such file"}
    packed = read_manifest(tmp_path / "shards" / "manifest.parquet")
    assert len(list((tmp_path / "shards").glob("*.tar"))) > 2
    read = ClipReader(processor, 30)
    assert len(packed) == 11
    for ours, theirs in zip(packed, corpus, strict=False):
        one, other = read(ours), read(theirs)
        assert (ours.audio is None) == (theirs.audio is None) and ".tar#" in ours.video if ours.video else True
        if ours.id == "clip 1":  # has no sound: the reasons name different sources
            assert "has no audio track" in one.pop("partial") and "has no audio track" in other.pop("partial")
        assert equal(one, other), ours.id
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "shards", capture_output=True)
    assert done.returncode == 0


def test_webdataset_reads_what_we_pack(corpus, tmp_path):
    pack(corpus, tmp_path / "shards", shard_bytes=60_000)
    urls = sorted(str(path) for path in (tmp_path / "shards").glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [json.loads(sample["json"])["id"] for sample in samples] == [c.id for c in corpus][:-1]
    assert samples[5]["video.mkv"] == Path(corpus[5].video).read_bytes()
    assert samples[5]["audio.wav"] == Path(corpus[5].audio).read_bytes()
    assert samples[1]["mkv"] == Path(corpus[1].video).read_bytes()


def test_we_read_what_webdataset_packs(tmp_path):
    sound = [write_wav(tmp_path / f"{i}.wav", np.full((1, 480), i, np.int16)).read_bytes() for i in range(5)]
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i, content in enumerate(sound):
            writer.write({"__key__": f"sample{i}", "wav": content, "txt": f"caption {i}"})
    manifest, wrong = index(tmp_path)
    assert not wrong and len(manifest) == 5
    read = ClipReader(Processor(make_config(), make_tokenizer()), 30)
    for i, clip in enumerate(read_manifest(tmp_path / "manifest.parquet")):
        assert clip.captions == {None: [f"caption {i}"]} and clip.video is None
        assert (read(clip)["waveform"] * 2**15).round().unique().tolist() == [float(i)]


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_a_key_ends_at_the_first_dot_of_the_files_name_as_in_webdataset(tmp_path):
    sound = write_wav(tmp_path / "x.wav", np.ones((1, 480), np.int16)).read_bytes()
    names = ["./000001", "./000002", "v1.0/x", "v1.0/y", "a/b.c/z"]
    members = {f"{n}.wav": sound + n.encode() for n in names} | {f"{n}.txt": f"of {n}".encode() for n in names}
    write_tar(tmp_path / "a.tar", dict(sorted(members.items())))
    manifest, wrong = index(tmp_path)
    assert not wrong
    theirs = {s["__key__"]: s["txt"] for s in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)}
    assert {clip.captions[None][0] for clip in manifest} == {text.decode() for text in theirs.values()}
    assert [clip.id for clip in manifest] == ["a/000001", "a/000002", "a/a/b.c/z", "a/v1.0/x", "a/v1.0/y"]
    for clip in manifest:  # each has its own file
        file, _, place = clip.audio.partition("#")
        first, size = map(int, place.split("+"))
        content = Path(file).read_bytes()[first : first + size]
        assert content == sound + clip.captions[None][0].removeprefix("of ").encode()


def test_what_an_index_cannot_use_is_named(tmp_path):
    sound = write_wav(tmp_path / "x.wav", np.ones((1, 480), np.int16)).read_bytes()
    members = {
        "good.wav": sound, "good.txt": b"not this", "good.json": b'{"id": "one", "caption": "a"}', "good.cls": b"3",
        "none": b"x", "sub/.hidden.wav": sound, "words.txt": b"only words", "bad.wav": sound, "bad.json": b"{torn",
        "bad.txt": b"kept", "lone.wav": sound, "two.mp4": b"x", "two.mkv": b"x", "two.flac": sound, "two.txt": b"b",
        "twin.wav": sound, "twin.json": b'{"id": "one", "caption": "c"}', "late.wav": sound,
        "late.json": b'{"start": "soon", "caption": "d"}', "b.AUDIO.bin": sound, "b.txt": b"e",
    }  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        again = tarfile.TarInfo("good.wav")
        again.size = 3
        tar.addfile(again, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("link.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "good.wav"
        tar.addfile(link)
    write_tar(tmp_path / "b.tar.gz", {"x.wav": sound}, "w:gz")
    write_tar(tmp_path / "c.tar", {"x.wav": sound}, "w:gz")
    manifest, wrong = index(tmp_path)
    # every sample is in the manifest, and whatever is not is named
    assert {clip.id: clip.captions[None] for clip in manifest} == {
        "one": ["a"], "a/bad": ["kept"], "a/two": ["b"], "a/twin": ["c"], "a/b": ["e"],
    }  # fmt: skip
    found = {clip.id: clip for clip in read_manifest(tmp_path / "manifest.parquet")}
    assert found["a/b"].audio and found["a/b"].video is None and found["a/two"].audio != found["a/two"].video
    told = [line.removeprefix(f"{tmp_path}/") for line in wrong]
    expected = (
        "a.tar: good: its .cls is not used: no known extension of audio, video or text",
        "a.tar: none: not used: its name is not KEY.EXTENSION",
        "a.tar: sub/.hidden.wav: not used: its name is not KEY.EXTENSION",
        "a.tar: words: not used: it has neither audio nor video",
        "a.tar: bad: its .json is not used: not a JSON object",
        "a.tar: lone: not used: nothing to pair",
        "a.tar: two: its .mkv is not used: another file has the same modality",
        "a.tar: twin: the id one is taken by an earlier clip; this one is named a/twin",
        "a.tar: late: not used: start=soon is not a number",
        "a.tar: good.wav: not used: an earlier file has the same name",
        "a.tar: link.wav: not used: a link",
        "b.tar.gz: not read: it is compressed; decompress it",
        "c.tar: ",
    )
    assert len(told) == len(expected)
    for text in expected:
        assert sum(line.startswith(text) for line in told) == 1, text


def test_an_odd_json_costs_only_its_own_sample(tmp_path):
    sound = write_wav(tmp_path / "x.wav", np.ones((1, 480), np.int16)).read_bytes()
    odd = {
        "deep": b"[" * 100_000,
        "empty": b'{"caption": ""}',
        "half": b'{"caption": "\\ud800"}',
        "name": b'{"id": "\\ud800", "caption": "x"}',
        "problem": b'{"problem": 5, "lacks": ["x"], "caption": "x"}',
        "split": b'{"split": 3, "caption": ["x", "\\ud800"]}',
    }
    members = {"a.wav": sound, "a.txt": b"x"}
    for name, content in odd.items():
        members |= {f"{name}.wav": sound, f"{name}.json": content}
    write_tar(tmp_path / "a.tar", members)
    manifest, wrong = index(tmp_path)
    assert list(read_manifest(tmp_path / "manifest.parquet")) == list(manifest)
    found = {clip.id: (clip.captions.get(None), clip.split, clip.problem, clip.lacks) for clip in manifest}
    assert found == {
        "a/a": (["x"], None, None, None),
        "a/empty": (None, None, None, "the caption is empty"),
        "a/half": (None, None, "the caption is not UTF-8", None),
        "a/problem": (["x"], None, None, None),
        "a/split": (["x"], "3", "the caption is not UTF-8", None),
    }
    deep, nothing, name = wrong
    assert "deep: its .json is not used: not a JSON object (nested too deeply)" in deep
    assert "deep: not used: nothing to pair" in nothing and "name: not used: the id '\\ud800' is not UTF-8" in name


def test_clips_that_say_what_they_lack_can_be_packed(tmp_path):
    write_wav(tmp_path / "a.wav", np.ones((1, 480), np.int16))
    rows = [{"audio": "a.wav", "caption": "x", "id": "1"}, {"audio": "a.wav", "caption": "", "id": "2"}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert pack(read_manifest(tmp_path / "m.jsonl"), tmp_path / "shards") == {}
    for manifest in (read_manifest(tmp_path / "shards" / "manifest.parquet"), index(tmp_path / "shards")[0]):
        assert [(clip.id, clip.captions, clip.lacks) for clip in manifest] == [
            ("1", {None: ["x"]}, None),
            ("2", {}, "the caption is empty"),
        ]


def test_a_shard_with_a_broken_header_says_so(tmp_path):
    sound = write_wav(tmp_path / "x.wav", np.ones((1, 480), np.int16)).read_bytes()
    write_tar(tmp_path / "a.tar", {f"{i}.{ending}": sound for i in range(4) for ending in ("wav", "mp4")})
    content = bytearray((tmp_path / "a.tar").read_bytes())
    with tarfile.open(tmp_path / "a.tar") as tar:
        header = tar.getmember("2.wav").offset
    content[header : header + 100] = b"\xff" * 100
    (tmp_path / "a.tar").write_bytes(content)
    manifest, wrong = index(tmp_path)
    assert [clip.id for clip in manifest] == ["a/0", "a/1"]
    end = f"damaged or cut short: the archive has no end at byte {header}; the rest is not read"
    assert wrong == [f"{tmp_path}/a.tar: {end}"]


def test_packing_goes_on_where_it_was_interrupted(corpus, tmp_path):
    pack(corpus, tmp_path / "whole", shard_bytes=60_000)
    pack(corpus, tmp_path / "part", shard_bytes=60_000)
    for name in ("000001.tar", "000002.json"):
        (tmp_path / "part" / name).unlink()
    (tmp_path / "part" / "000001.tar.part").write_bytes(b"half a shard")
    kept = (tmp_path / "part" / "000000.tar").stat().st_mtime_ns
    pack(corpus, tmp_path / "part", shard_bytes=60_000)
    assert (tmp_path / "part" / "SHA256SUMS").read_text() == (tmp_path / "whole" / "SHA256SUMS").read_text()
    assert (tmp_path / "part" / "000000.tar").stat().st_mtime_ns == kept
    assert not list((tmp_path / "part").glob("*.part"))
    with pytest.raises(ConfigError, match="has shards of another manifest"):
        pack(Manifest.of(list(corpus)[:3]), tmp_path / "part", shard_bytes=60_000)
    plan = tmp_path / "part" / "plan.json"
    plan.write_text(plan.read_text()[:20])
    with pytest.raises(ConfigError, match="plan.json: damaged; delete it"):
        pack(corpus, tmp_path / "part", shard_bytes=60_000)
    plan.unlink()
    pack(corpus, tmp_path / "part", shard_bytes=60_000)
    assert plan.read_text() == (tmp_path / "whole" / "plan.json").read_text()


def test_a_torn_shard_costs_what_it_lost(corpus, tmp_path):
    pack(corpus, tmp_path / "shards", shard_bytes=10**9)
    shard = tmp_path / "shards" / "000000.tar"
    whole = list(read_manifest(tmp_path / "shards" / "manifest.parquet"))
    place = whole[8].video.split("#")[1].split("+")
    shard.write_bytes(shard.read_bytes()[: int(place[0]) + int(place[1]) // 2])
    read = ClipReader(Processor(make_config(), make_tokenizer()), 30)
    for number, clip in enumerate(whole):
        found = read(clip)
        lost = [
            name for name, source in (("waveform", clip.audio), ("frames", clip.video)) if source and name not in found
        ]
        assert lost == {1: ["waveform"], 8: ["frames"], 9: ["waveform", "frames"], 10: ["waveform"]}.get(number, [])
        assert number < 8 or "the tar is cut short before the end of this file" in found["error"]
    found, wrong = index(tmp_path / "shards")  # what is left can be found without the manifest
    assert [clip.id for clip in found] == [f"clip {i}" for i in range(9)] and "000000.tar" in wrong[0]


# ---------------------------------------------------------------------------------------------------------------------
# cached features


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """(model, processor, clips, folder of their features)."""
    folder = tmp_path_factory.mktemp("cached")
    torch.manual_seed(0)
    model = build_model(small_config())
    processor = Processor(model.config, make_tokenizer())
    clips = [
        Clip(f"{i}", str(p), str(p), {None: ["a dog"]})
        for i, p in enumerate(write_clip(folder / f"{i}.mp4", 0.4 + 0.2 * i, sound=i != 2) for i in range(4))
    ]
    clips.append(Clip("torn", str(folder / "torn.mp4"), str(folder / "torn.mp4"), {None: ["a dog"]}))
    manifest = Manifest.of(clips, folder)
    assert write_cache(model, processor, manifest, folder / "features", num_workers=0) == 5
    return model, processor, manifest, folder / "features"


def test_a_model_gives_the_same_with_and_without_the_cache(cached):
    model, processor, manifest, folder = cached
    collate = Collate(processor)
    plain = collate([ClipReader(processor, 30.0)(clip) for clip in manifest])
    stored = collate([CachedReader(FeatureCache(folder, model, 30.0), processor, 30.0)(clip) for clip in manifest])
    assert set(stored["inputs"]) >= {"codec_features", "frame_features"} and "input_values" not in stored["inputs"]
    assert stored["ids"] == plain["ids"] == ["0", "1", "2", "3"] and stored["bad"] == plain["bad"]
    with torch.no_grad():
        ours, theirs = (model.embed(b["inputs"], b["texts"], b["rows"], len(b["ids"])) for b in (stored, plain))
    assert all(torch.equal(stored["valid"][n], plain["valid"][n]) for n in plain["valid"])
    assert ours.keys() == theirs.keys() == plain["valid"].keys()
    for name, value in theirs.items():
        rows = plain["valid"][name]
        torch.testing.assert_close(ours[name][rows], value[rows], rtol=1e-4, atol=1e-5)


def test_a_cache_of_other_weights_is_refused(cached, tmp_path):
    model, processor, manifest, folder = cached
    torch.manual_seed(1)
    other = build_model(small_config())
    with pytest.raises(ConfigError, match="these features are of another codec config or other weights"):
        FeatureCache(folder, other, 30.0)
    with pytest.raises(ConfigError, match="clips of another length"):
        FeatureCache(folder, model, 20.0)
    with pytest.raises(ConfigError, match="other weights"):
        write_cache(other, processor, manifest, folder, num_workers=0)
    # what comes after the frozen parts may change
    after = build_model(small_config())
    after.audio.codec.load_state_dict(model.audio.codec.state_dict())
    after.video.vision.load_state_dict(model.video.vision.state_dict())
    assert FeatureCache(folder, after, 30.0).encoders == ["codec", "frames"]
    with pytest.raises(ConfigError, match="no features there"):
        FeatureCache(tmp_path, model, 30.0)


def test_computing_goes_on_where_it_was_interrupted(cached, tmp_path, monkeypatch):
    model, processor, manifest, folder = cached
    monkeypatch.setattr("pe_av.data.cache.SHARD_CLIPS", 2)
    assert write_cache(model, processor, manifest, tmp_path, num_workers=0) == 5
    (tmp_path / "000001.safetensors").unlink()
    (tmp_path / "000009.safetensors.part").write_bytes(b"half")
    assert write_cache(model, processor, manifest, tmp_path, num_workers=0) == 2
    assert write_cache(model, processor, manifest, tmp_path, num_workers=0) == 0
    one, other = FeatureCache(folder, model, 30.0), FeatureCache(tmp_path, model, 30.0)
    assert all(equal(one.get(clip), other.get(clip)) for clip in manifest)
    assert "run pe_av.data.cache again" in CachedReader(one, processor, 30.0)(Clip("new", "a.wav"))["error"]


def test_features_belong_to_the_file_and_not_to_its_name(cached, tmp_path):
    """Two corpora with the same ids and the same relative names, in two folders."""
    model, processor, _, _ = cached
    manifests = []
    for number, name in enumerate(("one", "other")):
        (tmp_path / name).mkdir()
        write_wav(tmp_path / name / "a.wav", np.full((1, 9_600), 3000 * (1 + number), np.int16))
        (tmp_path / name / "m.jsonl").write_text('{"audio": "a.wav", "caption": "a dog"}\n')
        manifests.append(read_manifest(tmp_path / name / "m.jsonl"))
    folder = tmp_path / "features"
    assert [write_cache(model, processor, m, folder, ["codec"], num_workers=0) for m in manifests] == [1, 1]
    read = CachedReader(FeatureCache(folder, model, 30.0), processor, 30.0)
    found = [read(manifest[0])["codec_features"] for manifest in manifests]
    with torch.no_grad():
        for manifest, features in zip(manifests, found, strict=True):
            waveform = ClipReader(processor, 30.0)(manifest[0])["waveform"]
            assert torch.equal(features, model.audio.encode(waveform[None, None])[0][0])
    assert not torch.equal(*found)
    # by another way to the same file, and under another id, they are the same
    (tmp_path / "link").symlink_to(tmp_path / "one")
    (tmp_path / "link.wav").symlink_to(tmp_path / "one" / "a.wav")
    for path in ("link/a.wav", "link.wav", "other/../one/a.wav"):
        assert torch.equal(read(Clip("b", str(tmp_path / path)))["codec_features"], found[0]), path
    assert "not in the feature cache" in read(replace(manifests[0][0], start=0.01))["error"]


def test_a_file_that_has_changed_is_not_read_from_the_cache(cached, tmp_path):
    model, processor, _, _ = cached
    sound = write_wav(tmp_path / "a.wav", np.full((1, 9_600), 3000, np.int16)).read_bytes()
    write_tar(tmp_path / "b.tar", {"b.wav": sound})
    with tarfile.open(tmp_path / "b.tar") as tar:
        place = f"{tmp_path}/b.tar#{tar.getmember('b.wav').offset_data}+{len(sound)}"
    clips = [Clip("a", f"{tmp_path}/a.wav", captions={None: ["a"]}), Clip("b", place, captions={None: ["b"]})]
    manifest = Manifest.of(clips)
    assert write_cache(model, processor, manifest, tmp_path / "features", ["codec"], num_workers=0) == 2
    read = CachedReader(FeatureCache(tmp_path / "features", model, 30.0), processor, 30.0)
    before = [read(clip) for clip in clips]
    assert all("error" not in item and "codec_features" in item for item in before)
    for file, clip in zip((tmp_path / "a.wav", tmp_path / "b.tar"), clips, strict=True):
        content = file.read_bytes()
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))  # of the same size
        item = read(clip)
        assert item["error"].startswith(f"{clip.audio}: changed since its features were computed; run pe_av.data.cache")
        assert "codec_features" not in item
        file.unlink()
        assert read(clip)["error"].startswith(f"{clip.audio}: gone since its features were computed")
        file.write_bytes(content)
    assert write_cache(model, processor, manifest, tmp_path / "features", ["codec"], num_workers=0) == 2
    read = CachedReader(FeatureCache(tmp_path / "features", model, 30.0), processor, 30.0)
    assert all(equal(read(clip), item) for clip, item in zip(clips, before, strict=True))


def test_the_cache_looks_once_at_each_file(cached, monkeypatch):
    _, _, manifest, _ = cached
    identify(manifest[0], ["codec", "frames"])  # the folder is resolved once
    looks = []
    for name in ("stat", "lstat"):
        look = getattr(os, name)
        monkeypatch.setattr(os, name, lambda path, look=look, **how: looks.append(path) or look(path, **how))
    identify(manifest[1], ["codec", "frames"])
    assert looks == [manifest[1].audio]


def test_a_cache_of_the_old_format_is_refused(cached, tmp_path):
    model, processor, manifest, folder = cached
    with safe_open(folder / "000000.safetensors", framework="pt") as file:
        told = {"made_by": file.metadata()["made_by"], "keys": '["0"]', "errors": "{}"}
    save_file({"0.codec_features": torch.zeros(1, 12)}, tmp_path / "000000.safetensors", metadata=told)
    for refused in (
        lambda: FeatureCache(tmp_path, model, 30.0),
        lambda: write_cache(model, processor, manifest, tmp_path, num_workers=0),
    ):
        with pytest.raises(ConfigError, match="another format of the cache.*; compute them again into another folder"):
            refused()


def test_what_an_item_says_of_itself_is_cached(cached, tmp_path, monkeypatch):
    model, processor, manifest, _ = cached
    notes = {"0": {"partial": "0.mp4: no sound"}, "1": {"error": "torn"}, "2": {"error": "torn", "partial": "silent"}}

    def read(clip):  # stands for a ClipReader that makes such notes
        return {"id": clip.id, "captions": clip.captions, "waveform": torch.zeros(1920)} | notes.get(clip.id, {})

    monkeypatch.setattr("pe_av.data.cache.ClipReader", lambda processor, max_seconds: read)
    write_cache(model, processor, manifest, tmp_path, ["codec"], num_workers=0)
    monkeypatch.undo()
    cache = FeatureCache(tmp_path, model, 30.0)
    for clip in manifest:
        found = cache.get(clip)
        assert {n: found[n] for n in ("error", "partial") if n in found} == notes.get(clip.id, {})
    reader = CachedReader(cache, processor, 30.0)
    reader.read = lambda clip: {"id": clip.id, "captions": {}, "partial": "no caption"}
    items = [reader(clip) for clip in manifest][:3]
    assert [item["partial"] for item in items] == ["no caption; 0.mp4: no sound", "no caption", "no caption; silent"]
    assert [item.get("error") for item in items] == [None, "torn", "torn"]


def test_one_part_alone_can_be_cached(cached, tmp_path):
    model, processor, manifest, _ = cached
    write_cache(model, processor, manifest, tmp_path, ["codec"], num_workers=0)
    item = CachedReader(FeatureCache(tmp_path, model, 30.0), processor, 30.0)(manifest[0])
    assert item.keys() == {"id", "captions", "codec_features", "frames"}


def test_workers_read_the_cache(cached):
    model, processor, manifest, folder = cached
    reader = CachedReader(FeatureCache(folder, model, 30.0), processor, 30.0)
    loaders = [Loader(manifest, reader, BatchSampler(5, 5), Collate(processor), workers, 30) for workers in (0, 1)]
    one, other = (next(iter(loader)) for loader in loaders)
    loaders[1].close()
    assert equal(one["inputs"], other["inputs"])


# ---------------------------------------------------------------------------------------------------------------------
# recipes: miniatures in the published layouts


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")


def audiocaps(root):
    head = "audiocap_id,youtube_id,start_time,caption\n"
    write(root, "train.csv", f'{head}91139,r1nicOVtvkQ,130,"A woman talks, a dog barks"\n58146,-Abc_d,30,Rain\n')
    write(root, "val.csv", "audiocap_id,youtube_id,start_time,caption\n1,vvvvv,0,Wind\n2,vvvvv,0,Strong wind\n")
    write(
        root,
        "test.csv",
        "audiocap_id,youtube_id,start_time,caption\n" + "".join(f"{i},ttttt,10,Bells {i}\n" for i in range(5)),
    )
    touch(root, "train/r1nicOVtvkQ_130.wav", "val/vvvvv_0.flac", "test/ttttt_10.m4a")
    return {
        "r1nicOVtvkQ_130": ("train", {None: ["A woman talks, a dog barks"]}),
        "vvvvv_0": ("val", {None: ["Wind", "Strong wind"]}),
        "ttttt_10": ("test", {None: [f"Bells {i}" for i in range(5)]}),
    }, {"-Abc_d_30"}


def clotho(root):
    head = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
    for split in ("development", "validation", "evaluation"):
        write(root, f"clotho_captions_{split}.csv", head + f'{split} 01.wav,a,b,c,d,"e, f"\nlost.wav,a,b,c,d,e\n')
        touch(root, f"{split}/{split} 01.wav")
    splits = ("development", "validation", "evaluation")
    return {f"{s}/{s} 01": (s, {None: ["a", "b", "c", "d", "e, f"]}) for s in splits}, {f"{s}/lost" for s in splits}


def valor32k(root):
    for split in ("train", "val", "test"):
        write(root, f"desc_{split}.json", json.dumps([{"video_id": f"{split}id_10.000_20.000", "desc": "a dog"}]))
        touch(root, f"videos/{split}id_10.000_20.000.mp4")
    return {f"{s}id_10.000_20.000": (s, {"audio_visual": ["a dog"]}) for s in ("train", "val", "test")}, set()


def vggsound(root):
    write(
        root,
        "vggsound.csv",
        '---g-f_I2yQ,1,"people marching",test\n--0PQM4-hqg,30,waterfall burbling,train\n-lost,5,dog,train\n',
    )
    touch(root, "video/---g-f_I2yQ_000001.mp4", "video/--0PQM4-hqg_000030.mp4")
    return {
        "---g-f_I2yQ_000001": ("test", {None: ["people marching"]}),
        "--0PQM4-hqg_000030": ("train", {None: ["waterfall burbling"]}),
    }, {"-lost_000005"}


def kinetics(root):
    for split in ("train", "val"):
        write(
            root,
            f"annotations/{split}.csv",
            f"label,youtube_id,time_start,time_end,split\nplaying drums,{split}_id,7,17,{split}\n",
        )
        touch(root, f"{split}/{split}_id_000007_000017.mp4")
    return {f"{s}_id_000007_000017": (s, {"visual": ["playing drums"]}) for s in ("train", "val")}, set()


def msrvtt(root):
    sentences = [{"caption": f"{v} {i}", "video_id": v, "sen_id": i} for v in ("video0", "video1") for i in range(20)]
    write(root, "MSRVTT_data.json", json.dumps({"videos": [], "sentences": sentences}))
    write(root, "MSRVTT_train.9k.csv", "video_id\nvideo0\nvideo5\n")
    write(root, "MSRVTT_JSFUSION_test.csv", "key,vid_key,video_id,sentence\nret0,msr1,video1,a woman sings\n")
    touch(root, "videos/all/video0.mp4", "videos/all/video1.mp4")
    return {
        "video0": ("train", {"visual": [f"video0 {i}" for i in range(20)]}),
        "video1": ("test", {"visual": ["a woman sings"]}),
    }, {"video5"}


def esc50(root):
    write(
        root,
        "meta/esc50.csv",
        "filename,fold,target,category,esc10,src_file,take\n1-100032-A-0.wav,1,0,dog,True,100032,A\n"
        "5-9032-A-0.wav,5,36,vacuum_cleaner,False,9032,A\n",
    )
    touch(root, "audio/1-100032-A-0.wav", "audio/5-9032-A-0.wav")
    return {
        "1-100032-A-0.wav": ("fold1", {None: ["dog"]}),
        "5-9032-A-0.wav": ("fold5", {None: ["vacuum cleaner"]}),
    }, set()


def vctk(root):
    speakers = [f"p{225 + i}" for i in range(10)]
    for speaker in speakers:
        write(root, f"txt/{speaker}/{speaker}_001.txt", "Please call Stella.\n")
        touch(
            root,
            f"wav48_silence_trimmed/{speaker}/{speaker}_001_mic1.flac",
            f"wav48_silence_trimmed/{speaker}/{speaker}_001_mic2.flac",
        )
    return {f"{s}_001": ("test" if s == "p234" else "train", {None: ["Please call Stella."]}) for s in speakers}, set()


def audioset(root):
    write(
        root,
        "class_labels_indices.csv",
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/02zsn,"Female speech, woman"\n',
    )
    head = "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=2, num_segs=2\n# YTID, start_seconds, …\n"
    write(
        root, "eval_segments.csv", head + '--4gqARaEJE, 0.000, 10.000, "/m/09x0r,/m/02zsn"\nlost, 1, 9.5, "/m/09x0r"\n'
    )
    write(root, "balanced_train_segments.csv", head + '--PJHxphWEs, 30.000, 40.000, "/m/09x0r"\n')
    touch(root, "eval_segments/--4gqARaEJE.mp4", "balanced_train_segments/--PJHxphWEs.flac")
    return {
        "--4gqARaEJE": ("eval", {"audio": ["speech", "female speech, woman"]}),
        "--PJHxphWEs": ("balanced_train", {"audio": ["speech"]}),
    }, {"lost"}


def ucf101(root):
    for fold in "123":
        write(root, f"ucfTrainTestlist/trainlist0{fold}.txt", "YoYo/v_YoYo_g08_c01.avi 101\r\n")
        write(root, f"ucfTrainTestlist/testlist0{fold}.txt", "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\n")
    touch(root, "UCF-101/YoYo/v_YoYo_g08_c01.avi", "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi")
    train = {f"train{i}/v_YoYo_g08_c01": (f"train{i}", {"visual": ["yo yo"]}) for i in "123"}
    test = {f"test{i}/v_ApplyEyeMakeup_g01_c01": (f"test{i}", {"visual": ["apply eye makeup"]}) for i in "123"}
    return train | test, set()


def hmdb51(root):
    for fold in "123":
        lines = f"a_chew_h_nm_np1.avi 1 \nb #2.avi {fold if fold == '2' else 0} \n"
        write(root, f"testTrainMulti_7030_splits/brush_hair_test_split{fold}.txt", lines)
        write(root, f"testTrainMulti_7030_splits/chew_test_split{fold}.txt", "a_chew_h_nm_np1.avi 2 \n")
    touch(root, "brush_hair/a_chew_h_nm_np1.avi", "brush_hair/b #2.avi", "chew/a_chew_h_nm_np1.avi")
    clips = {f"train{i}/brush_hair/a_chew_h_nm_np1": (f"train{i}", {"visual": ["brush hair"]}) for i in "123"}
    clips |= {f"test{i}/chew/a_chew_h_nm_np1": (f"test{i}", {"visual": ["chew"]}) for i in "123"}
    return clips | {"test2/brush_hair/b #2": ("test2", {"visual": ["brush hair"]})}, set()


def didemo(root):
    for split in ("train", "val", "test"):
        rows = [
            {
                "annotation_id": i,
                "video": f"1@N00_{split}.avi",
                "description": text,
                "times": [[i, i]],
                "num_segments": 6,
            }
            for i, text in enumerate(("a dog runs ", "it barks"))
        ]
        write(root, f"{split}_data.json", json.dumps(rows))
    touch(root, "videos/1@N00_train.mov", "videos/1@N00_test.mp4")
    clips = {f"1@N00_{s}.avi": (s, {"visual": ["a dog runs it barks"]}) for s in ("train", "test")}
    return clips, {"1@N00_val.avi"}


def msvd(root):
    lines = [
        "# Copyright",
        "",
        "mv89psg6zh4_33_46 A bird is bathing.",
        "mv89psg6zh4_33_46 A bird splashes",
        "-b_1_2 Rain",
    ]
    write(root, "AllVideoDescriptions.txt", "\n".join(lines) + "\n")
    for split, name in (("train", "mv89psg6zh4_33_46"), ("val", "-b_1_2"), ("test", "-b_1_2")):
        write(root, f"{split}_list.txt", f"{name}\n" if split != "val" else "")
    touch(root, "YouTubeClips/mv89psg6zh4_33_46.avi", "YouTubeClips/-b_1_2.avi")
    return {
        "mv89psg6zh4_33_46": ("train", {"visual": ["A bird is bathing.", "A bird splashes"]}),
        "-b_1_2": ("test", {"visual": ["Rain"]}),
    }, set()


def activitynet(root):
    for split in ("train", "val_1"):
        row = {
            "duration": 82.73,
            "timestamps": [[0.8, 19.9], [17.4, 60.8]],
            "sentences": ["A man sits.", " He sings. "],
        }
        write(root, f"{split}.json", json.dumps({f"v_{split}": row}))
        touch(root, f"videos/v_{split}.mkv")
    return {f"v_{s}": (s, {"visual": ["A man sits. He sings."]}) for s in ("train", "val_1")}, set()


def vatex(root):
    files = {"train": "training_v1.0", "val": "validation_v1.0", "test": "public_test_english_v1.1"}
    for split, file in files.items():
        row = {"videoID": f"-{split}_000010_000020", "enCap": [f"{split} {i}" for i in range(10)]}
        write(root, f"vatex_{file}.json", json.dumps([row]))
        touch(root, f"videos/-{split}_000010_000020.mp4")
    return {f"-{s}_000010_000020": (s, {"visual": [f"{s} {i}" for i in range(10)]}) for s in files}, set()


def youcook2(root):
    def steps(*ids):
        texts = {0: "pick the ends off the verdalago", 1: " combine lemon juice and sumac "}
        return [{"segment": [90 + 12 * i, 102 + 12 * i], "id": i, "sentence": texts[i]} for i in ids]

    videos = {
        "GLd3aX16zBg": ("training", steps(0, 1)),
        "-cooks": ("validation", steps(1)),
        "gone": ("training", steps(0)),
    }
    database = {
        name: {"subset": split, "duration": 241.6, "annotations": rows} for name, (split, rows) in videos.items()
    }
    write(root, "youcookii_annotations_trainval.json", json.dumps({"database": database}))
    touch(root, "videos/GLd3aX16zBg.mkv", "videos/-cooks.mp4")
    return {
        "GLd3aX16zBg_0": ("training", {"visual": ["pick the ends off the verdalago"]}),
        "GLd3aX16zBg_1": ("training", {"visual": ["combine lemon juice and sumac"]}),
        "-cooks_1": ("validation", {"visual": ["combine lemon juice and sumac"]}),
    }, {"gone_0"}


MINIATURES = [
    *(audiocaps, clotho, valor32k, vctk, msrvtt, didemo, msvd, activitynet, vatex, youcook2),
    *(vggsound, kinetics, esc50, audioset, ucf101, hmdb51),
]


def test_every_recipe_has_a_miniature_and_those_with_labels_have_templates():
    assert {make.__name__ for make in MINIATURES} == set(RECIPES)
    assert {path.stem for path in (config_dir() / "prompts").glob("*.yaml")} == set(LABELLED) <= set(RECIPES)
    for name in LABELLED:
        read_yaml(PromptsConfig, config_dir() / "prompts" / f"{name}.yaml")


@pytest.mark.parametrize("make", MINIATURES, ids=lambda f: f.__name__)
def test_a_recipe_finds_what_is_there_and_reports_what_is_not(make, tmp_path, capsys):
    expected, missing = make(tmp_path)
    recipes_main([make.__name__, str(tmp_path)])
    assert f"{len(missing)} missing" in capsys.readouterr().out
    assert len((tmp_path / "missing.txt").read_text().splitlines()) == len(missing)
    found = read_manifest(tmp_path / "manifest.parquet")
    assert {clip.id: (clip.split, clip.captions) for clip in found} == expected
    assert all(Path(source).is_file() for clip in found for source in (clip.audio, clip.video) if source)
    assert set(make_manifest(make.__name__, tmp_path)[1]) == missing
    labels = {label for _, captions in expected.values() for texts in captions.values() for label in texts}
    if make.__name__ in LABELLED:  # those of missing clips too
        listed = (tmp_path / "classes.txt").read_text().splitlines()
        assert listed == sorted(labels | ({"dog"} if make is vggsound else set()))
    else:
        assert not (tmp_path / "classes.txt").exists()
    # the configuration beside it names splits that there are
    config = read_yaml(DataConfig, config_dir() / "data" / f"{make.__name__}.yaml")
    assert {config.train_split, config.eval_split} - {None} <= {split for split, _ in expected.values()}


def test_a_recipe_says_what_it_lacks(tmp_path):
    with pytest.raises(ConfigError, match="train.csv: no such file; configs/data says what the folder"):
        make_manifest("audiocaps", tmp_path)
    write(tmp_path, "train.csv", "id,text\n1,a\n")
    with pytest.raises(ConfigError, match="train.csv: has no column youtube_id; it has id, text"):
        make_manifest("audiocaps", tmp_path)
    audiocaps(tmp_path / "other")
    for path in (tmp_path / "other").rglob("*_*"):
        path.unlink()
    with pytest.raises(ConfigError, match="none of the 4 clips of audiocaps exists; the first would be train/"):
        make_manifest("audiocaps", tmp_path / "other")
    with pytest.raises(ConfigError, match="esc-50 is no recipe"):
        make_manifest("esc-50", tmp_path)
    assert set(RECIPES) <= {path.stem for path in (config_dir() / "data").glob("*.yaml")}


def test_a_corpus_of_videos_may_be_kept_as_sound_alone(tmp_path):
    audioset(tmp_path)
    clips = {clip.id: clip for clip in make_manifest("audioset", tmp_path)[0]}
    assert clips["--PJHxphWEs"].audio.endswith(".flac") and clips["--PJHxphWEs"].video is None
    assert clips["--4gqARaEJE"].audio == clips["--4gqARaEJE"].video and clips["--4gqARaEJE"].seconds == 10


def test_steps_of_one_video_are_pieces_of_one_file(tmp_path):
    youcook2(tmp_path)
    clips = {clip.id: clip for clip in make_manifest("youcook2", tmp_path)[0]}
    one, two = clips["GLd3aX16zBg_0"], clips["GLd3aX16zBg_1"]
    assert one.video == two.video == one.audio
    assert [(clip.start, clip.end, clip.seconds) for clip in (one, two)] == [(90, 102, 12), (102, 114, 12)]


def test_kinetics_may_have_a_folder_for_each_label(tmp_path):
    expected, _ = kinetics(tmp_path)
    for split in ("train", "val"):
        folder = tmp_path / split / "playing drums"
        folder.mkdir()
        (tmp_path / split / f"{split}_id_000007_000017.mp4").rename(folder / f"{split}_id_000007_000017.mp4")
    assert {clip.id for clip in make_manifest("kinetics", tmp_path)[0]} == set(expected)


@pytest.mark.parametrize(
    ("make", "file", "text", "message"),
    [
        (
            audioset,
            "eval_segments.csv",
            'a, 0, 10, "/m/x"\n',
            "eval_segments.csv: a: class /m/x is not in class_labels",
        ),
        (audioset, "eval_segments.csv", "a, 0, 10\n", "eval_segments.csv:1: has 3 columns, not 4"),
        (audioset, "eval_segments.csv", None, "balanced_train"),
        (ucf101, "ucfTrainTestlist/testlist02.txt", None, "testlist02.txt: no such file"),
        (
            hmdb51,
            "testTrainMulti_7030_splits/chew_test_split1.txt",
            "a.avi 3\n",
            "split1.txt:1: 'a.avi 3' is not a file",
        ),
        (didemo, "val_data.json", '[{"video": "a"}]', "val_data.json: entry 1 has no description"),
        (didemo, "val_data.json", "{}", "val_data.json: is a JSON dict, not a list"),
        (msvd, "test_list.txt", "nowhere_1_2\n", "test_list.txt: nowhere_1_2 has no description in AllVideo"),
        (msvd, "AllVideoDescriptions.txt", "alone\n", "line 1 is not the name of a video and a description: 'alone'"),
        (activitynet, "val_1.json", "[]", "val_1.json: is not an object"),
        (activitynet, "val_1.json", '{"v_a": {"sentences": []}}', "val_1.json: entry 1 has no duration"),
        (youcook2, "youcookii_annotations_trainval.json", "[]", "trainval.json: is not an object with a .database"),
        (
            youcook2,
            "youcookii_annotations_trainval.json",
            '{"database": {"a": {"subset": "training", "annotations": [{"segment": [0, 1], "id": 0}]}}}',
            "trainval.json: entry 1 has no sentence",
        ),
        (vatex, "vatex_validation_v1.0.json", '["a"]', "validation_v1.0.json: entry 1 has no videoID"),
    ],
)
def test_a_list_of_another_form_is_named(make, file, text, message, tmp_path):
    make(tmp_path)
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    if message == "balanced_train":  # the eval segments are not needed to train
        assert {clip.split for clip in make_manifest("audioset", tmp_path)[0]} == {"balanced_train"}
        return
    with pytest.raises(ConfigError, match=message):
        make_manifest(make.__name__, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# stamps


def test_stamps_become_clips_split_by_picture(tmp_path):
    source = tmp_path / "stamps"
    (source / "animals").mkdir(parents=True)
    for number in range(24):
        name = source / "animals" / f"beast{chr(97 + number)}"
        rgba = np.random.default_rng(number).integers(0, 256, (20, 30, 4), dtype=np.uint8)
        rgba[:, :10, 3] = 0
        with av.open(f"{name}.png", "w", format="image2") as container:
            stream = container.add_stream("png", rate=25)
            stream.width, stream.height, stream.pix_fmt = 30, 20, "rgba"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, format="rgba")))
            container.mux(stream.encode(None))
        Path(f"{name}.txt").write_text(f"A beast {number}.\nfr.utf8=Une bête {number}.\n", encoding="utf-8")
        write_wav(f"{name}.wav", np.full((1, 4_800 * (1 + number)), 1000, np.int16))
        write_wav(f"{name}_desc_fr.wav", np.full((1, 9_600), 2000, np.int16))
    (source / "animals" / "beasta2.txt").write_text("A twin.\n")
    (source / "animals" / "beasta2.png").write_bytes((source / "animals" / "beasta.png").read_bytes())
    write_wav(source / "animals" / "beasta2.wav", np.ones((1, 4_800), np.int16))
    rows = find_stamps(source, ["en", "fr"])
    held_out = {row["picture"] for row in rows if row["split"] == "eval"}
    assert held_out and not held_out & {row["picture"] for row in rows if row["split"] == "train"}
    twins = {row["split"] for row in rows if "beasta@" in row["id"] or "beasta2@" in row["id"]}
    assert len(twins) == 1
    config = StampsConfig(str(source), str(tmp_path / "clips"), ["en", "fr"])
    train, evaluation = (read_manifest(path) for path in prepare_stamps(config))
    assert len(train) + len(evaluation) == len(rows)
    french = next(clip for clip in train if clip.id.endswith("@fr"))
    assert french.captions[None][0].startswith("Une bête")
    processor = Processor(make_config(num_frames=4), make_tokenizer())
    item = ClipReader(processor, 30)(train[0])
    assert item["frames"].shape == (4, 3, 28, 28) and item["waveform"].abs().max() > 0.3
    assert not torch.equal(item["frames"][0], item["frames"][3])  # the camera moves
    with pytest.raises(ConfigError, match="apt-get install tuxpaint-stamps-default"):
        prepare_stamps(StampsConfig(str(tmp_path / "nowhere")))
