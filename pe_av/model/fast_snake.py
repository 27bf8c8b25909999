"""Snake, of which autograd keeps x alone: the backward computes the sine anew.

On a GPU with Triton, forward and backward are one kernel each, which computes in float32. PyTorch's operations compute
the same elsewhere. Under torch.compile `codec.Snake` uses the plain formula, which the compiler fuses by itself.

    f(x, α) = x + sin²(αx) / (α + ε)        ∂f/∂x = 1 + sin(2αx) · α / (α + ε)
    ∂f/∂α = x · sin(2αx) / (α + ε) − sin²(αx) / (α + ε)²
"""

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pe_av.model.packing import has_values

EPSILON = 1e-9


def snake(x: Tensor, alpha: Tensor) -> Tensor:
    """x (B, C, L), alpha (1, C, 1) -> (B, C, L) in the dtype of x. It can be differentiated any number of times."""
    return _Snake.apply(x, alpha)


class _Snake(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, alpha: Tensor) -> Tensor:
        if _has_kernels(x):
            return _kernels().forward(x, alpha, EPSILON)
        sine = (alpha * x).sin_()
        return torch.addcmul(x, sine.mul_(sine), 1 / (alpha + EPSILON)).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, alpha = ctx.saved_tensors
        differentiable = torch.is_grad_enabled()  # the backward is to be differentiated itself: by PyTorch's operations
        if _has_kernels(x) and not differentiable:
            return _kernels().backward(gradient, x, alpha, EPSILON)
        by_x, by_alpha = _derivatives(x, alpha)
        for_x = for_alpha = None
        if ctx.needs_input_grad[0]:
            for_x = (gradient * by_x()).to(x.dtype)
        if ctx.needs_input_grad[1]:
            for_alpha = (gradient * by_alpha()).sum((0, 2), keepdim=True).to(alpha.dtype)
        return for_x, for_alpha

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, alpha_tangent: Tensor | None) -> Tensor:
        x, alpha = ctx.saved_tensors
        tangents = zip(_derivatives(x, alpha), (x_tangent, alpha_tangent), strict=True)
        return sum(slope() * tangent for slope, tangent in tangents if tangent is not None).to(x.dtype)


def _derivatives(x: Tensor, alpha: Tensor) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """∂f/∂x and ∂f/∂α, each computed when it is called."""
    inverse, angle = 1 / (alpha + EPSILON), alpha * x
    sine = angle.sin()
    double_sine = 2 * sine * angle.cos()  # sin(2αx)
    return (
        lambda: 1 + double_sine * (alpha * inverse),
        lambda: (x * double_sine - sine.square() * inverse) * inverse,
    )


def _kernels() -> ModuleType:
    from pe_av.model import snake_kernels  # only where it is used: importing Triton takes a while, or fails

    return snake_kernels


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64 and has_values(x) and _kernels_run(x.device, x.dtype)


@functools.cache
def _kernels_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels can be compiled: besides Triton that takes a C compiler, a driver and a GPU that it knows."""
    x = torch.ones(1, 1, 1, device=device, dtype=dtype)
    try:
        _kernels().forward(x, x, EPSILON)
        _kernels().backward(x, x, x, EPSILON)
    except Exception as error:  # whatever the tools raise, PyTorch's operations compute the same
        logging.getLogger(__name__).info("Snake runs without its kernels on %s: %s", device, error)
        return False
    return True
