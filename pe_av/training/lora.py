"""Low-rank adapters (arXiv 2106.09685): W x + (alpha / rank) · B A x with W frozen, merged back into a plain W."""

import torch
from torch import Tensor, nn

from pe_av.config import LoraConfig
from pe_av.model.pe_audio_video import PEAudioVideo


class Adapter(nn.Module):
    """The change that a linear layer learns: (…, in) -> (…, out), zero at the start."""

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
    """An adapter at every linear layer of the repeated blocks; of the rest only heads, scales and biases train on.

    What is frozen already (`optim.freeze`, a part whose features are cached) stays as it is and gets no adapter.
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
    """`weights` of the model with every adapter merged in, under the names that it has without adapters."""
    plain = {name: tensor for name, tensor in weights.items() if ".adapter." not in name}
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            change = weights[f"{name}.up.weight"] @ weights[f"{name}.down.weight"] * module.scale
            layer = f"{name.removesuffix('.adapter')}.weight"
            plain[layer] = plain[layer] + change
    return plain
