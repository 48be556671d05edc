"""The generator of Dahari et al. 2022: from a low-res one-hot volume and noise to phase logits.

Channel counts follow the authors' published network: with s the scale factor and k = ⌈log2 s⌉ − 1, the first
layers have 2^(width + k) / 2 channels and every upsampling halves them. Scale factors above 4 start with a
trilinear ×2 and a convolution. Those above 2 have a transposed convolution. A trilinear upsampling by what is left
(1 to 2) comes last. Scale factors up to 8 are published. Above 8, every further doubling is one more trilinear ×2 with
a convolution, after the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcres.networks.generator import Generator
from hpcres.networks.resampling import center_crop, upsample
from hpcres.networks.stages import Inputs, Kind, Padding, Stage, Stages, folded_weights


def _doublings(scale: Fraction) -> int:
    """Return the integer k with 2^k < scale ≤ 2^(k+1); 0 for scale 1."""
    k = 0
    while scale > 2 ** (k + 1):
        k += 1
    return k


class ResidualBlock(nn.Module):
    """Two convolutions of 3³ with batch norm, whose output is added to the input before the last ReLU."""

    def __init__(self, channels: int, padding: Padding) -> None:
        super().__init__()
        self.conv_in = nn.Conv3d(channels, channels, 3, padding=1, padding_mode=padding)
        self.norm_in = nn.BatchNorm3d(channels)
        self.conv_out = nn.Conv3d(channels, channels, 3, padding=1, padding_mode=padding)
        self.norm_out = nn.BatchNorm3d(channels)

    def forward(self, x: Tensor, cuts: tuple[int, int] = (0, 0)) -> Tensor:
        """Return the output for all of x but the outermost voxels that the convolutions cut.

        Parameters
        ----------
        x
            (batch, channels, z, y, x).
        cuts
            Voxels that each of the two convolutions cuts at every side.

        Returns
        -------
        Tensor
            (batch, channels, z, y, x), smaller by the sum of `cuts` at every side.
        """
        side = functional.relu(self.norm_in(_convolved(self.conv_in, x, cuts[0])))
        return functional.relu(center_crop(x, sum(cuts)) + self.norm_out(_convolved(self.conv_out, side, cuts[1])))


def _convolved(convolution: nn.Conv3d, x: Tensor, cut: int) -> Tensor:
    """Convolve and cut the outermost `cut` voxels, of which the first are not computed at all."""
    if not cut:
        padded: Tensor = convolution(x)
        return padded
    return center_crop(functional.conv3d(x, convolution.weight, convolution.bias), cut - 1)


def _in_channels_last(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply the layer to x, in channels_last_3d where that is faster: on a CPU in fp32.

    With few channels oneDNN takes 0.3 to 0.9 of the time in this layout, copies included (docs/training.md, Speed).
    Batch norm is given the plain layout, since the CPU's batch norm loses digits in channels_last_3d.
    """
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return layer(x)
    return layer(x.contiguous(memory_format=torch.channels_last_3d)).contiguous()


