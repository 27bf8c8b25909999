"""Shards, cached features, recipes and stamps: each on a miniature made on the spot."""

import json
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import webdataset
from conftest import small_config
from test_data import write_clip
from test_media import noise, write_frames, write_wav
from test_processor import make_config, make_tokenizer

from pe_av import build_model
from pe_av.config import ConfigError, DataConfig, StampsConfig
from pe_av.config_files import config_dir, read_yaml
from pe_av.data.cache import CachedReader, FeatureCache, write_cache
from pe_av.data.dataset import ClipReader, Collate
from pe_av.data.loader import BatchSampler, Loader
from pe_av.data.manifest import Clip, Manifest, read_manifest
from pe_av.data.processor import Processor
from pe_av.data.recipes import RECIPES, make_manifest
from pe_av.data.recipes import main as recipes_main
from pe_av.data.shards import index, pack
from pe_av.data.stamps import find_stamps, prepare_stamps


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
            assert "has no audio track" in one.pop("error") and "has no audio track" in other.pop("error")
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
    with pytest.raises(ConfigError, match="holds shards of another manifest"):
        pack(Manifest.of(list(corpus)[:3]), tmp_path / "part", shard_bytes=60_000)


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
        assert number < 8 or "torn, the tar ends before the file in it does" in found["error"]
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
        ours, theirs = model(**stored["inputs"]), model(**plain["inputs"])
        embedded = model.embed(stored["inputs"], stored["texts"])
    for name, value in embedded.items():
        torch.testing.assert_close(value, ours.embeds()[name])
    for name, value in theirs.embeds().items():
        rows = plain["valid"][name]
        assert all(torch.equal(stored["valid"][n], plain["valid"][n]) for n in plain["valid"])
        torch.testing.assert_close(ours.embeds()[name][rows], value[rows], rtol=1e-4, atol=1e-5)


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
    assert FeatureCache(folder, after, 30.0).parts == ["codec", "frames"]
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
    assert one.get(Clip("new", "a.wav")) is None
    assert "run pe_av.data.cache again" in CachedReader(one, processor, 30.0)(Clip("new", "a.wav"))["error"]


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


@pytest.mark.parametrize(
    "make", [audiocaps, clotho, valor32k, vggsound, kinetics, msrvtt, esc50, vctk], ids=lambda f: f.__name__
)
def test_a_recipe_finds_what_is_there_and_reports_what_is_not(make, tmp_path, capsys):
    expected, missing = make(tmp_path)
    recipes_main([make.__name__, str(tmp_path)])
    assert f"{len(missing)} missing" in capsys.readouterr().out
    assert len((tmp_path / "missing.txt").read_text().splitlines()) == len(missing)
    found = read_manifest(tmp_path / "manifest.parquet")
    assert {clip.id: (clip.split, clip.captions) for clip in found} == expected
    assert all(Path(source).is_file() for clip in found for source in (clip.audio, clip.video) if source)
    assert set(make_manifest(make.__name__, tmp_path)[1]) == missing
    # the configuration beside it names splits that there are
    config = read_yaml(DataConfig, config_dir() / "data" / f"{make.__name__}.yaml")
    assert {config.train_split, config.eval_split} - {None} <= {split for split, _ in expected.values()}


def test_a_recipe_says_what_it_lacks(tmp_path):
    with pytest.raises(ConfigError, match="train.csv: no such file; what the corpus must look like"):
        make_manifest("audiocaps", tmp_path)
    write(tmp_path, "train.csv", "id,text\n1,a\n")
    with pytest.raises(ConfigError, match="train.csv: has no column youtube_id; it has id, text"):
        make_manifest("audiocaps", tmp_path)
    audiocaps(tmp_path / "other")
    for path in (tmp_path / "other").rglob("*_*"):
        path.unlink()
    with pytest.raises(ConfigError, match="none of the 4 clips of audiocaps is there; the first would be train/"):
        make_manifest("audiocaps", tmp_path / "other")
    with pytest.raises(ConfigError, match="esc-50 is no recipe"):
        make_manifest("esc-50", tmp_path)
    assert set(RECIPES) <= {path.stem for path in (config_dir() / "data").glob("*.yaml")}


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
