"""What a user sees and asks for in Python: reprs, summaries, batches on a device, images, what lies inside a model."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import random_batch, randomize, relative_error, small_config
from PIL import Image
from torch import Tensor, nn

from pe_av import PEAudioFrame, PEAudioVideo, Processor, build_model
from pe_av.config import PEAudioFrameConfig
from pe_av.config.compose import from_dict, load_preset
from pe_av.media.tracks import MediaError
from pe_av.model.packing import Packing

# ---------------------------------------------------------------------------------------------------------------------
# without Hydra and without files


def test_models_and_processors_need_no_hydra_and_no_files(tmp_path: Path):
    """In an empty folder, in a process in which Hydra cannot be imported and no YAML file is opened."""
    script = """
import sys
sys.modules["hydra"] = None
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
import torch
from tokenizers import Tokenizer, models
from pe_av import Processor, build_model, embed_items
from pe_av.config import AudioConfig, CodecConfig, ModelConfig, TextConfig, TransformerConfig, VideoConfig, VisionConfig
t = TransformerConfig(16, 16, 1, 2, head_dim=8)
config = ModelConfig(
    TextConfig(30, 16, 16, 1, 2, max_position_embeddings=9, max_tokens=9, pad_token_id=0, nth_text_layer=1),
    AudioConfig(CodecConfig(encoder_hidden_size=2, codebook_dim=4), t),
    VideoConfig(VisionConfig(16, 8, 16, 16, 1, 2, 8, pool_heads=2), t), t, output_dim=8)
model = build_model(config)
processor = Processor(config, Tokenizer(models.WordLevel({"dog": 0, "rain": 1}, unk_token="rain")))
noise = torch.zeros(5, 3, 9, 9, dtype=torch.uint8)
batch = processor(text="dog", audio=torch.randn(4800) / 9, videos=noise, sampling_rate=48_000)
assert model(**batch).logits_audio_video_text.shape == (1, 1)
assert embed_items(model, processor, [{"text": "dog"}])[0]["text_audio"].shape == (1, 8)
assert not [name for name in opened if name.endswith((".yaml", ".json"))], opened
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# images


@pytest.fixture(scope="module")
def processor() -> Processor:
    config = small_config()
    return Processor(replace(config, video=replace(config.video, num_frames=3)))


def test_an_image_is_a_video_of_one_frame(processor: Processor, tmp_path: Path):
    """As files, Pillow's images and arrays: the same as a video of that frame, which is repeated as often as wanted."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image, expected = Image.fromarray(pixels), processor(videos=pixels[None])["pixel_values_videos"]
    assert expected.shape == (1, 3, 3, 32, 32)
    files = [tmp_path / name for name in ("image.png", "image.bmp", "image.webp")]
    for file in files:
        image.save(file, lossless=True) if file.suffix == ".webp" else image.save(file)
    for form in (pixels, pixels.transpose(2, 0, 1), torch.from_numpy(pixels), image, *files, str(files[0])):
        assert torch.equal(processor(videos=form)["pixel_values_videos"], expected)
    several = processor(videos=[image, pixels, files[0]])["pixel_values_videos"]
    assert torch.equal(several, expected.expand(3, -1, -1, -1, -1))


def test_images_are_turned_upright_and_made_rgb(processor: Processor, tmp_path: Path):
    """A phone's picture says in its EXIF data how it was held; reading the file does the same."""
    pixels = np.zeros((40, 20, 3), dtype=np.uint8)
    pixels[:20, :, 0] = 255
    exif = Image.Exif()
    exif[274] = 6  # the camera was held so that the image must be turned a quarter to the right
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    opened, upright = Image.open(tmp_path / "turned.jpg"), np.rot90(pixels, -1)
    for form in (opened, tmp_path / "turned.jpg"):
        difference = processor.video_item(form).int() - processor.video_item(np.ascontiguousarray(upright)).int()
        assert difference.abs().max() <= 40 and difference.abs().float().mean() < 3  # JPEG
    grey = Image.fromarray(pixels[..., 0])
    expected = processor.video_item(np.repeat(pixels[..., :1], 3, axis=2))
    for form in (grey, grey.convert("RGBA"), grey.convert("P")):
        assert torch.equal(processor.video_item(form), expected)


