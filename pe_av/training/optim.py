"""AdamW with weight decay on matrices only, and the learning rate's course."""

import math

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from ..config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """Weight decay falls on the matrices of linear, convolution and embedding layers; never on norms, biases, class
    tokens, probes, positions, or the logit scales and biases, which have no scale of their own to be held down."""
    decayed = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding)
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if id(p) not in decayed], "weight_decay": 0.0},
    ]
    fused = all(p.is_cuda for p in trainable)
    return AdamW(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=fused)


def build_schedule(optimizer: AdamW, config: OptimConfig, steps: int) -> LambdaLR:
    """Linear warm-up over `warmup_steps`, then half a cosine down to `final_lr_ratio` at step `steps`."""

    def ratio(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
        return config.final_lr_ratio + (1 - config.final_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, ratio)


def clip_gradients(model: nn.Module, norm: float) -> torch.Tensor:
    """Scale all gradients down to the global `norm`; returns what it was before."""
    return nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), norm)
