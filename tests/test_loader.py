"""The clips of every batch, the worker processes that read them, crops, and resuming, also after a kill."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import kill_and_resume, take, take_on_ranks

from pe_av.config import ConfigError
from pe_av.data.manifest import Clip
from pe_av.loading.loader import Loader, crop
from pe_av.loading.sampler import WINDOW, BatchSampler
from pe_av.workers import Pool, read_all

ROOT = Path(__file__).parent.parent


def epoch(sampler: BatchSampler, number: int = 0) -> list[list[int]]:
    return [batch.tolist() for batch in sampler.epoch(number)]


# ---------------------------------------------------------------------------------------------------------------------
# what makes up a batch


@pytest.mark.parametrize("how", ["plain", "lengths", "tokens"])
def test_ranks_share_the_batches_that_one_process_sees(how):
    lengths = None if how == "plain" else np.random.default_rng(1).uniform(1, 30, 20_000)
    tokens = 36_000 if how == "tokens" else None

    def sampler(**place: int) -> BatchSampler:
        return BatchSampler(20_000, 50, shuffle=True, seed=7, lengths=lengths, max_tokens=tokens, **place)

    for number in range(2):
        whole = epoch(sampler(), number)
        seen = [clip for batch in whole for clip in batch]
        assert max(Counter(seen).values()) == 1
        assert 20_000 - len(seen) < (2 if tokens else 50)
        assert tokens or {len(batch) for batch in whole} == {50}
        for world in (2, 3, 7):  # 50 is no multiple of 3 and 7
            ranks = [epoch(sampler(rank=rank, world=world), number) for rank in range(world)]
            for batch, *step in zip(whole, *ranks, strict=True):
                assert sorted(sum(step, [])) == sorted(batch)
                sizes = [len(rows) for rows in step]
                assert max(sizes) <= min(sizes) + 1 and max(sizes) == -(-len(batch) // world)


def test_the_order_is_that_of_one_permutation():
    for seed, number in ((0, 0), (3, 5)):
        ours = sum(epoch(BatchSampler(640, 10, shuffle=True, seed=seed), number), [])
        chance = np.random.default_rng((seed, number))
        batches = chance.permutation(640).reshape(64, 10)  # one window
        assert ours == batches[chance.permutation(64)].ravel().tolist()


def test_a_rank_may_have_no_row():
    ranks = [epoch(BatchSampler(20, 2, shuffle=True, rank=rank, world=3)) for rank in range(3)]
    assert [{len(batch) for batch in rank} for rank in ranks] == [{1}, {1}, {0}]
    assert {len(rank) for rank in ranks} == {10}


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
    whole = epoch(BatchSampler(17, 4))
    assert whole == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16]]
    for world in (1, 2, 3, 8):
        ranks = [epoch(BatchSampler(17, 4, rank=rank, world=world)) for rank in range(world)]
        for rank, batches in enumerate(ranks):
            assert [batch for batch in batches if batch] == whole[rank::world]
            assert len(batches) == -(-5 // world) == BatchSampler(17, 4, rank=rank, world=world).steps(0)


def waste(lengths: np.ndarray, batches: list[list[int]]) -> float:
    """The share of positions that is padding."""
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
    # everything, audio and text, video and text
    modalities = np.random.default_rng(0).choice([7, 5, 3], 10_000, p=[0.8, 0.15, 0.05])
    batches = epoch(BatchSampler(10_000, 16, shuffle=True, modalities=modalities))
    mixed = sum(len(set(modalities[batch])) > 1 for batch in batches)
    assert mixed <= 2 * (10_000 // (16 * WINDOW) + 1)  # in each window, one where two combinations meet
    assert sum(set(modalities[batch]) == {3} for batch in batches) > 20


def test_every_caption_has_its_turn_and_a_clips_turn_is_its_own():
    sampler = BatchSampler(1000, 10, shuffle=True, seed=3)
    batch = np.arange(1000)
    picks = np.array([sampler.picks(number, batch) for number in range(50)])
    offsets = np.array([sampler.offsets(number, batch) for number in range(50)])
    turns = picks % 5
    assert (turns == 0).mean() == pytest.approx(0.2, abs=0.01)
    assert all(len(set(column)) == 5 for column in turns.T)
    assert sampler.picks(4, batch)[17] == sampler.picks(4, np.array([17]))[0]
    assert BatchSampler(1000, 10).picks(4, batch) == BatchSampler(1000, 10).offsets(4, batch) == [0] * 1000
    from scipy.stats import chi2_contingency, kstest  # here, since workers import this file and do not need it

    # where a crop begins is uniform, and independent of the caption and of other epochs
    assert kstest(offsets.ravel(), "uniform").pvalue > 0.01
    assert chi2_contingency(np.histogram2d(turns.ravel(), offsets.ravel(), [5, 10])[0]).pvalue > 0.01
    assert abs(np.corrcoef(offsets)[np.triu_indices(50, 1)]).max() < 0.15


@pytest.mark.parametrize("tokens", [None, 400_000])
def test_a_million_clips_are_planned_in_little_memory(tokens):
    count = 1_000_000
    lengths, modalities = np.random.default_rng(0).uniform(1, 30, count), np.full(count, 7)
    tracemalloc.start()  # numpy reports its arrays to it
    try:
        sampler = BatchSampler(count, 1024, shuffle=True, lengths=lengths, modalities=modalities, max_tokens=tokens)
        seen = sum(len(batch) for batch in sampler.epoch(0))
        assert tracemalloc.get_traced_memory()[1] < 40 * count
    finally:
        tracemalloc.stop()
    assert count - seen < 1024


class Counted(list):
    """Clips, and the indices of those that were accessed."""

    asked: list[int] = []

    def __getitem__(self, index: int) -> Clip:
        self.asked.append(index)
        return super().__getitem__(index)


def test_going_on_in_the_middle_touches_no_clip_before_it():
    given = Counted(clips(*[f"ok:{i}" for i in range(1000)]))
    loader = Loader(given, read, BatchSampler(1000, 10, shuffle=True), together)
    loader.load_state_dict(loader.state_dict() | {"batch": 98})
    given.asked.clear()  # of the clips whose ids went into the checksum
    assert sum(len(batch["ids"]) for batch in loader) == len(given.asked) == 20


# ---------------------------------------------------------------------------------------------------------------------
# workers


class Awkward(Exception):
    """An exception that can be pickled but not unpickled."""

    def __init__(self, one: int, other: int):
        super().__init__(f"{one}\nand {other}")


class Unreadable:
    """A value that can be pickled but not unpickled."""

    def __reduce__(self) -> tuple:
        return int, ("no number",)


RAISED = {"key": KeyError("stream"), "memory": MemoryError(), "awkward": Awkward(1, 2), "assert": AssertionError("no")}


def read(clip: Clip) -> dict:
    """Do what the id of the clip says: return an item, hang, crash or raise."""
    what, _, value = clip.id.partition(":")
    if what == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # like C code that never returns
        if clip.video:
            Path(clip.video).touch()
        time.sleep(1000)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what in RAISED:
        raise RAISED[what]
    if what == "unsendable":
        return {"id": clip.id, "value": lambda: value}
    if what == "unreadable":
        return {"id": clip.id, "value": Unreadable()}
    if what == "none":
        return None
    if what == "long":
        return {"id": clip.id, "start": clip.start, "end": clip.end}
    if multiprocessing.parent_process() is not None:
        time.sleep(random.random() * 0.02)  # items come back in another order
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


@pytest.mark.parametrize("workers", [0, 2])
def test_whatever_reading_raises_costs_one_clip(workers):
    names = ["ok:1", "key:", "memory:", "awkward:", "ok:2", "assert:", "none:", "ok:3"]
    expected = {
        "key:": "key:.wav: KeyError: 'stream'",
        "memory:": "memory:.wav: MemoryError",
        "awkward:": "awkward:.wav: Awkward: 1 and 2",
        "assert:": "assert:.wav: AssertionError: no",
    }
    if workers:  # items that fail on the way from the worker
        names += ["unsendable:", "unreadable:", "ok:4"]
        expected["unreadable:"] = "unreadable:.wav: ValueError: invalid literal for int() with base 10: 'no number'"
    else:
        names.remove("none:")
    loader = Loader(clips(*names), read, BatchSampler(len(names), len(names)), together, workers, 30)
    batch = next(iter(loader))
    loader.close()
    assert batch["ids"] == names
    errors = {item["id"]: item["error"] for item in batch["bad"]}
    assert {name: errors[name] for name in expected} == expected
    if workers:
        assert errors.keys() - expected.keys() == {"unsendable:", "none:"}
        assert errors["unsendable:"].startswith("unsendable:.wav: AttributeError: Can't pickle local object")
    assert [item["value"][0].item() for item in batch["items"] if "value" in item] == list(
        range(1, 5 if workers else 4)
    )


def broken_collate(items: list[dict], picks: list[int]) -> dict:
    raise ZeroDivisionError("in collate")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_collating_is_raised(workers):
    loader = Loader(clips("ok:1", "ok:2"), read, BatchSampler(2, 2), broken_collate, workers, 30)
    with pytest.raises(ZeroDivisionError, match="in collate"):
        next(iter(loader))
    loader.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_pool_outlives_its_workers_and_leaks_nothing():
    pool = Pool(read, 2)

    def outcomes(*names: str) -> list[str]:
        items = [pool.read(clip, 20) for clip in clips(*names)]
        return [future.result().get("error", "read") for future in items]

    assert outcomes("ok:1", "ok:2", "ok:3") == ["read"] * 3
    files, threads = open_files(), threading.active_count()
    # some crashes follow each other directly, so that workers also die just after they were given a clip
    names = [f"crash:{i}" for i in range(24)] + ["ok:1", "crash:24", "ok:2", "crash:25", "ok:3"] + ["crash:26"] * 4
    found = outcomes(*names)
    assert found == [f"{name}.wav: reading it ended the process (-11)" if "crash" in name else "read" for name in names]
    for process in multiprocessing.active_children():  # workers that are idle, as the kernel does when memory is short
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
    assert outcomes("ok:1", "ok:2", "ok:3") == ["read"] * 3
    assert threading.active_count() == threads and open_files() <= files
    pool.close()
    assert not multiprocessing.active_children()
    assert open_files() < files


def test_closing_takes_seconds_whatever_the_workers_do(tmp_path):
    given = [Clip(f"hang:{i}", video=str(tmp_path / f"{i}")) for i in range(12)]
    loader = Loader(given, read, BatchSampler(12, 4), together, 3)  # no time limit

    def wait_for_a_batch() -> None:
        with contextlib.suppress(CancelledError):
            next(iter(loader))

    thread = threading.Thread(target=wait_for_a_batch)
    thread.start()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    started = time.monotonic()
    loader.close()
    thread.join(5)
    assert time.monotonic() - started < 5 and not thread.is_alive()
    assert not multiprocessing.active_children()


END = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_loader import clips, read
from pe_av.workers import Pool
if __name__ == "__main__":
    pool = Pool(read, 2)
    pool.read(clips("ok:1")[0]).result()
    for clip in clips("hang:1", "hang:2", "hang:3"):
        pool.read(clip)
    raise SystemExit(7)
"""


