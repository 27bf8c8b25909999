"""Retrieval metrics against scikit-learn, torchmetrics and a float64 sort; ties, chance and errors; the reports."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread
from scipy.stats import binom
from sklearn.metrics import coverage_error, label_ranking_average_precision_score, top_k_accuracy_score
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalRecall

from pe_av.config import PAIRINGS
from pe_av.evaluation.figures import retrieval_metrics
from pe_av.evaluation.metrics import DIRECTIONS, evaluate_embeddings
from pe_av.evaluation.ranking import DotProducts, others_at_or_above, retrieval_ranks
from pe_av.evaluation.report import plot_losses, plot_similarity, print_table, write_metrics

# the public contract, written out by hand
CONTRACT = {
    "audio->text": ("audio", "text_audio"),
    "text->audio": ("text_audio", "audio"),
    "video->text": ("video", "text_video"),
    "text->video": ("text_video", "video"),
    "audio->video": ("audio", "video"),
    "video->audio": ("video", "audio"),
    "audio_video->text": ("audio_video", "text_audio_video"),
    "text->audio_video": ("text_audio_video", "audio_video"),
    "audio+text->video": ("audio_plus_text", "video"),
    "video->audio+text": ("video", "audio_plus_text"),
    "video+text->audio": ("video_plus_text", "audio"),
    "audio->video+text": ("audio", "video_plus_text"),
}
EIGHT = sorted({name for sides in CONTRACT.values() for name in sides})


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def noisy_pairs(items: int, width: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(items, width) queries and gallery that agree up to noise, so that ranks are neither all 1 nor random."""
    generator = torch.Generator().manual_seed(seed)
    gallery = torch.randn(items, width, generator=generator)
    queries = gallery + noise * torch.randn(items, width, generator=generator)
    return F.normalize(queries, dim=1), F.normalize(gallery, dim=1)


def brute_force_ranks(queries: Tensor, gallery: Tensor, target: Tensor) -> np.ndarray:
    """Ranks by sorting in float64; among equal scores the true item comes last."""
    scores = queries.double().numpy() @ gallery.double().numpy().T
    ranks = []
    for row, true in zip(scores, target.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda item: (-row[item], item == true))
        ranks.append(order.index(true) + 1)
    return np.array(ranks)


def test_directions_are_the_contract():
    assert CONTRACT == DIRECTIONS
    assert list(CONTRACT) == list(DIRECTIONS)


@pytest.mark.parametrize("items", [1, 2, 3, 17, 64, 301])
@pytest.mark.parametrize("noise", [0.0, 2.0, 50.0])
def test_ranks_equal_a_float64_sort(items: int, noise: float):
    queries, gallery = noisy_pairs(items, width=24, noise=noise)
    expected = brute_force_ranks(queries, gallery, torch.arange(items))
    ranks = retrieval_ranks(queries, gallery)
    assert ranks.dtype == torch.int64
    assert ranks.tolist() == expected.tolist()


def test_ranks_with_a_target_and_a_gallery_of_another_size():
    queries, gallery = torch.randn(200, 16), torch.randn(37, 16)
    target = torch.randint(37, (200,))
    assert retrieval_ranks(queries, gallery, target).tolist() == brute_force_ranks(queries, gallery, target).tolist()


@pytest.mark.parametrize("noise", [0.5, 4.0])
def test_metrics_equal_scikit_learn(noise: float):
    queries, gallery = noisy_pairs(150, width=20, noise=noise)
    metrics = retrieval_metrics(retrieval_ranks(queries, gallery), 150)
    scores, labels, eye = (queries @ gallery.T).numpy(), np.arange(150), np.eye(150, dtype=int)
    for k in (1, 5, 10):
        assert metrics[f"R@{k}"] == pytest.approx(100 * top_k_accuracy_score(labels, scores, k=k, labels=labels))
    # with one true item per query, average precision is 1 / rank, and coverage is the rank
    assert metrics["MRR"] == pytest.approx(label_ranking_average_precision_score(eye, scores))
    assert metrics["MeanR"] == pytest.approx(coverage_error(eye, scores))
    assert (metrics["queries"], metrics["gallery"]) == (150, 150)


def test_ties_equal_scikit_learn():
    """With few distinct items most scores tie; scikit-learn ranks ties last, too."""
    gallery = torch.randint(-1, 2, (90, 3)).float()  # small integers: scores are exact everywhere
    queries = torch.randint(-1, 2, (90, 3)).float()
    metrics = retrieval_metrics(retrieval_ranks(queries, gallery), 90)
    scores, eye = (queries @ gallery.T).numpy(), np.eye(90, dtype=int)
    assert metrics["MRR"] == pytest.approx(label_ranking_average_precision_score(eye, scores))
    assert metrics["MeanR"] == pytest.approx(coverage_error(eye, scores))


