"""Zero-shot classification against scikit-learn, brute force and embeddings that are computed one by one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize, small_config
from processes import Command
from sklearn.metrics import average_precision_score, balanced_accuracy_score, confusion_matrix, top_k_accuracy_score
from test_data import write_clip
from test_media import write_wav
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pe_av import build_model, load_model, save_model
from pe_av.config import ConfigError
from pe_av.config.compose import check_overrides, from_dict
from pe_av.config.evaluation import ClassifyConfig
from pe_av.data.manifest import Clip, Manifest
from pe_av.evaluation.classification import classification_metrics, classify_checkpoint, most_confused
from pe_av.media.processor import Processor


def random_case(clips: int, classes: int, several: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    embeds, prompts = torch.randn(clips, 16), torch.randn(classes, 16)
    target = torch.randint(classes, (clips, 1))
    if several:  # 1 to 3 classes, some named twice
        target = torch.randint(classes, (clips, 3))
        target[torch.rand(clips) < 0.5, 1] = -1
        target[torch.rand(clips) < 0.5, 2] = -1
    return embeds, prompts, target


@pytest.mark.parametrize(("clips", "classes"), [(200, 7), (50, 90), (1, 3)])  # all have clips; many have none; one clip
def test_one_label_a_clip_is_scikit_learns(clips: int, classes: int):
    embeds, prompts, target = random_case(clips, classes)
    found = classification_metrics(embeds, prompts, target)
    scores, truth = (embeds.double() @ prompts.double().T).numpy(), target[:, 0].numpy()
    for k in (1, 5):
        if k < classes:
            expected = top_k_accuracy_score(truth, scores, k=k, labels=range(classes))
            assert found[f"top-{k}"] == pytest.approx(100 * expected, rel=1e-12)
    chosen = scores.argmax(1)
    assert np.array_equal(found["confusion"], confusion_matrix(truth, chosen, labels=range(classes)))
    present = np.isin(chosen, truth)  # scikit-learn warns of classes that are chosen, but never true
    if present.all():
        assert found["mean per class"] == pytest.approx(100 * balanced_accuracy_score(truth, chosen), rel=1e-12)
    recalls = [(chosen[truth == c] == c).mean() for c in np.unique(truth)]
    assert found["mean per class"] == pytest.approx(100 * np.mean(recalls), rel=1e-12)
    for c in range(classes):
        expected = 100 * average_precision_score(truth == c, scores[:, c]) if (truth == c).any() else None
        assert found["AP"][c] == (None if expected is None else pytest.approx(expected, rel=1e-12))
    assert found["classes_without_clips"] == classes - len(set(truth))
    low, high = found["ci95"]["top-1"]
    assert low <= found["top-1"] <= high


def test_several_labels_a_clip_are_scikit_learns():
    embeds, prompts, target = random_case(120, 20, several=True)
    truth = np.zeros((120, 20), dtype=bool)
    for row, labels in enumerate(target.tolist()):
        truth[row, [label for label in labels if label >= 0]] = True
    scores = (embeds.double() @ prompts.double().T).numpy()
    found = classification_metrics(embeds, prompts, target)
    assert found["mAP"] == pytest.approx(100 * average_precision_score(truth, scores, average="macro"), rel=1e-12)
    assert found["top-1"] == pytest.approx(100 * truth[np.arange(120), scores.argmax(1)].mean(), rel=1e-12)
    assert found["chance"] == pytest.approx(100 * truth.mean())
    assert "confusion" not in found and "mean per class" not in found


@pytest.mark.parametrize("seed", range(4))
def test_ties_count_against_the_model(seed: int):
    """Small whole numbers, so that many scores are equal, repeated classes and repeated clips."""
    torch.manual_seed(seed)
    embeds, prompts = torch.randint(-1, 2, (40, 4)).float(), torch.randint(-1, 2, (9, 4)).float()
    prompts[7] = prompts[2]
    embeds[20:25] = embeds[3]
    target = torch.randint(9, (40, 1))
    found = classification_metrics(embeds, prompts, target)
    scores = (embeds @ prompts.T).tolist()
    ranks = [
        1 + sum(s >= row[t] for c, s in enumerate(row) if c != t)
        for row, (t,) in zip(scores, target.tolist(), strict=True)
    ]
    assert found["top-1"] == pytest.approx(100 * sum(r == 1 for r in ranks) / 40)
    assert found["top-5"] == pytest.approx(100 * sum(r <= 5 for r in ranks) / 40)
    assert np.trace(found["confusion"]) == sum(r == 1 for r in ranks) and np.sum(found["confusion"]) == 40
    for c in range(9):  # equal scores form one step of the curve, as in scikit-learn
        truth = target[:, 0].numpy() == c
        if truth.any():
            expected = average_precision_score(truth, np.array(scores)[:, c])
            assert found["AP"][c] == pytest.approx(100 * expected, rel=1e-12)


def test_a_model_that_says_the_same_of_everything_is_always_wrong():
    found = classification_metrics(torch.ones(6, 3), torch.ones(4, 3), torch.tensor([[0], [1], [2], [3], [0], [0]]))
    assert found["top-1"] == 0 and found["mean per class"] == 0 and np.trace(found["confusion"]) == 0
    one = classification_metrics(torch.ones(3, 2), torch.zeros(1, 2), torch.zeros(3, 1, dtype=torch.int64))
    assert one["top-1"] == one["top-5"] == one["mAP"] == one["mean per class"] == one["chance"] == 100


def test_the_most_confused_pairs_leave_out_what_is_right():
    confusion = [[9, 2, 0], [5, 1, 0], [0, 0, 3]]
    assert most_confused(confusion, "abc") == [
        {"true": "b", "chosen": "a", "clips": 5},
        {"true": "a", "chosen": "b", "clips": 2},
    ]


# ---------------------------------------------------------------------------------------------------------------------
# on files

WORDS = "[PAD] [CLS] [SEP] [UNK] a bell dog music rain silence the sound of , loudly recording can be heard".split()


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Eight sounds of three classes in two folds, two films of a fourth, and a checkpoint."""
    folder = tmp_path_factory.mktemp("classes")
    model = randomize(build_model(small_config()))
    save_model(model, folder / "checkpoint")
    Processor(model.config, make_tokenizer()).save_pretrained(folder / "checkpoint")
    random = np.random.default_rng(0)
    clips = []
    for number in range(8):
        samples = random.integers(-9000, 9000, (1, 4800 + 1920 * number), dtype=np.int16)
        path = str(write_wav(folder / f"{number}.wav", samples))
        label = ("dog", "rain", "a bell")[number % 3]
        clips.append(Clip(f"clip {number}", path, None, {None: [label]}, split=f"fold{1 + number % 2}"))
    for number in range(2):
        path = str(write_clip(folder / f"film{number}.mp4", 0.4))
        clips.append(Clip(f"film {number}", path, path, {"visual": ["music"]}, split="fold1"))
    Manifest.of(clips, folder).write(folder / "clips.jsonl")
    (folder / "classes.txt").write_text("a bell\ndog\nmusic\nrain\nsilence\n")
    return folder


