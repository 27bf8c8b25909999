"""Several ranks against one process: the same losses and weights, whole or sharded, in parts, stopped and resumed."""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from conftest import random_batch, randomize, small_config
from torch import Tensor

from pe_av.checkpoint import CheckpointError
from pe_av.config import ConfigError, LossConfig, ModelConfig, OptimConfig, ParallelConfig
from pe_av.evaluation.embedder import Embedder
from pe_av.loss import contrastive_loss
from pe_av.model import video
from pe_av.model.pe_audio_video import PEAudioVideo
from pe_av.ranks import process_group, rank, world_size
from pe_av.training.gradient_caching import backward
from pe_av.training.optim import AveragedWeights, build_optimizer, take_step
from pe_av.training.parallel import clip_gradients, parallelize
from pe_av.training.states import StateWriter, damage, load, named_states, newest_whole, read_progress

ROWS = ((24, 6, 3), (9, 5, 4), (15, 7, 3), (11, 4, 2), (20, 6, 5), (8, 3, 1))  # divide over 1, 2 and 3 ranks


def launch(ranks: int, work: Callable[..., None], *arguments: Any) -> None:
    """`work(*arguments)` on so many processes, each with a process group of one thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (ranks, port, work, arguments), nprocs=ranks)


def _rank(index: int, ranks: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(index), "WORLD_SIZE": str(ranks)}
    # so that ranks would have different numbers of pieces, if they cut their frames
    video.VideoEncoder.patches_at_a_time = 1
    with process_group(torch.device("cpu"), timeout_minutes=1):
        work(*arguments)


def config() -> ModelConfig:
    """With dropout nowhere: ranks draw random numbers of their own."""
    return replace(small_config(), logit_scale_init=1.0)


class Trainer:
    """Steps of the real parts: embedder, loss over all ranks, gradients in micro-batches, clipping, Muon and AdamW."""

    def __init__(self, parallel: ParallelConfig, micro_batches: int = 1):
        self.model = randomize(PEAudioVideo(config())).train()
        # the logits go through their real start, or the random ones would be far away
        self.embedder = parallelize(self.model, Embedder(self.model), parallel, torch.device("cpu"))
        self.optimizer = build_optimizer(self.model, OptimConfig(lr=1e-3, muon_lr=3e-3))
        self.average = AveragedWeights(self.model, 0.9)
        self.micro_batches = micro_batches

    def step(self, number: int) -> tuple[float, float]:
        """The loss and the gradient's norm of step `number`, whose batch every number of ranks shares out."""
        batch = random_batch(config(), ROWS, seed=number)
        mine = torch.arange(len(ROWS)).chunk(world_size())[rank()]
        split = mine.chunk(self.micro_batches)
        texts = {name: batch.pop(name) for name in ("input_ids", "attention_mask")}
        parts = [
            {
                "inputs": {name: value[rows] for name, value in batch.items()},
                "texts": {None: {name: value[rows] for name, value in texts.items()}},
                "rows": None,
                "size": len(rows),
            }
            for rows in split
        ]
        logits = {name: (pair.scale, pair.bias) for name, pair in self.model.logits.items()}

        def loss_of(embeds: dict[str, Tensor]) -> tuple[Tensor, float]:
            total = contrastive_loss(embeds, logits, LossConfig().pairings).total
            return total, total.item()

        self.optimizer.zero_grad()
        loss = backward(self.embedder, parts, loss_of, torch.device("cpu"))
        norm = clip_gradients([p for p in self.model.parameters() if p.requires_grad], 1.0)
        take_step(self.optimizer, torch.tensor(0))
        self.average.update(self.model, torch.tensor(0))
        return loss, norm.item()


def train(folder: Path, parallel: ParallelConfig, micro_batches: int, steps: int) -> None:
    trainer = Trainer(parallel, micro_batches)
    history = [trainer.step(number) for number in range(steps)]
    if rank() == 0:
        torch.save(torch.tensor(history), folder / "history.pt")


