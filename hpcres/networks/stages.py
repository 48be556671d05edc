"""A network as a list of stages, from which reach, halo, cuts, operations and memory follow, each in one place.

A stage is one layer in eval mode: batch norm is folded into its convolution, in float64. Whatever computes labels is
built from this list and needs no module of torch. Grids are counted in whole voxels from the low-res grid on. A box of
output voxels is a half-open range along each axis, and all axes are alike.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from math import ceil, floor
from typing import Literal

import numpy as np
from torch import Tensor, nn

from hpcres.geometry import Box, triple

Padding = Literal["replicate", "zeros"]
Kind = Literal["convolution", "resized", "transposed", "shuffle"]
Activation = Literal["none", "relu", "leaky", "prelu", "softmax", "sigmoid"]
Interpolation = Literal["linear", "nearest"]
_NOTHING = np.zeros(0)


@dataclass(frozen=True, eq=False)
class Stage:
    """One layer: y = activation(layer(x) + bias + stage[add_before]) + stage[add_after], x the output before it.

    Parameters
    ----------
    name : str
        Unique in its list.
    kind : {'convolution', 'resized', 'transposed', 'shuffle'}
        convolution: of stride 1 and an odd `kernel`, with as many voxels out as in. resized: upsampling by `scale` to
        ⌊n·scale⌋ voxels, trilinear as resampling.upsample does it or nearest, then such a convolution. Both pad what
        they convolve by `padding`. transposed: output o is the sum over the inputs i and taps k with
        o = i·stride + k − crop, (n − 1)·stride + kernel − 2·crop voxels; nothing else is beyond a face. shuffle: no
        weights; r³ channels become r³ voxels, r the scale, channel (c·r + dz)·r² + dy·r + dx being voxel (dz, dy, dx).
    inputs, outputs : int
        Channels.
    kernel : int
        Taps along an axis; odd, except of a transposed convolution.
    activation : {'relu', 'none', 'leaky', 'prelu', 'softmax', 'sigmoid'}
        softmax and sigmoid only at the end of a list: they change no label.
    scale : Fraction
        Output grid over input grid; the stride of a transposed convolution.
    padding : {'replicate', 'zeros'}
        What a convolution reads beyond a face.
    crop : int
        Voxels that a transposed convolution cuts at each side of its output.
    interpolation : {'linear', 'nearest'}
        Upsampling of a resized stage.
    slope : numpy.ndarray
        Factor for negative values: one for leaky; one, or one for each channel, for prelu.
    add_before, add_after : int, optional
        Numbers of earlier stages on the same grid whose outputs are added before and after the activation.
    weight : numpy.ndarray
        float64 (outputs, inputs, kernel, kernel, kernel), of a transposed one (inputs, outputs, …); empty where only
        the structure is known.
    bias : numpy.ndarray
        float64 (outputs,).
    """

    name: str
    kind: Kind
    inputs: int
    outputs: int
    kernel: int = 3
    activation: Activation = "relu"
    scale: Fraction = Fraction(1)
    padding: Padding = "zeros"
    crop: int = 1
    interpolation: Interpolation = "linear"
    slope: np.ndarray = field(default_factory=lambda: _NOTHING)
    add_before: int | None = None
    add_after: int | None = None
    weight: np.ndarray = field(default_factory=lambda: _NOTHING)
    bias: np.ndarray = field(default_factory=lambda: _NOTHING)

    def __post_init__(self) -> None:
        """Check that kernel and scale fit the kind."""
        assert self.kind in ("transposed", "shuffle") or self.kernel % 2 == 1, self
        assert self.kind == "resized" or self.scale.denominator == 1, self
        assert self.kind != "convolution" or self.scale == 1, self

    @property
    def relu(self) -> bool:
        """Whether the activation is a ReLU."""
        return self.activation == "relu"

    @property
    def adds(self) -> tuple[int, ...]:
        """Numbers of the earlier stages whose outputs are added."""
        return tuple(number for number in (self.add_before, self.add_after) if number is not None)

    def reads(self, first: int, last: int) -> tuple[int, int]:
        """Return the input voxels along an axis without ends that outputs first … last depend on.

        Parameters
        ----------
        first, last
            First and last output voxel.

        Returns
        -------
        first, last : int
            First and last input voxel.
        """
        around = self.kernel // 2
        if self.kind == "convolution":
            return first - around, last + around
        if self.kind == "transposed":
            stride = int(self.scale)
            return -((self.kernel - 1 - self.crop - first) // stride), (last + self.crop) // stride
        if self.kind == "shuffle":
            return first // int(self.scale), last // int(self.scale)
        first, last = first - around, last + around
        if self.interpolation == "nearest":
            return floor(first / self.scale), floor(last / self.scale)
        half = Fraction(1, 2)
        return floor((first + half) / self.scale - half), ceil((last + half) / self.scale - half)

    def length(self, voxels: int) -> int:
        """Return the output voxels along an axis of `voxels` input voxels."""
        if self.kind == "transposed":
            return (voxels - 1) * int(self.scale) + self.kernel - 2 * self.crop
        return floor(voxels * self.scale)

    @property
    def multiply_adds(self) -> float:
        """Multiply-adds of one output voxel."""
        if self.kind == "shuffle":
            return 0.0
        taps = self.kernel / float(self.scale) if self.kind == "transposed" else float(self.kernel)
        return self.inputs * self.outputs * taps**3


@dataclass(frozen=True, eq=False)
class Stages:
    """The stages of a generator in order.

    The outputs of the last stage are the logits of the phases, from which labels follow.

    Parameters
    ----------
    stages : tuple of Stage
        The stages, each on the output of the one before it.
    scale : Fraction
        Output voxels per low-res voxel along an axis.
    """

    stages: tuple[Stage, ...]
    scale: Fraction

    def __post_init__(self) -> None:
        """Check that only earlier stages are added and that the scales multiply to `scale`."""
        product = Fraction(1)
        for number, stage in enumerate(self.stages):
            product *= stage.scale
            assert all(other < number for other in stage.adds), stage
        assert product == self.scale, (product, self.scale)

    @property
    def inputs(self) -> int:
        """Channels of what the first stage is given: conditions and latents."""
        return self.stages[0].inputs

    @property
    def phases(self) -> int:
        """Number of phases: the channels of the last stage, or two where a sigmoid of one channel tells the phase."""
        return max(2, self.stages[-1].outputs)

    def needed(self, first: int, last: int, cell: int = 1) -> list[tuple[int, int]]:
        """Return the voxels of each grid along an axis without ends that outputs first … last depend on.

        Parameters
        ----------
        first, last
            First and last output voxel.
        cell
            Voxels of a cell. Where outputs of a stage before the last are computed in whole cells, which begin at
            multiples of `cell`, more inputs are needed.

        Returns
        -------
        list of tuple of int
            First and last voxel: of the low-res grid, and then of the output of each stage.
        """
        found: list[tuple[int, int] | None] = [None] * len(self.stages) + [(first, last)]

        def need(place: int, range_: tuple[int, int]) -> None:
            known = found[place]
            first, last = range_ if known is None else (min(known[0], range_[0]), max(known[1], range_[1]))
            if place:
                first, last = first // cell * cell, (last // cell + 1) * cell - 1
            found[place] = first, last

        for number in reversed(range(len(self.stages))):
            here = found[number + 1]
            assert here is not None
            need(number, self.stages[number].reads(*here))
            for other in self.stages[number].adds:
                need(other + 1, here)
        return [range_ for range_ in found if range_ is not None]

    def grids(self, window: Sequence[int]) -> list[Box]:
        """Return all voxels of each grid over a window.

        Parameters
        ----------
        window
            Low-res voxels along z, y, x.

        Returns
        -------
        list of Box
            The low-res grid, and then the grid of the output of each stage.
        """
        found = [Box.whole(window)]
        for stage in self.stages:
            found.append(Box.whole([stage.length(n) for n in found[-1].shape]))
        return found

    def parts(self, box: Box, window: Sequence[int] | None = None, cell: int = 1) -> list[Box]:
        """Return the voxels of each grid that a box of output voxels depends on.

        Parameters
        ----------
        box
            Output voxels.
        window
            Low-res voxels along z, y, x, where the grids end; None for axes without ends.
        cell
            As of `needed`.

        Returns
        -------
        list of Box
            Voxels of the low-res grid, and then of the output of each stage.
        """
        axes = [self.needed(a, b - 1, cell) for a, b in zip(box.start, box.stop, strict=True)]
        parts = [
            Box(triple([first for first, _ in grid]), triple([last + 1 for _, last in grid]))
            for grid in zip(*axes, strict=True)
        ]
        if window is None:
            return parts
        return [part.clipped(grid) for part, grid in zip(parts, self.grids(window), strict=True)]

    def values(self, parts: Sequence[Box]) -> list[int]:
        """Return how many values some voxels of each grid have: voxels times channels.

        Parameters
        ----------
        parts
            Voxels of the low-res grid, and then of the output of each stage, as of `parts`.

        Returns
        -------
        list of int
            Values of the input of the first stage, and then of the output of each stage.
        """
        channels = [self.inputs, *(stage.outputs for stage in self.stages)]
        return [n * part.voxels for n, part in zip(channels, parts, strict=True)]

    def added_from(self, number: int) -> set[int]:
        """Return the stages before stage `number` whose outputs this stage or a later one adds."""
        return {other for stage in self.stages[number:] for other in stage.adds if other < number}

    def most_held(self, values: Sequence[int], working: Sequence[int]) -> int:
        """Return the most values that are held at a time while stages are computed one after the other.

        The input of a stage is held until its output is complete. An output that a later stage adds is held until then.

        Parameters
        ----------
        values
            Values that are held of the input of the first stage, and then of the output of each stage.
        working
            Values that computing a stage takes beside its input: its output and what it holds meanwhile. There may be
            fewer than stages: the first stages are then meant.

        Returns
        -------
        int
            Number of values.
        """
        most = values[0]
        for number, own in enumerate(working):
            added = sum(values[other + 1] for other in self.added_from(number) if other != number - 1)
            most = max(most, added + values[number] + own)
        return most

    @cached_property
    def halo_low_res(self) -> int:
        """Low-res voxels beyond a block on which its output can depend."""
        p, q = self.scale.numerator, self.scale.denominator
        halo = 0
        for voxel in range(p):  # dependence repeats with p high-res voxels, which are q low-res ones
            first, last = self.needed(voxel, voxel)[0]
            owner = voxel * q // p
            halo = max(halo, owner - first, last - owner)
        return halo

    def cuts(self, context: int, behind: Collection[str]) -> list[int]:
        """Return what to cut off each side of the output of each stage in training.

        In total, `context` low-res voxels around a training cube are cut. Nothing is cut that an output voxel within
        the cube depends on. Only outputs of the stages named in `behind`, and of the last stage, are cut. Batch norm
        sees what is left.

        Parameters
        ----------
        context
            Low-res voxels around a training cube.
        behind
            Names of the stages whose outputs may be cut.

        Returns
        -------
        list of int
            Voxels at each side of the output of each stage.
        """
        block, around, grid, cuts = 16 * self.scale.denominator, context, Fraction(1), []
        needed = self.needed(0, int(block * self.scale) - 1)[1:]
        for stage, (first, last) in zip(self.stages, needed, strict=True):
            around, grid = int(around * stage.scale), grid * stage.scale
            reach = max(-first, last + 1 - int(block * grid))
            unit = (self.scale / grid).denominator  # what is left stays a whole number of voxels on all grids
            cuts.append(max(0, around - reach) // unit * unit if stage.name in behind else 0)
            around -= cuts[-1]
        cuts[-1] += around
        return cuts

    def operations(self, low_res_voxels: float) -> float:
        """Count the floating-point operations of the convolutions: 2 per multiply-add.

        Parameters
        ----------
        low_res_voxels
            Number of low-res voxels.

        Returns
        -------
        float
            Number of operations.
        """
        total, grid = 0.0, float(low_res_voxels)
        for stage in self.stages:
            grid *= float(stage.scale) ** 3
            total += 2 * grid * stage.multiply_adds
        return total


@dataclass(frozen=True)
class Inputs:
    """What a generator is given at each low-res voxel, in this order of channels.

    Parameters
    ----------
    conditions : int
        Channels that a file gives: one-hot labels, probabilities, or fields; 0 for a generator given latents alone.
    latents : tuple of float
        Standard deviation, in high-res voxels, of the Gaussian that smooths each channel of noise; 0 is white noise.
    """

    conditions: int
    latents: tuple[float, ...]

    @property
    def channels(self) -> int:
        """Number of all channels."""
        return self.conditions + len(self.latents)


def folded_weights(layer: nn.Module, norm: nn.Module | None) -> tuple[np.ndarray, np.ndarray]:
    """Return weight and bias of norm(layer(·)), with the running statistics of the batch norm.

    Parameters
    ----------
    layer
        Convolution or transposed convolution.
    norm
        Batch norm behind it, or None.

    Returns
    -------
    weight, bias : numpy.ndarray
        float64, in the shapes of the layer's weight and bias.
    """
    assert isinstance(layer, nn.Conv3d | nn.ConvTranspose3d), layer
    weight, bias = _float64(layer.weight), _float64(layer.bias)
    if norm is None:
        return weight, bias
    assert isinstance(norm, nn.BatchNorm3d), norm
    gain = _float64(norm.weight) / np.sqrt(_float64(norm.running_var) + norm.eps)
    shape = (1, -1, 1, 1, 1) if isinstance(layer, nn.ConvTranspose3d) else (-1, 1, 1, 1, 1)
    return weight * gain.reshape(shape), (bias - _float64(norm.running_mean)) * gain + _float64(norm.bias)


def _float64(tensor: Tensor | None) -> np.ndarray:
    assert tensor is not None
    return tensor.detach().cpu().double().numpy().copy()


def supported(stages: Sequence[Stage]) -> bool:
    """Return whether the Winograd and the polyphase engine compute this list of stages.

    These engines are made for residual and doubling stages. They need kernels of 3, transposed ones of 4 with stride 2
    and crop 1, ReLU before the last stage, and a plain convolution at the end.

    Parameters
    ----------
    stages
        List of stages; their weights are not read.

    Returns
    -------
    bool
        Whether the list fits.
    """
    *before, end = stages
    return (
        len(stages) >= 3
        and all(
            stage.activation == "relu"
            and (
                stage.kernel == 4 and stage.crop == 1 and stage.scale == 2
                if stage.kind == "transposed"
                else stage.kind in ("convolution", "resized") and stage.kernel == 3 and stage.interpolation == "linear"
            )
            for stage in before
        )
        and all(stage.scale in (1, 2) for stage in before[:-1])
        and not before[-1].adds
        and (end.kind, end.kernel, end.activation, end.adds) == ("convolution", 3, "none", ())
    )
