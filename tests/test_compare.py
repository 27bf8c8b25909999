"""Checkpoints and trainings beside each other: the paired bootstrap by brute force, and runs that were made by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import small_config
from torch.utils.tensorboard import SummaryWriter

from pe_av.config import ConfigError, DataConfig, EvalConfig
from pe_av.config.compose import _with_sweeps, check_overrides, from_dict, model_config_yaml
from pe_av.data.manifest import Manifest
from pe_av.evaluation import compare
from pe_av.evaluation.embedder import EmbeddedClips
from pe_av.evaluation.figures import RESAMPLES
from pe_av.evaluation.html_report import Evaluation
from pe_av.evaluation.metrics import Ranked
from pe_av.evaluation.paired import (
    check_common_directions,
    compare_evaluations,
    comparison_table,
    paired_differences,
    short_names,
)


@pytest.mark.parametrize(("queries", "clips"), [(1, 1), (2, 1), (40, 40), (150, 31)])
def test_intervals_of_differences_are_those_of_the_same_queries_drawn_for_all(queries: int, clips: int):
    random = np.random.default_rng(queries)
    hits = random.random((3, queries)) < np.array([[0.4], [0.5], [0.9]])
    units = random.integers(0, clips, queries) * 7 + 3  # any numbers
    found = paired_differences(hits, units)
    different = sorted(set(units.tolist()))
    drawing, drawn = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        chosen = [different[i] for i in drawing.integers(0, len(different), len(different))]
        rows = [query for unit in chosen for query in range(queries) if units[query] == unit]
        recalls = [100 * sum(bool(hits[k, query]) for query in rows) / len(rows) for k in range(3)]
        drawn.append([recalls[1] - recalls[0], recalls[2] - recalls[0]])
    for k, one in enumerate(found, 1):
        assert one["R@1"] == pytest.approx(100 * (hits[k].mean() - hits[0].mean()), abs=1e-9)
        np.testing.assert_allclose(one["ci95"], np.percentile(np.array(drawn)[:, k - 1], [2.5, 97.5]), atol=1e-9)


def test_what_two_checkpoints_share_does_not_widen_the_interval():
    """Two that answer almost the same queries differ clearly, though their own intervals overlap widely."""
    hits = np.zeros((2, 400), dtype=bool)
    hits[:, :200], hits[1, 200:212] = True, True
    (difference,) = paired_differences(hits, np.arange(400))
    low, high = difference["ci95"]
    assert difference["R@1"] == pytest.approx(3.0) and 1 < low < 2 and 4 < high < 5


def evaluated(ranks: list[int], direction: str = "text->audio", ids: str = "abcd") -> Evaluation:
    clips = len(ids)
    embedded = EmbeddedClips(
        {}, {}, {}, {}, list(ids), torch.arange(clips)[:, None], clips, [], [], [], list(ids.upper())
    )
    numbers = torch.arange(clips)
    ranked = {direction: Ranked(numbers, numbers, numbers[:, None], torch.tensor(ranks), numbers)}
    config = EvalConfig("/".join(map(str, ranks)), DataConfig(eval="x.jsonl", eval_split="test"))
    return Evaluation(config, {}, {}, ranked, embedded, Manifest.of([]), {})


def test_the_table_of_checkpoints():
    found = compare_evaluations(
        {"a": evaluated([1, 2, 3, 1]), "b": evaluated([1, 1, 1, 1]), "c": evaluated([2, 2, 2, 1])}
    )
    row = found["directions"]["text->audio"]
    assert found["data"] == "x.jsonl test" and (row["queries"], row["gallery"]) == (4, 4)
    assert row["R@1"] == {"a": 50, "b": 100, "c": 25}
    assert {name: one["R@1"] for name, one in row["difference"].items()} == {"b": 50, "c": -25}
    columns, rows = comparison_table([found], ["a", "b", "c"])
    assert columns == ["data", "direction", "a", "b", "b − a", "c", "c − a", "queries"]
    assert rows[0][:4] == ["x.jsonl test", "text->audio", "50.0", "100.0"] and rows[0][4].startswith("+50.0 [")


def test_evaluations_of_different_clips_are_not_compared():
    with pytest.raises(ConfigError, match="a and b were evaluated on different clips or captions: 2 clips, such as d,"):
        compare_evaluations({"a": evaluated([1] * 4), "b": evaluated([1] * 4, ids="abce")})
    with pytest.raises(ConfigError, match="a, b: there is no direction that all of them have"):
        compare_evaluations({"a": evaluated([1] * 4), "b": evaluated([1] * 4, "audio->text")})


def test_checkpoints_without_common_embeddings_are_refused_at_once(tmp_path: Path):
    for name, heads in (("a", ["audio", "text_audio"]), ("b", ["video", "text_video"])):
        config = small_config()
        config.heads = heads
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(model_config_yaml(config))
    check_common_directions([str(tmp_path / "a")])
    with pytest.raises(
        ConfigError, match=r"no two embeddings in common .*a has audio, text_audio; .*b has text_video, video"
    ):
        check_common_directions([str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(ValueError, match="nowhere: no checkpoint there"):
        check_common_directions([str(tmp_path / "a"), "nowhere"])


def test_names_keep_what_tells_paths_apart():
    assert short_names(["runs/a/checkpoint", "runs/b/checkpoint"]) == ["a", "b"]
    assert short_names(["runs/a/checkpoint", "runs/a/best"]) == ["checkpoint", "best"]
    assert short_names(["/x/a/1/best", "/x/b/2/best"]) == ["a/1", "b/2"]
    assert short_names(["runs/a", "runs/a/best"]) == ["a", "a/best"]
    assert short_names(["/a", "b"]) == ["a", "b"] and short_names(["x"]) == ["x"]


def test_checkpoints_and_data_sets_are_given_as_lists():
    assert from_dict(EvalConfig, {"checkpoint": ["a", 3]}, "test").checkpoint == ["a", "3"]
    assert from_dict(EvalConfig, {"checkpoint": 3}, "test").checkpoint == "3"
    for wrong, expected in (
        ([], "neither"),
        (None, "neither"),
        ({"a": 1}, "neither"),
        (["a", "a"], "a is in the list twice"),
    ):
        with pytest.raises(ConfigError, match=expected):
            from_dict(EvalConfig, {"checkpoint": wrong}, "test")
    check_overrides(EvalConfig, ["checkpoint=[a,b]", "data=[demo,clotho]"])
    with pytest.raises(ConfigError, match="data=cloto is unknown; did you mean clotho?"):
        check_overrides(EvalConfig, ["checkpoint=a", "data=[demo,cloto]"])
    assert _with_sweeps(["checkpoint=[a,b]", "data=[demo,clotho]"]) == [
        "--multirun",
        "checkpoint=[a,b]",
        "data=demo,clotho",
    ]
    assert _with_sweeps(["-m", "data=[demo,clotho]"]) == ["-m", "data=demo,clotho"]
    assert _with_sweeps(["data=demo", "checkpoint=a"]) == ["data=demo", "checkpoint=a"]


def make_run(folder: Path, lr: float, recalls: list[float], **settings) -> Path:
    """The files of a run, with an evaluation every ten steps."""
    folder.mkdir()
    pairings = [{"name": "audio_text", "left": "audio", "weight": lr * 1000}]
    config = {"optim": {"lr": lr, "ema": None}, "loss": {"pairings": pairings}, "seed": 0}
    config |= {"data": {"eval": None, "demo": {"seed": 0, "root": str(folder)}}} | settings
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"step": step, "loss": 10 / step} for step in (5, 10, 15, 20)]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 25, "lo')
    with SummaryWriter(str(folder / "tensorboard")) as board:
        for number, recall in enumerate(recalls, 1):
            board.add_scalar("R@1/text->audio", recall, 10 * number)
    metrics = {"step": 10 * len(recalls), "text->audio": {"R@1": recalls[-1]}, "watch": {}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_runs_are_read_from_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    a, b = make_run(tmp_path / "a", 0.001, [12.5, 50.0]), make_run(tmp_path / "b", 0.002, [25.0], fresh=None)
    runs = [compare.read_run(folder, folder.name) for folder in (a, b)]
    assert runs[0].losses == [(5, 2.0), (10, 1.0), (15, 10 / 15), (20, 0.5)]
    assert [run.recalls for run in runs] == [{"text->audio": [(10, 12.5), (20, 50.0)]}, {"text->audio": [(10, 25.0)]}]
    different = compare.different_settings(runs)
    assert different.pop("data.demo.root") == [str(a), str(b)]
    assert different == {
        "optim.lr": ["0.001", "0.002"],
        "loss.pairings.audio_text": ["left=audio weight=1.0", "left=audio weight=2.0"],
    }

    (tmp_path / "eval").mkdir()  # an evaluation is no run
    monkeypatch.setenv("COLUMNS", "200")
    compare.main([str(a), str(b), str(tmp_path / "eval"), str(tmp_path / "picture.png")])
    captured = capsys.readouterr()
    words = captured.out.split()
    for row in (["optim.lr", "0.001", "0.002"], ["text->audio", "50.0", "25.0"], ["after", "step", "20", "10"]):
        assert any(words[i : i + len(row)] == row for i in range(len(words))), row
    assert f"left out: {tmp_path}/eval: has no config.yaml" in captured.err
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_several_seeds_are_averaged(tmp_path: Path, capsys: pytest.CaptureFixture):
    recalls = {"six-seed0": 20.0, "six-seed1": 26.0, "six-seed2": 32.0, "one-seed0": 5.0}
    for number, (name, recall) in enumerate(recalls.items()):
        folder = make_run(tmp_path / name, 0.002 if name.startswith("one") else 0.001, [recall])
        config = yaml.safe_load((folder / "config.yaml").read_text()) | {"seed": number}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "multirun.yaml").write_text("{}")  # which Hydra leaves beside the runs
    runs = [compare.read_run(tmp_path / name, name) for name in recalls]
    assert {name: len(members) for name, members in compare.by_setting(runs).items()} == {"six": 3, "one": 1}
    compare.main([str(path) for path in sorted(tmp_path.iterdir())] + [str(tmp_path / "picture.png")])
    captured = capsys.readouterr()
    means = captured.out[captured.out.rindex("seeds") :].split()
    assert " ".join(means[means.index("text->audio") :][:5]) == "text->audio 5.0 26.0 ± 6.0"
    assert "multirun.yaml: is no folder" in captured.err


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda b: (b / "config.yaml").unlink(), "fewer than two of these folders are runs"),
        (lambda b: (b / "config.yaml").write_text("a: [1"), "b/config.yaml: cannot be read"),
        (lambda b: (b / "metrics.json").write_text("[]"), "b/metrics.json: holds a list, not a dict"),
        (lambda b: (b / "history.jsonl").write_text('{"step": }\n'), "b/history.jsonl: cannot be read"),
        (lambda b: b.rename(b.parent / "c"), "b: no such folder; give folders that train.py has written"),
        (
            lambda b: (b / "config.yaml").write_text("data: {eval: x.jsonl, demo: {seed: 0}}"),
            "a and b are evaluated on different data (data.eval: – and x.jsonl), so their recalls cannot be compared",
        ),
    ],
)
def test_what_cannot_be_compared_costs_one_line(spoil, expected: str, tmp_path: Path):
    a, b = make_run(tmp_path / "a", 0.001, [12.5]), make_run(tmp_path / "b", 0.002, [25.0])
    spoil(b)
    with pytest.raises(SystemExit) as error:
        compare.main([str(a), str(b), str(tmp_path / "picture.png")])
    assert str(error.value).startswith("error: ") and expected in str(error.value)
    assert "\n" not in str(error.value)


def test_one_run_is_not_compared():
    with pytest.raises(SystemExit, match="usage: python -m pe_av.evaluation.compare RUN RUN"):
        compare.main(["runs/a"])