def course(tmp_path: Path, ranks: int, parallel: ParallelConfig, micro_batches: int = 1, steps: int = 20) -> Tensor:
    """(steps, 2) losses and gradient norms."""
    launch(ranks, train, tmp_path, parallel, micro_batches, steps)
    return torch.load(tmp_path / "history.pt")


@pytest.fixture(scope="module")
def alone() -> Tensor:
    """Twenty steps of one process, without any process group."""
    trainer = Trainer(ParallelConfig())
    return torch.tensor([trainer.step(number) for number in range(20)])


@pytest.mark.parametrize(
    ("ranks", "parallel", "micro_batches"),
    [
        (2, ParallelConfig(strategy="ddp"), 1),
        pytest.param(2, ParallelConfig(strategy="ddp"), 3, marks=pytest.mark.slow),
        pytest.param(2, ParallelConfig(strategy="fsdp"), 1, marks=pytest.mark.slow),
        (2, ParallelConfig(strategy="fsdp", activation_checkpointing=True), 3),
    ],
    ids=["ddp", "ddp in parts", "fsdp", "fsdp in parts, recomputed"],
)
def test_ranks_train_as_one_process(
    tmp_path: Path, alone: Tensor, ranks: int, parallel: ParallelConfig, micro_batches: int
):
    steps = 20 if micro_batches == 1 else 5
    found = course(tmp_path, ranks, parallel, micro_batches, steps)
    torch.testing.assert_close(found, alone[:steps], rtol=1e-4, atol=1e-4)
    assert alone[-1, 0] < 0.9 * alone[0, 0]  # it learns, so that equal is not merely unchanged


