"""What a model costs: parameters and operations of each tower, counted on the meta device, so without computing."""

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# name in the table -> the module that is called for it, without what other rows count
PARTS = {
    "text": "text",
    "codec": "audio.codec",
    "audio": "audio",
    "frame encoder": "video.vision",
    "video": "video",
    "fusion": "fusion",
}


@dataclass(frozen=True)
class Cost:
    """Of a part of a model. Operations are those of one forward of one clip; a multiplication and an addition are 2."""

    parameters: int
    trainable: int
    flops: int


@dataclass(frozen=True, repr=False)
class Summary:
    """Part -> its cost: text, codec, audio, frame encoder, video, fusion (those that the model has), and heads."""

    title: str
    parts: dict[str, Cost]

    @property
    def total(self) -> Cost:
        costs = self.parts.values()
        return Cost(sum(c.parameters for c in costs), sum(c.trainable for c in costs), sum(c.flops for c in costs))

    def __repr__(self) -> str:
        """A table."""
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table("part", box=box.SIMPLE)
        for name in ("parameters", "trainable", "GFLOP"):
            table.add_column(name, justify="right")
        for name, cost in (self.parts | {"total": self.total}).items():
            if name == "total":
                table.add_section()
            table.add_row(name, f"{cost.parameters:,}", f"{cost.trainable:,}", f"{cost.flops / 1e9:,.3f}")
        console = Console(file=io.StringIO(), width=100, color_system=None, force_jupyter=False)
        console.print(table)
        return "\n".join([self.title, *(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())])


def summarize(
    model: nn.Module, run: Callable[[nn.Module, dict[str, Tensor]], object], seconds: float, frames: int, tokens: int
) -> Summary:
    """The costs of a model's parts for a clip of so many seconds of audio, frames of video and tokens of text.

    Args:
        run: (model, inputs by name) -> all embeddings. The inputs are those that the model has towers for.
    """
    from torch.utils.flop_counter import FlopCounterMode  # takes a second to import

    # a copy whose weights have no values, and hence no memory
    weights = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    empty = copy.deepcopy(model, weights | {id(b): b.to("meta") for b in model.buffers()}).eval()
    empty.set_attention("sdpa")  # all implementations multiply as much, but this one is counted
    inputs, has = _clip(empty, seconds, frames, tokens), dict(empty.named_modules())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(empty, inputs)
    counts = counter.get_flop_counts()  # by the class of the outermost module that is called, and no two share theirs
    flops = {part: sum(counts[type(has[name]).__name__].values()) for part, name in PARTS.items() if name in has}
    parameters = {part: list(has[name].parameters()) for part, name in PARTS.items() if name in has}
    for outer, inner in (("audio", "codec"), ("video", "frame encoder")):
        if outer in parameters:
            inside = {id(p) for p in parameters[inner]}
            parameters[outer] = [p for p in parameters[outer] if id(p) not in inside]
    counted = {id(p) for part in parameters.values() for p in part}
    parameters["heads"] = [p for p in empty.parameters() if id(p) not in counted]
    flops["heads"] = counter.get_total_flops() - sum(flops.values())

    def cost(part: str) -> Cost:
        total = sum(p.numel() for p in parameters[part])
        return Cost(total, sum(p.numel() for p in parameters[part] if p.requires_grad), flops[part])

    sizes = {"text": f"{tokens} tokens", "audio": f"{seconds:g} s", "video": f"{frames} frames"}
    listed = ", ".join(size for tower, size in sizes.items() if tower in parameters)
    return Summary(
        f"{type(empty).__name__}, one forward of a clip of {listed}", {part: cost(part) for part in parameters}
    )


def _clip(model: nn.Module, seconds: float, frames: int, tokens: int) -> dict[str, Tensor]:
    """Inputs without values, of the towers that the model has."""
    config, has = model.config, dict(model.named_modules())
    codec = config.audio.codec
    samples = max(round(seconds * codec.sampling_rate) // codec.hop_length, 1) * codec.hop_length
    inputs = {}
    if "text" in has:
        inputs["input_ids"] = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    if "audio" in has:
        inputs["input_values"] = torch.zeros(1, 1, samples, device="meta")
    if "video" in has:
        size = config.video.vision.image_size
        inputs["pixel_values_videos"] = torch.zeros(1, frames, 3, size, size, device="meta")
    return inputs
