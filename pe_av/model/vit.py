"""PE-Core vision transformer (Perception Encoder, arXiv 2504.13181): one frame -> one vector."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pe_av.model.transformer import attend, rotate_pairs


def grid_angles(grid: int, head_dim: int, theta: float, class_token: bool, device: torch.device) -> Tensor:
    """2-D rotary angles (1, patches, head_dim/2): the first half depends on x, the second on y.

    A class token sits at the origin and patches are counted from 1; without one they are counted from 0.
    """
    axis = torch.arange(grid, device=device, dtype=torch.float32) + (1 if class_token else 0)
    frequency = theta ** -(torch.arange(0, head_dim // 2, 2, device=device, dtype=torch.float32) / (head_dim // 2))
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angles = torch.cat((x.flatten()[:, None] * frequency, y.flatten()[:, None] * frequency), dim=-1)
    return F.pad(angles, (0, 0, 1 if class_token else 0, 0))[None]


class MLP(nn.Module):
    """down(gelu(up(x))), with biases."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class VisionBlock(nn.Module):
    """Pre-norm layer with 2-D rotary self-attention."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_heads: int, attention: str):
        super().__init__()
        self.num_heads, self.implementation = num_heads, attention
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.mlp = MLP(hidden_size, intermediate_size)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = rearrange(
            self.qkv(self.attention_norm(x)), "b t (three h d) -> three b h t d", three=3, h=self.num_heads
        )
        attended, _ = attend(rotate_pairs(q, angles), rotate_pairs(k, angles), v, None, self.implementation)
        x = x + self.out(rearrange(attended, "b h t d -> b t (h d)"))
        return x + self.mlp(self.mlp_norm(x))


class AttentionPool(nn.Module):
    """Cross-attention from one learned query to all patches, then a residual MLP: (B, T, D) -> (B, D)."""

    def __init__(self, hidden_size: int, num_heads: int, attention: str):
        super().__init__()
        self.num_heads, self.implementation = num_heads, attention
        self.probe = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.mlp = MLP(hidden_size, 4 * hidden_size)  # always 4, also in G14, whose layers use 8960 / 1536

    def forward(self, x: Tensor) -> Tensor:
        q = rearrange(self.q(self.probe), "b t (h d) -> b h t d", h=self.num_heads).expand(x.shape[0], -1, -1, -1)
        k, v = rearrange(self.kv(x), "b t (two h d) -> two b h t d", two=2, h=self.num_heads)
        attended, _ = attend(q, k, v, None, self.implementation)
        pooled = self.out(rearrange(attended, "b h t d -> b t (h d)"))
        return (pooled + self.mlp(self.mlp_norm(pooled)))[:, 0]


class VisionTransformer(nn.Module):
    """(B, 3, S, S) pixels in [-1, 1] -> (B, output_dim). Arguments are those of `config.VisionConfig`."""

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        output_dim: int,
        proj_bias: bool,
        use_class_token: bool,
        pool_heads: int,
        rope_theta: float,
        attention: str,
    ):
        super().__init__()
        self.image_size, self.grid = image_size, image_size // patch_size
        self.head_dim, self.rope_theta = hidden_size // num_attention_heads, rope_theta
        self.patch_embed = nn.Conv2d(3, hidden_size, kernel_size=patch_size, stride=patch_size, bias=False)
        self.class_token = nn.Parameter(torch.empty(1, 1, hidden_size)) if use_class_token else None
        self.position = nn.Parameter(torch.empty(1, self.grid**2 + use_class_token, hidden_size))
        self.pre_norm = nn.LayerNorm(hidden_size)
        self.layers = nn.ModuleList(
            VisionBlock(hidden_size, intermediate_size, num_attention_heads, attention)
            for _ in range(num_hidden_layers)
        )
        self.post_norm = nn.LayerNorm(hidden_size)
        self.pool = AttentionPool(hidden_size, pool_heads, attention)
        self.proj = nn.Linear(hidden_size, output_dim, bias=proj_bias)

    def forward(self, pixels: Tensor) -> Tensor:
        x = rearrange(self.patch_embed(pixels), "b d h w -> b (h w) d")
        if self.class_token is not None:
            x = torch.cat((self.class_token.to(x.dtype).expand(x.shape[0], -1, -1), x), dim=1)
        x = self.pre_norm(x + self.position)
        angles = grid_angles(self.grid, self.head_dim, self.rope_theta, self.class_token is not None, x.device)
        for layer in self.layers:
            x = layer(x, angles)
        return self.proj(self.pool(self.post_norm(x)))
