"""Several data sets in one run: the share of each, when a clip repeats, and resuming."""

import json
import re
from collections import Counter
from fractions import Fraction
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
from batches import take, take_on_ranks

from pe_av.config import ConfigError, MixConfig
from pe_av.data.manifest import Clip, Manifest
from pe_av.data.mix import MixedManifest, Mixture, read_mix
from pe_av.loading.loader import Loader
from pe_av.loading.sampler import BatchSampler


def manifest(name: str, count: int, seconds: float | None = 5.0, kind: str | None = None) -> Manifest:
    rows = [Clip(f"{i}", f"{name}{i}.wav", None, {kind: [f"{name} {i}"]}, seconds=seconds) for i in range(count)]
    return Manifest.of(rows, "/data")


def mixed(weights: tuple[float, ...] = (1, 2, 3), sizes: tuple[int, ...] = (7, 50, 300)) -> MixedManifest:
    names = "abc"[: len(sizes)]
    manifests = {name: manifest(name, size) for name, size in zip(names, sizes, strict=True)}
    return MixedManifest(manifests, dict(zip(names, weights, strict=True)))


def sampler(clips: MixedManifest, rows: int = 8, **how) -> BatchSampler:
    return BatchSampler(len(clips), rows, shuffle=True, seed=5, mixture=clips.mixture, **how)


# ---------------------------------------------------------------------------------------------------------------------
# the clips


def test_a_mixed_manifest_is_its_sets_one_after_the_other():
    parts = {"a": manifest("x", 3, 4.0), "b": manifest("y", 1, 9.0, "audio"), "c": manifest("z", 2, 2.0)}
    clips = MixedManifest(parts, {"a": 1.0, "b": 1.0, "c": 1.0})
    assert [clip.id for clip in clips] == ["a/0", "a/1", "a/2", "b/0", "c/0", "c/1"]
    assert [clip.audio for clip in clips] == [f"/data/{name}.wav" for name in ("x0", "x1", "x2", "y0", "z0", "z1")]
    assert len(clips) == 6 and clips[-1] == clips[5] and clips[-6] == clips[0]
    assert clips[3].captions == {"audio": ["y 0"]}
    for index in (6, -7):
        with pytest.raises(IndexError):
            clips[index]
    assert list(clips.texts()) == ["x 0", "x 1", "x 2", "y 0", "z 0", "z 1"]
    assert clips.lengths(8.0).tolist() == [4, 4, 4, 8, 2, 2]
    assert clips.modalities().tolist() == [5] * 6
    assert MixedManifest(parts | {"c": manifest("z", 2, None)}, clips.mixture.weights).lengths(8.0) is None


def test_kinds_are_those_of_the_sets(monkeypatch):
    def kinds(self: Manifest) -> dict[str | None, np.ndarray]:
        count = len(self)
        return {None: np.zeros(count, bool), "audio": np.arange(count) % 2 == 0}

    monkeypatch.setattr(Manifest, "kinds", kinds, raising=False)
    found = mixed(sizes=(2, 1, 3)).kinds()
    assert found[None].tolist() == [False] * 6
    assert found["audio"].tolist() == [True, False, True, True, False, True]


