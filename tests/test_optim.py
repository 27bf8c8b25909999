"""Which parameters move and how far: decay, rates by part and layer, freezing, averages, adapters."""

import math

import numpy as np
import pytest
import torch
from conftest import alone, random_batch, randomize, small_config
from torch import nn

from pe_av.config import ConfigError, LoraConfig, OptimConfig
from pe_av.model.pe_audio_video import PEAudioVideo
from pe_av.training import muon
from pe_av.training.lora import add_adapters, merged_state_dict
from pe_av.training.optim import AveragedWeights, build_optimizer, freeze, set_learning_rate, take_step


def rates(model: nn.Module, config: OptimConfig) -> dict[str, float]:
    """Learning rate of each parameter, 0 where it is not trained, once the rate is warm."""
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, config, config.warmup_steps, 10**9)
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: found.get(id(p), 0.0) for name, p in model.named_parameters()}


def test_weight_decay_falls_on_matrices_only():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv1d(4, 2, 3), nn.Embedding(5, 2))
    model.register_parameter("class_token", nn.Parameter(torch.zeros(1, 1, 4)))
    model[2].bias.requires_grad_(False)
    groups = {
        group["weight_decay"]: group for group in build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    }
    assert {id(p) for p in groups[0.3]["params"]} == {id(model[i].weight) for i in (0, 2, 3)}
    assert {id(p) for p in groups[0.0]["params"]} == {
        id(p) for p in (model[0].bias, *model[1].parameters(), model.class_token)
    }


def test_the_learning_rate_warms_up_and_falls_as_half_a_cosine():
    config = OptimConfig(lr=2.0, warmup_steps=4, final_lr_ratio=0.1)
    expected = [0.5, 1.0, 1.5, 2.0]
    expected += [2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 8))) for step in range(9)]
    assert course(config) == pytest.approx(expected)
    config.schedule = "constant"
    assert course(config) == pytest.approx(expected[:4] + [2.0] * 9)


def course(config: OptimConfig) -> list[float]:
    optimizer, found = build_optimizer(nn.Linear(2, 2), config), []
    for step in range(13):
        assert set_learning_rate(optimizer, config, step, steps=12) == optimizer.param_groups[0]["lr"]
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_a_step_is_adamws_and_can_be_left_out_without_a_trace():
    config = OptimConfig(lr=0.1, weight_decay=0.3, warmup_steps=0)
    ours, theirs = (nn.Linear(3, 2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer, average = build_optimizer(ours, config), AveragedWeights(ours, 0.9)
    expected = AveragedWeights(theirs, 0.9)
    reference = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.3}, {"params": [theirs.bias], "weight_decay": 0.0}],
        lr=0.1, betas=tuple(config.betas), eps=config.eps, foreach=False,
    )  # fmt: skip
    for wrong in (0, 1, 0, 0, 1, 0):
        for model in (ours, theirs):
            model.zero_grad()
            model(torch.linspace(-1, 1, 3)).square().sum().backward()
        if wrong:
            ours.weight.grad.fill_(torch.nan)
        else:
            reference.step()
        take_step(optimizer, torch.tensor(wrong))
        average.update(ours, torch.tensor(wrong))
        if not wrong:
            expected.update(theirs, torch.tensor(0))
        torch.testing.assert_close(ours.weight, theirs.weight)
        torch.testing.assert_close(average.average["bias"], expected.average["bias"])


