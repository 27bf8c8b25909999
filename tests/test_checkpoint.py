"""The native checkpoint: what is saved comes back bit for bit, and what cannot be used is refused in one line."""

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import random_batch, randomize, small_config
from safetensors.torch import load_file, save_file

import pe_av.checkpoint
from pe_av.checkpoint import CheckpointError, build_model, load_model, save_model
from pe_av.config import ConfigError, RopeConfig
from pe_av.model.pe_audio_video import PEAudioVideo

CONFIG, WEIGHTS = "config.yaml", "model.safetensors"


@pytest.fixture
def model() -> PEAudioVideo:
    """Every setting of the config away from its default is one more that must survive."""
    config = small_config()
    config.audio.transformer.rope_parameters = RopeConfig("dynamic", 100.0, 2.0)
    config.fusion.attention_bias = True
    config.video.num_frames = 4
    config.attention = "eager"
    return randomize(PEAudioVideo(config)).eval()


@pytest.fixture
def folder(model: PEAudioVideo, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


@pytest.mark.parametrize("trainable", [False, True])
def test_round_trip(model: PEAudioVideo, tmp_path: Path, trainable: bool):
    """Weights, config, outputs, what is trained and what is not; in eval mode."""
    model = randomize(PEAudioVideo(replace_codec(model, trainable=trainable))).train()
    save_model(model, tmp_path / "a" / "b")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [CONFIG, WEIGHTS]

    loaded = load_model(tmp_path / "a" / "b")
    assert not loaded.training
    assert loaded.config == model.config
    saved, found = model.state_dict(), loaded.state_dict()
    assert list(saved) == list(found)
    assert all(same_bits(saved[name], found[name]) for name in saved)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert flags == {name: p.requires_grad for name, p in loaded.named_parameters()}
    assert any(flags[name] for name in flags if name.startswith("audio.codec.")) == trainable
    batch = random_batch(model.config)
    with torch.inference_mode():
        expected, out = model.eval()(**batch).embeds(), loaded(**batch).embeds()
    assert all(torch.equal(expected[name], out[name]) for name in expected)


def replace_codec(model: PEAudioVideo, **changes: bool):
    audio = replace(model.config.audio, codec=replace(model.config.audio.codec, **changes))
    return replace(model.config, audio=audio)


def test_tensors_that_are_views_are_saved_whole(model: PEAudioVideo, tmp_path: Path):
    """A transposed weight is no contiguous memory, which safetensors refuses."""
    weight = model.heads["audio"].proj.weight
    weight.data = weight.data.T.contiguous().T
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path).heads["audio"].proj.weight, weight)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtype(model: PEAudioVideo, tmp_path: Path, stored: torch.dtype, dtype: torch.dtype | None):
    """None keeps what is stored."""
    save_model(model.to(stored), tmp_path)
    loaded = load_model(tmp_path, dtype=dtype)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).to(dtype or stored)), name
        assert parameter.dtype == (dtype or stored)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_build_model(dtype: torch.dtype | None):
    for model in (build_model("tiny", dtype=dtype), build_model(small_config(), dtype=dtype)):
        assert not model.training
        assert {p.dtype for p in model.parameters()} == {dtype or torch.float32}
    assert {p.device.type for p in build_model(small_config(), device="meta").parameters()} == {"meta"}


def test_config_is_plain_yaml(folder: Path, model: PEAudioVideo):
    """To be read by people and other programs: nothing but names and values, nothing that names a class."""
    text = (folder / CONFIG).read_text(encoding="utf-8")
    assert yaml.safe_load(text) == {"architecture": "PEAudioVideo"} | asdict(model.config)
    assert "!" not in text and "_target_" not in text


def refused(folder: Path, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        load_model(folder)
    assert len(str(raised.value).splitlines()) == 1
    assert len(str(raised.value)) < 1000


def test_a_folder_without_weights_is_refused(folder: Path, tmp_path: Path):
    refused(tmp_path / "nowhere", CheckpointError, "nowhere: no such folder")
    (folder / WEIGHTS).unlink()
    refused(folder, CheckpointError, "has no model.safetensors, so it is not a checkpoint folder in our own format")


@pytest.mark.parametrize("keep", [0, 5, 100, 20_000, -1])
def test_truncated_weights_are_refused(folder: Path, keep: int):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:keep])
    refused(folder, CheckpointError, r"model.safetensors: not a complete safetensors file")