@pytest.mark.parametrize("noise", [0.5, 4.0])
def test_metrics_equal_torchmetrics(noise: float):
    items = 120
    queries, gallery = noisy_pairs(items, width=20, noise=noise, seed=1)
    metrics = retrieval_metrics(retrieval_ranks(queries, gallery), items)
    rows = torch.arange(items).repeat_interleave(items)
    scores = queries @ gallery.T + 2  # positive, because torchmetrics takes other scores for irrelevant
    reference = {"preds": scores.flatten(), "target": torch.eye(items).bool().flatten(), "indexes": rows}
    assert metrics["MRR"] == pytest.approx(RetrievalMRR()(**reference).item())
    for k in (1, 5, 10):
        assert metrics[f"R@{k}"] == pytest.approx(100 * RetrievalRecall(top_k=k)(**reference).item())
        assert metrics[f"R@{k}"] == pytest.approx(100 * RetrievalHitRate(top_k=k)(**reference).item())


@pytest.mark.parametrize("captions_of_a_clip", [1, 5])
@pytest.mark.parametrize("clips_of_a_caption", [1, 3])
def test_several_captions_and_shared_ones_equal_torchmetrics(captions_of_a_clip: int, clips_of_a_caption: int):
    """The best true item counts, and a caption is in the gallery once. Some clips have fewer captions."""
    clips, many = 60, captions_of_a_clip
    captions = torch.stack([torch.randperm(clips * many // clips_of_a_caption)[:many] for _ in range(clips)])
    if many > 1:
        captions[::7, many - 2 :] = -1
    count = int(captions.max()) + 3  # and two captions that no clip has
    true = torch.zeros(clips, count + 1, dtype=torch.bool).scatter_(1, captions % (count + 1), True)[:, :-1]
    media = torch.randn(clips, 24)
    texts = torch.randn(count, 24) + true.float().T @ media / true.sum(0)[:, None].clamp(min=1)
    has_sound = torch.arange(clips) % 5 > 0
    valid = {"audio": has_sound, "text_audio": torch.ones(clips, dtype=torch.bool)}
    embeds = {"audio": media, "text_audio": torch.full((clips, 24), torch.nan)}  # of first captions, which are not used
    metrics = evaluate_embeddings(embeds, valid, {"text_audio": texts}, captions)
    true = true[has_sound]
    used = true.any(0)
    scores, true = (media[has_sound] @ texts[used].T), true[:, used]
    scores = scores - scores.min() + 1  # positive, because torchmetrics takes other scores for irrelevant
    for direction, preds, target in (("audio->text", scores, true), ("text->audio", scores.T, true.T)):
        rows = torch.arange(len(preds))[:, None].expand_as(preds).flatten()
        reference = {"preds": preds.flatten(), "target": target.flatten(), "indexes": rows}
        row = metrics[direction]
        assert (row["queries"], row["gallery"]) == tuple(preds.shape)
        assert row["MRR"] == pytest.approx(RetrievalMRR()(**reference).item())
        for k in (1, 5, 10):
            assert row[f"R@{k}"] == pytest.approx(100 * RetrievalHitRate(top_k=k)(**reference).item())
        assert row["chance"] == pytest.approx(100 * target.double().mean().item())


def test_with_labels_for_captions_recall_is_the_accuracy_of_classifying():
    labels = torch.arange(200) % 12
    texts = torch.randn(12, 16)
    sounds = texts[labels] + 2 * torch.randn(200, 16)
    embeds = {"audio": sounds, "text_audio": texts[labels]}
    row = evaluate_embeddings(embeds, None, {"text_audio": texts}, labels[:, None])["audio->text"]
    for k in (1, 5, 10):
        expected = top_k_accuracy_score(labels, (sounds @ texts.T).numpy(), k=k, labels=np.arange(12))
        assert row[f"R@{k}"] == pytest.approx(100 * expected)
    assert row["gallery"] == 12 and row["chance"] == pytest.approx(100 / 12)


def test_metrics_by_hand():
    metrics = retrieval_metrics(torch.tensor([1, 5, 6, 10, 11, 20]), gallery_size=20)
    assert metrics == {
        "R@1": pytest.approx(100 / 6),
        "R@5": pytest.approx(200 / 6),
        "R@10": pytest.approx(400 / 6),
        "chance": 5.0,
        "MedR": 8.0,
        "MeanR": pytest.approx(53 / 6),
        "MRR": pytest.approx((1 + 1 / 5 + 1 / 6 + 1 / 10 + 1 / 11 + 1 / 20) / 6),
        "mAP@10": pytest.approx(100 * (1 + 1 / 5 + 1 / 6 + 1 / 10) / 6),
        "queries": 6,
        "gallery": 20,
    }


@pytest.mark.parametrize("items", [2, 5, 63, 200])
@pytest.mark.parametrize("width", [1, 7, 64, 129])
def test_a_collapsed_model_is_last_and_not_first(items: int, width: int):
    """Equal embeddings tie at every size, even if a matrix product rounds equal columns differently."""
    collapsed = torch.randn(1, width).expand(items, width).contiguous()
    for queries in (collapsed, torch.randn(items, width)):
        ranks = retrieval_ranks(queries, collapsed)
        assert ranks.tolist() == [items] * items
        assert retrieval_metrics(ranks, items)["R@1"] == 0


def test_an_item_ties_with_its_copies_and_beats_the_rest():
    items = F.normalize(torch.randn(40, 33), dim=1)
    gallery = torch.cat([items, items, items[:10]])  # items 0 … 9 are there three times, the others twice
    ranks = retrieval_ranks(items, gallery, target=torch.arange(40) + 40)
    assert ranks.tolist() == [3] * 10 + [2] * 30


def test_the_whole_score_matrix_never_exists():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                self.size = max(self.size, tensor.numel() if isinstance(tensor, Tensor) else 0)
            return result

    queries, gallery = torch.randn(1500, 4), torch.randn(400, 4)
    with Largest() as largest:
        others_at_or_above(DotProducts(queries, gallery), torch.randint(400, (1500, 1)), query_block=30, item_block=100)
    assert (
        largest.size <= 400 * 2 * 2 * 4
    )  # 32-bit halves of the elements, to find equal items; the scores are 30 × 100


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_precision_of_products_does_not_blur_the_ranks(precision: str):
    queries, gallery = noisy_pairs(200, width=64, noise=3.0)
    torch.set_float32_matmul_precision(precision)
    try:
        ranks = retrieval_ranks(queries, gallery)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert ranks.tolist() == brute_force_ranks(queries, gallery, torch.arange(200)).tolist()


def test_half_precision_and_autocast_do_not_blur_the_ranks():
    queries, gallery = noisy_pairs(300, width=32, noise=3.0)
    queries, gallery = queries.bfloat16(), gallery.bfloat16()
    expected = brute_force_ranks(queries, gallery, torch.arange(300))
    with torch.autocast("cpu", torch.bfloat16):
        assert retrieval_ranks(queries, gallery).tolist() == expected.tolist()


def test_random_embeddings_are_at_chance():
    queries, gallery = torch.randn(5000, 32), torch.randn(200, 32)
    metrics = retrieval_metrics(retrieval_ranks(queries, gallery, torch.randint(200, (5000,))), 200)
    for k in (1, 5, 10):
        low, high = binom.interval(0.9999, 5000, k / 200)
        assert low <= metrics[f"R@{k}"] / 100 * 5000 <= high
    assert metrics["MedR"] == pytest.approx(100.5, abs=5)


def test_intervals_of_clips_that_share_captions_are_those_of_clips():
    """Of 600 clips with one of three labels: the width is that of a share of 600 independent ones."""
    labels = torch.arange(600) % 3
    texts = torch.eye(3, 8)
    clips = texts[labels] + 0.8 * torch.randn(600, 8)
    found = evaluate_embeddings(
        {"audio": clips, "text_audio": texts[labels]},
        texts={"text_audio": texts},
        captions=labels[:, None],
        intervals=True,
    )["audio->text"]
    share = found["R@1"] / 100
    assert 0.5 < share < 0.95
    low, high = found["ci95"]["R@1"]
    assert high - low == pytest.approx(2 * 1.96 * 100 * (share * (1 - share) / 600) ** 0.5, rel=0.15)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_refused(value: float):
    bad, good = torch.randn(6, 4), torch.randn(6, 4)
    bad[3, 1] = value
    with pytest.raises(ValueError, match="queries: 1 of 6 .* row 3"):
        retrieval_ranks(bad, good)
    with pytest.raises(ValueError, match="gallery: 1 of 6 .* row 3"):
        retrieval_ranks(good, bad)
    with pytest.raises(ValueError, match="audio->video: gallery: 1 of 6"):
        evaluate_embeddings({"audio": good, "video": bad})


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="need a target"):
        retrieval_ranks(torch.randn(3, 4), torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"\(3, 4\) and gallery \(3, 5\)"):
        retrieval_ranks(torch.randn(3, 4), torch.randn(3, 5))
    with pytest.raises(ValueError, match="outside 0 … 2"):
        retrieval_ranks(torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="outside 0 … 2"):
        retrieval_ranks(torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, -1, 2]))
    with pytest.raises(ValueError, match=r"target \(2,\) is not \(Q,\)"):
        retrieval_ranks(torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="no ranks"):
        retrieval_metrics(torch.empty(0, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match="outside 1 … 5"):
        retrieval_metrics(torch.tensor([1, 6]), 5)
    with pytest.raises(ValueError, match="unknown embeddings audio_embeds"):
        evaluate_embeddings({"audio_embeds": torch.randn(3, 4)})
    with pytest.raises(ValueError, match="different numbers of clips: 3 audio, 4 video"):
        evaluate_embeddings({"audio": torch.randn(3, 4), "video": torch.randn(4, 4)})


def test_each_direction_reads_its_own_two_embeddings():
    """Every embedding has different noise, so that swapped sides are noticed."""
    shared = torch.randn(80, 16)
    embeds = {name: shared + (0.5 + 0.3 * i) * torch.randn(80, 16) for i, name in enumerate(EIGHT)}
    metrics = evaluate_embeddings(embeds)
    assert list(metrics) == list(CONTRACT)
    for direction, (query, gallery) in CONTRACT.items():
        expected = retrieval_metrics(retrieval_ranks(embeds[query], embeds[gallery]), 80)
        assert metrics[direction] == expected
    assert len({row["MeanR"] for row in metrics.values()}) == 12


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ({"audio", "video"}, {"audio->video", "video->audio"}),
        ({"audio", "text_video"}, set()),
        (
            {"audio", "video", "audio_plus_text"},
            {"audio->video", "video->audio", "audio+text->video", "video->audio+text"},
        ),
    ],
)
def test_directions_without_both_sides_are_left_out(present: set[str], expected: set[str]):
    assert evaluate_embeddings({name: torch.randn(4, 3) for name in present}).keys() == expected


