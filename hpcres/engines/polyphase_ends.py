"""The last two layers in polyphase form, which are computed slab by slab.

Where the first of them doubles, the last convolution is one of 2³ taps from cells to cells staggered against them.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from itertools import product
from math import ceil, floor
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hpcres.engines.polyphase_cells import Map, Weights, cells_of, in_voxel_order, padded_voxels
from hpcres.engines.polyphase_layers import Doubling
from hpcres.geometry import Box, triple
from hpcres.networks.resampling import Taps, linear_taps, resample
from hpcres.networks.stages import Stage


class CellEnd:
    """The last two stages where the first of them doubles: from coarse voxels to cells to logits of cells.

    Parameters
    ----------
    up
        Layer of the last stage but one, which gives its cells.
    last, end
        Last two stages, with their weights.
    device
        Device of torch.
    dtype
        Float format.
    """

    def __init__(self, up: Doubling, last: Stage, end: Stage, device: torch.device, dtype: torch.dtype) -> None:
        self._up, self._last, self._end = up, last, end
        self.offset = 1 - up.offset
        taps = np.zeros((2, 2, 2, 3))  # parity out, cell tap, parity in, fine tap
        for out, cell, given in product(range(2), repeat=3):
            if 0 <= 2 * cell + given - out < 3:
                taps[out, cell, given, 2 * cell + given - out] = 1
        weight = np.einsum("zadt,ybeu,xcfv,pituv->zyxpdefiabc", taps, taps, taps, end.weight, optimize=True)
        shape = (8 * end.outputs, 8 * end.inputs, 2, 2, 2)
        self._weights = Weights(weight.reshape(shape), np.tile(end.bias, 8), device, dtype)

    def _features(self, logits: Box) -> Box:
        """Return the feature cells that logit cells read, those beyond the faces included."""
        return logits.grown(self.offset, self._up.offset)

    def _grid(self, coarse: Box) -> Box:
        return coarse.grown(0, self._up.offset)

    def logits(self, x: Map, out: Box) -> Tensor:
        """Compute the logits (batch, 8, phases, cells) of the cells that hold the voxels `out`."""
        grid, want = self._grid(x.grid), self._features(cells_of(out, self.offset))
        at = want.clipped(grid)
        features = self._up.cells(x, at).relu_()
        if self._up.offset == 0:
            pad: Literal["zeros", "mirrored"] = "zeros" if self._end.padding == "zeros" else "mirrored"
            features = Map(features, at, grid).padded(want, pad)
        else:  # half of the outermost cells lies beyond the faces
            ends = ((at.start, grid.start, 0), (at.stop, grid.stop, 1))
            for axis, (computed, outermost, end) in product(range(3), ends):
                if computed[axis] == outermost[axis]:
                    face = features.narrow(2 + axis, 0 if end == 0 else features.shape[2 + axis] - 1, 1)
                    face = face.unflatten(1, (2, 2, 2, -1))
                    beyond, inside = face.select(1 + axis, end), face.select(1 + axis, 1 - end)
                    beyond.zero_() if self._end.padding == "zeros" else beyond.copy_(inside)
        return self._weights(features).unflatten(1, (8, -1))

    def in_voxel_order(self, values: Tensor, out: Box) -> Tensor:
        """Reorder (batch, 8, channels, cells) to (batch, channels, voxels `out`)."""
        return in_voxel_order(values.flatten(1, 2), cells_of(out, self.offset), self.offset, out)

    def held(self, out: Box, grid: Box) -> int:
        """Return how many values are held at a time beyond the input.

        They are the padded input and the cells, or the cells padded, or the cells and the logits.

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
        cells, all_cells = cells_of(out, self.offset), self._grid(grid)
        want = self._features(cells)
        at = want.clipped(all_cells)
        features, padded = (8 * self._last.outputs * n for n in (at.voxels, padded_voxels(want, all_cells)))
        logits = 8 * self._end.outputs * cells.voxels
        return max(self._up.working_on_cells(at, grid), features + padded, (padded or features) + logits)


class VoxelEnd:
    """The last two stages where the first scales by anything but 2: plain, on the high-res voxels of a slab.

    Parameters
    ----------
    last, end
        Last two stages, with their weights.
    device
        Device of torch.
    dtype
        Float format.
    """

    offset = 0

    def __init__(self, last: Stage, end: Stage, device: torch.device, dtype: torch.dtype) -> None:
        self._last, self._end = last, end
        self._last_weights = Weights(last.weight, last.bias, device, dtype)
        self._end_weights = Weights(end.weight, end.bias, device, dtype)

    def _high_res(self, grid: Box) -> Box:
        return Box.whole([self._last.length(n) for n in grid.shape])

    def logits(self, x: Map, out: Box) -> Tensor:
        """Compute the logits (batch, 1, phases, voxels `out`)."""
        high_res = self._high_res(x.grid)
        features, fine = out.grown(1, 1, high_res), out.grown(2, 2, high_res)
        taps = [
            [[tap for tap in row if tap[1]] for row in _linear_taps(n, self._last.scale)[a:b]]
            for n, a, b in zip(x.grid.shape, fine.start, fine.stop, strict=True)
        ]
        read = [[place for row in rows for place, _ in row] for rows in taps]
        near = Box(triple([min(places) for places in read]), triple([max(places) + 1 for places in read]))
        z, y, x_ = (
            [[(place - start, weight) for place, weight in row] for row in rows]
            for rows, start in zip(taps, near.start, strict=True)
        )
        upsampled = Map(resample(x.part(near), (z, y, x_)), fine, high_res)
        last = self._last_weights(upsampled.padded(features.grown(1, 1), self._last.padding)).relu_()
        del upsampled
        return self._end_weights(Map(last, features, high_res).padded(out.grown(1, 1), self._end.padding)).unsqueeze(1)

    def in_voxel_order(self, values: Tensor, out: Box) -> Tensor:
        """Return (batch, channels, voxels `out`) of (batch, 1, channels, voxels `out`)."""
        return values[:, 0]

    def held(self, out: Box, grid: Box) -> int:
        """Return how many values are held at a time beyond the input.

        The most are held while the last axis is resampled, or by the convolution after it.

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
        high_res, scale = self._high_res(grid), self._last.scale
        near, upsampled = out.grown(1, 1), out.grown(2, 2)
        given = self._last.inputs * upsampled.clipped(high_res).voxels
        convolved = self._last.outputs * near.clipped(high_res).voxels
        convolved += self._last.inputs * padded_voxels(upsampled, high_res)
        return convolved if scale == 1 else max(ceil(given * (3 + 1 / scale)), given + convolved)


@lru_cache(maxsize=16)
def _linear_taps(size: int, scale: Fraction) -> Taps:
    return linear_taps(size, 1 / scale, floor(size * scale))
