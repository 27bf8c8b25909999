"""Towers from weights that were trained elsewhere: each then computes what the library that wrote them computes."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from conftest import randomize, relative_error, small_config
from golden import synth
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from test_golden import EXPECTED, golden_config
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import DacConfig, DacModel, ModernBertConfig, ModernBertForMaskedLM, ModernBertModel

from pe_av import PEAudioVideo, build_model, load_model
from pe_av.checkpoint import CheckpointError
from pe_av.config import CodecConfig, ConfigError, InitConfig, ModelConfig, TextConfig, TrainConfig
from pe_av.config.compose import config_dir, from_dict
from pe_av.conversion.warm_start import fold_weight_norm, warm_start
from pe_av.media.tokenizer import train_tokenizer
from pe_av.training.contrastive import Contrastive
from pe_av.training.trainer import Trainer

WEIGHTS = "model.safetensors"


def start(config: ModelConfig, dtype: torch.dtype | None = None, **paths: Path) -> tuple[PEAudioVideo, list[str]]:
    model = build_model(config, dtype=dtype)
    return model, warm_start(model, InitConfig(**{name: str(path) for name, path in paths.items()}))


def refused(message: str, config: ModelConfig | None = None, **paths: Path) -> None:
    """One line, and not a single weight taken."""
    model = build_model(config or small_config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as raised:
        warm_start(model, InitConfig(**{name: str(path) for name, path in paths.items()}))
    assert len(str(raised.value).splitlines()) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nothing_asked_nothing_done():
    model, lines = start(small_config())
    assert lines == [] and isinstance(model, PEAudioVideo)


# ---------------------------------------------------------------------------------------------------------------------
# text


def bert_config(text: TextConfig) -> ModernBertConfig:
    return ModernBertConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        local_attention=text.local_attention,
        max_position_embeddings=text.max_position_embeddings,
        pad_token_id=text.pad_token_id,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),
        tie_last_hidden_states=False,
    )


def bert(cls: type[nn.Module], **changes: int) -> nn.Module:
    """transformers' text model at the size of `small_config`."""
    text = small_config().text
    return randomize(cls(bert_config(replace(text, **changes)))).eval()


