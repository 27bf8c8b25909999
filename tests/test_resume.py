"""Runs that are stopped, killed, resumed, fed with nonsense, or spread over ranks, through the command line."""

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from processes import ROOT, Command
from safetensors.torch import load_file

import pe_av.training.contrastive
from pe_av import load_model
from pe_av.checkpoint import CheckpointError
from pe_av.config import ConfigError, TrainConfig
from pe_av.config.compose import config_dir, from_dict
from pe_av.device import precision_context
from pe_av.loss import LossOutput, contrastive_loss
from pe_av.training.contrastive import Contrastive
from pe_av.training.skipped import MOST_SKIPPED
from pe_av.training.states import damage, newest_whole
from pe_av.training.stopping import Stopped, locked
from pe_av.training.trainer import Trainer

# a codec of a quarter of the width takes a tenth of the time
SMALL = ["data.demo.train_clips=24", "data.demo.eval_clips=4", "batch_size=8", "data.num_workers=0", "log_every=1"]
SMALL += ["model.audio.codec.encoder_hidden_size=2"]
EIGHT_STEPS = ["steps=8", "eval_every=4", "save_every=2", "optim.ema=0.5"]
# ranks and compiled blocks draw other random numbers, so they are compared without
NO_DROPOUT = [f"model.{part}.attention_dropout=0" for part in ("audio.transformer", "video.transformer", "fusion")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*SMALL, f"data.demo.root={tmp_path_factory.mktemp('demo')}"]


def start(folder: Path, *overrides: str) -> Command:
    return Command(folder.parent, "train.py", *overrides, f"hydra.run.dir={folder}")


def finish(folder: Path, *overrides: str) -> None:
    done = start(folder, *overrides).wait()
    assert done.returncode == 0, done.stderr


def torchrun(folder: Path, *overrides: str, restarts: int = 0) -> subprocess.Popen[str]:
    """Two ranks from the command line that the README gives."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}"]
    command = [sys.executable, *launcher, "train.py", *overrides, f"hydra.run.dir={folder}"]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=threads, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def losses(folder: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in rows]


@pytest.fixture(scope="module")
def whole(world: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps without interruption: more than two epochs of 24 clips in batches of eight."""
    folder = tmp_path_factory.mktemp("whole")
    finish(folder, *world, *EIGHT_STEPS)
    return folder


def killed_and_resumed(folder: Path, world: list[str], wait: random.Random) -> None:
    """kill -9 once a step after the first was logged, at a random moment, also while a checkpoint is written."""
    process = start(folder, *world, *EIGHT_STEPS)
    history = folder / "history.jsonl"
    steps = wait.randint(1, 6)
    while process.is_running() and not (history.exists() and len(history.read_text().splitlines()) >= steps):
        time.sleep(0.01)
    time.sleep(wait.uniform(0, 0.6))
    process.send(signal.SIGKILL)
    process.wait()
    finish(folder, *world, *EIGHT_STEPS, "resume=auto")


@pytest.mark.parametrize("trial", [pytest.param(n, marks=[pytest.mark.slow] * (n != 5)) for n in range(20)])
def test_a_killed_run_goes_on_to_the_bit(tmp_path: Path, world: list[str], whole: Path, trial: int):
    killed_and_resumed(tmp_path, world, random.Random(trial))
    assert losses(tmp_path) == losses(whole)
    ours, theirs = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (tmp_path, whole))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    ("sent", "code"),
    [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGINT, 130), (signal.SIGUSR1, 138)],
)
def test_a_signal_saves_and_leaves_with_its_code(tmp_path: Path, world: list[str], sent: signal.Signals, code: int):
    process = start(tmp_path / "run", *world, "steps=100000", "eval_every=100000")
    while process.is_running() and not (tmp_path / "run" / "history.jsonl").exists():
        time.sleep(0.05)
    process.send(sent)
    errors = process.wait().stderr
    assert process.returncode == code
    assert f"stopped by {sent.name}; go on with hydra.run.dir={tmp_path}/run resume=auto" in errors
    assert "Traceback" not in errors
    saved = losses(tmp_path / "run")[-1][0]
    assert damage(tmp_path / "run" / "state" / f"step-{saved:08d}") is None
    # a scheduler's time is for the state alone
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").is_file() == (sent == signal.SIGINT)


def test_a_run_leaves_when_its_time_is_up(tmp_path: Path, world: list[str]):
    process = start(tmp_path / "run", *world, "steps=100000", "eval_every=100000", "max_minutes=0.01")
    errors = process.wait().stderr
    assert process.returncode == 124 and "stopped by max_minutes; go on with" in errors and "Traceback" not in errors
    assert damage(tmp_path / "run" / "state" / f"step-{losses(tmp_path / 'run')[-1][0]:08d}") is None


