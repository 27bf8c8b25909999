"""Real tasks of MTEB on made-up data, against the model's own methods. Needs the extra `mteb`."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import randomize, small_config
from test_classification import make_tokenizer

from pe_av.checkpoint import build_model, load_model, save_model
from pe_av.config import HEADS, PAIRINGS, ConfigError
from pe_av.media.processor import Processor

mteb = pytest.importorskip("mteb")
datasets = pytest.importorskip("datasets")

from pe_av.evaluation.mteb_encoder import MTEBEncoder, heads_for  # noqa: E402

CAPTIONS = ["a dog", "rain and snow", "", "music at night", "a bell", "a street"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mteb")
    model = randomize(build_model(small_config()))
    save_model(model, folder)
    Processor(model.config, make_tokenizer()).save_pretrained(folder)
    return folder


class Decoder:
    """What the decoder of a film in an MTEB data set offers, which is that of torchcodec."""

    def __init__(self, frames: list):
        self.frames = torch.tensor(frames, dtype=torch.uint8)
        self.metadata = SimpleNamespace(num_frames=len(frames))

    def get_frames_at(self, indices: list[int]) -> SimpleNamespace:
        return SimpleNamespace(data=self.frames[indices])


def _as_mteb_has_it(batch: dict[str, list]) -> dict[str, list]:
    return batch | {"video": [Decoder(film) for film in batch["video"]]} if "video" in batch else batch


def items() -> dict[str, list]:
    random = np.random.default_rng(0)
    sounds = [random.uniform(-0.3, 0.3, 12_000 + 3_000 * n).astype(np.float32) for n in range(len(CAPTIONS))]
    films = [random.integers(0, 256, (2 + n, 3, 32, 32), dtype=np.uint8) for n in range(len(CAPTIONS))]
    return {"text": CAPTIONS, "audio": [{"array": sound, "sampling_rate": 24_000} for sound in sounds], "video": films}


@pytest.mark.parametrize(
    "name, queries, corpus",
    [
        ("ClothoT2ARetrieval", ["text"], ["audio"]),
        ("AudioCapsAVVA2TRetrieval", ["video", "audio"], ["text"]),
        ("AudioCapsAVAT2VRetrieval", ["audio", "text"], ["video"]),
    ],
)
@torch.inference_mode()
def test_a_task_gives_what_the_methods_of_the_model_give(
    checkpoint: Path, name: str, queries: list[str], corpus: list[str], monkeypatch: pytest.MonkeyPatch
):
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given, count = items(), len(CAPTIONS)
    task = mteb.get_tasks(tasks=[name])[0]
    sides = {
        side: datasets.Dataset.from_list([{"id": str(row)} | {n: given[n][row] for n in names} for row in range(count)])
        for side, names in (("queries", queries), ("corpus", corpus))
    }
    sides = {side: data.with_transform(_as_mteb_has_it) for side, data in sides.items()}
    relevant = {str(row): {str(row): 1} for row in range(count)}
    split = RetrievalSplitData(**sides, relevant_docs=relevant, top_ranked=None)
    task.dataset, task.data_loaded = {"default": {task.metadata.eval_splits[0]: split}}, True
    results = mteb.evaluate(MTEBEncoder(checkpoint, device="cpu"), task, cache=None)
    (scores,) = next(iter(results.task_results[0].scores.values()))

    model, processor = load_model(checkpoint), Processor.from_pretrained(checkpoint)

    def embed(names: list[str], compared: list[str], row: int) -> torch.Tensor:
        batch = {}
        if "text" in names:
            batch |= processor(text=CAPTIONS[row] or ".")
        if "audio" in names:
            batch |= processor(audio=given["audio"][row]["array"], sampling_rate=24_000)
        if "video" in names:
            batch |= processor(videos=given["video"][row])
        method = {
            ("text",): f"text_{'_'.join(sorted(compared))}",
            ("audio", "video"): "audio_video",
            ("audio", "text"): "audio_plus_text",
        }.get(tuple(sorted(names)), names[0])
        return getattr(model, f"get_{method}_embeds")(**batch)[0]

    left = torch.stack([embed(queries, corpus, row) for row in range(count)])
    right = torch.stack([embed(corpus, queries, row) for row in range(count)])
    ranks = ((left @ right.T) > (left * right).sum(1)[:, None] + 1e-4).sum(1)
    assert scores["recall_at_1"] == pytest.approx((ranks == 0).float().mean().item(), abs=1e-5)
    assert scores["ndcg_at_10"] == pytest.approx((1 / torch.log2(ranks + 2.0)).mean().item(), abs=1e-5)


def test_each_pairing_of_the_loss_is_found_from_the_modalities_of_its_sides():
    for left, right in PAIRINGS.values():
        compared_as = {"text_audio": {"text"}, "text_video": {"text"}, "text_audio_video": {"text"}}
        sides = [
            compared_as.get(side) or {t.replace("fusion", "") for t in HEADS[side]} - {""} for side in (left, right)
        ]
        assert heads_for(sides[0], sides[1], list(HEADS)) == [left]
        assert heads_for(sides[1], sides[0], list(HEADS)) == [right]
    assert heads_for({"audio", "text"}, {"text"}, list(HEADS)) == ["audio", "text_audio_video"]
    with pytest.raises(ConfigError, match="no embedding video for items of video"):
        heads_for({"video"}, {"text"}, ["audio", "text_audio"])
