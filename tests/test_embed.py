"""Batches with captions of several kinds or one modality alone, against what `forward` and `get_*` give of each."""

import pytest
import torch
from conftest import random_batch, randomize, small_config
from torch import Tensor

from pe_av.config import HEADS
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