def test_a_process_ends_although_its_workers_hang(tmp_path):
    script = tmp_path / "end.py"
    script.write_text(END.format(root=str(ROOT), tests=str(ROOT / "tests")))
    assert subprocess.run([sys.executable, str(script)], timeout=300, capture_output=True).returncode == 7


# ---------------------------------------------------------------------------------------------------------------------
# crops


def test_a_crop_lies_within_the_clip():
    assert crop(Clip("a", "a.wav", seconds=8.0), 10.0, 0.5) == Clip("a", "a.wav", seconds=8.0)
    assert crop(Clip("a", "a.wav"), 10.0, 0.5) == Clip("a", "a.wav")  # its length is not known
    for clip, first, last in (
        (Clip("a", "a.wav", seconds=30.0), 0.0, 20.0),
        (Clip("a", "a.wav", start=5.0, seconds=30.0), 5.0, 25.0),
        (Clip("a", "a.wav", start=5.0, end=35.0), 5.0, 25.0),
        (Clip("a", "a.wav", start=5.0, end=99.0, seconds=30.0), 5.0, 25.0),  # the file ends before the segment
        (Clip("a", "a.wav", start=5.0, end=20.0, seconds=30.0), 5.0, 10.0),
    ):
        for offset, start in ((0.0, first), (0.5, (first + last) / 2), (1.0, last)):
            assert crop(clip, 10.0, offset) == replace(clip, start=start, end=start + 10.0)


