"""One whole training step, with and without compilation and activation checkpointing: `python benchmarks/train_step.py`

For each form the largest batch that fits is searched by doubling; then steps are timed. Random clips of 16 frames and
10 s, in bf16 where the device has it. The peer is the shortest loop around transformers' model that learns: the same
weights and precision, its logits with the loss that gives every pair a gradient, AdamW. `few_gb` is the peak of memory
of a step with `--few` clips. Prints a table and writes benchmarks/results/train_step_<device>.json.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))  # this checkout, installed or not

from benchmarks.peer import pair
from pe_av import build_model
from pe_av.config import LossConfig, OptimConfig, ParallelConfig
from pe_av.config.compose import load_preset
from pe_av.device import pick_device, precision_context
from pe_av.evaluation.embedder import Embedder
from pe_av.loss import contrastive_loss
from pe_av.training.gradient_caching import backward
from pe_av.training.log import PEAK_FLOPS
from pe_av.training.optim import build_optimizer, take_step
from pe_av.training.parallel import clip_gradients, parallelize


def step_of(preset: str, form: ParallelConfig, device: torch.device):
    """A function that takes a training step with so many random clips."""
    config = load_preset(preset)
    model = build_model(config, device).train()
    embedder = parallelize(model, Embedder(model), form, device)
    optimizer = build_optimizer(model, OptimConfig())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    logits = {name: (pair.scale, pair.bias) for name, pair in model.logits.items()}
    size, hop, rate = config.video.vision.image_size, config.audio.codec.hop_length, config.audio.codec.sampling_rate

    def loss_of(embeds: dict[str, torch.Tensor]) -> tuple[torch.Tensor, None]:
        return contrastive_loss(embeds, logits, LossConfig().pairings).total, None

    def step(clips: int) -> None:
        inputs = {
            "input_values": 0.1 * torch.randn(clips, 1, 10 * rate // hop * hop, device=device),
            "pixel_values_videos": torch.randn(clips, 16, 3, size, size, device=device),
        }
        texts = {None: {"input_ids": torch.randint(config.text.vocab_size, (clips, 32), device=device)}}
        part = {"inputs": inputs, "texts": texts, "rows": None, "size": clips}
        optimizer.zero_grad(set_to_none=True)
        with precision_context("auto", device):
            backward(embedder, [part], loss_of, device)
        clip_gradients(trained, 1.0)
        take_step(optimizer, torch.zeros((), device=device))
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def peer_step_of(preset: str, device: torch.device):
    """The same with transformers' model, whose codec is frozen too."""
    with pair(preset, torch.device("cpu"), torch.float32, torch.float32) as models:
        model, config = models.theirs.to(device).train(), models.ours.config
    model.audio_video_encoder.embedder.audio_encoder.embedder.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    size, hop, rate = config.video.vision.image_size, config.audio.codec.hop_length, config.audio.codec.sampling_rate

    def step(clips: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision_context("auto", device):
            out = model(
                input_ids=torch.randint(config.text.vocab_size, (clips, 32), device=device),
                input_values=0.1 * torch.randn(clips, 1, 10 * rate // hop * hop, device=device),
                pixel_values_videos=torch.randn(clips, 16, 3, size, size, device=device),
            )
        labels = 2 * torch.eye(clips, device=device) - 1
        logits = [value for name, value in out.items() if name.startswith("logits_")]
        assert len(logits) == 6
        sum(-F.logsigmoid(labels * value.float()).sum() / clips for value in logits).backward()
        torch.nn.utils.clip_grad_norm_([parameter for parameter in trained if parameter.grad is not None], 1.0)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def measure(step: Callable[[int], None], device: torch.device, options: argparse.Namespace) -> dict[str, float]:
    """The largest power of two of clips that fits, and what a step with it takes."""
    clips, most, repeats = 1, options.most, options.repeats
    few_gb = None
    if device.type == "cuda":
        step(options.few)
        torch.cuda.reset_peak_memory_stats()
        step(options.few)
        few_gb = torch.cuda.max_memory_allocated() / 1e9
    while 2 * clips <= most:
        try:
            step(2 * clips)
        except torch.OutOfMemoryError:
            gc.collect()
            torch.cuda.empty_cache()
            break
        clips *= 2
    step(clips)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(repeats):
        step(clips)
    seconds = (time.perf_counter() - started) / repeats
    row = {"clips": clips, "seconds": seconds, "clips_per_second": clips / seconds}
    if device.type == "cuda":
        row["few_gb"], row["memory_gb"] = few_gb, torch.cuda.max_memory_allocated() / 1e9
        name = torch.cuda.get_device_name()
        peak = next((flops for chip, flops in PEAK_FLOPS.items() if chip in name), None)
        if peak is not None:  # recomputation included; one clip, since eager blocks may need more memory
            with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
                step(1)
            row["flop_utilization"] = clips * counter.get_total_flops() / seconds / peak
    return row


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="large")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--most", type=int, default=1024, help="clips that are tried at most")
    parser.add_argument("--few", type=int, default=8, help="clips of the step whose memory is compared")
    parser.add_argument("--repeats", type=int, default=5)
    forms = ["kept, eager", "kept, compiled", "recomputed, eager", "recomputed, compiled", "peer"]
    parser.add_argument("--forms", nargs="+", default=forms, choices=forms)
    options = parser.parse_args()
    device = pick_device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    rows = {}
    for recompute in (False, True):
        for compiled in (False, True):
            form = ParallelConfig(activation_checkpointing=recompute, compile=compiled)
            key = f"{'recomputed' if recompute else 'kept'}, {'compiled' if compiled else 'eager'}"
            if key in options.forms:
                rows[key] = measure(step_of(options.preset, form, device), device, options)
                _free(device)
    if "peer" in options.forms:
        rows["peer"] = measure(peer_step_of(options.preset, device), device, options)
        for row in rows.values():
            row["speed_ratio"] = row["clips_per_second"] / rows["peer"]["clips_per_second"]
            if device.type == "cuda":
                row["memory_ratio"] = row["few_gb"] / rows["peer"]["few_gb"]
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = Table("activations, blocks", *columns, title=f"{options.preset} on {name}")
    for key, row in rows.items():
        table.add_row(key, *(f"{row[column]:.3g}" if column in row else "" for column in columns))
    Console().print(table)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    content = {
        "device": name,
        "date": str(date.today()),
        "torch": torch.__version__,
        "preset": options.preset,
        "rows": rows,
    }
    (results / f"train_step_{device.type}.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
