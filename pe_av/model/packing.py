"""Rows of different length without their padding: one long sequence in which each row attends to itself alone.

Linear layers, norms and rotary embedding then compute only what is valid, and attention is computed row by row. It pays
on a CPU, where a row by itself keeps all cores busy; a GPU would wait for the lengths, and computes the padded batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_VALID = 0.95  # share of valid positions above which packing costs more than it saves


@dataclass(frozen=True)
class Packing:
    """Where the valid positions of a padded batch lie.

    Attributes:
        mask: (B, T) bool, True where valid, valid positions first.
        lengths: valid positions of each row.
        window: how far a position looks to either side within its row; None: over all of it.
    """

    mask: Tensor
    lengths: list[int]
    window: int | None = None

    def pack(self, x: Tensor) -> Tensor:
        """(B or 1, T, …) -> (1, valid positions, …), row after row."""
        return x.expand(self.mask.shape[0], *x.shape[1:])[self.mask][None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, valid positions, …) -> (B, T, …), zeros at padding."""
        return x.new_zeros(*self.mask.shape, *x.shape[2:]).index_put((self.mask,), x[0])


def packing_of(mask: Tensor | None, implementation: str) -> Packing | None:
    """How to pack a batch with this mask; None where it does not pay, or cannot be done.

    Args:
        mask: (B, T) bool, True where valid, valid positions first; None: nothing is padded.
        implementation: of attention; "eager" returns weights and so needs them padded.
    """
    if mask is None or mask.device.type != "cpu" or implementation == "eager" or torch.compiler.is_compiling():
        return None
    lengths = mask.sum(1).tolist()
    return Packing(mask, lengths) if sum(lengths) < MOST_VALID * mask.numel() else None
