"""Published checkpoints in and out: their libraries' numbers from our model, ours from theirs, nothing between."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import in_double, random_batch, randomize, relative_error, small_config
from golden import synth
from processes import ROOT, Command
from published_models import (
    CLASSES,
    EMBEDDINGS,
    LOGITS,
    SHAPES,
    differences,
    equal_rows,
    hf_folder,
    hf_model,
)
from published_names import from_original, from_transformers
from safetensors.torch import load_file, save_file
from test_frame import EXPECTED as FRAME_EXPECTED
from test_frame import golden_config as golden_frame_config
from test_frame import golden_weights as golden_frame_weights
from test_golden import EXPECTED, OUTPUTS, errors, golden_config, outputs, without_waveform
from test_processor import make_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModel,
    PeAudioFrameLevelModel,
    PeAudioModel,
    PeAudioProcessor,
    PeAudioVideoModel,
    PeAudioVideoProcessor,
    PeVideoModel,
    PeVideoProcessor,
)

import pe_av.checkpoint
import pe_av.conversion.write_checkpoint
from pe_av import PEAudioFrame, PEAudioVideo, Processor, build_model, load_model, save_model
from pe_av.checkpoint import CheckpointError
from pe_av.config import HEADS, ConfigError, ConvertConfig, PEAudioFrameConfig
from pe_av.config.compose import check_overrides, from_dict
from pe_av.conversion.write_checkpoint import convert

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

transformers.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, type], Path]:
    """The folder of a small shape as its library writes it, made once, and (`published.model`) what it holds."""
    root, made = tmp_path_factory.mktemp("published"), {}

    def folder(name: str = "one", cls: type = PeAudioVideoModel) -> Path:
        if (name, cls) not in made:
            torch.manual_seed(0)
            model = hf_model(name, cls)
            made[name, cls] = hf_folder(root / f"{name}-{cls.__name__}", model, name), model
        return made[name, cls][0]

    folder.model = lambda name, cls: (folder(name, cls), made[name, cls][1])[1]
    return folder


@pytest.fixture
def source(published: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a transformers folder, to be spoilt."""
    return Path(shutil.copytree(published(), tmp_path / "source"))


