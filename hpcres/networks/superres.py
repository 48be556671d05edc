"""The generator of Dahari et al. 2022: low-res one-hot volume and noise in, phase logits out.

Channel counts follow the authors' published network: with s the scale factor and k = ⌈log2 s⌉ − 1, the first
layers have 2^(width + k) / 2 channels and every upsampling halves them. Scale factors above 4 start with a
trilinear ×2 and a convolution, those above 2 have a transposed convolution, and a trilinear upsampling by what
is left (1 to 2) comes last. Published are scale factors up to 8; above, every doubling more is a trilinear ×2 and a
convolution after the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from math import ceil, floor
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcres.networks.resampling import middle, upsample

Padding = Literal["replicate", "zeros"]


def _doublings(scale: Fraction) -> int:
    """k with 2^k < scale ≤ 2^(k+1); 0 for scale 1."""
    k = 0
    while scale > 2 ** (k + 1):
        k += 1
    return k


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, padding: Padding) -> None:
        super().__init__()
        self.conv_in = nn.Conv3d(channels, channels, 3, padding=1, padding_mode=padding)
        self.norm_in = nn.BatchNorm3d(channels)
        self.conv_out = nn.Conv3d(channels, channels, 3, padding=1, padding_mode=padding)
        self.norm_out = nn.BatchNorm3d(channels)

    def forward(self, x: Tensor, cuts: tuple[int, int] = (0, 0)) -> Tensor:
        """Of all of x but the outermost voxels that the convolutions cut."""
        side = functional.relu(self.norm_in(_convolved(self.conv_in, x, cuts[0])))
        return functional.relu(middle(x, sum(cuts)) + self.norm_out(_convolved(self.conv_out, side, cuts[1])))


def _convolved(convolution: nn.Conv3d, x: Tensor, cut: int) -> Tensor:
    """Without the outermost `cut` voxels, of which the first are not computed at all."""
    if not cut:
        padded: Tensor = convolution(x)
        return padded
    return middle(functional.conv3d(x, convolution.weight, convolution.bias), cut - 1)


def _in_channels_last(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The layer of x, computed in channels_last_3d where that is faster: on a CPU in fp32.

    With few channels oneDNN takes 0.3 to 0.9 of the time so, copies included (docs/training.md, Speed). Batch norm is
    given the plain layout, since the CPU's batch norm loses digits in the other one.
    """
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return layer(x)
    return layer(x.contiguous(memory_format=torch.channels_last_3d)).contiguous()


