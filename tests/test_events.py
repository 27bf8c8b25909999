"""Figures of event localization against sed_scores_eval, whose results are kept here, and against plain loops."""

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize, small_config
from sklearn.metrics import roc_auc_score
from test_processor import make_tokenizer

from pe_av import Processor, build_model, load_model, save_model
from pe_av.config import (
    AudioConfig,
    CodecConfig,
    ConfigError,
    PEAudioFrameConfig,
    SpanDemoConfig,
    TextConfig,
    TransformerConfig,
)
from pe_av.config.evaluation import LocalizeConfig
from pe_av.data.span_demo import prepare_span_demo
from pe_av.data.spans import read_span_manifest
from pe_av.evaluation.events import event_metrics, largest_matching, merge_spans, plot_recordings
from pe_av.evaluation.localization import localization_metrics, localize_checkpoint

STEP = 0.04

# What sed_scores_eval 0.0.4 gives for `recordings(seed)` (with pandas 2.3: it fails with 3): collar_based.fscore and
# best_fscore with collars of 0.2 s and 20 %, and intersection_based.psds with equal thresholds, alpha_ct=alpha_st=0.
LIBRARY = [
    {"event F1": 66.66666666666667, "best event F1": 73.4375, "PSDS 0.7": 76.01254246145807, "PSDS 0.1": 100.0},
    {"event F1": 69.6629213483146, "best event F1": 72.94117647058823,
     "PSDS 0.7": 98.52071005917159, "PSDS 0.1": 100.0},
    {"event F1": 9.352517985611511, "best event F1": 16.3265306122449, "PSDS 0.7": 0.0, "PSDS 0.1": 34.588634435962675},
    {"event F1": 7.352941176470587, "best event F1": 19.53488372093023,
     "PSDS 0.7": 1.7551198919926223, "PSDS 0.1": 34.136416360835916},
]  # fmt: skip


def recordings(seed: int) -> tuple[list[torch.Tensor], list[list[tuple[float, float]]]]:
    """Thirty recordings of 2.4 to 8 s, a fifth of them without a span; later seeds have a worse model."""
    random = np.random.default_rng(seed)
    scores, spans = [], []
    for number in range(30):
        length = int(random.integers(60, 200))
        true, at = [], random.uniform(0, 2)
        while at < length * STEP - 0.5 and number % 5:
            end = min(at + random.uniform(0.3, 2.5), length * STEP)
            true.append((float(at), float(end)))
            at = end + random.uniform(0.3, 2)
        middle = (np.arange(length) + 0.5) * STEP
        inside = sum(((a <= middle) & (middle < b)) for a, b in true) if true else np.zeros(length)
        noise = np.convolve(random.normal(size=length + 8), np.ones(9) / 9, "valid")
        logit = (3.2 if seed < 2 else 1.2) * (inside - 0.5) + 2.2 * noise
        scores.append(torch.from_numpy(np.round(1 / (1 + np.exp(-logit)), 2 + seed % 2)))
        spans.append(true)
    return scores, spans


@pytest.mark.parametrize("seed", range(4))
def test_figures_are_those_of_sed_scores_eval(seed: int):
    found = event_metrics(*recordings(seed), STEP, threshold=0.5)
    for name, value in LIBRARY[seed].items():
        assert found[name] == pytest.approx(value, rel=1e-12, abs=1e-12), name


def counted(score: list[float], true: list[tuple[float, float]], threshold: float, rho: float) -> tuple[int, ...]:
    """Detections, matched ones, wrong ones and found spans, by loops over positions and all ways to match."""
    detections, t = [], 0
    while t < len(score):
        if score[t] >= threshold:
            begin = t
            while t < len(score) and score[t] >= threshold:
                t += 1
            detections.append((begin * STEP, t * STEP))
        t += 1

    def fits(d, s):
        return abs(d[0] - s[0]) <= 0.2 + 1e-6 and abs(d[1] - s[1]) <= max(0.2, 0.2 * (s[1] - s[0])) + 1e-6

    # every way to give each of the fewer a different one of the more
    swap = len(detections) > len(true)
    few, many = (true, detections) if swap else (detections, true)
    ways = permutations(many, len(few))
    pairs = max(sum(fits(b, a) if swap else fits(a, b) for a, b in zip(few, way, strict=True)) for way in ways)

    def common(a, b):
        return max(0.0, min(a[1], b[1]) - max(a[0], b[0]))

    right = [d for d in detections if sum(common(d, s) for s in true) >= rho * (d[1] - d[0]) - 1e-6]
    found = [s for s in true if sum(common(d, s) for d in right) >= rho * (s[1] - s[0]) - 1e-6]
    return len(detections), pairs, len(detections) - len(right), len(found)