def write_original(folder: Path, config: dict, weights: dict[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """The golden model as the original's repository keeps it."""
    return write_original(tmp_path / "original", read_json(GOLDEN / "config.json"), synth.state_dict())


@pytest.fixture
def original_frame(tmp_path: Path) -> Path:
    weights = synth.state_dict(GOLDEN / "frame_keys.json")
    return write_original(tmp_path / "original-frame", read_json(GOLDEN / "frame_config.json"), weights)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    values = read_json(path)
    change(values)
    path.write_text(json.dumps(values))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def same_tensors(a: Path, b: Path) -> bool:
    """The same names and the same bits."""
    one, two = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


def of_class(inputs: dict[str, Tensor], cls: type) -> dict[str, Tensor]:
    """The inputs that the class takes."""
    without = {PeVideoModel: "input_values", PeAudioVideoModel: None}.get(cls, "pixel_values_videos")
    return {name: value for name, value in inputs.items() if name != without}


def compared(ours: nn.Module, theirs: nn.Module, name: str) -> dict[str, float]:
    """Every embedding and every matrix of logits of both models, in float64: random weights amplify the rounding of
    the codec. Norms and rotations go through float32 in both models all the same."""
    inputs = of_class(equal_rows(SHAPES[name]()), type(theirs))
    with torch.inference_mode():
        found, expected = ours.double()(**inputs), theirs.double()(**inputs)
    if isinstance(ours, PEAudioFrame):
        pairs = expected.logits_audio_text.diagonal(dim1=0, dim2=1).T  # theirs are every sound with every text
        return {
            "audio_embeds": relative_error(found.audio_embeds, expected.audio_embeds),
            "text_embeds": relative_error(found.text_embeds, expected.text_audio_embeds),
            "logits": relative_error(found.logits, pairs),
        }
    return differences(found, expected)


COMPARED = {PeAudioVideoModel: len(EMBEDDINGS) + len(LOGITS), PeAudioModel: 3, PeVideoModel: 3}
COMPARED[PeAudioFrameLevelModel] = 3


# ---------------------------------------------------------------------------------------------------------------------
# to native


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("cls", CLASSES)
def test_transformers_numbers(published: Callable[..., Path], tmp_path: Path, name: str, cls: type):
    """1e-6 where 1e-5 is promised: rounding of the norms and rotations is all there is."""
    convert(published(name, cls), tmp_path / "native")
    ours = load_model(tmp_path / "native")
    found = compared(ours, published.model(name, cls), name)
    assert len(found) == COMPARED[cls]
    assert max(found.values()) <= 1e-6, found


@pytest.mark.parametrize("name", SHAPES)
def test_the_config_decides_every_size(published: Callable[..., Path], tmp_path: Path, name: str):
    """transformers writes the number of key-value heads even where it is that of all heads."""
    found = convert(published(name), tmp_path / "native").config
    expected = SHAPES[name]()
    for part in (expected.audio.transformer, expected.video.transformer, expected.fusion):
        part.num_key_value_heads = part.key_value_heads
    assert found == expected


@pytest.mark.parametrize("name", SHAPES)
def test_names_and_tensors_of_transformers_by_hand(published: Callable[..., Path], tmp_path: Path, name: str):
    """Bit for bit what the independent table of `published_names.py` makes of them."""
    convert(published(name), tmp_path / "native")
    expected = from_transformers(dict(hf_model(name).named_parameters()))
    found = load_file(tmp_path / "native" / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("frame", [False, True])
def test_names_and_tensors_of_the_original_by_hand(original: Path, original_frame: Path, tmp_path: Path, frame: bool):
    convert(original_frame if frame else original, tmp_path / "native")
    expected = golden_frame_weights() if frame else from_original(synth.state_dict())
    found = load_file(tmp_path / "native" / WEIGHTS)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    start = {"scale": 10.0, "bias": -10.0}  # of the logits, which the original PEAudioVisual does not keep
    added = found.keys() - expected.keys()
    assert len(added) == (0 if frame else 12)
    assert all(found[key].item() == start[key.split(".")[-1]] for key in added)


def test_golden_embeddings(original: Path, tmp_path: Path):
    """From the original's latents, since its codec rounds; test_golden.py judges the codec, and the other row."""
    row = 1
    convert(original, tmp_path / "native")
    model = load_model(tmp_path / "native")
    assert model.config == golden_config()
    found = errors(outputs(model, **without_waveform(row)), row)
    assert len(found) == len(OUTPUTS) and max(found.values()) <= 3e-6, found
    latents, _ = model.double().audio.encode(synth.inputs(row)["input_values"].double())
    assert relative_error(latents[0], EXPECTED[f"{row}.codec_features"]) <= 1e-5


def test_golden_frame_embeddings(original_frame: Path, tmp_path: Path):
    """In float64 for the same reason; test_frame.py says what remains for row 1."""
    convert(original_frame, tmp_path / "native")
    model = load_model(tmp_path / "native")
    assert isinstance(model, PEAudioFrame) and model.config == golden_frame_config()
    inputs = {key: value for key, value in synth.inputs(0).items() if key != "pixel_values_videos"}
    with torch.inference_mode():
        out = model.double()(**in_double(inputs))
    assert relative_error(out.audio_embeds[0], FRAME_EXPECTED["frame.0.audio_embeds"]) <= 1e-5
    assert relative_error(out.text_embeds[0], FRAME_EXPECTED["frame.0.text_embeds"]) <= 1e-6
    assert out.spans[0] == [pytest.approx(span, abs=1e-6) for span in FRAME_EXPECTED["frame.0.spans"].tolist()]


TIED = {
    "audio_model.text_model.": "text_model.",
    "video_model.text_model.": "text_model.",
    "audio_video_encoder.embedder.audio_encoder.": "audio_model.audio_encoder.",
    "audio_video_encoder.embedder.video_encoder.": "video_model.video_encoder.",
}


def tied_copies(weights: dict[str, Tensor], drop: bool) -> None:
    """Every name that transformers knows for each tensor; with `drop`, the first of them, which it writes, not."""
    written = dict(weights)
    for copy, main in TIED.items():
        weights |= {copy + key.removeprefix(main): t.clone() for key, t in written.items() if key.startswith(main)}
    for key in written:
        if drop and key.startswith(tuple(TIED.values())):
            del weights[key]


@pytest.mark.parametrize("drop", [False, True])
def test_tied_weights_under_any_of_their_names(
    published: Callable[..., Path], source: Path, tmp_path: Path, drop: bool
):
    once = len(load_file(source / WEIGHTS))
    change_weights(source, lambda weights: tied_copies(weights, drop))
    if drop:
        change_weights(source, lambda w: [w.pop(key) for key in list(w) if key.startswith("audio_model.text_model.")])
        assert len(load_file(source / WEIGHTS)) == once
    else:
        assert len(load_file(source / WEIGHTS)) > 1.7 * once
    convert(source, tmp_path / "native")
    convert(published(), tmp_path / "expected")
    assert same_tensors(tmp_path / "native", tmp_path / "expected")


def test_tied_weights_that_differ_are_refused(source: Path, tmp_path: Path):
    def change(weights: dict[str, Tensor]) -> None:
        tied_copies(weights, drop=False)
        weights["video_model.text_model.layers.1.attn.Wo.weight"][0, 0] += 1

    change_weights(source, change)
    refused(source, tmp_path / "t", CheckpointError, "layers.1.attn.Wo.weight .* are one weight, but differ")


def test_shards(published: Callable[..., Path], tmp_path: Path):
    for cls in CLASSES:
        whole, shards = published("one", cls), tmp_path / f"shards-{cls.__name__}"
        shutil.copytree(whole, shards, ignore=shutil.ignore_patterns(WEIGHTS))
        cls.from_pretrained(whole).save_pretrained(shards, max_shard_size="200KB")
        assert len(list(shards.glob("model-*.safetensors"))) > 2 and not (shards / WEIGHTS).exists()
        convert(shards, tmp_path / f"a-{cls.__name__}")
        convert(whole, tmp_path / f"b-{cls.__name__}")
        assert same_tensors(tmp_path / f"a-{cls.__name__}", tmp_path / f"b-{cls.__name__}")


def test_what_a_decoder_needs_and_tables_of_positions_are_left(source: Path, tmp_path: Path):
    """Old versions of transformers saved the tables. (The golden model has the way back from the latent.)"""
    extra = ("audio_model.audio_encoder.rotary_emb.inv_freq",)
    extra += ("video_model.video_encoder.embedder.vision_model.timm_model.rope.pos_embed",)
    change_weights(source, lambda weights: weights.update({name: torch.ones(4) for name in extra}))
    convert(source, tmp_path / "native")


@pytest.mark.parametrize("cls", [PeAudioVideoModel, PeVideoModel])
def test_a_trained_bias_of_timms_head_survives(tmp_path: Path, cls: type):
    folder = hf_folder(tmp_path / "biased", hf_model("one", cls, head_bias=True), "one")
    found = convert(folder, tmp_path / "native")
    assert found.config.video.vision.proj_bias
    ours = load_model(tmp_path / "native")
    differ = compared(ours, cls.from_pretrained(folder), "one")
    assert max(differ.values()) <= 1e-6, differ
    convert(tmp_path / "native", tmp_path / "back", "hf")
    assert same_tensors(folder, tmp_path / "back")


def test_a_model_of_bfloat16_stays_one(tmp_path: Path):
    folder = hf_folder(tmp_path / "bf16", hf_model("one").bfloat16(), "one")
    convert(folder, tmp_path / "native")
    assert {p.dtype for p in load_model(tmp_path / "native").parameters()} == {torch.bfloat16}
    convert(tmp_path / "native", tmp_path / "back", "hf")
    assert read_json(tmp_path / "back" / "config.json")["dtype"] == "bfloat16"
    assert same_tensors(folder, tmp_path / "back")


@pytest.mark.parametrize(("name", "sampling"), [("one", (4, None)), ("two", (None, None)), ("three", (None, 2.0))])
def test_tokenizer_and_sampling_come_along(published: Callable[..., Path], tmp_path: Path, name: str, sampling: tuple):
    convert(published(name), tmp_path / "native")
    processor = Processor.from_pretrained(tmp_path / "native")
    video = processor.config.video
    assert (video.num_frames, video.frames_per_second) == sampling
    assert processor.tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert processor.batch_text(["a dog barks"])["input_ids"].tolist() == [[1, 4, 5, 6, 2]]
    assert processor.config.text.max_tokens == SHAPES[name]().text.max_tokens


def test_the_longest_caption_survives_the_way_there_and_back(tmp_path: Path):
    config = SHAPES["one"]()
    config.text.max_tokens = 20
    save_model(build_model(config), tmp_path / "native")
    Processor(config, make_tokenizer()).save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "hf", "hf")
    assert convert(tmp_path / "hf", tmp_path / "back").config.text.max_tokens == 20


def test_preprocessing_in_the_files_of_older_versions(source: Path, tmp_path: Path):
    """One file for each part, before they were gathered into processor_config.json."""
    parts = read_json(source / "processor_config.json")
    (source / "processor_config.json").unlink()
    (source / "video_preprocessor_config.json").write_text(json.dumps(parts["video_processor"] | {"num_frames": 6}))
    (source / "preprocessor_config.json").write_text(json.dumps(parts["feature_extractor"] | {"sampling_rate": 16_000}))
    config = convert(source, tmp_path / "native").config
    assert config.video.num_frames == 6 and config.audio.codec.sampling_rate == 16_000


def test_a_16_frame_model_of_the_original(original: Path, tmp_path: Path):
    change_json(
        original / "config.json", lambda c: c["audio_visual_model"]["visual_model"].update(fixed_len_video=True)
    )
    assert convert(original, tmp_path / "native").config.video.num_frames == 16


def test_without_a_tokenizer_there_is_a_note(source: Path, tmp_path: Path):
    (source / "tokenizer.json").unlink()
    found = convert(source, tmp_path / "native")
    assert any("no tokenizer.json" in note for note in found.notes)
    assert sorted(path.name for path in (tmp_path / "native").iterdir()) == ["config.yaml", WEIGHTS]


def test_native_to_native_is_a_copy(published: Callable[..., Path], tmp_path: Path):
    convert(published(), tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b")
    for name in ("config.yaml", WEIGHTS, "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# to transformers


def loaded_whole(cls: type, folder: Path) -> nn.Module:
    """What `from_pretrained` makes of a folder that leaves nothing to it."""
    model, report = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def native_model(name: str, cls: type) -> PEAudioVideo | PEAudioFrame:
    """Of our own making: the towers of the class, random weights, and everything that transformers can hold."""
    config = SHAPES[name]()
    if cls is PeAudioFrameLevelModel:
        config = PEAudioFrameConfig(text=config.text, audio=config.audio, output_dim=config.output_dim)
    elif cls is not PeAudioVideoModel:
        config.heads = ["audio", "text_audio"] if cls is PeAudioModel else ["video", "text_video"]
    return randomize(build_model(config))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("cls", CLASSES)
def test_transformers_gives_our_numbers(tmp_path: Path, name: str, cls: type):
    model = native_model(name, cls)
    save_model(model, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "hf", "hf")
    theirs = loaded_whole(cls, tmp_path / "hf")
    assert theirs.text_model.config.tie_last_hidden_states is False  # the text feature before the final norm
    found = compared(model, theirs, name)
    assert len(found) == COMPARED[cls]
    assert max(found.values()) <= 1e-6, found


@pytest.mark.parametrize("cls", [PeAudioVideoModel, PeAudioModel, PeVideoModel])
def test_auto_model_finds_the_class(tmp_path: Path, cls: type):
    """But not PeAudioFrameLevelModel: to transformers its folders and those of PeAudioModel are of one type."""
    save_model(native_model("one", cls), tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "hf", "hf")
    assert type(loaded_whole(AutoModel, tmp_path / "hf")) is cls


def test_a_text_model_that_reads_an_earlier_layer(tmp_path: Path):
    """transformers reads the last one, so those after `nth_text_layer` stay behind, which changes no number."""
    config = SHAPES["one"]()
    config.text.nth_text_layer = 3
    model = randomize(build_model(config))
    save_model(model, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "hf", "hf")
    theirs = loaded_whole(PeAudioVideoModel, tmp_path / "hf")
    assert theirs.config.text_config.num_hidden_layers == 3 < config.text.num_hidden_layers
    assert max(compared(model, theirs, "one").values()) <= 1e-6


def test_the_tiny_preset_can_be_handed_over(tmp_path: Path):
    model = build_model("tiny")
    save_model(model, tmp_path / "native")
    Processor(model.config, make_tokenizer()).save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "hf", "hf")
    theirs = loaded_whole(PeAudioVideoModel, tmp_path / "hf")
    inputs = equal_rows(model.config)
    with torch.inference_mode():
        found = differences(model.double()(**inputs), theirs.double()(**inputs))
    assert len(found) == 14 and max(found.values()) <= 1e-6, found
    assert PeAudioVideoProcessor.from_pretrained(tmp_path / "hf").video_processor.num_frames == 8


def waveforms() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [(0.1 * random.standard_normal(samples)).astype(np.float32) for samples in (5000, 9600)]


def clips() -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.integers(0, 256, (frames, 40, 50, 3), dtype=np.uint8) for frames in (7, 9)]


def exported(published: Callable[..., Path], tmp_path: Path, name: str, cls: type) -> tuple[Processor, Path]:
    convert(published(name, cls), tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "hf", "hf")
    return Processor.from_pretrained(tmp_path / "native"), tmp_path / "hf"


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_processor_there_gives_our_inputs(published: Callable[..., Path], tmp_path: Path, name: str):
    """Four frames of each clip, and every frame; words, samples and masks are the same, pixels to the last bit."""
    ours, folder = exported(published, tmp_path, name, PeAudioVideoModel)
    theirs = PeAudioVideoProcessor.from_pretrained(folder)
    config = ours.config
    given = {"text": ["a dog", "barks at night"], "audio": waveforms(), "videos": clips()}
    rate = config.audio.codec.sampling_rate
    found = ours(**given, sampling_rate=rate)
    expected = theirs(**given, sampling_rate=rate, padding=True, return_tensors="pt")
    for key in ("input_ids", "attention_mask", "input_values", "padding_mask"):
        assert torch.equal(found[key], expected[key].to(found[key].dtype)), key
    assert (found["pixel_values_videos"] - expected["pixel_values_videos"]).abs().max() <= 1.2e-7
    if "padding_mask_videos" in expected:
        assert torch.equal(found["padding_mask_videos"], expected["padding_mask_videos"])
    else:
        assert found["padding_mask_videos"].all()
    assert theirs.tokenizer.model_max_length == config.text.max_tokens
    assert theirs.tokenizer.pad_token_id == config.text.pad_token_id


def test_sampling_by_rate_goes_there_too(published: Callable[..., Path], tmp_path: Path):
    _, folder = exported(published, tmp_path, "three", PeAudioVideoModel)
    frames = PeAudioVideoProcessor.from_pretrained(folder).video_processor
    assert frames.do_sample_frames and frames.fps == 2.0 and not frames.num_frames


def test_processors_of_single_towers(published: Callable[..., Path], tmp_path: Path):
    ours, folder = exported(published, tmp_path / "a", "one", PeAudioModel)
    sound = PeAudioProcessor.from_pretrained(folder)(
        text=["a dog", "barks"], audio=waveforms(), sampling_rate=48_000, padding=True, return_tensors="pt"
    )
    found = ours(text=["a dog", "barks"], audio=waveforms(), sampling_rate=48_000)
    assert torch.equal(found["input_values"], sound["input_values"])
    assert torch.equal(found["input_ids"], sound["input_ids"])
    ours, folder = exported(published, tmp_path / "b", "one", PeVideoModel)
    frames = PeVideoProcessor.from_pretrained(folder)(
        text=["a dog", "barks"], videos=clips(), padding=True, return_tensors="pt"
    )
    found = ours(text=["a dog", "barks"], videos=clips())
    assert (found["pixel_values_videos"] - frames["pixel_values_videos"]).abs().max() <= 1.2e-7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_dim": 30}, "output_dim=30 is not text.hidden_size=48"),
        ({"heads": ["audio", "video"]}, "none of its classes has exactly the heads audio, video"),
    ],
)
def test_a_model_that_transformers_cannot_hold_is_refused(tmp_path: Path, change: dict, message: str):
    config = SHAPES["one"]()
    for key, value in change.items():
        setattr(config, key, value)
    save_model(build_model(config), tmp_path / "native")
    refused(tmp_path / "native", tmp_path / "hf", ConfigError, message, to="hf")


