"""The Hugging Face hub: checkpoints from it, through the converter and a cache, and checkpoints to it, with a card.

The cache is the folder $PE_AV_CACHE, or ~/.cache/pe_av. What is in it is used without asking the hub, so a name without
a revision stays at what it was when it was first loaded: give "@revision", or delete its folder.
"""

import json
import os
import re
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
import yaml
from torch import Tensor

from pe_av.checkpoint import CONFIG_FILE, ON_HUB, WEIGHTS_FILE, CheckpointError, Model, open_weights, save_weights
from pe_av.config.compose import model_config_yaml

NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?")
CARD_FILE = "README.md"


def cached(name: str | Path) -> Path:
    """The native checkpoint folder of "hf:user/name" or "hf:user/name@revision", downloaded and converted if it is new.

    Raises:
        CheckpointError: it cannot be downloaded or converted.
    """
    from pe_av.conversion.write_checkpoint import convert

    source = str(name).removeprefix(ON_HUB)
    if NAME.fullmatch(source) is None:
        raise CheckpointError(f"{name}: a name on the hub is like {ON_HUB}facebook/pe-av-large, or with @revision")
    cache = Path(os.environ.get("PE_AV_CACHE") or Path.home() / ".cache" / "pe_av")
    folder = cache / source.replace("/", "--")
    if not folder.is_dir():
        downloaded = download(source)
        try:
            convert(downloaded, folder)
        except CheckpointError:
            if not folder.is_dir():  # or another process was faster
                raise
    return folder


def download(source: str) -> Path:
    """The files of "user/name" or "user/name@revision", in the format in which they are on the hub.

    Raises:
        CheckpointError: huggingface_hub is not installed, no such repository or revision, no access, no network.
    """
    match = NAME.fullmatch(source)
    if match is None:
        raise CheckpointError(f"{source}: no such folder")
    name, revision = match.groups()
    with _plain_errors(f"{source} could not be downloaded", f", or hf download {name} elsewhere and give the folder"):
        from huggingface_hub import snapshot_download

        files = ["*.json", "*.safetensors", CONFIG_FILE]  # published formats have the first two, ours all three
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))


def publish(model: Model, folder: Path, name: str) -> None:
    """Save a model as a native checkpoint with a card, and upload it to the repository "user/name", made if it is new.

    Raises:
        CheckpointError: huggingface_hub is not installed, no access, no network.
    """
    run = run_of(folder, model)
    if run is None:  # else the folder already has what would be written
        save_weights(model.config, model.state_dict(), folder)
    (folder / CARD_FILE).write_text(card(folder, model, name, run), encoding="utf-8")
    with _plain_errors(f"{folder} is saved, but could not be uploaded to {name}"):
        from huggingface_hub import HfApi

        api, files = HfApi(), [CONFIG_FILE, WEIGHTS_FILE, "tokenizer.json", CARD_FILE]
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=files, commit_message="Upload with pe_av")


@contextmanager
def _plain_errors(what: str, otherwise: str = ""):
    """Turns what huggingface_hub raises into a line that says what happened and what to do."""
    try:
        from huggingface_hub import errors
    except ImportError:
        raise CheckpointError(f"{what}: first pip install 'pe-av[hub]'{otherwise}") from None
    try:
        yield
    except Exception as error:  # they have no common base class
        status = getattr(getattr(error, "response", None), "status_code", None)
        offline = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
        if isinstance(error, errors.GatedRepoError):
            why = "its owner grants access on its page on the hub: ask there, and log in with hf auth login"
        elif isinstance(error, errors.RepositoryNotFoundError):
            why = "the hub has no such repository, or it is private: check the name, or log in with hf auth login"
        elif isinstance(error, errors.RevisionNotFoundError):
            why = "the repository has no such revision: leave @revision out, or look it up on the hub"
        elif status in (401, 403):
            why = "the hub asks who you are: log in with hf auth login, as someone who may do this"
        elif isinstance(error, offline) or status is None and "onnect" in str(error):
            why = "the hub cannot be reached: check name and network, and that HF_HUB_OFFLINE is not set"
        else:
            why = (str(error).strip() or type(error).__name__).splitlines()[0] + ": check name and network"
        raise CheckpointError(f"{what}: {why}{otherwise}") from None


