"""Batches with captions of several kinds or one modality alone, against what `forward` and `get_*` give of each."""

import pytest
import torch
from conftest import random_batch, randomize, small_config
from test_processor import make_tokenizer
from torch import Tensor

from pe_av.config import HEADS
from pe_av.data.dataset import Collate
from pe_av.data.processor import Processor
from pe_av.evaluation.embed import Embedder, embed_clips
from pe_av.model.peav import PEAudioVideo


@pytest.fixture(scope="module")
def model() -> PEAudioVideo:
    return randomize(PEAudioVideo(small_config())).eval()


def tokens(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def test_one_kind_of_caption_gives_what_forward_gives(model: PEAudioVideo):
    batch = random_batch(small_config())
    with torch.inference_mode():
        found, expected = model.embed(batch), model(**batch).embeds()
    assert found.keys() == expected.keys() == set(HEADS)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_each_kind_of_caption_has_its_own_embeddings(model: PEAudioVideo):
    batches = {"audio": random_batch(small_config()), "visual": random_batch(small_config())}
    batches["visual"] |= tokens(random_batch(small_config(), seed=1))
    media = {name: value for name, value in batches["audio"].items() if name not in tokens(batches["audio"])}
    with torch.inference_mode():
        found = model.embed(media, {kind: tokens(batch) for kind, batch in batches.items()})
        expected = {kind: model(**batch).embeds() for kind, batch in batches.items()}
    with_text = [name for name in HEADS if "text" in HEADS[name]]
    assert set(found) == set(HEADS) - set(with_text) | {f"{name}@{kind}" for name in with_text for kind in batches}
    for kind in batches:
        for name in with_text:
            assert torch.equal(found[f"{name}@{kind}"], expected[kind][name])
        assert torch.equal(found["audio_video"], expected[kind]["audio_video"])


def test_one_modality_alone_is_enough(model: PEAudioVideo):
    batch = random_batch(small_config())
    with torch.inference_mode():
        found = model.embed({name: batch[name] for name in ("input_values", "padding_mask")})
        assert set(found) == {"audio"}
        assert torch.equal(found["audio"], model.get_audio_embeds(batch["input_values"], batch["padding_mask"]))
        found = model.embed(tokens(batch))
        assert set(found) == {"text_audio", "text_video", "text_audio_video"}
        assert torch.equal(found["text_video"], model.get_text_video_embeds(**tokens(batch)))


def test_every_caption_of_a_set_is_embedded_once(model: PEAudioVideo):
    """Two batches; captions shared between clips, missing, and for sound alone; clips without sound or picture."""
    processor, generator = Processor(model.config, make_tokenizer()), torch.Generator().manual_seed(0)
    hop, size = model.config.audio.codec.hop_length, model.config.video.vision.image_size
    captions = [
        {None: ["a dog", "a dog barks"]},
        {None: ["at night"]},
        {"audio": ["a dog", "barks", "a dog"]},
        {},
        {None: ["a"]},
    ]
    items = [{"id": str(i), "captions": each} for i, each in enumerate(captions)]
    for item in items[:4]:
        item["waveform"] = torch.randn(6 * hop, generator=generator)
    for item in items[1:]:
        item["frames"] = torch.randint(0, 256, (3, 3, size, size), generator=generator).byte()
    batches = [Collate(processor)(items[:2]), Collate(processor)(items[2:])]
    found = embed_clips(Embedder(model), batches, processor, torch.device("cpu"), "test")
    assert found.captions.tolist() == [[0, 1], [2, -1], [0, 3], [-1, -1], [4, -1]]
    texts = ("a dog", "a dog barks", "at night", "barks", "a")
    for name in ("text_audio", "text_video", "text_audio_video"):
        embed = getattr(model, f"get_{name}_embeds")
        with torch.inference_mode():
            expected = torch.cat([embed(**processor(text=text)) for text in texts])
        torch.testing.assert_close(found.texts[name], expected, rtol=1e-5, atol=1e-5)
    assert found.valid["text_audio"].tolist() == [True, True, True, False, True]
    assert found.valid["text_video"].tolist() == [True, True, False, False, True]
    assert found.valid["audio"].tolist() == [True, True, True, True, False]