def test_every_reason_is_named(tmp_path: Path):
    save_model(build_model(small_config()), tmp_path / "native")
    message = r"output_dim=28 is not text.hidden_size=48; audio and video are 40 and 36 wide"
    refused(tmp_path / "native", tmp_path / "hf", ConfigError, message, to="hf")


# ---------------------------------------------------------------------------------------------------------------------
# there and back


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("cls", CLASSES)
def test_from_transformers_and_back_is_bit_exact(published: Callable[..., Path], tmp_path: Path, name: str, cls: type):
    convert(published(name, cls), tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "back", "hf")
    assert same_tensors(published(name, cls), tmp_path / "back")
    convert(published(name, cls), tmp_path / "straight", "hf")
    for file in (WEIGHTS, "config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"):
        assert (tmp_path / "straight" / file).read_bytes() == (tmp_path / "back" / file).read_bytes()


def exchangeable_original(tmp_path: Path, layers: int = 6) -> Path:
    """The golden model with the shared space as wide as the text, as published ones have it; as many text layers."""
    config = read_json(GOLDEN / "config.json")
    config["output_dim"], config["text_model"]["num_hidden_layers"] = 48, layers
    shapes = read_json(GOLDEN / "keys.json")
    beyond = re.compile(rf"text_model\.layers\.({'|'.join(map(str, range(layers, 6)))})\.")
    weights = {
        name: synth.tensor_for(name, [48, *shape[1:]] if name.endswith("head.proj.weight") else shape)
        for name, shape in shapes.items()
        if layers == 6 or not beyond.match(name)
    }
    return write_original(tmp_path / f"exchangeable-{layers}", config, weights)


