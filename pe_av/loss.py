"""The sigmoid contrastive loss (arXiv 2303.15343, equation 1) over the pairings of a batch.

For one pairing with logits l_ij of N pairs, L = −(1/N) Σ_ij log σ(z_ij l_ij), with z_ij = +1 on the diagonal, where the
pairs that belong together stand, and −1 everywhere else. The published code multiplies by eye(N) instead, which leaves
the pairs that do not belong together without any gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_loss(logits: Tensor) -> Tensor:
    """(N, N) logits -> scalar, in float32.

    Raises:
        ValueError: the logits are not square, so which pairs belong together is not known.
    """
    if logits.dim() != 2 or logits.shape[0] != logits.shape[1]:
        raise ValueError(
            f"logits are {tuple(logits.shape)}: the loss needs one right-hand item for every left-hand one"
        )
    n = logits.shape[0]
    signs = 2 * torch.eye(n, device=logits.device) - 1
    return -F.logsigmoid(signs * logits.float()).sum() / n
