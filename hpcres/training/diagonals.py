"""Slices at 45° to two axes of a volume, for the critics of training.diagonal_slices.

Successive rows of such a slice lie along a diagonal, on which voxels are √2 voxel edges apart. Pixels of the images are
one edge apart. A slice is therefore resampled, in its own plane, to pixels one edge apart. Each pixel is interpolated
linearly between the two voxels that it lies between. Interpolation makes interfaces unsharp. Interfaces of an image are
sharp, and a critic would see this difference before any other. Patches of the images are therefore given the same
unsharpness, row by row.
"""

from __future__ import annotations

from math import floor, sqrt

import numpy as np
import torch
from torch import Tensor


def _places(edge: int) -> tuple[Tensor, Tensor]:
    """Return, for each row of a slice, the diagonal's voxel before it and the share of the way to the next one."""
    place = torch.arange(edge, dtype=torch.float64) / sqrt(2)
    return place.floor().long(), (place - place.floor()).float()


def _first_voxels(edge: int) -> int:
    """Return the number of places along each of its two axes at which a slice can begin in a cube."""
    return edge - 1 - floor((edge - 1) / sqrt(2))


def pick_diagonals(random: np.random.Generator, edge: int, count: int) -> np.ndarray:
    """Pick different slices of a cube, by their first voxel and the step to the next.

    Parameters
    ----------
    random : numpy.random.Generator
        Source of the random choice.
    edge : int
        Edge of the cube in voxels.
    count : int
        Number of slices.

    Returns
    -------
    ndarray
        (count, 2): first voxel and step. Both are in voxels of a plane edge × edge normal to the axis that the slices
        contain.
    """
    places = _first_voxels(edge)
    back, down, across = np.unravel_index(random.permutation(2 * places**2)[:count], (2, places, places))
    return np.stack([down * edge + np.where(back, edge - 1 - across, across), np.where(back, edge - 1, edge + 1)], 1)


def diagonal_slices(volume: Tensor, axis: int, chosen: Tensor) -> Tensor:
    """Return slices of cubes that contain one axis and are at 45° to the two others.

    Parameters
    ----------
    volume : Tensor
        (cubes, phases, z, y, x), all edges alike.
    axis : int
        The axis that the slices contain: 0 z, 1 y, 2 x.
    chosen : Tensor
        (cubes, slices, 2), as `pick_diagonals` returns for each cube.

    Returns
    -------
    Tensor
        (cubes · slices, phases, edge, edge): rows follow one another along the diagonal, columns along the axis.
    """
    edge = volume.shape[2]
    before, share = (some.to(volume.device) for some in _places(edge))
    voxels = volume.movedim(axis + 2, 4).flatten(2, 3)
    lines = chosen[:, :, :1] + chosen[:, :, 1:] * torch.arange(int(before[-1]) + 2, device=volume.device)
    every = torch.stack([cube[:, picked] for cube, picked in zip(voxels, lines, strict=True)])
    found = torch.lerp(every[:, :, :, before], every[:, :, :, before + 1], share.view(-1, 1))
    return found.transpose(1, 2).flatten(0, 1)


def as_unsharp(patches: Tensor) -> Tensor:
    """Make patches as unsharp from row to row as `diagonal_slices` are.

    A weighted mean Σ wᵢ xᵢ of one-hot pixels has a mean square that is Σ wᵢ wⱼ γ(hᵢⱼ) less than that of the pixels,
    where γ(h) is half the share of pixels that differ at a distance h. At sharp interfaces γ grows as h (Debye 1957).
    The weights 1 − f and f of voxels √2 apart then lose 2 √2 f (1 − f) γ(1). The weights w, 1 − 2 w and w of pixels one
    apart lose 4 w (1 − w) γ(1). The weight w is such that both losses are the same.

    Parameters
    ----------
    patches : Tensor
        One-hot (patches, phases, edge, edge).

    Returns
    -------
    Tensor
        Of the same shape.
    """
    _, share = _places(patches.shape[2])
    weight = ((1 - (1 - 8**0.5 * share * (1 - share)).sqrt()) / 2).to(patches.device).view(-1, 1)
    above = torch.cat([patches[:, :, :1], patches[:, :, :-1]], dim=2)
    below = torch.cat([patches[:, :, 1:], patches[:, :, -1:]], dim=2)
    return patches + weight * (above + below - 2 * patches)