def test_from_the_original_to_transformers_and_back_is_bit_exact(tmp_path: Path):
    """But for the text layers that never run, which transformers has no place for."""
    convert(exchangeable_original(tmp_path), tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "back")
    before, after = load_file(tmp_path / "native" / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert {key[:14] for key in before.keys() - after.keys()} == {"text.layers.4.", "text.layers.5."}
    assert all(torch.equal(before[key], after[key]) for key in after)
    theirs = loaded_whole(PeAudioVideoModel, tmp_path / "hf").double()
    inputs = in_double(synth.inputs(1))
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][:, :1]
    with torch.inference_mode():
        found = differences(load_model(tmp_path / "native").double()(**inputs), theirs(**inputs))
    assert max(found[f"{name}_embeds"] for name in EMBEDDINGS) <= 1e-6, found
    # with one row a matrix of logits is a single sum, most of which may cancel
    assert max(found[f"logits_{name}"] for name in LOGITS) <= 1e-5, found


# ---------------------------------------------------------------------------------------------------------------------
# bad input


def refused(
    source: Path | str, target: Path, error: type[BaseException], message: str | None, to: str = "native"
) -> str:
    """One clear message, no target, and nothing else left behind either."""
    before = sorted(target.parent.iterdir())
    with pytest.raises(error, match=message) as raised:
        convert(source, target, to)
    assert sorted(target.parent.iterdir()) == before
    return str(raised.value)


