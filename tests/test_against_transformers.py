"""The whole model against transformers' PeAudioVideoModel: the same random weights, a batch in which nothing is padded.

Padding is where transformers 5.23 goes wrong (its codec runs over it), and so does its text feature, unless
`tie_last_hidden_states=False` restores what the original does.
"""

import pytest
import torch
from conftest import in_double, random_batch, relative_error
from published_models import EMBEDDINGS, LOGITS, hf_model, shape_one
from published_names import from_transformers
from torch import Tensor, nn
from transformers import PeAudioVideoModel

from pe_av.config import ModelConfig
from pe_av.model.pe_audio_video import PEAudioVideo


@pytest.fixture(scope="module")
def models() -> tuple[PEAudioVideo, PeAudioVideoModel]:
    """Both in float64, since random weights amplify the codec's rounding."""
    theirs = hf_model("one").double()
    ours = PEAudioVideo(shape_one())
    ours.load_state_dict(from_transformers(dict(theirs.named_parameters())))
    return ours.double().eval(), theirs


def batch(config: ModelConfig, steps: int, frames: int) -> dict[str, Tensor]:
    """Three rows of the same lengths; transformers aligns only where the lengths of audio and video differ."""
    inputs = random_batch(config, rows=((20, steps, frames),) * 3)
    return in_double({name: value for name, value in inputs.items() if "mask" not in name})


@pytest.mark.parametrize(("steps", "frames"), [(9, 4), (4, 9), (6, 6), (1, 1)])
def test_embeddings_and_logits(models: tuple[PEAudioVideo, PeAudioVideoModel], steps: int, frames: int):
    """All eight and all six. 1e-6 and not less, because norms and rotations go through float32, in both models."""
    ours, theirs = models
    inputs = batch(ours.config, steps, frames)
    with torch.inference_mode():
        found, expected = ours(**inputs), theirs(**inputs)
    for name in (*(f"{name}_embeds" for name in EMBEDDINGS), *(f"logits_{name}" for name in LOGITS)):
        assert relative_error(getattr(found, name), getattr(expected, name)) <= 1e-6, name


def test_hidden_states(models: tuple[PEAudioVideo, PeAudioVideoModel]):
    ours, theirs = models
    inputs = batch(ours.config, 9, 4)
    with torch.inference_mode():
        found, expected = ours(**inputs), theirs(**inputs)
    for tower in ("audio", "video", "audio_video"):
        theirs_last = expected[f"{tower}_outputs"].last_hidden_state
        assert relative_error(getattr(found, f"{tower}_last_hidden_state"), theirs_last) <= 1e-6, tower
    assert relative_error(found.text_last_hidden_state, expected.text_outputs.hidden_states[-1]) <= 1e-6


@pytest.mark.parametrize("without", ["input_ids", "input_values", "pixel_values_videos"])
def test_two_inputs(models: tuple[PEAudioVideo, PeAudioVideoModel], without: str):
    """Everything that transformers then gives."""
    ours, theirs = models
    inputs = batch(ours.config, 9, 4)
    del inputs[without]
    with torch.inference_mode():
        found = ours(**inputs)
        expected = text_and_video(theirs, inputs) if without == "input_values" else theirs(**inputs)
    compared = [name for name in expected if name.endswith("_embeds") or name.startswith("logits_")]
    assert len(compared) == 4
    for name in compared:
        assert relative_error(getattr(found, name), expected[name]) <= 1e-6, name


def text_and_video(model: PeAudioVideoModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5.23 raises for these two, because it reads an output that is not there; its parts do not."""
    with pytest.raises(AttributeError, match="mm_encoder_outputs"):
        model(**inputs)
    out = model.video_model(**inputs)
    joined = torch.cat((out.video_outputs.pooler_output, out.text_outputs.hidden_states[-1][:, 0]), dim=-1)
    return {**out, "video_plus_text_embeds": model.video_plus_text_head(joined)}


def test_loss_differs_as_it_must(models: tuple[PEAudioVideo, PeAudioVideoModel]):
    """From the same logits transformers makes another loss: pairs that do not belong together count log 2 each."""
    ours, theirs = models
    inputs = batch(ours.config, 9, 4)
    with torch.inference_mode():
        found, expected = ours(**inputs, return_loss=True), theirs(**inputs, return_loss=True)
    for name in LOGITS:
        logits = getattr(found, f"logits_{name}").double()
        on_diagonal = -nn.functional.logsigmoid(logits.diagonal()).sum() / 3
        apart = -nn.functional.logsigmoid(-logits)[~torch.eye(3, dtype=torch.bool)].sum() / 3
        expected_theirs = on_diagonal + 2 * torch.tensor(2.0).log()
        assert expected[f"{name}_loss"].item() == pytest.approx(expected_theirs.item(), rel=1e-6)
        assert getattr(found, f"{name}_loss").item() == pytest.approx((on_diagonal + apart).item(), rel=1e-6)