class Layers(nn.Module):
    """Three matrices that Muon trains, two of them alike, and a matrix and a bias that it does not."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, 10, bias=n == 6) for n in (6, 10, 10))
        self.out = nn.Linear(10, 3, bias=False)


def newton_schulz(gradient: np.ndarray) -> np.ndarray:
    """From singular values in float64: U · p(p(p(p(p(s / ‖s‖))))) · Vᵀ with p(s) = 3.4445 s - 4.775 s³ + 2.0315 s⁵."""
    u, s, vt = np.linalg.svd(gradient.astype(np.float64), full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ vt


def test_muon_steps_along_orthogonal_matrices():
    torch.manual_seed(0)
    for shape in ((5, 5), (4, 9), (9, 4)):
        given = torch.randn(3, *shape) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
        found = muon.orthogonal(given)
        for i in range(3):
            torch.testing.assert_close(found[i].double().numpy(), newton_schulz(given[i].numpy()), rtol=0, atol=2e-5)
        assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.35


@pytest.mark.parametrize("together", [1, 2**25])
def test_a_step_is_muons_and_can_be_left_out_without_a_trace(monkeypatch: pytest.MonkeyPatch, together: int):
    """Against its formula in float64, and against PyTorch's Muon, which rounds each of fifteen products to bfloat16."""
    config = OptimConfig(lr=0.01, muon_lr=0.05, weight_decay=0.3, warmup_steps=0)
    monkeypatch.setattr(muon, "TOGETHER", together)
    torch.manual_seed(0)
    ours, theirs = Layers(), Layers()
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, config)
    matrices = [layer.weight for layer in theirs.layers]
    its_muon = torch.optim.Muon(
        matrices, lr=0.05, weight_decay=0.3, momentum=0.95, nesterov=True, adjust_lr_fn="original"
    )
    adamw = torch.optim.AdamW(
        [{"params": theirs.out.weight, "weight_decay": 0.3}, {"params": theirs.layers[0].bias, "weight_decay": 0.0}],
        lr=0.01, betas=tuple(config.betas), eps=config.eps,
    )  # fmt: skip
    weights = [m.detach().double().numpy() for m in matrices]
    momenta = [np.zeros_like(w) for w in weights]
    start = [m.detach().clone() for m in matrices]
    for wrong in (0, 1, 0, 0, 1, 0):
        set_learning_rate(optimizer, config, 0, 100)
        for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)  # whose directions all are long enough for bfloat16
            its.grad = mine.grad.clone()
        if wrong:
            ours.layers[0].weight.grad.fill_(torch.nan)
            ours.layers[1].weight.grad.fill_(torch.inf)
        else:
            for i, matrix in enumerate(matrices):
                gradient = matrix.grad.double().numpy()
                momenta[i] = 0.95 * momenta[i] + 0.05 * gradient
                step = (
                    newton_schulz(0.05 * gradient + 0.95 * momenta[i])
                    * max(1, gradient.shape[0] / gradient.shape[1]) ** 0.5
                )
                weights[i] = weights[i] * (1 - 0.05 * 0.3) - 0.05 * step
            its_muon.step()
            adamw.step()
        take_step(optimizer, torch.tensor(wrong))
        for i in range(3):
            torch.testing.assert_close(ours.layers[i].weight.detach().double().numpy(), weights[i], rtol=0, atol=1e-5)
            moved = (matrices[i].detach() - start[i]).norm()
            assert (ours.layers[i].weight.detach() - matrices[i].detach()).norm() <= 0.05 * moved
        torch.testing.assert_close(ours.layers[0].bias, theirs.layers[0].bias)
        torch.testing.assert_close(ours.out.weight, theirs.out.weight)


