"""Long clips in windows: what the windows are, and what comes of their embeddings, against loops over single ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize, small_config
from test_classification import make_tokenizer
from test_data import write_clip
from test_media import write_wav
from test_ranking import by_hand, exact_scores, pair_of

from pe_av.checkpoint import build_model, load_model, save_model
from pe_av.config import ConfigError, EvalConfig, WindowsConfig
from pe_av.config.compose import from_dict
from pe_av.config.evaluation import ClassifyConfig, ProbeConfig
from pe_av.data.manifest import Clip, Manifest, read_manifest
from pe_av.evaluation.classification import classify_checkpoint
from pe_av.evaluation.ranking import BestWindows, others_at_or_above
from pe_av.evaluation.retrieval import evaluate
from pe_av.evaluation.windows import window_starts, windowed
from pe_av.media.audio import read_audio
from pe_av.media.processor import Processor

SECONDS, HOP = 0.4, 0.2
LENGTHS = [0.3, 0.45, 0.8, 1.23, 1.5]  # of the sounds; the first two need one window
LABELS = ["dog", "rain", "a bell", "dog", "rain"]


@pytest.mark.parametrize("seconds, hop", [(10.0, 10.0), (10.0, 2.5), (0.4, 0.3)])
@pytest.mark.parametrize("length", [0.2, 0.4, 0.49, 0.51, 9.0, 10.0, 10.05, 10.2, 20.0, 23.7, 3600.0])
def test_windows_cover_a_clip_from_begin_to_end(length: float, seconds: float, hop: float):
    starts = window_starts(length, seconds, hop)
    assert starts[0] == 0 and starts[-1] + seconds >= length - 0.1
    gaps = np.diff(starts)
    # whoever looks every 10 ms sees at most a tenth of a second that is in no window
    times = np.arange(0, min(length, 60), 0.01)
    unseen = [t for t in times if not any(s <= t < s + seconds for s in starts[max(0, int(t / hop) - 8) :])]
    assert len(unseen) <= 10
    if len(starts) > 1:
        assert (gaps > 0).all() and gaps[:-1] == pytest.approx(hop) and gaps[-1] <= hop + 0.1 + 1e-9
        assert starts[-1] + seconds == pytest.approx(length)


def groups(count: int, random: np.random.Generator) -> torch.Tensor:
    """Which of `count` items each of their one to four windows is of."""
    return torch.from_numpy(np.repeat(np.arange(count), random.integers(1, 5, count)))


@pytest.mark.parametrize("kind", ["random", "whole numbers", "copies", "alike", "zeros", "wild"])
def test_the_best_windows_rank_as_a_double_loop_ranks(kind: str):
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    queries, gallery = pair_of(kind, 20)
    query, item = groups(12, random)[: len(queries)], groups(11, random)[: len(gallery)]
    queries, gallery = queries[: len(query)], gallery[: len(item)]
    if kind == "copies":  # two items with the same windows
        gallery, item = torch.cat((gallery, gallery[item < 1])), torch.cat((item, item[item < 1] + 11))
    pairs = np.array(exact_scores(queries, gallery))
    size = int(query.max()) + 1, int(item.max()) + 1
    scores = [[pairs[query == q][:, item == i].max() for i in range(size[1])] for q in range(size[0])]
    target = torch.from_numpy(random.integers(-1, size[1], (size[0], 3)))
    target[:, 1] = torch.from_numpy(random.integers(size[1], size=size[0]))
    expected = by_hand(scores, target.tolist(), 2)
    best = BestWindows(queries, query, gallery, item)
    for blocks in ({}, {"query_block": 3, "item_block": 2}):
        assert others_at_or_above(best, target, 2, **blocks).tolist() == expected
    one = BestWindows(queries, torch.arange(len(queries)), gallery, torch.arange(len(gallery)))
    whole = torch.from_numpy(random.integers(len(gallery), size=(len(queries), 1)))
    assert others_at_or_above(one, whole).tolist() == by_hand(pairs.tolist(), whole.tolist(), 1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Sounds of several lengths, a film of 1.2 s, a torn file, and a checkpoint."""
    folder = tmp_path_factory.mktemp("windows")
    model = randomize(build_model(small_config()))
    save_model(model, folder / "checkpoint")
    Processor(model.config, make_tokenizer()).save_pretrained(folder / "checkpoint")
    random = np.random.default_rng(0)
    clips = []
    for number, seconds in enumerate(LENGTHS):
        samples = random.integers(-9000, 9000, (1, round(48_000 * seconds)), dtype=np.int16)
        path = str(write_wav(folder / f"{number}.wav", samples))
        # the length of the fourth is in the manifest; the fifth is a segment
        limits = {"seconds": seconds} if number == 3 else {"start": 0.3, "end": 1.3} if number == 4 else {}
        clips.append(Clip(f"clip {number}", path, None, {None: [LABELS[number]]}, **limits))
    film = str(write_clip(folder / "film.mp4", 1.2))
    clips.append(Clip("film", film, film, {None: ["music"]}))
    (folder / "torn.wav").write_bytes((folder / "3.wav").read_bytes()[:30])
    clips.append(Clip("torn", str(folder / "torn.wav"), None, {None: ["silence"]}))
    Manifest.of(clips, folder).write(folder / "clips.jsonl")
    return folder


