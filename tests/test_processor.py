"""What reaches the model, against references that are not ours: analytic sines, numpy's padding, Pillow's resizing, and
values worked out by hand."""

import math
import os
import pickle
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from test_media import read_frames
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pe_av.config import AudioConfig, CodecConfig, ConfigError, ModelConfig, TextConfig, VideoConfig, VisionConfig
from pe_av.config.compose import model_config_yaml
from pe_av.data.clips import ClipReader
from pe_av.data.manifest import Clip
from pe_av.loading.batch import Collate
from pe_av.media.audio import pad_to_hops, read_audio
from pe_av.media.processor import Processor
from pe_av.media.tracks import MediaError, MissingTrackError

SIZE = 28
HOP = 1920
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "dog", "barks", "at", "night", "loudly"]


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


def make_config(vocab_size=16, max_tokens=8, **sampling) -> ModelConfig:
    return ModelConfig(
        text=TextConfig(vocab_size=vocab_size, pad_token_id=7, max_tokens=max_tokens),
        video=VideoConfig(vision=VisionConfig(image_size=SIZE), **sampling),
    )


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(make_config(), make_tokenizer())


def make_frames(count, height=32, width=48, seed=0) -> np.ndarray:
    """(F, H, W, 3) uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A lossless file: 25 noisy frames in one second, and 16-bit stereo at 44.1 kHz."""
    path = tmp_path_factory.mktemp("media") / "clip.mkv"
    with av.open(str(path), "w") as container:
        picture = container.add_stream("ffv1", rate=25)
        picture.width, picture.height, picture.pix_fmt = 48, 32, "bgr0"
        sound = container.add_stream("pcm_s16le", rate=44_100, layout="stereo")
        for pixels in make_frames(25):
            container.mux(picture.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(picture.encode(None))
        samples = np.random.default_rng(0).integers(-(2**13), 2**13, (1, 2 * 44_100), dtype=np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
        frame.sample_rate, frame.time_base, frame.pts = 44_100, Fraction(1, 44_100), 0
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    return path


def sine(frequency, rate, seconds=1.0, phase=0.3) -> torch.Tensor:
    return torch.sin(2 * math.pi * frequency * torch.arange(round(rate * seconds), dtype=torch.float64) / rate + phase)


# ---------------------------------------------------------------------------------------------------------------------
# text


def test_captions_by_hand(processor):
    batch = processor(text=["a dog", "a dog barks at night"])
    assert batch["input_ids"].tolist() == [[1, 4, 5, 2, 7, 7, 7], [1, 4, 5, 6, 7, 8, 2]]
    assert batch["attention_mask"].tolist() == [[True] * 4 + [False] * 3, [True] * 7]  # the last row's 7 is a word
    assert batch["input_ids"].dtype == torch.int64 and batch["attention_mask"].dtype == torch.bool
    assert set(batch) == {"input_ids", "attention_mask"}
    assert processor(text="a dog")["input_ids"].tolist() == [[1, 4, 5, 2]]


def test_a_long_caption_is_cut_between_its_special_tokens(processor):
    batch = processor(text=["a dog barks at night " * 100, "a"])
    assert batch["input_ids"].tolist() == [[1, 4, 5, 6, 7, 8, 4, 2], [1, 4, 2, 7, 7, 7, 7, 7]]


def test_the_tokenizers_own_truncation_and_padding_neither_matter_nor_change():
    tokenizer = make_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20, pad_id=0)
    before = tokenizer.to_str()
    batch = Processor(make_config(), tokenizer)(text="a dog barks")
    assert batch["input_ids"].tolist() == [[1, 4, 5, 6, 2]]
    assert tokenizer.to_str() == before


@pytest.mark.parametrize("empty", ["", "  ", "\n\t"])
def test_an_empty_caption_is_named(processor, empty):
    with pytest.raises(ValueError, match=r"text\[1\] is empty; pass a caption or leave the item out"):
        processor(text=["a dog", empty])


def test_a_caption_must_be_text(processor):
    with pytest.raises(ValueError, match=r"text\[2\] is of type float; pass a string"):
        processor(text=["a", "dog", math.nan])


def test_another_models_tokenizer_is_refused():
    processor = Processor(make_config(vocab_size=8), make_tokenizer())
    assert processor(text="a dog at")["input_ids"].tolist() == [[1, 4, 5, 7, 2]]
    with pytest.raises(ValueError, match=r"text\[1\] has token id 9, but .* ends at 7: .* another model's, replace"):
        processor(text=["a", "loudly"])


def test_text_without_a_tokenizer_says_what_to_do():
    with pytest.raises(ValueError, match="put tokenizer.json into its folder"):
        Processor(make_config())(text="a dog")


# ---------------------------------------------------------------------------------------------------------------------
# a checkpoint's folder


def test_a_folder_gives_back_the_processor(tmp_path):
    config = make_config(max_tokens=5)
    (tmp_path / "config.yaml").write_text(model_config_yaml(config))
    bare = Processor.from_pretrained(tmp_path)
    assert bare.tokenizer is None
    bare.save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    Processor(config, make_tokenizer()).save_pretrained(tmp_path)
    loaded = Processor.from_pretrained(str(tmp_path))
    assert loaded.config == config
    assert loaded(text="a dog barks at night")["input_ids"].tolist() == [[1, 4, 5, 6, 2]]
    assert loaded.tokenizer.to_str() == make_tokenizer().to_str()  # as it was, without our truncation


def test_a_broken_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match="config.yaml: no such file"):
        Processor.from_pretrained(tmp_path)
    (tmp_path / "config.yaml").write_text(model_config_yaml(make_config()))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer .*; replace it by the model's own"):
        Processor.from_pretrained(tmp_path)