@pytest.mark.parametrize("shape", [(20, 30), (3, 20, 3), (20, 30, 4)])
def test_what_is_no_image_is_named(processor: Processor, shape: tuple[int, ...]):
    with pytest.raises(MediaError, match=r"^videos\[0\]: frames of shape .*pass "):
        processor(videos=np.zeros(shape, np.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# what a REPL shows


def test_a_batch_goes_to_a_device_and_shows_its_shapes(processor: Processor):
    batch = processor(audio=torch.zeros(1920), videos=np.zeros((1, 8, 8, 3), np.uint8), sampling_rate=48_000)
    assert isinstance(batch, dict)
    assert repr(batch).splitlines() == [
        "Batch(",
        "  input_values         float32 (1, 1, 1920)",
        "  padding_mask         bool (1, 1920)",
        "  pixel_values_videos  float32 (1, 3, 3, 32, 32)",
        "  padding_mask_videos  bool (1, 3)",
        ")",
    ]
    moved = batch.to("meta")
    assert type(moved) is type(batch) and moved.keys() == batch.keys()
    assert all(value.is_meta for value in moved.values()) and not any(value.is_meta for value in batch.values())
    assert "float32 (1, 1, 1920) on meta" in repr(moved)


def test_outputs_show_shapes_and_losses(model: PEAudioVideo):
    with torch.no_grad():
        out = model(**random_batch(model.config), return_loss=True, output_hidden_states=True)
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in repr(out).splitlines()[1:-1]}
    assert repr(out).startswith("PEAudioVideoOutput(\n")
    assert lines["audio_embeds"] == "float32 (3, 28)" and lines["logits_audio_text"] == "float32 (3, 3)"
    assert float(lines["loss"]) == pytest.approx(out.loss.item(), rel=1e-5)
    assert "audio: 3 × float32 (3, 13, 40)" in lines["hidden_states"]
    assert "attentions" not in lines  # None is not shown


def test_configs_show_the_yaml_that_they_are_read_from():
    """And stay equal, hashable or not, as before."""
    config = load_preset("tiny")
    name, text = repr(config).split(":\n", 1)
    assert name == "ModelConfig" and max(map(len, text.splitlines())) <= 130
    assert from_dict(type(config), yaml.safe_load(text), "the repr") == config
    assert repr(config.audio.codec).startswith("CodecConfig:\n  sampling_rate: 48000")


# ---------------------------------------------------------------------------------------------------------------------
# parameters and operations


def test_the_summary_counts_what_a_forward_multiplies(model: PEAudioVideo):
    """Parameters against PyTorch's own count, operations against a formula for the text tower."""
    summary = model.summary(seconds=0.4, frames=5, tokens=7)
    assert summary.total.parameters == sum(p.numel() for p in model.parameters())
    assert summary.total.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    counts = model.parameter_counts()
    assert summary.parts["text"].parameters == counts["text"]
    assert summary.parts["audio"].parameters + summary.parts["codec"].parameters == counts["audio"]
    assert summary.parts["video"].parameters + summary.parts["frame encoder"].parameters == counts["video"]
    assert summary.parts["codec"].trainable == 0
    layer = 7 * (3 * 48 * 48 + 48 * 48 + 3 * 48 * 64) + 2 * 7 * 7 * 48  # projections and MLP, scores and their use
    assert summary.parts["text"].flops == 2 * 4 * layer
    embeds = 3 * 48 + 40 + 36 + 64 + (40 + 48) + (36 + 48)  # the widths that the eight heads read
    assert summary.parts["heads"].flops == 2 * 28 * embeds
    shown = repr(summary)
    assert shown.startswith("PEAudioVideo, one forward of a clip of 7 tokens, 0.4 s, 5 frames\n")
    assert f"{summary.total.parameters:,}" in shown and "frame encoder" in shown
    assert not any(p.is_meta for p in model.parameters())  # the model itself stays where it is


def test_the_summary_of_other_models(model: PEAudioVideo):
    config = model.config
    frame = build_model(PEAudioFrameConfig(text=config.text, audio=config.audio, output_dim=28))
    of_frame, whole = frame.summary(seconds=0.4), model.summary(seconds=0.4)
    assert list(of_frame.parts) == ["text", "codec", "audio", "heads"]
    assert of_frame.parts["audio"] == whole.parts["audio"]
    flex = build_model(replace(config.keep(("video",)), attention="flex"), "meta").summary()
    assert list(flex.parts) == ["frame encoder", "video", "heads"]
    assert flex.parts["video"] == whole.parts["video"]


# ---------------------------------------------------------------------------------------------------------------------
# what lies inside


@pytest.fixture(scope="module")
def model() -> PEAudioVideo:
    return randomize(PEAudioVideo(small_config())).eval()


def hooked(model: nn.Module, layers: list[nn.Module], run) -> list[Tensor]:
    """The input of the first layer and the output of each, by forward hooks."""
    seen: list[Tensor] = []
    handles = [layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    handles += [layer.register_forward_hook(lambda *args: seen.append(args[2][0])) for layer in layers]
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("packed", [True, False])
def test_hidden_states_are_what_hooks_see(model: PEAudioVideo, packed: bool, monkeypatch: pytest.MonkeyPatch):
    """Also where padded rows were packed: they come back as rows."""
    monkeypatch.setattr("pe_av.model.packing.MOST_VALID", 0.95 if packed else 0.0)
    packings = []
    plain = Packing.pack
    monkeypatch.setattr(Packing, "pack", lambda self, x: packings.append(1) or plain(self, x))
    batch, found = random_batch(model.config), {}
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
        assert bool(packings) == packed
        monkeypatch.setattr("pe_av.model.packing.MOST_VALID", 0.0)
        for name, tower in model._transformers().items():
            layers = list(tower.layers[: tower.nth] if name == "text" else tower.layers)
            found[name] = hooked(model, layers, lambda: model(**batch))
    hop = model.audio.codec.hop_length
    masks = {
        "text": batch["attention_mask"],
        "audio": F.pad(batch["padding_mask"][:, ::hop], (1, 0), value=True),
        "video": F.pad(batch["padding_mask_videos"], (1, 0), value=True),
    }
    masks["audio_video"] = masks["audio"]
    assert list(out.hidden_states) == list(found) == ["text", "audio", "video", "audio_video"]
    for name, states in found.items():
        assert len(out.hidden_states[name]) == len(states)
        for ours, theirs in zip(out.hidden_states[name], states, strict=True):
            assert relative_error(ours[masks[name]], theirs[masks[name]]) <= 1e-5, name
    assert torch.equal(out.hidden_states["text"][-1][:, 0], out.text_last_hidden_state[:, 0])


def test_hidden_states_are_kept_only_on_request(model: PEAudioVideo):
    batch = random_batch(model.config)
    with torch.no_grad():
        out = model(**batch)
        model(**batch, output_hidden_states=True)
    assert out.hidden_states is None and out.alignment is None
    assert all(tower.states is None for tower in model._transformers().values())
    with pytest.raises(ValueError, match="padding_mask is"):
        model(**batch | {"input_values": torch.zeros(3, 1, 7)}, output_hidden_states=True)
    assert all(tower.states is None for tower in model._transformers().values())  # after an error too


def test_the_alignment_is_that_of_interpolate(model: PEAudioVideo):
    batch = random_batch(model.config)
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    positions = batch["padding_mask"].sum(1) // model.audio.codec.hop_length
    for row, (steps, frames) in enumerate(zip(positions, batch["padding_mask_videos"].sum(1), strict=True)):
        clip = torch.arange(int(frames), dtype=torch.float32)[None, None]
        expected = F.interpolate(clip, size=int(steps), mode="nearest")[0, 0]
        assert torch.equal(out.alignment[row, : int(steps)].float(), expected)


def test_what_lies_inside_the_frame_model():
    config = small_config()
    frame_config = PEAudioFrameConfig(text=config.text, audio=config.audio, output_dim=28, attention="eager")
    frame = randomize(PEAudioFrame(frame_config)).eval()
    batch = {name: value for name, value in random_batch(config).items() if "videos" not in name}
    with torch.no_grad():
        out = frame(**batch, output_hidden_states=True, output_attentions=True)
        layers = list(frame.audio.transformer.layers)
        states = hooked(frame, layers, lambda: frame(**batch))
    for ours, theirs in zip(out.hidden_states["audio"], states, strict=True):
        assert torch.equal(ours, theirs)
    assert len(out.hidden_states["text"]) == 5
    for weights in out.attentions["audio"]:
        assert torch.allclose(weights.sum(-1), torch.ones(3, 4, 13))
    frame.set_attention("sdpa")
    with pytest.raises(ValueError, match="attention=sdpa keeps no weights: build the model with attention=eager"):
        frame(**batch, output_attentions=True)
