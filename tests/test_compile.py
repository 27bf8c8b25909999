"""Graph compilation of the whole model and export of its parts, for any lengths. The eager backend compiles: what is
tested is that the model can be traced at once and that other lengths need no other graph."""

import inspect
from collections.abc import Iterator

import pytest
import torch
from conftest import in_double, random_batch, randomize, relative_error, small_config
from torch import Tensor
from torch.export import Dim, export

from pe_av import PEAudioVideo

METHODS = sorted(name for name in vars(PEAudioVideo) if name.startswith("get_") and name.endswith("_embeds"))


@pytest.fixture(scope="module")
def model() -> PEAudioVideo:
    """One layer of each kind, as tracing takes most of the time."""
    config = small_config()
    config.text.num_hidden_layers = config.text.nth_text_layer = 2
    for part in (config.audio.transformer, config.video.vision, config.fusion):
        part.num_hidden_layers = 1
    return randomize(PEAudioVideo(config)).double().eval()


def lengths_of_batches() -> Iterator[tuple[tuple[int, int, int], ...]]:
    yield ((24, 12, 5), (9, 5, 8), (15, 7, 3))
    yield ((11, 9, 4), (30, 14, 9), (7, 6, 2), (20, 3, 6))
    yield ((40, 4, 3), (3, 20, 12))
    yield ((5, 31, 7), (33, 2, 2), (17, 8, 20))


@pytest.mark.parametrize("method", ["forward", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS)])
def test_one_graph_for_all_lengths(model: PEAudioVideo, method: str):
    """A graph break is an error, and so is a compilation after the second batch."""
    torch._dynamo.reset()
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    plain = getattr(model, method)
    fast = torch.compile(plain, backend=backend, dynamic=True, fullgraph=True)
    graphs = []
    for rows in lengths_of_batches():
        batch = in_double(random_batch(model.config, rows))
        arguments = {name: value for name, value in batch.items() if name in inspect.signature(plain).parameters}
        with torch.no_grad():
            found, expected = fast(**arguments), plain(**arguments)
        if method == "forward":
            for name, value in expected.embeds().items():
                assert relative_error(getattr(found, f"{name}_embeds"), value) <= 1e-9, name
        else:
            assert relative_error(found, expected) <= 1e-9
        graphs.append(len(compiled))
    assert graphs[-1] == graphs[1] <= 2, graphs


def exported_parts(model: PEAudioVideo) -> dict[str, tuple]:
    """Name -> part, its arguments for a batch, and which of their dimensions may have any size."""
    rows = Dim("rows", min=2, max=1024)
    tokens, positions, frames = (Dim(name, min=2, max=4000) for name in ("tokens", "positions", "frames"))
    hop = model.audio.codec.hop_length

    def noise(mask: Tensor, width: int) -> Tensor:
        return torch.randn(*mask.shape, width, dtype=torch.float64)

    def heard(batch: dict[str, Tensor]) -> Tensor:
        return batch["padding_mask"][:, ::hop]

    def audio(batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return noise(heard(batch), model.audio.data_proj.in_features), heard(batch)

    def video(batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return noise(batch["padding_mask_videos"], model.video.proj.in_features), batch["padding_mask_videos"]

    def fusion(batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        masks = heard(batch), batch["padding_mask_videos"]
        sizes = model.config.audio.transformer.hidden_size, model.config.video.transformer.hidden_size
        return *(noise(mask, size) for mask, size in zip(masks, sizes, strict=True)), *masks

    in_time, in_frames = {0: rows, 1: positions}, {0: rows, 1: frames}
    return {
        "text": (model.text, lambda b: (b["input_ids"], b["attention_mask"]), [{0: rows, 1: tokens}] * 2),
        "codec": (model.audio.codec, lambda b: (b["input_values"], heard(b)), [{0: rows, 2: hop * positions}, in_time]),
        "audio": (model.audio, audio, [in_time] * 2),
        "vision": (model.video.vision, lambda b: (b["pixel_values_videos"].flatten(0, 1),), [{0: rows}]),
        "video": (model.video, video, [in_frames] * 2),
        "fusion": (model.fusion, fusion, [in_time, in_frames, in_time, in_frames]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text", "codec", "audio", "vision", "video", "fusion"])
def test_a_part_is_exported_for_all_lengths(model: PEAudioVideo, name: str):
    """Exported on one batch, it computes one of other sizes like the part itself."""
    part, arguments, shapes = exported_parts(model)[name]
    first, other = (in_double(random_batch(model.config, rows)) for rows in list(lengths_of_batches())[:2])
    exported = export(part, arguments(first), dynamic_shapes=tuple(shapes)).module()
    given = arguments(other)
    with torch.no_grad():
        outputs = [x if isinstance(x, tuple) else (x,) for x in (exported(*given), part(*given))]
    masks = {value.shape: value for value in given if value.dtype == torch.bool}
    compared = 0
    for found, expected in zip(*outputs, strict=True):
        if isinstance(expected, Tensor):
            valid = masks.get(expected.shape[:2], torch.ones(expected.shape[:2], dtype=torch.bool))
            assert relative_error(found[valid], expected[valid]) <= 1e-9
            compared += 1
    assert compared


@pytest.mark.slow
def test_hidden_states_of_compiled_models(model: PEAudioVideo):
    """In one graph, and where blocks are compiled one by one; without the request the same model keeps none."""
    torch._dynamo.reset()
    batch = in_double(random_batch(model.config))
    fast = torch.compile(model.forward, backend="eager", dynamic=True, fullgraph=True)
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)
        found = [fast(**batch, output_hidden_states=True)]
        assert fast(**batch).hidden_states is None
        blocks = model.blocks()
        for block in blocks:
            block.compile(backend="eager", dynamic=True)
        found.append(model(**batch, output_hidden_states=True))
        for block in blocks:
            block._compiled_call_impl = None
    for out in found:
        assert torch.equal(out.alignment, expected.alignment)
        for name, states in expected.hidden_states.items():
            assert len(out.hidden_states[name]) == len(states)
            for ours, theirs in zip(out.hidden_states[name], states, strict=True):
                assert relative_error(ours[:, :2], theirs[:, :2]) <= 1e-9  # positions that are valid in every row