def settings(kind: type, corpus: Path, combine: str = "mean", **changes):
    data = {"eval": str(corpus / "clips.jsonl"), "num_workers": 0} | changes.pop("data", {})
    windows = {"seconds": SECONDS, "hop": HOP, "combine": combine} | changes.pop("windows", {})
    values = {"checkpoint": str(corpus / "checkpoint"), "data": data, "device": "cpu", "batch_size": 4}
    return from_dict(kind, values | {"windows": windows, "max_bad_fraction": 0.5} | changes, source="test")


def limits_of(corpus: Path) -> dict[str, list[tuple[str, float, float | None]]]:
    """The windows of each clip, written down by hand: file, start, end."""
    files = {f"clip {n}": f"{n}.wav" for n in range(5)} | {"film": "film.mp4"}
    windows = {
        "clip 0": [(0, None)],
        "clip 1": [(0, None)],
        "clip 2": [(0, 0.4), (0.2, 0.6), (0.4, None)],
        "clip 3": [(0, 0.4), (0.2, 0.6), (0.4, 0.8), (0.6, 1.0), (0.83, None)],
        "clip 4": [(0.3, 0.7), (0.5, 0.9), (0.7, 1.1), (0.9, 1.3)],
        "film": [(0, 0.4), (0.2, 0.6), (0.4, 0.8), (0.6, 1.0), (0.8, None)],
    }
    return {name: [(str(corpus / files[name]), *limits) for limits in each] for name, each in windows.items()}


def test_what_is_read_are_the_pieces_of_the_file(corpus: Path):
    windows = windowed(read_manifest(corpus / "clips.jsonl"), WindowsConfig(SECONDS, HOP))
    listed, indexed = list(windows), [windows[i] for i in range(len(windows))]
    assert listed == indexed and len({clip.id for clip in listed}) == len(listed)
    expected = [limits for each in limits_of(corpus).values() for limits in each]
    assert len(listed) == len(expected) + 1  # the torn file is its own window
    for clip, (path, start, end) in zip(listed, expected, strict=False):
        assert clip.audio == path and clip.start == pytest.approx(start, abs=1e-6)
        assert clip.end is None if end is None else clip.end == pytest.approx(end)
        if path.endswith(".wav"):
            whole, rate = read_audio(path)
            piece, _ = read_audio(path, start=clip.start, end=clip.end)
            assert torch.equal(piece, whole[:, round(start * rate) : end and round(end * rate)])


@torch.inference_mode()
def embeddings(corpus: Path) -> dict[str, dict[str, np.ndarray]]:
    """clip -> name -> (windows, D) float64, each window alone."""
    model, processor = load_model(corpus / "checkpoint"), Processor.from_pretrained(corpus / "checkpoint")
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, windows in limits_of(corpus).items():
        rows: dict[str, list[np.ndarray]] = {}
        for path, start, end in windows:
            inputs = processor.batch_audio([processor.audio_item(path, start=start, end=end)])
            if path.endswith(".mp4"):
                inputs |= processor.batch_videos([processor.video_item(path, start=start, end=end)])
            caption = LABELS[int(name[-1])] if name != "film" else "music"
            out = model(**inputs, **processor(text=[caption]))
            for embedding in ("audio", "video", "audio_video", "audio_plus_text", "video_plus_text"):
                value = getattr(out, f"{embedding}_embeds")
                if value is not None:
                    rows.setdefault(embedding, []).append(value[0].double().numpy())
        found[name] = {embedding: np.stack(each) for embedding, each in rows.items()}
    return found


def test_the_mean_is_that_of_windows_embedded_one_by_one(corpus: Path, tmp_path: Path):
    evaluation = evaluate(settings(EvalConfig, corpus), tmp_path, torch.device("cpu"))
    clips = evaluation.embedded
    assert clips.ids == [f"clip {n}" for n in range(5)] + ["film"] and clips.windows is None
    for row, (_, expected) in enumerate(embeddings(corpus).items()):
        for name, windows in expected.items():
            assert clips.valid[name][row]
            assert clips.embeds[name][row].numpy() == pytest.approx(windows.mean(0), rel=1e-4, abs=1e-5)
        assert not any(clips.valid[name][row] for name in clips.valid.keys() - expected.keys() - {"text_audio"} if
                       not name.startswith("text"))  # fmt: skip
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["setting"]["windows"] == "0.4 s every 0.2 s, mean" and written["bad_items"] == 1
    assert written["setting"]["cut_clips"] == 0
    assert "torn" in (tmp_path / "bad_items.jsonl").read_text()


