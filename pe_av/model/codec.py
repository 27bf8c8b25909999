"""DAC-VAE encoder (Descript Audio Codec, arXiv 2306.06546, with a variational bottleneck): waveform -> latent means.

A frozen codec, as it nearly always is, encodes every row without its padding, in tiles that bound the memory, and
each stage of a tile in blocks that fit into the processor's cache. Tiles and blocks overlap by the receptive field of
their convolutions, so the latents are those of the whole waveform. A GPU, which one row does not fill, encodes rows of
similar lengths together. A codec that learns encodes padded batches at once.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_av.model.fast_snake import EPSILON, snake
from pe_av.model.packing import has_values

BLOCK_VALUES = 2**19  # of a feature map that a thread computes at a time, so that they stay in the cache
# by type of device: the tiles that are encoded at a time, and the share of them that may be padding. On a GPU, eight
# tiles of ten seconds take 4 GB in float32, and a launch costs as much as a little padding.
ROWS_TOGETHER = {"cpu": (1, 0.0), "cuda": (8, 0.15)}


class Snake(nn.Module):
    """x + sin²(αx) / α, one α per channel (arXiv 2006.08195). It maps 0 to 0, so masked values stay masked."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler fuses the plain formula
            return x + (self.alpha * x).sin().square() / (self.alpha + EPSILON)
        return snake(x, self.alpha)