class SuperResGenerator(nn.Module):
    """(batch, low_res_channels + noises, z, y, x) → logits (batch, phases, ⌊z·s⌋, ⌊y·s⌋, ⌊x·s⌋).

    The last input channels are standard normal noise, one for each of `noise_sigma_voxels`, smoothed by a Gaussian of
    that standard deviation in high-res voxels (noise.gaussian_taps); as published one, white. `padding` is 'replicate'
    (as published) or 'zeros' (faster); `last_stage` is 'resize' (as published) or 'transposed' (faster; scale factors
    2, 4, 8, 16 and 32 only).
    """

    def __init__(
        self, low_res_channels: int, phases: int, scale: Fraction, width: int = 8, residual_blocks: int = 1,
        padding: Padding = "replicate", last_stage: str = "resize", noise_sigma_voxels: Sequence[float] = (0.0,),
    ) -> None:  # fmt: skip
        super().__init__()
        if not 1 <= scale <= 32:
            raise ValueError(f"scale factor {scale}: this network reaches 1 to 32")
        doublings = _doublings(scale)
        self.last_scale = scale / 2**doublings
        if last_stage == "transposed" and self.last_scale != 2:
            raise ValueError(
                f"last_stage transposed doubles, but scale factor {scale} ends with {self.last_scale}; use resize"
            )
        self.scale = scale
        self.config: dict[str, Any] = {
            "family": "superres", "low_res_channels": low_res_channels, "phases": phases, "scale": str(scale),
            "width": width, "residual_blocks": residual_blocks, "padding": padding, "last_stage": last_stage,
            "noise_sigma_voxels": list(noise_sigma_voxels),
        }  # fmt: skip
        channels = 2 ** (width + doublings - 1)
        given = low_res_channels + len(noise_sigma_voxels)
        self.conv_first = nn.Conv3d(given, channels, 3, padding=1, padding_mode=padding)
        self.norm_first = nn.BatchNorm3d(channels)
        self.blocks = nn.Sequential(*(ResidualBlock(channels, padding) for _ in range(residual_blocks)))
        self.conv_resize: nn.Conv3d | None = None
        self.conv_resize_more, self.norm_resize_more = nn.ModuleList(), nn.ModuleList()
        self.conv_transposed: nn.Module | None = None
        if doublings >= 2:
            self.conv_resize = nn.Conv3d(channels, channels // 2, 3, padding=1, padding_mode=padding)
            self.norm_resize = nn.BatchNorm3d(channels // 2)
            channels //= 2
        for _ in range(doublings - 2):
            self.conv_resize_more.append(nn.Conv3d(channels, channels // 2, 3, padding=1, padding_mode=padding))
            self.norm_resize_more.append(nn.BatchNorm3d(channels // 2))
            channels //= 2
        if doublings >= 1:
            self.conv_transposed = nn.ConvTranspose3d(channels, channels // 2, 4, stride=2, padding=1)
            self.norm_transposed = nn.BatchNorm3d(channels // 2)
            channels //= 2
        self.conv_last: nn.Module
        if last_stage == "transposed":
            self.conv_last = nn.ConvTranspose3d(channels, channels // 2, 4, stride=2, padding=1)
        else:
            self.conv_last = nn.Conv3d(channels, channels // 2, 3, padding=1, padding_mode=padding)
        self.norm_last = nn.BatchNorm3d(channels // 2)
        self.conv_end = nn.Conv3d(channels // 2, phases, 3, padding=1, padding_mode=padding)

    @property
    def resizes(self) -> list[tuple[nn.Module, nn.Module]]:
        """Convolution and batch norm behind each trilinear ×2, from the coarsest grid on."""
        first = [] if self.conv_resize is None else [(self.conv_resize, self.norm_resize)]
        return [*first, *zip(self.conv_resize_more, self.norm_resize_more, strict=True)]

    @property
    def channels_last(self) -> int:
        """Channels of the widest high-res layer: what the last upsampling takes in."""
        return self.conv_end.in_channels * 2

    def forward(self, x: Tensor, surroundings: int = 0) -> Tensor:
        """Logits of all of x but its outermost `surroundings` voxels (whole high-res ones), whose maps are cut as soon
        as nothing within depends on them."""
        cuts = iter(self._cuts(surroundings))
        first = x = functional.relu(self.norm_first(_convolved(self.conv_first, x, next(cuts))))
        for block in self.blocks:
            x = block(x, (next(cuts), next(cuts)))
        x = x + middle(first, (first.shape[2] - x.shape[2]) // 2)
        for convolution, norm in self.resizes:
            x = functional.relu(norm(convolution(upsample(middle(x, next(cuts)), Fraction(2)))))
        if self.conv_transposed is not None:
            x = functional.relu(self.norm_transposed(self.conv_transposed(middle(x, next(cuts)))))
        x = middle(x, next(cuts))
        if self.config["last_stage"] == "resize":
            x = self.conv_last(upsample(x, self.last_scale))
        else:
            x = _in_channels_last(self.conv_last, x)
        # The ReLU has the memory layout of the convolution; with two layouts its gradient is slower.
        ended = _in_channels_last(lambda x: self.conv_end(functional.relu(x)), self.norm_last(x))
        return middle(ended, next(cuts))

    @property
    def halo_low_res(self) -> int:
        """Low-res voxels beyond a block on which its output can depend, derived layer by layer from the output."""
        halo = 0
        p, q = self.scale.numerator, self.scale.denominator
        for voxel in range(p):  # dependence repeats with p high-res voxels, which are q low-res ones
            first, last = self._read_range(voxel)
            owner = voxel * q // p
            halo = max(halo, owner - first, last - owner)
        return halo

    def _read_range(self, voxel: int) -> tuple[int, int]:
        """First and last low-res index that output index `voxel` reads, were the volume endless."""
        *_, low_res = self._stage_ranges(voxel, voxel)
        return _before_convolutions(low_res, self._low_res_convolutions)

    @property
    def _low_res_convolutions(self) -> int:
        return 1 + 2 * len(self.blocks)

    def _stage_ranges(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """First and last index of what each upsampling takes in that outputs first … last read, from the last one on to
        the low-res maps."""
        first, last = first - 1, last + 1
        if self.config["last_stage"] == "transposed":
            first, last = _transposed_range(first, last)
        else:
            first, last = _linear_range(first - 1, last + 1, self.last_scale)
        yield first, last
        if self.conv_transposed is not None:
            first, last = _transposed_range(first, last)
            yield first, last
        for _ in self.resizes:
            first, last = _linear_range(first - 1, last + 1, Fraction(2))
            yield first, last

    def _cuts(self, surroundings: int) -> list[int]:
        """What to cut off each side of what every low-res convolution gives and every upsampling takes in, and last of
        the output, so that `surroundings` low-res voxels are gone, and nothing was that an output voxel within depends
        on."""
        block, around, grid, cuts = 16 * self.scale.denominator, surroundings, Fraction(1), []
        steps = [Fraction(1)] * self._low_res_convolutions + [Fraction(2)] * _doublings(self.scale) + [self.last_scale]
        ranges = list(self._stage_ranges(0, int(block * self.scale) - 1))[::-1]
        convolutions = [_before_convolutions(ranges[0], left) for left in reversed(range(self._low_res_convolutions))]
        for step, (first, last) in zip(steps, convolutions + ranges, strict=True):
            reach = max(-first, last + 1 - int(block * grid))
            unit = (self.scale / grid).denominator  # what is left stays a whole number of voxels on all grids
            cuts.append(max(0, around - reach) // unit * unit)
            around, grid = int((around - cuts[-1]) * step), grid * step
        return [*cuts, around]


def _before_convolutions(given: tuple[int, int], count: int) -> tuple[int, int]:
    """First and last index that these are made from by so many convolutions of 3 voxels."""
    return given[0] - count, given[1] + count


def _linear_range(first: int, last: int, scale: Fraction) -> tuple[int, int]:
    half = Fraction(1, 2)
    return floor((first + half) / scale - half), ceil((last + half) / scale - half)


def _transposed_range(first: int, last: int) -> tuple[int, int]:
    """Kernel 4, stride 2, padding 1: output o sums inputs i with 0 ≤ o + 1 − 2i ≤ 3."""
    return -((2 - first) // 2), (last + 1) // 2
