"""DAC-VAE encoder (Descript Audio Codec, arXiv 2306.06546, with a variational bottleneck): waveform -> latent means."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Snake(nn.Module):
    """x + sin²(αx) / α, one α per channel (arXiv 2006.08195). It maps 0 to 0, so masked values stay masked."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.alpha * x).sin().square() / (self.alpha + 1e-9)


class ResidualUnit(nn.Module):
    """x + (Snake, dilated convolution of 7, Snake, convolution of 1): (B, C, L) -> (B, C, L)."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.snake1 = Snake(channels)
        self.conv1 = nn.Conv1d(channels, channels, kernel_size=7, dilation=dilation, padding="same")
        self.snake2 = Snake(channels)
        self.conv2 = nn.Conv1d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.snake2(self.conv1(self.snake1(x))))


class Stage(nn.Module):
    """Three residual units, then a strided convolution that doubles the channels: (B, C, L) -> (B, 2C, L/stride)."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.units = nn.ModuleList(ResidualUnit(channels, dilation) for dilation in (1, 3, 9))
        self.snake = Snake(channels)
        self.down = nn.Conv1d(channels, 2 * channels, kernel_size=2 * stride, stride=stride, padding=-(-stride // 2))

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """`valid` (B, 1, L) is 1 inside the clip and 0 in its padding, which is zeroed before every convolution."""
        for unit in self.units:
            x = unit(_masked(x, valid))
        return self.down(self.snake(_masked(x, valid)))


class CodecEncoder(nn.Module):
    """(B, 1, samples) -> (B, samples / hop_length, codebook_dim).

    A row's latents do not depend on its padding or on the other rows: everything past the row's valid positions is
    zeroed before every convolution, which is exactly what a convolution sees beyond the end of an unpadded clip.

    Args:
        encoder_hidden_size: channels after the first convolution.
        downsampling_ratios: stride of each stage; their product is the hop length.
        codebook_dim: width of the latent mean.
        trainable: False freezes the weights and computes no gradients.
        tile_positions: positions to encode at a time, which bounds the memory; None: all at once.
    """

    def __init__(
        self,
        encoder_hidden_size: int,
        downsampling_ratios: list[int],
        codebook_dim: int,
        trainable: bool = False,
        tile_positions: int | None = None,
    ):
        super().__init__()
        self.hop_length, self.trainable, self.tile_positions = math.prod(downsampling_ratios), trainable, tile_positions
        self.conv_in = nn.Conv1d(1, encoder_hidden_size, kernel_size=7, padding=3)
        self.stages = nn.ModuleList(
            Stage(encoder_hidden_size * 2**i, stride) for i, stride in enumerate(downsampling_ratios)
        )
        latent = encoder_hidden_size * 2 ** len(downsampling_ratios)
        self.snake = Snake(latent)
        self.conv_out = nn.Conv1d(latent, latent, kernel_size=3, padding=1)
        self.to_mean = nn.Conv1d(latent, codebook_dim, kernel_size=1)  # the bottleneck; its scale is never used
        self.requires_grad_(trainable)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Random weights that act like a scattering transform (arXiv 1203.1513): random filters, a non-linearity, and a
        low-pass window in every strided convolution. Without the windows, striding aliases high frequencies onto low
        ones and destroys most of the signal; with them, the bands and envelopes of a sound survive."""
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=fan_in**-0.5)
                nn.init.zeros_(module.bias)
        for stage in self.stages:
            weight = stage.down.weight  # (2C, C, 2·stride)
            window = torch.hann_window(weight.shape[2] + 2, periodic=False, device=weight.device)[1:-1]
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            weight.copy_(weight[..., :1] * window / window.sum())

    @torch.no_grad()
    def calibrate(self, waveform: Tensor) -> None:
        """Rescale random weights on real audio (layer-sequential unit variance, arXiv 1511.06422).

        Afterwards the output of every convolution has unit variance per channel, and the outputs of the strided
        convolutions and of the bottleneck have zero mean too.

        Args:
            waveform: (B, 1, samples), whole hops; about twelve seconds in total are enough.
        """

        def rescale(conv: nn.Conv1d, _: tuple[Tensor], output: Tensor) -> Tensor:
            mean, spread = output.mean(dim=(0, 2)), output.std(dim=(0, 2)) + 1e-4
            if conv.stride[0] == 1 and conv is not self.to_mean:
                mean = torch.zeros_like(mean)
            conv.weight /= spread[:, None, None]
            conv.bias.sub_(mean).div_(spread)
            return (output - mean[:, None]) / spread[:, None]  # the rescaled layer's output, as the next layer sees it

        hooks = [m.register_forward_hook(rescale) for m in self.modules() if isinstance(m, nn.Conv1d)]
        self._encode(waveform, None)
        for hook in hooks:
            hook.remove()

    @property
    def halo_positions(self) -> int:
        """Positions on either side within the receptive field of one position."""
        reach, rate = 3, 1  # in samples; `rate` is samples per step at the current depth
        for stage in self.stages:
            stride = stage.down.stride[0]
            reach += rate * (3 * (1 + 3 + 9) + 2 * stride)
            rate *= stride
        return -(-(reach + rate) // self.hop_length)

    def forward(self, waveform: Tensor, position_mask: Tensor | None = None) -> Tensor:
        """
        Args:
            waveform: (B, 1, samples), whole hops.
            position_mask: (B, samples / hop_length) bool, True where valid; None: all valid.
        """
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            positions = waveform.shape[-1] // self.hop_length
            if self.tile_positions is None or positions <= self.tile_positions:
                return self._encode(waveform, position_mask)
            if position_mask is None:
                position_mask = waveform.new_ones(waveform.shape[0], positions, dtype=torch.bool)
            halo, tile = self.halo_positions, self.tile_positions
            right = halo + (-positions) % tile
            waveform = F.pad(waveform, (halo * self.hop_length, right * self.hop_length))
            position_mask = F.pad(position_mask, (halo, right))
            tiles = [
                self._encode(
                    waveform[..., start * self.hop_length : (start + tile + 2 * halo) * self.hop_length],
                    position_mask[:, start : start + tile + 2 * halo],
                )[:, halo : halo + tile]
                for start in range(0, positions, tile)
            ]
            return torch.cat(tiles, dim=1)[:, :positions]

    def _encode(self, waveform: Tensor, position_mask: Tensor | None) -> Tensor:
        rate = self.hop_length  # steps per position at the current depth
        valid = None if position_mask is None else position_mask[:, None].to(waveform.dtype)
        x = self.conv_in(_masked(waveform, _repeated(valid, rate)))
        for stage in self.stages:
            x = stage(x, _repeated(valid, rate))
            rate //= stage.down.stride[0]
        return self.to_mean(self.conv_out(_masked(self.snake(x), valid))).transpose(1, 2)


def _repeated(valid: Tensor | None, times: int) -> Tensor | None:
    return None if valid is None else valid.repeat_interleave(times, dim=-1)


def _masked(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else x * valid
