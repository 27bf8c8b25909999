"""The order of the data: what is in every batch, and that it goes on after a kill as if nothing had happened."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pe_av.config import ConfigError
from pe_av.data.loader import WINDOW, BatchSampler, Loader, read_all
from pe_av.data.manifest import Clip

ROOT = Path(__file__).parent.parent


def epoch(sampler: BatchSampler, number: int = 0) -> list[list[int]]:
    return [batch.tolist() for batch in sampler.epoch(number)]


# ---------------------------------------------------------------------------------------------------------------------
# what makes up a batch


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("how", ["plain", "lengths", "tokens"])
def test_ranks_share_an_epoch_without_duplicates_or_loss(world, how):
    lengths = None if how == "plain" else np.random.default_rng(1).uniform(1, 30, 20_000)
    tokens = 3000 if how == "tokens" else None
    for number in range(2):
        seen, batches = [], []
        for rank in range(world):
            options = dict(lengths=lengths, max_tokens=tokens, rank=rank, world=world)
            batches.append(epoch(BatchSampler(20_000, 12, shuffle=True, seed=7, **options), number))
            seen += [clip for batch in batches[-1] for clip in batch]
        assert max(Counter(seen).values()) == 1
        assert 20_000 - len(seen) < 12 * world
        # every rank has the same number of rows in every step
        for step in zip(*batches, strict=True):
            assert len({len(batch) for batch in step}) == 1
        whole = [sorted(sum(step, [])) for step in zip(*batches, strict=True)]
        if how != "tokens":
            assert {len(batch) for batch in whole} == {12 * world}
            if world > 1 and 12 % world == 0:  # one process with the whole batch sees the same ones
                alone = BatchSampler(20_000, 12 * world, shuffle=True, seed=7, lengths=lengths)
                assert [sorted(batch) for batch in epoch(alone, number)] == whole


def test_epochs_and_seeds_differ_and_repeat():
    first = epoch(BatchSampler(100, 10, shuffle=True, seed=0), 0)
    assert first == epoch(BatchSampler(100, 10, shuffle=True, seed=0), 0)
    assert first != epoch(BatchSampler(100, 10, shuffle=True, seed=0), 1)
    assert first != epoch(BatchSampler(100, 10, shuffle=True, seed=1), 0)


def test_what_does_not_fill_a_batch_is_different_every_epoch_and_not_the_longest():
    sampler = BatchSampler(1005, 10, shuffle=True, lengths=np.arange(1005) / 50)
    left = [set(range(1005)) - {c for batch in epoch(sampler, e) for c in batch} for e in range(40)]
    assert {len(some) for some in left} == {5}
    assert 300 < np.mean([clip for some in left for clip in some]) < 700


def test_without_shuffling_everything_comes_once_in_order():
    for world in (1, 2, 3):
        batches = [epoch(BatchSampler(17, 4, rank=rank, world=world)) for rank in range(world)]
        assert sorted(clip for rank in batches for batch in rank for clip in batch) == list(range(17))
        assert len({len(rank) for rank in batches}) == 1
    assert sum(epoch(BatchSampler(17, 4)), []) == list(range(17))


def waste(lengths: np.ndarray, batches: list[list[int]]) -> float:
    """The part of all positions that is padding."""
    tokens = np.ceil(25 * lengths)
    padded = sum(len(batch) * tokens[batch].max() for batch in batches)
    return 1 - sum(tokens[batch].sum() for batch in batches) / padded


def test_batches_of_like_length_waste_little():
    lengths = np.random.default_rng(0).uniform(1, 30, 10_000)
    assert waste(lengths, epoch(BatchSampler(10_000, 32, shuffle=True))) > 0.4
    assert waste(lengths, epoch(BatchSampler(10_000, 32, shuffle=True, lengths=lengths))) < 0.05
    assert waste(lengths, epoch(BatchSampler(10_000, 32, shuffle=True, lengths=lengths, max_tokens=8000))) < 0.05


def test_a_token_budget_is_kept_and_used():
    lengths = np.random.default_rng(0).uniform(1, 30, 5000)
    sampler = BatchSampler(5000, 32, shuffle=True, lengths=lengths, max_tokens=4000)
    taken = [len(batch) * np.ceil(25 * lengths[batch]).max() for batch in epoch(sampler)]
    assert max(taken) <= 4000 and np.mean(taken) > 3500
    with pytest.raises(ConfigError, match="needs the length of every clip: python -m pe_av.data.manifest"):
        BatchSampler(5, 2, max_tokens=100)
    with pytest.raises(ConfigError, match="do not hold two of the longest clips: give at least 1500"):
        BatchSampler(2, 2, shuffle=True, lengths=np.array([1.0, 30.0]), max_tokens=1000)


def test_a_batch_pairs_the_same_things():
    parts = np.random.default_rng(0).choice([7, 5, 3], 10_000, p=[0.8, 0.15, 0.05])  # all, sound + text, picture + text
    batches = epoch(BatchSampler(10_000, 16, shuffle=True, parts=parts))
    mixed = sum(len(set(parts[batch])) > 1 for batch in batches)
    assert mixed <= 2 * (10_000 // (16 * WINDOW) + 1)  # one where two kinds meet, in each window
    assert sum(set(parts[batch]) == {3} for batch in batches) > 20


def test_every_caption_has_its_turn_and_a_clips_turn_is_its_own():
    sampler = BatchSampler(1000, 10, shuffle=True, seed=3)
    batch = np.arange(1000)
    turns = np.array([sampler.picks(number, batch) for number in range(50)]) % 5
    assert (turns == 0).mean() == pytest.approx(0.2, abs=0.01)
    assert all(len(set(column)) == 5 for column in turns.T)
    assert sampler.picks(4, batch)[17] == sampler.picks(4, np.array([17]))[0]
    assert BatchSampler(1000, 10).picks(4, batch) == [0] * 1000


# ---------------------------------------------------------------------------------------------------------------------
# workers


def read(clip: Clip) -> dict:
    """What the clip's name says that reading it does."""
    what, _, value = clip.id.partition(":")
    if what == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as C code does that never comes back
        time.sleep(1000)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if multiprocessing.parent_process() is not None:
        time.sleep(random.random() * 0.02)  # clips come back in another order than they went
    return {"id": clip.id, "value": torch.full((3,), float(value)), "process": os.getpid()}


