"""DAC-VAE encoder (Descript Audio Codec, arXiv 2306.06546, with a variational bottleneck): waveform -> latent means.

While the codec is frozen, which it nearly always is, each row is encoded without its padding, in tiles that bound the
memory, and each stage of a tile in blocks that fit into the processor's cache. Tiles and blocks overlap by what their
convolutions can see, so the latents are those of the whole waveform. A codec that learns is encoded in one piece.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

BLOCK_VALUES = 2**18  # values of a map that are computed at a time: with what is made on the way, they fit into a cache


class Snake(nn.Module):
    """x + sin²(αx) / α, one α per channel (arXiv 2006.08195). It keeps zeros zero, which masking relies on."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return x + (self.alpha * x).sin().square() / (self.alpha + 1e-9)
        wave = (self.alpha * x).sin_()
        return torch.addcmul(x, wave.mul_(wave), 1 / (self.alpha + 1e-9))


class ResidualUnit(nn.Module):
    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.snake1 = Snake(channels)
        self.conv1 = nn.Conv1d(channels, channels, kernel_size=7, dilation=dilation, padding="same")
        self.snake2 = Snake(channels)
        self.conv2 = nn.Conv1d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        change = self.conv2(self.snake2(self.conv1(self.snake1(x))))
        return x + change if torch.is_grad_enabled() else change.add_(x)