def test_the_sets_are_read_and_named_in_errors(tmp_path):
    rows = [{"id": str(i), "path": f"{i}.mp4", "split": "train" if i else "test"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one = MixConfig(str(tmp_path / "a.jsonl"))
    clips = read_mix({"all": one, "some": MixConfig(one.train, "train", 0.5)})
    assert [clip.id for clip in clips] == ["all/0", "all/1", "all/2", "some/1", "some/2"]
    assert clips.mixture == Mixture({"all": 3, "some": 2}, {"all": 1.0, "some": 0.5})
    with pytest.raises(ConfigError, match="data.mix names no data set: give it at least one"):
        read_mix({})
    with pytest.raises(ConfigError, match="no such manifest"):
        read_mix({"a": MixConfig("nowhere.jsonl")})
    with pytest.raises(ConfigError, match="'a/b' cannot be a name"):
        read_mix({"a/b": one})
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="weight=.* is not positive"):
            mixed(weights=(1.0, weight, 1.0))
    with pytest.raises(ConfigError, match="data.mix.b holds no clips"):
        MixedManifest({"b": Manifest(pa.Table.from_pylist([], manifest("a", 1).table.schema))}, {"b": 1.0})


# ---------------------------------------------------------------------------------------------------------------------
# the order


@pytest.mark.parametrize("tokens", [None, 2000])
def test_one_set_alone_comes_in_the_plain_order(tokens):
    lengths = np.random.default_rng(0).uniform(1, 30, 500)
    how = dict(shuffle=True, seed=5, lengths=lengths, max_tokens=tokens)
    plain = BatchSampler(500, 8, **how)
    alone = BatchSampler(500, 8, mixture=Mixture({"a": 500}, {"a": 1.0}), **how)
    for number in range(3):
        ours, theirs = list(alone.epoch(number)), list(plain.epoch(number))
        assert [batch.tolist() for batch in ours] == [batch.tolist() for batch in theirs]
        for step, batch in enumerate(ours):
            assert alone.picks(number, batch, step) == plain.picks(number, batch)


@pytest.mark.parametrize("weights", [(1, 2, 3), (0.1, 0.2, 0.7), (1e-3, 1, 1), (1, 1, 1e-3)])
def test_shares_are_those_of_the_weights(weights):
    clips = mixed(weights)
    bounds = np.cumsum([0, 7, 50, 300])
    counts, epochs = np.zeros(3, int), 200
    for number in range(epochs):
        counts += np.histogram(clips.mixture.clips(5, number), bounds)[0]
        exact = [Fraction(w) * 357 * (number + 1) / sum(map(Fraction, weights)) for w in weights]
        assert counts.tolist() == [int(share) for share in exact]  # after every epoch, to the clip


def test_every_clip_of_a_set_comes_before_one_comes_again():
    clips = mixed((0.5, 0.3, 0.2))
    bounds = np.cumsum([0, 7, 50, 300])
    seen: Counter[int] = Counter()
    for number in range(60):
        seen.update(clips.mixture.clips(5, number).tolist())
        for first, end in zip(bounds[:-1], bounds[1:], strict=True):
            times = [seen[clip] for clip in range(first, end)]
            assert max(times) <= min(times) + 1
    assert seen[0] > 1400 and seen[8] > 120 and seen[60] > 12


def test_passes_and_sets_have_orders_of_their_own():
    clips = Mixture({"a": 100, "b": 100}, {"a": 1.0, "b": 3.0})
    halves = [clips.clips(0, number) for number in range(4)]  # of a, half a pass an epoch; of b, one and a half
    first, second = (frozenset(half[half < 100].tolist()) for half in halves[::2])
    assert len(first) == len(second) == 50 and first != second
    of_b = Counter((halves[0][halves[0] >= 100] - 100).tolist())
    twice = frozenset(clip for clip, times in of_b.items() if times == 2)
    assert len(of_b) == 100 and len(twice) == 50 and twice != second
    assert clips.clips(1, 0).tolist() != halves[0].tolist()


@pytest.mark.parametrize("tokens", [None, 2500])
def test_a_clip_is_in_no_batch_twice(tokens):
    """As long as there are enough batches: similar clips are batched together, and copies are the most similar."""
    clips = mixed((0.4, 0.3, 0.3), (40, 400, 20_000))
    lengths = np.random.default_rng(0).uniform(1, 10, len(clips))
    plan = sampler(clips, 16, lengths=lengths, max_tokens=tokens)
    taken: Counter[int] = Counter()
    for batch in plan.epoch(1):
        assert len(set(batch.tolist())) == len(batch) >= 2
        assert tokens is None or len(batch) * np.ceil(25 * lengths[batch]).max() <= tokens
        taken.update(batch.tolist())
    drawn = Counter(clips.mixture.clips(5, 1).tolist())
    assert max(taken.values()) > 100  # the smallest set came very often
    assert sum((drawn - taken).values()) < (2 if tokens else 16) and not taken - drawn


def test_a_clip_that_comes_again_in_an_epoch_shows_another_caption_and_part():
    plan = sampler(mixed((0.5, 0.3, 0.2)))
    picks, offsets = [], []
    for number, batch in enumerate(plan.epoch(0)):
        at = np.flatnonzero(batch == 3)
        picks += [plan.picks(0, batch, number)[i] for i in at]
        offsets += [plan.offsets(0, batch, number)[i] for i in at]
    assert len(picks) > 20 and len(set(picks)) == len(set(offsets)) == len(picks)


# ---------------------------------------------------------------------------------------------------------------------
# going on


def read(clip: Clip) -> dict:
    return {"id": clip.id, "start": clip.start}


def together(items: list[dict], picks: list[int]) -> dict:
    rows = [(item["id"], item["start"], pick) for item, pick in zip(items, picks, strict=True)]
    return {"rows": rows, "bad": []}


def loader(rank: int = 0, world: int = 1, weights: tuple[float, ...] = (1, 2, 3), **how) -> Loader:
    clips = mixed(weights)
    plan = sampler(clips, lengths=clips.lengths(2.0), rank=rank, world=world, **how)
    return Loader(clips, read, plan, together, crop_seconds=2.0)


@pytest.mark.parametrize("tokens", [None, 600])
def test_any_state_goes_on_after_it_with_any_number_of_ranks(tokens):
    whole = take(loader(max_tokens=tokens), 130, "rows")  # almost three epochs
    for world, stop in ((1, 1), (2, 44), (3, 60), (1, 129)):
        first = loader(max_tokens=tokens)
        assert take(first, stop, "rows") == whole[:stop]
        state = json.loads(json.dumps(first.state_dict()))
        _, seen = take_on_ranks(partial(loader, max_tokens=tokens), world, state, 130 - stop, "rows")
        assert seen == [sorted(rows) for rows in whole[stop:]]


def test_an_epoch_has_as_many_batches_as_it_says():
    one = loader()
    for _ in range(5):
        assert len(one) == sum(1 for _ in one)


def test_the_state_of_another_mixture_is_refused():
    state = json.loads(json.dumps(loader().state_dict()))
    before = "the mixture data.mix was a (7 clips, weight 1), b (50 clips, weight 2), c (300 clips, weight 3), now "
    with pytest.raises(
        ConfigError, match=re.escape(before + "a (7 clips, weight 1), b (50 clips, weight 4), c (300 clips, weight 3)")
    ):
        loader(weights=(1, 4, 3)).load_state_dict(state)
    same_size = mixed((1, 2), (307, 50))
    with pytest.raises(ConfigError, match=re.escape(before + "a (307 clips, weight 1), b (50 clips, weight 2)")):
        Loader(same_size, read, sampler(same_size), together).load_state_dict(state)
    two = mixed((1, 2), (7, 350))
    with pytest.raises(ConfigError, match=re.escape(before + "a (7 clips, weight 1), b (350 clips, weight 2)")):
        Loader(two, read, sampler(two), together).load_state_dict(state)
    turned = MixedManifest({n: mixed().manifests[n] for n in "cba"}, {"a": 1, "b": 2, "c": 3})
    with pytest.raises(ConfigError, match=re.escape(before + "c (300 clips, weight 3), b (50 clips")):
        Loader(turned, read, sampler(turned), together).load_state_dict(state)
    plain = BatchSampler(357, 8, shuffle=True, seed=5)
    with pytest.raises(ConfigError, match=re.escape(before + "none")):
        Loader(mixed(), read, plain, together).load_state_dict(state)
