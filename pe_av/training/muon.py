"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): steps along orthogonal matrices.

AdamW scales every entry of a gradient by itself, so a step mostly follows the few directions in which the gradient of a
matrix is large. Muon gives all of its directions the same length. On the demo world, the frame encoder learns shapes in
less than half of AdamW's steps.
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
        alike: dict[torch.Size, list[Tensor]] = defaultdict(list)  # matrices of one shape are computed together
        for matrix in group["params"]:
            if matrix.grad is not None:
                alike[matrix.shape].append(matrix)
        rate = group["lr"] * taken
        for (rows, columns), matrices in alike.items():
            moved = []
            for matrix in matrices:
                gradient = matrix.grad.nan_to_num()  # of a step that is not taken, and NaN · 0 is NaN
                momentum = self.state[matrix]["momentum"]
                momentum.lerp_(gradient, (1 - MOMENTUM) * taken)
                moved.append(gradient.lerp(momentum, MOMENTUM))  # as Nesterov looks ahead
            steps = orthogonal(torch.stack([m.full_tensor() if isinstance(m, DTensor) else m for m in moved]))
            for matrix, step in zip(matrices, steps * max(1, rows / columns) ** 0.5, strict=True):
                if isinstance(matrix, DTensor):
                    mesh = matrix.device_mesh
                    step = DTensor.from_local(step, mesh, [Replicate()] * mesh.ndim, run_check=False)
                    step = step.redistribute(placements=matrix.placements)  # takes this rank's part: nothing is sent
                matrix.mul_(1 - rate * group["weight_decay"]).sub_(step * rate)


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
