"""ModernBERT (arXiv 2412.13663). PE-AV's text feature is token 0 of an inner layer, before the final norm."""

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn

from pe_av.model.packing import Packing, keep_state, packing_of, without_full
from pe_av.model.transformer import ACTIVATION, at_least_float32, attend


def rotate_halves(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding: rotate dimensions (i, i + d/2) of (B, H, T, d) by `angles` (T, d/2), in at least float32."""
    first, second = at_least_float32(x).chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


class TextBlock(nn.Module):
    """Pre-norm layer with GeGLU; the first layer of a model has no norm before its attention."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        activation: str,
        eps: float,
        dropout: float,
        is_global: bool,
        first: bool,
        attention: str,
    ):
        super().__init__()
        self.num_heads, self.dropout, self.activation = num_heads, dropout, activation
        self.is_global, self.implementation = is_global, attention
        self.attention_norm = nn.Identity() if first else nn.LayerNorm(hidden_size, eps=eps, bias=False)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.mlp_norm = nn.LayerNorm(hidden_size, eps=eps, bias=False)
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | Packing | None) -> tuple[Tensor, Tensor | None]:
        q, k, v = rearrange(
            self.qkv(self.attention_norm(x)), "b t (three h d) -> three b h t d", three=3, h=self.num_heads
        )
        attended, weights = attend(
            rotate_halves(q, angles),
            rotate_halves(k, angles),
            v,
            mask,
            self.implementation,
            self.dropout if self.training else 0.0,
        )
        x = x + self.out(rearrange(attended, "b h t d -> b t (h d)"))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(ACTIVATION[self.activation](gate) * up), weights


class ModernBERT(nn.Module):
    """(B, T) token ids -> (B, T, D) after layer `nth_text_layer`. Arguments are those of `config.TextConfig`.

    The layers past `nth_text_layer` and the final norm never run. They exist, frozen, so that converting a published
    checkpoint loses no weights.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        hidden_act: str,
        global_attn_every_n_layers: int,
        local_attention: int,
        global_rope_theta: float,
        local_rope_theta: float,
        norm_eps: float,
        attention_dropout: float,
        nth_text_layer: int,
        attention: str,
    ):
        super().__init__()
        self.states: list[Tensor] | None = None  # where `forward` puts hidden states: see `features.keep_states`
        self.reach, self.nth, self.head_dim = local_attention // 2, nth_text_layer, hidden_size // num_attention_heads
        self.rope_theta = {True: global_rope_theta, False: local_rope_theta}  # of global and of local layers
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.embedding_norm = nn.LayerNorm(hidden_size, eps=norm_eps, bias=False)
        self.layers = nn.ModuleList(
            TextBlock(
                hidden_size,
                intermediate_size,
                num_attention_heads,
                hidden_act,
                norm_eps,
                attention_dropout,
                is_global=i % global_attn_every_n_layers == 0,
                first=i == 0,
                attention=attention,
            )
            for i in range(num_hidden_layers)
        )
        self.final_norm = nn.LayerNorm(hidden_size, eps=norm_eps, bias=False)
        for unused in (*self.layers[nth_text_layer:], self.final_norm):
            unused.requires_grad_(False)

    def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor | None]]:
        """
        Args:
            input_ids: (B, T) token ids.
            mask: (B, T) bool, True where valid, valid tokens first; None: all valid.
        Returns:
            hidden states (B, T, D), and per layer the attention weights (B, H, T, T) if attention="eager", else None.
        """
        mask = without_full(mask)
        x = self.embedding_norm(self.embedding(input_ids))
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        exponent = torch.arange(0, self.head_dim, 2, device=x.device, dtype=torch.float32) / self.head_dim
        angles = {
            is_global: position.float()[:, None] / theta**exponent for is_global, theta in self.rope_theta.items()
        }
        distance = (position[:, None] - position).abs()
        everything = None if mask is None else mask[:, None, None]
        window = (distance <= self.reach)[None, None]
        if mask is not None:
            # padding far from every valid token attends to itself, because a softmax over no keys is NaN
            window = window & (everything | (distance == 0))
        masks: dict[bool, Tensor | Packing | None] = {True: everything, False: window}
        packing = None if mask is None else packing_of(mask, x, self.head_dim, self.layers[: self.nth])
        if packing is not None:
            x, angles = packing.pack(x), {kind: packing.pack(a[None])[0] for kind, a in angles.items()}
            masks = {True: packing, False: replace(packing, reach=self.reach)}
        weights = []
        keep_state(self.states, x, packing)
        for layer in self.layers[: self.nth]:
            x, layer_weights = layer(x, angles[layer.is_global], masks[layer.is_global])
            weights.append(layer_weights)
            keep_state(self.states, x, packing)
        return x if packing is None else packing.unpack(x), weights
