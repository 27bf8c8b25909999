"""Ours beside transformers: the same random weights, alternating in one process, and checked against each other.

Also what the other benchmarks share: a process of its own for a measurement, memory, and the files under results/.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pe_av import PEAudioVideo, build_model, load_model, save_model
from pe_av.conversion.write_checkpoint import convert

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", Path(__file__).parent / "results"))  # elsewhere in a rehearsal


@dataclass
class Case:
    """One thing that both models do with the same inputs."""

    name: str
    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    # True where both outputs must agree, of their shape without the last dimension; None: everywhere; and how closely
    compared: Tensor | None = None
    tolerance: float = 1e-4


@dataclass
class Pair:
    """The models, in evaluation mode; the peer stays in float32, as its users have it, unless it is asked for."""

    ours: PEAudioVideo
    theirs: Any  # transformers.PeAudioVideoModel
    device: torch.device


@contextmanager
def checkpoints(preset: str) -> Iterator[tuple[str, str]]:
    """Two temporary folders with the same random weights: a checkpoint of ours, and one that transformers loads."""
    if importlib.util.find_spec("transformers") is None:
        sys.exit("the peer is transformers, which is not installed: pip install -e '.[dev]'")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = build_model(preset)
        # a codec as it starts is quiet or loud by its depth; scaled to sounds it gives what its successors expect
        model.audio.codec.calibrate(0.1 * torch.randn(1, 1, 48_000))
        save_model(model, f"{folder}/native")
        del model
        convert(f"{folder}/native", f"{folder}/hf", "hf")
        yield f"{folder}/native", f"{folder}/hf"


@contextmanager
def pair(preset: str, device: torch.device, dtype: torch.dtype, peer_dtype: torch.dtype) -> Iterator[Pair]:
    """Both models with the same weights; the conversion goes through a temporary folder of twice the model's size."""
    with checkpoints(preset) as (native, hf):
        theirs = load_theirs(hf).to(device, peer_dtype)
        ours = load_model(native, device, dtype)
    gc.collect()
    # FlopCounterMode follows the parameters that require a gradient, which it cannot in inference mode
    yield Pair(ours.requires_grad_(False), theirs.requires_grad_(False), device)


def load_theirs(folder: str) -> Any:
    """transformers' model, in evaluation mode, on the CPU."""
    from transformers import PeAudioVideoModel

    return PeAudioVideoModel.from_pretrained(folder).eval()


# ---------------------------------------------------------------------------------------------------------------------
# the parts of transformers' model, called as its own forward calls them


def their_codec(model: Any, waveform: Tensor) -> Tensor:
    """(B, 1, samples) -> (B, positions, codebook_dim)."""
    embedder = model.audio_video_encoder.embedder.audio_encoder.embedder
    dtype = embedder.bottleneck.weight.dtype
    return embedder.bottleneck(embedder.dac_encoder(waveform.to(dtype))).transpose(1, 2)


def their_frames(model: Any, pixels: Tensor) -> Tensor:
    """(B, F, 3, S, S) -> (B, F, D) of unit length."""
    embedder = model.audio_video_encoder.embedder.video_encoder.embedder
    logits = embedder.vision_model(pixels.flatten(0, 1).to(embedder.proj.weight.dtype)).logits
    return F.normalize(logits, dim=-1).unflatten(0, pixels.shape[:2])


def their_text(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, T) -> (B, D), the text feature."""
    return model.text_model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1][:, 0]


def their_audio(model: Any, features: Tensor, mask: Tensor) -> Tensor:
    """(B, positions, codebook_dim) -> (B, D): the audio encoder without its codec."""
    encoder = model.audio_video_encoder.embedder.audio_encoder
    forward, given = encoder.embedder.forward, encoder.embedder.data_proj(features.to(encoder.dtype))
    encoder.embedder.forward = lambda *_, **__: (given, mask)
    try:
        return encoder(input_values=features, padding_mask=mask).pooler_output
    finally:
        encoder.embedder.forward = forward


# ---------------------------------------------------------------------------------------------------------------------
# timing


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of large matrix products, the best of five."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: a @ b, device) for _ in range(5))


def seconds_of(do: Callable[[], Any], device: torch.device) -> float:
    """How long it takes, until the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    do()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.inference_mode()
def compare(
    case: Case, device: torch.device, dtype: torch.dtype, repeats: int, budget: float = float("inf")
) -> dict[str, Any]:
    """Medians of alternating runs, their ratio, the spread, and the share of the speed of matrix products.

    Args:
        repeats: how often both are timed, after one run of each that is compared.
        budget: seconds after which no more repeats begin. Where the compared runs alone take longer, they are the ones
            that are timed: next to a minute, what a first run does once is nothing.
    Raises:
        AssertionError: the outputs differ.
    """
    outputs, times = {}, {"theirs": [], "ours": []}
    started = time.perf_counter()
    with FlopCounterMode(display=False) as counter:
        first_ours = seconds_of(lambda: outputs.update(ours=case.ours().float()), device)
    first_theirs = seconds_of(lambda: outputs.update(theirs=case.theirs().float()), device)
    found, expected = outputs["ours"], outputs["theirs"]
    if case.compared is not None:
        found, expected = found[case.compared], expected[case.compared]
    error = ((found - expected).norm() / expected.norm()).item()
    assert found.shape == expected.shape and error <= case.tolerance, f"{case.name}: the outputs differ by {error:.1e}"
    if time.perf_counter() - started > budget:
        times = {"theirs": [first_theirs], "ours": [first_ours]}
    speeds = [matmul_speed(device, dtype)]
    while len(times["ours"]) < repeats and (not times["ours"] or time.perf_counter() - started < budget):
        times["theirs"].append(seconds_of(case.theirs, device))
        times["ours"].append(seconds_of(case.ours, device))
        speeds.append(matmul_speed(device, dtype))
    row = ratio_row(case.name, times["ours"], times["theirs"])
    row["share_of_matmul"] = counter.get_total_flops() / row["ours_seconds"] / statistics.median(speeds)
    return row | {"error": error}


