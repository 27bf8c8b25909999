"""The report of an evaluation: its page is parsed, and what it shows is found again by brute force."""

import base64
import json
import re
import wave
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from pe_av.config import DataConfig, EvalConfig
from pe_av.config.compose import config_dir
from pe_av.data.manifest import Clip, Manifest
from pe_av.data.rendering import write_mp4
from pe_av.evaluation.embedder import EmbeddedClips
from pe_av.evaluation.examples import FILE_BYTES, FOUND, WORST, pick_examples, playable
from pe_av.evaluation.html_report import Evaluation, html, markdown, published, write_report
from pe_av.evaluation.metrics import DIRECTIONS, Ranked, evaluate_embeddings

ATTACK = '<script>alert("1")</script> & </figure>'
VOID = {"meta", "img", "br", "input", "link", "hr"}
CLIPS = 9  # of the evaluation; the manifest has one more, which could not be read


class Page(HTMLParser):
    """A page: that its elements nest, its visible text, its attributes, and the content of its scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text, self.scripts, self.styles = "", [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] == "style":
            self.styles += data
        else:
            self.text += f" {data}"

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two films, a sound, a sound that is too large, and a file that is not media."""
    folder = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(0)
    for name in ("film0", "film1"):
        frames = random.integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
        write_mp4(folder / f"{name}.mp4", random.normal(0, 0.1, 24_000).astype(np.float32), frames)
    for name, seconds in (("sound", 1), ("long", 70)):
        with wave.open(str(folder / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(random.integers(-9000, 9000, 8000 * seconds, dtype=np.int16).tobytes())
    (folder / "broken.mp4").write_bytes(b"not media")
    return folder


@pytest.fixture(scope="module")
def evaluation(folder: Path) -> Evaluation:
    """Nine clips: of some the audio or the video is missing, two share a caption, and one caption is an attack."""
    files = ["film0.mp4", "film1.mp4", "sound.wav", "long.wav", "broken.mp4", "film0.mp4", "film1.mp4", "gone.mp4"]
    clips = [
        Clip(f"clip <{i}>", audio=str(folder / file), video=str(folder / file) if "mp4" in file else None)
        for i, file in enumerate(files)
    ]
    clips[5] = replace(clips[5], start=0.1, end=0.4)
    clips.insert(4, Clip("unread", audio="nowhere.wav"))
    clips.append(Clip("silent", video=str(folder / "film1.mp4")))
    generator = torch.Generator().manual_seed(0)
    names = dict.fromkeys(name for sides in DIRECTIONS.values() for name in sides)
    embeds = {name: torch.randn(CLIPS, 6, generator=generator) for name in names}
    sentences = ["a dog", ATTACK, "rain", "a very long caption " * 40, "wind", "a bell", "birds", "a | b", "a car"]
    captions = torch.tensor([[0, 1], [2, -1], [3, -1], [4, 0], [5, -1], [6, -1], [7, -1], [8, -1], [2, -1]])
    texts = {name: torch.randn(len(sentences), 6, generator=generator) for name in names if name.startswith("text_")}
    has_video = torch.tensor([True, True, False, False, True, True, True, True, True])
    has_audio = torch.tensor([True] * 8 + [False])
    valid = {
        name: (has_video if "video" in name else has_video | True)
        & (has_audio if "audio" in name else has_audio | True)
        for name in names
    }
    embedded = EmbeddedClips(
        embeds,
        valid,
        {},
        texts,
        [clip.id for clip in clips if clip.id != "unread"],
        captions,
        10,
        [],
        [],
        [],
        sentences,
    )
    ranked: dict[str, Ranked] = {}
    metrics = evaluate_embeddings(embeds, valid, texts, captions, intervals=True, ranked=ranked)
    reweighted = evaluate_embeddings(embeds, valid, texts, captions, protocol="reweighted", intervals=True)
    config = EvalConfig("runs/<b>a</b>/checkpoint", DataConfig(eval="clips.jsonl", corpus="audiocaps"))
    return Evaluation(config, metrics, reweighted, ranked, embedded, Manifest.of(clips), {"precision": "fp32"})


@pytest.fixture(scope="module")
def page(evaluation: Evaluation) -> Page:
    return Page(html(evaluation))


def sides(evaluation: Evaluation, direction: str) -> tuple[np.ndarray, np.ndarray, list, list, np.ndarray]:
    """By brute force: the embeddings of queries and items, what they are, and which belong together."""
    embedded = evaluation.embedded
    both = [bool(embedded.valid[q][i] & embedded.valid[g][i]) for q, g in [DIRECTIONS[direction]] for i in range(CLIPS)]
    captions_of = {i: [c for c in embedded.captions[i].tolist() if c >= 0] for i in range(CLIPS) if both[i]}
    used = sorted({c for row in captions_of.values() for c in row})
    rows, numbers, belongs = [], [], []
    for name in DIRECTIONS[direction]:
        text = name.startswith("text_")
        numbers.append(used if text else list(captions_of))
        rows.append((embedded.texts if text else embedded.embeds)[name].double().numpy()[numbers[-1]])
        belongs.append(
            [{i for i, row in captions_of.items() if c in row} for c in used] if text else [{i} for i in captions_of]
        )
    true = np.array([[bool(left & right) for right in belongs[1]] for left in belongs[0]])
    return *rows, *numbers, true


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("cosine", [False, True])
def test_examples_are_those_of_a_brute_force_search(evaluation: Evaluation, direction: str, cosine: bool):
    queries, items, query_numbers, item_numbers, true = sides(evaluation, direction)
    embedded = evaluation.embedded
    if cosine:
        queries, items = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, items))
    scores = queries @ items.T
    ranks = [1 + sum(s >= max(row[own]) for s in row[~own]) for row, own in zip(scores, true, strict=True)]
    ranked: dict[str, Ranked] = {}
    protocol = "cosine" if cosine else "dot"
    names = (embedded.embeds, embedded.valid, embedded.texts, embedded.captions)
    evaluate_embeddings(*names, protocol=protocol, ranked=ranked)
    found = ranked[direction]
    assert found.ranks.tolist() == ranks
    assert (found.queries.tolist(), found.items.tolist()) == (query_numbers, item_numbers)

    shown = pick_examples(direction, found, embedded, cosine)
    is_text = [name.startswith("text_") for name in DIRECTIONS[direction]]

    def number(side: dict, text: bool) -> int:
        return embedded.sentences.index(side["text"]) if text else side["clip"]

    firsts = [i for i, rank in enumerate(ranks) if rank == 1]
    margins = {i: max(scores[i][true[i]]) - max(scores[i][~true[i]]) for i in firsts}
    best = sorted(firsts, key=margins.__getitem__, reverse=True)[:2]
    chosen = [query_numbers.index(number(example["query"], is_text[0])) for example in shown]
    assert chosen[: len(best)] == best and [example["best"] for example in shown] == [True] * len(best) + [False] * (
        len(shown) - len(best)
    )
    others = sorted((rank for i, rank in enumerate(ranks) if i not in best), reverse=True)
    worst = [ranks[i] for i in chosen[len(best) :]]
    assert worst == others[: len(worst)] and len(worst) >= WORST - len(best)
    for query, example in zip(chosen, shown, strict=True):
        order = np.argsort(-scores[query], kind="stable").tolist()
        own = max(np.flatnonzero(true[query]), key=lambda item: scores[query][item])
        expected = order[:FOUND] + ([] if own in order[:FOUND] else [own])
        assert [item_numbers.index(number(one["item"], is_text[1])) for one in example["found"]] == expected
        np.testing.assert_allclose(
            [one["score"] for one in example["found"]], scores[query][expected], rtol=1e-5, atol=1e-6
        )
        assert [one["true"] for one in example["found"]] == true[query][expected].tolist()
        assert (
            example["rank"]
            == ranks[query]
            == next(
                o["rank"]
                for o in example["found"]
                if o["rank"] and o["item"] == example["found"][expected.index(own)]["item"]
            )
        )