def crops(workers: int = 0, skip: int = 0, rank: int = 0, world: int = 1, shuffle: bool = True) -> list[tuple]:
    """(epoch, id, start, end) over three epochs."""
    given = [Clip(f"long:{i}", "a.wav", seconds=float(i)) for i in range(40)]
    sampler = BatchSampler(40, 8, shuffle=shuffle, seed=2, rank=rank, world=world)
    loader = Loader(given, read, sampler, together, workers, 30, crop_seconds=10.0)
    loader.load_state_dict(loader.state_dict() | {"batch": skip})
    found = []
    while loader.epoch < 3:
        now = loader.epoch
        for batch in loader:
            found += [(now, item["id"], item["start"], item["end"]) for item in batch["items"]]
    loader.close()
    return found


def test_crops_follow_from_seed_epoch_and_clip():
    whole = crops()
    assert whole == crops(workers=2)
    assert whole[24:] == crops(skip=3)
    assert sorted(whole) == sorted(crops(rank=0, world=3) + crops(rank=1, world=3) + crops(rank=2, world=3))
    starts = np.zeros((3, 40))
    for now, name, start, end in whole:
        length = int(name.partition(":")[2])
        assert (start, end) == (0.0, None) if length <= 10 else 0 <= start <= length - 10 and end == start + 10
        starts[now, length] = start
    assert (starts[:, 11:] > 0).all() and all(len(set(column)) == 3 for column in starts[:, 11:].T)
    assert {start for _, _, start, _ in crops(shuffle=False)} == {0.0}


