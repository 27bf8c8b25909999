"""Search in a folder of embeddings: what is compared with what, and that the best are found, against brute force."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize, small_config
from PIL import Image
from test_classification import make_tokenizer
from test_corpus import settings
from test_data import write_clip
from test_media import write_wav

from pe_av.checkpoint import build_model, load_model, save_model
from pe_av.config import HEADS, PAIRINGS, ConfigError
from pe_av.data.manifest import Clip, Manifest
from pe_av.embed import embed_corpus
from pe_av.index import Index, part_path, write_part, write_record
from pe_av.media.processor import Processor
from pe_av.nearest import make_approximate, nearest, nearest_approximately
from pe_av.search import Searcher, how_to_compare, main
from pe_av.search_page import page_of


def random_index(folder: Path, values: np.ndarray, has: np.ndarray, part_rows: int) -> Index:
    record = {"rows": len(values), "part_rows": part_rows, "embeddings": {"audio": values.shape[1]}}
    write_record(folder, record)
    for number in range(-(-len(values) // part_rows)):
        at = slice(number * part_rows, (number + 1) * part_rows)
        rows = [{"id": str(row), "start": float(row)} for row in range(len(values))[at]]
        write_part(part_path(folder, number), rows, {"audio": values[at]}, {"audio": has[at]})
    return Index(folder)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("cosine", [False, True])
def test_the_highest_scores_are_found(tmp_path: Path, queries: int, cosine: bool, monkeypatch: pytest.MonkeyPatch):
    """Small whole numbers, whose products are exact and often equal; rows without the embedding; rows left out."""
    monkeypatch.setattr("pe_av.nearest.BLOCK_SCORES", 1024)  # several blocks
    random = np.random.default_rng(0)
    values = random.integers(-3, 4, (5000, 8)).astype(np.float32)
    if cosine:  # of unit length but for a power of two, so that the cosines are exact as well
        values = np.eye(8, dtype=np.float32)[random.integers(8, size=5000)] * 2.0 ** random.integers(-3, 4, (5000, 1))
    values[17] = 0
    has, allowed = random.random(5000) < 0.9, random.random(5000) < 0.5
    asked = random.integers(-3, 4, (queries, 8)).astype(np.float32)
    asked[:, 0] = 4
    index = random_index(tmp_path, values, has, 1500)
    for rows_allowed in (None, allowed):
        usable = has if rows_allowed is None else has & allowed
        for top in (1, 10, 400, 6000):
            scores, rows = nearest(index, "audio", asked, top, rows_allowed, cosine)
            for query in range(queries):
                exact = values.astype(np.float64) @ asked[query]
                if cosine:
                    exact /= np.maximum(np.linalg.norm(values, axis=1), 1e-12) * np.linalg.norm(asked[query])
                order = sorted(np.flatnonzero(usable), key=lambda row: (-np.float32(exact[row]), row))[:top]
                np.testing.assert_allclose(scores[query], exact[order], rtol=1e-6)
                if not cosine:
                    assert rows[query].tolist() == order


def test_faiss_finds_nearly_all_and_scores_exactly(tmp_path: Path):
    pytest.importorskip("faiss")
    random = np.random.default_rng(0)
    centres = random.standard_normal((50, 16))
    values = (centres[random.integers(50, size=4000)] + 0.3 * random.standard_normal((4000, 16))).astype(np.float32)
    index = random_index(tmp_path, values, random.random(4000) < 0.9, 1024)
    queries = values[:50] + 0.1
    with pytest.raises(ConfigError, match=r"python -m pe_av.nearest .* audio makes it"):
        nearest_approximately(index, "audio", queries, 10)
    make_approximate(index, "audio")
    scores, rows = nearest_approximately(index, "audio", queries, 10)
    exact_scores, exact_rows = nearest(index, "audio", queries, 10)
    recall = np.mean([len(set(found) & set(true)) / 10 for found, true in zip(rows, exact_rows, strict=True)])
    assert recall > 0.95
    np.testing.assert_allclose(scores[:, 0], exact_scores[:, 0], rtol=1e-6)
    for allowed in (np.arange(4000) % 7 == 0, np.arange(4000) < 5):  # some, and so few that all must be looked at
        _, rows = nearest_approximately(index, "audio", queries, 10, allowed)
        _, exact_rows = nearest(index, "audio", queries, 10, allowed)
        assert rows.shape == exact_rows.shape and set(rows.ravel()) <= set(np.flatnonzero(allowed))
    assert np.array_equal(rows, exact_rows)
    part_path(tmp_path, 1).rename(tmp_path / "away")  # the numbers of rows have changed since
    with pytest.raises(ConfigError, match="made of another state of the index"):
        nearest_approximately(Index(tmp_path), "audio", queries, 10)
    with pytest.raises(ConfigError, match="1 parts are missing"):
        make_approximate(Index(tmp_path), "audio")


def test_too_few_rows_for_faiss_are_said_to_be_too_few(tmp_path: Path):
    pytest.importorskip("faiss")
    index = random_index(tmp_path, np.ones((500, 4), np.float32), np.arange(500) < 20, 500)
    with pytest.raises(ConfigError, match="only 20 rows have audio"):
        make_approximate(index, "audio")


def test_what_is_compared_was_trained_to_be_compared():
    """Every combination of a query and of an index, against the pairings of the loss."""
    for given in (["text"], ["audio"], ["video"], ["audio", "video"], ["audio", "text"], ["video", "text"]):
        for name in HEADS:
            own = [head for head in HEADS if set(HEADS[head]) - {"fusion"} == set(given)]
            pairs = [
                (pairing, query) for pairing, sides in PAIRINGS.items() for query in own if set(sides) == {query, name}
            ]
            if pairs:
                assert how_to_compare(given, [name], None, list(HEADS)) == (pairs[0][1], name, pairs[0][0])
            elif name in own:
                assert how_to_compare(given, [name], None, list(HEADS)) == (name, name, None)
            else:
                with pytest.raises(ConfigError, match="cannot be compared"):
                    how_to_compare(given, [name], None, list(HEADS))
    everything = list(HEADS)
    assert how_to_compare(["text"], everything, None, everything)[1] == "audio_video"
    assert how_to_compare(["text"], everything, "audio", everything) == ("text_audio", "audio", "audio_text")
    assert how_to_compare(["audio"], everything, None, everything)[1] == "video"  # rather than what sounds alike
    with pytest.raises(ConfigError, match="one or two of text, audio and video"):
        how_to_compare(["text", "audio", "video"], everything, None, everything)
    with pytest.raises(ConfigError, match="--in film: .* can be searched in"):
        how_to_compare(["text"], everything, "film", everything)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Three films with captions, a sound, and a checkpoint; and their index."""
    folder = tmp_path_factory.mktemp("search")
    model = randomize(build_model(small_config()))
    save_model(model, folder / "checkpoint")
    Processor(model.config, make_tokenizer()).save_pretrained(folder / "checkpoint")
    random = np.random.default_rng(0)
    clips = []
    for number, caption in enumerate(("a dog", "<b>rain</b> & snow", "music")):
        path = str(write_clip(folder / f"{number}.mp4", 0.3 + 0.2 * number))
        clips.append(Clip(f"film {number}", path, path, {None: [caption]}, split="test" if number else "train"))
    sound = write_wav(folder / "3.wav", random.integers(-9000, 9000, (1, 30_000), dtype=np.int16))
    clips.append(Clip("sound", str(sound), None, {None: ["a bell"]}))
    Manifest.of(clips).write(folder / "clips.jsonl")
    embed_corpus(settings(folder, folder / "index", source=str(folder / "clips.jsonl")))
    return folder