def test_the_page_holds_every_figure_with_its_interval(evaluation: Evaluation, page: Page):
    for direction, row in evaluation.metrics.items():
        low, high = row["ci95"]["R@5"]
        reweighted = evaluation.reweighted[direction]
        start = page.words.index(f"{direction.replace('->', ' → ')} {row['R@1']:.1f}")
        cells = page.words[start : start + 400]
        assert f"{row['R@5']:.1f} {low:.1f} – {high:.1f}" in cells
        assert f"{reweighted['R@1']:.1f}" in cells and f"{row['MRR']:.3f}" in cells
        assert f"{row['queries']} {row['gallery']}" in cells
    assert len(evaluation.metrics) == len(DIRECTIONS)


def test_the_page_needs_nothing_else(page: Page):
    links = [value for _, name, value in page.attributes if name in ("src", "href", "poster", "data")]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    anchors = {value for _, name, value in page.attributes if name == "id"}
    assert all(link[1:] in anchors for link in links if link.startswith("#"))
    urls = re.findall(r"url\((.{5})", page.styles)
    assert urls and set(urls) == {"data:"} and "@import" not in page.styles


def test_text_of_the_user_stays_text(page: Page, evaluation: Evaluation):
    assert len(page.scripts) == 2 and not any("alert(" in script for script in page.scripts)
    assert ATTACK in page.text and "runs/<b>a</b>/checkpoint" in page.text and "clip <0>" in page.text
    assert "a very long caption " * 40 not in page.text and "a very long caption a very long caption" in page.text
    assert ATTACK not in markdown(evaluation) and "<b>" not in markdown(evaluation).replace("\\<b\\>", "")