def test_muon_trains_the_matrices_of_layers_alone():
    model = PEAudioVideo(small_config())
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, muon_lr=0.02, lr_scale={"video": 0.5}))
    set_learning_rate(optimizer, OptimConfig(lr=1e-3, muon_lr=0.02, schedule="constant"), 10**6, 10**9)
    by_muon = {id(p): group["lr"] for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    names = {name: by_muon[id(p)] for name, p in model.named_parameters() if id(p) in by_muon}
    assert names["text.layers.0.qkv.weight"] == names["fusion.transformer.layers.1.mlp.down_proj.weight"] == 0.02
    assert names["video.vision.pool.kv.weight"] == names["video.transformer.layers.0.attention.q_proj.weight"] == 0.01
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and (".layers." in name or ".pool." in name)
        assert (name in names) == (inside and parameter.requires_grad), name
    add_adapters(model, LoraConfig(rank=2))
    assert not any(group["muon"] for group in build_optimizer(model, OptimConfig(muon_lr=0.02)).param_groups)


def test_parts_have_rates_of_their_own():
    config = OptimConfig(lr=1.0, lr_scale={"video.vision": 0.0, "video": 0.5, "text.layers.0": 0.25})
    for name, rate in rates(PEAudioVideo(small_config()), config).items():
        trained = not name.startswith(("audio.codec.", "text.final_norm", "text.layers.4"))
        expected = 0.0 if name.startswith("video.vision.") else 0.5 if name.startswith("video.") else 1.0
        expected = 0.25 if name.startswith("text.layers.0.") else expected
        assert rate == (expected if trained else 0.0), name


def test_rates_fall_from_layer_to_layer():
    """Of n layers the last trains at the full rate, each below at half the next; what is before the first at 2^-n."""
    found = rates(PEAudioVideo(small_config()), OptimConfig(lr=1.0, layer_decay=0.5))
    assert found["audio.transformer.layers.1.mlp.up_proj.weight"] == 1.0
    assert found["audio.transformer.layers.0.mlp.up_proj.weight"] == 0.5
    assert found["audio.transformer.class_token"] == found["audio.transformer.conv_blocks.0.conv.weight"] == 0.25
    assert found["audio.transformer.norm.weight"] == found["heads.audio.proj.weight"] == 1.0
    assert found["text.layers.1.qkv.weight"] == 0.5**3 and found["text.embedding.weight"] == 0.5**5
    assert found["video.vision.patch_embed.weight"] == 0.25 and found["video.vision.pool.q.weight"] == 1.0


def test_frozen_parts_stay():
    model = PEAudioVideo(small_config())
    freeze(model, ["text", "video.vision"])
    found = rates(model, OptimConfig(lr=1.0))
    assert all(
        (rate == 0) == name.startswith(("text.", "video.vision.", "audio.codec.")) for name, rate in found.items()
    )
    with pytest.raises(ConfigError, match="optim.freeze: the model has no part vidio; it consists of text, audio"):
        freeze(model, ["vidio"])
    with pytest.raises(ConfigError, match="nothing to train"):
        freeze(model, ["audio", "video", "fusion", "heads", "logits"])
        build_optimizer(model, OptimConfig())


def test_the_average_follows_its_formula_and_changes_places():
    model = nn.Linear(3, 2, bias=False)
    average, history = AveragedWeights(model, 0.9), [model.weight.detach().clone()]
    for _ in range(5):
        nn.init.normal_(model.weight)
        history.append(model.weight.detach().clone())
        average.update(model, torch.tensor(False))
    expected = 0.9**5 * history[0] + sum(0.1 * 0.9 ** (5 - i) * history[i] for i in range(1, 6))
    average.swap(model)
    torch.testing.assert_close(model.weight.data, expected)
    average.swap(model)
    assert torch.equal(model.weight, history[-1])


def test_adapters_change_nothing_at_the_start_and_merge_into_plain_weights():
    config = small_config()
    model = randomize(PEAudioVideo(config)).double().eval()
    plain = {name: p.clone() for name, p in model.state_dict().items()}
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in alone(random_batch(config), 0).items()}
    before = model(**inputs).embeds()
    add_adapters(model, LoraConfig(rank=2, alpha=3.0))
    for name, value in model(**inputs).embeds().items():
        assert torch.equal(value, before[name]), name
    assert all(
        torch.equal(tensor, plain[name]) for name, tensor in merged_state_dict(model, model.state_dict()).items()
    )

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):  # in the first step only the upper matrices move, since they start at zero
        optimizer.zero_grad()
        sum(value.square().sum() for value in model(**inputs).embeds().values()).backward()
        optimizer.step()
    merged = PEAudioVideo(config).double().eval()
    merged.load_state_dict(merged_state_dict(model, model.state_dict()))
    with torch.no_grad():
        after = model(**inputs).embeds()
        for name, value in merged(**inputs).embeds().items():
            assert not torch.allclose(value, before[name], rtol=1e-4), name
            torch.testing.assert_close(value, after[name], rtol=1e-9, atol=1e-12)
    changed = {name for name, p in merged.state_dict().items() if not torch.equal(p, plain[name])}
    blocks = ("layers.", "heads.")
    assert changed and all(any(part in name for part in blocks) for name in changed)


def test_what_is_frozen_gets_no_adapter():
    model = PEAudioVideo(small_config())
    freeze(model, ["text", "heads.video", "video.vision"])
    add_adapters(model, LoraConfig(rank=1))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert (
        any(name.startswith("audio.transformer.layers.") for name in trained) and "heads.audio.proj.weight" in trained
    )
    assert not any(name.startswith(("text.", "heads.video.", "video.vision.")) for name in trained)


def test_adapters_train_little():
    model = PEAudioVideo(small_config())
    add_adapters(model, LoraConfig(rank=1))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith(("heads.", "logits.")) or ".adapter." in name for name in trained)
    linear = [
        m for block in model.blocks() for m in block.modules() if isinstance(m, nn.Linear) and hasattr(m, "adapter")
    ]
    assert sum(p.numel() for n, p in model.named_parameters() if ".adapter." in n) == sum(
        m.in_features + m.out_features for m in linear
    )
