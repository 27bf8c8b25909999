"""Runs of every kind, killed at a random moment and resumed, must end with the weights of the uninterrupted run.

The cases are generated: every pair of two options' values occurs in one of them. Each takes up to a minute on two
cores, so all but one of them are slow tests. Ranks are real processes over gloo, forked from a server that has
everything imported.
"""

import json
import random
import shutil
import time
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_config
from processes import Ranks
from safetensors.torch import load_file
from test_data import write_clip
from test_processor import make_tokenizer

from pe_av.checkpoint import build_model, save_model
from pe_av.config import (
    DataConfig,
    EvalConfig,
    LoraConfig,
    OptimConfig,
    ParallelConfig,
    PEAudioFrameConfig,
    SpanTrainConfig,
    TrainConfig,
)
from pe_av.config.compose import from_dict
from pe_av.data.cache import write_cache
from pe_av.data.manifest import Clip, Manifest, read_manifest
from pe_av.device import pick_device
from pe_av.evaluation import ranking
from pe_av.evaluation.ranking import DotProducts, Reweighted, others_at_or_above
from pe_av.loading.sampler import BatchSampler
from pe_av.media.processor import Processor
from pe_av.ranks import process_group, rank
from pe_av.training.states import newest_whole, read_progress

BATCH, STEPS, SAVE_EVERY = 6, 6, 2
CLIPS = 24

OPTIONS: dict[str, tuple[str, ...]] = {
    "ranks": ("1", "2", "3"),
    "strategy": ("ddp", "fsdp"),
    "micro": ("whole", "micro"),
    "extra": ("plain", "ema", "lora", "frozen", "cache", "recompute", "accumulate", "scales", "muon"),
    "data": ("clean", "bad", "pure"),
}


@dataclass(frozen=True)
class Case:
    ranks: str
    strategy: str
    micro: str
    extra: str
    data: str


