"""Low-rank adapters (arXiv 2106.09685): W x + (alpha / rank) · B A x with W frozen; exports merge them into W."""

import torch
from torch import Tensor, nn

from pe_av.config import LoraConfig
from pe_av.model.pe_audio_video import PEAudioVideo


class Adapter(nn.Module):
    """What is added to the output of a linear layer: (…, in) -> (…, out), zero at the start of training."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.scale = alpha / rank
        self.down = nn.Linear(linear.in_features, rank, bias=False, **like)
        self.up = nn.Linear(rank, linear.out_features, bias=False, **like)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x)) * self.scale


def add_adapters(model: PEAudioVideo, config: LoraConfig) -> None:
    """Add an adapter to every linear layer of the repeated blocks, and freeze everything else but heads, scales and
    biases.

    Layers that are frozen already (by `optim.freeze`, or because their features are cached) get no adapter.
    """
    adapted = [
        module
        for block in model.blocks()
        for module in block.modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    ]
    for name, parameter in model.named_parameters():
        if not name.startswith(("heads.", "logits.")):
            parameter.requires_grad_(False)
    for module in adapted:
        module.adapter = Adapter(module, config.rank, config.alpha)
        module.register_forward_hook(lambda module, inputs, output: output + module.adapter(inputs[0]))


@torch.no_grad()
def merged_state_dict(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The `weights` of a model with adapters, turned into those of the same model without: each adapter is added to its
    layer's weight."""
    plain = {name: tensor for name, tensor in weights.items() if ".adapter." not in name}
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            change = weights[f"{name}.up.weight"] @ weights[f"{name}.down.weight"] * module.scale
            layer = f"{name.removesuffix('.adapter')}.weight"
            plain[layer] = plain[layer] + change
    return plain
