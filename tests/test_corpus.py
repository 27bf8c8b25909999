"""Embedding a corpus: every clip once, as it is embedded alone, from whatever source, on any number of processes,
after any number of kills."""

import errno
import json
import resource
import shutil
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize, relative_error, small_config
from PIL import Image
from processes import Command, Ranks
from test_classification import make_tokenizer
from test_data import write_clip
from test_media import write_wav

from pe_av import embed, index
from pe_av.checkpoint import build_model, load_model, save_model
from pe_av.config import ConfigError, EmbedConfig
from pe_av.config.compose import from_dict
from pe_av.data.manifest import Clip, Manifest
from pe_av.embed import embed_corpus
from pe_av.index import Index
from pe_av.media.processor import Processor

NAMES = ("audio", "video", "audio_video")
ROUNDING = 3e-5  # the embeddings of this model in float32 are 1.2e-5 from those in float64


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Sounds, films with and without sound, a picture, a torn file and a text file, in folders; and a checkpoint."""
    folder = tmp_path_factory.mktemp("corpus")
    model = randomize(build_model(small_config()))
    save_model(model, folder / "checkpoint")
    Processor(model.config, make_tokenizer()).save_pretrained(folder / "checkpoint")
    (folder / "media/deep").mkdir(parents=True)
    random = np.random.default_rng(0)
    for number, seconds in enumerate((0.3, 0.9, 0.5, 0.2)):
        samples = random.integers(-9000, 9000, (1, round(48_000 * seconds)), dtype=np.int16)
        write_wav(folder / f"media/sound{number}.wav", samples)
    write_clip(folder / "media/film.mp4", 0.6)
    write_clip(folder / "media/deep/silent.mp4", 0.4, sound=False)
    Image.fromarray(random.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / "media/deep/picture.png")
    (folder / "media/torn.wav").write_bytes((folder / "media/sound0.wav").read_bytes()[:30])
    (folder / "media/notes.txt").write_text("not a clip")
    return folder


IDS = [
    "deep/picture.png",
    "deep/silent.mp4",
    "film.mp4",
    "sound0.wav",
    "sound1.wav",
    "sound2.wav",
    "sound3.wav",
    "torn.wav",
]


def settings(corpus: Path, target: Path, **changes) -> EmbedConfig:
    values = {"checkpoint": str(corpus / "checkpoint"), "source": str(corpus / "media"), "target": str(target)}
    values |= {"device": "cpu", "batch_size": 2, "part_rows": 4, "max_bad_fraction": 0.5}
    return from_dict(EmbedConfig, values | {"data": {"demo": None, "num_workers": 0}} | changes, source="test")


@torch.inference_mode()
def alone(corpus: Path) -> dict[str, dict[str, torch.Tensor]]:
    """id -> embedding -> (D,), every file by itself through the processor and the model's own methods."""
    model, processor = load_model(corpus / "checkpoint"), Processor.from_pretrained(corpus / "checkpoint")
    found = {}
    for name in IDS[:-1]:
        path, batch = corpus / "media" / name, {}
        if not name.startswith("deep"):
            batch |= processor(audio=path)
        if not name.startswith("sound"):
            batch |= processor(videos=path)
        methods = ["audio"] * ("input_values" in batch) + ["video"] * ("pixel_values_videos" in batch)
        found[name] = {}
        for modality in [*methods, *(["audio_video"] if len(methods) == 2 else [])]:
            own = {
                k: v for k, v in batch.items() if modality == "audio_video" or ("video" in k) == (modality == "video")
            }
            found[name][modality] = getattr(model, f"get_{modality}_embeds")(**own)[0]
    return found


def rows_of(folder: Path) -> list[dict]:
    return Index(folder).table().to_pylist()