@pytest.mark.parametrize("keep", [0, 7, 200, 30_000, -1])
def test_truncated_weights(source: Path, tmp_path: Path, keep: int):
    (source / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes()[:keep])
    refused(source, tmp_path / "t", CheckpointError, "model.safetensors: not a complete safetensors file")


class Trap:
    """A pickle that leaves a trace when it is read."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("name", [WEIGHTS, "pytorch_model.bin", "model.pt"])
def test_a_pickle_is_never_read(source: Path, tmp_path: Path, name: str):
    (source / WEIGHTS).unlink()
    torch.save({"weight": Trap(tmp_path / "ran")}, source / name)
    message = "not a complete safetensors file" if name == WEIGHTS else f"{name} is a pickle, which can run code"
    refused(source, tmp_path / "t", CheckpointError, message)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("to", ["native", "hf"])
def test_a_weight_that_is_no_number(source: Path, tmp_path: Path, value: float, to: str):
    change_weights(source, lambda w: w["text_model.layers.0.mlp.Wi.weight"].index_fill_(0, torch.tensor([3]), value))
    message = r"NaN or Inf in 1 weights, so nothing was written: text\.layers\.0\.gate_up\.weight"
    refused(source, tmp_path / "t", CheckpointError, message, to)


def test_a_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(source, tmp_path / "t", CheckpointError, "0.0 GB are needed and 0.0 GB are free: make room")


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), pe_av.checkpoint.SafetensorError("I/O error: No space left on device")],
)
def test_a_disk_that_fills_up_on_the_way(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def half_written(weights: dict, path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(pe_av.conversion.write_checkpoint, "save_tensors", half_written)
    refused(source, tmp_path / "t", CheckpointError, "No space left on device.*nothing was left behind")


def test_an_interrupted_conversion_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pe_av.conversion.write_checkpoint, "save_tensors", interrupted)
    refused(source, tmp_path / "t", KeyboardInterrupt, None)


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_an_existing_target_stays_as_it_is(source: Path, tmp_path: Path, kind: str):
    target = tmp_path / "t"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
    if kind == "folder":
        (target / "mine").write_text("mine")
    refused(source, target, CheckpointError, "t exists: move it away, or choose another target")
    if kind != "empty folder":
        assert (target if kind == "file" else target / "mine").read_text() == "mine"


def test_missing_unknown_and_misshapen_weights_are_listed(source: Path, tmp_path: Path):
    def change(weights: dict[str, Tensor]) -> None:
        del weights["audio_model.audio_head.proj.weight"], weights["text_model.final_norm.weight"]
        weights["audio_model.audio_head.prøj.weight"] = torch.zeros(3)
        weights["video_plus_text_logit_bias"] = torch.zeros(2)

    change_weights(source, change)
    message = refused(
        source, tmp_path / "t", CheckpointError, "4 weights do not fit the config, so nothing was written"
    )
    assert sorted(line.strip() for line in message.splitlines()[1:]) == [
        "missing audio_model.audio_head.proj.weight",
        "missing text_model.final_norm.weight",
        "unknown audio_model.audio_head.prøj.weight",
        "video_plus_text_logit_bias is (2,), not (1,)",
    ]


def test_missing_and_unknown_weights_of_the_original_and_of_ours_are_listed(original: Path, tmp_path: Path):
    convert(original, tmp_path / "native")
    change_weights(original, lambda w: w.update(extra=w.pop("audio_head.proj.weight")))
    refused(original, tmp_path / "t", CheckpointError, r"missing audio_head.proj.weight\n  unknown extra")
    change_weights(tmp_path / "native", lambda w: w.update(extra=w.pop("heads.audio.proj.weight")))
    refused(tmp_path / "native", tmp_path / "t", CheckpointError, r"missing heads.audio.proj.weight\n  unknown extra")


def sharded(source: Path) -> Path:
    weights = load_file(source / WEIGHTS)
    (source / WEIGHTS).unlink()
    half = len(weights) // 2
    for shard, part in (("a", list(weights)[:half]), ("b", list(weights)[half:])):
        save_file({name: weights[name] for name in part}, source / f"{shard}.safetensors")
    index = {name: "a.safetensors" if i < half else "b.safetensors" for i, name in enumerate(weights)}
    (source / INDEX).write_text(json.dumps({"weight_map": index}))
    return source


def test_a_missing_shard(source: Path, tmp_path: Path):
    (sharded(source) / "b.safetensors").unlink()
    refused(source, tmp_path / "t", CheckpointError, "the shard b.safetensors is missing; download the folder again")


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "sub/evil.safetensors", "..", "", 5, None])
def test_an_index_that_leads_elsewhere(source: Path, tmp_path: Path, name: object):
    sharded(source)
    (tmp_path / "evil.safetensors").write_bytes((source / "a.safetensors").read_bytes())
    change_json(source / INDEX, lambda index: index["weight_map"].update(text_model=name))
    refused(source, tmp_path / "t", CheckpointError, "outside the folder|not an index of shards|is missing")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\x00"])
def test_an_index_that_is_none(source: Path, tmp_path: Path, text: str):
    sharded(source)
    (source / INDEX).write_text(text)
    refused(source, tmp_path / "t", CheckpointError, "not an index of shards")


def test_no_config(source: Path, tmp_path: Path):
    (source / "config.json").unlink()
    refused(source, tmp_path / "t", ConfigError, "config.json: no such file, so this is not a published checkpoint")


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "\x00\x01"])
def test_a_config_that_is_none(source: Path, tmp_path: Path, text: str):
    (source / "config.json").write_text(text)
    refused(source, tmp_path / "t", ConfigError, "config.json: (not JSON|holds)")


VISION = ("audio_video_config", "video_config", "vision_config")
AUDIO = ("audio_video_config", "audio_config")


def at(path: tuple[str, ...], **changes: object) -> Callable[[dict], None]:
    """A change of the settings in the section at `path`."""

    def change(values: dict) -> None:
        for key in path:
            values = values[key]
        values.update(changes)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            at((), model_type="llama"),
            "model_type=llama is not a PE-AV model: known are pe_audio_video, pe_audio and",
        ),
        (at((), model_type=None), "model_type=None is not a PE-AV model"),
        (at((*VISION,), architecture="resnet50"), "the frame encoder resnet50 is unknown; known are PE-Core-"),
        (at((*VISION, "model_args"), num_reg_tokens=4), "model_args.num_reg_tokens=4 of the frame encoder is not supp"),
        (at((*VISION, "model_args"), attn_type="eva"), "model_args.attn_type=eva of the frame encoder is not supp"),
        (at((*VISION, "model_args"), ref_feat_shape=[9, 9]), r"model_args.ref_feat_shape=\[9, 9\] of the frame"),
        (at((*VISION, "model_args"), depth="two"), "depth|num_hidden_layers"),
        (at(("text_config",), norm_bias=True), "the text model has norm_bias"),
        (at(("text_config",), hidden_activation="sinus"), "hidden_act=sinus is unknown"),
        (at(("text_config",), hidden_size="wide"), "hidden_size"),
        (at(("text_config",), hidden_size=None), "hidden_size|output_dim"),
        (at(("text_config",), num_hidden_layers=[3]), "num_hidden_layers"),
        (at(("text_config",), layer_types=["sliding_attention", "full_attention"] * 2), "not a regular pattern"),
        (
            at(("text_config", "rope_parameters", "full_attention"), rope_type="linear", factor=2.0),
            "rope_type=linear of the text model",
        ),
        (at(("text_config", "rope_parameters"), full_attention=3), "config.json"),
        (at((*AUDIO, "rope_parameters"), rope_type="yarn"), "rope_type=yarn is unknown"),
        (at((*AUDIO, "rope_parameters"), partial_rotary_factor=0.5), "rope_parameters has partial_rotary_factor"),
        (at(AUDIO, hidden_act="sinus"), "hidden_act=sinus is unknown"),
        (at(AUDIO, num_key_value_heads=3), "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        (at(AUDIO, dac_config="dac"), "config.json"),
        (at((*AUDIO, "dac_config"), downsampling_ratios=8), "downsampling_ratios"),
        (at((), audio_video_config=[1]), "config.json"),
        (at((), text_config="modernbert"), "config.json"),
    ],
)
def test_a_config_that_asks_for_what_ours_does_not_do(
    source: Path, tmp_path: Path, change: Callable[[dict], None], message: str
):
    change_json(source / "config.json", change)
    found = refused(source, tmp_path / "t", ConfigError, message)
    assert len(found.splitlines()) == 1 and "config.json" in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["audio_visual_model"]["visual_model"].update(pe_encoder="PE-Core-X1"), "PE-Core-X1 is unknown"),
        (
            lambda c: c["audio_visual_model"]["audio_model"].pop("dac_vae_encoder"),
            "the key 'dac_vae_encoder' is missing",
        ),
        (lambda c: c.pop("nth_text_layer"), "the key 'nth_text_layer' is missing"),
        (lambda c: c.update(audio_visual_model="x"), "config.json"),
        (lambda c: c["text_model"].update(hidden_size=50), "hidden_size=50"),
        (lambda c: c.update(nth_text_layer=7), "nth_text_layer=7 is not in 1 … num_hidden_layers=6"),
    ],
)
def test_a_config_of_the_original_that_cannot_be(original: Path, tmp_path: Path, change: Callable, message: str):
    change_json(original / "config.json", change)
    found = refused(original, tmp_path / "t", ConfigError, message)
    assert len(found.splitlines()) == 1 and "config.json" in found


@pytest.mark.parametrize("text", ["{", "[]", '{"video_processor": 3}', '{"video_processor": {"image_mean": [0.4]}}'])
def test_preprocessing_that_is_not_ours(source: Path, tmp_path: Path, text: str):
    (source / "processor_config.json").write_text(text)
    refused(source, tmp_path / "t", ConfigError, "processor_config.json|image_mean is not 0.5")


def test_a_tokenizer_that_is_none(source: Path, tmp_path: Path):
    (source / "tokenizer.json").write_text("{}")
    refused(source, tmp_path / "t", ValueError, "tokenizer.json: not a tokenizer")


def test_a_config_never_runs_code(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not by Hydra's way of naming a class, not by transformers', in no section."""
    trace = tmp_path / "ran"
    (source / "evil.py").write_text(f"import os; os.mkdir({str(trace)!r})\nModel = dict")
    monkeypatch.syspath_prepend(source)

    def change(values: dict) -> None:
        for section in (values, values["text_config"], values["audio_video_config"]):
            section |= {"_target_": "evil.Model", "auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Model"}}
            section["trust_remote_code"] = True

    change_json(source / "config.json", change)
    convert(source, tmp_path / "native")
    assert not trace.exists() and "evil" not in (tmp_path / "native" / "config.yaml").read_text()
    convert(source, tmp_path / "hf", "hf")
    assert not trace.exists() and "evil" not in (tmp_path / "hf" / "config.json").read_text()
    values = yaml.safe_load((tmp_path / "native" / "config.yaml").read_text())
    (tmp_path / "native" / "config.yaml").write_text(yaml.safe_dump(values | {"_target_": "evil.Model"}))
    refused(tmp_path / "native", tmp_path / "t", ConfigError, "unknown setting _target_")
    assert not trace.exists()


