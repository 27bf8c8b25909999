"""What is computed without padding, in pieces or compiled, against the padded batch at once: values and gradients."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import in_double, random_batch, randomize, relative_error, small_config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pe_av import save_model
from pe_av.model import codec, packing
from pe_av.model.codec import CodecEncoder
from pe_av.model.pe_audio_video import PEAudioVideo
from pe_av.model.transformer import attend, use_attention


@pytest.fixture(scope="module")
def model() -> PEAudioVideo:
    return randomize(PEAudioVideo(small_config())).double().eval()


def results(model: PEAudioVideo, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """All embeddings, and the gradient of every parameter that has one."""
    model.zero_grad(set_to_none=True)
    out = model(**batch, return_loss=True)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in out.embeds().items()} | gradients


def test_packed_rows_are_the_padded_ones(model: PEAudioVideo, monkeypatch: pytest.MonkeyPatch):
    """Also in the gradients. That packing takes place is seen from attention, which then gets one row."""
    batch = in_double(random_batch(model.config))
    rows = []
    monkeypatch.setattr("pe_av.model.text.attend", lambda q, *rest: (rows.append(len(q)), attend(q, *rest))[1])
    packed = results(model, batch)
    monkeypatch.setattr(packing, "MOST_VALID", 0.0)
    padded = results(model, batch)
    assert set(rows[: len(rows) // 2]) == {1} and set(rows[len(rows) // 2 :]) == {len(batch["input_ids"])}
    assert packed.keys() == padded.keys() and len(padded) > 100
    for name, value in padded.items():
        assert relative_error(packed[name], value) <= 1e-9 or value.norm() < 1e-12, name


def attention_of_rows(q, k, v, ends, ends_of_keys, longest, longest_keys, *, window_size) -> Tensor:
    """What `varlen_attn` computes on a GPU, row by row from the formula: (T, H, d) each, as many heads in all."""
    assert q.shape == k.shape == v.shape and ends.dtype == torch.int32 and ends[-1] == len(q)
    assert torch.equal(ends, ends_of_keys) and longest == longest_keys == ends.diff().max()
    out = []
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * q.shape[-1] ** -0.5
        offset = torch.arange(end - start) - torch.arange(end - start)[:, None]  # of a key from a query
        left, right = (end if size == -1 else size for size in window_size)
        weights = scores.masked_fill((offset < -left) | (offset > right), -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v[start:end]))
    return torch.cat(out)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The way of a GPU, in float64 with the formula for its kernel; the windows of all calls."""
    windows: list[tuple[int, int]] = []

    def kernel(*arguments, window_size: tuple[int, int]) -> Tensor:
        windows.append(window_size)
        return attention_of_rows(*arguments, window_size=window_size)

    monkeypatch.setattr(packing, "varlen_attn", kernel)
    monkeypatch.setattr(packing, "flash_dtype", lambda x, head_dim: torch.float64)
    return windows


def test_packed_rows_of_a_gpu_are_the_padded_ones(
    model: PEAudioVideo, as_on_a_gpu: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
):
    """In text, audio, video and fusion, with ModernBERT's windows; also where all rows are of one length."""
    for rows in (None, ((20, 7, 9),) * 3):
        batch = in_double(random_batch(model.config) if rows is None else random_batch(model.config, rows))
        as_on_a_gpu.clear()
        packed = results(model, batch)
        with monkeypatch.context() as padded_only:
            padded_only.setattr(packing, "flash_dtype", lambda x, head_dim: None)
            padded_only.setattr(packing, "MOST_VALID", 0.0)
            padded = results(model, batch)
        if rows is None:
            reach = model.text.reach
            windows = [(-1, -1) if layer.is_global else (reach, reach) for layer in model.text.layers[: model.text.nth]]
            temporal = sum(len(part.layers) for part in (model.audio.transformer, model.video.transformer))
            temporal += len(model.fusion.transformer.layers)
            assert sorted(as_on_a_gpu) == sorted(windows + [(-1, -1)] * temporal)
        for name, value in padded.items():
            assert relative_error(packed[name], value) <= 1e-9 or value.norm() < 1e-12, name


