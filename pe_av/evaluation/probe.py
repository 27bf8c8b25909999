"""A linear probe and nearest neighbours on frozen embeddings: how well do simple classifiers do with them?

    python -m pe_av.evaluation.probe checkpoint=DIR data=ucf101 [key=value …]

The clips of `data.train` and `data.eval` have one label each. Where `data.train` is not set, as for ESC-50, the splits
of `data.eval` are folds: each is tested once with a probe that was trained on the others.

The linear probe is logistic regression with an L2 penalty on standardized embeddings, and nearest neighbours vote by
majority, neighbours by cosine; both are scikit-learn's. The strength of the penalty and the number of neighbours are
chosen on a held-out part of the training clips, never on the test clips, and then all training clips are used. Labels
are not compared with texts here, so no text tower is needed. The settings are explained in pe_av/config/evaluation.py.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pe_av.config import ConfigError, require
from pe_av.config.compose import run_command
from pe_av.config.evaluation import ProbeConfig
from pe_av.data.clips import open_manifest
from pe_av.data.manifest import Clip, Manifest
from pe_av.device import pick_device
from pe_av.evaluation.labelled import LabelledClips, embed_labelled, labels_of, load_for_labels, model_modalities
from pe_av.evaluation.report import write_metrics
from pe_av.evaluation.setting import evaluation_setting
from pe_av.ranks import process_group, rank

METHODS = ("linear", "neighbours")


def probe(
    train: tuple[NDArray, NDArray], test: tuple[NDArray, NDArray], config: ProbeConfig
) -> dict[str, dict[str, float | int | bool]]:
    """Train both classifiers and test them.

    Args:
        train, test: (N, D) embeddings and (N,) labels, of any type that can be sorted.
    Returns:
        "linear" and "neighbours" -> "top-1" and "mean per class" (the mean of the classes' top-1) of the test clips in
        percent; "validation", the top-1 on the held-out training clips of the chosen setting; and that setting,
        "inverse_regularization" or "k". "linear" also has "top-5", and "converged", whether the solver did.
    Raises:
        ConfigError: the training clips have fewer than two classes, or too few clips to hold some out.
    """
    # an optional library, which takes a second to import
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    embeds, labels = train
    if len(np.unique(labels)) < 2:
        raise ConfigError(f"the {len(labels)} training clips have fewer than two classes: there is nothing to learn")
    held_out = held_out_of(labels, config.validation, config.seed)
    if not held_out.any():
        raise ConfigError(
            f"validation={config.validation} of {len(labels)} training clips leaves none to choose the regularization "
            f"by, since they have {len(np.unique(labels))} classes: raise it, or give more clips"
        )
    fit, validation = (embeds[~held_out], labels[~held_out]), (embeds[held_out], labels[held_out])

    def linear(strength: float) -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=config.max_iterations))

    def neighbours(k: int) -> Any:
        return KNeighborsClassifier(n_neighbors=k, metric="cosine")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # reported as "converged"
        results: dict[str, dict[str, float | int | bool]] = {}
        # of settings that are equally good, the strongest penalty and the most neighbours
        strength, score = _best(linear, sorted(config.inverse_regularization), fit, validation)
        model = linear(strength).fit(embeds, labels)
        results["linear"] = _test(model, *test, first=5) | {
            "validation": score,
            "inverse_regularization": strength,
            "converged": bool(model[-1].n_iter_.max() < config.max_iterations),
        }
        numbers = sorted({min(k, len(fit[1])) for k in config.neighbours}, reverse=True)
        k, score = _best(neighbours, numbers, fit, validation)
        results["neighbours"] = _test(neighbours(k).fit(embeds, labels), *test) | {"validation": score, "k": k}
    return results


def held_out_of(labels: NDArray, fraction: float, seed: int) -> NDArray:
    """(N,) bool: of each class this fraction, rounded down, chosen at random, and never all of a class."""
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        held_out[rows[: min(int(fraction * len(rows)), len(rows) - 1)]] = True
    return held_out


def _best(
    make: Callable[[Any], Any],
    settings: Sequence[Any],
    fit: tuple[NDArray, NDArray],
    validation: tuple[NDArray, NDArray],
) -> tuple[Any, float]:
    """The first of the settings with the highest top-1 on the validation clips, and that, in percent."""
    scores = [100 * float(make(setting).fit(*fit).score(*validation)) for setting in settings]
    best = int(np.argmax(scores))
    return settings[best], scores[best]


def _test(model: Any, embeds: NDArray, labels: NDArray, first: int | None = None) -> dict[str, float]:
    right = model.predict(embeds) == labels
    result = {"top-1": 100 * float(right.mean())}
    if first is not None:
        scores = model.predict_proba(embeds)  # a class of the test clips that was not trained on is always wrong
        own = np.where(model.classes_ == labels[:, None], scores, -np.inf).max(1, keepdims=True)
        ranks = (scores >= own).sum(1)
        result[f"top-{first}"] = 100 * float(((ranks <= first) & np.isfinite(own[:, 0])).mean())
    result["mean per class"] = 100 * float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))
    return result


def probe_checkpoint(config: ProbeConfig, folder: Path) -> dict[str, Any]:
    """Probe the embeddings of a checkpoint; the results are written to `folder`.

    Returns:
        modality -> method -> what `probe` gives; with folds, method -> the mean of its "top-1" over the folds, their
        "standard deviation", and "folds": fold -> what `probe` gives. Only on rank 0; elsewhere nothing.
    Raises:
        ConfigError, CheckpointError: the settings, the data or the checkpoint cannot be used.
    """
    require(find_spec("sklearn") is not None, "probes need the library scikit-learn; pip install 'pe-av[eval]'")
    with process_group(pick_device(config.device), config.timeout_minutes) as device:
        model, processor = load_for_labels(config, device, prompts=False)
        sets = {"eval": open_manifest(config.data, "eval")}
        folds: list[str] = []
        if config.data.train is None and config.data.demo is None and config.data.stamps is None:
            folds = _folds(sets["eval"], str(config.data.eval))
        else:
            sets["train"] = open_manifest(config.data, "train")
        sources = {name: getattr(config.data, name) or f"the {name} clips" for name in sets}
        _check(sets, sources)
        embedded = {}
        for name, manifest in sets.items():
            lists = folder / name  # of the damaged clips of each
            lists.mkdir(parents=True, exist_ok=True)
            embedded[name] = embed_labelled(config, model, processor, manifest, sources[name], lists, device)
        if rank() > 0:
            return {}
        modalities = config.modalities or model_modalities(model, prompts=False)
        metrics = {}
        for modality in modalities:
            clips = {name: _with(one, modality) for name, one in embedded.items()}
            if any(not len(rows[1]) for rows in clips.values()):
                continue  # `embed_labelled` has checked those that were asked for
            if folds:
                metrics[modality] = _over_folds(clips["eval"], folds, config)
            else:
                metrics[modality] = probe(clips["train"][:2], clips["eval"][:2], config)
                unseen = sorted(set(clips["eval"][1]) - set(clips["train"][1]))
                metrics[modality]["data"] = {
                    "training_clips": len(clips["train"][1]),
                    "test_clips": len(clips["eval"][1]),
                    "classes": len(set(clips["train"][1])),
                    "classes_without_training_clips": unseen,
                }
        if not metrics:
            raise ConfigError(
                f"{config.data.eval or 'the evaluation clips'}: there is nothing that training and evaluation clips "
                f"both have and that the model of {config.checkpoint} embeds"
            )
        record = {
            "checkpoint": str(config.checkpoint),
            "manifests": {name: getattr(config.data, name) for name in sets},
            "splits": {name: getattr(config.data, f"{name}_split") for name in sets},
            "setting": {name: evaluation_setting(config, model.config, clips, device) for name, clips in sets.items()},
            "seed": config.seed,
            "left_out": {name: one.record for name, one in embedded.items()},
        }
        write_metrics(folder / "metrics.json", metrics, **record)
        print_probe(metrics)
        Console(stderr=True).print(f"written to {folder}", soft_wrap=True)
        return metrics


def _over_folds(clips: tuple[NDArray, NDArray, NDArray], names: Sequence[str], config: ProbeConfig) -> dict[str, Any]:
    embeds, labels, splits = clips
    results = {}
    for name in names:
        test = splits == name
        if not test.any():
            continue
        others = ~test & np.isin(splits, names)
        results[name] = probe((embeds[others], labels[others]), (embeds[test], labels[test]), config)
    summary: dict[str, Any] = {}
    for method in METHODS:
        values = [result[method]["top-1"] for result in results.values()]
        summary[method] = {
            "top-1": float(np.mean(values)),
            "standard deviation": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
            "folds": {name: result[method] for name, result in results.items()},
        }
    return summary | {"data": {"clips": len(labels), "classes": len(set(labels))}}


def _with(clips: LabelledClips, modality: str) -> tuple[NDArray, NDArray, NDArray]:
    """The embeddings, labels and splits of the clips that have the modality."""
    if modality not in clips.embeds:
        return np.empty((0, 0)), np.empty(0, dtype=str), np.empty(0, dtype=str)
    rows = clips.valid[modality].nonzero().flatten()
    labels, splits = ([values[row] for row in rows.tolist()] for values in (clips.labels, clips.splits))
    embeds = clips.embeds[modality][rows].numpy()
    return embeds, np.array([label for (label,) in labels]), np.array([split or "" for split in splits])


def _folds(clips: Manifest, source: str) -> list[str]:
    """The splits of the clips, of which there must be several."""
    names = sorted({clip.split for clip in clips} - {None})
    if len(names) < 2:
        raise ConfigError(
            f"data.train is not set, and the clips of {source} are of {len(names)} splits, too few to be folds: set "
            "data.train, or leave data.eval_split unset and give each clip a split"
        )
    split_of: dict[tuple, str | None] = {}
    for clip in clips:
        if (other := split_of.setdefault(_media(clip), clip.split)) != clip.split:
            raise ConfigError(
                f"{source}: the clip {clip.id} is in the splits {other} and {clip.split}, so these are no folds: set "
                "data.train with data.train_split and data.eval_split"
            )
    return names


def _check(sets: Mapping[str, Manifest], sources: Mapping[str, str]) -> None:
    """Raise ConfigError where a clip has several labels, or is in the training and in the test set."""
    for name, clips in sets.items():
        several = [clip.id for clip in clips if len(labels_of(clip)) > 1]
        if several:
            raise ConfigError(
                f"{sources[name]}: {len(several)} clips, such as {several[0]}, have several labels: a probe takes one; "
                "zero-shot classification takes several"
            )
    if "train" in sets:
        # by file and segment, because recipes give a file a name of its own in every split
        trained = {_media(clip) for clip in sets["train"]}
        shared = [clip.id for clip in sets["eval"] if _media(clip) in trained]
        if shared:
            raise ConfigError(
                f"{sources['eval']}: {len(shared)} clips, such as {shared[0]}, are in the training and the test set: "
                "set data.train_split and data.eval_split, or give other manifests"
            )


def _media(clip: Clip) -> tuple[str | None, str | None, float, float | None]:
    return clip.audio, clip.video, clip.start, clip.end


def print_probe(metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table of the figures in percent to standard output."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("by", "method"):
        table.add_column(column, no_wrap=True)
    columns = ("top-1", "top-5", "mean per class", "standard deviation", "validation", "inverse_regularization", "k")
    columns = tuple(name for name in columns if any(name in row[m] for row in metrics.values() for m in METHODS))
    for column in columns:
        table.add_column(column.replace("inverse_regularization", "C"), justify="right")
    for modality, row in metrics.items():
        for method in METHODS:
            cells = [row[method].get(name, "–") for name in columns]
            table.add_row(
                modality, method, *(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
            )
    Console().print(table)


if __name__ == "__main__":
    run_command(ProbeConfig, "probe", probe_checkpoint)
