"""The frame-level objective and figures against sums written out and scikit-learn, and a short run on the demo."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import Command
from sklearn.metrics import average_precision_score, f1_score, jaccard_score

from pe_av import PEAudioFrame, load_model
from pe_av.config import ConfigError, SpanDemoConfig
from pe_av.data.span_demo import prepare_span_demo
from pe_av.data.spans import SpanClip, read_span_manifest
from pe_av.evaluation.localization import localization_metrics
from pe_av.media.audio import read_audio
from pe_av.training.span_loss import span_loss


def test_loss_is_the_sum_that_its_formula_says():
    """Three recordings of 4, 2 and 3 frames, the captions of the first and last equal; every term by itself."""
    audio, text = torch.randn(3, 4, 5, dtype=torch.float32), torch.randn(3, 5)
    scale, bias, captions = torch.tensor([0.7]), torch.tensor([-0.3]), torch.tensor([8, 2, 8])
    lengths, targets = (4, 2, 3), torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 1, 1]]).bool()
    mask = torch.tensor([[step < length for step in range(4)] for length in lengths])
    expected, frames = 0.0, 0
    for i in range(3):
        for t in range(lengths[i]):
            frames += 1
            for j in range(3):
                if i != j and captions[i] == captions[j]:
                    continue
                z = 1 if i == j and targets[i, t] else -1
                logit = 0.7 * sum(a * b for a, b in zip(audio[i, t].tolist(), text[j].tolist(), strict=True)) - 0.3
                expected += math.log1p(math.exp(-z * logit))
    assert span_loss(audio, text, scale, bias, targets, mask, captions).item() == pytest.approx(
        expected / frames, rel=1e-5
    )


def test_what_is_not_counted_has_no_gradient():
    audio = torch.randn(2, 3, 4, requires_grad=True)
    text = torch.randn(2, 4)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    targets, one = torch.ones(2, 3, dtype=torch.bool), torch.ones(1)
    span_loss(audio, text, one, one, targets, mask, torch.tensor([1, 1])).backward()
    assert not audio.grad[0, 2].any() and audio.grad[0, 1].any() and audio.grad[1].any(dim=1).all()


@pytest.mark.parametrize("ties", [False, True])
def test_figures_are_scikit_learns(ties: bool):
    targets = [torch.rand(length) < 0.4 for length in (30, 50, 7)]
    scores = [(torch.rand(len(t)) * 10).round() / 10 if ties else torch.rand(len(t)) for t in targets]
    found = localization_metrics(scores, targets, threshold=0.5)
    precision = [average_precision_score(t.numpy(), s.numpy()) for t, s in zip(targets, scores, strict=True)]
    marked = [s > 0.5 for s in scores]
    assert found["AP"] == pytest.approx(100 * sum(precision) / 3)
    assert found["F1"] == pytest.approx(100 * f1_score(torch.cat(targets).numpy(), torch.cat(marked).numpy()))
    every, frames = torch.cat(scores).numpy(), torch.cat(targets).numpy()
    f1 = {threshold: f1_score(frames, every >= threshold) for threshold in every}
    assert found["best F1"] == pytest.approx(100 * max(f1.values()))
    assert f1[found["best threshold"]] == pytest.approx(max(f1.values()))
    unions = [jaccard_score(t.numpy(), m.numpy()) for t, m in zip(targets, marked, strict=True)]
    assert found["IoU"] == pytest.approx(100 * sum(unions) / 3)


def test_demo_asks_for_what_is_where_it_says(tmp_path: Path):
    """Two sounds in a quiet room, one of them in the span; no combination is asked for in both sets."""
    manifests = prepare_span_demo(SpanDemoConfig(str(tmp_path), train_clips=12, eval_clips=8))
    train, held_out = ([json.loads(line) for line in m.read_text().splitlines()] for m in manifests)
    assert (len(train), len(held_out)) == (12, 8)
    assert not {line["caption"] for line in train} & {line["caption"] for line in held_out}
    for line in train + held_out:
        ((start, end),) = line["spans"]
        assert end - start == pytest.approx(1.6) and 0 <= start < end <= 6.4 and line["caption"] != line["other"]
        sound, rate = read_audio(tmp_path / manifests[0].parent.name / line["path"])
        level = sound[0].square().reshape(-1, rate // 10).mean(1).sqrt()  # of each tenth of a second
        inside = torch.arange(len(level)) / 10
        assert level[(inside >= start) & (inside < end)].max() > 0.02
        assert (level < 0.006).sum() >= 20  # two sounds leave 3.2 s, and place noise is theirs alone
    assert prepare_span_demo(SpanDemoConfig(str(tmp_path), train_clips=12, eval_clips=8)) == manifests


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Command]:
    return lambda *overrides: Command(tmp_path, "pe_av.training.frame", *overrides).wait(1200)


def test_a_run_leaves_everything_that_is_promised(tmp_path: Path, run):
    demo = [
        f"demo.root={tmp_path}/demo",
        "demo.train_clips=8",
        "demo.eval_clips=6",
        "model.audio.codec.encoder_hidden_size=2",
    ]
    done = run(*demo, "steps=2", "batch_size=4", "optim.ema=0.5", f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "best", "checkpoint", "config.yaml", "history.jsonl", "loss.png", "metrics.json", "spans.png", "state",
        "tensorboard",
    }  # fmt: skip
    assert set(json.loads((tmp_path / "run/metrics.json").read_text())) == {
        "AP", "AUROC", "F1", "IoU", "PSDS 0.1", "PSDS 0.7", "bad_items", "best F1", "best event F1",
        "best event threshold", "best threshold", "chance AP", "cut_items", "event F1", "events", "loss",
        "partial_items", "pooled AUROC", "recordings", "step",
    }  # fmt: skip
    assert isinstance(load_model(tmp_path / "run/checkpoint"), PEAudioFrame)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"path": "a.wav", "caption": "x"}', "train.jsonl:1: not"),
        ('{"path": "a.wav", "caption": "x", "spans": [[2, 1]]}', "with start < end"),
        ('{"path": "nowhere.wav", "caption": "x", "spans": [[0, 1]]}', "nowhere.wav"),
    ],
)
def test_a_manifest_that_is_none_costs_one_line(tmp_path: Path, line: str, message: str, run):
    (tmp_path / "train.jsonl").write_text(line + "\n")
    manifests = [f"{split}={tmp_path}/train.jsonl" for split in ("train", "eval")]
    done = run(*manifests, f"hydra.run.dir={tmp_path}/run", "batch_size=1")
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_lines_end_at_newlines_alone_and_blank_ones_are_none(tmp_path: Path):
    caption = "one\u2028two\x85three"
    lines = [
        {"path": "a.wav", "caption": caption, "spans": [[0, 1], [2.5, 3]]},
        {"path": "b.wav", "caption": "x", "spans": []},
    ]
    text = "\r\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "m.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\n \n")
    first, second = read_span_manifest(tmp_path / "m.jsonl")
    assert first == SpanClip("1:a.wav", f"{tmp_path}/a.wav", caption, [[0.0, 1.0], [2.5, 3.0]])
    assert second == SpanClip("3:b.wav", f"{tmp_path}/b.wav", "x", [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": ""}, "m.jsonl:2: not"),
        ({"path": 3}, "m.jsonl:2: not"),
        ({"caption": " "}, "m.jsonl:2: not"),
        ({"caption": "\ud800"}, "m.jsonl:2: '.ud800' is not UTF-8"),
        ({"spans": "12"}, "m.jsonl:2: not"),
        ({"spans": ["12"]}, "m.jsonl:2: not"),
        ({"spans": [["1", "2"]]}, "m.jsonl:2: not"),
        ({"spans": {"12": 0}}, "m.jsonl:2: not"),
        ({"spans": [{"1": 0, "2": 0}]}, "m.jsonl:2: not"),
        ({"spans": [[0, 10**400]]}, "m.jsonl:2: not"),
        ({"spans": [[math.nan, 1]]}, "m.jsonl:2: not"),
        (b"[" * 100_000, "m.jsonl:2: not JSON"),
        (b'{"path": "a.wav", "caption": "caf\xe9", "spans": []}', "m.jsonl:2: 'caf.udce9' is not UTF-8"),
        (b'["path", "caption", "spans"]', "m.jsonl:2: not an object"),
    ],
)
def test_a_line_that_is_none_is_refused_by_its_number(tmp_path: Path, change: dict | bytes, message: str):
    good = {"path": "a.wav", "caption": "x", "spans": [[0, 1]]}
    line = change if isinstance(change, bytes) else json.dumps(good | change).encode()
    (tmp_path / "m.jsonl").write_bytes(json.dumps(good).encode() + b"\n" + line)
    with pytest.raises(ConfigError, match=message) as refused:
        read_span_manifest(tmp_path / "m.jsonl")
    str(refused.value).encode()  # can be printed


@pytest.mark.slow
def test_the_demo_finds_what_is_asked_for(tmp_path: Path, run):
    done = run(f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["AP"] >= 80 and metrics["chance AP"] < 30