@torch.inference_mode()
def test_queries_of_every_kind(corpus: Path):
    searcher = Searcher(Index(corpus / "index"), device="cpu")
    model, processor = load_model(corpus / "checkpoint"), Processor.from_pretrained(corpus / "checkpoint")
    files = [corpus / "0.mp4", corpus / "1.mp4", corpus / "2.mp4", corpus / "3.wav"]
    sounds = torch.cat([model.get_audio_embeds(**processor(audio=file)) for file in files])
    films = torch.cat([model.get_video_embeds(**processor(videos=file)) for file in files[:3]])
    text = processor(text="a dog")
    queries = {
        ("text", "audio"): (model.get_text_audio_embeds(**text), sounds, "audio_text"),
        ("text", "video"): (model.get_text_video_embeds(**text), films, "video_text"),
        ("audio", "video"): (sounds[3:], films, "audio_video"),
        ("video", "audio"): (films[:1], sounds, "audio_video"),
        ("audio text", "video"): (
            model.get_audio_plus_text_embeds(**text, **processor(audio=files[3])), films, "audio_plus_text_video",
        ),
        ("video text", "audio"): (
            model.get_video_plus_text_embeds(**text, **processor(videos=files[0])), sounds, "video_plus_text_audio",
        ),
        ("audio", "audio"): (sounds[3:], sounds, None),
    }  # fmt: skip
    for (given, within), (query, gallery, pairing) in queries.items():
        asked = {"text": "a dog", "audio": files[3], "video": files[0]}
        hits = searcher.search(**{name: asked[name] for name in given.split()}, within=within, top=3)
        scores = (query @ gallery.T)[0]
        if pairing is None:
            scores = torch.nn.functional.cosine_similarity(query, gallery)
        order = scores.argsort(descending=True)[:3]
        assert [hit.id for hit in hits] == [["film 0", "film 1", "film 2", "sound"][row] for row in order]
        np.testing.assert_allclose([hit.score for hit in hits], scores[order], rtol=1e-3, atol=1e-4)
        if pairing is None:
            assert hits[0].id == "sound" and hits[0].score == pytest.approx(1) and hits[0].probability is None
        else:
            logits = model.logits[pairing](query, gallery)[0, order]
            np.testing.assert_allclose([hit.probability for hit in hits], logits.sigmoid(), rtol=1e-2, atol=1e-6)


