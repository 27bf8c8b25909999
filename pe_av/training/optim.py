"""AdamW and Muon: which parameters they train, at which rates, on which schedule; and averaged weights."""

import math
import re
from collections import defaultdict

import torch
from torch import Tensor, nn

from pe_av.config import ConfigError, OptimConfig
from pe_av.training.muon import Muon
from pe_av.training.parallel import local_part

# modules that come before the layers of a tower: the furthest from its output, so `layer_decay` reduces them most
BEFORE_LAYERS = ("embedding", "embedding_norm", "patch_embed", "class_token", "position", "pre_norm", "conv_blocks")


def freeze(model: nn.Module, parts: list[str]) -> None:
    """Freeze the parameters of the named parts of the model, e.g. "text", "video.vision", "audio.transformer.layers.0".

    Raises:
        ConfigError: the model has no such part.
    """
    for part in parts:
        for _, parameter in _of_part(model, part, "optim.freeze"):
            parameter.requires_grad_(False)


def build_optimizer(model: nn.Module, config: OptimConfig) -> Muon:
    """AdamW over the parameters that require a gradient, but Muon over the matrices of layers if `muon_lr` is set.

    There is one group for each learning rate and weight decay.

    Weight decay applies to the weights of linear, convolution and embedding layers. It does not apply to norms, biases,
    class tokens, probes, position embeddings, or logit scales and biases.

    Raises:
        ConfigError: every parameter is frozen, or `lr_scale` names a part that the model does not have.
    """
    decayed = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding)
    }
    scales = _scales(model, config)
    groups: dict[tuple[float, float, bool], list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if id(parameter) in decayed else 0.0
            muon = config.muon_lr is not None and _is_layer_matrix(name, parameter)
            scale = scales[name] * (config.muon_lr / config.lr if muon else 1)
            groups[scale, decay, muon].append(parameter)
    if not groups:
        raise ConfigError("every parameter is frozen, so there is nothing to train: name fewer parts in optim.freeze")
    optimizer = Muon(
        [
            {"params": each, "scale": scale, "weight_decay": decay, "muon": muon}
            for (scale, decay, muon), each in groups.items()
        ],
        lr=config.lr,
        betas=tuple(config.betas),
        eps=config.eps,
        fused=True,  # this form can skip a step on the device, without the host knowing (`take_step`)
    )
    # AdamW would make these at a parameter's first gradient; made now, they are in every saved state
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = ("momentum",) if group["muon"] else ("exp_avg", "exp_avg_sq")
            optimizer.state[parameter] = {name: torch.zeros_like(parameter) for name in moments}
            if not group["muon"]:
                optimizer.state[parameter]["step"] = torch.zeros((), device=parameter.device)
    return optimizer


def set_learning_rate(optimizer: Muon, config: OptimConfig, step: int, steps: int) -> float:
    """Set the learning rate of step `step`, counted from 0, of `steps`: linear warm-up over `warmup_steps`, then half a
    cosine down to `final_lr_ratio`, or constant. Each group has it times its own factor.

    Returns:
        the rate before the factors of the groups.
    """
    rate = config.lr * _schedule(config, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    return rate


def take_step(optimizer: Muon, skip: Tensor) -> None:
    """Take a step of the optimizer, or none if `skip` is true: a scalar on the device, for which no host waits."""
    optimizer.found_inf = skip.float()
    optimizer.step()


def _schedule(config: OptimConfig, step: int, steps: int) -> float:
    """The factor on the learning rate."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2


class AveragedWeights:
    """An exponential moving average of the trained weights: average = decay · average + (1 − decay) · weight."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.average = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, skip: Tensor) -> None:
        """Take in the weights after a step; `skip`: the step was skipped, so the average stays too."""
        weight = (1 - self.decay) * (1 - skip.float())
        for name, parameter in model.named_parameters():
            if name in self.average:
                local_part(self.average[name]).lerp_(local_part(parameter), weight)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the average and the model's weights: before an evaluation or export, and back after it."""
        for name, parameter in model.named_parameters():
            if name in self.average:
                held = parameter.detach().clone()
                parameter.copy_(self.average[name])
                self.average[name].copy_(held)


def _is_layer_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon suits it: it maps one hidden state to another, so all of its directions may matter alike. Embeddings
    and projections out of the model are left to AdamW, as its authors advise, and so are adapters of low rank."""
    return parameter.ndim == 2 and bool(re.search(r"(^|\.)(layers|pool)\.", name)) and ".adapter." not in name


def _scales(model: nn.Module, config: OptimConfig) -> dict[str, float]:
    """By the parameter's name, the factor on its learning rate."""
    names = [name for name, _ in model.named_parameters()]
    scales = dict.fromkeys(names, 1.0)
    for part in sorted(config.lr_scale, key=len):  # a part inside another comes after it, and overrides it
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
    """The parameters of a part; `setting` is where the user named it."""
    parameters = [(n, p) for n, p in model.named_parameters() if n == part or n.startswith(f"{part}.")]
    if not parameters:
        parts = ", ".join(name for name, _ in model.named_children())
        raise ConfigError(f"{setting}: the model has no part {part}; it consists of {parts}, and of their parts")
    return parameters