def ratio_row(name: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """What `report` takes, from the seconds of runs of which the i-th ones alternated."""
    ratios = [t / o for t, o in zip(theirs, ours, strict=True)]
    return {
        "case": name,
        "ours_seconds": statistics.median(ours),
        "theirs_seconds": statistics.median(theirs),
        "ratio": statistics.median(theirs) / statistics.median(ours),
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
        "repeats": len(ratios),
        "share_of_matmul": None,
    }


# ---------------------------------------------------------------------------------------------------------------------
# measurements in a process of their own


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module returns in a process of its own, whose memory is given back whole.

    Raises:
        RuntimeError: it raised something, or the process was killed, as happens when memory is short.
    """
    context = multiprocessing.get_context("spawn")
    receiver, answer = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(answer, function, *arguments))
    process.start()
    answer.close()
    try:
        result, problem = receiver.recv()
    except EOFError:
        result, problem = None, "the process was killed"
    process.join()
    if problem is not None:
        raise RuntimeError(problem)
    return result


def _answer(answer: Connection, function: Callable[..., Any], *arguments: Any) -> None:
    if sys.platform == "linux":  # ends with its parent, even a killed one, or it would slow down whatever is timed next
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    try:
        answer.send((function(*arguments), None))
    except Exception as error:
        answer.send((None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"))
        raise


class PeakMemory:
    """Memory in MiB that is used at once inside, beyond what was there before: of the device or, on a CPU, of the
    process, as Linux counts it."""

    def __init__(self, device: torch.device):
        self.device, self.mib = device, 0.0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # or memory that is free, but kept for later, would not be counted
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            self.before = resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else resident("VmHWM")
        self.mib = (peak - self.before) / 2**20


def resident(field: str) -> int:
    """Bytes, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def touch(model: torch.nn.Module) -> None:
    """Read every weight once: a file that is mapped into memory is read only when its weights are used."""
    for tensor in model.state_dict().values():
        tensor.sum()


def positive(text: str) -> int:
    """The type of an argument that is 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


# ---------------------------------------------------------------------------------------------------------------------
# results


def chip(device: torch.device) -> str:
    """The GPU's name; or the processor's, what it computes vectors with, and how many threads of it are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"


def saved(subject: str, setting: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """The rows that benchmarks/results/SUBJECT_DEVICE.json has of a setting on this chip."""
    key = {"chip": chip(device), **setting}
    return next((entry["rows"] for entry in _entries(subject, device) if _setting(entry) == key), [])


def save(subject: str, rows: list[dict[str, Any]], setting: dict[str, Any], device: torch.device) -> None:
    """Into benchmarks/results/SUBJECT_DEVICE.json, in the place of what was measured in the same setting before."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{subject}_{device.type}.json"
    key = {"chip": chip(device), **setting}
    known = [entry for entry in _entries(subject, device) if _setting(entry) != key]
    entry = key | {"date": str(date.today()), "torch": torch.__version__, "rows": rows}
    unfinished = path.with_suffix(f".{os.getpid()}")  # renamed when it is whole, so that no interruption leaves half
    unfinished.write_text(json.dumps([*known, entry], indent=1) + "\n")
    unfinished.replace(path)


def _entries(subject: str, device: torch.device) -> list[dict[str, Any]]:
    path = RESULTS / f"{subject}_{device.type}.json"
    return json.loads(path.read_text()) if path.is_file() else []


def _setting(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in entry.keys() - {"date", "torch", "rows"}}


def report(subject: str, rows: list[dict[str, Any]], setting: dict[str, Any], device: torch.device) -> None:
    """A table of ratios on standard output, and `save`."""
    columns = ("case", "ours s", "theirs s", "ratio", "(spread)", "of matmul")
    table = Table(*columns, title=f"{subject} on {chip(device)}: {setting}")
    for row in rows:
        spread = f"{row['lowest_ratio']:.2f}–{row['highest_ratio']:.2f}"
        share = "" if row["share_of_matmul"] is None else f"{row['share_of_matmul']:.0%}"
        seconds = [f"{row[name]:.3f}" for name in ("ours_seconds", "theirs_seconds")]
        table.add_row(row["case"], *seconds, f"{row['ratio']:.2f}", spread, share)
    Console().print(table)
    save(subject, rows, setting, device)
    print(f"{subject}, times as fast: " + "; ".join(f"{row['case']} {row['ratio']:.2f}" for row in rows), flush=True)