def test_every_file_of_a_folder_is_embedded_as_it_is_alone(corpus: Path, tmp_path: Path):
    embed_corpus(settings(corpus, tmp_path))
    rows, expected = rows_of(tmp_path), alone(corpus)
    assert [row["id"] for row in rows] == IDS
    for row in rows[:-1]:
        for name in NAMES:
            value = row[f"{name}_embeds"]
            assert (value is not None) == (name in expected[row["id"]])
            if value is not None:
                assert relative_error(torch.tensor(value), expected[row["id"]][name]) < ROUNDING
        assert row["error"] is None and row["start"] == 0 and row["end"] is None
    assert rows[2]["audio"] == rows[2]["video"] == str(corpus / "media/film.mp4")
    assert "no audio" in rows[1]["partial"] and rows[2]["partial"] is None
    assert all(rows[7][f"{name}_embeds"] is None for name in NAMES) and "torn.wav" in rows[7]["error"]
    listed = [json.loads(line) for line in (tmp_path / "bad_items.jsonl").read_text().splitlines()]
    assert listed == [{"id": "torn.wav", "error": rows[7]["error"]}]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bad_items.jsonl", "index.json", "part-000000.arrow", "part-000001.arrow",
    ]  # fmt: skip


def test_only_what_is_asked_for_is_read_and_kept(corpus: Path, tmp_path: Path):
    embed_corpus(settings(corpus, tmp_path / "one", embeddings=["audio"], source=str(corpus / "media/*.wav")))
    assert Index(tmp_path / "one").embeddings == ["audio"]
    assert [row["id"] for row in rows_of(tmp_path / "one")] == IDS[3:]
    embed_corpus(settings(corpus, tmp_path / "two", source=str(corpus / "media/**/*.png")))
    assert Index(tmp_path / "two").embeddings == ["video"]  # there is no sound anywhere
    assert rows_of(tmp_path / "two")[0]["id"] == "deep/picture.png"


def test_captions_and_windows_of_a_manifest(corpus: Path, tmp_path: Path):
    media = corpus / "media"
    clips = [
        Clip("long", str(media / "sound1.wav"), str(media / "sound1.wav"), {None: ["a dog"]}, split="test"),
        Clip("film", str(media / "film.mp4"), str(media / "film.mp4"), {None: ["rain"]}, start=0.1, end=0.5),
    ]
    Manifest.of(clips).write(tmp_path / "clips.parquet")
    windows = {"seconds": 0.4, "hop": 0.3}
    config = settings(corpus, tmp_path / "index", source=str(tmp_path / "clips.parquet"), windows=windows)
    embed_corpus(config)
    rows = rows_of(tmp_path / "index")
    assert [(row["id"].split(" [")[0], row["start"], row["end"]) for row in rows] == [
        ("long", 0.0, pytest.approx(0.4)), ("long", pytest.approx(0.3), pytest.approx(0.7)),
        ("long", pytest.approx(0.5), None), ("film", pytest.approx(0.1), pytest.approx(0.5)),
    ]  # fmt: skip
    assert rows[0]["captions"] == ["a dog"] and rows[0]["split"] == "test"
    model, processor = load_model(corpus / "checkpoint"), Processor.from_pretrained(corpus / "checkpoint")
    with torch.inference_mode():
        text = processor(text="a dog")
        second = processor.batch_audio([processor.audio_item(media / "sound1.wav", start=0.3, end=0.7)])
        for name, value in {
            "text_audio": model.get_text_audio_embeds(**text),
            "audio": model.get_audio_embeds(**second),
            "audio_plus_text": model.get_audio_plus_text_embeds(**text, **second),
        }.items():
            assert relative_error(torch.tensor(rows[1][f"{name}_embeds"]), value[0]) < ROUNDING
    assert rows[1]["video_plus_text_embeds"] is None and rows[3]["video_plus_text_embeds"] is not None


def test_tar_shards_give_what_their_files_give(corpus: Path, tmp_path: Path):
    for number in (0, 1):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for name in IDS[3 + 2 * number : 5 + 2 * number]:  # two sounds each, and nothing else
                tar.add(corpus / "media" / name, name)
    embed_corpus(settings(corpus, tmp_path / "index", source=str(tmp_path / "*.tar")))
    expected = alone(corpus)
    rows = {row["id"]: row for row in rows_of(tmp_path / "index")}
    assert list(rows) == ["0/sound0", "0/sound1", "1/sound2", "1/sound3"]
    for number, name in enumerate(IDS[3:7]):
        found = torch.tensor(rows[f"{number // 2}/sound{number}"]["audio_embeds"])
        assert relative_error(found, expected[name]["audio"]) < ROUNDING