def settings(corpus: Path, **changes) -> ClassifyConfig:
    data = {"eval": str(corpus / "clips.jsonl"), "num_workers": 0} | changes.pop("data", {})
    values = {"checkpoint": str(corpus / "checkpoint"), "data": data, "device": "cpu", "batch_size": 3}
    return from_dict(ClassifyConfig, values | changes, source="test")


@torch.inference_mode()
def test_the_figures_are_those_of_embeddings_made_one_by_one(corpus: Path, tmp_path: Path):
    prompts = {"audio": ["{}", "the sound of {}", "{}, loudly"]}
    found = classify_checkpoint(settings(corpus, prompts=prompts), tmp_path)
    model, processor = load_model(corpus / "checkpoint"), Processor.from_pretrained(corpus / "checkpoint")
    names = ["a bell", "dog", "music", "rain", "silence"]
    logits = {}
    for template in prompts["audio"]:  # the score of a class is the mean of the logits of its sentences
        texts = [processor(text=[template.replace("{}", name)]) for name in names]
        logits[template] = [model.get_text_audio_embeds(text["input_ids"], text["attention_mask"]) for text in texts]
    paths = [*(corpus / f"{i}.wav" for i in range(8)), corpus / "film0.mp4", corpus / "film1.mp4"]
    truth = [("dog", "rain", "a bell")[i % 3] for i in range(8)] + ["music"] * 2
    chosen = []
    for path in paths:
        sound = model.get_audio_embeds(**processor(audio=[path]))
        scores = [np.mean([float(sound @ logits[t][c].T) for t in prompts["audio"]]) for c in range(len(names))]
        chosen.append(names[int(np.argmax(scores))])
    right = [a == b for a, b in zip(chosen, truth, strict=True)]
    audio = found["audio"]
    assert audio["top-1"] == pytest.approx(100 * np.mean(right)) and audio["clips"] == 10 and audio["classes"] == 5
    assert audio["classes_without_clips"] == ["silence"]
    folds = [100 * np.mean(right[0:8:2] + right[8:]), 100 * np.mean(right[1:8:2])]
    assert audio["splits"] == pytest.approx(
        dict(zip(("fold1", "fold2"), folds, strict=True))
        | {"mean": np.mean(folds), "standard deviation": np.std(folds, ddof=1)}
    )
    assert {one: found[one]["clips"] for one in found} == {"audio": 10, "video": 2, "audio_video": 2}
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["audio"]["top-1"] == audio["top-1"] and written["templates"]["audio"] == prompts["audio"]
    assert written["classes_from"] == str(corpus / "classes.txt")
    assert {p.name for p in tmp_path.glob("*.png")} == {f"confusion_{m}.png" for m in ("audio", "video", "audio_video")}


