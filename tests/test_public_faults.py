"""The faults of the public implementations: each shown in transformers 5.23, and absent here with the same weights.

Elsewhere: the loss itself (test_loss.py), forward with text and video alone (test_against_transformers.py), our towers
in every kind of padding (test_model.py), our presets against the published counts (test_presets.py).
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import alone, in_double, random_batch, relative_error
from published_models import EMBEDDINGS, LOGITS, equal_rows, hf_config, hf_model, shape_one
from published_names import from_transformers
from torch import Tensor
from transformers import PeAudioFrameLevelModel, PeAudioModel, PeAudioVideoConfig, PeAudioVideoModel, PeVideoModel

from pe_av import PEAudioVideo, build_model

Models = tuple[PEAudioVideo, PeAudioVideoModel]


@pytest.fixture(scope="module")
def models() -> Models:
    """In float64, since random weights amplify the codec's rounding."""
    theirs = hf_model("one")
    ours = build_model(shape_one())
    ours.load_state_dict(from_transformers(dict(theirs.named_parameters())))
    return ours.double(), theirs.double()


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a, b, dim=-1).min().item()


# ---------------------------------------------------------------------------------------------------------------------
# the loss: logits times eye(N) in place of ±1


def off_diagonal_gradients(model: torch.nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    out = model(**inputs, return_loss=True)
    logits = {name: getattr(out, f"logits_{name}", None) for name in LOGITS}
    logits = {name: value for name, value in logits.items() if value is not None}
    gradients = torch.autograd.grad(out.loss, list(logits.values()))
    apart = ~torch.eye(3, dtype=torch.bool)
    return {name: gradient[apart] for name, gradient in zip(logits, gradients, strict=True)}


def test_every_pairing_learns_from_pairs_that_do_not_belong_together(models: Models):
    ours, theirs = models
    found, expected = (off_diagonal_gradients(model, equal_rows(shape_one())) for model in (ours, theirs))
    assert set(found) == set(expected) == set(LOGITS)
    for name in LOGITS:
        assert (expected[name] == 0).all(), name
        assert (found[name] > 0).all(), name


@pytest.mark.parametrize(("cls", "without"), [(PeAudioModel, "pixel_values_videos"), (PeVideoModel, "input_values")])
def test_so_do_the_models_of_one_tower(models: Models, cls: type, without: str):
    inputs = equal_rows(shape_one())
    del inputs[without]
    (theirs,) = off_diagonal_gradients(hf_model("one", cls).double(), inputs).values()
    assert (theirs == 0).all()
    for gradient in off_diagonal_gradients(models[0], inputs).values():
        assert (gradient > 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# the text feature: after the final norm


@pytest.mark.parametrize("cls", [PeAudioVideoModel, PeAudioFrameLevelModel])
def test_text_is_taken_before_the_final_norm(models: Models, cls: type):
    """By default transformers takes it after; without that norm in the way, the numbers are ours again."""
    ours, _ = models
    theirs = hf_model("one", PeAudioVideoModel).double()
    if cls is not PeAudioVideoModel:
        part = cls(hf_config("one", cls)).double().eval()
        part.load_state_dict(theirs.audio_model.state_dict(), strict=True)
        theirs = part
    inputs = equal_rows(shape_one())
    if cls is not PeAudioVideoModel:
        del inputs["pixel_values_videos"]
    with torch.inference_mode():
        expected = ours(**equal_rows(shape_one())).text_audio_embeds
        assert relative_error(theirs(**inputs).text_audio_embeds, expected) <= 1e-6
        del theirs.text_model.config.tie_last_hidden_states  # which is its default
        normed = theirs(**inputs).text_audio_embeds
    assert relative_error(normed, expected) > 0.1
    assert not hasattr(PeAudioVideoConfig().text_config, "tie_last_hidden_states")


# ---------------------------------------------------------------------------------------------------------------------
# the default config


def test_the_default_config_is_a_published_model():
    """Ours is `large`; transformers' is six layers everywhere, and frame features two numbers wide."""
    default = PeAudioVideoConfig()
    towers = default.audio_video_config
    layers = [c.num_hidden_layers for c in (towers.audio_config, towers.video_config, towers)]
    assert layers == [6, 6, 6]
    assert towers.video_config.vision_config.num_labels == 2
    ours = build_model(type(shape_one())(), device="meta")
    assert ours.config == build_model("large", device="meta").config
    assert [len(t.layers) for t in (ours.audio.transformer, ours.video.transformer, ours.fusion.transformer)] == [
        28, 4, 6,
    ]  # fmt: skip
    assert ours.video.proj.in_features == 1024


def test_what_transformers_saves_it_cannot_load(tmp_path: Path):
    """transformers saves the width of timm's head in a place where it does not look for it."""
    theirs = hf_model("one")
    theirs.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        PeAudioVideoModel.from_pretrained(tmp_path)
    video = json.loads((tmp_path / "config.json").read_text())["audio_video_config"]["video_config"]
    assert "num_labels" not in video["vision_config"]  # with it, all is well: test_convert.py


# ---------------------------------------------------------------------------------------------------------------------
# what a batch does to its rows


def for_transformers(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Its masks are integers."""
    return {name: value.long() if value.dtype == torch.bool else value for name, value in batch.items()}


def test_a_sound_is_what_it_is_alone(models: Models):
    """In transformers the codec hears the padding, in the last frames of the shorter row."""
    ours, theirs = models
    batch = in_double(random_batch(shape_one(), rows=((20, 12, 5), (20, 4, 5))))
    single = alone(batch, 1)
    with torch.inference_mode():
        found, expected = ours(**batch).audio_embeds[1], ours(**single).audio_embeds[0]
        assert relative_error(found, expected) <= 1e-6
        together = theirs(**for_transformers(batch)).audio_embeds[1]
        by_itself = theirs(**single).audio_embeds[0]
    assert cosine(together, by_itself) < 0.999
    assert relative_error(by_itself, expected) <= 1e-6  # alone they agree


@pytest.mark.parametrize("frames", [8, 9])
def test_pictures_are_aligned_even_where_the_padded_lengths_are_equal(models: Models, frames: int):
    """Eight steps of sound in both rows, three frames in the second. transformers aligns them when the batch is padded
    to nine frames, and not when it is padded to eight."""
    ours, theirs = models
    batch = in_double(random_batch(shape_one(), rows=((20, 8, frames), (20, 8, 3))))
    with torch.inference_mode():
        found, expected = ours(**batch).audio_video_embeds[1], ours(**alone(batch, 1)).audio_video_embeds[0]
        together = theirs(**for_transformers(batch)).audio_video_embeds[1]
        by_itself = theirs(**alone(batch, 1)).audio_video_embeds[0]
    assert relative_error(found, expected) <= 1e-6
    assert relative_error(by_itself, expected) <= 1e-6
    if frames == 8:
        assert relative_error(together, by_itself) > 0.05
    else:
        assert relative_error(together, by_itself) <= 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# methods that raise

RAISING = {
    "text_audio": ("input_ids",),
    "text_video": ("input_ids",),
    "video": ("pixel_values_videos",),
    "audio_plus_text": ("input_ids", "input_values"),
}
WORKING = {
    "audio": ("input_values",),
    "audio_video": ("input_values", "pixel_values_videos"),
    "text_audio_video": ("input_ids",),
    "video_plus_text": ("input_ids", "pixel_values_videos"),
}


def test_every_embedding_has_its_method():
    assert set(RAISING) | set(WORKING) == set(EMBEDDINGS)


@pytest.mark.parametrize("name", RAISING | WORKING)
def test_the_get_methods_give_what_forward_gives(models: Models, name: str):
    ours, theirs = models
    inputs = equal_rows(shape_one())
    given = {key: inputs[key] for key in (RAISING | WORKING)[name]}
    with torch.inference_mode():
        found = getattr(ours, f"get_{name}_embeds")(**given)
        assert relative_error(found, getattr(ours(**inputs), f"{name}_embeds")) <= 1e-6
        if name in RAISING:
            with pytest.raises((AttributeError, TypeError, KeyError)):
                getattr(theirs, f"get_{name}_embeds")(**given)


# ---------------------------------------------------------------------------------------------------------------------
# speed


def test_the_codec_uses_the_convolutions_that_there_are(models: Models, monkeypatch: pytest.MonkeyPatch):
    """transformers turns cuDNN off around the codec."""
    calls, real = [], torch.backends.cudnn.flags

    def recorded(*args: object, **kwargs: object) -> Callable:
        calls.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.backends.cudnn, "flags", recorded)
    ours, theirs = models
    inputs = equal_rows(shape_one())
    with torch.inference_mode():
        ours(**inputs)
        assert calls == []
        theirs(**inputs)
        assert any(call.get("enabled") is False for call in calls)
