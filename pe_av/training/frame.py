"""Frame-level training (PE-A-Frame): which frames of a sound a caption is about. `python -m pe_av.training.frame`

With no data given it renders a small world of sounds and learns to find the one that is asked for.
"""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from ..checkpoint import build_model, load_model, save_model
from ..config import ConfigError, FrameTrainConfig
from ..config_files import run_command
from ..data.dataset import to_device
from ..data.frame_demo import prepare_frame_demo
from ..data.processor import Processor
from ..data.tokenizer import train_tokenizer
from ..device import pick_device, precision_context
from ..evaluation.localization import localization_metrics
from ..evaluation.report import write_metrics
from ..model.frame import PEAudioFrame
from .optim import AveragedWeights, build_optimizer, build_schedule, freeze
from .parallel import clip_gradients
from .setup import calibrate


def frame_loss(
    audio: Tensor, text: Tensor, scale: Tensor, bias: Tensor, targets: Tensor, mask: Tensor, captions: Tensor
) -> Tensor:
    """Sigmoid loss of every frame with every caption of the batch.

    L = −(1 / frames) Σ_{i,t,j} log σ(z_itj (s · x_it · y_j + b)), where z is +1 in the spans of caption i in its own
    recording and −1 elsewhere: outside of them, and for the captions of other recordings. A recording may hold what
    another row's equal caption asks for, so pairs of different rows with the same caption are left out.

    Args:
        audio: (B, T, D) frame embeddings; text: (B, D); scale, bias: (1,).
        targets: (B, T) bool, frames of row i that caption i is about.
        mask: (B, T) bool, valid frames, the number of which is the 1 / frames above.
        captions: (B,) integers, equal where captions are.
    """
    with torch.autocast(audio.device.type, enabled=False):
        logits = scale.float() * torch.einsum("itd,jd->itj", audio.float(), text.float()) + bias.float()
    own = torch.eye(len(text), dtype=torch.bool, device=text.device)[:, None]  # (B, 1, B)
    positive = own & targets[..., None]
    counted = mask[..., None] & (own | (captions[:, None] != captions)[:, None])
    losses = F.softplus(torch.where(positive, -logits, logits))
    return losses.masked_fill(~counted, 0).sum() / mask.sum()


class FrameDataset(Dataset):
    """{"caption", "spans", "codec_features"} of the lines of a manifest, decoded once and kept."""

    def __init__(self, manifest: Path, processor: Processor, model: PEAudioFrame, device: torch.device, title: str):
        self.items = []
        with torch.no_grad():
            for line in track(_lines(manifest), title, console=Console(stderr=True)):
                waveform = processor.audio_item(manifest.parent / line["path"])
                features = model.audio.encode(waveform[None, None].to(device))[0][0].cpu()
                self.items.append({"caption": line["caption"], "spans": line["spans"], "codec_features": features})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def collate(items: list[dict[str, Any]], processor: Processor, seconds_per_frame: float) -> dict[str, Any]:
    """Items to {"inputs": the model's, "targets" (B, T), "mask" (B, T), "captions" (B,)}."""
    captions = [item["caption"] for item in items]
    numbers = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    features = [item["codec_features"] for item in items]
    length = torch.tensor([len(feature) for feature in features])
    middle = (torch.arange(int(length.max())) + 0.5) * seconds_per_frame
    inside = [[(a <= middle) & (middle < b) for a, b in item["spans"]] for item in items]
    empty = torch.zeros(len(middle), dtype=torch.bool)
    mask = torch.arange(len(middle)) < length[:, None]
    return {
        "inputs": processor.batch_text(captions)
        | {"codec_features": pad_sequence(features, batch_first=True), "padding_mask": mask},
        "targets": torch.stack([torch.stack([empty, *each]).any(0) for each in inside]),
        "mask": mask,
        "captions": torch.tensor([numbers[caption] for caption in captions]),
    }


