"""Training and evaluation as a user starts them: on a small demo world, through the command lines."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from processes import Command
from torch import Tensor

from pe_av.config import ConfigError, Pairing, TrainConfig
from pe_av.config.compose import config_dir, from_dict
from pe_av.data.manifest import read_manifest
from pe_av.loading.bad_items import BadItems
from pe_av.loss import LossOutput
from pe_av.media.tokenizer import train_tokenizer

SMALL = [
    "data.demo.train_clips=24",
    "data.demo.eval_clips=8",
    "batch_size=8",
    "eval_batch_size=3",
    "data.num_workers=0",
    "model.audio.codec.encoder_hidden_size=2",  # a quarter of the width, and a tenth of the time
]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Command]:
    return lambda script, *overrides: Command(tmp_path, script, *overrides).wait()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a three-step run on 24 clips; the demo world lies beside it."""
    folder = tmp_path_factory.mktemp("run")
    overrides = [*SMALL, "steps=3", f"data.demo.root={folder.parent}/demo", f"hydra.run.dir={folder}"]
    done = Command(folder.parent, "train.py", *overrides).wait()
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_leaves_everything_that_is_promised(trained: Path):
    assert {path.name for path in trained.iterdir()} == {
        "best", "checkpoint", "config.yaml", "history.jsonl", "loss.png", "metrics.json", "similarity.png", "state",
        "tensorboard",
    }  # fmt: skip
    assert {path.name for path in (trained / "checkpoint").iterdir()} == {
        "config.yaml", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    metrics = json.loads((trained / "metrics.json").read_text())
    directions = [
        "text->audio", "audio->text", "text->video", "video->text", "audio->video", "video->audio",
        "text->audio_video", "audio_video->text", "audio+text->video", "video->audio+text", "video+text->audio",
        "audio->video+text",
    ]  # fmt: skip
    for direction in directions:
        figures = {"R@1", "R@5", "R@10", "chance", "MedR", "MeanR", "MRR", "mAP@10", "queries", "gallery"}
        assert set(metrics[direction]) == figures
        assert metrics[direction]["queries"] == metrics[direction]["gallery"] == 8


def test_a_run_can_be_repeated_from_the_config_that_it_wrote(trained: Path):
    written = yaml.safe_load((trained / "config.yaml").read_text())
    config = from_dict(TrainConfig, written, source="config.yaml")
    assert config.steps == 3 and config.data.demo.train_clips == 24 and config.model.text.hidden_size == 128


def test_evaluation_of_the_checkpoint_gives_the_figures_of_the_run(trained: Path, tmp_path: Path, run):
    world = [f"data.demo.root={trained.parent}/demo", *SMALL[:2], "data.num_workers=0"]
    done = run("eval.py", f"checkpoint={trained}/checkpoint", *world, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, trained))
    # one decodes into memory and encodes clip by clip, the other reads batches of ragged waveforms
    directions = {name: row for name, row in theirs.items() if "->" in name}
    intervals = {name: ours[name].pop("ci95") for name in directions}
    assert {name: row for name, row in ours.items() if "->" in name} == directions
    for name, row in directions.items():
        assert all(low <= row[figure] <= high for figure, (low, high) in intervals[name].items())
    assert ours["reweighted"].keys() == directions.keys() and "R@1 rw" in done.stdout
    weights = (trained / "checkpoint" / "model.safetensors").read_bytes()
    assert ours["setting"]["checkpoint_sha256"] == hashlib.sha256(weights).hexdigest()
    assert ours["setting"]["cut_clips"] == theirs["setting"]["cut_clips"] == 0
    assert "text->audio" in done.stdout and "chance" in done.stdout
    assert (
        "<h2" in (tmp_path / "report.html").read_text() and "| text → audio |" in (tmp_path / "report.md").read_text()
    )


def test_checkpoints_are_compared_on_several_data_sets(trained: Path, tmp_path: Path, run):
    """`checkpoint=[…] data=[…]`: one table. Here the two checkpoints are the same model, and so are the data sets."""
    checkpoints = f"checkpoint=[{trained}/checkpoint,{trained}/best]"
    world = [f"data.demo.root={trained.parent}/demo", *SMALL[:2], "data.num_workers=0"]
    quick = ["report=false", "reweighted=false"]
    done = run("eval.py", checkpoints, "data=[demo,demo]", *world, *quick, f"hydra.sweep.dir={tmp_path}/all")
    assert done.returncode == 0, done.stderr
    expected = json.loads((trained / "metrics.json").read_text())
    both = json.loads((tmp_path / "all" / "comparison.json").read_text())["comparisons"]
    assert len(both) == 2
    for comparison in both:
        assert comparison["checkpoints"] == {name: f"{trained}/{name}" for name in ("checkpoint", "best")}
        for direction, row in comparison["directions"].items():
            assert row["R@1"] == dict.fromkeys(("checkpoint", "best"), expected[direction]["R@1"])
            assert row["difference"] == {"best": {"R@1": 0.0, "ci95": [0.0, 0.0]}}
    assert "A: checkpoint" in done.stdout and "B: best" in done.stdout
    assert len((tmp_path / "all" / "comparison.md").read_text().splitlines()) == 2 + 2 * 12 + 2
    alone = json.loads((tmp_path / "all" / "1" / "best" / "metrics.json").read_text())
    assert alone["text->audio"]["R@1"] == expected["text->audio"]["R@1"]


