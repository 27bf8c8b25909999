"""`pe_av.embed_items`: the embeddings of many items in memory, against the model on one item at a time."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomize, relative_error, small_config
from PIL import Image
from torch import Tensor

from pe_av import PEAudioFrame, PEAudioVideo, Processor, load_model, save_model
from pe_av.config import HEADS, PEAudioFrameConfig
from pe_av.data.rendering import write_mp4
from pe_av.embedding import embed_items
from pe_av.media.tokenizer import train_tokenizer
from pe_av.media.tracks import MediaError

RATE = 16_000
INPUTS = {
    "text": ("input_ids", "attention_mask"),
    "audio": ("input_values", "padding_mask"),
    "video": ("pixel_values_videos", "padding_mask_videos"),
}


@pytest.fixture(scope="module")
def model() -> PEAudioVideo:
    return randomize(PEAudioVideo(small_config())).eval()


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(small_config(), train_tokenizer(["a dog barks", "rain falls"], 300))


def clip(folder: Path, seconds: float) -> str:
    path = folder / f"{seconds}.mp4"
    noise = np.random.default_rng(int(10 * seconds))
    frames = noise.integers(0, 256, (round(10 * seconds), 32, 32, 3), dtype=np.uint8)
    write_mp4(path, 0.1 * noise.standard_normal(round(48_000 * seconds)).astype(np.float32), frames)
    return str(path)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every set of modalities, as paths, arrays, tensors and images of several lengths, in no order."""
    folder = tmp_path_factory.mktemp("clips")
    noise = np.random.default_rng(0)
    files = [clip(folder, seconds) for seconds in (0.4, 1.3, 0.7)]
    pixels = noise.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    items: list[dict[str, Any]] = [{"text": "dog " * n} for n in (9, 1, 5)]
    items += [{"audio": 0.1 * torch.randn(n)} for n in (8_000, 20_000, 3_000)]
    items += [{"audio": file, "video": file, "text": "a dog barks"} for file in files]
    items += [{"video": Path(file)} for file in files]
    items += [{"audio": file, "text": "rain"} for file in files[:2]]
    items += [{"video": noise.integers(0, 256, (n, 20, 30, 3), dtype=np.uint8), "text": "rain"} for n in (7, 2)]
    items += [{"video": pixels}, {"video": Image.fromarray(pixels)}, {"video": str(folder / "image.png")}]
    random.Random(0).shuffle(items)
    return items


def alone(model: PEAudioVideo, processor: Processor, item: dict[str, Any]) -> dict[str, Tensor]:
    """By the `get_*` methods, from what the processor makes of this item alone."""
    arguments = {"videos" if name == "video" else name: value for name, value in item.items()}
    batch = processor(**arguments, sampling_rate=RATE)
    found = {}
    for name, towers in HEADS.items():
        read = [tower for tower in towers if tower != "fusion"]
        if set(read) <= set(item):
            inputs = {key: batch[key] for tower in read for key in INPUTS[tower]}
            with torch.no_grad():
                found[name] = getattr(model, f"get_{name}_embeds")(**inputs)[0]
    return found


@pytest.fixture(scope="module")
def expected_of(model: PEAudioVideo, processor: Processor, items: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    return [alone(model, processor, item) for item in items]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_each_item_has_the_embeddings_of_itself_alone(
    model: PEAudioVideo,
    processor: Processor,
    items: list[dict[str, Any]],
    expected_of: list[dict[str, Tensor]],
    batch_size: int,
):
    embeds, valid = embed_items(model, processor, items, batch_size, sampling_rate=RATE)
    assert list(embeds) == list(valid) == list(HEADS)
    for row, (item, expected) in enumerate(zip(items, expected_of, strict=True)):
        for name in HEADS:
            assert embeds[name].shape == (len(items), 28) and embeds[name].dtype == torch.float32
            assert valid[name][row].item() == (name in expected), (name, item)
            if name in expected:
                assert relative_error(embeds[name][row], expected[name]) <= 1e-5, (name, item)
            else:
                assert embeds[name][row].eq(0).all()


def test_what_no_item_has_is_left_out(model: PEAudioVideo, processor: Processor):
    """Nor a joint embedding whose inputs are in the same batch, but never in the same item."""
    embeds, valid = embed_items(model, processor, [{"text": "a dog"}, {"audio": torch.zeros(RATE)}], sampling_rate=RATE)
    assert set(embeds) == set(valid) == {"audio", "text_audio", "text_video", "text_audio_video"}
    assert embed_items(model, processor, []) == ({}, {})


def test_dtype_mode_and_towers_of_the_model(
    model: PEAudioVideo, processor: Processor, items: list[dict[str, Any]], tmp_path: Path
):
    texts = [item for item in items if "text" in item][:2]
    texts = [{"text": item["text"]} for item in texts]
    expected, _ = embed_items(model, processor, texts)
    save_model(model, tmp_path)
    half = load_model(tmp_path, dtype=torch.bfloat16, towers=("text",)).train()
    found, _ = embed_items(half, processor, texts)
    assert half.training and found["text_audio"].dtype == torch.float32
    assert 0 < relative_error(found["text_audio"], expected["text_audio"]) <= 0.05  # bfloat16 has 8 bits
    with pytest.raises(ValueError, match="loaded without audio: load it with towers that include it"):
        embed_items(half, processor, [{"audio": torch.zeros(RATE)}], sampling_rate=RATE)
    assert half.training  # after an error too


def test_a_long_list_shows_its_progress(
    model: PEAudioVideo, processor: Processor, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FORCE_COLOR", "1")  # or rich shows nothing where there is no terminal
    embed_items(model, processor, [{"text": "a dog"}] * 20, batch_size=1)
    assert "embedding" in capsys.readouterr().err
    embed_items(model, processor, [{"text": "a dog"}] * 19, batch_size=1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        ({"audio": "missing.wav"}, MediaError, r"items\[1\]: missing.wav: no such file"),
        ({"audio": torch.zeros(9, 9, 9)}, MediaError, r"items\[1\]: a waveform of shape"),
        ({"video": 7}, MediaError, r"items\[1\]: is of type int"),
        ({"vidoe": "x.mp4"}, ValueError, r"items\[1\] has the unknown key vidoe; did you mean video\?"),
        ({}, ValueError, r"items\[1\] is empty; give it text, audio or video"),
        ({"text": " "}, ValueError, r"items\[1\]: text is ' '; pass a caption"),
        ("a dog", ValueError, r'items\[1\] is of type str; pass a dict such as {"text": "a dog"}'),
    ],
)
def test_a_bad_item_is_named(model: PEAudioVideo, processor: Processor, item: Any, error: type, message: str):
    with pytest.raises(error, match=f"^{message}"):
        embed_items(model, processor, [{"text": "rain"}, item], sampling_rate=RATE)


def test_other_models_and_sizes_are_refused(model: PEAudioVideo, processor: Processor):
    config = small_config()
    frame = PEAudioFrame(PEAudioFrameConfig(text=config.text, audio=config.audio, output_dim=28))
    with pytest.raises(ValueError, match="embed_items is for PEAudioVideo; a PEAudioFrame embeds positions"):
        embed_items(frame, processor, [{"text": "rain"}])
    with pytest.raises(ValueError, match="batch_size=0 is not positive"):
        embed_items(model, processor, [{"text": "rain"}], batch_size=0)
