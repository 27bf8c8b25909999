"""The temporal transformer against a float64 brute force written from the description of the model, and the three
implementations of attention against each other."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_batch, randomize, relative_error, small_config
from scipy.special import erf
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.pe_audio import PeAudioEncoderConfig

from pe_av.config import ACTIVATIONS, ConfigError, ModelConfig, RopeConfig, TransformerConfig
from pe_av.model.build import build_temporal
from pe_av.model.pe_audio_video import PEAudioVideo
from pe_av.model.transformer import TemporalTransformer, attend, rotary_angles

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

SMALL = TransformerConfig(hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4, head_dim=6)

ACTIVATION = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "gelu_pytorch_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


def build(config: TransformerConfig, attention: str = "sdpa") -> TemporalTransformer:
    return randomize(build_temporal(config, attention)).eval()


class BruteForce:
    """One row of the temporal transformer in float64, element by element where an index could be wrong."""

    def __init__(self, model: TemporalTransformer, config: TransformerConfig):
        self.weights = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
        self.config = config

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(T, D) -> (T + 1, D), the class token's output first."""
        weights, config = self.weights, self.config
        x = np.concatenate((weights["class_token"][0], x))
        hidden = x
        for i in range(2):
            hidden = self.conv_block(hidden, f"conv_blocks.{i}")
        x = x + hidden
        for i in range(config.num_hidden_layers):
            name = f"layers.{i}"
            x = x + self.attention(self.rms_norm(x, weights[f"{name}.attention_norm.weight"]), f"{name}.attention")
            normed = self.rms_norm(x, weights[f"{name}.mlp_norm.weight"])
            gate = ACTIVATION[config.hidden_act](normed @ weights[f"{name}.mlp.gate_proj.weight"].T)
            up = normed @ weights[f"{name}.mlp.up_proj.weight"].T
            x = x + (gate * up) @ weights[f"{name}.mlp.down_proj.weight"].T
        return self.rms_norm(x, weights["norm.weight"]) @ weights["output.weight"].T

    def conv_block(self, x: np.ndarray, name: str) -> np.ndarray:
        """Group norm with one group, SiLU, convolution of 3 with a zero on either side."""
        weights = self.weights
        normed = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]
        activated = ACTIVATION["silu"](normed)
        out = np.tile(weights[f"{name}.conv.bias"], (len(x), 1))
        for t in range(len(x)):
            for tap, source in enumerate((t - 1, t, t + 1)):
                if 0 <= source < len(x):
                    out[t] += weights[f"{name}.conv.weight"][:, :, tap] @ activated[source]
        return out

    def rms_norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config.rms_norm_eps) * weight

    def rotated(self, x: np.ndarray, length: int) -> np.ndarray:
        """(T, d), adjacent pairs turned."""
        rope, width, most = self.config.rope_parameters, x.shape[1], self.config.max_position_embeddings
        theta = rope.rope_theta
        if rope.rope_type == "dynamic" and length > most:
            theta *= (rope.factor * length / most - (rope.factor - 1)) ** (width / (width - 2))
        out = np.empty_like(x)
        for position in range(len(x)):
            for pair in range(width // 2):
                angle = position / (rope.factor if rope.rope_type == "linear" else 1) * theta ** (-2 * pair / width)
                a, b = x[position, 2 * pair], x[position, 2 * pair + 1]
                out[position, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
                out[position, 2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
        return out

    def attention(self, x: np.ndarray, name: str) -> np.ndarray:
        weights, config = self.weights, self.config
        projected = {
            kind: x @ weights[f"{name}.{kind}_proj.weight"].T + weights.get(f"{name}.{kind}_proj.bias", 0)
            for kind in "qkv"
        }
        width, group = config.head_dim, config.num_attention_heads // config.key_value_heads
        outputs = []
        for head in range(config.num_attention_heads):
            mine = slice(head * width, (head + 1) * width)
            shared = slice(head // group * width, (head // group + 1) * width)  # neighbours share keys and values
            q = self.rotated(self.rms_norm(projected["q"][:, mine], weights[f"{name}.q_norm.weight"]), len(x))
            k = self.rotated(self.rms_norm(projected["k"][:, shared], weights[f"{name}.k_norm.weight"]), len(x))
            scores = np.exp(q @ k.T / math.sqrt(width))
            outputs.append(scores / scores.sum(1, keepdims=True) @ projected["v"][:, shared])
        joined = np.concatenate(outputs, axis=1)
        return joined @ weights[f"{name}.o_proj.weight"].T + weights.get(f"{name}.o_proj.bias", 0)


def check_against_brute_force(config: TransformerConfig, lengths: tuple[int, ...] = (9, 4, 1)) -> None:
    """A ragged batch, with noise behind the end of the shorter rows, and no mask at all for the longest alone."""
    model = build(config)
    brute_force = BruteForce(model, config)
    x = torch.randn(len(lengths), max(lengths), config.hidden_size)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    with torch.inference_mode():
        pooled, sequence, _ = model(x, mask)
        alone_pooled, alone_sequence, _ = model(x[:1])
    for row, length in enumerate(lengths):
        expected = torch.from_numpy(brute_force(x[row, :length].double().numpy()))
        # float32 against float64
        assert relative_error(torch.cat((pooled[row][None], sequence[row, :length])), expected) <= 2e-6
        if row == 0:
            assert relative_error(torch.cat((alone_pooled, alone_sequence[0])), expected) <= 2e-6


def test_brute_force():
    check_against_brute_force(SMALL)


@pytest.mark.parametrize("key_value_heads", [1, 2])
def test_grouped_query_attention(key_value_heads: int):
    check_against_brute_force(replace(SMALL, num_key_value_heads=key_value_heads))


def test_attention_bias():
    config = replace(SMALL, attention_bias=True)
    biases = {name.split(".")[-2] for name, _ in build(config).named_parameters() if name.endswith("_proj.bias")}
    assert biases == {"q_proj", "k_proj", "v_proj", "o_proj"}
    check_against_brute_force(config)


def test_heads_wider_than_the_hidden_size():
    check_against_brute_force(replace(SMALL, head_dim=16))


@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
def test_activation(hidden_act: str):
    check_against_brute_force(replace(SMALL, hidden_act=hidden_act))


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_rms_norm_eps(eps: float):
    check_against_brute_force(replace(SMALL, rms_norm_eps=eps))


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(rope_theta=100.0),
        RopeConfig(rope_type="linear", factor=4.0),
        RopeConfig(rope_type="dynamic", factor=1.0),
        RopeConfig(rope_type="dynamic", factor=2.5),
    ],
)
def test_rope(rope: RopeConfig):
    """At most 8 positions: one row is longer than that, one just not, and each is turned by its own length."""
    most = 8 if rope.rope_type == "dynamic" else 100
    check_against_brute_force(replace(SMALL, rope_parameters=rope, max_position_embeddings=most), lengths=(20, 8, 7, 2))


@pytest.mark.parametrize("rope_type", ["linear", "dynamic"])
@pytest.mark.parametrize("length", [5, 64, 65, 300])
def test_rope_equals_transformers(rope_type: str, length: int):
    rope = RopeConfig(rope_type=rope_type, rope_theta=20_000.0, factor=3.0)
    config = PeAudioEncoderConfig(
        max_position_embeddings=64,
        head_dim=16,
        rope_parameters={"rope_type": rope_type, "rope_theta": 20_000.0, "factor": 3.0},
    )
    frequency, _ = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=length)
    expected = torch.arange(length)[:, None] * frequency
    found = rotary_angles(rope, 16, length, torch.tensor([length]), max_position=64)
    assert relative_error(found[0], expected) <= 1e-6


def test_positions_beyond_the_maximum_are_refused():
    """The class token counts."""
    model = build(replace(SMALL, max_position_embeddings=8))
    model(torch.randn(1, 7, 24))
    with pytest.raises(ValueError, match=r"8 positions and a class token .* max_position_embeddings=8"):
        model(torch.randn(1, 8, 24))
    build(replace(SMALL, max_position_embeddings=8, rope_parameters=RopeConfig(rope_type="dynamic")))(
        torch.randn(1, 8, 24)
    )


# ---------------------------------------------------------------------------------------------------------------------
# attention: eager, sdpa, flex


def one_mask(kind: str, batch: int, queries: int, keys: int) -> Tensor | None:
    """Masks as the model makes them: none; padding; a window; a window and padding."""
    lengths = torch.tensor([keys, 1, keys // 2])[:batch]
    padding = (torch.arange(keys) < lengths[:, None])[:, None, None]
    distance = (torch.arange(queries)[:, None] - torch.arange(keys)).abs()
    window = (distance <= 2)[None, None]
    return {"none": None, "padding": padding, "window": window, "both": window & (padding | (distance == 0))}[kind]


@pytest.mark.parametrize("kind", ["none", "padding", "window", "both"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_attention_implementations_agree(kind: str, key_heads: int):
    """With a float64 softmax over the keys that a query may see."""
    q, k, v = torch.randn(3, 4, 11, 8), torch.randn(3, key_heads, 11, 8), torch.randn(3, key_heads, 11, 8)
    mask = one_mask(kind, 3, 11, 11)
    seen = torch.ones(3, 1, 11, 11, dtype=torch.bool) if mask is None else mask.expand(3, 1, 11, 11)
    expected = torch.zeros(3, 4, 11, 8, dtype=torch.float64)
    for b, h, i in np.ndindex(3, 4, 11):
        keys, values = (x[b, h // (4 // key_heads)][seen[b, 0, i]].double() for x in (k, v))
        expected[b, h, i] = (keys @ q[b, h, i].double() / math.sqrt(8)).softmax(0) @ values
    for implementation in ("eager", "sdpa", "flex"):
        found, weights = attend(q, k, v, mask, implementation)
        assert relative_error(found, expected) <= 5e-7, implementation
        assert (weights is not None) == (implementation == "eager")


@pytest.mark.parametrize("key_heads", [2, 4])
def test_gradients_of_eager_and_sdpa_agree(key_heads: int):
    """flex has no backward pass on a CPU."""
    mask = one_mask("both", 3, 11, 11)
    gradients = {}
    for implementation in ("eager", "sdpa"):
        torch.manual_seed(1)
        inputs = [torch.randn(3, heads, 11, 8, requires_grad=True) for heads in (4, key_heads, key_heads)]
        out, _ = attend(*inputs, mask, implementation)
        gradients[implementation] = torch.autograd.grad((out * torch.randn_like(out)).sum(), inputs)
    for eager, sdpa in zip(*gradients.values(), strict=True):
        assert relative_error(sdpa, eager) <= 2e-6


@pytest.fixture(scope="module")
def eager() -> PEAudioVideo:
    return randomize(PEAudioVideo(replace(small_config(), attention="eager"))).eval()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "flex"])
def test_model_is_the_same_in_every_implementation(eager: PEAudioVideo, implementation: str, masked: bool):
    batch = random_batch(eager.config)
    if not masked:
        batch = {name: value for name, value in batch.items() if "mask" not in name}
    other = PEAudioVideo(replace(small_config(), attention=implementation)).eval()
    other.load_state_dict(eager.state_dict())
    with torch.inference_mode():
        expected, found = eager(**batch), other(**batch)
    for name, value in expected.embeds().items():
        assert relative_error(found.embeds()[name], value) <= 2e-6, name


@pytest.mark.parametrize("implementation", ["eager", "flex", "sdpa"])
def test_set_attention(implementation: str):
    """It reaches every layer of every tower, the pooling included, and the weights stay."""
    model = PEAudioVideo(small_config()).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.set_attention(implementation)
    used = {name: m.implementation for name, m in model.named_modules() if hasattr(m, "implementation")}
    config = model.config
    layers = (config.text, config.audio.transformer, config.video.vision, config.video.transformer, config.fusion)
    assert len(used) == sum(part.num_hidden_layers for part in layers) + 1
    assert set(used.values()) == {implementation}
    assert model.config.attention == implementation
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def with_dropout(part: str, attention: str) -> ModelConfig:
    config = replace(small_config(), attention=attention)
    section = {"text": config.text, "audio": config.audio.transformer, "video": config.video.transformer}
    (section | {"fusion": config.fusion})[part].attention_dropout = 0.4
    return config


@pytest.mark.parametrize("part", ["text", "audio", "video", "fusion"])
def test_flex_with_dropout_is_refused(part: str):
    """When a model is built, and when a model that is there is switched; which it then is not."""
    with pytest.raises(ConfigError, match=rf"{part}: attention_dropout=0.4 needs attention=sdpa or eager"):
        replace(with_dropout(part, "sdpa"), attention="flex")
    model = PEAudioVideo(with_dropout(part, "sdpa"))
    with pytest.raises(ConfigError, match=rf"{part}: attention_dropout=0.4 needs attention=sdpa or eager"):
        model.set_attention("flex")
    assert model.config.attention == "sdpa"
    assert {m.implementation for m in model.modules() if hasattr(m, "implementation")} == {"sdpa"}


def test_unknown_attention_is_refused():
    model = PEAudioVideo(small_config())
    with pytest.raises(ConfigError, match="attention=spda is unknown; did you mean sdpa"):
        model.set_attention("spda")
    assert model.config.attention == "sdpa"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("part", ["text", "audio", "video", "fusion"])
def test_attention_dropout_only_in_training(part: str, attention: str):
    """And only in the part that it is set for."""
    model = randomize(PEAudioVideo(with_dropout(part, attention))).eval()
    batch = random_batch(model.config)
    reads = {
        "text": {"text_audio", "text_video", "text_audio_video", "audio_plus_text", "video_plus_text"},
        "audio": {"audio", "audio_video", "audio_plus_text"},
        "video": {"video", "audio_video", "video_plus_text"},
        "fusion": {"audio_video"},
    }
    with torch.inference_mode():
        still = [model(**batch).embeds() for _ in range(2)]
        model.train()
        moving = [model(**batch).embeds() for _ in range(2)]
    assert all(torch.equal(still[0][name], still[1][name]) for name in still[0])
    assert {name for name in moving[0] if not torch.equal(moving[0][name], moving[1][name])} == reads[part]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_keeps_the_expectation(implementation: str):
    """The mean of 20,000 draws is within five standard errors of attention without dropout, in all of 20 numbers."""
    draws = 20_000
    q, k, v = (torch.randn(1, 1, 5, 4).expand(draws, -1, -1, -1) for _ in range(3))
    exact, _ = attend(q[:1], k[:1], v[:1], None, implementation)
    dropped, _ = attend(q, k, v, None, implementation, dropout=0.3)
    error = (dropped.mean(0) - exact[0]) / (dropped.std(0) / math.sqrt(draws))
    assert dropped.std(0).min() > 0.01
    assert error.abs().max() < 5


def test_eager_weights(eager: PEAudioVideo):
    """One matrix per layer that runs; rows sum to 1, and no valid query looks at padding or out of its window."""
    config = eager.config
    batch = random_batch(config)
    tokens, frames = batch["attention_mask"], batch["padding_mask_videos"]
    hops = batch["padding_mask"][:, :: config.audio.codec.hop_length]
    with torch.inference_mode():
        attentions = eager(**batch, output_attentions=True).attentions
    with_class = {name: torch.nn.functional.pad(m, (1, 0), value=True) for name, m in (("a", hops), ("v", frames))}
    expected = {
        "text": (tokens, config.text.nth_text_layer, config.text.num_attention_heads),
        "audio": (with_class["a"], config.audio.transformer.num_hidden_layers, 4),
        "video": (with_class["v"], config.video.transformer.num_hidden_layers, 3),
        "audio_video": (with_class["a"], config.fusion.num_hidden_layers, 4),
    }
    assert attentions.keys() == expected.keys()
    for tower, (mask, layers, heads) in expected.items():
        assert len(attentions[tower]) == layers
        for layer, weights in enumerate(attentions[tower]):
            batch_size, length = mask.shape
            assert weights.shape == (batch_size, heads, length, length)
            assert (weights.sum(-1) - 1).abs().max() <= 1e-6
            pairs = mask[:, :, None] & mask[:, None]  # valid query, valid key
            if tower == "text" and layer % 3:
                pairs = pairs & ((torch.arange(length)[:, None] - torch.arange(length)).abs() <= 4)
            valid_queries = mask[:, None, :, None].expand_as(weights)
            seen = pairs[:, None].expand_as(weights)
            assert (weights[valid_queries & ~seen] == 0).all()
            assert (weights[seen] > 0).all()


def test_attention_weights_need_eager():
    model = PEAudioVideo(small_config()).eval()
    with pytest.raises(ValueError, match="attention=sdpa keeps no weights: build the model with attention=eager"):
        model(**random_batch(model.config), output_attentions=True)