def test_it_goes_on_with_the_parts_that_are_missing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    embed_corpus(settings(corpus, whole))
    written = []

    def full_disk(path: Path, *arguments) -> None:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        index.write_part(path, *arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(embed, "write_part", full_disk)
        embed_corpus(settings(corpus, broken))
    assert Index(broken).missing == 1 and len(Index(broken)) == 4
    first = (broken / "part-000000.arrow").stat().st_mtime_ns
    embed_corpus(settings(corpus, broken))
    assert (broken / "part-000000.arrow").stat().st_mtime_ns == first
    for number in (0, 1):
        name = f"part-00000{number}.arrow"
        assert (whole / name).read_bytes() == (broken / name).read_bytes()


def test_a_full_disk_leaves_no_half_part(tmp_path: Path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(OSError):
            index.write_part(
                tmp_path / "part-000000.arrow",
                [{"id": "a"}],
                {"audio": np.ones((1, 5000))},
                {"audio": np.array([True])},
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []


def _embed(config: dict, folder: Path) -> None:
    embed_corpus(from_dict(EmbedConfig, config, source="test"))


def test_three_ranks_write_what_one_process_writes(corpus: Path, tmp_path: Path):
    embed_corpus(settings(corpus, tmp_path / "one", part_rows=2))
    Ranks(3, settings(corpus, tmp_path / "many", part_rows=2), tmp_path, _embed).finish()
    for number in range(4):
        name = f"part-00000{number}.arrow"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
    assert (tmp_path / "one/bad_items.jsonl").read_bytes() == (tmp_path / "many/bad_items.jsonl").read_bytes()


def test_what_cannot_be_embedded_is_said_in_a_line(corpus: Path, tmp_path: Path):
    def refused(message: str, **changes) -> None:
        with pytest.raises(ConfigError, match=message):
            embed_corpus(settings(corpus, tmp_path / "index", **changes))

    (tmp_path / "empty").mkdir()
    refused("there are no such files", source=str(tmp_path / "empty"))
    refused("there are no such files", source=str(tmp_path / "*.mp4"))
    refused("none of its 1 files is a media file", source=str(corpus / "media/notes.txt"))
    refused("source is not set", source=None)
    refused("embeddings=text_audio", embeddings=["text_audio"])
    refused("part_rows=5 is not a multiple", part_rows=5)
    refused("max_bad_fraction", max_bad_fraction=0.0, source=str(corpus / "media/torn.wav"))
    assert not list((tmp_path / "index").glob("part*"))
    shutil.rmtree(tmp_path / "index")
    embed_corpus(settings(corpus, tmp_path / "index"))
    refused("max_seconds=30", data={"max_seconds": 1.0, "num_workers": 0, "demo": None})
    refused("rows=8, now it is 5", source=str(corpus / "media/*.wav"))
    shutil.copytree(corpus / "checkpoint", tmp_path / "other")
    save_model(randomize(build_model(small_config()), seed=1), tmp_path / "other")
    refused("checkpoint_sha256", checkpoint=str(tmp_path / "other"))
    shutil.copytree(corpus / "media", tmp_path / "media")
    write_clip(tmp_path / "media/film.mp4", 0.3)  # another film of the same name
    refused(r"film.mp4 had [\d,]+ bytes when it was begun, and now has", source=str(tmp_path / "media"))
    (tmp_path / "index/index.json").write_text("{")
    refused("index.json: damaged")


def test_embeddings_that_are_not_finite_are_no_embeddings(corpus: Path, tmp_path: Path):
    model = load_model(corpus / "checkpoint")
    with torch.no_grad():
        model.heads["video"].proj.weight.fill_(torch.inf)
    save_model(model, tmp_path / "checkpoint")
    config = settings(corpus, tmp_path / "index", checkpoint=str(tmp_path / "checkpoint"), max_bad_fraction=1.0)
    embed_corpus(config)
    rows = rows_of(tmp_path / "index")
    assert rows[2]["error"] == "its video embedding is NaN or infinite" and rows[2]["video_embeds"] is None
    assert rows[2]["audio_embeds"] is not None


def test_a_rank_without_parts_ends_in_peace(corpus: Path, tmp_path: Path):
    Ranks(2, settings(corpus, tmp_path / "index", part_rows=64), tmp_path, _embed).finish()
    assert [row["id"] for row in rows_of(tmp_path / "index")] == IDS


def test_clips_of_the_same_name_are_all_embedded(corpus: Path, tmp_path: Path):
    """A file and two samples of shards; the windows of a clip are so close that their names are equal."""
    shutil.copy(corpus / "media/sound0.wav", tmp_path / "a.wav")
    for number in (0, 1):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            tar.add(corpus / "media/sound1.wav", "k.wav")
            (tmp_path / "k.json").write_text(json.dumps({"id": "a.wav"}))
            tar.add(tmp_path / "k.json", "k.json")
    (tmp_path / "k.json").unlink()
    windows = {"seconds": 0.5, "hop": 0.004}
    embed_corpus(settings(corpus, tmp_path / "index", source=str(tmp_path), windows=windows, part_rows=64))
    found = Index(tmp_path / "index")
    assert found.count("audio") == len(found) > 150
    assert len({row.split(" [")[0] for row in found.rows()["id"].to_pylist()}) == 3


@pytest.mark.slow
def test_three_kills_lose_nothing_and_repeat_nothing(corpus: Path, tmp_path: Path):
    """10,000 clips: each once, whenever the process is killed."""
    clips = [
        Clip(f"clip {n}", *[str(corpus / f"media/sound{n % 4}.wav")] * 2, start=(n // 4 % 50) / 1000)
        for n in range(10_000)
    ]
    Manifest.of(clips).write(tmp_path / "clips.parquet")
    arguments = [f"checkpoint={corpus}/checkpoint", f"source={tmp_path}/clips.parquet", f"target={tmp_path}/index"]
    arguments += ["part_rows=512", "data.num_workers=1"]
    for _ in range(3):
        command = Command(tmp_path, "pe_av.embed", *arguments)
        before = len(list((tmp_path / "index").glob("*.arrow")))
        deadline = time.monotonic() + 300
        while len(list((tmp_path / "index").glob("*.arrow"))) < before + 3:
            assert command.is_running() and time.monotonic() < deadline
            time.sleep(0.05)
        command.send(signal.SIGKILL)
        command.wait()
        assert len(list((tmp_path / "index").glob("*.arrow"))) < 20
    done = Command(tmp_path, "pe_av.embed", *arguments).wait(600)
    assert done.returncode == 0, done.stderr
    found = Index(tmp_path / "index")
    assert found.missing == 0 and found.rows()["id"].to_pylist() == [clip.id for clip in clips]
    assert found.table()["audio_embeds"].null_count == 0
    assert not list((tmp_path / "index").glob("*.tmp"))


@pytest.mark.slow
def test_a_cluster_writes_what_one_process_writes(corpus: Path, tmp_path: Path):
    pytest.importorskip("ray")
    arguments = [f"checkpoint={corpus}/checkpoint", f"source={corpus}/media", "part_rows=2", "batch_size=2"]
    arguments += ["data.num_workers=1", "max_bad_fraction=1", "device=cpu"]
    one = Command(tmp_path, "pe_av.embed", *arguments, f"target={tmp_path}/one").wait()
    assert one.returncode == 0, one.stderr
    many = Command(
        tmp_path, "pe_av.embed_ray", *arguments, f"target={tmp_path}/many", "actors=2", "cpus_per_actor=0.5"
    ).wait(600)
    assert many.returncode == 0, many.stderr
    for number in range(4):
        name = f"part-00000{number}.arrow"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
