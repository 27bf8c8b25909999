"""Embeddings of batches with several kinds of caption or one modality, against those of `forward` and `get_*`."""

from copy import deepcopy

import pytest
import torch
from conftest import random_batch, randomize, small_config
from test_processor import make_tokenizer
from torch import Tensor

from pe_av.config import HEADS
from pe_av.evaluation.embedder import Embedder, embed_clips
from pe_av.loading.batch import Collate
from pe_av.loading.split import EMPTY_MICRO_BATCH, joined, passes_of, split_batch, with_passes
from pe_av.media.processor import Processor
from pe_av.model.pe_audio_video import PEAudioVideo


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


def test_clips_that_lack_something_are_embedded_as_they_are_alone(model: PEAudioVideo):
    """Audio and caption, video and caption, audio and video, everything; whole and in micro-batches of two."""
    model = deepcopy(model).double()
    processor, generator = Processor(model.config, make_tokenizer()), torch.Generator().manual_seed(0)
    hop, size = model.config.audio.codec.hop_length, model.config.video.vision.image_size
    items = [{"id": str(i), "captions": {None: ["a dog"]} if i != 2 else {}} for i in range(4)]
    for i in (0, 2, 3):
        items[i]["waveform"] = torch.randn((3 + i) * hop, generator=generator)
    for i in (1, 2, 3):
        items[i]["frames"] = torch.randint(0, 256, (2 + i, 3, size, size), generator=generator).byte()
    whole = Collate(processor)(items)
    expected = [Collate(processor)([item]) for item in items]
    for micro_batches in (split_batch(whole, None), split_batch(whole, 2)):
        with torch.inference_mode():
            embedded = [Embedder(model)(micro_batch) for micro_batch in micro_batches]
            found = joined(embedded, [micro_batch["size"] for micro_batch in micro_batches])
            for row, batch in enumerate(expected):
                alone = model.embed(batch["inputs"], batch["texts"])
                assert set(alone) == {name for name in HEADS if whole["valid"][name][row]}
                for name, value in alone.items():
                    torch.testing.assert_close(found[name][row], value[0], rtol=1e-8, atol=1e-10)
    assert set(found) == set(HEADS)


def test_a_rank_without_clips_runs_what_others_run(model: PEAudioVideo):
    """Its parameters get gradients where those of other ranks do, all zero, so that they can be averaged."""
    batch = random_batch(small_config())
    texts = {None: {name: batch.pop(name) for name in tokens(batch)}}
    rows = dict.fromkeys(("audio", "video", "audio_video", "text"), torch.arange(3))
    everything = {"inputs": batch, "texts": texts, "rows": rows, "size": 3}

    def gradients(micro_batch: dict) -> dict[str, Tensor]:
        model.zero_grad()
        embeds = Embedder(model)(with_passes(micro_batch, sorted(passes_of(everything)), model.config))
        sum(value.square().sum() for value in embeds.values()).backward()
        assert all(len(value) == micro_batch["size"] for value in embeds.values()) and set(embeds) == set(HEADS)
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    full, nothing = gradients(everything), gradients(EMPTY_MICRO_BATCH)
    only_audio = gradients(
        {
            "inputs": {n: batch[n] for n in ("input_values", "padding_mask")},
            "texts": {},
            "rows": {"audio": rows["audio"]},
            "size": 3,
        }
    )
    assert full.keys() == nothing.keys() == only_audio.keys() and len(full) > 100
    assert not any(gradient.any() for gradient in nothing.values())
    assert all(gradient.isfinite().all() for gradient in only_audio.values())
    assert not any(g.any() for name, g in only_audio.items() if name.startswith(("video.", "text.", "fusion.")))
    model.zero_grad()


def test_every_caption_of_a_set_is_embedded_once(model: PEAudioVideo):
    """Two batches; captions shared between clips, missing, and of audio alone; clips without audio or video."""
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
