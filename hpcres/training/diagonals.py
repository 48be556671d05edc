"""Slices at 45° to two axes of a volume, for the critics of training.diagonal_slices.

Voxels along such a slice's rows' direction are √2 voxel edges apart, pixels of the images one. A slice is therefore
resampled to pixels one edge apart, linear between the two voxels that a pixel lies between, in the slice's own plane.
Interpolation makes interfaces unsharp, which those of an image are not, and a critic would see that before anything
else. Patches of the images are given the same unsharpness, row by row.
"""

from __future__ import annotations

from math import floor, sqrt

import numpy as np
import torch
from torch import Tensor


def _places(edge: int) -> tuple[Tensor, Tensor]:
    """Of each row of a slice, the voxel of the diagonal before it and the share of the way from there to the next."""
    place = torch.arange(edge, dtype=torch.float64) / sqrt(2)
    return place.floor().long(), (place - place.floor()).float()


def _first_voxels(edge: int) -> int:
    """At how many places along each of its two axes a slice can begin in a cube."""
    return edge - 1 - floor((edge - 1) / sqrt(2))


def pick_diagonals(random: np.random.Generator, edge: int, count: int) -> np.ndarray:
    """(count, 2): different slices of a cube, by their first voxel and the step to the next.

    Both are in voxels of a plane edge × edge normal to the axis that the slices contain.
    """
    places = _first_voxels(edge)
    back, down, across = np.unravel_index(random.permutation(2 * places**2)[:count], (2, places, places))
    return np.stack([down * edge + np.where(back, edge - 1 - across, across), np.where(back, edge - 1, edge + 1)], 1)


def diagonal_slices(volume: Tensor, axis: int, chosen: Tensor) -> Tensor:
    """Slices that contain `axis` (0 z, 1 y, 2 x) of (cubes, phases, z, y, x), all edges alike, at 45° to the others.

    Parameters
    ----------
    volume : Tensor
    axis : int
    chosen : Tensor
        (cubes, slices, 2), as of `pick_diagonals`.

    Returns
    -------
    Tensor
        (cubes · slices, phases, edge, edge): one row after the other along the diagonal, columns along the axis.
    """
    edge = volume.shape[2]
    before, share = (some.to(volume.device) for some in _places(edge))
    voxels = volume.movedim(axis + 2, 4).flatten(2, 3)
    lines = chosen[:, :, :1] + chosen[:, :, 1:] * torch.arange(int(before[-1]) + 2, device=volume.device)
    every = torch.stack([cube[:, picked] for cube, picked in zip(voxels, lines, strict=True)])
    found = torch.lerp(every[:, :, :, before], every[:, :, :, before + 1], share.view(-1, 1))
    return found.transpose(1, 2).flatten(0, 1)


def as_unsharp(patches: Tensor) -> Tensor:
    """Patches (patches, phases, edge, edge), as unsharp from row to row as `diagonal_slices` are.

    A weighted mean Σ wᵢ xᵢ of one-hot pixels has a mean square that is Σ wᵢ wⱼ γ(hᵢⱼ) less than theirs, where γ(h) is
    half the share of pixels that differ at a distance h. At sharp interfaces γ grows as h (Debye 1957). The weights
    1 − f and f of voxels √2 apart then lose 2 √2 f (1 − f) γ(1). The weights w, 1 − 2 w and w of pixels one apart lose
    4 w (1 − w) γ(1), and w is such that both are the same.
    """
    _, share = _places(patches.shape[2])
    weight = ((1 - (1 - 8**0.5 * share * (1 - share)).sqrt()) / 2).to(patches.device).view(-1, 1)
    above = torch.cat([patches[:, :, :1], patches[:, :, :-1]], dim=2)
    below = torch.cat([patches[:, :, 1:], patches[:, :, -1:]], dim=2)
    return patches + weight * (above + below - 2 * patches)
