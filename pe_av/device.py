"""The device and the precision to compute in, and the way of a batch to the device."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from pe_av.config import ConfigError


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA if there is a GPU, otherwise the CPU.

    Raises:
        ConfigError: there is no such device, or it cannot be used here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def computes_in_bf16(precision: str, device: torch.device) -> bool:
    """Whether `precision_context` casts to bfloat16: for "bf16", and for "auto" on a GPU with bfloat16 arithmetic.

    Raises:
        ConfigError: "bf16" on a GPU without it.
    """
    capable = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and not capable:
        raise ConfigError("precision=bf16: this GPU does not compute in bfloat16; use precision=fp32")
    return precision == "bf16" or (precision == "auto" and device.type == "cuda" and capable)


def precision_context(precision: str, device: torch.device) -> AbstractContextManager:
    """Autocast to bfloat16, or a context that changes nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=computes_in_bf16(precision, device))


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch or micro-batch with its tensors, also those in nested dicts, on the device."""
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    return batch.to(device, non_blocking=True) if isinstance(batch, Tensor) else batch


def pinned(batch: Any) -> Any:
    """A batch with its tensors in page-locked memory, from which they travel to a GPU while it computes."""
    if isinstance(batch, dict):
        return {name: pinned(value) for name, value in batch.items()}
    return batch.pin_memory() if isinstance(batch, Tensor) else batch
