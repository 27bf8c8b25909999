"""The sigmoid contrastive loss against a float64 double loop, in every precision that embeddings come in."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import random_batch, randomize, relative_error, small_config
from torch import Tensor
from transformers import PeAudioVideoModel

from pe_av.config import PAIRINGS, ConfigError, LossConfig, Pairing
from pe_av.config.compose import config_dir, from_dict, read_yaml
from pe_av.loss import contrastive_loss, sigmoid_loss
from pe_av.model.heads import PairLogits
from pe_av.model.pe_audio_video import PEAudioVideo


def brute_force(logits: Tensor) -> tuple[float, Tensor]:
    """(N, N) logits -> the loss and its gradient, one pair at a time."""
    n = len(logits)
    loss, gradient = 0.0, torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            z, logit = (1 if i == j else -1), logits[i, j].item()
            loss += max(-z * logit, 0) + math.log1p(math.exp(-abs(logit)))  # −log σ(z·l), without overflow
            gradient[i, j] = -z / (1 + math.exp(z * logit)) / n
    return loss / n, gradient


@pytest.mark.parametrize("n", [1, 2, 7, 32])
@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0])
def test_value_and_gradient(n: int, spread: float):
    logits = (spread * torch.randn(n, n)).requires_grad_()
    expected, gradient = brute_force(logits.detach().double())
    loss = sigmoid_loss(logits)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert relative_error(logits.grad, gradient) <= 1e-6


def test_every_pair_is_learned_from():
    """The pairs that belong together are drawn together, all others pushed apart."""
    logits = torch.randn(6, 6, requires_grad=True)
    sigmoid_loss(logits).backward()
    diagonal = torch.eye(6, dtype=torch.bool)
    assert (logits.grad[diagonal] < 0).all()
    assert (logits.grad[~diagonal] > 0).all()


def test_transformers_learns_from_the_diagonal_only():
    """The fault of transformers 5.23: it multiplies by eye(N), so other pairs add a constant and get no gradient."""
    logits = torch.randn(6, 6, requires_grad=True)
    loss = PeAudioVideoModel._contrastive_loss(None, logits)
    loss.backward()
    diagonal = torch.eye(6, dtype=torch.bool)
    assert (logits.grad[~diagonal] == 0).all()
    ours = sigmoid_loss(logits)
    on_diagonal = -torch.nn.functional.logsigmoid(logits.diagonal()).sum() / 6
    assert loss.item() == pytest.approx((on_diagonal + 5 * math.log(2)).item(), rel=1e-6)
    assert ours.item() != pytest.approx(loss.item(), rel=1e-2)


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (4,), (2, 2, 2)])
def test_logits_that_are_not_square_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="one right-hand item for every left-hand one"):
        sigmoid_loss(torch.zeros(shape))


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_large_logits_give_finite_gradients(logit: float):
    logits = torch.full((3, 3), logit, requires_grad=True)
    loss = sigmoid_loss(logits)
    loss.backward()
    assert loss.item() == pytest.approx(1e4 if logit < 0 else 2e4)
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loss_of_rounded_embeddings_is_exact(dtype: torch.dtype, autocast: torch.dtype | None):
    """Logits and loss are computed in float32 from whatever the embeddings are, so their rounding is the only one."""
    pair = PairLogits(10.0, -10.0)
    with torch.no_grad():
        pair.scale.fill_(3.7)
        pair.bias.fill_(-9.1)
    pair.to(dtype)
    x = torch.randn(24, 64).to(dtype) / 8
    y = (x + torch.randn(24, 64).to(dtype) / 8).to(dtype)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        logits = pair(x, y)
        loss = sigmoid_loss(logits)
    scale, bias = pair.scale.double(), pair.bias.double()
    expected, _ = brute_force(scale * (x.double() @ y.double().T) + bias)
    assert logits.dtype == loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_scale_and_bias_of_every_pairing_are_its_own():
    """Each of the six losses moves one scale and one bias, and they start where the config says."""
    config = replace(small_config(), logit_scale_init=2.5, logit_bias_init=-3.5)
    model = PEAudioVideo(config).eval()
    for pair in model.logits.values():
        assert (pair.scale.item(), pair.bias.item()) == (2.5, -3.5)
    batch = random_batch(config)
    for pairing in PAIRINGS:
        model.zero_grad()
        getattr(model(**batch, return_loss=True), f"{pairing}_loss").backward()
        moved = {name for name, p in model.logits.named_parameters() if p.grad is not None and p.grad.any()}
        assert moved == {f"{pairing}.scale", f"{pairing}.bias"}


def test_logits_are_scale_times_similarity_plus_bias():
    """With the left side in the rows, by the names of the contract."""
    left_right = {
        "audio_text": ("audio", "text_audio"),
        "video_text": ("video", "text_video"),
        "audio_video": ("audio", "video"),
        "audio_video_text": ("audio_video", "text_audio_video"),
        "audio_plus_text_video": ("audio_plus_text", "video"),
        "video_plus_text_audio": ("video_plus_text", "audio"),
    }
    model = randomize(PEAudioVideo(small_config())).eval()
    with torch.inference_mode():
        out = model(**random_batch(model.config), return_loss=True)
    for pairing, (left, right) in left_right.items():
        x, y = (getattr(out, f"{side}_embeds").double() for side in (left, right))
        pair = model.logits[pairing]
        expected = pair.scale.item() * x @ y.T + pair.bias.item()
        assert relative_error(getattr(out, f"logits_{pairing}"), expected) <= 1e-6
        assert getattr(out, f"{pairing}_loss").item() == pytest.approx(brute_force(expected)[0], rel=1e-5)


@pytest.mark.parametrize(
    "weights", [None, {}, {"audio_text": 0.25}, dict(zip(PAIRINGS, (0.0, 0.5, 2.0, 3.0, 0.0, 7.0), strict=True))]
)
def test_total_is_the_weighted_sum(weights: dict[str, float] | None):
    model = randomize(PEAudioVideo(small_config())).eval()
    with torch.inference_mode():
        out = model(**random_batch(model.config), return_loss=True, loss_weights=weights)
    losses = {pairing: getattr(out, f"{pairing}_loss").item() for pairing in PAIRINGS}
    expected = math.fsum((weights or {}).get(pairing, 1.0) * loss for pairing, loss in losses.items())
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)


def test_ring_of_the_model_s_embeddings():
    """`contrastive_loss` moves the model's parameters as the logits of its forward do."""
    model = randomize(PEAudioVideo(small_config())).eval()
    batch = random_batch(model.config)
    model(**batch, return_loss=True).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = {name: (pair.scale, pair.bias) for name, pair in model.logits.items()}
    contrastive_loss(model(**batch).embeds(), logits, LossConfig().pairings).total.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name


