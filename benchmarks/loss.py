"""Memory and time of the contrastive loss, beside the plain formula: `python -m benchmarks loss [--device cuda]`.

Each measurement runs in a process of its own: forward and backward of all pairings on random embeddings. Extra memory
is the peak above the inputs; the gradients of the embeddings, which every form must return, are part of it. On a CPU
that others use as well, processor seconds (summed over threads) say more than the clock.

- ring: `pe_av.loss.contrastive_loss`, the form that training uses.
- plain: `pe_av.loss.sigmoid_loss` of s·x·y^T + b, the six losses summed, then one backward pass.
- recipe: the same after open_clip's published SigLIP recipe (its `SigLipLoss`): labels 2·eye(N) − 1, made anew for each
  pairing, times the logits.

The plain forms may not fit at full size. They are then measured with one and with two pairings: each pairing beyond
the first adds the difference, and the table says so.
"""

import argparse
import json
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # this checkout, installed or not

from benchmarks.peer import RESULTS
from pe_av.config import PAIRINGS, LossConfig, Pairing
from pe_av.loss import BLOCK, contrastive_loss, sigmoid_loss

MIB = 2**20
Learned = dict[str, tuple[Tensor, Tensor]]


def ring(embeds: dict[str, Tensor], logits: Learned, pairings: list[Pairing], block: int) -> Tensor:
    return contrastive_loss(embeds, logits, pairings, block=block).total


def plain(embeds: dict[str, Tensor], logits: Learned, pairings: list[Pairing], block: int) -> Tensor:
    total = 0
    for pairing in pairings:
        x, y = (embeds[name].float() for name in pairing.embeddings)
        scale, bias = logits[pairing.logits]
        total = total + sigmoid_loss(scale * (x @ y.T) + bias)
    return total


def recipe(embeds: dict[str, Tensor], logits: Learned, pairings: list[Pairing], block: int) -> Tensor:
    total = 0
    for pairing in pairings:
        x, y = (embeds[name].float() for name in pairing.embeddings)
        scale, bias = logits[pairing.logits]
        scores = (scale * x) @ y.T + bias
        labels = 2 * torch.eye(len(x), device=x.device) - 1
        total = total - F.logsigmoid(labels * scores).sum() / len(x)
    return total


FORMS: dict[str, Callable[..., Tensor]] = {"ring": ring, "plain": plain, "recipe": recipe}


def step(form: str, options: argparse.Namespace, pairs: int, count: int) -> Callable[[], float]:
    """Forward and backward of `count` pairings, on embeddings as alike as those of a trained model."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    generator = torch.Generator(device).manual_seed(0)
    pairings = LossConfig().pairings[:count]
    names = list(dict.fromkeys(name for pairing in pairings for name in pairing.embeddings))
    embeds = {
        name: F.normalize(torch.randn(pairs, options.dim, generator=generator, device=device), dim=1).to(dtype)
        for name in names
    }
    logits = {n: (torch.full((1,), 10.0, device=device), torch.full((1,), -10.0, device=device)) for n in PAIRINGS}
    leaves = [*embeds.values(), *(value for pair in logits.values() for value in pair)]
    for leaf in leaves:
        leaf.requires_grad_()

    def run() -> float:
        for leaf in leaves:
            leaf.grad = None
        total = FORMS[form](embeds, logits, pairings, options.block)
        total.backward()
        return total.item()  # which also waits for the device

    return run


def measure(form: str, options: argparse.Namespace, pairs: int, count: int) -> dict[str, float]:
    """Peak memory above the inputs in MiB, the shortest times of the repeats in seconds, and the loss."""
    if options.threads:
        torch.set_num_threads(options.threads)
    step(form, options, 256, count)()  # libraries loaded, kernels chosen
    run = step(form, options, pairs, count)
    cuda = options.device.startswith("cuda")
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _resident("VmRSS")
    seconds, busy = [], []
    for repeat in range(options.repeats):
        started, worked = time.perf_counter(), time.process_time()
        loss = run()
        seconds.append(time.perf_counter() - started)
        busy.append(time.process_time() - worked)
        if repeat == 0:
            peak = torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")
    return {"mib": (peak - before) / MIB, "seconds": min(seconds), "processor": min(busy), "loss": loss}


def _resident(field: str) -> int:
    """Bytes, from the kernel's account of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _cpu_name() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{models[0].split(':')[1].strip() if models else platform.machine()}, {len(models)} cores"


def _child(answer: Connection, *arguments) -> None:
    try:
        answer.send(measure(*arguments))
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        answer.send(str(error).splitlines()[0])


def apart(form: str, options: argparse.Namespace, pairs: int, count: int) -> dict[str, float]:
    """`measure` in a process of its own, whose memory is given back whole."""
    context = multiprocessing.get_context("spawn")
    receiver, answer = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(answer, form, options, pairs, count))
    process.start()
    answer.close()
    try:
        found = receiver.recv()
    except EOFError:
        found = "the process was killed, as the system does when memory is short"
    process.join()
    if isinstance(found, str):
        raise SystemExit(f"error: {form}, {count} pairings of {pairs:,} pairs: {found}")
    print(f"{form}, {count} pairings: " + ", ".join(f"{key} {value:,.3f}" for key, value in found.items()), flush=True)
    return found


def bench(form: str, options: argparse.Namespace) -> dict[str, object]:
    every = len(PAIRINGS)
    if form == "ring" or options.plain_pairings == every:
        return {"form": form, "measured": f"{every} pairings"} | apart(form, options, options.pairs, every)
    one, two = (apart(form, options, options.pairs, count) for count in (1, 2))
    scaled = {key: one[key] + (every - 1) * (two[key] - one[key]) for key in ("mib", "seconds", "processor")}
    return {"form": form, "measured": f"1 and 2 pairings, scaled to {every}", "one": one, "two": two} | scaled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, help="default: 16384 on the CPU, 32768 on a GPU")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of embeddings")
    parser.add_argument("--block", type=int, default=BLOCK)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument(
        "--plain-pairings", type=int, default=2, choices=[2, 6], help="6: measure the plain forms whole"
    )
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    options.pairs = options.pairs or (32_768 if cuda else 16_384)
    name = torch.cuda.get_device_name() if cuda else _cpu_name()

    rows = [bench(form, options) for form in options.forms]
    title = f"{options.pairs:,} pairs × {options.dim} × {len(PAIRINGS)} pairings, {options.dtype}, {name}"
    table = Table("form", "extra memory, MiB", "seconds", "processor seconds", "measured", title=title)
    base = next((row for row in rows if row["form"] == "recipe"), rows[-1])
    for row in rows:
        cells = [f"{row[key]:,.1f} ({row[key] / base[key]:.1%})" for key in ("mib", "seconds", "processor")]
        table.add_row(str(row["form"]), *cells, str(row["measured"]))
    Console(width=140).print(table)
    result = {"device": name, "date": date.today().isoformat(), "torch": torch.__version__}
    result |= {"threads": options.threads or torch.get_num_threads(), "options": vars(options), "rows": rows}
    path = RESULTS / f"loss_{'cuda' if cuda else 'cpu'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