def together(items: list[dict], picks: list[int]) -> dict:
    return {"ids": [item["id"] for item in items], "bad": [i for i in items if "error" in i], "items": items}


def clips(*names: str) -> list[Clip]:
    return [Clip(name, audio=f"{name}.wav") for name in names]


def test_workers_bring_what_one_process_reads_in_the_same_order():
    given = clips(*[f"ok:{i}" for i in range(40)])
    sampler = BatchSampler(40, 4, shuffle=True)
    loaders = [Loader(given, read, sampler, together, workers, 30) for workers in (0, 1, 3)]
    alone, *others = [[batch for _ in range(2) for batch in loader] for loader in loaders]
    for batches in others:
        assert [b["ids"] for b in batches] == [b["ids"] for b in alone]
        for ours, theirs in zip(batches, alone, strict=True):
            for one, other in zip(ours["items"], theirs["items"], strict=True):
                assert torch.equal(one["value"], other["value"])
        assert os.getpid() not in {item["process"] for batch in batches for item in batch["items"]}
    for loader in loaders:
        loader.close()


def test_a_clip_that_hangs_or_kills_its_worker_costs_only_itself():
    names = [f"ok:{i}" for i in range(20)]
    names[3], names[11], names[17] = "hang:1", "crash:2", "hang:4"
    started = time.monotonic()
    found = list(read_all(clips(*names), read, num_workers=2, time_limit=1.0))
    assert time.monotonic() - started < 60
    assert [item["id"] for item in found] == names
    errors = {item["id"]: item["error"] for item in found if "error" in item}
    assert errors.keys() == {"hang:1", "crash:2", "hang:4"}
    assert errors["hang:1"] == "hang:1.wav: reading it took more than 1 s"
    assert "ended the process" in errors["crash:2"]
    assert [item["value"][0].item() for item in found if "value" in item] == [
        float(name[3:]) for name in names if name.startswith("ok")
    ]


# ---------------------------------------------------------------------------------------------------------------------
# going on