def run_of(folder: Path, model: Model) -> tuple[Path, dict[str, Any]] | None:
    """The folder of the run that wrote this checkpoint, and the metrics of these weights (empty if none are known).

    None: it is not in the folder of a run, or the model has other weights than the checkpoint.
    """
    settings = folder.parent / "config.yaml"
    if not (settings.is_file() and (folder / WEIGHTS_FILE).is_file() and (folder / CONFIG_FILE).is_file()):
        return None
    if (folder / CONFIG_FILE).read_text(encoding="utf-8") != model_config_yaml(model.config):
        return None
    weights: dict[str, Tensor] = model.state_dict()
    with open_weights(folder / WEIGHTS_FILE) as file:
        if set(file.keys()) != set(weights) or not all(
            torch.equal(file.get_tensor(key), value.cpu()) for key, value in weights.items()
        ):
            return None
    own = folder / "metrics.json"  # best/ has its own; those of checkpoint/ are the run's last
    metrics = own if own.is_file() else folder.parent / "metrics.json"
    # an interrupted run exports its model without evaluating it
    evaluated = metrics.is_file() and metrics.stat().st_mtime >= (folder / WEIGHTS_FILE).stat().st_mtime
    return folder.parent, json.loads(metrics.read_text(encoding="utf-8")) if evaluated else {}


def card(folder: Path, model: Model, name: str, run: tuple[Path, dict[str, Any]] | None) -> str:
    """The text of the model card, which says what is known of the model, and what is not.

    Args:
        run: what `run_of` gives.
    """
    kind, count = type(model).__name__, sum(model.parameter_counts().values())
    towers = getattr(model.config, "towers", ("text", "audio"))
    lines = [
        *("---", "library_name: pe-av", "tags: [audio, video, text, retrieval, embeddings]", "---", ""),
        *(f"# {name.split('/')[-1]}", ""),
        f"A `{kind}` ({count:,} parameters; {', '.join(towers)}) of PE-AV",
        "([arXiv 2512.19687](https://arxiv.org/abs/2512.19687)), in the format of the pure PyTorch package `pe-av`.",
        *("", "```python", "from pe_av import Processor, load_model", ""),
        f'model, processor = load_model("{ON_HUB}{name}"), Processor.from_pretrained("{ON_HUB}{name}")',
        *("```", ""),
    ]
    if "text" in towers and not (folder / "tokenizer.json").is_file():
        lines += ["There is no tokenizer here: pass `Processor` the one that the model was trained with.", ""]
    if run is None:
        lines += ["## Training", "", "Nothing was recorded of how these weights were trained and what they reach.", ""]
        return "\n".join(lines)
    source, metrics = run
    settings = yaml.safe_load((source / "config.yaml").read_text(encoding="utf-8"))
    lines += ["## Results", "", *_results(metrics), ""]
    lines += ["## Data", "", "```yaml", *_yaml(settings.get("data") or _data_of_spans(settings)), "```", ""]
    rest = {key: value for key, value in settings.items() if key not in ("data", "model")}
    lines += ["## Settings of the run", "", "```yaml", *_yaml(rest), "```", ""]
    return "\n".join(lines)


def _results(metrics: dict[str, Any]) -> list[str]:
    if not metrics:
        return ["These weights were not evaluated by the run that trained them."]
    directions = {key: value for key, value in metrics.items() if isinstance(value, dict) and "R@1" in value}
    numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float) and key != "step"}
    lines = [f"On the run's evaluation data, after {metrics.get('step', 'an unknown number of')} steps:", ""]
    if directions:
        lines += ["| direction | R@1 | R@5 | R@10 | MedR | queries | gallery |", "|---" * 7 + "|"]
    for direction, found in directions.items():
        figures = [*(f"{found[key]:.1f}" for key in ("R@1", "R@5", "R@10")), f"{found['MedR']:g}"]
        lines.append(f"| {' | '.join([direction, *figures, str(found['queries']), str(found['gallery'])])} |")
    lines += ["", *(f"- {key}: {value:.6g}" for key, value in numbers.items())]
    return lines


def _data_of_spans(settings: dict[str, Any]) -> dict[str, Any]:
    """What a run of PEAudioFrame says about its data, which is not under one key."""
    return {key: settings[key] for key in ("train", "eval", "demo", "max_seconds") if key in settings}


def _yaml(settings: dict[str, Any]) -> list[str]:
    """Settings that are set, without the folders of this machine."""

    def public(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: public(inner) for key, inner in value.items() if inner not in (None, {}, [])}
        return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value

    return yaml.safe_dump(public(settings), sort_keys=False, default_flow_style=None, width=100).splitlines()
