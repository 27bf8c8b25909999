"""Padded rows packed into one long sequence, in which each row attends to itself alone.

Linear layers, norms and rotary embedding then compute valid positions only, and attention is computed row by row. This
pays on a CPU, where a single row keeps all cores busy. A GPU would wait for the lengths; it computes padding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MOST_VALID = 0.95  # share of valid positions above which packing costs more than it saves


@dataclass(frozen=True)
class Packing:
    """Where the valid positions of a padded batch are."""

    mask: Tensor  # (B, T) bool, True where valid, valid positions first
    lengths: list[int]  # valid positions of each row
    reach: int | None = None  # how far a position attends to either side; None: over its whole row

    def pack(self, x: Tensor) -> Tensor:
        """(B or 1, T, …) -> (1, valid positions, …), row after row."""
        return x.expand(self.mask.shape[0], *x.shape[1:])[self.mask][None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, valid positions, …) -> (B, T, …), zeros at padding."""
        return x.new_zeros(*self.mask.shape, *x.shape[2:]).index_put((self.mask,), x[0])

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


def has_values(mask: Tensor) -> bool:
    """Whether its values can be looked at: not on the meta device, not while shapes alone are traced or compiled."""
    return type(mask) is Tensor and not mask.is_meta and not torch.compiler.is_compiling()


def without_full(mask: Tensor | None) -> Tensor | None:
    """A mask of which all is True, where that is known without waiting for a GPU, is none: attention is faster so."""
    if mask is None or mask.device.type != "cpu" or not has_values(mask):
        return mask
    return None if mask.all() else mask


def packing_of(mask: Tensor, layers: Sequence[nn.Module]) -> Packing | None:
    """How to pack a batch for these layers; None where it does not pay, or cannot be done.

    Args:
        mask: (B, T) bool, True where valid, valid positions first.
    """
    # what is compiled would be compiled again for every set of lengths; eager attention returns padded weights
    compiled = any(layer._compiled_call_impl is not None for layer in layers)
    eager = any(getattr(module, "implementation", None) == "eager" for layer in layers for module in layer.modules())
    if mask.device.type != "cpu" or not has_values(mask) or compiled or eager:
        return None
    lengths = mask.sum(1).tolist()
    return Packing(mask, lengths) if sum(lengths) < MOST_VALID * mask.numel() else None
