"""A misspelt or impossible setting fails before anything is built; the message names it and the nearest right one."""

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import small_config

from pe_av.config import CodecConfig, ConfigError, EvalConfig, ModelConfig, TrainConfig
from pe_av.config.compose import (
    check_overrides,
    compose_settings,
    config_dir,
    from_dict,
    load_preset,
    model_presets,
    read_yaml,
)


def message_of(schema: type, values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as raised:
        from_dict(schema, values, source="here.yaml")
    message = str(raised.value)
    assert message.startswith("here.yaml: ")
    assert message.count("here.yaml") == 1
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("values", "key", "nearest"),
    [
        ({"txt": {}}, "txt", "text"),
        ({"audio": {"transformer": {"hidden_sise": 8}}}, "audio.transformer.hidden_sise", "hidden_size"),
        ({"video": {"vision": {"image_sizes": 8}}}, "video.vision.image_sizes", "image_size"),
        ({"fusion": {"rope_parameters": {"rope_teta": 1.0}}}, "fusion.rope_parameters.rope_teta", "rope_theta"),
    ],
)
def test_misspelt_key(values: dict[str, Any], key: str, nearest: str):
    message = message_of(ModelConfig, values)
    assert f"unknown setting {key}; did you mean " in message
    assert message.endswith(f"{nearest}?")


def test_misspelt_key_in_a_section_that_is_off_by_default():
    assert "unknown setting data.demo.sed; did you mean " in message_of(TrainConfig, {"data": {"demo": {"sed": 1}}})


def test_a_key_like_no_other_lists_what_there_is():
    message = message_of(ModelConfig, {"zzzzzzzzzz": 1})
    assert "unknown setting zzzzzzzzzz; known are text, audio, video, fusion" in message


@pytest.mark.parametrize(
    ("values", "key", "shown"),
    [
        ({"text": {"hidden_size": "wide"}}, "text.hidden_size", "wide"),
        ({"output_dim": None}, "output_dim", "NoneType|None"),
        ({"audio": {"codec": {"downsampling_ratios": ["two"]}}}, "audio.codec.downsampling_ratios", "two"),
        ({"logit_scale_init": "high"}, "logit_scale_init", "high"),
        ({"audio": 3}, "audio", "3|int"),
        ({"audio": {"codec": [1, 2]}}, "audio.codec", "[1, 2]|list|ListConfig"),
    ],
)
def test_wrong_type(values: dict[str, Any], key: str, shown: str):
    message = message_of(ModelConfig, values)
    assert f"here.yaml: {key}" in message
    assert any(word in message for word in shown.split("|")), message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention": "spda"}, "attention=spda is unknown; did you mean sdpa?"),
        ({"audio": {"transformer": {"hidden_act": "sillu"}}}, "hidden_act=sillu is unknown; did you mean silu?"),
        (
            {"fusion": {"rope_parameters": {"rope_type": "dynamics"}}},
            "rope_type=dynamics is unknown; did you mean dynamic?",
        ),
        ({"fusion": {"rope_parameters": {"factor": 0.5}}}, "rope factor=0.5 is below 1"),
        (
            {"fusion": {"num_attention_heads": 6, "num_key_value_heads": 4}},
            "num_attention_heads=6 is not a multiple of num_key_value_heads=4: choose a divisor",
        ),
        ({"fusion": {"head_dim": 7}}, "head_dim=7 is odd"),
        ({"fusion": {"attention_dropout": 1.0}}, "attention_dropout=1.0 is not in [0, 1)"),
        ({"text": {"hidden_size": 100}}, "text hidden_size=100 does not give 16 heads of even width"),
        ({"text": {"nth_text_layer": 0}}, "nth_text_layer=0 is not in 1 … num_hidden_layers=22"),
        ({"text": {"nth_text_layer": 23}}, "nth_text_layer=23 is not in 1 … num_hidden_layers=22"),
        ({"text": {"max_tokens": 9000}}, "max_tokens=9000 is beyond max_position_embeddings=8192"),
        ({"text": {"pad_token_id": 60_000}}, "pad_token_id=60000 is not in the vocabulary"),
        ({"video": {"vision": {"image_size": 100}}}, "image_size=100 is not a multiple of patch_size=14"),
        ({"video": {"vision": {"num_attention_heads": 512}}}, "vision hidden_size=1024 does not give 512 heads"),
        ({"video": {"vision": {"pool_heads": 7}}}, "vision hidden_size=1024 is not a multiple of pool_heads=7"),
        ({"video": {"num_frames": 16, "frames_per_second": 2.0}}, "num_frames and frames_per_second are both set"),
        ({"video": {"num_frames": 0}}, "num_frames=0 is not positive"),
        ({"video": {"frames_per_second": -1.0}}, "frames_per_second=-1.0 is not positive"),
        ({"attention": "flex", "text": {"attention_dropout": 0.1}}, "text: attention_dropout=0.1 needs attention="),
    ],
)
def test_impossible_value(values: dict[str, Any], message: str):
    assert message in message_of(ModelConfig, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": {"weights": {"audio_txt": 1.0}}}, "loss.weights=audio_txt is unknown; did you mean audio_text?"),
        ({"loss": {"weights": {"audio_text": -1.0}}}, "loss.weights.audio_text=-1.0 is negative"),
        ({"optim": {"lr": 0.0}}, "optim.lr=0.0 is not positive"),
        ({"optim": {"betas": [0.9]}}, "optim.betas=[0.9] is not [b1, b2]"),
        ({"optim": {"weight_decay": -0.1}}, "optim.weight_decay=-0.1 is negative"),
        ({"optim": {"clip_norm": 0.0}}, "optim.clip_norm=0.0 is not positive"),
        ({"data": {"max_seconds": 0.0}}, "data.max_seconds=0.0 is not positive"),
        ({"data": {"num_workers": -1}}, "data.num_workers=-1 is negative"),
        ({"batch_size": 1}, "batch_size=1: a contrastive loss needs at least 2"),
        ({"steps": 0}, "steps=0 is not positive"),
        ({"precision": "fp61"}, "precision=fp61 is unknown; did you mean"),
    ],
)
def test_impossible_setting_of_a_run(values: dict[str, Any], message: str):
    assert message in message_of(TrainConfig, values)