@pytest.mark.parametrize("protocol", ["dot", "cosine"])
def test_pairs_are_scored_by_their_best_windows(corpus: Path, tmp_path: Path, protocol: str):
    evaluation = evaluate(settings(EvalConfig, corpus, "best", protocol=protocol), tmp_path, torch.device("cpu"))
    clips, windows = evaluation.embedded, embeddings(corpus)
    names = list(windows)

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True) if protocol == "cosine" else rows

    texts = unit(clips.texts["text_audio"].double().numpy())
    scores = np.array([[(unit(windows[name]["audio"]) @ text).max() for text in texts] for name in names])
    truth = [clips.sentences.index((LABELS + ["music"])[row]) for row in range(6)]
    ranks = [1 + sum(scores[r] >= scores[r, truth[r]]) - 1 for r in range(6)]
    assert evaluation.ranked["audio->text"].ranks.tolist() == ranks
    assert evaluation.metrics["audio->text"]["R@1"] == pytest.approx(100 * np.mean(np.array(ranks) == 1))
    of_text = []
    for text in range(len(texts)):
        own = {row for row in range(6) if truth[row] == text}
        best = max(scores[row, text] for row in own)
        of_text.append(1 + sum(scores[row, text] >= best for row in range(6) if row not in own))
    assert evaluation.ranked["text->audio"].ranks.tolist() == of_text
    # what the page shows has the same scores
    page = (tmp_path / "report.html").read_text()
    assert f"{scores[0].max():.2f}" in page or f"{scores[0].max():.3f}" in page
    assert "0.4 s every 0.2 s, best" in page


def test_classes_are_chosen_by_the_best_window(corpus: Path, tmp_path: Path):
    found = classify_checkpoint(settings(ClassifyConfig, corpus, "best"), tmp_path)
    model, processor = load_model(corpus / "checkpoint"), Processor.from_pretrained(corpus / "checkpoint")
    names = sorted({*LABELS, "music", "silence"})
    with torch.inference_mode():
        tokens = [processor(text=[name]) for name in names]
        classes = torch.cat([model.get_text_audio_embeds(t["input_ids"], t["attention_mask"]) for t in tokens])
    chosen = [
        names[int((each["audio"] @ classes.double().numpy().T).max(0).argmax())] for each in embeddings(corpus).values()
    ]
    right = np.mean([one == label for one, label in zip(chosen, [*LABELS, "music"], strict=True)])
    assert found["audio"]["top-1"] == pytest.approx(100 * right) and found["audio"]["clips"] == 6


def test_windows_that_cannot_be_are_refused(corpus: Path):
    def refused(message: str, kind: type = EvalConfig, **changes) -> None:
        with pytest.raises(ConfigError, match=message):
            settings(kind, corpus, **changes)

    refused("windows.seconds=0.4 is longer than data.max_seconds=0.3", data={"max_seconds": 0.3})
    refused("windows.seconds and data.cache are both set", data={"cache": "features"})
    refused("windows.hop=0.5 is not between 0 and windows.seconds=0.4", windows={"hop": 0.5})
    refused("windows.hop is set without windows.seconds", windows={"seconds": None})
    refused("windows.seconds=-1", windows={"seconds": -1})
    refused("windows.combine.*median", combine="median")
    refused("a probe needs windows.combine=mean", ProbeConfig, combine="best")


def test_captions_that_are_not_used_are_counted(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    several = {"audio": ["a dog"], "visual": ["rain", "music"]}
    captions = [several, several, {"visual": ["rain"]}, {None: ["a bell"], "audio": ["a dog"]}]
    film = str(corpus / "film.mp4")
    clips = (Clip(f"clip {n}", film, film, each, end=1.0 + n / 10) for n, each in enumerate(captions))
    Manifest.of(clips).write(tmp_path / "kinds.jsonl")
    changes = {"data": {"eval": str(tmp_path / "kinds.jsonl")}, "windows": {"seconds": None, "hop": None}}
    evaluation = evaluate(settings(EvalConfig, corpus, **changes), tmp_path, torch.device("cpu"))
    assert evaluation.setting["clips_with_unused_captions"] == 2
    assert "2 clips have captions of several kinds" in " ".join(capsys.readouterr().err.split())
