"""One whole training step, ours and a minimal loop around transformers' model: `python -m benchmarks train_step`

Random clips of 10 s, 16 frames (or as many as the preset takes) and 32 tokens; in bf16 where the device is a GPU that
has it. Every form runs in a process of its own: `eager`, `compiled`, `recomputed` (activation checkpointing),
`recomputed+compiled`, and `transformers`, the peer: its `PeAudioVideoModel`, whose logits go into the loss with ±1 in
the place of its eye(N), AdamW, the same clipping and autocast. For each form the largest batch up to `--most` clips
that fits is searched by doubling; `--clips` sets it instead, for all forms alike.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peer import PeakMemory, apart, chip, positive, save
from pe_av import build_model
from pe_av.config import PAIRINGS, LossConfig, ModelConfig, OptimConfig, ParallelConfig
from pe_av.config.compose import load_preset
from pe_av.conversion.write_config import hf_files, hf_model_config
from pe_av.device import pick_device, precision_context
from pe_av.evaluation.embedder import Embedder
from pe_av.loss import contrastive_loss, sigmoid_loss
from pe_av.training.gradient_caching import backward
from pe_av.training.log import PEAK_FLOPS
from pe_av.training.optim import build_optimizer, take_step
from pe_av.training.parallel import clip_gradients, parallelize

SECONDS, FRAMES, TOKENS = 10, 16, 32
FORMS = {
    "eager": ParallelConfig(),
    "compiled": ParallelConfig(compile=True),
    "recomputed": ParallelConfig(activation_checkpointing=True),
    "recomputed+compiled": ParallelConfig(activation_checkpointing=True, compile=True),
    "transformers": None,
}
Step = Callable[[int], None]  # takes a training step with so many random clips


def random_clips(config: ModelConfig, clips: int, device: torch.device) -> dict[str, Tensor]:
    """Arguments of both models' forward, without padding."""
    size, hop = config.video.vision.image_size, config.audio.codec.hop_length
    samples = SECONDS * config.audio.codec.sampling_rate // hop * hop
    frames = config.video.num_frames or FRAMES
    return {
        "input_values": 0.1 * torch.randn(clips, 1, samples, device=device),
        "pixel_values_videos": torch.randn(clips, frames, 3, size, size, device=device),
        "input_ids": torch.randint(config.text.vocab_size, (clips, TOKENS), device=device),
    }


def our_step(preset: str, form: ParallelConfig, device: torch.device) -> Step:
    config = load_preset(preset)
    model = build_model(config, device).train()
    embedder = parallelize(model, Embedder(model), form, device)
    optimizer = build_optimizer(model, OptimConfig())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    logits = {name: (pair.scale, pair.bias) for name, pair in model.logits.items()}

    def loss_of(embeds: dict[str, Tensor]) -> tuple[Tensor, None]:
        return contrastive_loss(embeds, logits, LossConfig().pairings).total, None

    def step(clips: int) -> None:
        inputs = random_clips(config, clips, device)
        texts = {None: {"input_ids": inputs.pop("input_ids")}}
        part = {"inputs": inputs, "texts": texts, "rows": None, "size": clips}
        optimizer.zero_grad(set_to_none=True)
        with precision_context("auto", device):
            backward(embedder, [part], loss_of, device)
        clip_gradients(trained, 1.0)
        take_step(optimizer, torch.zeros((), device=device))

    return step


def their_step(preset: str, device: torch.device) -> Step:
    """What someone would write around transformers' model, with a loss that has its negatives."""
    from transformers import PeAudioVideoConfig, PeAudioVideoModel

    config = load_preset(preset)
    files = hf_files(hf_model_config(config), None, "float32")
    with torch.device(device):
        model = PeAudioVideoModel(PeAudioVideoConfig.from_dict(json.loads(files["config.json"]))).train()
    codec = model.audio_video_encoder.embedder.audio_encoder.embedder
    for parameter in (*codec.dac_encoder.parameters(), *codec.bottleneck.parameters()):
        parameter.requires_grad_(False)  # transformers runs them without gradients
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = OptimConfig()
    optimizer = torch.optim.AdamW(
        trained, settings.lr, tuple(settings.betas), settings.eps, settings.weight_decay, fused=True
    )

    def step(clips: int) -> None:
        inputs = random_clips(config, clips, device)
        optimizer.zero_grad(set_to_none=True)
        with precision_context("auto", device):
            out = model(**inputs)
        sum(sigmoid_loss(out[f"logits_{name}"]) for name in PAIRINGS).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return step


def measure(
    preset: str, name: str, device_name: str, clips: int | None, most: int, repeats: int
) -> dict[str, float | str]:
    """A row of the table; to be called in a process of its own.

    Args:
        clips: of a step; None: the largest power of two up to `most` that fits.
    """
    device, form = pick_device(device_name), FORMS[name]
    with PeakMemory(device) as whole:  # of the model and its optimizer too
        step = their_step(preset, device) if form is None else our_step(preset, form, device)
        if clips is None:
            clips = _most_that_fit(step, most)
        step(clips)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = [_timed(step, clips, device) for _ in range(repeats)]
    middle = statistics.median(seconds)
    row = {"form": name, "clips": clips, "seconds": middle, "fastest": min(seconds), "slowest": max(seconds)}
    row |= {"clips_per_second": clips / middle, "memory_gb": whole.mib * 2**20 / 1e9}
    peak = next((flops for chip, flops in PEAK_FLOPS.items() if chip in _gpu(device)), None)
    if peak is not None:  # recomputation included; one clip, since eager blocks may need more memory
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            step(1)
        row["flop_utilization"] = clips * counter.get_total_flops() / middle / peak
    return row


def _most_that_fit(step: Step, most: int) -> int:
    clips = 1
    while 2 * clips <= most:
        try:
            step(2 * clips)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        clips *= 2
    return clips


def _timed(step: Step, clips: int, device: torch.device) -> float:
    started = time.perf_counter()
    step(clips)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="large")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), help="default on a CPU: eager and transformers")
    parser.add_argument("--clips", type=positive, help="of a step, in all forms; default: the most that fit")
    parser.add_argument("--most", type=int, default=1024, help="clips that are tried at most")
    parser.add_argument("--repeats", type=positive, default=5)
    options = parser.parse_args()
    device = pick_device(options.device)
    cpu = device.type == "cpu"
    clips = options.clips if options.clips is not None else (4 if cpu else None)
    rows = []
    for form in options.forms or (["eager", "transformers"] if cpu else list(FORMS)):
        try:
            row = apart(measure, options.preset, form, options.device, clips, options.most, options.repeats)
        except RuntimeError as error:  # such as not even one clip fitting
            row = {"form": form, "problem": str(error)}
        rows.append(row)
        print(row, flush=True)
    peer = next((row for row in rows if row["form"] == "transformers" and "seconds" in row), None)
    for row in rows:
        if peer is not None and "seconds" in row:
            row["times_the_peer"] = row["clips_per_second"] / peer["clips_per_second"]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(*columns, title=f"a training step of {options.preset} on {chip(device)}")
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells))
    Console(width=140).print(table)
    failed = [row["form"] for row in rows if "problem" in row]
    if failed:
        sys.exit(f"failed, so nothing is written: {', '.join(failed)}")
    save("train_step", rows, {"preset": options.preset, "clips": clips or "the most that fit"}, device)


if __name__ == "__main__":
    main()