@pytest.mark.parametrize(
    ("script", "overrides", "expected"),
    [
        ("train.py", ["optim.lrr=1"], "unknown setting optim.lrr; did you mean optim.lr?"),
        ("train.py", ["model=tinny"], "model=tinny is unknown; did you mean tiny?"),
        ("train.py", ["steps=many"], "command line: steps: Value 'many'"),
        ("train.py", ["batch_size=1"], "batch_size=1: a contrastive loss needs at least 2"),
        ("train.py", ["data=manifest"], "data.train is not set"),
        ("train.py", ["data=manifest", "data.train=nowhere.jsonl", "data.eval=x"], "nowhere.jsonl: no such manifest"),
        ("train.py", ["device=warp"], "device=warp cannot be used here"),
        ("train.py", ["loss.weights.audio_text=-1"], "loss.weights.audio_text=-1"),
        ("eval.py", [], "checkpoint"),
        ("eval.py", ["checkpoint=nowhere"], "nowhere: no such folder; give that of a checkpoint"),
        ("eval.py", ["checkpoint=[nowhere,else]"], "nowhere: no checkpoint there; give its folder"),
    ],
)
def test_a_mistake_on_the_command_line_costs_one_line(
    script: str, overrides: list[str], expected: str, tmp_path: Path, run
):
    done = run(script, *overrides, f"hydra.run.dir={tmp_path}")
    assert done.returncode != 0
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_unreadable_clips_are_listed_and_skipped(trained: Path, tmp_path: Path, run):
    demo = trained.parent / "demo" / next(os.walk(trained.parent / "demo"))[1][0]
    clips = [json.loads(line) for line in (demo / "train.jsonl").read_text().splitlines()]
    lines = [{"id": clip["id"], "path": str(demo / clip["path"]), "caption": clip["caption"]} for clip in clips]
    (tmp_path / "broken.mp4").write_bytes(b"not media")
    lines[5]["path"], lines[7]["caption"] = "broken.mp4", "  "
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[10:18]))
    data = [f"data.{part}={tmp_path}/{part}.jsonl" for part in ("train", "eval")]
    common = ["data=manifest", *data, "batch_size=8", "data.num_workers=1", "steps=4", SMALL[-1]]

    done = run("train.py", *common, "max_bad_fraction=0.1", f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    bad = [json.loads(line) for line in (tmp_path / "run" / "bad_items.jsonl").read_text().splitlines()]
    assert [item["id"] for item in bad] == [lines[5]["id"]] and "broken.mp4" in bad[0]["error"]
    partial = [json.loads(line) for line in (tmp_path / "run" / "partial_items.jsonl").read_text().splitlines()]
    assert [item["id"] for item in partial] == [lines[7]["id"]] and "empty" in partial[0]["error"]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["bad_items"] == metrics["partial_items"] == 1

    done = run("train.py", *common, "max_bad_fraction=0.02", f"hydra.run.dir={tmp_path}/strict")
    assert done.returncode != 0 and "max_bad_fraction=0.02" in done.stderr and "Traceback" not in done.stderr


def test_pairings_that_no_clips_allow_cost_one_line(trained: Path, tmp_path: Path, run):
    demo = trained.parent / "demo" / next(os.walk(trained.parent / "demo"))[1][0]
    clips = [json.loads(line) for line in (demo / "train.jsonl").read_text().splitlines()]
    lines = [{"audio": str(demo / clip["path"]), "caption": clip["caption"]} for clip in clips]
    (tmp_path / "sound.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = ["data=manifest", *(f"data.{part}={tmp_path}/sound.jsonl" for part in ("train", "eval"))]
    done = run("train.py", *data, "loss.pairings=[{name:video_text,left:video,right:text_video}]")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "none of video_text can be trained: the clips have audio and captions" in done.stderr


def test_bad_items_are_counted_once_each(tmp_path: Path):
    bad = BadItems(tmp_path, total=20, max_fraction=0.05)
    for _ in range(3):
        bad.add(5, [{"id": "a", "error": "torn"}], [{"id": str(i), "error": "no audio track"} for i in range(9)])
    with pytest.raises(ConfigError, match="2 of 20 items read are damaged, more than max_bad_fraction=0.05"):
        bad.add(5, [{"id": "b", "error": "torn"}])
    assert len((tmp_path / "bad_items.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "partial_items.jsonl").read_text().splitlines()) == 9
    state = bad.state_dict()
    assert state == {"seen": 20, "bad": 2, "partial": 9, "cut": 0}
    with (tmp_path / "bad_items.jsonl").open("a") as file:
        file.write('{"id": "c", "er')  # torn, and of after the state
    again = BadItems(tmp_path, total=20, max_fraction=0.5, state=state)
    again.add(0, [{"id": "d", "error": "torn"}])
    again = BadItems(tmp_path, total=20, max_fraction=0.5, state=again.state_dict())
    assert list(again.reasons["bad"]) == ["a", "b", "d"] and again.seen == 20
    # what a run without a state finds there is of another one
    assert BadItems(tmp_path, total=20, max_fraction=0.5).reasons == {"bad": {}, "partial": {}, "cut": {}}
    assert not (tmp_path / "bad_items.jsonl").exists()


def test_the_limit_is_on_what_was_read_and_not_on_what_there_is(tmp_path: Path):
    bad = BadItems(tmp_path, total=1_000_000, max_fraction=0.05)
    bad.add(200, [{"id": f"{i}", "error": "torn"} for i in range(10)])
    bad.add(200, [{"id": f"{i}", "error": "torn"} for i in range(10, 20)])
    with pytest.raises(ConfigError, match="21 of 400 items read"):
        bad.add(0, [{"id": "20", "error": "torn"}])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no clips"),
        ("{", ":1: not JSON"),
        ('{"audio": "a.wav"}', ":1: nothing to pair"),
        ('{"caption": "x"}', ":1: nothing to pair"),
        ("[1]", ":1: not an object"),
        ('{"path": 3, "caption": "x"}', ':1: no text under "path"'),
        ('{"path": "a", "caption": [1]}', ':1: no text under "caption"'),
        ('{"path": "a", "caption": "x", "start": 3, "end": 2}', ":1: end=2 is not after start=3"),
        ('{"path": "a", "caption": "x"}\n{"path": "a", "caption": "y"}', "1 repeated ids"),
    ],
)
def test_a_manifest_that_is_none_is_refused(text: str, message: str, tmp_path: Path):
    (tmp_path / "clips.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_manifest(tmp_path / "clips.jsonl")


def test_the_tokenizer_writes_any_text_and_marks_its_ends():
    tokenizer = train_tokenizer(["a small red ball", "a large blue box"] * 10, vocab_size=300)
    encoded = tokenizer.encode("ein großer Ball 球")
    assert encoded.tokens[0] == "[CLS]" and encoded.tokens[-1] == "[SEP]"
    assert tokenizer.decode(encoded.ids).strip() == "ein großer Ball 球"
    assert tokenizer.get_vocab_size() <= 300
    with pytest.raises(ValueError, match="vocab_size=100"):
        train_tokenizer(["x"], vocab_size=100)


# ---------------------------------------------------------------------------------------------------------------------
# the demo run at its real size: minutes each


def demo_run(folder: Path, *overrides: str) -> dict[str, dict[str, float]]:
    from pe_av.training.contrastive import Contrastive
    from pe_av.training.trainer import Trainer

    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed = compose("train", overrides=list(overrides))
    config = from_dict(TrainConfig, OmegaConf.to_container(composed), source="test")
    return Trainer(config, folder, torch.device("cpu"), Contrastive).train()


@pytest.mark.slow
def test_the_demo_reaches_what_the_readme_says(tmp_path: Path):
    metrics = demo_run(tmp_path)
    for direction, least in {"text->video": 50, "video->text": 50, "text->audio": 40, "audio->video": 25}.items():
        assert metrics[direction]["R@1"] >= least, direction


@pytest.mark.slow
def test_the_published_loss_learns_next_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With labels eye(N) every pair is pulled together and none apart, so all embeddings become alike."""

    def published(embeds: dict[str, Tensor], logits: dict, pairings: list[Pairing], *_: object) -> LossOutput:
        losses = {}
        for pairing in pairings:
            scale, bias = logits[pairing.logits]
            values = scale * embeds[pairing.left] @ embeds[pairing.right].T + bias
            losses[pairing.name] = -F.logsigmoid(torch.eye(len(values)) * values).sum() / len(values)
        total = sum(pairing.weight * losses[pairing.name] for pairing in pairings)
        return LossOutput(total, {name: loss.detach() for name, loss in losses.items()})

    monkeypatch.setattr("pe_av.training.contrastive.contrastive_loss", published)
    metrics = demo_run(tmp_path)
    for direction, row in metrics.items():
        assert direction == "loss" or row["R@1"] < 4, direction  # ten times chance; ours is above a hundred times