# ---------------------------------------------------------------------------------------------------------------------
# folders that lie about their format


def test_the_originals_config_with_weights_of_transformers(tmp_path: Path):
    """Published folders carry one layout on one branch and the other on another; downloads mix them up."""
    folder = exchangeable_original(tmp_path, layers=4)
    convert(folder, tmp_path / "expected")
    convert(folder, tmp_path / "hf", "hf")
    shutil.copy(tmp_path / "hf" / WEIGHTS, folder / WEIGHTS)
    found = convert(folder, tmp_path / "native")
    assert any(
        "the config is the original's, but the weights have the names of transformers'" in n for n in found.notes
    )
    assert same_tensors(tmp_path / "native", tmp_path / "expected")


def test_transformers_config_with_weights_of_the_original(tmp_path: Path):
    folder = exchangeable_original(tmp_path, layers=4)
    convert(folder, tmp_path / "expected")
    convert(folder, tmp_path / "hf", "hf")
    shutil.copy(folder / WEIGHTS, tmp_path / "hf" / WEIGHTS)
    found = convert(tmp_path / "hf", tmp_path / "native")
    assert any(
        "the config is transformers', but the weights have the names of the original's" in n for n in found.notes
    )
    assert same_tensors(tmp_path / "native", tmp_path / "expected")