@pytest.mark.slow
def test_two_ranks_log_what_one_does(tmp_path: Path, world: list[str]):
    """Sharded and in micro-batches."""
    finish(tmp_path / "one", *world, *NO_DROPOUT, "steps=2")
    options = [*NO_DROPOUT, "steps=2", "parallel.strategy=fsdp", "micro_batch_size=2"]
    process = torchrun(tmp_path / "two", *world, *options)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    one, two = (torch.tensor([row[1:] for row in losses(tmp_path / name)]) for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["text->audio"]["gallery"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_torchrun_goes_on_when_a_rank_is_lost(tmp_path: Path, world: list[str], sent: signal.Signals):
    """Killed, or hanging for longer than the timeout: the other rank says so in one line, and all start again."""
    options = [*NO_DROPOUT, "steps=8", "save_every=2"]
    finish(tmp_path / "one", *world, *options)
    folder, options = tmp_path / "two", [*options, "resume=auto", "parallel.timeout_minutes=0.2"]
    process = torchrun(folder, *world, *options, restarts=1)
    while process.poll() is None and not any((folder / "state").glob("step-*[02468]")):
        time.sleep(0.01)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(next(int(child) for child in ranks if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes()), sent)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "error: rank 0 lost another one, which ended or hangs" in errors and "resumed at step" in errors, errors
    interrupted, uninterrupted = (torch.tensor(losses(path)) for path in (folder, tmp_path / "one"))
    torch.testing.assert_close(interrupted, uninterrupted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["resume=nowhere"], "nowhere: no checksums.json there, so this is no state of a run"),
        (["best=R@2"], "best=R@2 is no figure of the evaluation; did you mean R@1?"),
        (["parallel.shard_bf16=true", "precision=fp32"], "parallel.shard_bf16 gathers weights in bfloat16 and needs"),
        (["parallel.strategy=tensor"], "parallel.strategy=tensor is unknown"),
        (["optim.freeze=[vidio]"], "optim.freeze: the model has no part vidio"),
        (["wandb_project=x"], "wandb_project=x needs Weights & Biases: pip install wandb"),
    ],
)
def test_a_mistake_costs_one_line(tmp_path: Path, world: list[str], overrides: list[str], message: str):
    done = start(tmp_path / "run", *world, *overrides).wait()
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process; they would take as long as the steps, and the commands draw them."""
    monkeypatch.setattr("pe_av.training.contrastive.plot_similarity", lambda *_: None)
    monkeypatch.setattr("pe_av.training.evaluating.plot_losses", lambda *_: None)


def run(folder: Path, overrides: list[str]) -> Trainer:
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed = compose("train", overrides=overrides)
    config = from_dict(TrainConfig, OmegaConf.to_container(composed), source="test")
    return Trainer(config, folder, torch.device("cpu"), Contrastive)


def test_half_precision_is_refused_where_a_gpu_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(ConfigError, match="precision=bf16: this GPU does not compute in bfloat16; use precision=fp32"):
        precision_context("bf16", torch.device("cuda"))


def broken(monkeypatch: pytest.MonkeyPatch, at: set[int]) -> None:
    """The loss of these calls, counted from 1, is NaN, and so are its gradients."""
    calls = 0

    def loss(*arguments: object) -> LossOutput:
        nonlocal calls
        calls += 1
        out = contrastive_loss(*arguments)
        nan = LossOutput(out.total * float("nan"), out.losses)
        return nan if calls in at and out.total.requires_grad else out

    monkeypatch.setattr(pe_av.training.contrastive, "contrastive_loss", loss)


def test_a_step_that_is_not_finite_is_skipped_and_named(tmp_path: Path, world: list[str], monkeypatch):
    broken(monkeypatch, {3})
    training = run(tmp_path, [*world, "steps=5", "eval_every=5"])
    training.train()
    (skipped,) = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert (
        skipped["step"] == 2 and len(skipped["ids"]) == 8 and all(name.startswith("train-") for name in skipped["ids"])
    )
    assert all(parameter.isfinite().all() for parameter in training.model.parameters())


def test_ten_such_steps_end_the_run_and_harm_nothing(tmp_path: Path, world: list[str], monkeypatch):
    broken(monkeypatch, set(range(4, 100)))
    training = run(tmp_path, [*world, "steps=50", "eval_every=2", "save_every=2"])
    with pytest.raises(ConfigError, match=f"{MOST_SKIPPED} steps in a row had no finite loss"):
        training.train()
    weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == MOST_SKIPPED


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss=ten"],
        ["lora.rank=2"],
        pytest.param(["accumulate=2"], marks=pytest.mark.slow),
        pytest.param(["optim.freeze=[text,video.vision]"], marks=pytest.mark.slow),
        ["optim.freeze=[text,heads.text_audio,heads.text_video,heads.text_audio_video]", "micro_batch_size=3"],
        ["loss.pairings=[{name:audio_text,left:audio,right:text_audio}]", "optim.ema=0.5"],
    ],
    ids=["ten pairings", "adapters", "accumulation", "frozen towers", "frozen sides", "without video"],
)
def test_recipes_run_can_be_loaded_and_go_on(tmp_path: Path, world: list[str], overrides: list[str]):
    metrics = run(tmp_path, [*world, "steps=2", *overrides]).train()
    assert metrics["text->audio"]["gallery"] == 4 and metrics["loss"]["total"] > 0
    assert not any(".adapter." in name for name in load_model(tmp_path / "checkpoint").state_dict())
    run(tmp_path, [*world, "steps=3", *overrides, "resume=auto"]).train()
    assert [row[0] for row in losses(tmp_path)] == [1, 2, 3]


def test_a_disk_without_room_is_seen_before_training(tmp_path: Path, world: list[str], whole: Path, monkeypatch):
    """The room is what a run in fact writes: one state more than it keeps, the model, the best one, and a new one."""
    folders = [*(whole / "state").iterdir(), whole / "checkpoint"]
    *states, model = [sum(file.stat().st_size for file in folder.iterdir()) for folder in folders]
    written = sum(states) + states[0] + 3 * model
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0.95 * written))
    with pytest.raises(CheckpointError, match="the disk has 0.1 GB left and the checkpoints need 0.1: make room"):
        run(tmp_path / "no", [*world, "optim.ema=0.5"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1.05 * written))
    run(tmp_path / "yes", [*world, "optim.ema=0.5"])


def test_a_disk_that_fills_up_costs_one_line_and_no_older_state(tmp_path: Path, world: list[str]):
    """A limit on the size of files stands for the full disk: between that of the model and that of its state."""
    run(tmp_path, [*world, "steps=2"]).train()
    training = run(tmp_path, [*world, "steps=4", "resume=auto"])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="step-00000004.part: cannot be written, with .* GB left on the disk"):
            training.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert newest_whole(tmp_path / "state") == (tmp_path / "state" / "step-00000002", [])


@pytest.mark.slow
def test_compiled_blocks_learn_the_same_and_are_counted_too(tmp_path: Path, world: list[str]):
    eager = run(tmp_path / "eager", [*world, *NO_DROPOUT, "steps=3"])
    eager.train()
    compiled = run(tmp_path / "compiled", [*world, *NO_DROPOUT, "steps=3", "parallel.compile=true"])
    compiled.train()
    found, expected = (torch.tensor(losses(tmp_path / name)) for name in ("compiled", "eager"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert compiled.learner.clip_flops == eager.learner.clip_flops > 0


@pytest.mark.parametrize("recipe", ["all", "locked", "heads", "lora"])
def test_fine_tuning_moves_what_its_recipe_says(tmp_path: Path, world: list[str], whole: Path, recipe: str):
    """And watches other clips, here the same ones, from before the first step on."""
    watched = next(Path(world[-1].partition("=")[2]).glob("*/eval.jsonl"))
    start = [f"checkpoint={whole}/checkpoint", f"finetune={recipe}", f"watch={watched}"]
    run(tmp_path, [*world, *start, "steps=2"]).train()
    before, after = (load_model(folder / "checkpoint").state_dict() for folder in (whole, tmp_path))
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    parts = {
        "text.layers.0",
        "audio.transformer.layers.0",
        "video.vision.layers.0",
        "fusion.transformer.layers.0",
        "heads",
    }
    expected = {"all": parts, "lora": parts, "heads": {"heads"}}.get(
        recipe, parts - {"text.layers.0", "video.vision.layers.0"}
    )
    assert {part for part in parts if any(name.startswith(f"{part}.") for name in moved)} == expected
    assert not any(name.startswith("audio.codec.") for name in moved)
    evaluations = json.loads((tmp_path / "watch.json").read_text())["evaluations"]
    assert [row["step"] for row in evaluations] == [0, 2]
    assert set(evaluations[0]["R@1"]) == set(evaluations[1]["R@1"]) and len(evaluations[0]["R@1"]) == 12


def test_biases_start_where_other_pairs_are_as_rare_as_in_a_batch(tmp_path: Path, world: list[str]):
    training = run(tmp_path, [*world, "steps=1", "loss.start_bias=true"])
    batch = next(iter(training.task.eval_loader))
    with torch.no_grad():
        out = training.model.eval()(**batch["inputs"], **batch["texts"][None])
    for name in training.model.logits:
        logits = getattr(out, f"logits_{name}")
        apart = logits[~torch.eye(len(logits), dtype=torch.bool)].mean().item()
        assert apart == pytest.approx(-math.log(8 - 1), abs=1e-4), name
    training.task.close()


def test_an_evaluation_that_a_stop_left_out_is_made_when_the_run_goes_on(tmp_path: Path, world: list[str], monkeypatch):
    """Here in the last step. The run keeps its tokenizer, and may begin to watch other clips."""
    stopped = run(tmp_path, [*world, "steps=1"])
    stopped.requests.signal = signal.SIGTERM
    with pytest.raises(Stopped):
        stopped.train()
    assert not (tmp_path / "metrics.json").exists()
    monkeypatch.setattr("pe_av.training.setup.train_tokenizer", None)
    watched = next(Path(world[-1].partition("=")[2]).glob("*/eval.jsonl"))
    metrics = run(tmp_path, [*world, "steps=1", "resume=auto", f"watch={watched}"]).train()
    assert metrics["text->audio"]["gallery"] == 4 and (tmp_path / "best" / "metrics.json").is_file()
    assert [row["step"] for row in json.loads((tmp_path / "watch.json").read_text())["evaluations"]] == [1]
    assert run(tmp_path, [*world, "steps=1", "resume=auto"]).train() == {}  # there is nothing left to do


def test_held_out_clips_that_cannot_be_used_cost_no_step(tmp_path: Path, world: list[str], monkeypatch):
    training = run(tmp_path, [*world, "steps=2"])

    def fail(*_: object) -> None:
        raise ConfigError("all held-out clips are damaged")

    monkeypatch.setattr(training.task, "evaluate", fail)
    with pytest.raises(ConfigError, match="all held-out clips are damaged"):
        training.train()
    assert newest_whole(tmp_path / "state") == (tmp_path / "state" / "step-00000002", [])
    metrics = run(tmp_path, [*world, "steps=2", "resume=auto"]).train()
    assert metrics["text->audio"]["gallery"] == 4 and [row[0] for row in losses(tmp_path)] == [1, 2]


def test_two_runs_do_not_share_a_folder(tmp_path: Path, world: list[str]):
    first, second = (run(tmp_path, [*world, "steps=1"]) for _ in range(2))
    with locked(first.folder), pytest.raises(ConfigError, match="another process trains there"):
        second.train()
    second.train()


def test_settings_that_a_state_fixes_are_refused_and_others_hold_from_there_on(tmp_path: Path, world: list[str]):
    run(tmp_path, [*world, "steps=2", "optim.ema=0.5"]).train()
    for changed, told in (
        (["batch_size=6", "seed=1", "optim.ema=null"], "batch_size was 8, now 6; seed was 0, now 1; optim.ema was 0.5"),
        (["model.audio.transformer.attention_dropout=0.5"], "attention_dropout was 0.1, now 0.5"),
        (["optim.freeze=[text]"], r"optim.freeze was \[\], now \['text'\]"),
        (["optim.muon_lr=null"], "optim.muon_lr was 0.03, now None"),
    ):
        with pytest.raises(ConfigError, match=f"cannot go on with other settings of what it fixes: .*{told}"):
            run(tmp_path, [*world, "steps=4", "optim.ema=0.5", "resume=auto", *changed])
    options = [
        "optim.ema=0.9",
        "optim.lr=1e-4",
        "optim.muon_lr=0.01",
        "optim.weight_decay=0.5",
        "optim.warmup_steps=0",
        "log_every=2",
    ]
    going_on = run(tmp_path, [*world, "steps=4", "resume=auto", *options])
    going_on.train()
    row = json.loads((tmp_path / "history.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 4 and row["lr"] == pytest.approx(1e-4 * (1 + math.cos(math.pi * 3 / 4)) / 2)
    assert {group["weight_decay"] for group in going_on.learner.optimizer.param_groups} == {0.0, 0.5}
    assert "lr: 0.0001" in (tmp_path / "config.yaml").read_text()


def test_the_average_begins_with_the_biases_that_the_data_gave(tmp_path: Path, world: list[str]):
    training = run(tmp_path, [*world, "steps=1", "loss.start_bias=true", "optim.ema=0.999999", "optim.lr=1e-9"])
    started = {name: pair.bias.item() for name, pair in training.model.logits.items()}
    training.train()
    exported = load_model(tmp_path / "checkpoint").logits
    assert {name: exported[name].bias.item() for name in started} == pytest.approx(started, abs=1e-5)