def resume(folder: Path, parallel: ParallelConfig, first: int, last: int) -> None:
    """Steps first … last-1, from the checkpoint before them if there is one, and a checkpoint at the end."""
    trainer = Trainer(parallel)
    checkpointer = StateWriter(folder / "state", keep=2)
    if first:
        newest, _ = newest_whole(folder / "state")
        load(newest, trainer.model, trainer.optimizer, trainer.average)
        assert read_progress(newest)["step"] == first
    history = [trainer.step(number) for number in range(first, last)]
    checkpointer.save(last, trainer.model, trainer.optimizer, trainer.average, {"step": last})
    checkpointer.wait()
    if rank() == 0:
        torch.save(torch.tensor(history), folder / f"history-{first}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path, alone: Tensor, strategy: str):
    for ranks, first, last in ((2, 0, 4), (1, 4, 8), (3, 8, 12)):
        launch(ranks, resume, tmp_path, ParallelConfig(strategy=strategy), first, last)
        found = torch.load(tmp_path / f"history-{first}.pt")
        torch.testing.assert_close(found, alone[first:last], rtol=1e-4, atol=1e-4)
    assert [path.name for path in named_states(tmp_path / "state")] == ["step-00000008", "step-00000012"]
    assert not any(damage(path) for path in named_states(tmp_path / "state"))


def test_a_resumed_process_gives_the_same_numbers_to_the_bit(tmp_path: Path):
    resume(tmp_path, ParallelConfig(), 0, 3)
    torch.manual_seed(99)  # the checkpoint brings its own random numbers
    trainer = Trainer(ParallelConfig())
    load(tmp_path / "state" / "step-00000003", trainer.model, trainer.optimizer, trainer.average)
    resumed = [trainer.step(number) for number in range(3, 6)]
    whole = Trainer(ParallelConfig())
    assert resumed == [whole.step(number) for number in range(6)][3:]
    assert all(torch.equal(value, whole.average.average[name]) for name, value in trainer.average.average.items())


def test_a_state_is_whole_as_soon_as_it_is_written_and_milestones_stay(tmp_path: Path):
    trainer, checkpointer = Trainer(ParallelConfig()), StateWriter(tmp_path, keep=1, milestone_every=2)
    for step in (1, 2, 3, 4, 5):
        checkpointer.save(step, trainer.model, trainer.optimizer, trainer.average, {"step": step})
    # nobody waits for the last one, and it gets its name all the same
    deadline = time.monotonic() + 30
    while not (tmp_path / "step-00000005").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert damage(tmp_path / "step-00000005") is None
    checkpointer.wait()
    assert [path.name for path in named_states(tmp_path)] == ["step-00000002", "step-00000004", "step-00000005"]


def test_a_damaged_checkpoint_is_passed_over_and_refused(tmp_path: Path):
    trainer, checkpointer = Trainer(ParallelConfig()), StateWriter(tmp_path, keep=3)
    for step in (1, 2):
        checkpointer.save(step, trainer.model, trainer.optimizer, trainer.average, {"step": step})
    checkpointer.wait()
    newest = tmp_path / "step-00000002"
    shard = next(newest.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    shard.write_bytes(content)
    assert "is damaged: its checksum" in damage(newest)
    found, passed_over = newest_whole(tmp_path)
    assert found == tmp_path / "step-00000001" and [path for path, _ in passed_over] == [newest]
    shard.unlink()
    assert "is missing" in damage(newest)


def test_what_a_kill_left_half_written_is_no_checkpoint(tmp_path: Path):
    (tmp_path / "step-00000007.part").mkdir()
    (tmp_path / "step-00000007.part" / "__0_0.distcp").write_bytes(b"half")
    assert newest_whole(tmp_path) == (None, [])
    assert StateWriter(tmp_path, keep=1).begin(0) == [] == list(tmp_path.iterdir())


def test_states_after_the_one_that_a_run_goes_on_from_are_set_aside(tmp_path: Path):
    """Damaged, or of a course that is left; else the next state would be older than they, and go first."""
    trainer, checkpointer = Trainer(ParallelConfig()), StateWriter(tmp_path, keep=1, milestone_every=2)
    for step in (2, 4, 6):
        checkpointer.save(step, trainer.model, trainer.optimizer, trainer.average, {"step": step})
    checkpointer.wait()
    (tmp_path / "step-00000006-copy").mkdir()  # a user's, which is nobody else's business
    again = StateWriter(tmp_path, keep=1)
    assert [path.name for path in again.begin(2)] == ["step-00000004.abandoned", "step-00000006.abandoned"]
    again.save(3, trainer.model, trainer.optimizer, trainer.average, {"step": 3})
    again.wait()
    assert newest_whole(tmp_path) == (tmp_path / "step-00000003", [])
    assert (tmp_path / "step-00000006-copy").exists() and (tmp_path / "step-00000006.abandoned").exists()
    for content in (b"{", b"\xff", b"[1]"):
        (tmp_path / "step-00000003" / "checksums.json").write_bytes(content)
        assert damage(tmp_path / "step-00000003") == "checksums.json is damaged"


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    trainer, checkpointer = Trainer(ParallelConfig()), StateWriter(tmp_path, keep=1)
    checkpointer.save(1, trainer.model, trainer.optimizer, trainer.average, {})
    checkpointer.wait()
    other = PEAudioVideo(replace(config(), output_dim=30))
    with pytest.raises(
        CheckpointError, match=r"of another model: model of heads\.\S+ is \(30, \d+\) here and \(28, \d+\) there"
    ):
        load(tmp_path / "step-00000001", other, build_optimizer(other, OptimConfig()), None)


def test_an_incomplete_environment_costs_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="RANK, MASTER_ADDR, MASTER_PORT not set: start with torchrun"):
        with process_group(torch.device("cpu"), timeout_minutes=1):
            pass


def test_compilation_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    model = PEAudioVideo(config())
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler"):
        parallelize(model, Embedder(model), ParallelConfig(compile=True), torch.device("cpu"))
