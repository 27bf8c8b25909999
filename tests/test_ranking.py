"""Exact ranks, average precision, intervals and protocols against double loops; what an evaluation records."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from test_media import write_frames, write_wav
from test_processor import make_config, make_tokenizer
from torch import Tensor
from torchmetrics.retrieval import RetrievalMAP

from pe_av.config import ConfigError, DataConfig, EvalConfig
from pe_av.data.clips import ClipReader
from pe_av.data.manifest import Clip, read_manifest
from pe_av.evaluation.embedder import EmbeddedClips
from pe_av.evaluation.figures import average_precision_at_10, intervals
from pe_av.evaluation.metrics import evaluate_embeddings
from pe_av.evaluation.ranking import DotProducts, Reweighted, others_at_or_above, retrieval_ranks
from pe_av.evaluation.retrieval import check_embedded
from pe_av.loading.bad_items import BadItems
from pe_av.loading.batch import Collate
from pe_av.media.processor import Processor

QUERIES, ITEMS = 47, 41


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def exact_scores(queries: Tensor, gallery: Tensor) -> list[list[float]]:
    """Dot products in extended precision, so that they order all but items that tie."""
    left, right = (rows.double().numpy().astype(np.longdouble) for rows in (queries, gallery))
    return [[(row * item).sum() for item in right] for row in left]


def by_hand(scores: list[list[float]], target: list[list[int]], best: int) -> list[list[int]]:
    """How many items that are not true score as high as each of the best true ones, or higher."""
    counts = []
    for row, true in zip(scores, target, strict=True):
        true = {item for item in true if item >= 0}
        thresholds = sorted((row[item] for item in true), reverse=True)[:best]
        found = [sum(row[j] >= value for j in range(len(row)) if j not in true) for value in thresholds]
        counts.append(found + [len(row)] * (best - len(found)))
    return counts


def pair_of(kind: str, width: int) -> tuple[Tensor, Tensor]:
    queries, gallery = torch.randn(QUERIES, width), torch.randn(ITEMS, width)
    if kind == "whole numbers":  # many ties between different items
        return queries.sign(), gallery.mul(2).round()
    if kind == "copies":
        return queries, gallery[torch.randint(6, (ITEMS,))]
    if kind == "alike":  # float32 products cannot order them
        return queries, gallery[:1] + 2e-7 * gallery
    if kind == "huge":
        return 1e37 * queries, 1e37 * gallery
    if kind == "denormal":
        return 1e-40 * queries, 1e-41 * gallery
    if kind == "zeros":
        queries[::2], gallery[::3] = 0, -0.0
    if kind == "wild":
        return queries * 10 ** torch.empty(QUERIES, 1).uniform_(-30, 30), gallery * 10 ** torch.empty(
            ITEMS, 1
        ).uniform_(-30, 30)
    return queries, gallery


@pytest.mark.parametrize("width", [1, 7, 64, 129])
@pytest.mark.parametrize("kind", ["random", "whole numbers", "copies", "alike", "huge", "denormal", "zeros", "wild"])
def test_ranks_of_several_true_items_equal_a_double_loop(kind: str, width: int):
    queries, gallery = pair_of(kind, width)
    target = torch.randint(-1, ITEMS, (QUERIES, 4))
    target[:, 1] = torch.randint(ITEMS, (QUERIES,))
    expected = by_hand(exact_scores(queries, gallery), target.tolist(), 3)
    scores = DotProducts(queries, gallery)
    for blocks in ({}, {"query_block": 7, "item_block": 5}):
        assert others_at_or_above(scores, target, 3, **blocks).tolist() == expected
    doubles = DotProducts(queries.double(), gallery.double())
    assert others_at_or_above(doubles, target, 3).tolist() == expected


def test_items_of_an_equal_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr("torch.randint", lambda low, high, size, **_: torch.zeros(size, dtype=torch.int64))
    queries, gallery = torch.randn(20, 5), torch.arange(3.0)[torch.arange(20) % 3, None] * torch.ones(5)
    expected = by_hand((queries.double() @ gallery.double().T).tolist(), torch.arange(20)[:, None].tolist(), 1)
    assert others_at_or_above(DotProducts(queries, gallery), torch.arange(20)[:, None]).tolist() == expected


def test_cosines_equal_a_double_loop():
    queries, gallery = torch.randn(QUERIES, 20), torch.randn(ITEMS, 20) * torch.rand(ITEMS, 1)
    gallery[5:9] = gallery[:4]
    target = torch.randint(ITEMS, (QUERIES, 1))
    unit = torch.nn.functional.normalize(gallery.double(), dim=1)
    expected = by_hand(exact_scores(queries, unit), target.tolist(), 1)
    assert others_at_or_above(DotProducts(queries, gallery, unit=True), target).tolist() == expected


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_equals_a_double_loop_and_torchmetrics(ties: bool):
    queries, gallery = torch.randn(60, 8), torch.randn(30, 8)
    if ties:
        queries, gallery = queries.sign(), gallery.sign()
    target = torch.stack([torch.randperm(30)[:15] for _ in range(60)])
    target[::2, 3:] = -1
    target[::3, 1:] = -1
    scores = queries @ gallery.T
    expected = []
    for row, true in zip(scores.tolist(), target.tolist(), strict=True):
        true = {item for item in true if item >= 0}
        order = sorted(range(30), key=lambda item: (-row[item], item in true))[:10]
        hits = [item in true for item in order]
        total = sum(sum(hits[: k + 1]) / (k + 1) for k in range(10) if hits[k])
        expected.append(total / min(len(true), 10))
    counts = (target >= 0).sum(1)
    found = average_precision_at_10(others_at_or_above(DotProducts(queries, gallery), target, 10), counts)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    if not ties:  # torchmetrics divides by the true items among the first ten: the same where all of one are
        one = counts == 1
        true = torch.zeros(60, 30, dtype=torch.bool).scatter_(1, target.clamp(min=0)[:, :1], True)[one]
        rows = torch.arange(60)[one, None].expand(-1, 30)
        reference = RetrievalMAP(top_k=10)((scores - scores.min() + 1)[one].flatten(), true.flatten(), rows.flatten())
        assert found[one].mean().item() == pytest.approx(reference.item(), abs=1e-6)


def test_intervals_equal_scipy():
    ranks = torch.randint(1, 40, (300,)).numpy()
    recall, random = 100 * (ranks <= 10), np.random.default_rng(1)
    found = intervals(ranks, {"R@10": recall, "MeanR": ranks}, np.arange(300))
    for name, values, figure in (("R@10", recall, np.mean), ("MeanR", ranks, np.mean), ("MedR", ranks, np.median)):
        result = bootstrap((values,), figure, n_resamples=4000, method="percentile", rng=random)
        low, high = result.confidence_interval
        assert found[name] == pytest.approx([low, high], abs=0.2 * (high - low))


def test_captions_of_one_clip_are_resampled_together():
    """Five copies of every query carry no more information, so the interval stays as wide."""
    ranks = torch.randint(1, 20, (200,)).numpy()
    one = intervals(ranks, {"MeanR": ranks}, np.arange(200))
    five = intervals(np.repeat(ranks, 5), {"MeanR": np.repeat(ranks, 5)}, np.repeat(np.arange(200), 5))
    assert five["MeanR"] == pytest.approx(one["MeanR"])


# ---------------------------------------------------------------------------------------------------------------------
# the original's protocol


def reweighted_by_hand(texts: Tensor, media: Tensor, labels: list[str], clip_of: list[int]) -> dict[str, list[int]]:
    """From the rule: one row for every caption as it stands in the corpus, one column for every clip."""
    similarity = [
        [(t @ m / (t.norm() * m.norm())).item() for m in media.double()] for t in texts.double()
    ]  # unit length
    true = [
        [any(labels[k] == labels[i] and clip_of[k] == j for k in range(len(labels))) for j in range(len(media))]
        for i in range(len(labels))
    ]
    results = {}
    for name, flip in (("text->media", False), ("media->text", True)):
        scores = 10 * torch.tensor(similarity, dtype=torch.float64)
        positive = torch.tensor(true)
        if flip:
            scores, positive = scores.T, positive.T
        scores = scores * scores.softmax(dim=0)
        ranks = []
        for row, hits in zip(scores.tolist(), positive.tolist(), strict=True):
            best = max(score for score, hit in zip(row, hits, strict=True) if hit)
            # equal captions get scores that differ by rounding only
            ranks.append(1 + sum(s >= best - 1e-12 for s, hit in zip(row, hits, strict=True) if not hit))
        results[name] = ranks
    return results


@pytest.mark.parametrize("several", [1, 2])
@pytest.mark.parametrize("duplicates", [False, True])
def test_reweighting_equals_the_rule_of_the_original(several: int, duplicates: bool):
    clips = 30
    captions = torch.arange(clips * several).reshape(clips, several)
    if duplicates:
        captions = torch.stack([torch.randperm(12)[:several] for _ in range(clips)])
    count = int(captions.max()) + 1
    media, texts = torch.randn(clips, 12), torch.randn(count, 12)
    rows, clip_of = captions.flatten(), torch.arange(clips).repeat_interleave(several)
    expected = reweighted_by_hand(texts[rows], media, [str(i) for i in rows.tolist()], clip_of.tolist())
    embeds = {"audio": media, "text_audio": torch.zeros(clips, 12)}
    found = evaluate_embeddings(embeds, None, {"text_audio": texts}, captions, protocol="reweighted", intervals=True)
    for direction, ranks in (("text->audio", expected["text->media"]), ("audio->text", expected["media->text"])):
        row, ranks = found[direction], np.array(ranks)
        assert (row["queries"], row["gallery"]) == (len(ranks), clips * several if "->text" in direction else clips)
        assert row["MeanR"] == pytest.approx(ranks.mean())
        assert row["MRR"] == pytest.approx((1 / ranks).mean())
        for k in (1, 5, 10):
            assert row[f"R@{k}"] == pytest.approx(100 * (ranks <= k).mean())
        assert row["ci95"]["R@1"][0] <= row["R@1"] <= row["ci95"]["R@1"][1]


def test_equal_items_tie_when_reweighted():
    queries, gallery = torch.randn(30, 9), torch.randn(5, 9)[torch.arange(30) % 5]
    scores = Reweighted(queries, gallery)
    cosines = torch.nn.functional.normalize(queries.double()) @ torch.nn.functional.normalize(gallery.double()).T
    expected = 10 * cosines * (10 * cosines).softmax(0)
    target = torch.arange(30)[:, None]
    counts = [sum(s >= row[i] - 1e-12 for s in row) - 1 for i, row in enumerate(expected.tolist())]
    assert others_at_or_above(scores, target, query_block=7, item_block=2)[:, 0].tolist() == counts


# ---------------------------------------------------------------------------------------------------------------------
# what is read and recorded


def test_what_was_cut_is_counted(tmp_path):
    """Of waveforms and of films, whole and in segments, with and without lengths in the manifest."""
    write_wav(tmp_path / "long.wav", np.ones((1, 96_000), np.int16))  # 2 s
    write_frames(tmp_path / "long.mp4", [np.zeros((32, 32, 3), np.uint8)] * 50)  # 2 s
    processor = Processor(make_config(num_frames=2), make_tokenizer())
    sound, film = str(tmp_path / "long.wav"), str(tmp_path / "long.mp4")
    read = ClipReader(processor, 1.5)
    for clip, expected in (
        (Clip("a", sound, None, {None: ["x"]}), 0.5),
        (Clip("b", None, film, {None: ["x"]}), 0.5),
        (Clip("c", sound, film, {None: ["x"]}, seconds=2.0), 0.5),
        (Clip("d", sound, None, {None: ["x"]}, start=0.25), 0.25),
        (Clip("e", sound, None, {None: ["x"]}, start=0.25, end=9.0), 0.25),
        (Clip("f", sound, film, {None: ["x"]}, start=0.25, end=1.0), None),
        (Clip("g", sound, film, {None: ["x"]}, start=1.0), None),
    ):
        found = read(clip).get("cut")
        assert found == (None if expected is None else pytest.approx(expected, abs=0.05)), clip.id
    batch = Collate(processor)([read(Clip("a", sound, film, {None: ["x"]}))])
    assert batch["cut"] == [{"id": "a", "error": "its last 0.5 s were not read", "seconds": 0.5}]
    bad = BadItems(tmp_path, 1, 0.0)
    bad.add(1, cut=batch["cut"])
    bad.add(1, cut=batch["cut"])  # of the next epoch
    assert "1 clips are longer" in bad.cut_line() and '"a"' in (tmp_path / "cut_items.jsonl").read_text()
    assert ClipReader(processor, 30.0)(Clip("a", sound, film, {None: ["x"]})).get("cut") is None


def test_the_hash_of_a_manifest_is_that_of_its_rows(tmp_path):
    rows = [{"audio": f"{i}.wav", "caption": f"a dog {i}"} for i in range(3)]
    hashes = []
    for folder, lines in (("a", rows), ("b", rows), ("c", rows[::-1])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        hashes.append(read_manifest(tmp_path / folder / "x.jsonl").sha256())
    assert hashes[0] == hashes[1] != hashes[2]


def test_embeddings_that_have_no_rank_are_refused_by_name():
    flags = torch.ones(3, dtype=torch.bool)
    rows = torch.tensor([[0.0, 1.0], [0.0, torch.nan], [1.0, 0.0]])
    clips = EmbeddedClips({"audio": rows}, {"audio": flags}, {}, {}, ["x", "y", "z"], flags[:, None], 3, [], [], [])
    config = EvalConfig("runs/a/checkpoint", DataConfig(eval="set.jsonl"))
    with pytest.raises(ConfigError, match=r"runs/a/checkpoint: the audio embeddings of 1 clips of set.jsonl .*\(y\)"):
        check_embedded(clips, config)
    check_embedded(replace(clips, valid={"audio": torch.tensor([True, False, True])}), config)
    with pytest.raises(ConfigError, match=r"set.jsonl: none of its 3 clips"):
        check_embedded(replace(clips, ids=[]), config)
    with pytest.raises(ValueError, match="gallery is empty"):
        retrieval_ranks(torch.randn(3, 4), torch.randn(0, 4), torch.zeros(3, dtype=torch.int64))