def test_what_cannot_be_classified_is_named(corpus: Path, tmp_path: Path):
    def refused(message: str, **changes) -> None:
        with pytest.raises(ConfigError, match=message):
            classify_checkpoint(settings(corpus, **changes), tmp_path / "out")

    (tmp_path / "few.txt").write_text("dog\nrain\n")
    refused(r"clips.jsonl: 2 of its labels are not in .*few.txt: 'a bell' \(of clip 2\), 'music' \(of film 0\)",
            classes=str(tmp_path / "few.txt"))  # fmt: skip
    (tmp_path / "twice.txt").write_text("dog\nrain\ndog\n")
    refused("twice.txt: lists 'dog' more than once", classes=str(tmp_path / "twice.txt"))
    refused("nowhere.txt: cannot be read as a list of classes", classes="nowhere.txt")
    sounds = {"eval": str(tmp_path / "sounds.jsonl")}
    rows = [json.loads(line) for line in (corpus / "clips.jsonl").read_text().splitlines()]
    for row in rows:
        row.update({key: str(corpus / row[key]) for key in ("path", "audio", "video") if key in row})
    (tmp_path / "sounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    refused("sounds.jsonl: none of the 8 clips, such as clip 0, has audio and video", data=sounds,
            modalities=["audio_video"])  # fmt: skip
    films = [{key: value for key, value in row.items() if "caption" not in key} for row in rows[8:]]
    (tmp_path / "films.jsonl").write_text("".join(json.dumps(row) + "\n" for row in films))
    refused("films.jsonl: none of the 2 clips .* has a label", data={"eval": str(tmp_path / "films.jsonl")})
    deaf = tmp_path / "deaf"
    model = build_model(load_model(corpus / "checkpoint").config.keep(("text", "video")))
    save_model(model, deaf)
    Processor(model.config, make_tokenizer()).save_pretrained(deaf)
    refused("deaf: its model has no audio, which modalities=audio needs; it can be evaluated by video",
            checkpoint=str(deaf), modalities=["audio"])  # fmt: skip
    refused("sounds.jsonl: none of its 8 clips, such as clip 0, has anything .* the model of .*deaf embeds",
            checkpoint=str(deaf), data=sounds)  # fmt: skip


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a sound", "'a sound' must have exactly one place for the label, written {}"),
        ("{} and {}", "it has 2 places"),
        ("{0}", "it has 0 places"),
        ("{} {", "no other braces"),
    ],
)
def test_a_template_has_one_place_for_the_label(template: str, message: str):
    with pytest.raises(ConfigError, match=message):
        from_dict(ClassifyConfig, {"checkpoint": "x", "prompts": {"video": [template]}}, source="test")


def test_the_command_takes_the_templates_of_the_corpus(corpus: Path, tmp_path: Path):
    done = Command(
        tmp_path, "pe_av.evaluation.classification", f"checkpoint={corpus}/checkpoint", "data=esc50",
        f"data.eval={corpus}/clips.jsonl", "data.num_workers=0", "modalities=[audio]", f"hydra.run.dir={tmp_path}/out",
    ).wait()  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "top-1" in done.stdout and "1 classes have no clip, such as silence" in done.stdout
    written = json.loads((tmp_path / "out/metrics.json").read_text())
    assert written["templates"] == {"audio": ["{}", "the sound of {}", "a recording of {}", "{} can be heard"]}
    with pytest.raises(ConfigError, match=r"did you mean esc50\?"):
        check_overrides(ClassifyConfig, ["prompts=esc-50"])