def test_a_pickle_is_never_read(folder: Path, model: PEAudioVideo):
    torch.save(model.state_dict(), folder / WEIGHTS)
    refused(folder, CheckpointError, r"model.safetensors: not a complete safetensors file")


def change_config(folder: Path, change: Callable[[dict], None]) -> None:
    values = yaml.safe_load((folder / CONFIG).read_text())
    change(values)
    (folder / CONFIG).write_text(yaml.safe_dump(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["audio"]["transformer"].update(hidden_sise=3),
            r"config.yaml: unknown setting audio\.transformer\.hidden_sise; did you mean .*hidden_size\?",
        ),
        (lambda c: c.update(_target_="os.system"), r"config.yaml: unknown setting _target_"),
        (lambda c: c["text"].update(hidden_size="wide"), r"config.yaml: text\.hidden_size: .*'wide'"),
        (lambda c: c.update(attention="spda"), r"config.yaml: attention=spda is unknown; did you mean sdpa\?"),
        (
            lambda c: c["text"].update(nth_text_layer=9),
            r"config.yaml: nth_text_layer=9 is not in 1 … num_hidden_layers=5",
        ),
    ],
)
def test_a_config_that_cannot_be_is_refused(folder: Path, change: Callable[[dict], None], message: str):
    change_config(folder, change)
    refused(folder, ConfigError, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "the file is a YAML list, not a mapping"),
        ("a: [", "not YAML"),
        ("", "the file is a YAML NoneType, not a mapping"),
    ],
)
def test_a_config_that_is_no_mapping_is_refused(folder: Path, text: str, message: str):
    (folder / CONFIG).write_text(text)
    refused(folder, ConfigError, message)


def test_code_in_a_config_is_not_run(folder: Path, tmp_path: Path):
    trace = tmp_path / "ran"
    (folder / CONFIG).write_text(f"!!python/object/apply:os.mkdir ['{trace}']")
    yaml.unsafe_load((folder / CONFIG).read_text())
    trace.rmdir()  # so it would have run, had it been read so
    refused(folder, ConfigError, "not YAML")
    assert not trace.exists()


def test_weights_of_another_size_are_refused(folder: Path):
    change_config(folder, lambda c: c.update(output_dim=30))
    refused(
        folder,
        CheckpointError,
        r"8 weights do not fit config.yaml: heads\.audio\.proj\.weight is \(28, 40\), not \(30, 40\), .*, …$",
    )


def test_missing_and_unknown_weights_are_refused(folder: Path):
    weights = load_file(folder / WEIGHTS)
    weights["text.embeding.weight"] = weights.pop("text.embedding.weight")
    save_file(weights, folder / WEIGHTS)
    refused(
        folder,
        CheckpointError,
        "2 weights do not fit config.yaml: missing text.embedding.weight, unknown text.embeding.weight",
    )


def test_weights_have_the_permissions_of_new_files(folder: Path, tmp_path: Path):
    """With those that the library gives them alone, a checkpoint could be listed by others and not loaded."""
    (tmp_path / "new").touch()
    assert (folder / WEIGHTS).stat().st_mode == (tmp_path / "new").stat().st_mode


@pytest.mark.parametrize("failing", ["save_file", "replace"])
def test_a_failed_write_leaves_the_old_checkpoint(
    folder: Path, model: PEAudioVideo, monkeypatch: pytest.MonkeyPatch, failing: str
):
    """A full disk in the middle of the weights, or a crash before the rename."""
    before = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}

    def half_written(weights: dict, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    def crash(*_: object) -> None:
        raise OSError("crash")

    if failing == "save_file":
        monkeypatch.setattr(pe_av.checkpoint, "save_file", half_written)
    else:
        monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError):
        save_model(randomize(model, seed=1), folder)
    assert {name: (folder / name).read_bytes() for name in before} == before
    monkeypatch.undo()
    randomize(model, seed=0)
    assert torch.equal(load_model(folder).text.embedding.weight, model.text.embedding.weight)
    save_model(model, folder)  # what the failed one left behind is in nobody's way
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
