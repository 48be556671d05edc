"""The layers before the last two in polyphase form: plain convolutions, and doubling layers on the coarser grid.

×2 trilinear upsampling and a 3³ convolution are one 3³ convolution of the coarse grid. A transposed convolution is one
of 2³ taps. Both give cells of eight outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from fractions import Fraction
from itertools import product

import numpy as np
import torch
from torch import Tensor

from hpcres.engines.polyphase_cells import Map, Weights, cells_of, in_voxel_order, padded_voxels
from hpcres.geometry import Box, triple
from hpcres.networks.resampling import upsample
from hpcres.networks.stages import Stage


class Convolution:
    """A 3³ convolution on one grid, with the outputs of earlier stages that are added to it.

    Parameters
    ----------
    stage
        Stage with its weights.
    device
        Device of torch.
    dtype
        Float format.
    """

    def __init__(self, stage: Stage, device: torch.device, dtype: torch.dtype) -> None:
        self._stage = stage
        self._weights = Weights(stage.weight, stage.bias, device, dtype)

    def __call__(self, x: Map, out: Box, kept: dict[int, Map]) -> Tensor:
        """Compute the output voxels `out`; `kept` are outputs of earlier stages."""
        stage = self._stage
        y = self._weights(x.padded(out.grown(1, 1), stage.padding))
        if stage.add_before is not None:
            y += kept[stage.add_before].part(out)
        if stage.relu:
            y.relu_()
        if stage.add_after is not None:
            y += kept[stage.add_after].part(out)
        return y

    def held(self, out: Box) -> int:
        """Return how many values are held of the output voxels `out`."""
        return self._stage.outputs * out.voxels

    def working(self, out: Box, grid: Box) -> int:
        """Return how many values computing `out` takes beside the input: the padded input and the output.

        Parameters
        ----------
        out
            Output voxels.
        grid
            All voxels of the input.

        Returns
        -------
        int
            Number of values.
        """
        return self._stage.inputs * padded_voxels(out.grown(1, 1), grid) + self.held(out)


class Doubling(ABC):
    """A stage of scale 2 with cells of `offset`; `cells` is computed on the input's grid, before the ReLU.

    Parameters
    ----------
    stage
        Stage of scale 2.
    """

    offset: int

    def __init__(self, stage: Stage) -> None:
        assert stage.relu, stage.name
        self._stage = stage

    @abstractmethod
    def reads(self, cells: Box) -> Box:
        """Return the input voxels of some cells, those beyond the faces included."""

    @abstractmethod
    def cells(self, x: Map, cells: Box) -> Tensor:
        """Compute some cells (batch, 8 · outputs, z, y, x)."""

    def __call__(self, x: Map, out: Box, kept: dict[int, Map]) -> Tensor:
        """Compute the output voxels `out`; no output of an earlier stage is added."""
        at = cells_of(out, self.offset)
        return in_voxel_order(self.cells(x, at).relu_(), at, self.offset, out)

    def held(self, out: Box) -> int:
        """Return how many values are held of the output voxels `out`: their whole cells."""
        return 8 * self._stage.outputs * cells_of(out, self.offset).voxels

    def working(self, out: Box, grid: Box) -> int:
        """Return how many values computing `out` takes beside the input.

        They are the padded input and the cells, or the cells twice.

        Parameters
        ----------
        out
            Output voxels.
        grid
            All voxels of the input.

        Returns
        -------
        int
            Number of values.
        """
        return max(self.working_on_cells(cells_of(out, self.offset), grid), 2 * self.held(out))

    def working_on_cells(self, cells: Box, grid: Box) -> int:
        """Return how many values computing some cells takes beside the input: the padded input and the cells."""
        return self._stage.inputs * padded_voxels(self.reads(cells), grid) + 8 * self._stage.outputs * cells.voxels


class Resized(Doubling):
    """×2 trilinear upsampling and a 3³ convolution as one of 3³ taps: cell c reads the voxels c − 1 to c + 1.

    Parameters
    ----------
    stage
        Stage with its weights.
    device
        Device of torch.
    dtype
        Float format.
    """

    offset = 0

    def __init__(self, stage: Stage, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(stage)
        taps = np.zeros((2, 3, 3))  # parity, coarse tap, fine tap
        for parity, fine in product(range(2), range(3)):
            coarse, odd = divmod(parity + fine - 1, 2)
            taps[parity, coarse + 1, fine] = 0.75
            taps[parity, coarse + (2 if odd else 0), fine] = 0.25
        weight = np.einsum("zat,ybu,xcv,oituv->zyxoiabc", taps, taps, taps, stage.weight, optimize=True)
        self._weights = Weights(weight.reshape(-1, *weight.shape[4:]), np.tile(stage.bias, 8), device, dtype)
        if stage.padding == "zeros":
            self._plain = Weights(stage.weight, stage.bias, device, dtype)

    def reads(self, cells: Box) -> Box:
        """Return the input voxels of some cells, those beyond the faces included."""
        return cells.grown(1, 1)

    def cells(self, x: Map, cells: Box) -> Tensor:
        """Compute some cells (batch, 8 · outputs, z, y, x)."""
        # Replicated coarse voxels give what replication of the upsampled ones gives.
        y = self._weights(x.padded(self.reads(cells), "replicate"))
        if self._stage.padding == "zeros":
            for axis in range(3):
                if cells.start[axis] == 0:
                    self._zeros_beyond(x, cells, axis, 0, y)
                if cells.stop[axis] == x.grid.stop[axis]:
                    self._zeros_beyond(x, cells, axis, 1, y)
        return y

    def _zeros_beyond(self, x: Map, cells: Box, axis: int, end: int, y: Tensor) -> None:
        """Compute again the fine voxels at one face, beyond which the upsampled volume is zero."""
        face = _layer_at(cells, axis, end, x.grid)
        near = self.reads(face).clipped(x.grid)
        fine = upsample(x.part(near), Fraction(2))  # wrong only in its outermost voxels, where the volume goes on
        fine_grid = _doubled(x.grid)
        voxels = _layer_at(_doubled(face), axis, end, fine_grid)
        values = self._plain(Map(fine, _doubled(near), fine_grid).padded(voxels.grown(1, 1), "zeros"))
        batch, channels = values.shape[:2]
        shape: list[int] = []
        for other, n in enumerate(face.shape):
            shape += [1, 1] if other == axis else [n, 2]
        apart = values.reshape(batch, channels, *shape).permute(0, 3, 5, 7, 1, 2, 4, 6)
        target = y.unflatten(1, (2, 2, 2, channels)).narrow(1 + axis, end, 1)
        target.narrow(5 + axis, 0 if end == 0 else y.shape[2 + axis] - 1, 1).copy_(apart)


def _doubled(box: Box) -> Box:
    return Box(triple([2 * a for a in box.start]), triple([2 * b for b in box.stop]))


def _layer_at(box: Box, axis: int, end: int, grid: Box) -> Box:
    """Return one layer of a box: the grid's first (`end` 0) or last (1) along `axis`."""
    start, stop = list(box.start), list(box.stop)
    start[axis], stop[axis] = (0, 1) if end == 0 else (grid.stop[axis] - 1, grid.stop[axis])
    return Box(triple(start), triple(stop))


class Transposed(Doubling):
    """A transposed convolution as one of 2³ taps: the staggered cell c reads the voxels c − 1 and c.

    Parameters
    ----------
    stage
        Stage with its weights.
    device
        Device of torch.
    dtype
        Float format.
    """

    offset = 1

    def __init__(self, stage: Stage, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(stage)
        taps = np.array([[2, 0], [3, 1]])  # of parity and coarse tap: output 2c − 1 + parity, input c − 1 + tap
        z, y, x, a, b, c = np.ix_(*[range(2)] * 6)
        weight = stage.weight[:, :, taps[z, a], taps[y, b], taps[x, c]].transpose(2, 3, 4, 1, 0, 5, 6, 7)
        weight = np.ascontiguousarray(weight.reshape(-1, *weight.shape[4:]))
        self._weights = Weights(weight, np.tile(stage.bias, 8), device, dtype)

    def reads(self, cells: Box) -> Box:
        """Return the input voxels of some cells, those beyond the faces included."""
        return cells.grown(1, 0)

    def cells(self, x: Map, cells: Box) -> Tensor:
        """Compute some cells (batch, 8 · outputs, z, y, x)."""
        return self._weights(x.padded(self.reads(cells), "zeros"))