def test_a_processor_travels_to_other_processes(processor):
    copy = pickle.loads(pickle.dumps(processor))
    assert copy(text="a dog " * 9)["input_ids"].tolist() == [[1, 4, 5, 4, 5, 4, 5, 2]]


# ---------------------------------------------------------------------------------------------------------------------
# audio


@pytest.mark.parametrize("frequency", [50, 440, 1000])
@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 48_048, 88_200, 96_000, 192_000])
def test_a_sine_is_the_same_sine_at_48_khz(processor, rate, frequency):
    found = processor.audio_item(sine(frequency, rate), rate)
    assert len(found) == 48_000  # 25 hops
    # the filter's ripple is 0.1 %; a speed wrong by 0.01 % would show as 2π·50·1e-4 = 0.03, at 1 kHz as 0.6
    assert (found - sine(frequency, 48_000))[1000:-1000].abs().max() < 1.5e-3


def test_an_odd_rate_neither_fails_nor_drifts(processor):
    # 48000/11127 has no small terms, and is rounded to a ratio that does; a millionth of error in 10 s is 0.03 here
    found = processor.audio_item(sine(440, 11_127, seconds=10), 11_127)
    assert (found[: 480_000 - 1000] - sine(440, 48_000, seconds=10)[:-1000])[1000:].abs().max() < 0.03


def test_what_48_khz_cannot_hold_is_filtered_out(processor):
    found = processor.audio_item(sine(30_000, 96_000), 96_000)  # without a filter, a loud tone of 18 kHz
    assert found[1000:-1000].abs().max() < 0.01


@pytest.mark.parametrize(
    "rate, samples, expected", [(48_000, 1, 1), (48_000, 1921, 2), (96_000, 3840, 1), (8_000, 8_000, 25)]
)
def test_lengths_are_whole_hops(processor, rate, samples, expected):
    batch = processor(audio=torch.rand(samples), sampling_rate=rate)
    assert batch["input_values"].shape == (1, 1, expected * HOP)
    assert batch["padding_mask"].shape == (1, expected * HOP) and batch["padding_mask"].all()