def pairwise(options: dict[str, tuple[str, ...]]) -> list[Case]:
    """Few cases in which any two values of different options meet: always the one with the most new pairs."""

    def pairs(case: tuple[str, ...]) -> set[tuple[tuple[int, str], tuple[int, str]]]:
        return set(combinations(enumerate(case), 2))

    every = list(product(*options.values()))
    missing = set().union(*map(pairs, every))
    chosen = []
    while missing:
        best = max(every, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        chosen.append(Case(*best))
    return chosen


CASES = pairwise(OPTIONS)
COMPILED = pairwise(OPTIONS | {"extra": ("compile",)})


def test_any_two_options_meet():
    for (one, ones), (other, others) in combinations(OPTIONS.items(), 2):
        met = {(getattr(case, one), getattr(case, other)) for case in CASES}
        assert met == set(product(ones, others))
    assert len(CASES) < 30


# ---------------------------------------------------------------------------------------------------------------------
# what is trained


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips, a checkpoint to start from, cached features, and the manifests."""
    folder = tmp_path_factory.mktemp("matrix")
    torch.manual_seed(0)
    config = small_config()
    config.video.num_frames = 3
    model, processor = build_model(config), Processor(config, make_tokenizer())
    save_model(model, folder / "checkpoint")
    processor.save_pretrained(folder / "checkpoint")
    (folder / "files").mkdir()
    files = [str(write_clip(folder / "files" / f"{i}.mp4", 0.2 + 0.04 * (i % 5))) for i in range(CLIPS)]
    words = ("a dog", "barks", "at night", "a", "dog", "night", "a dog barks")
    texts = [{None: [f"{words[i % 7]} {words[i // 7]} {words[i % 3]}"]} for i in range(CLIPS)]
    seconds = [0.2 + 0.04 * (i % 5) for i in range(CLIPS)]
    clean = [Clip(str(i), files[i], files[i], texts[i], seconds=seconds[i]) for i in range(CLIPS)]
    clean_manifest = Manifest.of(clean, folder)
    clean_manifest.write(folder / "clean.jsonl")
    # sound and caption, picture and caption, sound and picture, all three: sorted into batches that are pure
    kept = [(True, False, True), (False, True, True), (True, True, False), (True, True, True)]
    pure = [
        replace(
            clip, audio=a and clip.audio or None, video=v and clip.video or None, captions=clip.captions if c else {}
        )
        for clip, (a, v, c) in zip(clean, (kept[i * 4 // CLIPS] for i in range(CLIPS)), strict=True)
    ]
    Manifest.of(pure, folder).write(folder / "pure.jsonl")
    Manifest.of(pure[::2], folder).write(folder / "eval.jsonl")
    for ranks in (1, 2, 3):
        # a fifth of the clips, all at the last rank, so that its batches are bad as a whole
        sampler = BatchSampler(
            CLIPS,
            BATCH,
            shuffle=True,
            lengths=np.array(seconds),
            modalities=clean_manifest.modalities(),
            rank=ranks - 1,
            world=ranks,
        )
        wrong = {int(i) for batch in sampler.epoch(0) for i in batch} if ranks > 1 else set(range(CLIPS))
        wrong = set(sorted(wrong)[: CLIPS // 5])
        bad = [
            replace(clip, audio="gone.mp4", video="gone.mp4") if i in wrong else clip for i, clip in enumerate(clean)
        ]
        Manifest.of(bad, folder).write(folder / f"bad-{ranks}.jsonl")
    write_cache(model, processor, read_manifest(folder / "clean.jsonl"), folder / "features", num_workers=0)
    for name in ("pure", *(f"bad-{ranks}" for ranks in (1, 2, 3))):
        write_cache(model, processor, read_manifest(folder / f"{name}.jsonl"), folder / "features", num_workers=0)
    return folder


def settings(case: Case, corpus: Path) -> TrainConfig:
    name = f"bad-{case.ranks}" if case.data == "bad" else case.data
    data = DataConfig(
        train=str(corpus / f"{name}.jsonl"),
        eval=str(corpus / "eval.jsonl"),
        num_workers=0,
        cache=str(corpus / "features") if case.extra == "cache" else None,
    )
    optim = OptimConfig(
        lr=1e-3,
        muon_lr=1e-2 if case.extra == "muon" else None,
        warmup_steps=2,
        ema=0.8 if case.extra == "ema" else None,
        # all but scales and biases: a model of which nothing has a gradient
        freeze={"frozen": ["text", "video.vision"], "scales": ["text", "audio", "video", "fusion", "heads"]}.get(
            case.extra, []
        ),
    )
    return TrainConfig(
        data=data,
        optim=optim,
        lora=LoraConfig(rank=2 if case.extra == "lora" else 0),
        parallel=ParallelConfig(
            strategy=case.strategy,
            activation_checkpointing=case.extra == "recompute",
            compile=case.extra == "compile",
            timeout_minutes=1,
        ),
        checkpoint=str(corpus / "checkpoint"),
        steps=STEPS,
        batch_size=BATCH,
        eval_batch_size=4,
        log_every=1,
        eval_every=STEPS,
        save_every=SAVE_EVERY,
        micro_batch_size=1 if case.micro == "micro" else None,
        accumulate=2 if case.extra == "accumulate" else 1,
        max_bad_fraction=1.0,
        device="cpu",
    )


# ---------------------------------------------------------------------------------------------------------------------
# ranks


def _train(config: dict[str, Any], folder: Path) -> None:
    from pe_av.training import contrastive, evaluating, trainer

    contrastive.plot_similarity = evaluating.plot_losses = lambda *_: None  # pictures take longer than all the steps
    trainer.train(from_dict(TrainConfig, config, source="test"), folder, contrastive.Contrastive)


def _train_frames(config: dict[str, Any], folder: Path) -> None:
    from pe_av.training import evaluating, frame, trainer

    frame.SpanDetection._draw = evaluating.plot_losses = lambda *_: None
    trainer.train(from_dict(SpanTrainConfig, config, source="test"), folder, frame.SpanDetection)


def _evaluate(config: dict[str, Any], folder: Path) -> None:
    from pe_av.evaluation import retrieval

    retrieval.plot_similarity = retrieval.write_report = lambda *_: None
    retrieval.evaluate_checkpoint(from_dict(EvalConfig, config, source="test"), folder)


def steps_logged(folder: Path) -> int:
    history = folder / "history.jsonl"
    return len(history.read_text().splitlines()) if history.exists() else 0


def resumed_equals_uninterrupted(case: Case, corpus: Path, folder: Path, seed: int) -> None:
    chance, config, ranks = random.Random(seed), settings(case, corpus), int(case.ranks)
    Ranks(ranks, config, folder / "whole", _train).finish()

    run = Ranks(ranks, config, folder / "killed", _train)
    least = chance.randint(1, STEPS - 2)
    while steps_logged(folder / "killed") < least and all(process.is_alive() for process in run.processes):
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.2))
    run.kill()
    logged = steps_logged(folder / "killed")
    state, _ = newest_whole(folder / "killed" / "state")
    reached = 0 if state is None else read_progress(state)["step"]
    # one interval, and what was done while the next state was being written
    assert logged - reached < 2 * SAVE_EVERY, f"at step {logged}, whole is the state of {reached}"
    Ranks(ranks, replace(config, resume="auto"), folder / "killed", _train).finish()

    ours, theirs = (load_file(folder / name / "checkpoint" / "model.safetensors") for name in ("killed", "whole"))
    assert ours.keys() == theirs.keys()
    different = [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
    assert not different, f"{len(different)} tensors differ, as {different[:3]}"
    before = load_file(corpus / "checkpoint" / "model.safetensors")
    assert any(not torch.equal(tensor, before[name]) for name, tensor in theirs.items())  # it learned at all
    one, other = (json.loads((folder / name / "metrics.json").read_text()) for name in ("killed", "whole"))
    assert one == other


FAST = Case("2", "fsdp", "micro", "recompute", "clean")


@pytest.mark.parametrize(
    ("seed", "case"),
    [
        pytest.param(seed, case, marks=[] if case == FAST else pytest.mark.slow, id=str(case))
        for seed, case in enumerate(CASES)
    ],
)
def test_a_killed_run_of_any_kind_goes_on_to_the_bit(tmp_path: Path, corpus: Path, seed: int, case: Case):
    resumed_equals_uninterrupted(case, corpus, tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "case"), list(enumerate(COMPILED)), ids=lambda value: str(value)[:80])
def test_a_killed_compiled_run_goes_on_to_the_bit(tmp_path: Path, corpus: Path, seed: int, case: Case):
    resumed_equals_uninterrupted(case, corpus, tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(product(("clean", "bad", "pure"), ("whole", "micro"))))
def test_any_number_of_ranks_ends_with_the_same_weights(tmp_path: Path, corpus: Path, case: tuple[str, str]):
    """Of the same clips, whichever of them are bad, and however the model is spread over the ranks."""
    data, micro = case
    found = {}
    for ranks, strategy in (("1", "ddp"), ("2", "ddp"), ("3", "ddp"), ("2", "fsdp"), ("3", "fsdp")):
        config = settings(Case(ranks, strategy, micro, "plain", data), corpus)
        if data == "bad":
            config.data.train = str(corpus / "bad-2.jsonl")
        folder = tmp_path / f"{ranks}-{strategy}"
        Ranks(int(ranks), config, folder, _train).finish()
        found[folder.name] = (
            load_file(folder / "checkpoint" / "model.safetensors"),
            json.loads((folder / "metrics.json").read_text()),
        )
        shutil.rmtree(folder)
    weights, metrics = found.pop("1-ddp")
    for name, (theirs, their_metrics) in found.items():
        for key, tensor in weights.items():
            assert torch.allclose(theirs[key], tensor, rtol=1e-3, atol=2e-5), f"{name}: {key}"
        assert their_metrics["bad_items"] == metrics["bad_items"]


@pytest.mark.slow
def test_four_ranks_in_two_replicas_of_two_shards_end_with_the_same_weights(tmp_path: Path, corpus: Path):
    case = Case("1", "fsdp", "micro", "ema", "pure")
    config = settings(case, corpus)
    found = []
    for ranks, shard_size in ((1, None), (4, 2)):
        parallel = replace(config.parallel, shard_size=shard_size)
        Ranks(ranks, replace(config, parallel=parallel), tmp_path / str(ranks), _train).finish()
        found.append(load_file(tmp_path / str(ranks) / "checkpoint" / "model.safetensors"))
    for name, tensor in found[0].items():
        assert torch.allclose(found[1][name], tensor, rtol=1e-3, atol=2e-5), name


@pytest.mark.parametrize("name", [pytest.param("pure", marks=pytest.mark.slow), "bad-2"])
def test_evaluation_gives_the_same_to_the_bit_on_any_number_of_ranks(tmp_path: Path, corpus: Path, name: str):
    """Batches of three, so that some rank has nothing left; in one of the sets, whole batches that cannot be read."""
    data = DataConfig(eval=str(corpus / f"{name}.jsonl"), num_workers=0)
    config = EvalConfig(str(corpus / "checkpoint"), data, batch_size=3, device="cpu", max_bad_fraction=1.0)
    found = []
    for ranks in (1, 2, 3):
        Ranks(ranks, config, tmp_path / str(ranks), _evaluate).finish()
        found.append(json.loads((tmp_path / str(ranks) / "metrics.json").read_text()))
    assert found[0] == found[1] == found[2] and "text->audio" in found[0]
    assert found[0]["bad_items"] == (CLIPS // 5 if name == "bad-2" else 0)


def _rank_in_blocks(config: dict[str, Any], folder: Path) -> None:
    torch.manual_seed(0)
    ranking.QUERIES, ranking.ITEMS = 30, 40  # several blocks of the sums of the softmax
    with process_group(pick_device("cpu"), 5):
        queries, gallery, target = torch.randn(110, 8), torch.randn(130, 8), torch.randint(130, (110, 3))
        kinds = {
            "dot": DotProducts(queries, gallery),
            "cosine": DotProducts(queries, gallery, unit=True),
            "reweighted": Reweighted(queries, gallery, shared=True),
        }
        found = {
            name: others_at_or_above(scores, target, 3, shared=True, query_block=30, item_block=40).tolist()
            for name, scores in kinds.items()
        }
        found["sums"] = kinds["reweighted"].log_sums.tolist()
        (folder / f"found-{rank()}.json").write_text(json.dumps(found))


def test_ranks_are_equal_to_the_bit_on_any_number_of_ranks(tmp_path):
    for ranks in (1, 2, 3):
        Ranks(ranks, EvalConfig(), tmp_path / str(ranks), _rank_in_blocks).finish()
    texts = [path.read_text() for path in tmp_path.glob("*/found-*.json")]
    assert len(texts) == 6 and len(set(texts)) == 1


@pytest.mark.slow
def test_frame_level_training_is_the_same_on_any_number_of_ranks_and_goes_on(tmp_path: Path, corpus: Path):
    """One recording in seven is damaged; micro-batches of two; the loss is that of the whole batch."""
    lines = [
        {
            "path": f"files/{i}.mp4" if i % 7 else "gone.wav",
            "caption": f"a dog {'barks ' * (i % 3)}",
            "spans": [[0, 0.1]],
        }
        for i in range(CLIPS)
    ]
    (corpus / "frames.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    small = small_config()
    model = build_model(PEAudioFrameConfig(text=small.text, audio=small.audio, output_dim=small.output_dim))
    save_model(model, corpus / "frame_checkpoint")
    Processor(model.config, make_tokenizer()).save_pretrained(corpus / "frame_checkpoint")
    config = SpanTrainConfig(
        train=str(corpus / "frames.jsonl"),
        eval=str(corpus / "frames.jsonl"),
        checkpoint=str(corpus / "frame_checkpoint"),
        optim=OptimConfig(lr=1e-3, warmup_steps=2),
        steps=4,
        batch_size=6,
        eval_batch_size=4,
        eval_every=4,
        save_every=2,
        log_every=1,
        micro_batch_size=2,
        num_workers=0,
        max_bad_fraction=1.0,
        device="cpu",
    )
    found = {}
    for ranks, strategy in ((1, "ddp"), (2, "ddp"), (3, "fsdp")):
        folder, parallel = tmp_path / f"{ranks}-{strategy}", ParallelConfig(strategy=strategy)
        Ranks(ranks, replace(config, steps=2, parallel=parallel), folder, _train_frames).finish()
        Ranks(ranks, replace(config, resume="auto", parallel=parallel), folder, _train_frames).finish()
        rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        found[ranks] = [[row["loss"], row["gradient_norm"], row["bias"]] for row in rows]
    for ranks in (2, 3):
        torch.testing.assert_close(torch.tensor(found[ranks]), torch.tensor(found[1]), rtol=1e-4, atol=1e-5)