def test_what_a_gpu_leaves_padded(model: PEAudioVideo, as_on_a_gpu: list[tuple[int, int]]):
    """Attention with dropout in training, other implementations of attention, and compiled blocks."""
    mask, x, layers = torch.arange(5) < torch.tensor([[5], [2]]), torch.zeros(2, 5, 4), model.text.layers

    def flash() -> bool:
        found = packing.packing_of(mask, x, 8, layers)
        return found is not None and found.flash is not None

    assert flash()
    layers[0].dropout = 0.1
    assert flash()
    layers.train()
    assert not flash()
    layers[0].dropout = 0.0
    assert flash()
    layers.eval()
    for implementation in ("eager", "flex", "sdpa"):
        use_attention(model, implementation)
        assert flash() == (implementation == "sdpa")
    layers[1]._compiled_call_impl = lambda *_: None
    assert packing.packing_of(mask, x, 8, layers) is None
    layers[1]._compiled_call_impl = None
    assert not as_on_a_gpu


@pytest.mark.parametrize("flash", [None, torch.float64])
@pytest.mark.parametrize("reach", [None, 0, 1, 4, 100])
def test_packed_attention_is_attention_under_a_mask(
    reach: int | None, flash: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
):
    """With two key and value heads for six query heads."""
    monkeypatch.setattr(packing, "varlen_attn", attention_of_rows)
    lengths = [5, 1, 9, 3]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    q, k, v = (torch.randn(4, 6 if i == 0 else 2, 9, 8, dtype=torch.float64) for i in range(3))
    distance = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    window = mask[:, None, None] & (distance <= (9 if reach is None else reach)) | (distance == 0)
    expected, _ = attend(q, k, v, window, "eager")
    rows = packing.Packing(mask, lengths, reach, flash)
    flat = [rows.pack(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v)]
    found = rows.unpack(attend(*flat, rows, "sdpa")[0].transpose(1, 2)).transpose(1, 2)
    assert relative_error(found[mask[:, None].expand(-1, 6, -1)], expected[mask[:, None].expand(-1, 6, -1)]) <= 1e-12


@pytest.mark.parametrize("at_a_time", [1, 3, 100])
def test_frames_in_pieces_and_without_padding(model: PEAudioVideo, monkeypatch: pytest.MonkeyPatch, at_a_time: int):
    batch = in_double(random_batch(model.config))
    pixels, mask = batch["pixel_values_videos"], batch["padding_mask_videos"]
    frames = pixels.flatten(0, 1)
    expected = torch.nn.functional.normalize(model.video.vision(frames), dim=-1).unflatten(0, mask.shape)
    monkeypatch.setattr(model.video, "patches_at_a_time", at_a_time * model.video.vision.grid**2)
    counted = []
    monkeypatch.setattr(model.video.vision, "forward", _counting(model.video.vision.forward, counted))
    with torch.no_grad():
        found = model.video.encode(pixels, mask)
    assert relative_error(found[mask], expected[mask]) <= 1e-12 and not found[~mask].any()
    assert sum(counted) == mask.sum() and max(counted) <= at_a_time