# ---------------------------------------------------------------------------------------------------------------------
# going on


def make(workers: int = 0, rank: int = 0, world: int = 1, size: int = 103, **how) -> Loader:
    lengths = np.random.default_rng(5).uniform(1, 30, size)
    sampler = BatchSampler(size, 6, shuffle=True, seed=3, lengths=lengths, rank=rank, world=world, **how)
    return Loader(clips(*[f"ok:{i}" for i in range(size)]), read, sampler, together, workers, 30)


@pytest.mark.parametrize("tokens", [None, 4800])
def test_any_state_goes_on_after_it(tokens):
    whole = take(make(max_tokens=tokens), 45, "ids")  # two epochs and a half
    for stop in (0, 1, 16, 17, 18, 30, 44):
        first = make(max_tokens=tokens)
        assert take(first, stop, "ids") == whole[:stop]
        state = json.loads(json.dumps(first.state_dict()))
        second = make(max_tokens=tokens)
        second.load_state_dict(state)
        assert take(second, 45 - stop, "ids") == whole[stop:]


@pytest.mark.parametrize("tokens", [None, 4800])
def test_a_state_goes_on_with_another_number_of_ranks(tokens):
    whole = take(make(max_tokens=tokens), 45, "ids")
    seen: list[list[str]] = []
    state = make(max_tokens=tokens).state_dict()
    for world, batches in ((1, 10), (2, 13), (3, 22)):
        ranks, ids = take_on_ranks(partial(make, 0, max_tokens=tokens), world, state, batches, "ids")
        seen += ids
        assert all(loader.state_dict() == ranks[0].state_dict() for loader in ranks)
        state = json.loads(json.dumps(ranks[-1].state_dict()))
    assert seen == [sorted(ids) for ids in whole]


def test_without_shuffling_batch_b_of_rank_r_is_number_b_times_ranks_plus_r():
    given = clips(*[f"ok:{i}" for i in range(17)])
    ranks = [Loader(given, read, BatchSampler(17, 4, rank=rank, world=2), together) for rank in range(2)]
    ids = [batch["ids"] for turn in zip(*ranks, strict=True) for batch in turn]
    assert ids == [[f"ok:{i}" for i in range(4 * b, min(4 * b + 4, 17))] for b in range(6)]
    assert [(loader.epoch, loader.position) for loader in ranks] == [(1, 0)] * 2


def test_the_state_of_another_stream_is_refused():
    state = make().state_dict()
    with pytest.raises(ConfigError, match="the clips have other ids or another order; use the manifest that the run"):
        make().load_state_dict(state | {"names": "others"})
    with pytest.raises(ConfigError, match="the checksum of the lengths and modalities of the clips was"):
        make().load_state_dict(state | {"sorting": "others"})
    with pytest.raises(ConfigError, match="the number of clips was 103, now 104"):
        make(size=104).load_state_dict(state)
    with pytest.raises(ConfigError, match="the seed was 4, now 3"):
        make().load_state_dict(state | {"seed": 4})
    with pytest.raises(ConfigError, match="the number of rows of a batch over all ranks was 12, now 6"):
        make().load_state_dict(state | {"rows": 12})
    with pytest.raises(ConfigError, match="the token budget of a batch over all ranks was 4800, now 9600"):
        make(max_tokens=9600).load_state_dict(make(max_tokens=4800).state_dict())
    with pytest.raises(ConfigError, match="the number of rows of a batch over all ranks was 6, now None"):
        make(max_tokens=9600).load_state_dict(state)


def check_a_kill(folder: Path, seed: int, world: int, workers: tuple[int, int]) -> None:
    """Ranks, killed at a random moment and started again, must have seen what one uninterrupted process sees."""
    _, seen = kill_and_resume(folder, "test_loader", "make(workers, rank, world)", "ids", 24, seed, workers, world)
    assert [sorted(ids) for ids in seen] == [sorted(ids) for ids in take(make(), 24, "ids")]


def test_after_a_kill_the_stream_goes_on_where_it_was(tmp_path):
    check_a_kill(tmp_path, 0, world=1, workers=(2, 1))


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_after_twenty_kills_the_stream_goes_on_where_it_was(tmp_path, trial):
    check_a_kill(tmp_path, trial, world=2, workers=(2, 2 if trial % 2 else 3))
