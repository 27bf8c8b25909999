"""Deterministic weights and inputs for the golden fixture beside this file.

Nothing large is stored: every tensor is a function of its own name, so a test rebuilds the checkpoint from
`keys.json` (name -> shape) and compares with `expected.safetensors`, which holds what the original
implementation computed from the same tensors in float32 on a CPU.
"""

import json
import zlib
from pathlib import Path

import torch

HERE = Path(__file__).parent


def tensor_for(name: str, shape: list[int]) -> torch.Tensor:
    """Value of parameter `name`: norm weights near 1, Snake alphas above 1, matrices scaled by fan-in."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if "alpha" in name:
        return 1 + 0.3 * noise.abs()
    if name.endswith("weight") and len(shape) == 1:
        return 1 + 0.3 * noise
    if len(shape) >= 2:
        return noise / max(1.0, noise[0].numel()) ** 0.5
    return 0.1 * noise


def state_dict(keys: Path = HERE / "keys.json") -> dict[str, torch.Tensor]:
    return {name: tensor_for(name, shape) for name, shape in json.loads(keys.read_text()).items()}


def inputs(row: int, spec: Path = HERE / "inputs.json") -> dict[str, torch.Tensor]:
    """Row `row` alone, with no padding: `input_ids` (1, T), `input_values` (1, 1, samples), `pixel_values_videos`
    (1, F, 3, S, S)."""
    s = json.loads(spec.read_text())
    g = torch.Generator().manual_seed(s["seed"])
    rows = s["rows"]
    tokens, frames, hops = (max(r[k] for r in rows) for k in ("tokens", "frames", "hops"))
    ids = torch.randint(3, s["vocab_size"], (len(rows), tokens), generator=g)
    wav = 0.1 * torch.randn(len(rows), 1, hops * s["hop_length"], generator=g)
    video = torch.randn(len(rows), frames, 3, s["image_size"], s["image_size"], generator=g).clamp(-1, 1)
    r = rows[row]
    return {
        "input_ids": ids[row : row + 1, : r["tokens"]],
        "input_values": wav[row : row + 1, :, : r["hops"] * s["hop_length"]],
        "pixel_values_videos": video[row : row + 1, : r["frames"]],
    }
