"""AdamW, which parameters it moves and how far, and the learning rate's course."""

import math
import re
from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from pe_av.config import ConfigError, OptimConfig
from pe_av.training.parallel import local_part

# what comes before the layers of a tower, and so is the furthest from its output
BEFORE_LAYERS = ("embedding", "embedding_norm", "patch_embed", "class_token", "position", "pre_norm", "conv_blocks")


def freeze(model: nn.Module, parts: list[str]) -> None:
    """No gradient for the parameters of the named parts, e.g. "text", "video.vision", "audio.transformer.layers.0".

    Raises:
        ConfigError: a part that the model does not have.
    """
    for part in parts:
        for _, parameter in _of_part(model, part, "optim.freeze"):
            parameter.requires_grad_(False)


def build_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """One group for each pair of learning rate and weight decay.

    Weight decay falls on the matrices of linear, convolution and embedding layers; never on norms, biases, class
    tokens, probes, positions, or the logit scales and biases, which have no scale of their own to be held down.

    Raises:
        ConfigError: nothing is left to train, or `lr_scale` names a part that the model does not have.
    """
    decayed = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding)
    }
    scales = _scales(model, config)
    groups: dict[tuple[float, float], list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if id(parameter) in decayed else 0.0
            groups[scales[name], decay].append(parameter)
    if not groups:
        raise ConfigError("every parameter is frozen, so there is nothing to train: name fewer parts in optim.freeze")
    # fused: it can leave out a step without the host having to know (`take_step`)
    optimizer = AdamW(
        [{"params": each, "scale": scale, "weight_decay": decay} for (scale, decay), each in groups.items()],
        lr=config.lr,
        betas=tuple(config.betas),
        eps=config.eps,
        fused=True,
    )
    # from the start, as AdamW does it at a parameter's first gradient: so every saved state holds the same tensors
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def set_learning_rate(optimizer: AdamW, config: OptimConfig, step: int, steps: int) -> float:
    """The rate of step `step`, counted from 0, of `steps`, which is returned: linear warm-up over `warmup_steps`, then
    half a cosine down to `final_lr_ratio` at the end, or constant; times the factor of each group."""
    rate = config.lr * _course(config, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    return rate


def take_step(optimizer: AdamW, wrong: Tensor) -> None:
    """A step of the optimizer, or none at all where `wrong`, a scalar of 0 or 1, is 1. Nobody waits for its value."""
    optimizer.found_inf = wrong.float()
    optimizer.step()


def _course(config: OptimConfig, step: int, steps: int) -> float:
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2


class AveragedWeights:
    """An exponential moving average of the weights that are trained (ema = decay · ema + (1 − decay) · weight)."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.average = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, wrong: Tensor) -> None:
        """After a step, unless it was left out, where `wrong` is 1."""
        weight = (1 - self.decay) * (1 - wrong.float())
        for name, parameter in model.named_parameters():
            if name in self.average:
                local_part(self.average[name]).lerp_(local_part(parameter), weight)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange average and weights: before an evaluation or export, and again after it."""
        for name, parameter in model.named_parameters():
            if name in self.average:
                held = parameter.detach().clone()
                parameter.copy_(self.average[name])
                self.average[name].copy_(held)


def _scales(model: nn.Module, config: OptimConfig) -> dict[str, float]:
    """Of every parameter, what its learning rate is multiplied with."""
    names = [name for name, _ in model.named_parameters()]
    scales = dict.fromkeys(names, 1.0)
    for part in sorted(config.lr_scale, key=len):  # the more precise name has the last word
        for name, _ in _of_part(model, part, "optim.lr_scale"):
            scales[name] = config.lr_scale[part]
    depth: dict[str, int] = defaultdict(int)  # tower -> number of its layers
    for name in names:
        if match := re.match(r"(.+)\.layers\.(\d+)\.", name):
            depth[match[1]] = max(depth[match[1]], int(match[2]) + 1)
    for name in names:
        for tower, layers in depth.items():
            if name.startswith(f"{tower}."):
                inside = name.removeprefix(f"{tower}.").split(".")
                if inside[0] == "layers":
                    scales[name] *= config.layer_decay ** (layers - 1 - int(inside[1]))
                elif inside[0] in BEFORE_LAYERS:
                    scales[name] *= config.layer_decay**layers
    return scales


def _of_part(model: nn.Module, part: str, setting: str) -> list[tuple[str, nn.Parameter]]:
    found = [(n, p) for n, p in model.named_parameters() if n == part or n.startswith(f"{part}.")]
    if not found:
        parts = ", ".join(name for name, _ in model.named_children())
        raise ConfigError(f"{setting}: the model has no part {part}; it consists of {parts}, and of their parts")
    return found
