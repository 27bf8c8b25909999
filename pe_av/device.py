"""Where to compute and in what precision."""

from contextlib import AbstractContextManager

import torch

from pe_av.config import ConfigError


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def computes_in_bf16(precision: str, device: torch.device) -> bool:
    """Whether `precision_context` casts to bfloat16: if it is asked for, or for "auto" on a GPU that computes in it."""
    capable = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and not capable:
        raise ConfigError("precision=bf16: this GPU does not compute in bfloat16; use precision=fp32")
    return precision == "bf16" or (precision == "auto" and device.type == "cuda" and capable)


def precision_context(precision: str, device: torch.device) -> AbstractContextManager:
    """Autocast to bfloat16, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=computes_in_bf16(precision, device))
