"""The whole model: what it gives for which inputs, what it refuses, that no item depends on its batch, where gradients
go, and what it starts from."""

import copy
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from conftest import ROWS, alone, in_double, random_batch, randomize, relative_error, small_config
from scipy.stats import kstest
from torch import Tensor, nn

from pe_av.checkpoint import build_model
from pe_av.config import CodecConfig, ParallelConfig
from pe_av.evaluation.embedder import Embedder
from pe_av.model.codec import CodecEncoder
from pe_av.model.pe_audio_video import PEAudioVideo, PEAudioVideoOutput
from pe_av.training.parallel import parallelize

EIGHT = {
    "audio_embeds",
    "video_embeds",
    "audio_video_embeds",
    "text_audio_embeds",
    "text_video_embeds",
    "text_audio_video_embeds",
    "audio_plus_text_embeds",
    "video_plus_text_embeds",
}
TEXT, AUDIO = ("input_ids", "attention_mask"), ("input_values", "padding_mask")
VIDEO = ("pixel_values_videos", "padding_mask_videos")


@pytest.fixture(scope="module")
def model() -> PEAudioVideo:
    return randomize(PEAudioVideo(small_config())).eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return random_batch(small_config())


def only(batch: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: batch[name] for name in names}


def given(out: PEAudioVideoOutput) -> set[str]:
    return {field.name for field in fields(out) if getattr(out, field.name) is not None}


# ---------------------------------------------------------------------------------------------------------------------
# what there is for which inputs

TEXT_AND_AUDIO = {
    "audio_embeds",
    "text_audio_embeds",
    "audio_plus_text_embeds",
    "logits_audio_text",
    "text_last_hidden_state",
    "audio_last_hidden_state",
}
TEXT_AND_VIDEO = {
    "video_embeds",
    "text_video_embeds",
    "video_plus_text_embeds",
    "logits_video_text",
    "text_last_hidden_state",
    "video_last_hidden_state",
}
AUDIO_AND_VIDEO = {
    "audio_embeds",
    "video_embeds",
    "audio_video_embeds",
    "logits_audio_video",
    "audio_last_hidden_state",
    "video_last_hidden_state",
    "audio_video_last_hidden_state",
}
ALL_THREE = {
    *EIGHT,
    "logits_audio_text",
    "logits_video_text",
    "logits_audio_video",
    "logits_audio_video_text",
    "logits_audio_plus_text_video",
    "logits_video_plus_text_audio",
    "text_last_hidden_state",
    "audio_last_hidden_state",
    "video_last_hidden_state",
    "audio_video_last_hidden_state",
}
ALL_LOSSES = {
    "loss",
    "audio_text_loss",
    "video_text_loss",
    "audio_video_loss",
    "audio_video_text_loss",
    "audio_plus_text_video_loss",
    "video_plus_text_audio_loss",
}


@pytest.mark.parametrize(
    ("inputs", "outputs", "losses"),
    [
        (TEXT + AUDIO, TEXT_AND_AUDIO, {"loss", "audio_text_loss"}),
        (TEXT + VIDEO, TEXT_AND_VIDEO, {"loss", "video_text_loss"}),
        (AUDIO + VIDEO, AUDIO_AND_VIDEO, {"loss", "audio_video_loss"}),
        (TEXT + AUDIO + VIDEO, ALL_THREE, ALL_LOSSES),
    ],
)
def test_outputs_that_the_inputs_allow(
    model: PEAudioVideo, batch: dict[str, Tensor], inputs: tuple[str, ...], outputs: set[str], losses: set[str]
):
    """Exactly those, and the same numbers as with all three inputs, and as the get_* methods give."""
    batch = only(batch, *inputs)
    with torch.inference_mode():
        out = model(**batch)
        assert given(out) == outputs
        with_loss = model(**batch, return_loss=True)
        assert given(with_loss) == outputs | losses
        everything = model(**random_batch(small_config()))
        for name in outputs:
            assert relative_error(getattr(out, name), getattr(everything, name)) <= 1e-6, name
        for name, method in get_methods(model, batch).items():
            if name in outputs:
                assert relative_error(method(), getattr(out, name)) <= 1e-6, name


