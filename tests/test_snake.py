"""Snake's value and derivatives against its formula in float64, by PyTorch's operations and by the Triton kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pe_av.model import fast_snake
from pe_av.model.codec import Snake
from pe_av.model.fast_snake import snake


def snake_in_float64(x: Tensor, alpha: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """Value and gradients of x + sin²(αx) / (α + 1e-9), by autograd."""
    x, alpha = x.detach().double().requires_grad_(), alpha.detach().double().requires_grad_()
    out = x + (alpha * x).sin() ** 2 / (alpha + 1e-9)
    return out.detach(), *torch.autograd.grad(out, (x, alpha), gradient.double())


def expect_snake(device: str = "cpu", dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    """Small and large angles, lengths below, at and above a block of the kernels, inputs that are not contiguous."""
    for dtype in dtypes:
        for shape in ((2, 3, 5), (1, 2, 1024), (2, 3, 2500), (3, 1, 1)):
            x = 3 * torch.randn(*shape[:1], *shape[:0:-1]).transpose(1, 2)
            alpha = torch.logspace(-3, 1.5, shape[1])[None, :, None]
            gradient = torch.randn(shape[:2])[..., None].expand(shape)
            x, gradient = (value.to(device, dtype) for value in (x, gradient))
            x, alpha = x.requires_grad_(), alpha.to(device).requires_grad_()
            out = snake(x, alpha)
            found = out.detach(), *torch.autograd.grad(out, (x, alpha), gradient)
            rounding = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
            for value, expected in zip(found, snake_in_float64(x, alpha, gradient), strict=True):
                tolerance = 1e-5 if value.shape == alpha.shape else rounding  # float32, a difference of two
                assert (value.double() - expected).norm() / expected.norm() <= tolerance, (dtype, shape, value.shape)
            assert out.dtype == dtype


def test_snake_and_its_derivatives():
    expect_snake(dtypes=(torch.float32, torch.bfloat16))
    x, alpha = torch.randn(2, 3, 4).double().requires_grad_(), (0.1 + torch.rand(1, 3, 1)).double().requires_grad_()
    assert torch.autograd.gradcheck(snake, (x, alpha), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(snake, (x, alpha))


def test_snake_under_the_transforms_of_torch_func():
    x, alpha = torch.randn(4, 2, 3, 5).double(), (0.1 + torch.rand(1, 3, 1)).double()

    def plain(x: Tensor) -> Tensor:
        return x + (alpha * x).sin() ** 2 / (alpha + 1e-9)

    def ours(x: Tensor) -> Tensor:
        return snake(x, alpha)

    for transform in (torch.func.vmap, torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(ours)(x), transform(plain)(x))


def test_snake_keeps_only_its_input():
    x, kept = torch.randn(2, 3, 50, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: (kept.append(value), value)[1], lambda value: value):
        Snake(3)(x)
    assert sum(value.numel() for value in kept if value.data_ptr() != x.data_ptr()) == 3  # alpha


def test_the_kernels_of_snake_in_tritons_interpreter():
    """Their arithmetic and indices, without a GPU. The interpreter is chosen when Triton is imported; it truncates
    to bfloat16, where a GPU rounds, so the test is in float32."""
    pytest.importorskip("triton")
    code = (
        "import test_snake, torch; from pe_av.model import fast_snake\n"
        "fast_snake._has_kernels = lambda x: True\n"
        "torch.manual_seed(0); test_snake.expect_snake()"
    )
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
def test_snake_on_a_gpu():
    """By the kernels, if Triton is there at all."""
    pytest.importorskip("triton")
    half = (torch.bfloat16,) if torch.cuda.is_bf16_supported(including_emulation=False) else ()
    expect_snake("cuda", (torch.float32, torch.float16, *half))
    assert fast_snake._kernels_run(torch.device("cuda", torch.cuda.current_device()), torch.float32)
