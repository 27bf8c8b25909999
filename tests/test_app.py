"""The page to try a model on, through its own interface and in a browser. Needs the extra `app`."""

import html
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize, small_config
from test_classification import make_tokenizer
from test_corpus import settings
from test_data import write_clip
from test_media import write_wav

from pe_av.checkpoint import build_model, load_model, save_model
from pe_av.config import ConfigError, PEAudioFrameConfig
from pe_av.embed import embed_corpus
from pe_av.index import Index
from pe_av.media.processor import Processor
from pe_av.search import Searcher

pytest.importorskip("gradio")
from gradio_client import Client, handle_file  # noqa: E402

from pe_av.app import Listener, build, pieces  # noqa: E402

PORT = 7871


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("app")
    config = small_config()
    model = randomize(build_model(config))
    frame = randomize(build_model(PEAudioFrameConfig(text=config.text, audio=config.audio, output_dim=16)))
    for name, one in (("checkpoint", model), ("frame", frame)):
        save_model(one, folder / name)
        Processor(one.config, make_tokenizer()).save_pretrained(folder / name)
    (folder / "media").mkdir()
    for number in range(3):
        write_clip(folder / f"media/{number}.mp4", 0.4 + 0.2 * number)
    write_wav(folder / "sound.wav", np.random.default_rng(0).integers(-9000, 9000, (1, 60_000), dtype=np.int16))
    embed_corpus(settings(folder, folder / "index"))
    return folder


@pytest.fixture(scope="module")
def page(corpus: Path) -> Iterator[Client]:
    searcher = Searcher(Index(corpus / "index"), device="cpu")
    blocks = build(searcher, Listener(str(corpus / "frame"), torch.device("cpu")))
    blocks.launch(server_port=PORT, prevent_thread_lock=True, quiet=True)
    yield Client(f"http://127.0.0.1:{PORT}", verbose=False)
    blocks.close()


def test_search_shows_what_the_searcher_finds(corpus: Path, page: Client):
    shown = page.predict("a dog", None, None, None, "audio", 2, api_name="/search")
    ids = re.findall(r'class="id">([^<]+)<', html.unescape(shown))
    expected = Searcher(Index(corpus / "index"), device="cpu").search(text="a dog", within="audio", top=2)
    assert ids == [hit.id for hit in expected] and len(ids) == 2
    shown = page.predict("", handle_file(corpus / "sound.wav"), None, None, "what fits", 1, api_name="/search")
    expected = Searcher(Index(corpus / "index"), device="cpu").search(audio=corpus / "sound.wav", top=1)
    assert re.findall(r'class="id">([^<]+)<', html.unescape(shown)) == [expected[0].id]


def test_mistakes_are_said_on_the_page(corpus: Path, page: Client):
    with pytest.raises(Exception, match="nothing was given"):
        page.predict(" ", None, None, None, "what fits", 2, api_name="/search")
    sound = handle_file(corpus / "sound.wav")
    with pytest.raises(Exception, match="can be searched in"):
        page.predict("", sound, handle_file(corpus / "media/0.mp4"), None, "audio", 2, api_name="/search")


def test_the_pieces_are_embedded_alone(corpus: Path):
    searcher = Searcher(Index(corpus / "index"), device="cpu")
    figure = pieces(searcher, str(corpus / "sound.wav"), "a dog", 0.5)
    curve = figure.axes[0].patches[0]  # the stairs
    model, processor = load_model(corpus / "checkpoint"), Processor.from_pretrained(corpus / "checkpoint")
    with torch.inference_mode():
        text = model.get_text_audio_embeds(**processor(text="a dog"))
        for start, value in zip(curve.get_data().edges, curve.get_data().values, strict=False):
            item = processor.audio_item(corpus / "sound.wav", start=start, end=min(start + 0.5, 1.25))
            sound = model.get_audio_embeds(**processor.batch_audio([item]))
            assert value == pytest.approx(model.logits["audio_text"](sound, text).sigmoid().item(), rel=1e-2, abs=1e-6)
    assert list(curve.get_data().edges) == pytest.approx([0, 0.5, 0.75, 1.25])


def test_when_it_is_heard_is_drawn(corpus: Path, page: Client):
    curve, spans = page.predict(handle_file(corpus / "sound.wav"), "a dog", 0.0, api_name="/listen")
    assert spans == "0.00–1.28 s" and "base64" in str(curve)  # a threshold of 0 marks all 32 positions
    with pytest.raises(ConfigError, match="no PEAudioFrame"):
        Listener(str(corpus / "checkpoint"), torch.device("cpu"))


def test_a_browser_shows_the_three_tabs(page: Client):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    command = [browser, "--headless", "--no-sandbox", "--dump-dom", "--virtual-time-budget=20000"]
    shown = subprocess.run([*command, page.src], capture_output=True, text=True, timeout=120).stdout
    for word in ("Search", "Piece by piece", "When is it heard?", "in words", "3 clips of"):
        assert word in shown
