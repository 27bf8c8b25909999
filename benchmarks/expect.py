"""What to expect on 1 to 256 GPUs, from formulas: `python -m benchmarks expect [--preset large] [--utilization 0.4] …`

Nothing here is timed. Operations are counted by PyTorch on the meta device, bytes follow from the sizes of weights and
embeddings (tests/test_expect.py compares both with a real step), and everything else is an assumption: an option.

- compute: the frozen codec once, everything else three times (forward, and a backward of twice its operations), or
  four with activation checkpointing, without which 16 clips of large need more memory than an H100 has.
- ddp: a ring all-reduce of float32 gradients sends 2·(n−1)/n of them. fsdp: two all-gathers of the weights (forward,
  backward; half of it with parallel.shard_bf16) and a reduce-scatter of float32 gradients, (n−1)/n each.
- ring loss: the right-hand embeddings of all pairings, each once, go round with their gradients: per rank n−1 messages
  of both and one of gradients alone. Gathering would send n−1 messages of all eight embeddings, and as many back, of
  their gradients.
- wire: collectives go round in rings that enter and leave a node once, so that its GPUs share all its network cards;
  in the ring loss every rank sends to its neighbour, of which one per node is in another node, by one card.
- time of a step: compute and communication one after the other, so an upper bound: training overlaps most of it.
"""

import argparse

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.peer import positive
from pe_av import PEAudioVideo, build_model
from pe_av.config import HEADS, PAIRINGS

NODE = 8  # GPUs


def clip_flops(model: PEAudioVideo, seconds: float = 10, frames: int = 16, tokens: int = 32) -> tuple[int, int]:
    """Operations of one forward of one clip: of the frozen codec, and of everything that is trained."""
    summary = model.summary(seconds, frames, tokens)
    codec = summary.parts["codec"].flops
    return codec, summary.total.flops - codec


def ring_bytes(rows: int, ranks: int, dim: int) -> int:
    """What every rank sends in the loss of one step, with `rows` clips of its own; without flags and caption keys."""
    one = rows * dim * 4 * len({right for _, right in PAIRINGS.values()})
    return (2 * (ranks - 1) + 1) * one if ranks > 1 else 0


def gather_bytes(rows: int, ranks: int, dim: int) -> int:
    """What every rank would send to give all others its embeddings, and to give back the gradients of theirs."""
    return 2 * (ranks - 1) * rows * dim * 4 * len(HEADS)


def weight_bytes(parameters: int, ranks: int, strategy: str, gathered: int = 4) -> float:
    """What every rank sends for weights and gradients; `gathered`: bytes of a weight that fsdp gathers."""
    once = parameters * (ranks - 1) / ranks
    return 2 * 4 * once if strategy == "ddp" else (2 * gathered + 4) * once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["small", "base", "large"])
    parser.add_argument("--preset", default="large", help="of the second and third table")
    parser.add_argument("--gpus", type=positive, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--clips", type=float, default=100e6, help="of the whole training")
    parser.add_argument("--batch", type=positive, default=16, help="clips per GPU")
    parser.add_argument("--strategy", default="fsdp", choices=["ddp", "fsdp"])
    parser.add_argument("--passes", type=int, default=4, help="3 without activation checkpointing")
    parser.add_argument("--gathered-bytes", type=int, default=2, help="of a weight; 2: parallel.shard_bf16")
    parser.add_argument("--tflops", type=float, default=989, help="peak of one GPU, dense bf16; 989: H100")
    parser.add_argument("--utilization", type=float, default=0.4, help="of that peak")
    parser.add_argument("--inside", type=float, default=450, help="GB/s that a GPU sends in its node; 450: NVLink 4")
    parser.add_argument("--between", type=float, default=50, help="GB/s that a GPU sends to other nodes; 50: 400 Gb/s")
    parser.add_argument("--dollars", type=float, default=2.5, help="per GPU and hour")
    parser.add_argument("--clip-megabytes", type=float, default=1.5, help="of a 10 s clip on the disk")
    parser.add_argument("--decoded", type=float, default=8.9, help="clips/s that one core decodes (loader_cpu.json)")
    options = parser.parse_args()
    console, speed = Console(width=110), options.tflops * 1e12 * options.utilization

    table = Table(
        *("preset", "codec", "trained, forward", "training step", "clips/s per GPU", "GPU hours"),
        box=box.MARKDOWN,
        title=f"TFLOP of a clip (10 s, 16 frames, 32 tokens), and {options.clips:,.0f} clips",
    )
    models = {preset: build_model(preset, "meta") for preset in dict.fromkeys([*options.presets, options.preset])}
    flops = {}
    for preset, model in models.items():
        codec, rest = clip_flops(model)
        flops[preset] = codec + options.passes * rest
        rate = speed / flops[preset]
        cells = [f"{value / 1e12:.2f}" for value in (codec, rest, flops[preset])]
        table.add_row(preset, *cells, f"{rate:.1f}", f"{options.clips / rate / 3600:,.0f}")
    console.print(table)

    model, rows = models[options.preset], options.batch
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dim, compute = model.config.output_dim, rows * flops[options.preset] / speed
    sent = f"{options.strategy}, GB"
    step = Table(
        *("GPUs", "global batch", sent, "ring loss, MB", "gathering, MB", "compute, s", "communication, s", "share"),
        box=box.MARKDOWN,
        title=f"One step of {options.preset} with {rows} clips per GPU: what a GPU sends, and seconds",
    )
    run = Table(
        *("GPUs", "clips/s", "hours", "dollars", "GB/s per node read", "cores per node that decode"),
        box=box.MARKDOWN,
        title=f"{options.clips:,.0f} clips with {options.preset}, if nothing overlaps",
    )
    for gpus in options.gpus:
        weights = weight_bytes(trained, gpus, options.strategy, options.gathered_bytes) if gpus > 1 else 0.0
        ring, gathered = ring_bytes(rows, gpus, dim), gather_bytes(rows, gpus, dim)
        alone = gpus <= NODE
        collective = options.inside if alone else min(options.inside, NODE * options.between)
        talk = weights / collective / 1e9 + ring / (options.inside if alone else options.between) / 1e9
        cells = [f"{weights / 1e9:.1f}", f"{ring / 1e6:,.1f}", f"{gathered / 1e6:,.1f}", f"{compute:.2f}"]
        step.add_row(str(gpus), f"{rows * gpus:,}", *cells, f"{talk:.3f}", f"{talk / (talk + compute):.0%}")
        rate = gpus * rows / (compute + talk)
        hours = options.clips / rate / 3600
        per_node = rate / gpus * min(gpus, NODE)
        data = [f"{per_node * options.clip_megabytes / 1e3:.2f}", f"{per_node / options.decoded:.0f}"]
        run.add_row(str(gpus), f"{rate:,.0f}", f"{hours:,.0f}", f"{hours * gpus * options.dollars:,.0f}", *data)
    console.print(step)
    console.print(run)


if __name__ == "__main__":
    main()
