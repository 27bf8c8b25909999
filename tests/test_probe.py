"""Probes against classifiers written out in numpy, and on files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp
from test_classification import corpus  # noqa: F401 (a fixture)

from pe_av.config import ConfigError
from pe_av.config.compose import from_dict
from pe_av.config.evaluation import ProbeConfig
from pe_av.evaluation.probe import held_out_of, probe, probe_checkpoint


def world(seed: int, clips: int, classes: int = 3, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Noisy clusters, of other sizes and at other scales in every direction."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(classes, width))
    labels = random.integers(0, classes, clips)
    embeds = (centres[labels] + 0.9 * random.normal(size=(clips, width))) * [1, 10, 0.1, 3, 1] + 4
    return embeds, np.array(["dog", "rain", "bell", "wind"])[labels]


def fitted(embeds: np.ndarray, labels: np.ndarray, strength: float):
    """Weights of ½‖W‖² + C Σ −log p, found by a general minimizer; the biases are free. Returns the predictor."""
    names, mean, spread = np.unique(labels), embeds.mean(0), embeds.std(0)
    x, y = (embeds - mean) / spread, labels[:, None] == names

    def loss(flat: np.ndarray) -> float:
        weights, bias = flat.reshape(len(names), -1)[:, :-1], flat.reshape(len(names), -1)[:, -1]
        logits = x @ weights.T + bias
        return 0.5 * (weights**2).sum() + strength * (logsumexp(logits, axis=1) - logits[y]).sum()

    best = minimize(loss, np.zeros(len(names) * (embeds.shape[1] + 1)), method="L-BFGS-B", options={"maxfun": 10**6})
    found = best.x.reshape(len(names), -1)
    return lambda new: names[(((new - mean) / spread) @ found[:, :-1].T + found[:, -1]).argmax(1)]


def voted(embeds: np.ndarray, labels: np.ndarray, new: np.ndarray, k: int) -> np.ndarray:
    unit, other = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (embeds, new))
    result = []
    for row in other:
        names, votes = np.unique(labels[np.argsort(-(unit @ row), kind="stable")[:k]], return_counts=True)
        result.append(names[votes.argmax()])
    return np.array(result)


def test_both_probes_are_what_their_formulas_say():
    (x, y), (new, truth) = world(0, 150), world(1, 60)
    config = ProbeConfig("x", inverse_regularization=[10.0, 0.001, 0.1], neighbours=[1, 5, 40])
    found = probe((x, y), (new, truth), config)
    held = held_out_of(y, 0.2, 0)
    scores = {c: (fitted(x[~held], y[~held], c)(x[held]) == y[held]).mean() for c in (0.001, 0.1, 10.0)}
    best = max(scores, key=scores.get)  # the first, of equals
    assert found["linear"]["inverse_regularization"] == best
    assert found["linear"]["validation"] == pytest.approx(100 * scores[best])
    right = fitted(x, y, best)(new) == truth
    assert found["linear"]["top-1"] == pytest.approx(100 * right.mean()) and found["linear"]["converged"]
    recalls = [right[truth == name].mean() for name in np.unique(truth)]
    assert found["linear"]["mean per class"] == pytest.approx(100 * np.mean(recalls))
    assert found["linear"]["top-5"] == 100  # of three classes
    scores = {k: (voted(x[~held], y[~held], x[held], k) == y[held]).mean() for k in (40, 5, 1)}
    k = max(scores, key=scores.get)
    assert found["neighbours"]["k"] == k and found["neighbours"]["validation"] == pytest.approx(100 * scores[k])
    assert found["neighbours"]["top-1"] == pytest.approx(100 * (voted(x, y, new, k) == truth).mean())


def test_the_held_out_clips_are_of_every_class_and_never_all_of_one():
    labels = np.array(["a"] * 10 + ["b"] * 5 + ["c"] * 2 + ["d"])
    for seed in range(5):
        held = held_out_of(labels, 0.4, seed)
        assert {name: int(held[labels == name].sum()) for name in "abcd"} == {"a": 4, "b": 2, "c": 0, "d": 0}
    assert int(held_out_of(labels, 0.99, 0).sum()) == 9 + 4 + 1
    assert not np.array_equal(held_out_of(labels, 0.4, 0), held_out_of(labels, 0.4, 1))


def test_a_class_that_was_not_trained_on_is_wrong():
    (x, y), (new, truth) = world(0, 90), world(1, 30)
    truth[:10] = "unheard of"
    found = probe((x, y), (new, truth), ProbeConfig("x", inverse_regularization=[1.0], neighbours=[5]))
    assert found["linear"]["top-5"] == pytest.approx(100 * 20 / 30)
    assert found["linear"]["top-1"] <= 100 * 20 / 30


def probe_settings(corpus: Path, **changes) -> ProbeConfig:  # noqa: F811
    data = {"eval": str(corpus / "clips.jsonl"), "num_workers": 0} | changes.pop("data", {})
    values = {"checkpoint": str(corpus / "checkpoint"), "data": data, "device": "cpu", "modalities": ["audio"]}
    return from_dict(ProbeConfig, values | {"validation": 0.5, "neighbours": [1]} | changes, source="test")


def test_folds_are_tested_once_each(corpus: Path, tmp_path: Path):  # noqa: F811
    rows = [json.loads(line) for line in (corpus / "clips.jsonl").read_text().splitlines()][:8]
    for number, row in enumerate(rows):  # each sound in both folds: its nearest neighbour is itself
        row.update(audio=str(corpus / row["audio"]), split="fold1", caption=("dog", "rain")[number % 2])
    twins = [row | {"id": f"{row['id']} again", "split": "fold2"} for row in rows]
    same = tmp_path / "same.jsonl"  # a file in two folds would be tested by a probe that was trained on it
    same.write_text("".join(json.dumps(row) + "\n" for row in rows + twins))
    with pytest.raises(ConfigError, match="the clip .* again is in the splits fold1 and fold2"):
        probe_checkpoint(probe_settings(corpus, data={"eval": str(same)}), tmp_path / "out")
    halves = {"train": str(same), "train_split": "fold1", "eval": str(same), "eval_split": "fold2"}
    with pytest.raises(ConfigError, match="8 clips, such as .* again, are in the training and the test set"):
        probe_checkpoint(probe_settings(corpus, data=halves), tmp_path / "out")
    for number, row in enumerate(twins):
        row["audio"] = str(shutil.copy(row["audio"], tmp_path / f"copy{number}.wav"))
    (tmp_path / "folds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + twins))
    found = probe_checkpoint(probe_settings(corpus, data={"eval": str(tmp_path / "folds.jsonl")}), tmp_path / "out")
    assert found["audio"]["neighbours"]["top-1"] == 100 and found["audio"]["neighbours"]["standard deviation"] == 0
    assert set(found["audio"]["linear"]["folds"]) == {"fold1", "fold2"}
    values = [fold["top-1"] for fold in found["audio"]["linear"]["folds"].values()]
    assert found["audio"]["linear"]["top-1"] == pytest.approx(np.mean(values))
    assert json.loads((tmp_path / "out/metrics.json").read_text())["audio"] == found["audio"]

    split = {"train": str(tmp_path / "folds.jsonl"), "train_split": "fold1", "eval_split": "fold2"}
    split["eval"] = split["train"]
    found = probe_checkpoint(probe_settings(corpus, data=split), tmp_path / "out")
    assert found["audio"]["neighbours"]["top-1"] == 100
    assert found["audio"]["data"] == {
        "training_clips": 8, "test_clips": 8, "classes": 2, "classes_without_training_clips": [],
    }  # fmt: skip


def test_what_cannot_be_probed_is_named(corpus: Path, tmp_path: Path, monkeypatch):  # noqa: F811
    clips = str(corpus / "clips.jsonl")
    both = {"id": "x", "audio": str(corpus / "0.wav"), "caption": ["dog", "rain"], "split": "a"}
    (tmp_path / "both.jsonl").write_text(
        "".join(json.dumps(both | {"id": i, "split": i, "end": ord(i)}) + "\n" for i in "ab")
    )
    for data, message in (
        ({"train": clips}, "clips.jsonl: 10 clips, such as clip 0, are in the training and the test set"),
        ({"eval_split": "fold1"}, "data.train is not set, and the clips of .*clips.jsonl are of 1 splits, too few"),
        ({"eval": str(tmp_path / "both.jsonl")}, "both.jsonl: 2 clips, such as a, have several labels"),
    ):
        with pytest.raises(ConfigError, match=message):
            probe_checkpoint(probe_settings(corpus, data=data), tmp_path / "out")
    with monkeypatch.context() as without:
        without.setattr("pe_av.evaluation.probe.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"probes need the library scikit-learn; pip install 'pe-av\[eval\]'"):
            probe_checkpoint(probe_settings(corpus), tmp_path / "out")
    with pytest.raises(ConfigError, match="the 4 training clips have fewer than two classes"):
        probe((np.ones((4, 2)), np.array(["a"] * 4)), (np.ones((1, 2)), np.array(["a"])), ProbeConfig("x"))
    with pytest.raises(ConfigError, match="validation=0.2 of 2 training clips leaves none"):
        probe((np.ones((2, 2)), np.array(["a", "b"])), (np.ones((1, 2)), np.array(["a"])), ProbeConfig("x"))