@pytest.mark.parametrize("levels", [2, 4, 1000])  # with few, most scores are equal
def test_figures_are_those_of_plain_loops(levels: int):
    random = np.random.default_rng(levels)
    scores = [np.round(random.random(n) * levels) / levels for n in (14, 9, 1, 12)]
    spans = [[(0.07, 0.19), (0.3, 0.41)], [], [(0.0, 0.04)], [(0.12, 0.36), (0.37, 0.48)]]
    found = event_metrics([torch.from_numpy(s) for s in scores], spans, STEP, threshold=0.5)
    every = sorted({value for score in scores for value in score.tolist()}, reverse=True)
    events, hours = 5, sum(map(len, scores)) * STEP / 3600
    f1 = {}
    curves: dict[float, list[tuple[float, float]]] = {0.7: [], 0.1: []}
    for threshold in every:
        for rho, curve in curves.items():
            counts = [counted(s.tolist(), t, threshold, rho) for s, t in zip(scores, spans, strict=True)]
            detections, pairs, wrong, right = (sum(column) for column in zip(*counts, strict=True))
            f1[threshold] = 200 * pairs / (detections + events)
            curve.append((wrong / hours, right / events))
    assert found["best event F1"] == pytest.approx(max(f1.values()))
    assert f1[found["best event threshold"]] == pytest.approx(max(f1.values()))
    above = [threshold for threshold in every if threshold > 0.5]
    assert found["event F1"] == pytest.approx(f1[above[-1]] if above else 0)
    grid = (np.arange(100_000) + 0.5) / 1000  # 0 … 100 wrong detections per hour
    for rho, curve in curves.items():
        best = np.zeros(len(grid))
        for at, share in curve:
            best = np.maximum(best, np.where(grid >= at, share, 0))
        assert found[f"PSDS {rho}"] == pytest.approx(100 * best.mean(), abs=0.01)


def test_the_largest_matching_is_found_where_the_first_fit_is_not():
    fits = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1]], dtype=bool)
    best = max(sum(fits[row, column] for column, row in enumerate(rows)) for rows in permutations(range(4), 3))
    assert largest_matching(fits) == best == 3
    for seed in range(30):
        fits = np.random.default_rng(seed).random((5, 4)) < 0.4
        best = max(sum(fits[row, column] for column, row in enumerate(rows)) for rows in permutations(range(5), 4))
        assert largest_matching(fits) == best


def test_a_perfect_model_and_a_silent_one():
    spans = [[(0.4, 1.2)], [(0.0, 0.8), (2.0, 9.0)], []]  # the last of the second reaches beyond its recording
    perfect = [torch.zeros(50) for _ in spans]
    for score, true in zip(perfect, spans, strict=True):
        for start, end in true:
            score[round(start / STEP) : round(end / STEP)] = 0.9
    found = event_metrics(perfect, spans, STEP, 0.5)
    assert found["event F1"] == found["best event F1"] == 100 and found["events"] == 2
    assert found["PSDS 0.7"] == found["PSDS 0.1"] == pytest.approx(100)
    found = event_metrics([torch.zeros(50)] * 3, spans, STEP, 0.5)
    assert found["event F1"] == 0 and found["PSDS 0.7"] == 0
    assert event_metrics([torch.rand(50)], [[]], STEP, 0.5) == {"events": 0}
    assert merge_spans([(3, 4), (-1, 1), (0.5, 2), (2, 2.5), (4.5, float("inf")), (7, 8)], 6) == [
        (0.0, 2.5), (3, 4), (4.5, 6),
    ]  # fmt: skip


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_scikit_learns(ties: bool):
    targets = [torch.rand(length) < 0.4 for length in (30, 50, 7)] + [torch.zeros(9).bool(), torch.ones(4).bool()]
    scores = [(torch.rand(len(t)) * 5).round() / 5 if ties else torch.rand(len(t)) for t in targets]
    found = localization_metrics(scores, targets, threshold=0.5)
    areas = [roc_auc_score(t.numpy(), s.numpy()) for t, s in zip(targets[:3], scores[:3], strict=True)]
    assert found["AUROC"] == pytest.approx(100 * np.mean(areas), rel=1e-12)
    pooled = roc_auc_score(torch.cat(targets).numpy(), torch.cat(scores).numpy())
    assert found["pooled AUROC"] == pytest.approx(100 * pooled, rel=1e-12)
    alone = localization_metrics(scores[3:4], targets[3:4], threshold=0.5)
    assert "AUROC" not in alone and "pooled AUROC" not in alone


