"""Ours beside transformers: the same random weights, alternating in one process, and checked against each other."""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pe_av import PEAudioVideo, build_model, load_model, save_model
from pe_av.conversion.write_checkpoint import convert

RESULTS = Path(__file__).parent / "results"


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
def pair(preset: str, device: torch.device, dtype: torch.dtype, peer_dtype: torch.dtype) -> Iterator[Pair]:
    """Both models with the same weights; the conversion goes through a temporary folder of twice the model's size."""
    from transformers import PeAudioVideoModel

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = build_model(preset)
        # a codec as it starts is quiet or loud by its depth; scaled to sounds it gives what its successors expect
        model.audio.codec.calibrate(0.1 * torch.randn(1, 1, 48_000))
        save_model(model, f"{folder}/native")
        del model
        convert(f"{folder}/native", f"{folder}/hf", "hf")
        theirs = PeAudioVideoModel.from_pretrained(f"{folder}/hf").to(device, peer_dtype).eval()
        # counting operations follows inputs of modules that require gradients, which inference mode cannot have
        ours = load_model(f"{folder}/native", device, dtype).requires_grad_(False)
    gc.collect()
    yield Pair(ours, theirs, device)


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of large matrix products, the best of five."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(_seconds(lambda: a @ b, device) for _ in range(5))


def _seconds(do: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    do()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.inference_mode()
def compare(case: Case, device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Medians of alternating runs, their ratio, the spread, and the share of the speed of matrix products.

    Raises:
        AssertionError: the outputs differ.
    """
    found, expected = case.ours().float(), case.theirs().float()
    if case.compared is not None:
        found, expected = found[case.compared], expected[case.compared]
    error = ((found - expected).norm() / expected.norm()).item()
    assert found.shape == expected.shape and error <= case.tolerance, f"{case.name}: the outputs differ by {error:.1e}"
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        case.ours()
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    speeds = []
    for _ in range(repeats):
        times["theirs"].append(_seconds(case.theirs, device))
        times["ours"].append(_seconds(case.ours, device))
        speeds.append(matmul_speed(device, dtype))
    ours, theirs = (statistics.median(times[name]) for name in ("ours", "theirs"))
    return {
        "case": case.name,
        "ours_seconds": ours,
        "theirs_seconds": theirs,
        "ratio": theirs / ours,
        "lowest_ratio": min(t / o for t, o in zip(times["theirs"], times["ours"], strict=True)),
        "highest_ratio": max(t / o for t, o in zip(times["theirs"], times["ours"], strict=True)),
        "share_of_matmul": counter.get_total_flops() / ours / statistics.median(speeds),
        "error": error,
    }


def _cpu() -> str:
    """The processor's name, what it computes vectors with, and how many threads of it are used."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"


def report(subject: str, rows: list[dict[str, Any]], setting: dict[str, Any], device: torch.device) -> None:
    """A table on standard output, and the same into benchmarks/results/SUBJECT_DEVICE.json, beside other settings."""
    chip = torch.cuda.get_device_name() if device.type == "cuda" else _cpu()
    table = Table(
        "case", "ours s", "theirs s", "ratio", "(spread)", "of matmul", title=f"{subject} on {chip}: {setting}"
    )
    for row in rows:
        spread = f"{row['lowest_ratio']:.2f}–{row['highest_ratio']:.2f}"
        share = "" if row["share_of_matmul"] is None else f"{row['share_of_matmul']:.0%}"
        seconds = [f"{row[name]:.3f}" for name in ("ours_seconds", "theirs_seconds")]
        table.add_row(row["case"], *seconds, f"{row['ratio']:.2f}", spread, share)
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{subject}_{device.type}.json"
    known = json.loads(path.read_text()) if path.is_file() else []
    key = {"chip": chip, **setting}
    known = [entry for entry in known if {name: entry.get(name) for name in key} != key]
    entry = key | {"date": str(date.today()), "torch": torch.__version__, "rows": rows}
    path.write_text(json.dumps([*known, entry], indent=1) + "\n")