def test_small_files_can_be_played_and_the_rest_is_counted(page: Page, folder: Path, evaluation: Evaluation):
    media = json.loads(page.scripts[0])
    files = {"0": "film0.mp4", "1": "film1.mp4", "2": "sound.wav", "6": "film1.mp4", "8": "film1.mp4"}
    expected = {row: (folder / name).read_bytes() for row, name in files.items()}
    assert {row: base64.b64decode(uris[0].split(",")[1]) for row, uris in media.items()} == expected
    assert media["2"][0].startswith("data:audio/wav;") and media["0"][0].startswith("data:video/mp4;")
    buttons = {value for tag, name, value in page.attributes if (tag, name) == ("button", "data-clip")}
    assert buttons == set(media)
    for reason in ("larger than 1 MB", "segments of longer files", "gone", "damaged"):
        assert f"1 clip ({reason})" in page.words
    assert (folder / "long.wav").stat().st_size > FILE_BYTES
    # strips of all films that can be read, and waveforms of all sounds
    assert set(re.findall(r"\.c(\d+) ", page.styles)) == {"0", "1", "5", "6", "8"}
    assert {v for tag, name, v in page.attributes if (tag, name) == ("symbol", "id")} == {
        f"w{i}" for i in (0, 1, 2, 3, 5, 6)
    }


def test_a_page_is_no_larger_than_its_bound(evaluation: Evaluation):
    whole = len(html(evaluation).encode())
    for bound in (whole, whole - 10_000, whole - 20_000):
        text = html(evaluation, bound)
        assert len(text.encode()) <= bound
    assert "of this page)" in Page(text).words and len(json.loads(Page(text).scripts[0])) < 6


def test_an_image_is_no_film_that_was_left_out(tmp_path: Path):
    assert playable(Clip("x", video=str(tmp_path / "x.png"))) == ([], None)
    assert "formats" in playable(Clip("x", audio=str(tmp_path / "x.tar#0+9")))[1]


def test_published_figures_stand_beside_those_of_the_same_corpus(evaluation: Evaluation, tmp_path: Path):
    table = published()["retrieval"]
    for model, row in table["rows"].items():  # the published average was made of these numbers
        assert len(row) == len(table["columns"]) == 9
        assert round(sum(row) / 9, 1) == published()["average"][model]
    write_report(evaluation, tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert "| model | protocol | audiocaps text → audio | audiocaps text → video | audiocaps video → audio |" in lines
    assert "| pe-av-large | re-weighted | 45.8 | 20.8 | 88.3 |" in lines
    for protocol, metrics in (("re-weighted", evaluation.reweighted), ("dot product", evaluation.metrics)):
        ours = " | ".join(f"{metrics[name]['R@1']:.1f}" for name in ("text->audio", "text->video", "video->audio"))
        assert rf"| runs/\<b\>a\</b\>/checkpoint | {protocol} | {ours} |" in lines
    page = Page((tmp_path / "report.html").read_text())
    assert "pe-av-large re-weighted 45.8 20.8 88.3" in page.words and "clotho" not in page.words
    elsewhere = replace(evaluation, config=replace(evaluation.config, data=DataConfig(eval="x.jsonl")), reweighted={})
    text = html(elsewhere)
    assert "for orientation" in Page(text).words and "clotho" in text and "R@1 re-weighted" not in text


def test_corpora_with_published_figures_are_those_of_the_recipes():
    named = {column["corpus"] for column in published()["retrieval"]["columns"]} - {"internal"}
    recipes = {path.stem for path in (config_dir() / "data").glob("*.yaml")}
    assert named <= recipes
    for name in recipes:
        recipe = yaml.safe_load((config_dir() / "data" / f"{name}.yaml").read_text())
        assert recipe.get("corpus") == (name if name in named else None)


def test_heat_maps_show_the_cosines(evaluation: Evaluation, page: Page):
    embeds, valid = evaluation.embedded.embeds, evaluation.embedded.valid
    both = valid["audio"] & valid["video"]
    left, right = (F.normalize(embeds[name][both].double(), dim=1) for name in ("audio", "video"))
    cosines = left @ right.T
    others = cosines[~torch.eye(len(cosines), dtype=torch.bool)].mean()
    assert f"matched {cosines.diagonal().mean():z.2f}, others {others:z.2f}".replace("-", "−") in page.words