def get_methods(model: PEAudioVideo, batch: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """The contract's eight, positional arguments in its order."""
    ids, words, audio, samples, video, frames = (batch.get(name) for name in TEXT + AUDIO + VIDEO)
    return {
        "audio_embeds": lambda: model.get_audio_embeds(audio, samples),
        "video_embeds": lambda: model.get_video_embeds(video, frames),
        "audio_video_embeds": lambda: model.get_audio_video_embeds(audio, video, samples, frames),
        "text_audio_embeds": lambda: model.get_text_audio_embeds(ids, words),
        "text_video_embeds": lambda: model.get_text_video_embeds(ids, words),
        "text_audio_video_embeds": lambda: model.get_text_audio_video_embeds(ids, words),
        "audio_plus_text_embeds": lambda: model.get_audio_plus_text_embeds(ids, audio, words, samples),
        "video_plus_text_embeds": lambda: model.get_video_plus_text_embeds(ids, video, words, frames),
    }


def test_there_are_eight_embeddings(model: PEAudioVideo, batch: dict[str, Tensor]):
    assert set(get_methods(model, batch)) == EIGHT
    with torch.inference_mode():
        embeds = model(**batch).embeds()
    assert {f"{name}_embeds" for name in embeds} == EIGHT
    assert {tuple(value.shape) for value in embeds.values()} == {(3, 28)}


def test_shapes_of_the_sequences(model: PEAudioVideo, batch: dict[str, Tensor]):
    with torch.inference_mode():
        out = model(**batch)
    assert out.text_last_hidden_state.shape == (3, 24, 48)
    assert out.audio_last_hidden_state.shape == (3, 12, 40)
    assert out.video_last_hidden_state.shape == (3, 8, 36)
    assert out.audio_video_last_hidden_state.shape == (3, 12, 64)


def test_no_mask_is_a_mask_of_everything(model: PEAudioVideo, batch: dict[str, Tensor]):
    inputs = {name: value for name, value in batch.items() if "mask" not in name}
    masks = {name: torch.ones_like(value) for name, value in batch.items() if "mask" in name}
    with torch.inference_mode():
        without, with_masks = model(**inputs).embeds(), model(**inputs, **masks).embeds()
    for name, value in without.items():
        assert relative_error(with_masks[name], value) <= 2e-6, name


def test_codec_features_in_place_of_the_waveform(model: PEAudioVideo, batch: dict[str, Tensor]):
    with torch.inference_mode():
        features, mask = model.audio.encode(batch["input_values"], batch["padding_mask"])
        assert features.shape == (3, 12, 12)
        assert mask.sum(1).tolist() == [hops for _, hops, _ in ROWS]
        expected = model(**batch)
        out = model(**only(batch, *TEXT, *VIDEO), codec_features=features, padding_mask=mask)
    for name in ALL_THREE:
        assert torch.equal(getattr(out, name), getattr(expected, name)), name


def test_frames_as_bytes(model: PEAudioVideo, batch: dict[str, Tensor]):
    """Are the same pictures as the float32 ones of /255, mean 0.5 and standard deviation 0.5."""
    frames = torch.randint(0, 256, batch["pixel_values_videos"].shape, generator=torch.Generator().manual_seed(0))
    scaled = ((frames.double() / 255 - 0.5) / 0.5).float()
    with torch.inference_mode():
        expected = model(**(batch | {"pixel_values_videos": scaled})).embeds()
        found = model(**(batch | {"pixel_values_videos": frames.byte()})).embeds()
    for name in ("video", "audio_video", "video_plus_text"):
        assert relative_error(found[name], expected[name]) <= 1e-6, name


def test_a_batch_of_one(model: PEAudioVideo, batch: dict[str, Tensor]):
    with torch.inference_mode():
        out = model(**alone(batch, 1), return_loss=True)
    assert out.logits_audio_text.shape == (1, 1)
    assert out.loss.isfinite()


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (TEXT, "for text alone use get_text_audio_embeds, get_text_video_embeds or get_text_audio_video_embeds"),
        (AUDIO, "for audio alone use get_audio_embeds"),
        (VIDEO, "for video alone use get_video_embeds"),
        ((), "forward needs two of text, audio and video: got none"),
    ],
)
def test_fewer_than_two_inputs(model: PEAudioVideo, batch: dict[str, Tensor], inputs: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        model(**only(batch, *inputs))


def test_the_same_audio_twice(model: PEAudioVideo, batch: dict[str, Tensor]):
    with pytest.raises(ValueError, match="input_values and codec_features are the same audio twice"):
        model(**batch, codec_features=torch.zeros(3, 12, 12))


def with_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x[1].flatten()[-1] = torch.nan
    return x


def with_infinity(x: Tensor) -> Tensor:
    return with_nan(x).nan_to_num(nan=torch.inf)


def without_row_1(mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask[1] = False
    return mask


def with_a_hole(mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask[0, 1] = False
    return mask


def beyond_vocabulary(ids: Tensor) -> Tensor:
    return ids.where(ids != ids[1, 2], 300)


BAD: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("input_ids", lambda x: x[:, 0], r"input_ids has 1 dimensions \(3,\), not 2"),
    ("input_ids", lambda x: x[..., None], r"input_ids has 3 dimensions \(3, 24, 1\), not 2"),
    ("input_ids", lambda x: x[0, 0], r"input_ids has 0 dimensions \(\), not 2"),
    ("input_ids", lambda x: x.float(), "input_ids are torch.float32: pass the tokenizer's integers"),
    ("input_ids", lambda x: x.repeat(1, 3), "input_ids have 72 tokens, more than max_position_embeddings=64"),
    ("input_ids", lambda x: x[:, :0], "input_ids"),
    ("input_ids", lambda x: x > 5, "input_ids are torch.bool"),
    ("input_ids", beyond_vocabulary, "input_ids .*300"),
    ("input_ids", lambda x: -x - 1, "input_ids"),
    ("attention_mask", lambda m: m.long(), "attention_mask is torch.int64: pass bool, True where valid"),
    ("attention_mask", lambda m: m[:, 1:], r"attention_mask is \(3, 23\), not \(3, 24\) as input_ids needs"),
    ("attention_mask", lambda m: m[:1], r"attention_mask is \(1, 24\), not \(3, 24\)"),
    ("attention_mask", without_row_1, r"attention_mask masks the whole of rows \[1\]: drop them"),
    ("attention_mask", with_a_hole, "attention_mask has valid positions after padding"),
    ("input_values", lambda x: x[:, 0], r"input_values has 2 dimensions \(3, 23040\), not 3"),
    ("input_values", lambda x: x[0, 0, 0], r"input_values has 0 dimensions \(\), not 3"),
    ("input_values", lambda x: (x * 1000).short(), "input_values is torch.int16: pass floating point values"),
    ("input_values", lambda x: x.repeat(1, 2, 1), "average the channels to"),
    ("input_values", lambda x: x[..., 1:], "input_values have 23039 samples, not whole hops of 1920"),
    ("input_values", lambda x: x[..., :0], "input_values have 0 samples, not whole hops of 1920"),
    ("input_values", with_nan, r"input_values has NaN or infinite values in rows \[1\]"),
    ("input_values", with_infinity, r"input_values has NaN or infinite values in rows \[1\]"),
    ("padding_mask", lambda m: m.float(), "padding_mask is torch.float32: pass bool, True where valid"),
    ("padding_mask", lambda m: m[:, ::1920], r"padding_mask is \(3, 12\), not \(3, 23040\) as input_values needs"),
    ("padding_mask", without_row_1, r"padding_mask masks the whole of rows \[1\]"),
    ("padding_mask", with_a_hole, "padding_mask has valid positions after padding"),
    ("pixel_values_videos", lambda x: x[:, 0], r"pixel_values_videos has 4 dimensions"),
    ("pixel_values_videos", lambda x: x[0, 0, 0, 0, 0], r"pixel_values_videos has 0 dimensions \(\), not 5"),
    ("pixel_values_videos", lambda x: (x * 9).short(), "pixel_values_videos is torch.int16: pass floating point"),
    ("pixel_values_videos", lambda x: x[..., 1:], r"pixel_values_videos are \(3, 8, 3, 32, 31\), not .* 3, 32, 32\)"),
    ("pixel_values_videos", lambda x: x.repeat(1, 1, 1, 2, 2), r"pixel_values_videos are \(3, 8, 3, 64, 64\)"),
    ("pixel_values_videos", lambda x: x[:, :, :1], r"pixel_values_videos are \(3, 8, 1, 32, 32\)"),
    ("pixel_values_videos", lambda x: x[:, :0], r"pixel_values_videos are \(3, 0, 3, 32, 32\), not \(B, frames >= 1"),
    ("pixel_values_videos", with_nan, r"pixel_values_videos has NaN or infinite values in rows \[1\]"),
    ("padding_mask_videos", lambda m: m.int(), "padding_mask_videos is torch.int32: pass bool, True where valid"),
    ("padding_mask_videos", lambda m: m[:, 1:], r"padding_mask_videos is \(3, 7\), not \(3, 8\)"),
    ("padding_mask_videos", without_row_1, r"padding_mask_videos masks the whole of rows \[1\]"),
    ("padding_mask_videos", with_a_hole, "padding_mask_videos has valid positions after padding"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), BAD, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(BAD)])
def test_bad_input_is_refused(
    model: PEAudioVideo, batch: dict[str, Tensor], name: str, spoil: Callable[[Tensor], Tensor], message: str
):
    """By the name of the input, in one line, and by the get_* method as well as by forward."""
    mask_of = {TEXT[0]: TEXT[1], AUDIO[0]: AUDIO[1], VIDEO[0]: VIDEO[1]}
    batch[name] = spoil(batch[name])
    if name in mask_of:
        del batch[mask_of[name]]  # a mask that no longer fits would be refused first
    kind = next(kind for kind in (TEXT, AUDIO, VIDEO) if name in kind)
    method = {TEXT: model.get_text_audio_embeds, AUDIO: model.get_audio_embeds, VIDEO: model.get_video_embeds}[kind]
    for call in (lambda: model(**batch), lambda: method(**{key: batch[key] for key in kind if key in batch})):
        with torch.inference_mode(), pytest.raises(ValueError, match=message) as raised:
            call()
        assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("features", "mask", "message"),
    [
        (torch.zeros(3, 12, 11), None, r"codec_features are \(3, 12, 11\), not .*codebook_dim=12\)"),
        (torch.zeros(3, 12), None, "codec_features has 2 dimensions"),
        (torch.zeros(3, 0, 12), None, "codec_features"),
        (torch.zeros(3, 12, 12, dtype=torch.long), None, "codec_features is torch.int64"),
        (torch.full((3, 12, 12), torch.nan), None, r"codec_features has NaN or infinite values in rows \[0, 1, 2\]"),
        (
            torch.zeros(3, 12, 12),
            torch.ones(3, 23040, dtype=torch.bool),
            r"padding_mask is \(3, 23040\), not \(3, 12\)",
        ),
    ],
)
def test_bad_codec_features_are_refused(
    model: PEAudioVideo, batch: dict[str, Tensor], features: Tensor, mask: Tensor | None, message: str
):
    with torch.inference_mode(), pytest.raises(ValueError, match=message):
        model(**only(batch, *TEXT), codec_features=features, padding_mask=mask)