def test_conditions_on_columns(corpus: Path):
    searcher = Searcher(Index(corpus / "index"), device="cpu")

    def ids(*where: str) -> set[str]:
        return {hit.id for hit in searcher.search(text="a dog", within="audio", where=where)}

    assert ids("split=test") == {"film 1", "film 2"}
    assert ids("split!=test") == {"film 0"}  # a clip without a split has no split to be unequal
    assert ids("audio~.wav") == {"sound"} and ids("start>=0", "split=train") == {"film 0"}
    for condition in ("splt=test", "start", "captions=a"):
        with pytest.raises(ConfigError, match="write COLUMN=VALUE"):
            ids(condition)
    with pytest.raises(ConfigError, match="start is a number"):
        ids("start>soon")
    with pytest.raises(ConfigError, match="no row"):
        ids("split=train", "audio~.wav")


def test_the_page_shows_what_was_found(corpus: Path):
    hits = Searcher(Index(corpus / "index"), device="cpu").search(text="a dog", top=4, within="audio")
    page = page_of(hits, {"text": "a <dog>", "audio": None, "video": None})
    assert "a &lt;dog&gt;" in page and "<b>rain" not in page and "&lt;b&gt;rain&lt;/b&gt; &amp; snow" in page
    assert page.count("<video") == 3 and page.count("<audio") == 1 and page.count("data:image/jpeg") == 3
    assert page.count("<path d=") == 4 and "http" not in page.replace("http-equiv", "")


def test_the_command(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    picture = tmp_path / "picture.png"
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(picture)

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["search", str(corpus / "index"), *arguments, "--device", "cpu"])
        main()
        return capsys.readouterr().out

    found = run("a dog", "--video", str(picture), "--top", "2", "--json", "--html", str(tmp_path / "page.html"))
    expected = Searcher(Index(corpus / "index"), device="cpu").search(text="a dog", video=picture, top=2)
    assert [hit["id"] for hit in json.loads(found)] == [hit.id for hit in expected]
    assert (tmp_path / "page.html").exists()
    table = run("a dog", "--in", "audio")
    assert "sound" in table and "probability" in table and "a bell" in table
    for arguments, message in {
        (): "nothing was given",
        ("a dog", "--top", "0"): "--top 0",
        ("a dog", "--in", "music"): "--in music",
        ("--video", "gone.mp4"): "gone.mp4: no such file",
        ("a dog", "--checkpoint", str(tmp_path)): "has no config.yaml",
        ("a dog", "--html", str(tmp_path / "no/page.html")): "its folder does not exist",
    }.items():
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            run(*arguments)


def test_an_index_of_another_checkpoint_is_refused(corpus: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="no index.json in it"):
        Index(tmp_path)
    save_model(randomize(build_model(small_config()), seed=1), tmp_path / "other")
    with pytest.raises(ConfigError, match="not the checkpoint that made"):
        Searcher(Index(corpus / "index"), tmp_path / "other")
    with pytest.raises(ConfigError, match="give --checkpoint DIR"):
        Searcher(Index(corpus / "index"), tmp_path / "gone")