class Stage(nn.Module):
    """Three residual units, then a strided convolution that doubles the channels: (B, C, L) -> (B, 2C, L/stride)."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.units = nn.ModuleList(ResidualUnit(channels, dilation) for dilation in (1, 3, 9))
        self.snake = Snake(channels)
        self.down = nn.Conv1d(channels, 2 * channels, kernel_size=2 * stride, stride=stride, padding=-(-stride // 2))

    @property
    def halo(self) -> int:
        """Positions on either side that one position of the output can see: whole strides, at least."""
        stride = self.down.stride[0]
        return -(-(3 * (1 + 3 + 9) + self.down.padding[0]) // stride) * stride

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """`valid` (B, 1, L) of 0 and 1: what every convolution must see as silence outside the clip is set to zero."""
        for unit in self.units:
            x = unit(_masked(x, valid))
        return self.down(self.snake(_masked(x, valid)))


class CodecEncoder(nn.Module):
    """(B, 1, samples) -> (B, samples / hop_length, codebook_dim).

    A row's latents do not depend on what it is padded with or batched with.

    Args:
        encoder_hidden_size: channels after the first convolution.
        downsampling_ratios: stride of each stage; their product is the hop length.
        codebook_dim: width of the latent mean.
        tile_frames: latent frames that a frozen codec encodes at a time, which bounds the memory.
    """

    def __init__(
        self,
        encoder_hidden_size: int,
        downsampling_ratios: list[int],
        codebook_dim: int,
        trainable: bool = False,
        tile_frames: int = 250,
    ):
        super().__init__()
        self.hop_length, self.trainable, self.tile_frames = math.prod(downsampling_ratios), trainable, tile_frames
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
        """Random weights as a scattering transform (arXiv 1203.1513): random filters, a non-linearity, and low-pass
        windows where the rate falls. Plain random strides fold high frequencies onto low ones, and little of a sound
        can be read from what remains; these keep its bands and envelopes."""
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
        """Scale random weights so that every convolution gives unit variance per channel on real sound, and centre
        what the strided ones and the bottleneck give (layer-sequential unit variance, arXiv 1511.06422).

        Args:
            waveform: (B, 1, samples), whole hops; a dozen seconds are enough.
        """

        def rescale(conv: nn.Conv1d, _: tuple[Tensor], output: Tensor) -> Tensor:
            mean, spread = output.mean(dim=(0, 2)), output.std(dim=(0, 2)) + 1e-4
            if conv.stride[0] == 1 and conv is not self.to_mean:
                mean = torch.zeros_like(mean)
            conv.weight /= spread[:, None, None]
            conv.bias.sub_(mean).div_(spread)
            return (output - mean[:, None]) / spread[:, None]  # what the rescaled layer gives: the next one sees that

        hooks = [m.register_forward_hook(rescale) for m in self.modules() if isinstance(m, nn.Conv1d)]
        self._encode(waveform, None)
        for hook in hooks:
            hook.remove()

    @property
    def halo_frames(self) -> int:
        """Latent frames on either side that one latent frame can see."""
        reach, rate = 3, 1  # in samples, and samples per position at the present depth
        for stage in self.stages:
            stride = stage.down.stride[0]
            reach += rate * (3 * (1 + 3 + 9) + 2 * stride)
            rate *= stride
        return -(-(reach + rate) // self.hop_length)

    def forward(self, waveform: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """
        Args:
            waveform: (B, 1, samples), samples a multiple of the hop length.
            frame_mask: (B, frames) bool, True where valid, valid frames first; None: all valid.
        Returns:
            (B, frames, codebook_dim) latents; at padding they mean nothing.
        """
        if self.trainable and torch.is_grad_enabled() or waveform.is_meta or torch.compiler.is_compiling():
            with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
                return self._encode(waveform, frame_mask)
        with torch.no_grad():
            frames = waveform.shape[-1] // self.hop_length
            lengths = [frames] * len(waveform) if frame_mask is None else frame_mask.sum(1).tolist()
            latents: Tensor | None = None
            for length in dict.fromkeys(lengths):
                rows = [row for row, other in enumerate(lengths) if other == length]
                for some in _pieces(rows, length, self.tile_frames):
                    found = self._encode_tiles(waveform[some, :, : length * self.hop_length])
                    if latents is None:
                        latents = found.new_zeros(len(waveform), frames, found.shape[-1])
                    latents[some, :length] = found
            return latents

    def _encode_tiles(self, waveform: Tensor) -> Tensor:
        """Rows without padding, a tile at a time."""
        frames, tile, halo = waveform.shape[-1] // self.hop_length, self.tile_frames, self.halo_frames
        tiles = []
        for start in range(0, frames, tile):
            first, last = max(start - halo, 0), min(start + tile + halo, frames)
            latents = self._encode_blocks(waveform[..., first * self.hop_length : last * self.hop_length])
            tiles.append(latents[:, start - first : start - first + tile])
        return torch.cat(tiles, dim=1)

    def _encode_blocks(self, waveform: Tensor) -> Tensor:
        """One tile, each stage in blocks."""
        first, *rest = self.stages
        x = _in_blocks(lambda x: first(self.conv_in(x)), waveform, first, 3)
        for stage in rest:
            x = _in_blocks(stage, x, stage)
        return self.to_mean(self.conv_out(self.snake(x))).transpose(1, 2)

    def _encode(self, waveform: Tensor, frame_mask: Tensor | None) -> Tensor:
        """All at once, and so that a gradient can flow.

        After every layer, what lies outside a row's valid frames is set to zero, which is what the convolutions' own
        padding shows them at the end of a clip.
        """
        rate = self.hop_length  # positions per latent frame at the present depth
        valid = None if frame_mask is None else frame_mask[:, None].to(waveform.dtype)
        x = self.conv_in(_masked(waveform, _repeated(valid, rate)))
        for stage in self.stages:
            x = stage(x, _repeated(valid, rate))
            rate //= stage.down.stride[0]
        return self.to_mean(self.conv_out(_masked(self.snake(x), valid))).transpose(1, 2)


def _pieces(rows: list[int], length: int, tile: int) -> list[list[int]]:
    """Rows that are encoded together: as many as one tile has frames for."""
    count = max(1, tile // length)
    return [rows[start : start + count] for start in range(0, len(rows), count)]


def _in_blocks(encode: Callable[[Tensor], Tensor], x: Tensor, stage: Stage, more: int = 0) -> Tensor:
    """`encode(x)` of a stage, or of what ends with one and sees `more` positions, a cache's worth of them at a time."""
    length, stride, channels = x.shape[-1], stage.down.stride[0], stage.down.in_channels
    block = max(BLOCK_VALUES // (x.shape[0] * channels), 1) // stride * stride
    halo = stage.halo + -(-more // stride) * stride
    if x.is_cuda or block < 8 * halo or block >= length:
        return encode(x)
    blocks = []
    for start in range(0, length, block):
        first, last = max(start - halo, 0), min(start + block + halo, length)
        blocks.append(encode(x[..., first:last])[..., (start - first) // stride : (start - first + block) // stride])
    return torch.cat(blocks, dim=-1)


def _repeated(valid: Tensor | None, times: int) -> Tensor | None:
    return None if valid is None else valid.repeat_interleave(times, dim=-1)


def _masked(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else x * valid