def test_a_folder_that_is_what_it_says_has_no_such_note(published: Callable[..., Path], original: Path, tmp_path: Path):
    for number, folder in enumerate((published(), published("one", PeVideoModel), original)):
        assert not any("branches" in note for note in convert(folder, tmp_path / str(number)).notes)


@pytest.mark.parametrize("cls", CLASSES)
def test_weights_of_another_model_than_the_config(
    published: Callable[..., Path], source: Path, tmp_path: Path, cls: type
):
    """All of one library, but of another class."""
    other = PeAudioVideoModel if cls is not PeAudioVideoModel else PeVideoModel
    shutil.copy(published("one", cls) / WEIGHTS, source / WEIGHTS)
    shutil.copy(published("one", other) / "config.json", source / "config.json")
    message = "the weights have the names of transformers' .*, but the config describes .*take both from the same"
    refused(source, tmp_path / "t", CheckpointError, message)


def test_weights_of_another_size_than_the_config(published: Callable[..., Path], source: Path, tmp_path: Path):
    shutil.copy(published("two") / WEIGHTS, source / WEIGHTS)
    message = refused(source, tmp_path / "t", CheckpointError, "weights do not fit the config, so nothing was written")
    assert "text_model.embeddings.norm.weight is (32,), not (48,)" in message


def test_a_config_that_could_be_of_two_classes(published: Callable[..., Path], tmp_path: Path):
    folder = Path(shutil.copytree(published("one", PeAudioModel), tmp_path / "source"))
    change_json(folder / "config.json", lambda c: c.pop("architectures"))
    refused(folder, tmp_path / "t", ConfigError, "does not tell PeAudioModel from PeAudioFrameLevelModel")


def test_weights_of_something_else(source: Path, tmp_path: Path):
    save_file({"model.embed.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}, source / WEIGHTS)
    message = "the weights are not those of a known PE-AV format; they begin with lm_head.weight, model.embed.weight"
    refused(source, tmp_path / "t", CheckpointError, message)


# ---------------------------------------------------------------------------------------------------------------------
# names on the hub


def test_a_hub_name_without_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it raises
    message = refused("facebook/pe-av-large", tmp_path / "t", CheckpointError, r"pip install 'pe-av\[hub\]'")
    assert "hf download facebook/pe-av-large" in message and len(message.splitlines()) == 1


def test_a_hub_name_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(Exception, match="."):  # of its many kinds
        huggingface_hub.snapshot_download("facebook/pe-av-large", cache_dir=tmp_path / "cache")
    message = refused("facebook/pe-av-large", tmp_path / "t", CheckpointError, "could not be downloaded")
    assert "check name and network" in message and len(message.splitlines()) == 1


@pytest.mark.parametrize(("name", "revision"), [("someone/model", None), ("someone/model@v1.0", "v1.0")])
def test_a_hub_name_is_downloaded(
    published: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, revision: str | None
):
    """Configs and safetensors alone: whatever else lies there stays there."""
    asked = {}

    def download(repository: str, **options: object) -> str:
        asked.update(options, repository=repository)
        return str(published())

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    convert(name, tmp_path / "native")
    assert (asked["repository"], asked["revision"]) == ("someone/model", revision)
    assert set(asked["allow_patterns"]) == {"*.json", "*.safetensors", "config.yaml"}


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "./nowhere", "someone/model with spaces"])
def test_what_is_neither_folder_nor_hub_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    refused(name, tmp_path / "t", CheckpointError, f"{name}: no such folder|{name} is no folder here")