# ---------------------------------------------------------------------------------------------------------------------
# reports


@pytest.fixture(scope="module")
def metrics() -> dict[str, dict[str, float | int]]:
    generator = torch.Generator().manual_seed(0)
    return evaluate_embeddings({name: torch.randn(256, 8, generator=generator) for name in EIGHT})


def test_the_table_shows_every_direction_and_chance(metrics, capsys):
    print_table(metrics)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for direction, row in metrics.items():
        (line,) = [line for line in lines if line.split()[:1] == [direction]]
        assert line.split()[1:4] == [f"{row['R@1']:.1f}", "0.39", f"{row['R@5']:.1f}"]  # 100 / 256


def test_written_metrics_read_back(metrics, tmp_path, capsys):
    path = tmp_path / "run" / "metrics.json"
    write_metrics(path, metrics, step=250, checkpoint="runs/a")
    read = json.loads(path.read_text(encoding="utf-8"))
    assert read["text->audio"]["R@1"] == metrics["text->audio"]["R@1"]
    assert read == metrics | {"step": 250, "checkpoint": "runs/a"}
    print_table(read)  # extra keys are ignored
    assert "audio->video+text" in capsys.readouterr().out


def test_metrics_that_cannot_be_written_leave_the_old_file(metrics, tmp_path):
    path = tmp_path / "metrics.json"
    write_metrics(path, metrics)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_metrics(path, metrics, loss=float("nan"))
    with pytest.raises(ValueError, match="text->audio"):
        write_metrics(path, metrics, **{"text->audio": 1})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("steps", [1, 2, 200])