def test_the_picture_has_every_recording(tmp_path: Path):
    one = {"caption": "a bell", "waveform": torch.randn(9600), "sampling_rate": 48_000, "scores": torch.rand(5)}
    silence = one | {"waveform": torch.zeros(9600), "spans": []}
    plot_recordings([one | {"spans": [[0.05, 0.1]]}, silence], STEP, 0.5).savefig(tmp_path / "two.png")
    plot_recordings([silence], STEP, 0.5).savefig(tmp_path / "one.png")
    width = {name: int.from_bytes((tmp_path / name).read_bytes()[16:20], "big") for name in ("one.png", "two.png")}
    assert width["two.png"] == 2 * width["one.png"]


def test_the_command_gives_the_figures_of_recordings_one_by_one(tmp_path: Path):
    demo = SpanDemoConfig(str(tmp_path / "demo"), train_clips=1, eval_clips=5)
    clips = read_span_manifest(prepare_span_demo(demo)[1])
    text = TextConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0,
        nth_text_layer=1, max_tokens=32, max_position_embeddings=32, local_attention=8,
    )  # fmt: skip
    tower = TransformerConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16
    )
    config = PEAudioFrameConfig(text=text, audio=AudioConfig(CodecConfig(encoder_hidden_size=2), tower), output_dim=16)
    model = randomize(build_model(config))
    save_model(model, tmp_path / "checkpoint")
    Processor(config, make_tokenizer()).save_pretrained(tmp_path / "checkpoint")
    settings = LocalizeConfig(
        str(tmp_path / "checkpoint"), demo=demo, threshold=0.4, num_workers=0, batch_size=2, device="cpu", max_seconds=5
    )
    found = localize_checkpoint(settings, tmp_path / "out")

    processor, model = Processor.from_pretrained(tmp_path / "checkpoint"), load_model(tmp_path / "checkpoint")
    scores, targets = [], []
    for clip in clips:
        sound = processor.audio_item(clip.audio, max_seconds=5)
        with torch.inference_mode():
            out = model(**processor(text=[clip.caption], audio=[sound], sampling_rate=48_000))
        scores.append(out.logits[0].sigmoid())
        middle = (torch.arange(out.logits.shape[1]) + 0.5) * STEP
        targets.append(torch.stack([(start <= middle) & (middle < end) for start, end in clip.spans]).any(0))
    assert len(scores[0]) == 125  # what is beyond max_seconds is not evaluated
    expected = localization_metrics(scores, targets, 0.4)
    expected |= event_metrics(scores, [clip.spans for clip in clips], STEP, 0.4)
    assert found == pytest.approx(expected, rel=1e-4) and found["recordings"] == 5
    written = json.loads((tmp_path / "out/metrics.json").read_text())
    assert {name: written[name] for name in found} == found and written["threshold"] == 0.4
    assert (tmp_path / "out/spans.png").exists()


def test_only_a_frame_level_model_can_localize(tmp_path: Path):
    model = build_model(small_config())
    save_model(model, tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match="checkpoint is no PEAudioFrame"):
        localize_checkpoint(LocalizeConfig(str(tmp_path / "checkpoint"), device="cpu"), tmp_path / "out")
