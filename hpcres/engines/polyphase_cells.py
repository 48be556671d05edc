"""Maps of voxels or cells in torch: what lies beyond the faces, the order of cells, and the memory layout.

Along each axis a cell c of offset 0 holds the fine voxels 2c and 2c + 1, one of offset 1 holds 2c − 1 and 2c. The
channels of cells are (parity z, parity y, parity x, channel), flattened.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hpcres.geometry import Box, triple


def cells_of(voxels: Box, offset: int) -> Box:
    """Return the cells of an offset that hold a box of fine voxels."""
    return Box(
        triple([(a + offset) // 2 for a in voxels.start]), triple([(b - 1 + offset) // 2 + 1 for b in voxels.stop])
    )


def voxels_of(cells: Box, offset: int) -> Box:
    """Return the fine voxels that a box of cells of an offset holds."""
    return Box(triple([2 * a - offset for a in cells.start]), triple([2 * b - offset for b in cells.stop]))


def padded_voxels(want: Box, grid: Box) -> int:
    """Return the number of voxels that Map.padded copies: none where nothing lies beyond a face."""
    return 0 if want.clipped(grid) == want else want.voxels


@dataclass(frozen=True)
class Map:
    """A part of a grid with its values.

    Parameters
    ----------
    values : torch.Tensor
        (batch, channels, z, y, x).
    box : Box
        Voxels or cells that the values are of.
    grid : Box
        All voxels or cells of the grid, beyond which the map is padded.
    """

    values: Tensor
    box: Box
    grid: Box

    def part(self, want: Box) -> Tensor:
        """Return the values of a box inside this one."""
        assert want.clipped(self.box) == want, (self.box, want)
        return self.values[(..., *want.relative_to(self.box.start).slices)]

    def padded(self, want: Box, pad: Literal["replicate", "zeros", "mirrored"]) -> Tensor:
        """Return the values of a box that may reach one beyond the faces of the grid.

        'mirrored' continues cells as replication continues their voxels: the parities change places.
        """
        inner = want.clipped(self.grid)
        part = self.part(inner)
        if inner == want:
            return part
        layout = torch.channels_last_3d if _channels_last(part) else torch.contiguous_format
        shape = (*part.shape[:2], *want.shape)
        out = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=layout)
        if pad == "zeros":
            out.zero_()
        Map(out, want, self.grid).part(inner).copy_(part)
        for axis, (outer, inside, end) in product(range(3), ((want.start, inner.start, 0), (want.stop, inner.stop, 1))):
            if pad != "zeros" and outer[axis] != inside[axis]:
                beyond, face = (0, 1) if end == 0 else (out.shape[axis + 2] - 1, out.shape[axis + 2] - 2)
                source = out.narrow(axis + 2, face, 1)
                if pad == "mirrored":
                    source = source.unflatten(1, (2, 2, 2, -1)).flip(1 + axis).flatten(1, 4)
                out.narrow(axis + 2, beyond, 1).copy_(source)
        return out


def _channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1


def in_voxel_order(values: Tensor, cells: Box, offset: int, want: Box) -> Tensor:
    """Reorder the values of cells to those of fine voxels, in the memory layout of the cells.

    Parameters
    ----------
    values
        (batch, 8 · channels, z, y, x) of the cells.
    cells
        Cells that the values are of.
    offset
        Offset of the cells.
    want
        Voxels that the cells hold.

    Returns
    -------
    Tensor
        (batch, channels, z, y, x) of the voxels.
    """
    batch, channels = values.shape[0], values.shape[1] // 8
    apart, shape = values.unflatten(1, (2, 2, 2, channels)), [2 * n for n in values.shape[2:]]
    if _channels_last(values):
        voxels = apart.permute(0, 5, 1, 6, 2, 7, 3, 4).reshape(batch, *shape, channels).permute(0, 4, 1, 2, 3)
    else:
        voxels = apart.permute(0, 4, 5, 1, 6, 2, 7, 3).reshape(batch, channels, *shape)
    held = voxels_of(cells, offset)
    return Map(voxels, held, held).part(want)


def in_layout(x: Tensor) -> Tensor:
    """Return maps or weights in the memory layout that suits their device and float format.

    Channels last suits oneDNN and tensor cores; cuDNN's other kernels, those for fp32, are made for planes.
    """
    return x.contiguous(memory_format=_layout(x.device, x.dtype))


def _layout(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    planes = device.type == "cuda" and dtype.itemsize > 2
    return torch.contiguous_format if planes else torch.channels_last_3d


class Weights:
    """Weight and bias of a convolution without padding, on a device and in its float format.

    Parameters
    ----------
    weight
        (outputs, inputs, z, y, x).
    bias
        (outputs,).
    device
        Device of torch.
    dtype
        Float format.
    """

    def __init__(self, weight: np.ndarray, bias: np.ndarray, device: torch.device, dtype: torch.dtype) -> None:
        self.weight = in_layout(torch.from_numpy(weight).to(device, dtype))
        self.bias = torch.from_numpy(bias).to(device, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Convolve (batch, inputs, z, y, x)."""
        return functional.conv3d(x, self.weight, self.bias)
