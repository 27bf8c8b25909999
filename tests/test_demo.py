"""The demo world: what its files hold, measured in the decoded files and not with the code that rendered them."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from pe_av.config import ConfigError, DemoConfig
from pe_av.data import demo, demo_scenes

RATE = 48_000
PITCH_BAND = {"small": (920, 1540), "medium": (405, 665), "large": (170, 285)}  # Hz, three semitones of glide included
HUE = {"red": 0, "yellow": 52, "green": 128, "blue": 228, "purple": 288}  # degrees


class Clip:
    """One line of a manifest with its decoded file."""

    def __init__(self, folder: Path, entry: dict) -> None:
        self.__dict__.update(entry)
        self.file = folder / entry["path"]
        with av.open(str(self.file)) as container:
            frames = list(container.decode(video=0))
        with av.open(str(self.file)) as container:
            self.sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
        self.frames = np.stack([frame.to_ndarray(format="rgb24") for frame in frames]).astype(float)
        self.middle = np.array([frame.time for frame in frames]) + 0.05  # of the time on screen, in seconds
        bright, hueless = self.frames.max(-1), self.frames.min(-1)
        self.body = (bright - hueless > 70) | (hueless > 210)  # (F, 64, 64): the object, in colour or white

    def __repr__(self) -> str:
        return f"{self.id}: {self.caption}"

    def spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        power = np.abs(np.fft.rfft(self.sound * np.hanning(self.sound.size))) ** 2
        return np.fft.rfftfreq(self.sound.size, 1 / RATE), power

    def power(self, low: float, high: float) -> float:
        frequency, power = self.spectrum()
        return power[(frequency >= low) & (frequency < high)].sum()

    def pitch(self) -> float:
        """The strongest frequency above the factory's hum."""
        frequency, power = self.spectrum()
        return frequency[np.argmax(power * (frequency > 160))]

    def envelope(self) -> np.ndarray:
        """Loudness at every sample, without hum and hiss."""
        spectrum, frequency = np.fft.rfft(self.sound), np.fft.rfftfreq(self.sound.size, 1 / RATE)
        tone = np.fft.irfft(spectrum * ((frequency > 160) & (frequency < 4_000)), self.sound.size)
        window = np.hanning(480)
        return np.sqrt(np.convolve(tone**2, window / window.sum(), mode="same"))

    def loudness_at_frames(self) -> np.ndarray:
        return self.envelope()[np.round(self.middle * RATE).astype(int)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return demo.prepare_demo(DemoConfig(str(tmp_path_factory.mktemp("demo")), train_clips=160, eval_clips=64))[0].parent


@pytest.fixture(scope="module")
def clips(folder) -> dict[str, list[Clip]]:
    return {part: [Clip(folder, entry) for entry in _manifest(folder / f"{part}.jsonl")] for part in ("train", "eval")}


@pytest.fixture(scope="module")
def every(clips) -> list[Clip]:
    return clips["train"] + clips["eval"]


def _manifest(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _combinations(scenes: list[demo_scenes.Scene]) -> list[tuple[str, ...]]:
    return [tuple(getattr(scene, name) for name in demo_scenes.ATTRIBUTES) for scene in scenes]


def _digest(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# ---------------------------------------------------------------------------------------------------------------------
# which clips there are


def test_default_split_keeps_evaluation_apart_and_every_clip_tellable():
    train, held_out = demo.split(DemoConfig(train_clips=1472))
    assert (len(train), len(held_out)) == (1472, 256)
    seen, unseen = _combinations(train), _combinations(held_out)
    assert len(set(seen + unseen)) == 1728
    assert len({combination[:-1] for combination in unseen}) == 256, "two evaluation clips sound alike"
    assert len({demo_scenes.caption(scene) for scene in train + held_out}) == 1728
    for position in range(6):
        assert {c[position] for c in unseen} == {c[position] for c in seen}
    assert set(Counter(c[-1] for c in unseen).values()) == {42, 43}, "colours of the evaluation clips are unbalanced"


def test_validation_clips_are_held_out_like_evaluation_clips_and_apart_from_them():
    train, held_out = demo.split(DemoConfig(train_clips=1216, validation=True))
    seen, unseen, evaluated = *map(_combinations, (train, held_out)), _combinations(demo.split(DemoConfig())[1])
    assert (len(set(seen)), len(set(unseen))) == (1216, 256)
    assert not set(unseen) & set(seen) and not set(evaluated) & set(seen + unseen)
    assert len({combination[:-1] for combination in unseen}) == 256, "two validation clips sound alike"
    assert set(Counter(c[-1] for c in unseen).values()) == {42, 43}, "colours of the validation clips are unbalanced"


def test_more_clips_than_combinations_are_other_renderings_of_all():
    train, held_out = demo.split(DemoConfig(train_clips=3000))
    counts = Counter(_combinations(train))
    assert set(counts) == set(_combinations(demo.split(DemoConfig(train_clips=1472))[0]))
    assert set(counts.values()) == {2, 3} and not set(counts) & set(_combinations(held_out))
    assert len({scene.phase for scene in train + held_out}) == 3256, "two scenes have the same rendering"


def test_captions_state_each_attribute_and_nothing_that_contradicts_it(every):
    said = {name: {value: {value} for value in values} for name, values in demo_scenes.ATTRIBUTES.items()}
    said["motion"] = {motion: {motion, demo_scenes.MOTIONS[motion]} for motion in demo_scenes.MOTIONS}
    for clip in every:
        words = clip.caption.replace(",", "").split()
        for name, values in said.items():
            stated = [value for value, forms in values.items() if forms & set(words)]
            assert stated == [getattr(clip, name)], clip
    assert len({word for clip in every for word in clip.caption.replace(",", "").split()}) <= 60


def test_captions_of_one_kind_leave_out_what_it_cannot_tell(every):
    attributes = demo_scenes.ATTRIBUTES
    forms = {name: set(values) for name, values in attributes.items()}
    forms["motion"] |= set(demo_scenes.MOTIONS.values())
    for kind, missing in (("audio_caption", "colour"), ("visual_caption", "place"), ("audio_visual_caption", None)):
        for clip in every:
            words = set(getattr(clip, kind).replace(",", "").split())
            assert [name for name in attributes if not forms[name] & words] == [missing] * (missing is not None), clip
    assert all(clip.audio_visual_caption == clip.caption for clip in every)


def test_same_seed_same_bytes(tmp_path):
    folders = []
    for name, seed in (("once", 3), ("again", 3), ("other", 4)):
        train, _ = demo.prepare_demo(DemoConfig(str(tmp_path / name), seed, train_clips=4, eval_clips=3))
        folders.append(_digest(train.parent))
    once, again, other = folders
    assert len(once) == 9
    assert once == again
    assert not set(once.values()) & set(other.values())


def test_same_bytes_with_any_number_of_workers(tmp_path):
    scenes = demo.split(DemoConfig())[1][:20]
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        jobs = [(tmp_path / str(workers) / f"{i}.mp4", scene) for i, scene in enumerate(scenes)]
        demo.render_all(demo._render_clip, jobs, "rendering", workers)
    assert len(_digest(tmp_path / "1")) == 20
    assert _digest(tmp_path / "1") == _digest(tmp_path / "2")


def test_a_clip_is_the_same_in_a_larger_world():
    small = demo.split(DemoConfig(train_clips=100, eval_clips=10))
    large = demo.split(DemoConfig(train_clips=3000))
    assert set(small[0] + small[1]) < set(large[0] + large[1])


@pytest.mark.parametrize(
    ("config", "maximum"),
    [
        (DemoConfig(eval_clips=289), "288"),
        (DemoConfig(eval_clips=0), "288"),
        (DemoConfig(train_clips=0), "not positive"),
        (DemoConfig(seed=-1), "negative"),
    ],
)
def test_impossible_numbers_are_refused_with_what_is_possible(config, maximum, tmp_path):
    with pytest.raises(ConfigError, match=maximum) as error:
        demo.prepare_demo(replace(config, root=str(tmp_path)))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# the folder


def test_finished_folder_is_reused(folder, monkeypatch):
    monkeypatch.setattr(demo, "_render_clip", lambda job: pytest.fail("rendered again"))
    config = DemoConfig(str(folder.parent), train_clips=160, eval_clips=64)
    assert demo.prepare_demo(config) == (folder / "train.jsonl", folder / "eval.jsonl")
    assert [path.name for path in folder.parent.iterdir()] == [f"v{demo.WORLD_VERSION}-seed0-160-64"]


def test_interrupted_rendering_leaves_nothing(tmp_path, monkeypatch):
    config = DemoConfig(str(tmp_path), train_clips=6, eval_clips=3)
    render, rendered = demo._render_clip, []

    def interrupted(job):
        if len(rendered) == 7:
            raise KeyboardInterrupt
        rendered.append(render(job))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo, "_render_clip", interrupted)
        demo.prepare_demo(config)
    assert not list(tmp_path.iterdir())
    assert len(_manifest(demo.prepare_demo(config)[0])) == 6


def test_slower_of_two_processes_keeps_what_the_faster_one_made(tmp_path, monkeypatch):
    config = DemoConfig(str(tmp_path), train_clips=2, eval_clips=1)
    render_all = demo.render_all

    def overtaken(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(demo, "render_all", render_all)
            train, _ = demo.prepare_demo(config)  # the other process starts later and is done earlier
        (train.parent / "faster").touch()
        render_all(*arguments)

    monkeypatch.setattr(demo, "render_all", overtaken)
    train, held_out = demo.prepare_demo(config)
    assert (train.parent / "faster").exists() and held_out.exists()
    assert list(tmp_path.iterdir()) == [train.parent]


def test_folder_without_a_manifest_is_refused_with_the_remedy(tmp_path):
    config = DemoConfig(str(tmp_path), train_clips=2, eval_clips=1)
    train, held_out = demo.prepare_demo(config)
    held_out.unlink()
    with pytest.raises(ConfigError, match="delete the folder"):
        demo.prepare_demo(config)
    assert train.exists()


def test_files_have_the_stated_format(every):
    for clip in every:
        with av.open(str(clip.file)) as container:
            video, audio = container.streams.video[0], container.streams.audio[0]
            assert (video.codec.name, video.pix_fmt, video.width, video.height) == ("h264", "yuv420p", 64, 64)
            assert (video.average_rate, video.start_time) == (10, 0)
            assert (audio.codec.name, audio.rate, audio.layout.name, audio.start_time) == ("aac", RATE, "mono", 0)
        assert np.allclose(clip.middle, np.arange(16) / 10 + 0.05)
        assert clip.sound.shape == (76_800,)
        assert 0.1 < np.abs(clip.sound).max() < 1, clip
    assert sum(clip.file.stat().st_size for clip in every) / len(every) < 40e6 / 1728


# ---------------------------------------------------------------------------------------------------------------------
# what is heard


def test_pitch_tells_the_size(every):
    for clip in every:
        low, high = PITCH_BAND[clip.size]
        assert low < clip.pitch() < high, clip


def test_partials_tell_the_shape(every):
    steady = [clip for clip in every if clip.motion != "slides"]
    assert {clip.shape for clip in steady} == set(demo_scenes.SHAPES)
    for clip in steady:
        pitch = clip.pitch()
        first, bell, second, third = (clip.power(0.96 * k * pitch, 1.04 * k * pitch) for k in (1, 1.41, 2, 3))
        heard = {name for name, loud in (("bell", bell > 0.1 * first), ("even", second > 0.1 * first)) if loud}
        heard |= {"odd"} if third > 0.03 * first and "bell" not in heard else set()
        expected = {"ball": set(), "box": {"odd"}, "wedge": {"even", "odd"}, "star": {"bell"}}
        assert heard == expected[clip.shape], clip


def test_noise_tells_the_place(every):
    for clip in every:
        hiss, hum = clip.power(11_000, 15_000), clip.power(60, 80)  # absolute: no clip is made louder than another
        heard = {name for name, loud in (("rain", hiss > 1e5), ("factory", hum > 1e5)) if loud} or {"quiet"}
        assert heard == {clip.place}, f"{clip}: hiss {hiss:.1e}, hum {hum:.1e}"


def test_sound_alone_tells_every_audible_attribute_and_not_the_colour(clips):
    """A linear classifier on band energies and their modulation, trained on the one part, tried on the other."""

    def features(clip: Clip) -> np.ndarray:
        windows = np.lib.stride_tricks.sliding_window_view(clip.sound, 2048)[::960] * np.hanning(2048)
        power = np.abs(np.fft.rfft(windows)) ** 2
        edges = np.unique(np.geomspace(2, 700, 49).astype(int))
        bands = np.log10(np.add.reduceat(power, edges, axis=1) + 1e-3)  # (windows, bands)
        change = np.log10(power[:, 7:200].sum(1) + 1e-2)
        modulation = np.abs(np.fft.rfft(change - change.mean(), 256))[1:64]
        in_bands = np.abs(np.fft.rfft(bands - bands.mean(0), 128, axis=0))[1:24].mean(1)
        return np.concatenate([bands.mean(0), bands.max(0), bands.std(0), modulation, in_bands])

    train, held_out = (np.stack([features(clip) for clip in clips[part]]) for part in ("train", "eval"))
    mean, deviation = train.mean(0), train.std(0)
    train, held_out = (train - mean) / deviation, (held_out - mean) / deviation
    kernel = train @ train.T + 30 * np.eye(len(train))
    for name, values in demo_scenes.ATTRIBUTES.items():
        values = list(values)
        truth = {part: np.array([values.index(getattr(clip, name)) for clip in clips[part]]) for part in clips}
        dual = np.linalg.solve(kernel, np.eye(len(values))[truth["train"]] - 1 / len(values))
        accuracy = np.mean((held_out @ train.T @ dual).argmax(1) == truth["eval"])
        print(f"{name} {accuracy:.3f}")
        assert accuracy < 0.35 if name == "colour" else accuracy > 0.9, f"{name}: {accuracy:.2f}"


# ---------------------------------------------------------------------------------------------------------------------
# what is seen, and that it happens when it is heard


def test_hue_tells_the_colour(every):
    for clip in every:
        red, green, blue = np.median(clip.frames[clip.body], axis=0)
        if max(red, green, blue) - min(red, green, blue) < 40:
            seen = "white"
        else:
            hue = np.degrees(np.arctan2(3**0.5 * (green - blue), 2 * red - green - blue)) % 360
            seen = min(HUE, key=lambda name: abs((hue - HUE[name] + 180) % 360 - 180))
        assert seen == clip.colour, clip


def test_area_tells_the_size_and_its_variation_within_a_size_is_heard(every):
    area = {clip.id: np.median(clip.body.sum((1, 2))[clip.body.any((1, 2))]) for clip in every}
    seen, heard = [], []
    for shape in demo_scenes.SHAPES:
        groups = [[clip for clip in every if (clip.shape, clip.size) == (shape, size)] for size in demo_scenes.SIZES]
        areas = [np.array([area[clip.id] for clip in group]) for group in groups]
        assert areas[0].max() < areas[1].min() and areas[1].max() < areas[2].min(), shape
        seen += list(np.log(areas[2] / areas[2].mean()))
        heard += [np.log(clip.pitch()) if clip.motion != "slides" else np.nan for clip in groups[2]]
    steady = np.isfinite(heard)  # the pitch of a sliding object says where it is, too
    correlation = np.corrcoef(np.array(seen)[steady], np.array(heard)[steady])[0, 1]
    assert correlation < -0.8, f"{correlation:.2f}"


def test_bounce_is_heard_when_the_object_meets_the_floor(every):
    bouncing = [clip for clip in every if clip.motion == "bounces"]
    rate, phase = (g.ravel() for g in np.meshgrid(np.linspace(0.8, 3.6, 141), np.linspace(0, 1, 101), indexing="ij"))
    errors = []
    for clip in bouncing:
        # seen: the parabola between contacts that fits the object's lowest row best
        rows = np.arange(64)
        lowest = np.array([np.max(rows[body.any(1)]) for body in clip.body]).astype(float)
        since = (rate[:, None] * clip.middle + phase[:, None]) % 1
        height = 4 * since * (1 - since)
        height -= height.mean(1, keepdims=True)
        rise = -(height @ lowest) / (height**2).sum(1)
        residual = ((lowest - lowest.mean() + rise[:, None] * height) ** 2).sum(1)
        best = np.argmin(np.where(rise > 0, residual, np.inf))
        contacts = (np.arange(10) - phase[best]) / rate[best]
        # heard: where the loudness jumps
        loud = clip.envelope()[::48]  # per millisecond
        jump = loud[10:] - loud[:-10]
        peaks = [i for i in range(jump.size) if jump[i] == jump[max(i - 100, 0) : i + 100].max() > 0.35 * jump.max()]
        onsets = (np.array(peaks) + 5) / 1000
        inner = [t for t in contacts if 0.04 < t < 1.55]
        heard = [t for t in onsets if 0.04 < t < 1.55]
        assert len(inner) >= 1
        for contact in inner:
            errors.append(np.abs(onsets - contact).min())
            assert errors[-1] < 0.03, f"{clip}: seen at {contact:.3f} s, heard at {onsets}"
        for onset in heard:
            assert np.abs(contacts - onset).min() < 0.03, f"{clip}: heard at {onset:.3f} s, seen at {contacts}"
    print(f"{len(bouncing)} clips, mean distance {1e3 * np.mean(errors):.1f} ms")
    assert np.mean(errors) < 0.01


def test_beeps_sound_while_the_object_is_visible(every):
    for clip in (clip for clip in every if clip.motion == "blinks"):
        visible = clip.body.any((1, 2))
        assert 3 <= visible.sum() <= 13, clip
        loud = clip.loudness_at_frames()
        assert np.corrcoef(visible, loud)[0, 1] > 0.9, clip


def test_pitch_of_a_sliding_object_follows_its_position(every):
    columns = np.arange(64)
    for clip in (clip for clip in every if clip.motion == "slides" and clip.shape in ("ball", "wedge")):
        position = [columns[body.any(0)].mean() for body in clip.body]
        low, high = PITCH_BAND[clip.size]
        pitch = []
        for middle in clip.middle:
            piece = clip.sound[round((middle - 0.03) * RATE) : round((middle + 0.03) * RATE)]
            power = np.abs(np.fft.rfft(piece * np.hanning(piece.size), 1 << 16))
            frequency = np.fft.rfftfreq(1 << 16, 1 / RATE)
            pitch.append(frequency[np.argmax(power * (frequency > low) * (frequency < high))])
        assert np.corrcoef(position, np.log(pitch))[0, 1] > 0.95, clip


def test_spinning_object_is_loudest_with_its_dot_at_the_top(every):
    def enclosed(body: np.ndarray, axis: int) -> np.ndarray:
        return (np.cumsum(body, axis) > 0) & np.flip(np.cumsum(np.flip(body, axis), axis) > 0, axis)

    rows = np.arange(64)[None, :, None]
    convex = [clip for clip in every if clip.motion == "spins" and clip.size == "large" and clip.shape != "star"]
    for clip in convex:
        dot = ~clip.body & enclosed(clip.body, 1) & enclosed(clip.body, 2)
        height = (rows * clip.body).sum((1, 2)) / clip.body.sum((1, 2)) - (rows * dot).sum((1, 2)) / dot.sum((1, 2))
        correlation = np.corrcoef(height, clip.loudness_at_frames())[0, 1]
        assert correlation > 0.9, f"{clip}: {correlation:.2f}"