@pytest.mark.parametrize(("kind", "what"), [(TEXT, "2 of text"), (AUDIO, "2 of audio"), (VIDEO, "2 of video")])
def test_different_batch_sizes(model: PEAudioVideo, batch: dict[str, Tensor], kind: tuple[str, str], what: str):
    batch |= {name: batch[name][:2] for name in kind}
    with pytest.raises(ValueError, match=rf"inputs of different batch size \(.*{what}.*\)"):
        model(**batch)


def test_misspelt_loss_weight(model: PEAudioVideo, batch: dict[str, Tensor]):
    """Which would otherwise count with weight 1."""
    with pytest.raises(ValueError, match="audio_txt"):
        model(**batch, return_loss=True, loss_weights={"audio_txt": 0.0})


def test_misspelt_input(model: PEAudioVideo, batch: dict[str, Tensor]):
    with pytest.raises(TypeError, match="pixel_values"):
        model(**only(batch, *TEXT), pixel_values=batch["pixel_values_videos"])


# ---------------------------------------------------------------------------------------------------------------------
# an item does not depend on what it is batched with

SAME_LENGTHS = ((24, 8, 8), (9, 5, 8), (15, 8, 3))  # padded to 8 and 8: transformers then does not align at all


def check_padding(model: PEAudioVideo, batch: dict[str, Tensor], tolerance: float) -> None:
    with torch.inference_mode():
        together = model(**batch)
        for row in range(3):
            by_itself = model(**alone(batch, row))
            for name in EIGHT:
                error = relative_error(getattr(together, name)[row], getattr(by_itself, name)[0])
                assert error <= tolerance, f"{name} of row {row}: {error}"
            for tower in ("text", "audio", "video", "audio_video"):
                expected = getattr(by_itself, f"{tower}_last_hidden_state")[0]
                found = getattr(together, f"{tower}_last_hidden_state")[row, : len(expected)]
                assert relative_error(found, expected) <= tolerance, f"{tower} of row {row}"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("loudness", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("rows", [ROWS, SAME_LENGTHS])
def test_padding_changes_nothing(
    rows: tuple[tuple[int, int, int], ...], loudness: float, attention: str, model: PEAudioVideo
):
    """All embeddings, and the sequences where they are valid, whatever stands in the padding. In float64, because
    random weights amplify the codec's rounding; 1e-6 and not less, because norms and rotations go through float32."""
    double = PEAudioVideo(replace(small_config(), attention=attention)).eval()
    double.load_state_dict(model.state_dict())
    check_padding(double.double(), in_double(random_batch(small_config(), rows, loudness=loudness)), tolerance=1e-6)


def test_padding_changes_nothing_in_float32(model: PEAudioVideo):
    """With a codec as it starts."""
    codec = CodecConfig(encoder_hidden_size=4, codebook_dim=12)
    config = replace(small_config(), audio=replace(small_config().audio, codec=codec))
    started = copy.deepcopy(model)
    started.audio.codec = PEAudioVideo(config).audio.codec
    check_padding(started, random_batch(config, loudness=3.0), tolerance=5e-6)


def test_padding_within_the_last_hop_is_not_heard(model: PEAudioVideo, batch: dict[str, Tensor]):
    """A Processor fills the last hop. With a mask that ends inside of one, what stands behind that is padding too."""
    double, batch = copy.deepcopy(model).double(), in_double(batch)
    batch["padding_mask"][1, 5 * 1920 - 700 :] = False
    silent = batch["input_values"] * batch["padding_mask"][:, None]
    with torch.inference_mode():
        noisy = double.get_audio_embeds(batch["input_values"], batch["padding_mask"])
        assert relative_error(noisy, double.get_audio_embeds(silent, batch["padding_mask"])) <= 1e-6


def test_a_batch_that_is_padded_further_gives_the_same(model: PEAudioVideo, batch: dict[str, Tensor]):
    """Padding behind the longest row too, as a collator that rounds lengths up makes."""
    double, batch = copy.deepcopy(model).double(), in_double(batch)
    longer = {
        "input_ids": nn.functional.pad(batch["input_ids"], (0, 7)),
        "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 7)),
        "input_values": nn.functional.pad(batch["input_values"], (0, 4 * 1920)),
        "padding_mask": nn.functional.pad(batch["padding_mask"], (0, 4 * 1920)),
        "pixel_values_videos": nn.functional.pad(batch["pixel_values_videos"], (0, 0, 0, 0, 0, 0, 0, 5)),
        "padding_mask_videos": nn.functional.pad(batch["padding_mask_videos"], (0, 5)),
    }
    with torch.inference_mode():
        expected, found = double(**batch).embeds(), double(**longer).embeds()
    for name, value in expected.items():
        assert relative_error(found[name], value) <= 1e-6, name


def test_tiles_change_nothing(model: PEAudioVideo, batch: dict[str, Tensor]):
    """Config to embedding; the codec's own test has every size."""
    tiled = copy.deepcopy(model).double()
    tiled.audio.codec.tile_positions = 5
    batch = in_double(batch)
    with torch.inference_mode():
        expected, found = copy.deepcopy(model).double()(**batch).embeds(), tiled(**batch).embeds()
    for name, value in expected.items():
        assert relative_error(found[name], value) <= 1e-6, name


# ---------------------------------------------------------------------------------------------------------------------
# precision


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # a slower norm, the same numbers
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16(model: PEAudioVideo, batch: dict[str, Tensor], how: str):
    """As good as eight bits allow: 2**-8 for one rounding, a few of them for a dozen layers. From codec features,
    because random codec weights amplify rounding."""
    with torch.inference_mode():
        features, mask = model.audio.encode(batch["input_values"], batch["padding_mask"])
        inputs = only(batch, *TEXT, *VIDEO) | {"codec_features": features, "padding_mask": mask}
        expected = model(**inputs).embeds()
        if how == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(**inputs, return_loss=True)
        else:
            half = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
            out = copy.deepcopy(model).bfloat16()(**half, return_loss=True)
    assert out.loss.dtype == out.logits_audio_text.dtype == torch.float32
    for name, value in out.embeds().items():
        assert value.dtype == torch.bfloat16, name
        assert relative_error(value, expected[name]) <= 0.03, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inputs_of_another_precision_than_the_weights(
    model: PEAudioVideo, batch: dict[str, Tensor], dtype: torch.dtype
):
    """`load_model(path, dtype=…)` takes what the Processor makes, which is float32."""
    other = copy.deepcopy(model).to(dtype)
    cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
    with torch.inference_mode():
        expected, found = other(**cast).embeds(), other(**batch).embeds()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# ---------------------------------------------------------------------------------------------------------------------
# gradients


def gradients(model: PEAudioVideo, batch: dict[str, Tensor]) -> dict[str, Tensor | None]:
    model.zero_grad()
    torch.manual_seed(0)  # for dropout
    model.train()(**batch, return_loss=True).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("codec_trainable", [False, True])
def test_gradients_reach_what_is_trained_and_nothing_else(batch: dict[str, Tensor], codec_trainable: bool):
    config = small_config()
    config.audio.codec.trainable = codec_trainable
    config.fusion.attention_bias = True
    model = randomize(PEAudioVideo(config))
    found = gradients(model, batch)
    reached = {name for name, gradient in found.items() if gradient is not None and gradient.any()}
    touched = {name for name, gradient in found.items() if gradient is not None}
    unused = {name for name in found if name.startswith("text.layers.4.") or name == "text.final_norm.weight"}
    codec = {name for name in found if name.startswith("audio.codec.")}
    assert len(unused) == 7 and len(codec) > 50
    assert reached == touched == found.keys() - unused - (set() if codec_trainable else codec)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == reached
    assert all(found[name].isfinite().all() for name in reached)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_blocks_give_the_same_gradients(batch: dict[str, Tensor], dropout: float):
    """In every kind of block, with dropout's draws repeated; and they are recomputed, or no memory is saved."""
    config = small_config()
    for part in (config.text, config.audio.transformer, config.fusion):
        part.attention_dropout = dropout
    model = randomize(PEAudioVideo(config))
    expected = gradients(model, batch)
    recomputed = copy.deepcopy(model)
    parallelize(recomputed, Embedder(recomputed), ParallelConfig(activation_checkpointing=True), torch.device("cpu"))
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    for block in recomputed.blocks():
        block.mlp_norm.register_forward_hook(count)
    found = gradients(recomputed, batch)
    assert runs == 2 * len(model.blocks())
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            assert relative_error(found[name], gradient) <= 1e-6, name


def test_blocks_are_the_layers_of_all_towers_that_run():
    model = PEAudioVideo(small_config())
    audio, video, fusion = model.audio.transformer, model.video.transformer, model.fusion.transformer
    layers = [layer for tower in (audio, model.video.vision, video, fusion) for layer in tower.layers]
    layers += model.text.layers[:4]  # the fifth comes after nth_text_layer
    assert {id(block) for block in model.blocks()} == {id(layer) for layer in layers}
    assert len(model.blocks()) == 4 + 2 + 2 + 1 + 2


# ---------------------------------------------------------------------------------------------------------------------
# the start


def test_weights_start_normal_with_the_spread_of_their_part():
    """Every matrix, token, probe and position of a part against the normal distribution of its `initializer_range`, by
    a Kolmogorov–Smirnov test; 1e-6 is far below the smallest of a hundred honest p-values."""
    config = small_config()
    spread = {"text.": 0.01, "audio.": 0.03, "video.": 0.05, "video.vision.": 0.07, "fusion.": 0.09, "heads.": 0.09}
    config.text.initializer_range = spread["text."]
    config.audio.transformer.initializer_range = spread["audio."]
    config.video.transformer.initializer_range = spread["video."]
    config.video.vision.initializer_range = spread["video.vision."]
    config.fusion.initializer_range = spread["fusion."]
    tested = 0
    for name, parameter in PEAudioVideo(config).named_parameters():
        if name.startswith(("audio.codec.", "logits.")):
            continue
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.full_like(parameter, "bias" not in name)), name
            continue
        std = spread[max((prefix for prefix in spread if name.startswith(prefix)), key=len)]
        assert kstest(parameter.detach().flatten().numpy(), "norm", args=(0, std)).pvalue > 1e-6, name
        tested += 1
    assert tested > 80


def test_two_models_start_differently_and_a_seed_repeats_them():
    first, second = build_model(small_config()), build_model(small_config())
    torch.manual_seed(0)
    again = build_model(small_config())
    weights = [m.state_dict() for m in (first, second, again)]
    assert not torch.equal(weights[0]["text.embedding.weight"], weights[1]["text.embedding.weight"])
    assert all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_codec_alone_and_in_the_model_start_alike():
    """The model's own start must not write over the codec's."""
    model = PEAudioVideo(small_config())
    for name, parameter in model.audio.codec.named_parameters():
        if name.endswith("conv1.weight"):
            fan_in = parameter[0].numel()
            assert kstest(parameter.detach().flatten().numpy(), "norm", args=(0, fan_in**-0.5)).pvalue > 1e-6, name
    assert isinstance(model.audio.codec, CodecEncoder)
