"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): steps along orthogonal matrices.

AdamW scales every entry of a gradient by itself, so a step mostly follows the few directions in which the gradient of a
matrix is large. Muon gives all of its directions the same length. On the demo world, the frame encoder learns shapes in
about half of AdamW's steps.
"""

from collections import defaultdict

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import AdamW

MOMENTUM = 0.95
# One round maps a singular value s to A·s + B·s³ + C·s⁵; five of them take nearly all of [0.003, 1] to 0.7 … 1.2.
A, B, C = 3.4445, -4.7750, 2.0315
ROUNDS = 5
TOGETHER = 2**25  # entries of the matrices that are orthogonalized in one call: small ones fill a GPU only together


class Muon(AdamW):
    """AdamW, but for groups with `muon: True`, which consist of matrices that have a state "momentum"."""

    @torch.no_grad()
    def step(self) -> None:
        """Take a step, or none if the scalar `found_inf` is true, which is decided on the device as in AdamW."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._orthogonal_step(group, 1 - self.found_inf)

    def _orthogonal_step(self, group: dict, taken: Tensor) -> None:
        """`taken`: 1 to take the step, 0 to leave everything as it is."""
        alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for matrix in group["params"]:
            if matrix.grad is not None:
                alike[matrix.shape].append(matrix)
        rate = group["lr"] * taken
        for (rows, columns), every in alike.items():
            at_once = max(1, TOGETHER // (rows * columns))
            for matrices in (every[i : i + at_once] for i in range(0, len(every), at_once)):
                steps = orthogonal(torch.stack([self._ahead(matrix, taken) for matrix in matrices]))
                for matrix, step in zip(matrices, steps * max(1, rows / columns) ** 0.5, strict=True):
                    matrix.mul_(1 - rate * group["weight_decay"]).sub_(_shared_out(step, matrix) * rate)

    def _ahead(self, matrix: Tensor, taken: Tensor) -> Tensor:
        """Put the gradient into the momentum, and return the whole matrix of what Nesterov's rule makes of the two."""
        gradient = matrix.grad.nan_to_num()  # of a step that is not taken, and NaN · 0 is NaN
        momentum = self.state[matrix]["momentum"]
        momentum.lerp_(gradient, (1 - MOMENTUM) * taken)
        ahead = gradient.lerp(momentum, MOMENTUM)
        return ahead.full_tensor() if isinstance(ahead, DTensor) else ahead


def _shared_out(step: Tensor, like: Tensor) -> Tensor:
    """A step that every rank has, sharded like its matrix: each rank keeps its part, and nothing is sent."""
    if not isinstance(like, DTensor):
        return step
    mesh = like.device_mesh
    whole = DTensor.from_local(step, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=like.placements)


def orthogonal(matrices: Tensor) -> Tensor:
    """(N, rows, columns) -> the same with every singular value that is not tiny replaced by about 1, by Newton-Schulz
    iteration; in bfloat16 on a GPU, where it does no harm."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-30)  # zeros stay zeros
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = A * x + (B * square + C * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)