def test_frames_as_bytes_are_scaled_in_pieces_too(model: PEAudioVideo):
    size = model.config.video.vision.image_size
    frames = torch.randint(0, 256, (2, 5, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        found = model.video.encode(frames)
        expected = model.video.encode((frames.double() / 255 - 0.5) / 0.5)
    assert relative_error(found, expected) <= 1e-6  # bytes are scaled in float32


@pytest.mark.parametrize("ratios", [[2, 8, 10, 12], [3, 5, 2], [7]])
@pytest.mark.parametrize("tile", [1, 4, 250])
@pytest.mark.parametrize("block", [3000, 2**20])
def test_the_codec_in_tiles_and_blocks(ratios: list[int], tile: int, block: int, monkeypatch: pytest.MonkeyPatch):
    """Against the padded batch in one piece, which the codec computes where it learns. The small blocks cut the first
    stages in pieces, as the counted calls show."""
    encoder = randomize(CodecEncoder(2, ratios, 5, tile_positions=tile)).double()
    lengths = torch.tensor([13, 1, 9, 13, 40, 0])
    mask = torch.arange(40) < lengths[:, None]
    waveform = torch.randn(6, 1, 40 * encoder.hop_length, dtype=torch.float64)
    with torch.no_grad():
        expected = encoder._encode(waveform, mask)
    calls = []
    monkeypatch.setattr(encoder.stages[0], "forward", _counting(encoder.stages[0].forward, calls))
    monkeypatch.setattr(codec, "BLOCK_VALUES", block // torch.get_num_threads())
    found = encoder(waveform, mask)
    assert relative_error(found[mask], expected[mask]) <= 1e-12
    if tile == 250 and ratios == [2, 8, 10, 12]:
        assert (len(calls) > 8) == (block == 3000)


@pytest.mark.parametrize(("tiles", "padding"), [(8, 0.15), (8, 0.5), (1, 0.3)])
def test_the_codec_on_rows_of_similar_lengths(tiles: int, padding: float, monkeypatch: pytest.MonkeyPatch):
    """As a GPU encodes them: in few calls, some with padding; a row that is longer than all tiles is cut."""
    encoder = randomize(CodecEncoder(2, [2, 8, 10, 12], 5, tile_positions=4)).double()
    lengths = torch.tensor([13, 1, 9, 13, 40, 0, 12, 11, 3])
    mask = torch.arange(40) < lengths[:, None]
    waveform = torch.randn(9, 1, 40 * encoder.hop_length, dtype=torch.float64)
    with torch.no_grad():
        expected = encoder._encode(waveform, mask)
        monkeypatch.setitem(codec.ROWS_TOGETHER, "cpu", (tiles, padding))
        found = encoder(waveform, mask)
    assert relative_error(found[mask], expected[mask]) <= 1e-12 and not found[~mask].any()


def test_rows_that_are_encoded_together():
    """Every row that is not empty once; within the bounds; and as few groups as a search over all cuts finds."""
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        lengths = torch.randint(0, 30, (int(torch.randint(1, 9, (), generator=random)),), generator=random).tolist()
        groups = codec.rows_together(lengths, 60, 0.15)
        assert sorted(sum(groups, [])) == [row for row, length in enumerate(lengths) if length]

        def allowed(group: list[int]) -> bool:
            size = max(group) * len(group)
            return len(group) == 1 or (size <= 60 and size - sum(group) <= 0.15 * size)

        assert all(allowed([lengths[row] for row in group]) for group in groups)
        ordered = sorted((length for length in lengths if length), reverse=True)
        fewest = [0] + [0] * len(ordered)
        for end in range(1, len(ordered) + 1):
            fewest[end] = min(fewest[start] + 1 for start in range(end) if allowed(ordered[start:end]))
        assert len(groups) <= fewest[-1] + 1
    assert codec.rows_together([250] * 32, 2000, 0.15) == [list(range(i, i + 8)) for i in range(0, 32, 8)]
    assert codec.rows_together([5, 7, 5, 0, 9], 12, 0.0) == [[4], [1], [0, 2]]


def test_shapes_alone_are_traced_as_before(model: PEAudioVideo):
    """On the meta device and with fake tensors nothing can be read of a mask."""
    batch = in_double(random_batch(model.config))
    meta = PEAudioVideo(small_config()).to("meta").double()
    out = meta(**{name: value.to("meta") for name, value in batch.items()})
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = model.train()(**{name: mode.from_tensor(value) for name, value in batch.items()})
    model.eval()
    expected = model(**batch)
    for name, value in expected.embeds().items():
        assert out.embeds()[name].shape == fake.embeds()[name].shape == value.shape


def _counting(forward, counted: list[int]):
    def counting(pixels: Tensor) -> Tensor:
        counted.append(len(pixels))
        return forward(pixels)

    return counting


def test_importing_the_package_and_loading_a_model_import_little_beyond_torch(tmp_path: Path):
    """Each of these takes a second or so, and none is needed to load a model and embed clips."""
    save_model(PEAudioVideo(small_config()), tmp_path)
    code = (
        "import sys, torch; before = set(sys.modules); import pe_av; "
        f"pe_av.load_model({str(tmp_path)!r}); print(*sorted(set(sys.modules) - before))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = [
        "torch._dynamo",
        "torch._inductor",
        "triton",
        "torch.distributed.fsdp",
        "torchvision",
        "hydra",
        "matplotlib",
        "pyarrow",
    ]
    assert "pe_av" in loaded and not set(heavy) & set(loaded)
