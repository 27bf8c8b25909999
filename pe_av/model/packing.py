"""Padded rows packed into one long sequence, in which each row attends to itself alone.

Linear layers, norms and rotary embedding then compute valid positions only. On a CPU, where a single row keeps all
cores busy, attention is computed row by row; on a GPU, in half precision, by flash attention for rows of different
lengths. A GPU's host has to wait for the lengths, once per transformer and forward.
"""

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

MOST_VALID = 0.95  # share of valid positions above which packing costs a CPU more than it saves


@dataclass(frozen=True)
class Packing:
    """Where the valid positions of a padded batch are."""

    mask: Tensor  # (B, T) bool, True where valid, valid positions first
    lengths: list[int]  # valid positions of each row
    reach: int | None = None  # how far a position attends to either side; None: over its whole row
    flash: torch.dtype | None = None  # what flash attention computes in; None: attention row by row

    @cached_property
    def ends(self) -> Tensor:
        """(B + 1,) int32: 0, and where each row ends in the packed sequence."""
        return F.pad(self.mask.sum(1).cumsum(0), (1, 0)).int()

    @cached_property
    def places(self) -> Tensor:
        """(valid positions,) index of each in the flattened batch; made without waiting for a GPU."""
        rows, size = self.mask.shape
        skipped = torch.arange(rows, device=self.mask.device) * size - self.ends[:-1]
        total = sum(self.lengths)
        skipped = skipped.repeat_interleave(self.mask.sum(1), output_size=total)
        return torch.arange(total, device=self.mask.device) + skipped

    def pack(self, x: Tensor) -> Tensor:
        """(B or 1, T, …) -> (1, valid positions, …), row after row."""
        return x.expand(self.mask.shape[0], *x.shape[1:]).flatten(0, 1).index_select(0, self.places)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, valid positions, …) -> (B, T, …), zeros at padding."""
        padded = x.new_zeros(self.mask.numel(), *x.shape[2:]).index_copy(0, self.places, x[0])
        return padded.unflatten(0, self.mask.shape)

    def spans(self) -> Iterator[slice]:
        """The packed positions of each row."""
        end = 0
        for length in self.lengths:
            yield slice(end, end + length)
            end += length

    def row_mask(self, length: int) -> Tensor | None:
        """(1, 1, length, length) bool, True where a query may attend; None: everywhere."""
        if self.reach is None or self.reach >= length - 1:
            return None
        position = torch.arange(length, device=self.mask.device)
        return ((position[:, None] - position).abs() <= self.reach)[None, None]

    def flash_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, H, T, d) and k, v (1, K, T, d), packed -> (1, H, T, d)."""
        k, v = (repeat(x, "1 k t d -> 1 (k g) t d", g=q.shape[1] // k.shape[1]) for x in (k, v))
        q, k, v = (rearrange(x, "1 h t d -> t h d").to(self.flash) for x in (q, k, v))
        window, longest = (-1, -1) if self.reach is None else (self.reach, self.reach), max(self.lengths)
        out = varlen_attn(q, k, v, self.ends, self.ends, longest, longest, window_size=window)
        return rearrange(out, "t h d -> 1 h t d")


def keep_state(states: list[Tensor] | None, x: Tensor, packing: Packing | None) -> None:
    """Append hidden states to the list, if there is one, as padded rows."""
    if states is not None:
        states.append(x if packing is None else packing.unpack(x))


def has_values(mask: Tensor) -> bool:
    """Whether its values can be looked at: not on the meta device, not while shapes alone are traced or compiled."""
    return type(mask) is Tensor and not mask.is_meta and not torch.compiler.is_compiling()


def without_full(mask: Tensor | None) -> Tensor | None:
    """A mask of which all is True, where that is known without waiting for a GPU, is none: attention is faster so."""
    if mask is None or mask.device.type != "cpu" or not has_values(mask):
        return mask
    return None if mask.all() else mask


def packing_of(mask: Tensor, x: Tensor, head_dim: int, layers: Sequence[nn.Module]) -> Packing | None:
    """How to pack a batch for these layers; None where it does not pay, or cannot be done.

    Args:
        mask: (B, T) bool, True where valid, valid positions first.
        x: what the layers compute on, of any shape.
    """
    # what is compiled would be compiled again for every set of lengths
    if not has_values(mask) or any(layer._compiled_call_impl is not None for layer in layers):
        return None
    attentions = [module for layer in layers for module in layer.modules() if hasattr(module, "implementation")]
    kinds = {module.implementation for module in attentions}
    dropout = any(module.training and module.dropout for module in attentions)  # flash attention for rows has none
    flash = None if kinds != {"sdpa"} or dropout else flash_dtype(x, head_dim)
    if flash is not None:
        return Packing(mask, mask.sum(1).tolist(), flash=flash)
    if mask.device.type != "cpu" or "eager" in kinds:  # eager attention returns padded weights
        return None
    lengths = mask.sum(1).tolist()
    return Packing(mask, lengths) if sum(lengths) < MOST_VALID * mask.numel() else None


def flash_dtype(x: Tensor, head_dim: int) -> torch.dtype | None:
    """What flash attention would compute in for `x`, float16 or bfloat16; None: it cannot be used."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    half = x.is_cuda and dtype in (torch.float16, torch.bfloat16)
    return dtype if half and _flash_runs(x.device, dtype, head_dim) else None


@functools.cache
def _flash_runs(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether this GPU and this build of PyTorch have it for such heads, forward and backward."""
    with torch.inference_mode(False), torch.enable_grad():
        q = torch.zeros(3, 1, head_dim, device=device, dtype=dtype, requires_grad=True)
        ends = torch.tensor([0, 1, 3], dtype=torch.int32, device=device)
        try:
            varlen_attn(q, q, q, ends, ends, 2, 2, window_size=(1, 1)).sum().backward()
        except (RuntimeError, NotImplementedError) as error:
            logging.getLogger(__name__).info("padded attention on %s: %s", device, error)
            return False
    return True
