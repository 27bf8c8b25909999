"""ModernBERT against transformers' ModernBertModel, with the same random weights."""

from dataclasses import replace

import pytest
import torch
from conftest import alone, random_batch, randomize, relative_error, small_config
from published_names import TRANSFORMERS, renamed
from torch import Tensor
from transformers import ModernBertConfig, ModernBertModel

from pe_av.config import TextConfig
from pe_av.model.build import build_text
from pe_av.model.text import ModernBERT

LONG = replace(small_config().text, num_hidden_layers=7, nth_text_layer=5)  # layers 0, 3 and 6 see everything
TOKENS = 40  # many times as far as |i − j| <= 4


def reference(config: TextConfig) -> ModernBertModel:
    rope = {"full_attention": config.global_rope_theta, "sliding_attention": config.local_rope_theta}
    model = ModernBertModel(
        ModernBertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            hidden_activation=config.hidden_act,
            global_attn_every_n_layers=config.global_attn_every_n_layers,
            local_attention=config.local_attention,
            rope_parameters={kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in rope.items()},
            norm_eps=config.norm_eps,
            attention_dropout=config.attention_dropout,
            pad_token_id=config.pad_token_id,
            bos_token_id=None,
            eos_token_id=None,
            tie_last_hidden_states=False,  # the last hidden state before the final norm, as the original has it
            attn_implementation="eager",
        )
    )
    return randomize(model).eval()


def ours(config: TextConfig, weights: dict[str, Tensor], attention: str = "sdpa") -> ModernBERT:
    model = build_text(config, attention)
    names = {name: renamed(f"text_model.{name}", TRANSFORMERS).removeprefix("text.") for name in weights}
    model.load_state_dict({names[name]: tensor for name, tensor in weights.items()})
    return model.eval()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex"])
@pytest.mark.parametrize("nth", range(1, LONG.num_hidden_layers + 1))
def test_every_layer_equals_transformers(nth: int, attention: str):
    """Before the final norm, for the inner layers and the last alike; each adds its own kind of attention and base."""
    theirs = reference(LONG)
    tokens = torch.randint(LONG.vocab_size, (2, TOKENS))
    with torch.inference_mode():
        expected = theirs(tokens, output_hidden_states=True).hidden_states[nth]
        found, _ = ours(replace(LONG, nth_text_layer=nth), theirs.state_dict(), attention)(tokens)
        normed = theirs.final_norm(expected)
    assert relative_error(found, expected) <= 2e-6
    assert relative_error(found, normed) > 1e-2


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex"])
def test_padded_batch_equals_transformers(attention: str):
    """On the valid tokens; on the others the two may differ, and nothing reads them."""
    theirs = reference(LONG)
    lengths = torch.tensor([TOKENS, 1, 5, 23])
    mask = torch.arange(TOKENS) < lengths[:, None]
    tokens = torch.randint(LONG.vocab_size, (4, TOKENS))
    with torch.inference_mode():
        expected = theirs(tokens, attention_mask=mask.long(), output_hidden_states=True)
        found, _ = ours(LONG, theirs.state_dict(), attention)(tokens, mask)
    assert found.isfinite().all()
    assert relative_error(found[mask], expected.hidden_states[LONG.nth_text_layer][mask]) <= 2e-6


@pytest.mark.parametrize("change", [{"hidden_act": "relu"}, {"norm_eps": 0.1}, {"local_attention": 2}])
@pytest.mark.parametrize("base", [{"global_rope_theta": 50.0}, {"local_rope_theta": 50.0}])
def test_every_setting_reaches_the_model(change: dict[str, float], base: dict[str, float]):
    config = replace(LONG, **change, **base)
    theirs = reference(config)
    tokens = torch.randint(LONG.vocab_size, (2, TOKENS))
    with torch.inference_mode():
        expected = theirs(tokens, output_hidden_states=True).hidden_states[config.nth_text_layer]
        found, _ = ours(config, theirs.state_dict())(tokens)
        assert relative_error(found, expected) <= 2e-6
        for name in (*change, *base):
            without, _ = ours(replace(config, **{name: getattr(LONG, name)}), theirs.state_dict())(tokens)
            assert relative_error(without, expected) > 1e-3, name


def test_local_layers_see_the_window_and_no_further():
    """One local layer: a token moves those at most `local_attention` / 2 away, and all of those."""
    config = replace(LONG, num_hidden_layers=2, nth_text_layer=2)
    model = build_text(config, "sdpa")
    randomize(model).eval()
    x = torch.randn(1, TOKENS, config.hidden_size)
    changed, angles = x.clone(), torch.rand(TOKENS, model.head_dim // 2)
    changed[:, 20] += 1
    distance = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs()
    with torch.inference_mode():
        before, after = (model.layers[1](hidden, angles, distance <= model.reach)[0][0] for hidden in (x, changed))
    assert (before != after).any(1).nonzero().flatten().tolist() == list(range(16, 25))


def test_a_row_does_not_depend_on_its_batch():
    """Garbage token ids behind a row's end included."""
    config = small_config()
    model = randomize(build_text(config.text, "sdpa")).eval()
    batch = random_batch(config)
    with torch.inference_mode():
        together, _ = model(batch["input_ids"], batch["attention_mask"])
        for row in range(len(together)):
            tokens = alone(batch, row)["input_ids"]
            by_itself, _ = model(tokens)
            assert relative_error(together[row, : tokens.shape[1]], by_itself[0]) <= 2e-6