@pytest.mark.parametrize("hop", [[1, 5], [3, 4], [2, 8, 10, 12]])
def test_padding_is_numpys_reflection(hop):
    processor = Processor(ModelConfig(audio=AudioConfig(codec=CodecConfig(downsampling_ratios=hop))))
    size = math.prod(hop)
    for length in (*range(1, min(4 * size, 80)), size - 1, size, size + 1, size // 2, size // 2 + 1, 2 * size - 1):
        waveform = np.random.default_rng(length).uniform(-1, 1, length).astype(np.float32)
        found = processor.audio_item(waveform, 48_000).numpy()
        assert np.array_equal(found, np.pad(waveform, (0, -length % size), mode="reflect")), length


def test_channels_are_averaged(processor):
    channels = torch.randn(6, HOP, generator=torch.Generator().manual_seed(0)) / 4
    found = processor(audio=channels.numpy(), sampling_rate=48_000)["input_values"][0, 0]
    assert (found - torch.from_numpy(channels.double().numpy().sum(0) / 6)).abs().max() < 1e-6


@pytest.mark.parametrize("kind, scale", [(np.int16, 2**15), (np.int32, 2**31), (">i2", 2**15)])
def test_integers_are_scaled(processor, kind, scale):
    values = np.array([-scale, -scale // 2, 0, scale // 4, scale - 1] * 384).astype(kind)
    expected = torch.tensor([-1.0, -0.5, 0.0, 0.25, (scale - 1) / scale]).repeat(384)
    for waveform in (values, values.astype(values.dtype.newbyteorder("=")).copy()):
        assert torch.equal(processor.audio_item(waveform, 48_000), expected)
    native = torch.from_numpy(values.astype(values.dtype.newbyteorder("=")))
    assert torch.equal(processor.audio_item(native, 48_000), expected)


def test_arrays_of_any_kind_of_memory(processor):
    waveform = np.linspace(-1, 1, 2 * HOP)  # float64
    half = torch.from_numpy(waveform[::-2].copy()).float()
    frozen = waveform[::-2].copy()
    frozen.flags.writeable = False
    for form in (waveform[::-2], frozen, torch.from_numpy(frozen.copy()).requires_grad_()):
        found = processor.audio_item(form, 48_000)
        assert torch.equal(found, half) and not found.requires_grad
    assert (processor.audio_item(half.half(), 48_000) - half).abs().max() < 1e-3
    assert np.array_equal(waveform, np.linspace(-1, 1, 2 * HOP))  # and the user's own are left alone


def test_waveforms_of_different_length(processor):
    long, short = torch.rand(2, 3 * HOP) - 0.5, torch.rand(HOP - 7) - 0.5
    batch = processor(audio=[long, short], sampling_rate=48_000)
    assert batch["input_values"].shape == (2, 1, 3 * HOP) and batch["input_values"].dtype == torch.float32
    assert batch["padding_mask"].dtype == torch.bool
    assert batch["padding_mask"].sum(1).tolist() == [3 * HOP, HOP] and batch["padding_mask"][1, :HOP].all()
    assert torch.equal(batch["input_values"][1, 0, : HOP - 7], short)
    assert torch.equal(batch["input_values"][1, 0, HOP - 7 : HOP], short[-8:-1].flip(0))
    assert batch["input_values"][1, 0, HOP:].eq(0).all()


def test_max_seconds_cuts_waveforms_and_files(processor, clip):
    waveform, rate = read_audio(clip)
    expected = processor.audio_item(waveform, rate)[:24_000]  # resampled, then cut, then padded to whole hops
    expected = pad_to_hops(expected, HOP)
    for found in (
        processor(audio=waveform, sampling_rate=rate, max_seconds=0.5),
        processor(audio=clip, max_seconds=0.5),
    ):
        torch.testing.assert_close(found["input_values"][0, 0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000, 96_000])
def test_cutting_then_resampling_is_resampling_then_cutting(processor, tmp_path, rate):
    path = tmp_path / "a.wav"
    samples = np.random.default_rng(0).integers(-(2**13), 2**13, 4 * rate, dtype="<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    whole = processor.audio_item(path)
    for start, end in [(0, 1), (0.04, 1.2), (1.1, 2.02), (2.9999, 3.5), (3.2, None)]:
        part = processor.audio_item(path, start=start, end=end)
        expected = pad_to_hops(whole[round(start * 48_000) : None if end is None else round(end * 48_000)], HOP)
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-6)
    assert torch.equal(
        processor.audio_item(path, start=1.1, max_seconds=0.5), processor.audio_item(path, None, 0.5, 1.1)
    )


def test_files_bring_their_own_rate(processor, tmp_path):
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8_000)
        file.writeframes((sine(440, 8_000).numpy() * 32_000).astype("<i2").tobytes())
    for given in (path, str(path)):
        found = processor(audio=given, sampling_rate=44_100)["input_values"][0, 0]  # the rate is of waveforms only
        assert (found - sine(440, 48_000) * 32_000 / 32_768)[1000:-1000].abs().max() < 1.5e-3


BAD_AUDIO = [
    (torch.zeros(0), r"a waveform of shape \(0,\) has no samples; leave the item out"),
    (torch.zeros(2, 0), r"a waveform of shape \(2, 0\) has no samples"),
    (torch.zeros(1, 1, 100), r"a waveform of shape \(1, 1, 100\); pass \(samples,\) or .* a batch as a list"),
    (torch.tensor(0.5), r"a waveform of shape \(\); pass"),
    (torch.zeros(48_000, 2), r"a waveform of shape \(48000, 2\) has more channels than samples; transpose it"),
    (torch.full((100,), math.nan), "has samples that are NaN or Inf; repair it or leave it out"),
    (torch.tensor([0.0, math.inf, 0.0]), "has samples that are NaN or Inf"),
    (torch.tensor([[0.0, math.inf], [0.0, -math.inf]]), "has samples that are NaN or Inf"),
    (np.array([0.1, math.nan]), "has samples that are NaN or Inf"),
    (
        torch.tensor([0.0, 20_000.0]),
        r"samples reach 20000, but full scale is \[-1, 1\]; divide them or pass int16",
    ),
    (torch.zeros(100, dtype=torch.bool), "a waveform of torch.bool; pass floating point"),
    (torch.zeros(100, dtype=torch.uint8), "a waveform of torch.uint8; pass floating point"),
    (torch.zeros(100, dtype=torch.int64), "a waveform of torch.int64; pass floating point"),
    (torch.zeros(100, dtype=torch.complex64), "a waveform of torch.complex64; pass floating point"),
    (np.zeros(100, np.complex64), "is an array of complex64; pass a path, or a waveform as a tensor or array"),
    (np.array(["a"]), "is an array of <U1; pass a path"),
    (0.5, "is of type float; pass a path, or a waveform as a tensor or array"),
    (None, "is of type NoneType; pass a path"),
    ("missing.wav", "missing.wav: no such file"),
]


@pytest.mark.parametrize("bad, message", BAD_AUDIO)
def test_bad_audio_is_named_with_its_remedy(processor, bad, message):
    with pytest.raises(MediaError, match=r"^audio\[1\]: " + message) as caught:
        processor(audio=[torch.zeros(100), bad], sampling_rate=48_000)
    assert "\n" not in str(caught.value)


def test_a_file_of_wrong_numbers_is_named(processor, tmp_path):
    path = tmp_path / "nan.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.full((1, 100), np.nan, np.float32), format="flt", layout="mono")
        frame.sample_rate = 48_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(MediaError, match=r"audio\[0\]: .*nan.wav: has samples that are NaN or Inf"):
        processor(audio=path)


def test_a_waveform_needs_its_rate(processor):
    with pytest.raises(
        MediaError, match=r"audio\[0\]: a waveform does not say its sampling rate; pass it as sampling_rate="
    ):
        processor(audio=torch.zeros(100))
    for rate in (0, -48_000, 48, 44.1, 44_100.5, math.nan, math.inf, "48000", True, 10**9):
        with pytest.raises(MediaError, match="sampling_rate=.* is not a whole number of Hz between 1000 and 1000000"):
            processor(audio=torch.zeros(100), sampling_rate=rate)
    for rate in (48_000.0, np.int64(48_000), np.float32(48_000)):
        assert processor(audio=torch.zeros(HOP), sampling_rate=rate)["input_values"].shape == (1, 1, HOP)
    with pytest.raises(ValueError, match="max_seconds=-1 is not positive"):
        processor(audio=torch.zeros(100), sampling_rate=48_000, max_seconds=-1)


# ---------------------------------------------------------------------------------------------------------------------
# video


@pytest.mark.parametrize("height, width", [(32, 48), (20, 15), (27, 300), (300, 29), (336, 598), (28, 28), (1, 1)])
def test_frames_are_resized_as_pillow_does(processor, height, width):
    frames = make_frames(2, height, width)
    found = processor.video_item(frames)
    assert found.dtype == torch.uint8 and found.shape == (2, 3, SIZE, SIZE) and found.is_contiguous()
    expected = np.stack([Image.fromarray(frame).resize((SIZE, SIZE), Image.Resampling.BILINEAR) for frame in frames])
    # both work in fixed point and round after each of the two directions, torch with fewer bits for its weights
    difference = found.permute(0, 2, 3, 1).numpy().astype(int) - expected
    assert np.abs(difference).max() <= 1 and abs(difference.mean()) < 0.01


def test_pixels_are_scaled(processor):
    frames = torch.tensor([0, 51, 102, 255], dtype=torch.uint8)[:, None, None, None].expand(4, 3, 40, 40)
    values = processor(videos=frames)["pixel_values_videos"]
    assert values.shape == (1, 4, 3, SIZE, SIZE) and values.dtype == torch.float32
    for index, expected in enumerate([-1.0, -0.6, -0.2, 1.0]):
        assert (values[0, index] - expected).abs().max() < 1e-6


def test_colours_first_or_last_is_the_same(processor):
    frames = make_frames(3)
    expected = processor.video_item(frames)
    red = np.zeros_like(frames)
    red[..., 0] = 255
    assert processor.video_item(red).float().mean((0, 2, 3)).tolist() == [255, 0, 0]
    first = np.ascontiguousarray(frames.transpose(0, 3, 1, 2))
    for form in (torch.from_numpy(frames), first, torch.from_numpy(first), frames[:, ::-1][:, ::-1]):
        assert torch.equal(processor.video_item(form), expected)


def test_clips_of_different_length(processor):
    long, short = make_frames(5), make_frames(2, 60, 60, seed=1)
    batch = processor(videos=[short, long])
    assert batch["padding_mask_videos"].tolist() == [[True, True, False, False, False], [True] * 5]
    assert batch["pixel_values_videos"].shape == (2, 5, 3, SIZE, SIZE)
    assert batch["pixel_values_videos"][0, 2:].eq(0).all()
    alone = [processor(videos=item)["pixel_values_videos"][0] for item in (short, long)]
    assert torch.equal(batch["pixel_values_videos"][0, :2], alone[0])
    assert torch.equal(batch["pixel_values_videos"][1], alone[1])


def test_frames_of_a_tensor_are_sampled_by_number_only():
    frames = torch.arange(33, dtype=torch.uint8)[:, None, None, None].expand(33, 3, SIZE, SIZE)
    levels = {
        "every frame": Processor(make_config()).video_item(frames),
        "4 frames": Processor(make_config(num_frames=4)).video_item(frames),
        "40 frames": Processor(make_config(num_frames=40)).video_item(frames),
        "by rate": Processor(make_config(frames_per_second=1.0)).video_item(frames),
    }
    found = {name: clip[:, 0, 0, 0].tolist() for name, clip in levels.items()}
    assert found["every frame"] == list(range(33))
    assert found["4 frames"] == [0, 10, 21, 32]  # int(i·32/3)
    assert found["40 frames"] == [i * 32 // 39 for i in range(40)]
    assert found["by rate"] == list(range(33))  # taken as sampled already


@pytest.mark.parametrize(
    "sampling, seconds, expected",
    [
        ({}, None, list(range(25))),
        ({"num_frames": 4}, None, [0, 8, 16, 24]),
        ({"num_frames": 4}, 0.4, [0, 3, 6, 9]),
        ({"frames_per_second": 10.0}, None, [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]),
        ({"frames_per_second": 10.0}, 0.4, [0, 2, 5, 7]),
    ],
)
def test_files_are_sampled_as_the_model_wants(clip, sampling, seconds, expected):
    found = Processor(make_config(**sampling))(videos=clip, max_seconds=seconds)["pixel_values_videos"]
    written = Processor(make_config())(videos=make_frames(25)[expected])["pixel_values_videos"]
    assert torch.equal(found, written)


BAD_VIDEOS = [
    (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), r"frames of shape \(0, 3, 8, 8\) have no pixels; leave the item out"),
    (torch.zeros(2, 3, 0, 8, dtype=torch.uint8), r"frames of shape \(2, 3, 0, 8\) have no pixels"),
    (torch.zeros(2, 3, 8, 8), "frames of torch.float32; pass uint8 from 0 to 255, the processor scales them"),
    (np.zeros((2, 8, 8, 3), np.int64), "frames of torch.int64; pass uint8"),
    (
        torch.zeros(8, 8, dtype=torch.uint8),
        r"frames of shape \(8, 8\); pass \(F, 3, H, W\) or .* a batch as a list",
    ),
    (torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8), r"frames of shape \(1, 2, 3, 8, 8\); pass"),
    (
        torch.zeros(2, 3, 8, 3, dtype=torch.uint8),
        r"frames of shape \(2, 3, 8, 3\); exactly one of the second and the last .* must be 3",
    ),
    (
        torch.zeros(2, 4, 8, 8, dtype=torch.uint8),
        r"frames of shape \(2, 4, 8, 8\); exactly one of the second and the last .* must be 3",
    ),
    (7, "is of type int; pass a path, or frames as a tensor or array"),
    ([np.zeros((8, 8, 3), np.uint8)], "is of type list; pass a path, or frames as a tensor or array"),
    ("missing.mp4", "missing.mp4: no such file"),
]


@pytest.mark.parametrize("bad, message", BAD_VIDEOS)
def test_bad_videos_are_named_with_their_remedy(processor, bad, message):
    with pytest.raises(MediaError, match=r"^videos\[1\]: " + message) as caught:
        processor(videos=[make_frames(2), bad])
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# together


def test_all_three_make_one_batch(processor, clip):
    waveform, rate = read_audio(clip)
    batch = processor(
        text=["a dog", "a dog barks"], audio=[clip, waveform], videos=[read_frames(clip), clip], sampling_rate=rate
    )
    assert set(batch) == {
        *("input_ids", "attention_mask"),
        *("input_values", "padding_mask"),
        *("pixel_values_videos", "padding_mask_videos"),
    }
    assert all(len(rows) == 2 for rows in batch.values())
    for name in ("input_values", "padding_mask", "pixel_values_videos", "padding_mask_videos"):
        assert torch.equal(batch[name][0], batch[name][1])  # a file and its content are the same
    assert torch.equal(batch["pixel_values_videos"][0], processor(videos=make_frames(25))["pixel_values_videos"][0])


def test_a_dataset_makes_the_same_batch_in_two_steps(processor, clip):
    clips = [ClipReader(processor, seconds)(Clip("a", str(clip), str(clip))) for seconds in (30, 0.5)]
    assert clips[0]["waveform"].shape == (25 * HOP,) and clips[0]["waveform"].dtype == torch.float32
    assert clips[1]["frames"].shape == (13, 3, SIZE, SIZE) and clips[1]["frames"].dtype == torch.uint8
    captions = ["a dog", "at night"]
    items = [{**item, "captions": {None: [text]}} for text, item in zip(captions, clips, strict=True)]
    collated = Collate(processor)(items)
    batch = collated["inputs"] | collated["texts"][None]
    whole = processor(text=["a dog", "at night"], audio=[clip, clip], videos=[clip, clip])
    assert set(batch) == set(whole)
    bytes_of = ((whole["pixel_values_videos"] + 1) * 127.5).round().to(torch.uint8)  # which the model scales
    for name, rows in batch.items():
        assert torch.equal(rows[0], (whole | {"pixel_values_videos": bytes_of})[name][0]), name
    assert batch["padding_mask"].sum(1).tolist() == [25 * HOP, 13 * HOP]
    assert batch["padding_mask_videos"].sum(1).tolist() == [25, 13]


# ---------------------------------------------------------------------------------------------------------------------
# one clock, and clips of which something is missing


def write_tracks(path, sound_at=None, picture_at=None):
    """One second each of loud 48 kHz sound and of 25 noisy frames, from these times on; None: no such track."""
    with av.open(str(path), "w") as container:
        sound = None if sound_at is None else container.add_stream("pcm_s16le", rate=48_000, layout="mono")
        picture = None if picture_at is None else container.add_stream("ffv1", rate=25)
        if picture is not None:  # before the first packet is written
            picture.width, picture.height, picture.pix_fmt = 48, 32, "bgr0"
            picture.codec_context.time_base = Fraction(1, 1000)
        if sound is not None:
            samples = np.full((1, 48_000), 2**14, np.int16)
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = 48_000, Fraction(1, 48_000), round(sound_at * 48_000)
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
        if picture is not None:
            for index, pixels in enumerate(make_frames(25)):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = round(1000 * picture_at) + 40 * index, Fraction(1, 1000)
                container.mux(picture.encode(frame))
            container.mux(picture.encode(None))
    return path


def test_sound_and_picture_of_a_file_are_on_one_clock(processor, tmp_path):
    late_sound = write_tracks(tmp_path / "sound.mkv", sound_at=0.6, picture_at=0.0)
    late_picture = write_tracks(tmp_path / "picture.mkv", sound_at=0.0, picture_at=0.6)
    batch = processor(audio=[late_sound, late_picture], videos=[late_sound, late_picture])
    loud = torch.arange(40 * HOP) >= 15 * HOP  # 1.6 s, of which 0.6 are silent, and then as many after the sound
    assert torch.equal(batch["input_values"][:, 0], torch.stack([loud, loud.flip(0)]).float() / 2)
    frames = processor(videos=make_frames(25))["pixel_values_videos"][0]
    held = torch.arange(40).clamp(max=24)
    assert torch.equal(batch["pixel_values_videos"][0], frames[held])
    assert torch.equal(batch["pixel_values_videos"][1], frames[24 - held.flip(0)])
    # neither depends on what else of the file is used, or where else the other kind is from
    crossed = processor(audio=[late_picture, late_sound], videos=[late_sound, late_picture])
    assert torch.equal(crossed["input_values"], batch["input_values"].flip(0))
    assert torch.equal(crossed["pixel_values_videos"], batch["pixel_values_videos"])
    assert torch.equal(processor(audio=late_sound)["input_values"][0], batch["input_values"][0])


def test_a_part_of_a_file_is_that_part_of_its_clock(processor, tmp_path):
    path = write_tracks(tmp_path / "a.mkv", sound_at=0.6, picture_at=0.0)
    read = ClipReader(processor, 30)
    whole = read(Clip("a", str(path), str(path)))
    for start, end in [(0.2, 1.0), (0.6, 1.6), (1.0, 1.4), (1.2, None)]:
        part = read(Clip("a", str(path), str(path), start=start, end=end))
        first, after = round(start * 25), round((end or 1.6) * 25)
        assert torch.equal(part["waveform"], whole["waveform"][first * HOP : after * HOP])
        kept = slice(first, after) if first < 24 else slice(24, 25)  # a single frame fills any time
        assert torch.equal(part["frames"], whole["frames"][kept])


def test_sixteen_frames_of_a_late_picture_are_spread_over_the_time(tmp_path):
    processor = Processor(make_config(num_frames=16))
    late = processor.video_item(write_tracks(tmp_path / "late.mkv", sound_at=0.0, picture_at=0.6))
    frames = processor.video_item(make_frames(25)[[max(i * 39 // 15 - 15, 0) for i in range(16)]])
    assert torch.equal(late, frames)
    together = processor.video_item(write_tracks(tmp_path / "together.mkv", sound_at=0.0, picture_at=0.0))
    assert torch.equal(together, processor.video_item(make_frames(25)[[int(i * 24 / 15) for i in range(16)]]))


def test_the_processor_tells_a_missing_track_from_damage(processor, tmp_path):
    silent = write_tracks(tmp_path / "silent.mkv", picture_at=0.0)
    with pytest.raises(MissingTrackError, match=r"^audio\[0\]: .*silent.mkv: has no audio track"):
        processor(audio=silent)
    (tmp_path / "torn.mkv").write_bytes(silent.read_bytes()[:100])
    with pytest.raises(MediaError, match=r"^audio\[0\]: .*torn.mkv: .*damaged") as caught:
        processor(audio=tmp_path / "torn.mkv")
    assert not isinstance(caught.value, MissingTrackError)


def test_what_is_missing_of_a_clip_is_told_apart_from_what_is_broken(processor, tmp_path):
    read = ClipReader(processor, 30)
    both = write_tracks(tmp_path / "both.mkv", sound_at=0.0, picture_at=0.0)
    silent, blind = write_tracks(tmp_path / "silent.mkv", None, 0.0), write_tracks(tmp_path / "blind.mkv", 0.0)
    torn = tmp_path / "torn.mkv"
    torn.write_bytes(both.read_bytes()[:100])
    captions = {None: ["a dog"]}

    def found(audio, video, **more):
        item = read(Clip("a", audio and str(audio), video and str(video), captions, **more))
        assert item["id"] == "a" and item["captions"] == captions
        told = {key: item[key] for key in ("error", "partial") if key in item}
        return sorted(item.keys() & {"waveform", "frames"}), told

    assert found(both, both) == (["frames", "waveform"], {})
    assert found(None, both) == (["frames"], {})
    no_sound = f"{silent}: has no audio track; pass the file as videos= only, or leave it out"
    no_picture = f"{blind}: has no video track; pass the file as audio= only, or leave it out"
    assert found(silent, silent) == (["frames"], {"partial": no_sound})
    assert found(blind, blind) == (["waveform"], {"partial": no_picture})
    assert found(silent, blind) == ([], {"partial": f"{no_sound}; {no_picture}"})
    kept, told = found(torn, torn)
    assert kept == [] and set(told) == {"error"} and told["error"].startswith(f"{torn}: ") and "; " in told["error"]
    kept, told = found(torn, blind)
    assert kept == [] and told["partial"] == no_picture and told["error"].startswith(f"{torn}: ")
    kept, told = found(tmp_path / "no.wav", both)
    assert kept == ["frames"] and told == {"error": f"{tmp_path}/no.wav: no such file"}
    # what the manifest left out
    assert found(both, both, lacks="the caption is empty")[1] == {"partial": "the caption is empty"}
    problem, lacks = "the audio_caption is not UTF-8", "the caption is empty; the visual_caption is empty"
    assert found(silent, both, problem=problem, lacks=lacks)[1] == {"error": problem, "partial": f"{lacks}; {no_sound}"}


def test_a_caption_without_words_is_missing(processor, clip):
    captions = {None: ["a dog", " "], "visual": ["\n"]}
    item = ClipReader(processor, 30)(Clip("a", str(clip), str(clip), captions))
    assert item["captions"] == {None: ["a dog"]} and "error" not in item
    assert item["partial"] == "the caption is empty; the visual_caption is empty"


class Odd(Exception):
    def __str__(self):
        return "over\ntwo lines"


@pytest.mark.parametrize(
    "error, reason",
    [
        (AttributeError("no codec"), "AttributeError: no codec"),
        (KeyError("pts"), "KeyError: 'pts'"),
        (MemoryError(), "MemoryError: "),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "bad"), "UnicodeDecodeError: "),
        (Odd(), "Odd: over two lines"),
        (AssertionError(), "AssertionError: "),
        (StopIteration(), "StopIteration: "),
    ],
)
def test_whatever_reading_raises_is_one_bad_item(processor, monkeypatch, error, reason):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(processor, "audio_item", fail)
    monkeypatch.setattr(processor, "video_item", lambda *args, **kwargs: torch.zeros(1, 3, SIZE, SIZE))
    item = ClipReader(processor, 30)(Clip("a", "a.mp4", "a.mp4"))
    assert item["error"].startswith(f"a.mp4: {reason.strip()}") and "\n" not in item["error"]
    assert "frames" in item and "waveform" not in item


def test_a_user_who_stops_is_obeyed(processor, monkeypatch):
    for error in (KeyboardInterrupt, SystemExit):
        monkeypatch.setattr(
            processor, "audio_item", lambda *args, _error=error, **kwargs: (_ for _ in ()).throw(_error)
        )
        with pytest.raises(error):
            ClipReader(processor, 30)(Clip("a", "a.mp4"))


def test_half_characters_make_one_bad_item(processor, clip):
    """JSON can hold the half of a surrogate pair, which no file system, tokenizer or terminal takes."""
    item = ClipReader(processor, 30)(
        Clip("a", "no\ud800.wav", str(clip), {None: ["a dog", "a \ud83d"], "audio": ["\udc00"]})
    )
    assert item["captions"] == {None: ["a dog"]} and "frames" in item
    missing = f"no\\ud800.wav: no such file; looked for {os.getcwd()}/no\\ud800.wav"
    told = ("the caption is not UTF-8", "the audio_caption is not UTF-8", missing)
    assert item["error"] == "; ".join(told) and "partial" not in item
    batch = Collate(processor)([item])
    assert batch["ids"] == ["a"] and batch["captions"] == [["a dog"]]
    silent = ClipReader(processor, 30)(Clip("a", None, "no\udce9\ud800.mp4", {None: ["a dog"]}))
    silent["error"].encode()


def test_lists_must_have_one_length(processor):
    with pytest.raises(ValueError, match="got 2 of text, 1 of audio"):
        processor(text=["a", "dog"], audio=torch.zeros(100), sampling_rate=48_000)
    with pytest.raises(ValueError, match="got 0 of videos; pass equally many of each, and at least one"):
        processor(videos=[])
    with pytest.raises(ValueError, match="nothing to process: pass at least one of text=, audio= and videos="):
        processor(sampling_rate=48_000)