def make(workers: int = 0, rank: int = 0, world: int = 1, size: int = 103, **how) -> Loader:
    lengths = np.random.default_rng(5).uniform(1, 30, size)
    sampler = BatchSampler(size, 6 // world, shuffle=True, seed=3, lengths=lengths, rank=rank, world=world, **how)
    return Loader(clips(*[f"ok:{i}" for i in range(size)]), read, sampler, together, workers, 30)


def stream(loader: Loader, batches: int) -> list[list[str]]:
    ids = []
    while len(ids) < batches:
        for batch in loader:
            ids.append(batch["ids"])
            if len(ids) == batches:
                break
    return ids


@pytest.mark.parametrize("tokens", [None, 1600])
def test_any_state_goes_on_after_it(tokens):
    whole = stream(make(max_tokens=tokens), 45)  # two epochs and a half
    for stop in (0, 1, 16, 17, 18, 30, 44):
        first = make(max_tokens=tokens)
        assert stream(first, stop) == whole[:stop]
        state = json.loads(json.dumps(first.state_dict()))
        second = make(max_tokens=tokens)
        second.load_state_dict(state)
        assert stream(second, 45 - stop) == whole[stop:]


def test_the_state_of_another_stream_is_refused():
    state = make().state_dict()
    with pytest.raises(ConfigError, match="the number of clips was 103, now 104"):
        make(size=104).load_state_dict(state)
    with pytest.raises(ConfigError, match="the seed was 4, now 3"):
        make().load_state_dict(state | {"seed": 4})
    with pytest.raises(ConfigError, match="the rows of a batch over all ranks was 12, now 6"):
        make().load_state_dict(state | {"rows": 12})


RANK = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_loader import make
if __name__ == "__main__":
    folder, rank, world, workers, batches = sys.argv[1], *map(int, sys.argv[2:])
    loader = make(workers, rank, world)
    saved, log = f"{{folder}}/state{{rank}}.json", open(f"{{folder}}/ids{{rank}}.jsonl", "a")
    if os.path.exists(saved):
        loader.load_state_dict(json.load(open(saved)))
    done = loader.epoch * len(loader) + loader.position
    while done < batches:
        for batch in loader:
            done += 1
            print(json.dumps([done, batch["ids"]]), file=log, flush=True)
            with open(saved + ".part", "w") as file:  # a checkpoint after every step
                json.dump(loader.state_dict(), file)
            os.replace(saved + ".part", saved)
            if done >= batches:
                break
    os._exit(0)
"""


def kill_and_resume(folder: Path, chance: random.Random, world: int, workers: tuple[int, int]) -> None:
    """Ranks, killed at a random moment and started again, must have seen what one uninterrupted process sees."""
    batches = 24
    script = folder / "rank.py"
    script.write_text(RANK.format(root=str(ROOT), tests=str(ROOT / "tests")))

    def start(workers: int) -> list[subprocess.Popen]:
        command = [sys.executable, str(script), str(folder)]
        return [subprocess.Popen([*command, *map(str, (rank, world, workers, batches))]) for rank in range(world)]

    ranks = start(workers[0])
    stop = chance.randrange(1, batches)
    log = folder / "ids0.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= stop):
        time.sleep(0.001)
    for process in ranks:
        os.kill(process.pid, signal.SIGKILL)
    for process in ranks:
        process.wait()
    for process in start(workers[1]):
        assert process.wait(timeout=120) == 0
    whole = stream(make(0, 0, 1), batches)
    seen: list[list[str]] = [[] for _ in range(batches)]
    for rank in range(world):
        # the last word on a step counts: one after which no state was written yet is repeated, and must be the same
        steps: dict[int, list[str]] = {}
        for line in (folder / f"ids{rank}.jsonl").read_text().splitlines():
            number, ids = json.loads(line)
            assert steps.setdefault(number, ids) == ids
        assert sorted(steps) == list(range(1, batches + 1))
        for number, ids in steps.items():
            seen[number - 1] += ids
    assert [sorted(ids) for ids in seen] == [sorted(ids) for ids in whole]


def test_after_a_kill_the_stream_goes_on_where_it_was(tmp_path):
    kill_and_resume(tmp_path, random.Random(0), world=1, workers=(2, 1))


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_after_twenty_kills_the_stream_goes_on_where_it_was(tmp_path, trial):
    kill_and_resume(tmp_path, random.Random(trial), world=2, workers=(2, 2 if trial % 2 else 3))
