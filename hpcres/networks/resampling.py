"""Separable resampling with exact rational weights, so that any window of a volume has the weights of the whole.

torch.nn.functional.interpolate takes its positions from a float32 ratio, which drifts on long axes. Here the
position of output voxel i, (i + ½)·step − ½ in input voxels, is an integer fraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, floor

import torch
from torch import Tensor
from torch.nn import functional


def center_crop(cubes: Tensor, margin: int) -> Tensor:
    """Cut the outermost `margin` voxels of each side from (…, z, y, x)."""
    z, y, x = (slice(margin, n - margin) for n in cubes.shape[-3:])
    return cubes[..., z, y, x]


Taps = list[list[tuple[int, Fraction]]]
"""For every output voxel along an axis, the input voxels it sums and their weights."""


_CENTRE = Fraction(1, 2)


def linear_taps(size: int, step: Fraction, outputs: int, place: Fraction = _CENTRE) -> Taps:
    """Compute the taps of linear interpolation, with the input clamped at both ends.

    Parameters
    ----------
    size
        Input voxels.
    step
        Input voxels per output voxel.
    outputs
        Output voxels.
    place
        Where on its edge, from 0 to 1, a voxel has its value; by default at the centre.

    Returns
    -------
    Taps
        Two taps for each output voxel.
    """
    taps = []
    for i in range(outputs):
        position = max((i + place) * step - place, Fraction(0))
        low = min(floor(position), size - 1)
        weight = position - low if low + 1 < size else Fraction(0)
        taps.append([(low, 1 - weight), (min(low + 1, size - 1), weight)])
    return taps


def area_taps(size: int, step: Fraction, outputs: int) -> Taps:
    """Compute the taps of a mean over the extent [i·step, (i + 1)·step) of each output voxel (pixel binning).

    Parameters
    ----------
    size
        Input voxels.
    step
        Input voxels per output voxel.
    outputs
        Output voxels.

    Returns
    -------
    Taps
        The input voxels in each extent, with their shares of it.
    """
    taps = []
    for i in range(outputs):
        start, stop = i * step, min((i + 1) * step, Fraction(size))
        row = [(j, min(stop, Fraction(j + 1)) - max(start, Fraction(j))) for j in range(floor(start), ceil(stop))]
        taps.append([(j, weight / (stop - start)) for j, weight in row])
    return taps


def nearest_taps(size: int, step: Fraction, outputs: int) -> Taps:
    """Compute the taps of nearest-neighbour resampling: output voxel i is the input voxel at ⌊i·step⌋."""
    return [[(min(floor(i * step), size - 1), Fraction(1))] for i in range(outputs)]


def blur_taps(size: int, kernel: Sequence[float]) -> Taps:
    """Compute the taps of a weighted sum over the voxels around each voxel.

    Voxels beyond an end have the value of the last one.

    Parameters
    ----------
    size
        Voxels along the axis.
    kernel
        Weights, centred on the voxel.

    Returns
    -------
    Taps
        One row for each voxel.
    """
    half = len(kernel) // 2
    weights = list(map(Fraction, kernel))
    return [[(min(max(i + k - half, 0), size - 1), w) for k, w in enumerate(weights)] for i in range(size)]


def matrix_of(taps: Taps, size: int) -> Tensor:
    """Return the weights of `taps` along an axis of `size` voxels as a matrix, float64 (outputs, inputs)."""
    matrix = torch.zeros(len(taps), size, dtype=torch.float64)
    for i, row in enumerate(taps):
        for j, weight in row:
            matrix[i, j] += float(weight)
    return matrix


def by_matrices(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Apply a matrix (outputs, inputs) along each of the last three axes of (batch, channels, z, y, x).

    The gradient of `resample` fills an array of the size of x for every tap; here it is three more matrix products.
    The order of summation depends on the size of x, so a window of a volume has the values of the whole only within
    rounding.

    Parameters
    ----------
    x
        (batch, channels, z, y, x).
    matrices
        Matrices for z, y and x.

    Returns
    -------
    Tensor
        (batch, channels, outputs along z, y and x).
    """
    z, y, x_ = (matrix.to(x) for matrix in matrices)
    x = torch.matmul(z, x.flatten(3)).unflatten(3, x.shape[3:])
    return torch.matmul(torch.matmul(y, x), x_.T)


def resample(x: Tensor, taps: tuple[Taps, Taps, Taps]) -> Tensor:
    """Apply taps along the last three axes of (batch, channels, z, y, x).

    Parameters
    ----------
    x
        (batch, channels, z, y, x).
    taps
        Taps for z, y and x.

    Returns
    -------
    Tensor
        (batch, channels, outputs along z, y and x), in the type of x.
    """
    for axis, rows in zip((2, 3, 4), taps, strict=True):
        if [[(i, Fraction(1))] for i in range(x.shape[axis])] == rows:
            continue
        width = max(map(len, rows))
        padded = [row + [(row[-1][0], Fraction(0))] * (width - len(row)) for row in rows]
        shape = [1] * x.ndim
        shape[axis] = len(rows)
        total: Tensor | None = None
        for tap in zip(*padded, strict=True):
            index = torch.tensor([j for j, _ in tap], device=x.device)
            weight = torch.tensor([float(w) for _, w in tap], dtype=x.dtype, device=x.device).view(shape)
            part = x.index_select(axis, index) * weight
            total = part if total is None else total + part
        assert total is not None
        x = total
    return x


def upsample(x: Tensor, scale: Fraction) -> Tensor:
    """Upsample (batch, channels, z, y, x) trilinearly to ⌊n·scale⌋ voxels per axis."""
    if scale == 2:  # weights ¼ and ¾ are exact in any float format
        return functional.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
    z, y, x_ = (linear_taps(n, 1 / scale, floor(n * scale)) for n in x.shape[2:])
    return resample(x, (z, y, x_))