class SameConv(nn.Conv1d):
    """A dilated convolution that keeps the length: (B, C, L) -> (B, C, L)."""

    def __init__(self, channels: int, kernel_size: int, dilation: int):
        super().__init__(channels, channels, kernel_size, dilation=dilation, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu:
            return super().forward(x)
        # padded beforehand: where a CPU's kernels pad dilated rows themselves, they take up to four times as long
        reach = self.dilation[0] * (self.kernel_size[0] - 1) // 2
        return F.conv1d(F.pad(x, (reach, reach)), self.weight, self.bias, dilation=self.dilation)


class ResidualUnit(nn.Module):
    """x + (Snake, dilated convolution of 7, Snake, convolution of 1): (B, C, L) -> (B, C, L)."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.snake1 = Snake(channels)
        self.conv1 = SameConv(channels, kernel_size=7, dilation=dilation)
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

    @property
    def halo(self) -> int:
        """Input steps on either side within the receptive field of an output, rounded up to whole strides."""
        stride = self.down.stride[0]
        return -(-(3 * (1 + 3 + 9) + self.down.padding[0]) // stride) * stride

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """`valid` (B, 1, L) is 1 inside the clip and 0 in its padding, which is zeroed before every convolution."""
        for unit in self.units:
            x = unit(_masked(x, valid))
        return self.down(self.snake(_masked(x, valid)))


class CodecEncoder(nn.Module):
    """(B, 1, samples) -> (B, samples / hop_length, codebook_dim).

    A row's latents do not depend on its padding or on the other rows.

    Args:
        encoder_hidden_size: channels after the first convolution.
        downsampling_ratios: stride of each stage; their product is the hop length.
        codebook_dim: width of the latent mean.
        trainable: False freezes the weights and computes no gradients.
        tile_positions: positions that a frozen codec encodes at a time, which bounds the memory.
    """

    def __init__(
        self,
        encoder_hidden_size: int,
        downsampling_ratios: list[int],
        codebook_dim: int,
        trainable: bool = False,
        tile_positions: int = 250,
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
        if self.conv_in.weight.is_meta:  # has no values, and computing with none imports PyTorch's compiler
            return
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
            position_mask: (B, samples / hop_length) bool, True where valid, valid positions first; None: all valid.
        Returns:
            (B, samples / hop_length, codebook_dim) latents, meaningless at padding.
        """
        learning = self.trainable and torch.is_grad_enabled()
        if learning or not has_values(waveform):
            with torch.set_grad_enabled(learning):
                return self._encode(waveform, position_mask)
        with torch.no_grad():
            return self._encode_rows(waveform, position_mask)

    def _encode_rows(self, waveform: Tensor, position_mask: Tensor | None) -> Tensor:
        """Rows of the same or of similar lengths together, the others alone; positions past a row's end stay zero."""
        rows, positions, hop = len(waveform), waveform.shape[-1] // self.hop_length, self.hop_length
        lengths = [positions] * rows if position_mask is None else position_mask.sum(1).tolist()
        tiles, padding = ROWS_TOGETHER.get(waveform.device.type, (1, 0.0))
        latents = waveform.new_zeros(rows, positions, self.to_mean.out_channels)
        groups = rows_together(lengths, tiles * self.tile_positions, padding)
        # to the GPU at once, as the host waits for every copy
        chosen = torch.tensor(sum(groups, []), dtype=torch.long, device=waveform.device).split([len(g) for g in groups])
        for group, some in zip(groups, chosen, strict=True):
            longest = lengths[group[0]]
            # one row is a view: an hour of sound is not copied
            part = (waveform[group[0] :][:1] if len(group) == 1 else waveform[some])[..., : longest * hop]
            if lengths[group[-1]] == longest:
                encoded = self._encode_tiles(part, tiles * self.tile_positions // len(group))
            else:
                mask = position_mask[some, :longest]
                encoded = self._encode(part, mask) * mask[..., None]
            latents[some, :longest] = encoded.to(latents)
        return latents

    def _encode_tiles(self, waveform: Tensor, tile: int) -> Tensor:
        """Rows without padding, so many positions and their halo at a time."""
        positions, halo, hop = waveform.shape[-1] // self.hop_length, self.halo_positions, self.hop_length
        tiles = []
        for start in range(0, positions, tile):
            first, last = max(start - halo, 0), start + tile + halo
            latents = self._encode_blocks(waveform[..., first * hop : last * hop])
            tiles.append(latents[:, start - first : start - first + tile])
        return torch.cat(tiles, dim=1)

    def _encode_blocks(self, waveform: Tensor) -> Tensor:
        """One tile, each stage in blocks."""
        first, *rest = self.stages
        x = _in_blocks(lambda x: first(self.conv_in(x)), waveform, first, self.conv_in.padding[0])
        for stage in rest:
            x = _in_blocks(stage, x, stage)
        return self.to_mean(self.conv_out(self.snake(x))).transpose(1, 2)

    def _encode(self, waveform: Tensor, position_mask: Tensor | None) -> Tensor:
        """The padded batch in one piece.

        Everything past a row's valid positions is zeroed before every convolution, which is exactly what a convolution
        sees beyond the end of an unpadded clip.
        """
        rate = self.hop_length  # steps per position at the current depth
        valid = None if position_mask is None else position_mask[:, None].to(waveform.dtype)
        x = self.conv_in(_masked(waveform, _repeated(valid, rate)))
        for stage in self.stages:
            x = stage(x, _repeated(valid, rate))
            rate //= stage.down.stride[0]
        return self.to_mean(self.conv_out(_masked(self.snake(x), valid))).transpose(1, 2)


def rows_together(lengths: list[int], most_positions: int, most_padding: float) -> list[list[int]]:
    """Which rows to encode together: rows that are not empty, the longest of a group first.

    A group has at most `most_positions`, padding included, of which at most the share `most_padding` is padding; a row
    that is longer is alone.
    """
    groups: list[list[int]] = []
    for row in sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row]):
        if groups:
            size = lengths[groups[-1][0]] * (len(groups[-1]) + 1)
            padding = size - sum(lengths[other] for other in groups[-1]) - lengths[row]
            if size <= most_positions and padding <= most_padding * size:
                groups[-1].append(row)
                continue
        groups.append([row])
    return groups


def _in_blocks(encode: Callable[[Tensor], Tensor], x: Tensor, stage: Stage, reach: int = 0) -> Tensor:
    """`encode(x)` of a stage, or of layers that end with one and see `reach` steps more, a block of steps at a time."""
    stride, channels = stage.down.stride[0], stage.down.in_channels
    block = max(BLOCK_VALUES * torch.get_num_threads() // (len(x) * channels), 1) // stride * stride
    halo = stage.halo + -(-reach // stride) * stride
    if x.is_cuda or block < 8 * halo or block >= x.shape[-1]:
        return encode(x)
    blocks = []
    for start in range(0, x.shape[-1], block):
        first, last = max(start - halo, 0), start + block + halo
        blocks.append(encode(x[..., first:last])[..., (start - first) // stride : (start - first + block) // stride])
    return torch.cat(blocks, dim=-1)


def _repeated(valid: Tensor | None, times: int) -> Tensor | None:
    return None if valid is None else valid.repeat_interleave(times, dim=-1)


def _masked(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else x * valid