def test_a_file_in_place_of_its_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Which must not be taken for a name on the hub, though "source/model.safetensors" looks like one."""
    monkeypatch.chdir(tmp_path)
    refused(f"source/{WEIGHTS}", tmp_path / "t", CheckpointError, "is a file: give the folder that it lies in")


# ---------------------------------------------------------------------------------------------------------------------
# the command


def command(output: Path, *arguments: str) -> Command:
    return Command(output, "convert.py", *arguments).wait()


def test_the_command(published: Callable[..., Path], tmp_path: Path):
    """What it did goes to stderr; nothing but the target is written."""
    before = set(ROOT.iterdir())
    done = command(tmp_path, f"source={published()}", f"target={tmp_path}/native")
    assert done.returncode == 0, done.stderr
    assert "transformers' PeAudioVideoModel" in done.stderr and "written to" in done.stderr
    assert isinstance(load_model(tmp_path / "native"), PEAudioVideo)
    assert set(ROOT.iterdir()) <= before | {ROOT / "convert.py"}


def test_a_mistake_costs_one_line(tmp_path: Path):
    done = command(tmp_path, "source=./nowhere", "target=./t")
    assert done.returncode == 1
    assert done.stderr == "error: ./nowhere: no such folder\n"
    assert done.stdout == "" and not (ROOT / "t").exists()


def test_a_misspelt_argument():
    with pytest.raises(ConfigError, match=r"unknown setting sorce; did you mean source\?"):
        check_overrides(ConvertConfig, ["sorce=x", "target=y"])


@pytest.mark.parametrize("word", ["hff", "HF", "original"])
def test_a_format_that_is_none(word: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=f"to={word} is unknown"):
        from_dict(ConvertConfig, {"source": "x", "target": "y", "to": word}, source="config")
    refused("nowhere", tmp_path / "t", CheckpointError, f"to={word} is unknown: native or hf", to=word)


# ---------------------------------------------------------------------------------------------------------------------
# towers on their own

TOWERS = {
    ("text",): {"text_audio", "text_video", "text_audio_video"},
    ("audio",): {"audio"},
    ("video",): {"video"},
    ("audio", "text"): {"audio", "text_audio", "text_video", "text_audio_video", "audio_plus_text"},
    ("text", "video"): {"video", "text_audio", "text_video", "text_audio_video", "video_plus_text"},
    ("audio", "video"): {"audio", "video"},
    ("fusion", "video", "audio"): {"audio", "video", "audio_video"},
    ("text", "audio", "video"): set(HEADS) - {"audio_video"},
    ("text", "audio", "video", "fusion"): set(HEADS),
}


@pytest.fixture
def native(tmp_path: Path) -> tuple[PEAudioVideo, Path]:
    model = randomize(build_model(small_config()))
    save_model(model, tmp_path / "whole")
    return model, tmp_path / "whole"


def embed(model: PEAudioVideo, head: str, batch: dict[str, Tensor]) -> Tensor:
    """By the method that is named after it."""
    words = ("input_ids", "attention_mask") if "text" in head else ()
    sound = ("input_values", "padding_mask") if "audio" in head and not head.startswith("text") else ()
    frames = ("pixel_values_videos", "padding_mask_videos") if "video" in head and not head.startswith("text") else ()
    given = {name: batch[name] for name in (*words, *sound, *frames)}
    with torch.inference_mode():
        return getattr(model, f"get_{head}_embeds")(**given)


def copied(model: PEAudioVideo) -> PEAudioVideo:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@pytest.mark.parametrize("towers", TOWERS)
def test_towers_on_their_own(native: tuple[PEAudioVideo, Path], tmp_path: Path, towers: tuple[str, ...]):
    """Every embedding that they allow is that of the whole model, bit for bit, and after another saving too. Weights
    lie where the file has them, and some kernels round differently there; copies are compared with copies."""
    whole, folder = native
    part = copied(load_model(folder, towers=towers))
    assert set(part.heads) == TOWERS[towers] and not part.training
    save_model(part, tmp_path / "part")
    again = copied(load_model(tmp_path / "part"))
    assert again.config == part.config
    batch = random_batch(whole.config)
    for head in part.heads:
        expected = embed(whole, head, batch)
        assert torch.equal(embed(part, head, batch), expected), head
        assert torch.equal(embed(again, head, batch), expected), head
    for head in set(HEADS) - TOWERS[towers]:
        with pytest.raises(ValueError, match="loaded without|has no head") as raised:
            embed(part, head, batch)
        assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("towers", TOWERS)
def test_only_what_is_needed_is_read(
    native: tuple[PEAudioVideo, Path], towers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    read, real = [], pe_av.checkpoint.safe_open

    class Counting:
        def __init__(self, *args: object, **kwargs: object):
            self.file = real(*args, **kwargs)

        def __enter__(self) -> "Counting":
            self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def keys(self) -> list[str]:
            return self.file.keys()

        def get_slice(self, name: str) -> object:
            return self.file.get_slice(name)

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(pe_av.checkpoint, "safe_open", Counting)
    part = load_model(native[1], towers=towers)
    assert sorted(read) == sorted(part.state_dict())
    assert {name.split(".")[0] for name in read} - {"heads", "logits"} == set(towers)
    assert {name.split(".")[1] for name in read if name.startswith("heads.")} == TOWERS[towers]


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        (("adio",), "towers=adio is unknown; did you mean audio?"),
        ((), "leave no embedding"),
        (("fusion",), "leave no embedding; fusion needs audio and video"),
        ("audio", "towers"),
    ],
)
def test_towers_that_are_none(native: tuple[PEAudioVideo, Path], towers: tuple[str, ...], message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_model(native[1], towers=towers)


def test_towers_that_the_checkpoint_has_not(native: tuple[PEAudioVideo, Path], tmp_path: Path):
    save_model(load_model(native[1], towers=("audio", "text")), tmp_path / "part")
    with pytest.raises(ConfigError, match="towers=video: this model has only text, audio"):
        load_model(tmp_path / "part", towers=("video",))


def test_towers_in_another_dtype(native: tuple[PEAudioVideo, Path]):
    part = load_model(native[1], towers=("audio",), dtype=torch.bfloat16)
    assert {p.dtype for p in part.parameters()} == {torch.bfloat16}


def test_a_converted_tower_reads_as_one(published: Callable[..., Path], tmp_path: Path):
    """The audio part of a PE-AV is a PeAudioModel once the fusion's text head is left out."""
    convert(published(), tmp_path / "native")
    part = load_model(tmp_path / "native", towers=("audio", "text"))
    part.config.heads = ["audio", "text_audio"]
    for head in set(part.heads) - set(part.config.heads):
        del part.heads[head]
    save_model(part, tmp_path / "audio")
    convert(tmp_path / "audio", tmp_path / "hf", "hf")
    theirs = loaded_whole(PeAudioModel, tmp_path / "hf")
    assert max(compared(load_model(tmp_path / "audio"), theirs, "one").values()) <= 1e-6


def test_the_note_beside_a_published_folder(published: Callable[..., Path]):
    with pytest.raises(CheckpointError, match="config.json of a published format: convert it with python convert.py"):
        load_model(published())