def _normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply batch norm to x in its memory layout, computed in the plain one where that is faster.

    In channels_last_3d each CPU thread adds into a sum for each channel, in the backward pass. Sums of fewer than 16
    channels lie in one cache line with those of the next thread, and then two threads take three times as long as one
    (docs/training.md, Speed).
    """
    last = x.is_contiguous(memory_format=torch.channels_last_3d)
    if x.device.type == "cpu" and last and x.shape[1] < 16 and torch.get_num_threads() > 1:
        return norm(x.contiguous()).contiguous(memory_format=torch.channels_last_3d)
    return norm(x)


class SuperResGenerator(Generator):
    """Generator (batch, low_res_channels + noises, z, y, x) → logits (batch, phases, ⌊z·s⌋, ⌊y·s⌋, ⌊x·s⌋).

    Parameters
    ----------
    low_res_channels
        Channels of the low-res volume.
    phases
        Number of phases.
    scale
        Scale factor s, 1 to 32.
    width
        Exponent of the channel counts, as in the description of the module.
    residual_blocks
        Number of residual blocks.
    padding
        'replicate' (as published) or 'zeros' (faster).
    last_stage
        'resize' (as published) or 'transposed' (faster; scale factors 2, 4, 8, 16 and 32 only).
    noise_sigma_voxels
        The last input channels are standard normal noise, one for each value, smoothed by a Gaussian of that standard
        deviation in high-res voxels (noise.gaussian_taps). As published: one channel, white (0).

    Raises
    ------
    ValueError
        Where the scale factor is not in 1 to 32, or does not fit a transposed last stage.
    """

    def __init__(
        self,
        low_res_channels: int,
        phases: int,
        scale: Fraction,
        width: int = 8,
        residual_blocks: int = 1,
        padding: Padding = "replicate",
        last_stage: str = "resize",
        noise_sigma_voxels: Sequence[float] = (0.0,),
    ) -> None:
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
            "family": "superres",
            "low_res_channels": low_res_channels,
            "phases": phases,
            "scale": str(scale),
            "width": width,
            "residual_blocks": residual_blocks,
            "padding": padding,
            "last_stage": last_stage,
            "noise_sigma_voxels": list(noise_sigma_voxels),
        }
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
        """Channels of the widest high-res layer: those that the last upsampling takes."""
        return self.conv_end.in_channels * 2

    def forward(self, x: Tensor, context: int = 0) -> Tensor:
        """Return the logits of all of x but its outermost `context` voxels.

        Maps are cut as soon as nothing within depends on what is cut.

        Parameters
        ----------
        x
            (batch, low_res_channels + noises, z, y, x).
        context
            Low-res voxels at every side whose output is not asked for; they are a whole number of high-res voxels.

        Returns
        -------
        Tensor
            Logits (batch, phases, z, y, x) of high-res voxels.
        """
        cuts = iter(self._cuts(context))
        first = x = functional.relu(self.norm_first(_convolved(self.conv_first, x, next(cuts))))
        for block in self.blocks:
            x = block(x, (next(cuts), next(cuts)))
        x = x + center_crop(first, (first.shape[2] - x.shape[2]) // 2)
        for convolution, norm in self.resizes:
            x = center_crop(functional.relu(norm(convolution(upsample(x, Fraction(2))))), next(cuts))
        if self.conv_transposed is not None:
            x = center_crop(functional.relu(self.norm_transposed(self.conv_transposed(x))), next(cuts))
        if self.config["last_stage"] == "resize":
            x = self.conv_last(upsample(x, self.last_scale))
        else:
            x = _in_channels_last(self.conv_last, x)
        # The ReLU has the memory layout of the convolution; with two layouts its gradient is slower.
        ended = _in_channels_last(lambda x: self.conv_end(functional.relu(x)), _normalised(self.norm_last, x))
        return center_crop(ended, sum(cuts))

    @property
    def phases(self) -> int:
        """Number of labels of the output."""
        return self.conv_end.out_channels

    @property
    def inputs(self) -> Inputs:
        """What the generator is given at each low-res voxel."""
        return Inputs(self.config["low_res_channels"], tuple(self.config["noise_sigma_voxels"]))

    @property
    def halo_low_res(self) -> int:
        """Low-res voxels beyond a block on which its output can depend."""
        return self._structure.halo_low_res

    def stages(self) -> Stages:
        """Return stages equal to `self.eval()` up to rounding.

        The running statistics of batch norm are used, whether the network is in eval mode or not.
        """
        with_weights = []
        for stage, layer, norm in self._layers():
            weight, bias = folded_weights(layer, norm)
            with_weights.append(replace(stage, weight=weight, bias=bias))
        if not self.blocks:  # first + first, and relu(2 a) is 2 relu(a)
            first = with_weights[0]
            with_weights[0] = replace(first, weight=2 * first.weight, bias=2 * first.bias)
        return Stages(tuple(with_weights), self.scale)

    def _layers(self) -> Iterator[tuple[Stage, nn.Module, nn.Module | None]]:
        """Yield each stage without its weights, its layer and its batch norm."""
        padding: Padding = self.config["padding"]

        def stage(
            name: str, layer: nn.Module, kind: Kind = "convolution", scale: Fraction = Fraction(1), **more: Any
        ) -> Stage:
            assert isinstance(layer, nn.Conv3d | nn.ConvTranspose3d), layer
            transposed = kind == "transposed"
            return Stage(
                name,
                kind,
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size[0],
                scale=scale,
                padding="zeros" if transposed else padding,
                **more,
            )

        yield stage("first", self.conv_first), self.conv_first, self.norm_first
        for index, block in enumerate(self.blocks):
            assert isinstance(block, ResidualBlock), block
            yield stage(f"block {index} in", block.conv_in), block.conv_in, block.norm_in
            joined = replace(
                stage(f"block {index} out", block.conv_out),
                add_before=2 * index,
                add_after=0 if index == len(self.blocks) - 1 else None,
            )
            yield joined, block.conv_out, block.norm_out
        for index, (convolution, norm) in enumerate(self.resizes):
            yield stage(f"resize {index}", convolution, "resized", Fraction(2)), convolution, norm
        if self.conv_transposed is not None:
            doubling = stage("transposed", self.conv_transposed, "transposed", Fraction(2))
            yield doubling, self.conv_transposed, self.norm_transposed
        kind: Kind = "convolution" if self.last_scale == 1 else "resized"
        if self.config["last_stage"] == "transposed":
            kind = "transposed"
        yield stage("last", self.conv_last, kind, self.last_scale), self.conv_last, self.norm_last
        yield stage("end", self.conv_end, activation="none"), self.conv_end, None

    @cached_property
    def _structure(self) -> Stages:
        return Stages(tuple(stage for stage, _, _ in self._layers()), self.scale)

    def _cuts(self, context: int) -> list[int]:
        """Return what is cut behind each stage.

        Nothing is cut between the last two stages, because their batch norm is of the whole map.
        """
        behind = [stage.name for stage in self._structure.stages if stage.name != "last"]
        return self._structure.cuts(context, behind)


def of_study(study: Any) -> SuperResGenerator:
    """Build the untrained generator that a study asks for."""
    net = study.network
    return SuperResGenerator(
        len(study.low_res.groups),
        len(study.phases),
        study.scale_factor,
        net.width,
        net.residual_blocks,
        net.padding,
        net.last_stage,
        net.noise_sigma_voxels,
    )


def of_config(config: dict[str, Any]) -> SuperResGenerator:
    """Build the generator of a checkpoint's `network`, without its weights."""
    return SuperResGenerator(**{**config, "scale": Fraction(config["scale"])})