@pytest.mark.parametrize("cls", [ModernBertModel, ModernBertForMaskedLM])
@pytest.mark.parametrize("as_file", [False, True])
def test_modernbert(tmp_path: Path, cls: type[nn.Module], as_file: bool):
    theirs = bert(cls)
    theirs.save_pretrained(tmp_path)
    model, lines = start(small_config(), text=tmp_path / WEIGHTS if as_file else tmp_path)
    ids = torch.randint(300, (2, 24))
    mask = torch.arange(24) < torch.tensor([[24], [15]])
    backbone = theirs if cls is ModernBertModel else theirs.model
    with torch.inference_mode():
        states = backbone(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        found, _ = model.text(ids, mask)
    for row, length in enumerate((24, 15)):  # the fourth layer of five, which is the one that is read
        assert relative_error(found[row, :length], states[4][row, :length]) <= 2e-6
    weights = len(model.text.state_dict())
    assert lines[0].startswith(f"init.text: took {weights} of {weights} tensors from {tmp_path}")
    left = "" if cls is ModernBertModel else "; not used: "
    assert lines[0].split(str(tmp_path / WEIGHTS) if as_file else str(tmp_path))[1].startswith(left)
    assert ("head" in lines[0]) == ("decoder" in lines[0]) == (cls is ModernBertForMaskedLM)


def test_the_other_towers_stay_random(tmp_path: Path):
    bert(ModernBertModel).save_pretrained(tmp_path)
    torch.manual_seed(3)
    model, _ = start(small_config(), text=tmp_path)
    torch.manual_seed(3)
    fresh = build_model(small_config()).state_dict()
    for name, tensor in model.state_dict().items():
        assert name.startswith("text.") or torch.equal(tensor, fresh[name]), name


def test_layers_that_do_not_fit_are_named(tmp_path: Path):
    """Another vocabulary and a layer less: the rest is taken all the same, and the line says what is random."""
    theirs = bert(ModernBertModel, vocab_size=310, num_hidden_layers=4, nth_text_layer=4)
    theirs.save_pretrained(tmp_path)
    model, (line,) = start(small_config(), text=tmp_path)
    assert (
        "still random, because the shape differs: embedding.weight (embeddings.tok_embeddings.weight is (310, 48),"
        in line
    )
    assert "still random, because not in the file: layers.4.attention_norm.weight" in line and "and 2 more" in line
    assert torch.equal(model.text.layers[3].qkv.weight, theirs.layers[3].attn.Wqkv.weight)


def test_nothing_that_fits(tmp_path: Path):
    save_file({"encoder.layer.0.weight": torch.ones(3), "pooler": torch.ones(2)}, tmp_path / "bert.safetensors")
    message = "init.text=.*: nothing in it is a weight of this model's text: it has names like encoder.layer.0.weight"
    refused(message, text=tmp_path / "bert.safetensors")


def test_another_width(tmp_path: Path):
    bert(ModernBertModel, hidden_size=64, intermediate_size=96).save_pretrained(tmp_path)
    refused(
        r"nothing in it is a weight of this model's text: .* is \(300, 64\), not \(300, 48\)\) does not fit",
        text=tmp_path,
    )


# ---------------------------------------------------------------------------------------------------------------------
# vision


def core(use_class_token: bool, image_size: int = 32) -> nn.Module:
    """timm's PE-Core of the size of `vision_config`."""
    architecture = "vit_pe_core_tiny_patch16_384" if use_class_token else "vit_pe_core_gigantic_patch14_448"
    return timm.create_model(
        architecture,
        img_size=image_size,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        mlp_ratio=4,
        attn_pool_num_heads=4,
        num_classes=20,
        ref_feat_shape=(image_size // 8, image_size // 8),
    )


def vision_config(use_class_token: bool = True) -> ModelConfig:
    config = small_config()
    vision = replace(config.video.vision, intermediate_size=128, use_class_token=use_class_token)
    return replace(config, video=replace(config.video, vision=vision))


@pytest.mark.parametrize("use_class_token", [True, False])
def test_pe_core_of_timm(tmp_path: Path, use_class_token: bool):
    theirs = randomize(core(use_class_token)).eval()
    nn.init.zeros_(theirs.head.bias)
    save_file(theirs.state_dict(), tmp_path / WEIGHTS)
    model, (line,) = start(vision_config(use_class_token), vision=tmp_path)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        assert relative_error(model.video.vision(pixels), theirs(pixels)) <= 2e-6
    weights = len(model.video.vision.state_dict())
    assert line.startswith(f"init.vision: took {weights} of {weights} tensors") and "random" not in line


def test_timms_bias_is_left_unless_there_is_a_place_for_it(tmp_path: Path):
    theirs = randomize(core(True)).eval()
    save_file(theirs.state_dict(), tmp_path / WEIGHTS)
    _, (line,) = start(vision_config(), vision=tmp_path)
    assert line.endswith("not used: 1 of head")
    config = vision_config()
    config.video.vision.proj_bias = True
    model, (line,) = start(config, vision=tmp_path)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        assert relative_error(model.video.vision(pixels), theirs(pixels)) <= 2e-6
    assert "not used" not in line


def original_core() -> dict[str, Tensor]:
    """The frame encoder of the golden model as the original publishes it alone: as `visual` of a CLIP, whose text tower
    has the same names and may have the same shapes."""
    prefix = "audio_visual_model.visual_model.pe_encoder."
    weights = {name: tensor for name, tensor in synth.state_dict().items() if name.startswith(prefix)}
    weights = {f"visual.{name.removeprefix(prefix)}": tensor for name, tensor in weights.items()}
    text = {"transformer.resblocks.0.ln_1.weight": torch.ones(192), "positional_embedding": torch.ones(577, 192)}
    return {**text, **weights, "logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.bias": torch.ones(192)}


@pytest.mark.parametrize("nested", [False, True])
def test_pe_core_of_the_original(tmp_path: Path, nested: bool):
    """Against the golden frame features."""
    weights = original_core()
    torch.save({"state_dict": weights} if nested else weights, tmp_path / "PE-Core-T16-384.pt")
    model, (line,) = start(golden_config(), vision=tmp_path / "PE-Core-T16-384.pt")
    for row in (0, 1):
        with torch.inference_mode():
            found = nn.functional.normalize(model.video.vision(synth.inputs(row)["pixel_values_videos"][0]), dim=-1)
        assert relative_error(found, EXPECTED[f"{row}.pe_features"]) <= 1e-6
    count = len(model.video.vision.state_dict())
    assert line.startswith(f"init.vision: took {count} of {count} tensors")
    assert line.endswith("not used: 2 of transformer, 1 of positional_embedding, 1 of logit_scale")


def test_positions_of_another_picture_size_stay_random(tmp_path: Path):
    save_file(core(True, image_size=48).state_dict(), tmp_path / WEIGHTS)
    _, (line,) = start(vision_config(), vision=tmp_path)
    assert "still random, because the shape differs: position (pos_embed is (1, 37, 32), not (1, 17, 32))" in line


# ---------------------------------------------------------------------------------------------------------------------
# codec


def dac(codec: CodecConfig) -> DacModel:
    config = DacConfig(
        encoder_hidden_size=codec.encoder_hidden_size,
        downsampling_ratios=codec.downsampling_ratios,
        decoder_hidden_size=32,
        n_codebooks=2,
        codebook_size=16,
        hidden_size=codec.encoder_hidden_size * 2 ** len(codec.downsampling_ratios),
    )
    return randomize(DacModel(config)).eval()


def with_weight_norm(model: DacModel, spelling: str) -> dict[str, Tensor]:
    """Its weights once every convolution is normalized; what it computes stays the same."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            if spelling == "old":
                with pytest.warns(FutureWarning):
                    nn.utils.weight_norm(module)
                module.weight_g.data *= 1.3
            else:
                parametrizations.weight_norm(module)
                module.parametrizations.weight.original0.data *= 1.3
    weights = model.state_dict()
    mark = "weight_g" if spelling == "old" else "parametrizations.weight.original0"
    assert any(name.endswith(mark) for name in weights)
    return weights


@pytest.mark.parametrize("spelling", ["none", "old", "new"])
def test_dac(tmp_path: Path, spelling: str):
    """Up to the bottleneck, which is a VAE's here and a quantizer there. In float64, weights and folding too: random
    weights amplify rounding."""
    theirs = dac(small_config().audio.codec).double()
    weights = theirs.state_dict() if spelling == "none" else with_weight_norm(theirs, spelling)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / WEIGHTS)
    model, (line,) = start(small_config(), torch.float64, codec=tmp_path)
    codec = model.audio.codec
    nn.init.zeros_(codec.to_mean.bias)
    waveform = 0.1 * torch.randn(2, 1, 4 * 1920, dtype=torch.float64)
    with torch.inference_mode():
        expected = codec.to_mean(theirs.encoder(waveform)).transpose(1, 2)
        found = codec(waveform)
    assert relative_error(found, expected) <= 1e-12
    count = len(codec.state_dict())
    assert line.startswith(f"init.codec: took {count - 2} of {count} tensors")
    assert "still random, because not in the file: to_mean.weight, to_mean.bias" in line
    assert "of decoder" in line and "of quantizer" in line


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_folding_is_what_torch_computes(spelling: str):
    conv = randomize(nn.Sequential(nn.Conv1d(3, 5, 4), nn.ConvTranspose1d(5, 3, 2)))
    if spelling == "old":
        with pytest.warns(FutureWarning):
            for module in conv:
                nn.utils.weight_norm(module)
    else:
        for module in conv:
            parametrizations.weight_norm(module)
    for name, parameter in conv.named_parameters():
        if name.endswith(("weight_g", "original0")):
            nn.init.uniform_(parameter, 0.5, 2)
    conv(torch.randn(1, 3, 9))  # which computes the weights anew
    folded = fold_weight_norm(conv.state_dict())
    assert set(folded) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    for index in (0, 1):
        assert relative_error(folded[f"{index}.weight"], conv[index].weight) <= 2e-7


def test_half_of_a_weight_norm(tmp_path: Path):
    save_file({"encoder.conv1.weight_g": torch.ones(4, 1, 1)}, tmp_path / WEIGHTS)
    refused("conv1.weight_g has no weight_v", codec=tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# files that cannot be read


class Trap:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("key", ["text", "vision", "codec"])
def test_a_pickle_with_code_is_not_run(tmp_path: Path, key: str):
    torch.save({"state_dict": {"weight": Trap(tmp_path / "ran")}}, tmp_path / "model.pt")
    refused("model.pt: neither safetensors nor a pickle of weights only", **{key: tmp_path / "model.pt"})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.pt", b"", "neither safetensors nor a pickle"),
        ("model.pt", b"not a pickle at all", "neither safetensors nor a pickle"),
        ("model.safetensors", b"not safetensors", "not a complete safetensors file"),
        ("model.safetensors", b"", "not a complete safetensors file"),
    ],
)
def test_a_damaged_file(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    refused(f"{name}: {message}", vision=tmp_path / name)


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, {}, {"state_dict": 5}, torch.ones(2)])
def test_a_pickle_without_weights(tmp_path: Path, content: object):
    torch.save(content, tmp_path / "model.pt")
    refused("model.pt: contains no weights by name", vision=tmp_path / "model.pt")


def test_a_truncated_pickle(tmp_path: Path):
    torch.save(original_core(), tmp_path / "whole.pt")
    (tmp_path / "model.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-2000])
    refused("model.pt: neither safetensors nor a pickle", vision=tmp_path / "model.pt")


def test_a_weight_that_is_no_number(tmp_path: Path):
    theirs = bert(ModernBertModel)
    theirs.layers[1].mlp.Wi.weight.data[0, 0] = torch.nan
    theirs.save_pretrained(tmp_path)
    refused(r"init.text=.*: NaN or Inf in layers.1.mlp.Wi.weight", text=tmp_path)


def test_no_such_file(tmp_path: Path):
    refused("no such file; give a folder with model.safetensors, or the file itself", text=tmp_path / "nowhere")
    refused("no such file; give a folder with model.safetensors", codec=tmp_path)


def test_a_model_without_the_tower(tmp_path: Path):
    bert(ModernBertModel).save_pretrained(tmp_path)
    config = replace(small_config(), heads=["audio", "video"])
    refused("init.text: the model has no text tower", config, text=tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# train.py init.text=… init.codec=…


def test_a_checkpoint_and_single_towers_exclude_each_other():
    with pytest.raises(ConfigError, match="checkpoint and init are both set"):
        from_dict(TrainConfig, {"checkpoint": "a", "init": {"text": "b"}}, source="test")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a demo world of 24 clips is rendered once."""
    return tmp_path_factory.mktemp("world")


def run(folder: Path, world: Path, *overrides: str) -> Trainer:
    small = ["data.demo.train_clips=24", "data.demo.eval_clips=8", "batch_size=8", "eval_batch_size=4", "steps=2"]
    small += ["data.num_workers=0", "data.in_memory=false", f"data.demo.root={world}", *overrides]
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed = compose("train", overrides=small)
    return Trainer(
        from_dict(TrainConfig, OmegaConf.to_container(composed), source="test"),
        folder,
        torch.device("cpu"),
        Contrastive,
    )


@pytest.fixture
def tiny_bert(tmp_path: Path) -> Path:
    """A text model of the `tiny` preset's size with a tokenizer of its own."""
    text = build_model("tiny", device="meta").config.text
    folder = tmp_path / "bert"
    randomize(ModernBertModel(bert_config(text))).save_pretrained(folder)
    train_tokenizer(["a tokenizer of another kind"] * 3, 300).save(str(folder / "tokenizer.json"))
    return folder


def test_a_run_from_single_towers(
    world: Path, tmp_path: Path, tiny_bert: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """It starts from them, keeps their tokenizer, does not rescale the codec, and reports what it took."""
    codec = build_model("tiny", device="meta").config.audio.codec
    theirs = dac(codec)
    theirs.save_pretrained(tmp_path / "dac")
    started = run(tmp_path / "run", world, f"init.text={tiny_bert}", f"init.codec={tmp_path / 'dac'}")
    bert_weights, dac_weights = load_file(tiny_bert / WEIGHTS), load_file(tmp_path / "dac" / WEIGHTS)
    assert torch.equal(started.model.text.layers[2].qkv.weight, bert_weights["layers.2.attn.Wqkv.weight"])
    assert torch.equal(started.model.audio.codec.conv_out.weight, dac_weights["encoder.conv2.weight"])
    printed = capsys.readouterr()
    for key in ("init.text: took", "init.codec: took"):
        assert key in printed.out + printed.err
    started.train()
    assert torch.equal(  # frozen
        load_model(tmp_path / "run" / "checkpoint").audio.codec.conv_out.weight, dac_weights["encoder.conv2.weight"]
    )
    saved = json.loads((tmp_path / "run" / "checkpoint" / "tokenizer.json").read_text())
    assert saved["model"]["vocab"] == json.loads((tiny_bert / "tokenizer.json").read_text())["model"]["vocab"]


def test_text_weights_without_their_tokenizer(world: Path, tmp_path: Path, tiny_bert: Path):
    (tiny_bert / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="text weights are of no use without the tokenizer they were trained with"):
        run(tmp_path / "run", world, f"init.text={tiny_bert}")


def test_a_tokenizer_of_another_vocabulary(world: Path, tmp_path: Path, tiny_bert: Path):
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 600}, unk_token="[UNK]"))
    tokenizer.save(str(tiny_bert / "tokenizer.json"))
    with pytest.raises(
        ValueError, match="the model's vocabulary ends at 511: tokenizer.json is another model's"
    ) as raised:
        run(tmp_path / "run", world, f"init.text={tiny_bert}").train()
    assert len(str(raised.value).splitlines()) == 1