def test_weights_of_the_config():
    assert LossConfig().weights == dict.fromkeys(PAIRINGS, 1.0)
    with pytest.raises(ConfigError, match="loss.weights=audio_txt is unknown; did you mean audio_text"):
        LossConfig({"audio_txt": 1.0})
    with pytest.raises(ConfigError, match="loss.weights.audio_text=-1.0 is negative"):
        LossConfig({"audio_text": -1.0})
    with pytest.raises(ConfigError, match="every pairing has weight 0"):
        LossConfig(dict.fromkeys(PAIRINGS, 0.0))


def test_pairings_of_the_config():
    """The six by default; ten.yaml has the objectives of the paper over three kinds of caption."""
    assert {p.name: (p.left, p.right) for p in LossConfig().pairings} == PAIRINGS
    assert all(p.caption is None and p.weight == 1 and p.logits == p.name for p in LossConfig().pairings)
    ten = read_yaml(LossConfig, config_dir() / "loss/ten.yaml").pairings
    assert {p.embeddings for p in ten} == {
        ("audio", "text_audio@audio"),
        ("audio", "text_audio@audio_visual"),
        ("video", "text_video@visual"),
        ("video", "text_video@audio_visual"),
        ("audio_video", "text_audio_video@audio"),
        ("audio_video", "text_audio_video@visual"),
        ("audio_video", "text_audio_video@audio_visual"),
        ("audio", "video"),
        ("audio_plus_text@visual", "video"),
        ("video_plus_text@audio", "audio"),
    }
    assert all(PAIRINGS[p.logits] == (p.left, p.right) for p in ten) and len(ten) == 10


def test_weights_are_factors_on_what_shares_a_scale():
    pairings = [
        Pairing("sound", "audio", "text_audio", "audio", weight=2.0),
        Pairing("both", "audio", "text_audio", "audio_visual", weight=3.0),
        Pairing("odd", "audio", "text_video", logits="video_text"),
    ]
    weighted = LossConfig({"audio_text": 0.5}, pairings).weighted()
    assert {p.name: p.weight for p in weighted} == {"sound": 1.0, "both": 1.5, "odd": 1.0}


@pytest.mark.parametrize(
    ("pairing", "expected"),
    [
        ({"left": "audoi"}, "loss.pairings: mine: there is no embedding audoi; did you mean audio?"),
        ({"right": "text_auido"}, "loss.pairings: mine: there is no embedding text_auido; did you mean text_audio?"),
        ({"caption": "visul"}, "loss.pairings: mine: caption=visul is unknown; did you mean visual?"),
        ({"right": "video", "caption": "visual"}, "but neither audio nor video is made with text"),
        ({"weight": -1.0}, "loss.pairings: mine: weight=-1.0 is negative"),
        ({"right": "text_video"}, "audio and text_video are none of the pairings that have a scale and a bias"),
        ({"logits": "audio_txt"}, "loss.pairings: mine: logits=audio_txt is unknown; did you mean audio_text?"),
        ({"captions": "audio"}, "unknown setting pairings[0].captions; did you mean pairings[0].caption?"),
        ({"left": None}, "left: Incompatible value 'None'"),
        (3, "pairings[0] must be a section of settings, not 3"),
    ],
)
def test_a_pairing_that_cannot_be(pairing: Any, expected: str):
    if isinstance(pairing, dict):
        pairing = {"name": "mine", "left": "audio", "right": "text_audio"} | pairing
    with pytest.raises(ConfigError) as error:
        from_dict(LossConfig, {"pairings": [pairing]}, source="here.yaml")
    assert str(error.value).startswith("here.yaml: ") and expected in str(error.value)


def test_pairings_that_cannot_be():
    one = {"name": "mine", "left": "audio", "right": "text_audio"}
    for pairings, expected in (
        ([], "loss.pairings is empty"),
        ([one, one], "loss.pairings: mine is the name of two pairings"),
        ([one | {"weight": 0.0}], "every pairing has weight 0"),
        (one, "pairings must be a list of sections"),
    ):
        with pytest.raises(ConfigError, match=expected):
            from_dict(LossConfig, {"pairings": pairings}, source="here.yaml")