def test_what_is_right_is_taken():
    values = {"text": {"hidden_size": 64, "num_attention_heads": 2}, "logit_scale_init": 3, "attention": "eager"}
    config = from_dict(ModelConfig, values, source="here.yaml")
    assert config == replace(
        ModelConfig(),
        text=replace(ModelConfig().text, hidden_size=64, num_attention_heads=2),
        logit_scale_init=3.0,
        attention="eager",
    )
    assert isinstance(config.logit_scale_init, float)


def test_a_config_survives_yaml(tmp_path: Path):
    config = small_config()
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(asdict(config)))
    assert read_yaml(ModelConfig, tmp_path / "c.yaml") == config


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"c\.yaml: no such file"):
        read_yaml(ModelConfig, tmp_path / "c.yaml")


def test_a_file_that_is_not_text(tmp_path: Path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match=r"c\.yaml: not YAML"):
        read_yaml(ModelConfig, tmp_path / "c.yaml")


def test_hop_length():
    assert CodecConfig().hop_length == 1920  # 25 latent frames per second of 48 kHz
    assert CodecConfig(downsampling_ratios=[2, 3]).hop_length == 6


@pytest.mark.parametrize("name", ["larg", "Large", "tinny", ""])
def test_misspelt_preset(name: str):
    with pytest.raises(ConfigError, match=f"model={name} is unknown"):
        load_preset(name)
    with pytest.raises(ConfigError, match="model=larg is unknown; did you mean large"):
        load_preset("larg")


def test_presets_are_what_their_files_say():
    """`base` and `small` build on `large`, which the dataclasses describe; they differ in width and in audio layers."""
    large, base, small = (load_preset(name) for name in ("large", "base", "small"))
    assert large == ModelConfig(
        audio=replace(ModelConfig().audio, transformer=replace(ModelConfig().fusion, num_hidden_layers=28))
    )
    for config, width, layers in ((large, 1792, (28, 4, 6)), (base, 1024, (16, 4, 6)), (small, 768, (12, 4, 6))):
        parts = (config.audio.transformer, config.video.transformer, config.fusion)
        assert [part.hidden_size for part in parts] == [width] * 3
        assert [part.num_hidden_layers for part in parts] == list(layers)
        assert all(part.hidden_size == part.num_attention_heads * part.head_dim for part in parts)
        assert (config.text, config.audio.codec, config.video.vision) == (
            large.text,
            large.audio.codec,
            large.video.vision,
        )
    assert model_presets() == sorted(path.stem for path in (config_dir() / "model").iterdir())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("stepz=3", "unknown setting stepz; did you mean steps?"),
        ("model.text.hidden_sise=3", "unknown setting model.text.hidden_sise; did you mean "),
        ("+optim.learning=3", "unknown setting optim.learning"),
        ("model=tinny", "model=tinny is unknown; did you mean tiny?"),
        ("data=demos", "data=demos is unknown; did you mean demo?"),
        ("vision@model.video.vision=PE-Core-L14-363", "is unknown; did you mean PE-Core-L14-336?"),
        ("steps=many", "steps"),
    ],
)
def test_misspelt_argument(argument: str, message: str):
    with pytest.raises(ConfigError) as raised:
        check_overrides(TrainConfig, ["seed=1", argument, "batch_size=4"])
    assert message in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_the_key_in_the_wrong_command():
    with pytest.raises(ConfigError, match="unknown setting optim; known are checkpoint, data"):
        check_overrides(EvalConfig, ["optim.lr=1"])


def test_right_arguments_are_let_through():
    arguments = ["model=tiny", "data=demo", "steps=3", "optim.lr=1e-4", "model.text.nth_text_layer=3", "data.eval=null"]
    arguments += ["+data.demo.seed=3", "optim.betas=[0.9,0.95]", "vision@model.video.vision=PE-Core-B16-224"]
    arguments += ["model=small,base", "optim.lr=1e-3,1e-4"]  # sweeps
    arguments += ["hydra.run.dir=runs/x", "--multirun", "--config-name=train", "-m"]
    check_overrides(TrainConfig, arguments)


@pytest.mark.slow  # starts the command
def test_settings_from_python_are_those_of_the_command():
    """Against what the command itself shows; and what it refuses is refused here."""
    overrides = ["steps=7", "loss=three", "data=manifest", "data.train=x.jsonl", "data.eval=x.jsonl"]
    shown = subprocess.run(
        [sys.executable, "train.py", *overrides, "--cfg", "job"],
        cwd=config_dir().parent,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = from_dict(TrainConfig, yaml.safe_load(shown.stdout), source="the command")
    assert compose_settings(TrainConfig, "train", overrides) == expected
    assert expected.steps == 7 and expected.data.train == "x.jsonl"
    mixed = compose_settings(TrainConfig, "train", ["data=manifest", "data.mix.a.train=x.jsonl", "data.mix.a.weight=2"])
    assert (mixed.data.mix["a"].train, mixed.data.mix["a"].weight) == ("x.jsonl", 2)
    with pytest.raises(ConfigError, match="unknown setting stpes; did you mean steps"):
        compose_settings(TrainConfig, "train", ["stpes=7"])
