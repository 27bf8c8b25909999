"""Heads from tower features to the shared embedding space, and logits from pairs of embeddings."""

import torch
from torch import Tensor, nn


class ContrastiveHead(nn.Module):
    """(B, in_dim) -> (B, out_dim): layer norm, then a linear map."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(in_dim, eps=1e-6)
        self.proj = nn.Linear(in_dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.norm(x))


class PairLogits(nn.Module):
    """s · x yᵀ + b with learned scale s and bias b, computed in float32 for embeddings of any dtype."""

    def __init__(self, scale: float, bias: float):
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), scale))
        self.bias = nn.Parameter(torch.full((1,), bias))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (…, N, D), y (…, M, D) -> (…, N, M) float32."""
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # there is none for meta
            return self.scale.float() * (x.float() @ y.float().mT) + self.bias.float()
