"""The temporal transformer of the audio and video towers and of the fusion (PE-AV, arXiv 2512.19687, section 3).

Class token, residual convolution block, then layers with grouped-query attention, q/k normalization, rotary embedding
and SwiGLU. `attend` and the rotary helpers also serve the text and frame encoders.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from pe_av.config import RopeConfig
from pe_av.model.packing import Packing, keep_state, packing_of, without_full

ACTIVATION = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def at_least_float32(x: Tensor) -> Tensor:
    """float64 stays float64, everything else becomes float32: for steps where half precision is not enough."""
    return x if x.dtype == torch.float64 else x.float()


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Packing | None, implementation: str, dropout: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention with one of three implementations that compute the same function.

    Args:
        q: (B, H, T, d); k, v: (B, K, S, d), where K divides H; each key/value head serves H/K query heads.
        mask: (B or 1, 1, T or 1, S) bool, True where a query may attend, at least once per query; or the packed rows,
            each of which attends to itself; None: everywhere.
        implementation: "sdpa", "flex", or "eager", which materializes the weights and returns them.
        dropout: probability of dropping an attention weight.
    Returns:
        output (B, H, T, d), and the weights (B, H, T, S) if "eager", else None.
    """
    if isinstance(mask, Packing) and mask.flash is not None:
        return mask.flash_attention(q, k, v), None
    if isinstance(mask, Packing):
        rows = [[x[:, :, span] for x in (q, k, v)] for span in mask.spans()]
        outputs = [attend(*row, mask.row_mask(row[0].shape[2]), implementation, dropout)[0] for row in rows]
        return torch.cat(outputs, dim=2), None
    grouped = q.shape[1] != k.shape[1]
    if implementation == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=grouped), None
    if implementation == "flex":
        blocks = None
        if mask is not None:
            full = mask.expand(q.shape[0], 1, q.shape[2], k.shape[2])  # the mask function needs every query index
            blocks = create_block_mask(
                lambda b, h, i, j: full[b, 0, i, j], mask.shape[0], None, *full.shape[2:], device=mask.device
            )
        # fused on CUDA only; elsewhere PyTorch's unfused fallback, which has no backward
        flex = torch.compile(flex_attention) if q.is_cuda else flex_attention
        return flex(q, k, v, block_mask=blocks, enable_gqa=grouped), None
    k, v = (repeat(x, "b k s d -> b (k g) s d", g=q.shape[1] // k.shape[1]) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = F.dropout(at_least_float32(scores).softmax(-1).to(q.dtype), dropout)
    return weights @ v, weights


def use_attention(model: nn.Module, implementation: str) -> None:
    """Switch every attention in `model` to "eager", "sdpa" or "flex"."""
    for module in model.modules():
        if hasattr(module, "implementation"):
            module.implementation = implementation


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding: rotate adjacent pairs of (B, H, T, d) by `angles` (B or 1, T, d/2), in at least float32."""
    even, odd = rearrange(at_least_float32(x), "b h t (d two) -> two b h t d", two=2)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def rotary_angles(rope: RopeConfig, head_dim: int, length: int, row_length: Tensor, max_position: int) -> Tensor:
    """Rotary angles of positions 0 … length-1: (B or 1, length, head_dim/2) float32.

    "dynamic" raises the base for rows longer than `max_position` (NTK-aware scaling). It uses each row's valid length,
    `row_length` (B,), rather than the padded one, so a row's result does not depend on the rest of the batch.
    """
    device = row_length.device
    position = torch.arange(length, device=device, dtype=torch.float32)
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    base = torch.full((1, 1), rope.rope_theta, device=device)
    if rope.rope_type == "dynamic":
        stretch = rope.factor * row_length[:, None].clamp(min=max_position) / max_position - (rope.factor - 1)
        base = base * stretch ** (head_dim / (head_dim - 2))
    if rope.rope_type == "linear":
        position = position / rope.factor
    return position[None, :, None] / base[..., None] ** exponent


class Attention(nn.Module):
    """Grouped-query self-attention with RMS-normalized queries and keys and rotary embedding."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        eps: float,
        bias: bool,
        dropout: float,
        implementation: str,
    ):
        super().__init__()
        self.head_dim, self.dropout, self.implementation = head_dim, dropout, implementation
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.q_norm = nn.RMSNorm(head_dim, eps=eps)
        self.k_norm = nn.RMSNorm(head_dim, eps=eps)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | Packing | None) -> tuple[Tensor, Tensor | None]:
        q, k, v = (
            rearrange(proj(x), "b t (h d) -> b h t d", d=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate_pairs(self.q_norm(q), angles), rotate_pairs(self.k_norm(k), angles)
        out, weights = attend(q, k, v, mask, self.implementation, self.dropout if self.training else 0.0)
        return self.o_proj(rearrange(out, "b h t d -> b t (h d)")), weights


class SwiGLU(nn.Module):
    """Gated MLP: down(act(gate(x)) · up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str):
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ACTIVATION[self.activation](self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, attention: Attention, mlp: SwiGLU, hidden_size: int, eps: float):
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden_size, eps=eps)
        self.attention = attention
        self.mlp_norm = nn.RMSNorm(hidden_size, eps=eps)
        self.mlp = mlp

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | Packing | None) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.attention(self.attention_norm(x), angles, mask)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), weights


class MaskedConvBlock(nn.Module):
    """Group norm with one group over a row's valid values, SiLU, convolution of 3. Padding has no influence."""

    def __init__(self, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.conv = nn.Conv1d(hidden_size, hidden_size, kernel_size=3, padding="same")

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """x (B, T, D), valid (B, T, 1) float32, 1 where valid and 0 in padding -> (B, T, D)."""
        count = valid.sum(dim=(1, 2), keepdim=True) * x.shape[-1]
        centred = at_least_float32(x) * valid
        centred = (centred - centred.sum(dim=(1, 2), keepdim=True) / count) * valid
        variance = centred.square().sum(dim=(1, 2), keepdim=True) / count
        normed = centred * (variance + self.eps).rsqrt() * self.weight + self.bias * valid
        return self.conv(F.silu(normed).to(x.dtype).transpose(1, 2)).transpose(1, 2)


class TemporalTransformer(nn.Module):
    """(B, T, D) features -> pooled (B, D) and sequence (B, T, D).

    Arguments are those of `config.TransformerConfig`. A row's valid positions come first; the values in its padding
    have no influence.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        hidden_act: str,
        max_position_embeddings: int,
        rms_norm_eps: float,
        rope: RopeConfig,
        attention_bias: bool,
        attention_dropout: float,
        attention: str,
    ):
        super().__init__()
        self.head_dim, self.rope, self.max_position = head_dim, rope, max_position_embeddings
        self.states: list[Tensor] | None = None  # where `forward` puts hidden states: see `features.keep_states`
        self.class_token = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.conv_blocks = nn.ModuleList(MaskedConvBlock(hidden_size) for _ in range(2))
        self.layers = nn.ModuleList(
            Block(
                Attention(
                    hidden_size,
                    num_attention_heads,
                    num_key_value_heads,
                    head_dim,
                    rms_norm_eps,
                    attention_bias,
                    attention_dropout,
                    attention,
                ),
                SwiGLU(hidden_size, intermediate_size, hidden_act),
                hidden_size,
                rms_norm_eps,
            )
            for _ in range(num_hidden_layers)
        )
        self.norm = nn.RMSNorm(hidden_size, eps=rms_norm_eps)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """
        Args:
            x: (B, T, D) features.
            mask: (B, T) bool, True where valid, valid positions first; None: all valid.
        Returns:
            pooled (B, D), sequence (B, T, D), and per layer the attention weights (B, H, T+1, T+1) if
            attention="eager", else None.
        Raises:
            ValueError: more positions than `max_position_embeddings`, unless the rotary embedding is "dynamic".
        """
        batch, length, mask = x.shape[0], x.shape[1] + 1, without_full(mask)
        if length > self.max_position and self.rope.rope_type != "dynamic":
            raise ValueError(
                f"{length - 1} positions and a class token are more than max_position_embeddings={self.max_position}: "
                "shorten the clip, raise max_position_embeddings, or set rope_parameters.rope_type=dynamic"
            )
        x = torch.cat((self.class_token.to(x.dtype).expand(batch, -1, -1), x), dim=1)
        full_mask = x.new_ones(batch, length, dtype=torch.bool)
        if mask is not None:
            full_mask = F.pad(mask, (1, 0), value=True)
        valid = full_mask[..., None].float()
        hidden = x
        for block in self.conv_blocks:
            hidden = block(hidden, valid)
        x = x + hidden

        angles = rotary_angles(self.rope, self.head_dim, length, full_mask.sum(1), self.max_position)
        attend_to: Tensor | Packing | None = None if mask is None else full_mask[:, None, None]
        packing = None if mask is None else packing_of(full_mask, x, self.head_dim, self.layers)
        if packing is not None:
            x, angles, attend_to = packing.pack(x), packing.pack(angles), packing
        weights = []
        keep_state(self.states, x, packing)
        for layer in self.layers:
            x, layer_weights = layer(x, angles, attend_to)
            weights.append(layer_weights)
            keep_state(self.states, x, packing)
        x = self.output(self.norm(x))
        if packing is not None:
            x = packing.unpack(x)
        return x[:, 0], x[:, 1:], weights