def test_losses_are_drawn(steps: int, tmp_path):
    history = [
        {"step": i, "loss": 6 / i, "lr": 0.1} | {f"{name}_loss": 1 / i for name in PAIRINGS}
        for i in range(1, steps + 1)
    ]
    del history[0]["audio_text_loss"]
    plot_losses(history, tmp_path / "alone.png")
    plot_losses(history, tmp_path / "both.png", [{"step": steps, "R@1/text->audio": 40.0}])
    alone, both = imread(tmp_path / "alone.png"), imread(tmp_path / "both.png")
    assert both.shape[1] > 1.5 * alone.shape[1]  # the second panel
    assert alone.std() > 0.01 and both.std() > 0.01


def test_similarity_is_drawn_with_its_diagonal(tmp_path):
    embeds = {name: torch.eye(16) for name in EIGHT}
    plot_similarity(embeds, tmp_path / "all.png")
    plot_similarity({"audio": embeds["audio"], "video": embeds["video"]}, tmp_path / "two.png", limit=1)
    image = imread(tmp_path / "all.png")[..., :3]
    dark_red = (image[..., 0] > 0.3) & (image[..., 1:].max(-1) < 0.2)
    assert dark_red.mean() > 6 * 16 * 400 / dark_red.size  # 16 diagonal cells in each of six matrices, 20+ pixels wide