def train(config: FrameTrainConfig, folder: Path) -> dict[str, float]:
    """The whole run; writes `config.yaml`, `metrics.json`, `history.jsonl`, `spans.png` and `checkpoint/`.

    Returns:
        the figures on the held-out recordings (`evaluation.localization.localization_metrics`).
    """
    console, device = Console(stderr=True), pick_device(config.device)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    if config.train is None or config.eval is None:
        manifests = prepare_frame_demo(config.demo)
    else:
        manifests = Path(config.train), Path(config.eval)
    model, processor = _model(config, manifests[0], device)
    freeze(model, config.optim.freeze)
    sets = [FrameDataset(m, processor, model, device, f"reading {m.name}") for m in manifests]
    if len(sets[0]) < config.batch_size:
        raise ConfigError(f"{len(sets[0])} recordings do not fill batch_size={config.batch_size}: lower it")
    together = partial(collate, processor=processor, seconds_per_frame=model.seconds_per_frame)
    order = torch.Generator().manual_seed(config.seed)
    loader = DataLoader(sets[0], config.batch_size, shuffle=True, drop_last=True, generator=order, collate_fn=together)
    optimizer = build_optimizer(model, config.optim)
    schedule = build_schedule(optimizer, config.optim, config.steps)
    average = None if config.optim.ema is None else AveragedWeights(model, config.optim.ema)
    autocast = precision_context(config.precision, device)
    (folder / "config.yaml").write_text(
        yaml.safe_dump(asdict(config) | {"model": asdict(model.config)}, sort_keys=False), encoding="utf-8"
    )
    model.train()
    with (folder / "history.jsonl").open("w", encoding="utf-8") as history:
        for step in track(range(1, config.steps + 1), "training", console=console):
            if (step - 1) % len(loader) == 0:
                batches = iter(loader)
            batch = next(batches)
            with autocast:
                out = model(**to_device(batch["inputs"], device))
            target, mask, captions = (batch[name].to(device) for name in ("targets", "mask", "captions"))
            pair = model.logits
            loss = frame_loss(out.audio_embeds, out.text_embeds, pair.scale, pair.bias, target, mask, captions)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            clip_gradients([p for p in model.parameters() if p.requires_grad], config.optim.clip_norm)
            optimizer.step()
            schedule.step()
            if average is not None:
                average.update(model)
            if step % config.log_every == 0 or step == config.steps:
                if not loss.isfinite():
                    raise ConfigError(f"the loss is {loss.item()} at step {step}: lower optim.lr")
                history.write(json.dumps({"step": step, "loss": loss.item()}) + "\n")
                history.flush()
    if average is not None:
        average.swap(model)
    metrics = evaluate(model.eval(), DataLoader(sets[1], config.batch_size, collate_fn=together), device, folder)
    save_model(model, folder / "checkpoint")
    processor.save_pretrained(folder / "checkpoint")
    console.print("  ".join(f"{name} {value:.3g}" for name, value in metrics.items()), f"\nwritten to {folder}")
    return metrics


@torch.no_grad()
def evaluate(model: PEAudioFrame, batches: DataLoader, device: torch.device, folder: Path) -> dict[str, float]:
    """Figures on held-out recordings into `metrics.json`, and the first of them as a picture, `spans.png`."""
    scores, targets = [], []
    for batch in batches:
        probability = model(**to_device(batch["inputs"], device)).logits.sigmoid().cpu()
        for row, length in enumerate(batch["mask"].sum(1).tolist()):
            scores.append(probability[row, :length])
            targets.append(batch["targets"][row, :length])
    metrics = localization_metrics(scores, targets, threshold=0.5)
    write_metrics(folder / "metrics.json", metrics)
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axis, score, target in zip(figure.subplots(6, 1, sharex=True), scores, targets, strict=False):
        seconds = torch.arange(len(score)) * model.seconds_per_frame
        axis.fill_between(seconds, target.float(), step="post", color="tab:green", alpha=0.3, label="asked for")
        axis.step(seconds, score, where="post", color="tab:blue", label="probability")
        axis.set_ylim(0, 1)
    figure.axes[0].legend(loc="upper right")
    figure.axes[-1].set_xlabel("seconds")
    figure.savefig(folder / "spans.png")
    return metrics


def _model(config: FrameTrainConfig, manifest: Path, device: torch.device) -> tuple[PEAudioFrame, Processor]:
    if config.checkpoint is not None:
        model = load_model(config.checkpoint, device)
        if not isinstance(model, PEAudioFrame):
            raise ConfigError(f"{config.checkpoint} is no PEAudioFrame: convert or train one")
        return model, Processor.from_pretrained(config.checkpoint)
    model: PEAudioFrame = build_model(config.model, device)
    tokenizer = train_tokenizer((line["caption"] for line in _lines(manifest)), config.model.text.vocab_size)
    processor = Processor(config.model, tokenizer)
    waveforms = (processor.audio_item(manifest.parent / line["path"]) for line in _lines(manifest))
    calibrate(model.audio.codec, waveforms, config.model.audio.codec.sampling_rate, device)
    return model, processor


def _lines(manifest: Path) -> list[dict[str, Any]]:
    """{"path", "caption", "spans"} of each line of a JSONL manifest; the error names the line that is not like that."""
    if not manifest.is_file():
        raise ConfigError(f"{manifest}: no such manifest")
    lines = []
    for number, text in enumerate(manifest.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            spans = [[float(start), float(end)] for start, end in line["spans"]]
            fits = isinstance(line["path"], str) and line["caption"].strip() and all(a < b for a, b in spans)
        except (ValueError, KeyError, TypeError, AttributeError):
            fits = False
        if not fits:
            raise ConfigError(
                f'{manifest}:{number}: not {{"path": …, "caption": …, "spans": [[start_s, end_s], …]}} with start < end'
            )
        lines.append(line)
    return lines


if __name__ == "__main__":
    run_command(FrameTrainConfig, "train_frame", train)
