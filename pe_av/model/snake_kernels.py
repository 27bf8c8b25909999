"""Snake's forward and backward as Triton kernels: one read of each input, one write of each output, float32 inside.

A program computes a block of one channel of one row. The derivatives are in fast_snake.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # steps of a program


def forward(x: Tensor, alpha: Tensor, epsilon: float) -> Tensor:
    """x (B, C, L), alpha (1, C, 1) -> (B, C, L)."""
    x, alpha = x.contiguous(), alpha.contiguous()
    out = torch.empty_like(x)
    programs, channels, length, blocks = _grid(x)
    if programs:
        with _on(x.device):
            _forward[(programs,)](x, alpha, out, channels, length, blocks, epsilon, BLOCK=BLOCK)
    return out


def backward(gradient: Tensor, x: Tensor, alpha: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The gradients of x, in its dtype, and of alpha. The latter is summed in a fixed order."""
    gradient, x, alpha = gradient.contiguous(), x.contiguous(), alpha.contiguous()
    for_x = torch.empty_like(x)
    programs, channels, length, blocks = _grid(x)
    sums = x.new_empty(x.shape[0], channels, blocks, dtype=torch.float32)
    if programs:
        with _on(x.device):
            _backward[(programs,)](gradient, x, alpha, for_x, sums, channels, length, blocks, epsilon, BLOCK=BLOCK)
    return for_x, sums.sum((0, 2))[None, :, None].to(alpha.dtype)


def _grid(x: Tensor) -> tuple[int, int, int, int]:
    """Programs, channels, length, and blocks of a channel."""
    batch, channels, length = x.shape
    blocks = triton.cdiv(length, BLOCK)
    return batch * channels * blocks, channels, length, blocks


def _on(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current GPU; the interpreter, by which the tests run, has none."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


@triton.jit
def _forward(x_start, alpha_start, out_start, channels, length, blocks, epsilon, BLOCK: tl.constexpr):
    row = tl.program_id(0) // blocks  # of batch × channels
    step = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    place, inside = row.to(tl.int64) * length + step, step < length
    x = tl.load(x_start + place, mask=inside, other=0.0).to(tl.float32)
    alpha = tl.load(alpha_start + row % channels).to(tl.float32)
    sine = tl.sin(alpha * x)
    tl.store(out_start + place, x + sine * sine / (alpha + epsilon), mask=inside)


@triton.jit
def _backward(
    gradient_start,
    x_start,
    alpha_start,
    for_x_start,
    sums_start,
    channels,
    length,
    blocks,
    epsilon,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) // blocks  # of batch × channels
    step = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    place, inside = row.to(tl.int64) * length + step, step < length
    gradient = tl.load(gradient_start + place, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_start + place, mask=inside, other=0.0).to(tl.float32)
    alpha = tl.load(alpha_start + row % channels).to(tl.float32)
    inverse = 1 / (alpha + epsilon)
    sine, cosine = tl.sin(alpha * x), tl.cos(alpha * x)
    double_sine = 2 * sine * cosine  # sin(2αx)
    tl.store(for_x_start + place, gradient * (1 + double_sine * alpha * inverse), mask=inside)
    for_alpha = gradient * inverse * (x * double_sine - sine * sine * inverse)  # 0 outside, where the gradient is 0
    tl.store(sums_start + tl.program_id(0), tl.sum(for_alpha, axis=0))
