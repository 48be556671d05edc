"""Agreement of a high-res volume, seen through the coarse instrument, with the low-res volume it was made from.

`low_res` of metrics.json holds:

- `path`, `shape`, `voxels_compared`
- `unknown`: share of low-res voxels that low_res.unknown leaves out of all comparisons
- `phases`: names of its labels, merged ones with ` + `
- `volume_fraction`: {group: share} of the low-res volume
- `of_volume`: {group: share} of the super-resolved volume
- `agreement`: share of low-res voxels equal to the imaging operator applied to the volume
- `confusion`: {low-res group: {group seen in the volume: voxels}}

Where the low-res volume holds probabilities, its labels are the likeliest groups and its fractions are the means. Then
there also is `fraction_difference` {group: mean over low-res voxels of |probability − what the operator sees|}.

The operator does not weigh all voxels of a low-res voxel's own block of high-res voxels alike. So a volume can agree
and still hold too much of a phase where the operator hardly sees it. Five entries count the voxels of each block alike:

- `box_agreement`: share of known low-res voxels whose label is the group with the most high-res voxels in their block,
  or one of several such groups
- `box_confusion`: {low-res group: {group with the most high-res voxels: low-res voxels}}
- `visible_fraction`: {group: share of all high-res voxels in the blocks of known low-res voxels}; `volume_fraction`
  is what the low-res volume says of the same voxels
- `inside`: {group: share of high-res voxels of the group, in the blocks of low-res voxels that have its label, as all
  their 26 neighbours have}
- `outside`: {group: share of high-res voxels of the group, in the blocks of low-res voxels that have another label, as
  all their 26 neighbours have}

`inside` and `outside` leave out low-res voxels with an unknown neighbour; beyond the low-res volume there are no
neighbours. They are null where there is no such low-res voxel. A high-res voxel that lies in several blocks (scale
factor p/q) counts in each by its share, in whole parts of 1/q³.

Two entries tell what the low-res lattice left in the volume, at scale factor p/q:

- `changed_faces`: {axis: [share of faces along it that part two phases, by their position modulo p]}, position 0 where
  a group of q low-res voxels begins
- `grid_artefact`: the largest departure of one of these shares from its axis's mean, as a share of that mean

Matter does not depend on the lattice, so these shares are equal but for chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hpcres.counting.lattice import changed_faces, grid_artefact
from hpcres.errors import InputError
from hpcres.geometry import AXES, Box, Triple, blocks, high_res_shape, triple
from hpcres.imaging import ImagingOperator, block_majority, one_hot
from hpcres.metrics.schedule import Source, follow, submit
from hpcres.study import Imaging, LowRes, Study
from hpcres.volumes.phases import PhaseMap, likeliest
from hpcres.volumes.volume import Volume

if TYPE_CHECKING:
    from distributed import Client

_BLOCK_HIGH_RES = 128


@dataclass(frozen=True)
class _Imaging:
    """What of a study the comparison needs. A worker need not know the study's family of generators."""

    scale: Fraction
    phases: int
    groups: tuple[tuple[int, ...], ...]
    settings: Imaging
    low_res: LowRes

    @classmethod
    def of(cls, study: Study) -> _Imaging:
        groups = tuple(tuple(study.phases.index(name) for name in group) for group in study.low_res.groups)
        return cls(study.scale_factor, len(study.phases), groups, study.imaging, study.low_res)

    def operator(self) -> ImagingOperator:
        return _operator(self.scale, self.groups, self.settings, bool(self.low_res.channels))


@lru_cache(maxsize=4)
def _operator(
    scale: Fraction, groups: tuple[tuple[int, ...], ...], settings: Imaging, fractions: bool
) -> ImagingOperator:
    return ImagingOperator(scale, groups, settings, fractions)


def compared_shape(study: Study, low_res_shape: Sequence[int]) -> Triple:
    """Return how many low-res voxels lie wholly inside the high-res volume along z, y, x."""
    return triple([int(n / study.scale_factor) for n in high_res_shape(low_res_shape, study.scale_factor)])


@dataclass(frozen=True)
class _Compared:
    """Counts in the blocks of some low-res voxels; the sums over all low-res voxels are the counts of the volume."""

    confusion: np.ndarray
    """int64 (label in the low-res volume, label of the imaged volume): known low-res voxels."""
    box_confusion: np.ndarray
    """int64 (label in the low-res volume, group with the most high-res voxels): known low-res voxels."""
    visible: np.ndarray
    """int64 (group,): high-res voxels in the blocks of known low-res voxels, p³ to a block."""
    away: np.ndarray
    """int64 (low-res voxels or high-res voxels of the group, inside or outside, group), as `away_from_boundary`."""
    faces: np.ndarray
    """As `changed_faces` gives them, of the high-res voxels of all these blocks."""
    sums: np.ndarray | None
    """float64 (3, group), with probabilities only: sums over known voxels of what is given, what is seen, and their
    absolute difference."""


def away_from_boundary(labels: np.ndarray, own: Box, groups: int) -> np.ndarray:
    """Find the low-res voxels away from the boundary of each group.

    Parameters
    ----------
    labels : np.ndarray
        Positions of groups (z, y, x), uint8; `groups` where unknown. One voxel more than `own` on each side, but for
        sides where the volume ends.
    own : Box
        The voxels asked for, of `labels`.
    groups : int
        Number of groups.

    Returns
    -------
    np.ndarray
        bool (2, groups, z, y, x). First: the voxel and its 26 neighbours have the group's label. Second: none of them
        has it, and all are known.
    """
    near = np.stack([labels == label for label in range(groups + 1)])
    for axis in range(1, 4):
        wide = near.copy()
        before, after = [slice(None)] * 4, [slice(None)] * 4
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        wide[tuple(after)] |= near[tuple(before)]
        wide[tuple(before)] |= near[tuple(after)]
        near = wide
    near = near[:, *own.slices]
    near, unknown = near[:groups], near[groups]
    return np.stack([near & (near.sum(0) == 1), ~near]) & ~unknown


def _confusion(given: np.ndarray, found: np.ndarray, groups: int) -> np.ndarray:
    """Count the voxels as int64 (label given, label found).

    Unknown voxels have a given label after the last and are left out.
    """
    pairs = given.ravel().astype(np.int64) * groups + found.ravel()
    return np.bincount(pairs, minlength=groups * groups)[: groups * groups].reshape(groups, groups)


def _compare(box: Box, low_res: Source, volume: Source, imaging: _Imaging) -> _Compared:
    """Compare the blocks of a low-res box, which starts at multiples of q (scale factor p/q)."""
    operator, sharp, coarse = imaging.operator(), volume.open(), low_res.open()
    p, q = imaging.scale.numerator, imaging.scale.denominator
    # The operator gives the volume's own values away from cut faces, in windows that start at whole low-res voxels.
    before = -(-operator.margin_voxels // p) * q
    start = triple([max(0, s - before) // q * q for s in box.start])
    first = triple([s // q * p for s in start])
    last = [
        min(n, -(-stop * p // q) + max(1, operator.margin_voxels))
        for n, stop in zip(sharp.shape, box.stop, strict=True)
    ]
    window = sharp.read(Box(first, triple(last)))
    around = box.grown(1, 1, Box.whole(coarse.shape))
    own = box.relative_to(around.start)
    known_around = PhaseMap.of(imaging.low_res, low_res.path).index(coarse.read(around))
    known, given = known_around[own.slices], likeliest(known_around)[own.slices]
    asked = (..., *box.relative_to(start).slices)
    with torch.inference_mode():
        labels = torch.from_numpy(window.astype(np.int64))[None]
        imaged = operator(one_hot(labels, imaging.phases))[0][asked].numpy()
        counted = operator.block_counts(labels)[asked]
        largest = block_majority(counted, torch.from_numpy(given)[None])[0].numpy()
    n, counts = len(imaging.groups), counted[0].numpy()
    away = away_from_boundary(likeliest(known_around), own, n)
    sums = None
    if known.ndim == 4:
        fractions = np.moveaxis(imaged, 0, 3) * known.any(-1, keepdims=True)
        sums = np.stack([x.sum((0, 1, 2), dtype=float) for x in (known, fractions, abs(known - fractions))])
    ends = [min(size, stop * p // q) for size, stop in zip(sharp.shape, box.stop, strict=True)]
    inside = Box(triple([s * p // q for s in box.start]), triple(ends)).relative_to(triple(first))
    return _Compared(
        confusion=_confusion(given, imaged.argmax(0), n),
        box_confusion=_confusion(given, largest, n),
        visible=np.where(given < n, counts, 0).sum((1, 2, 3), dtype=np.int64),
        away=np.stack([x.sum((2, 3, 4), dtype=np.int64) for x in (away, np.where(away, counts, 0))]),
        faces=changed_faces(window, inside, p),
        sums=sums,
    )


def agreement(
    study: Study, low_res: Volume, volume: Volume, *, client: Client, progress: bool = True
) -> dict[str, Any]:
    """Compute the `low_res` entry of metrics.json.

    Parameters
    ----------
    study : Study
        The study, with its scale factor and the groups of the low-res labels.
    low_res : Volume
        The low-res volume, labels or probabilities.
    volume : Volume
        The high-res volume that was made from it.
    client : Client
        Dask client.
    progress : bool
        Whether to show progress.

    Returns
    -------
    dict
        The entry, as the module describes it.

    Raises
    ------
    InputError
        The volume has another shape than the low-res volume makes at the scale factor, or every low-res voxel is
        unknown.
    """
    due = high_res_shape(low_res.shape, study.scale_factor)
    if volume.shape != due:
        raise InputError(
            f"{volume.path}: has {volume.shape} voxels, but {low_res.path} at scale factor {study.scale_factor} "
            f"makes {due}; measure the volume made from it"
        )
    q = study.scale_factor.denominator
    edge = max(q, int(_BLOCK_HIGH_RES / study.scale_factor) // q * q)
    shape = compared_shape(study, low_res.shape)
    tasks = submit(
        client,
        _compare,
        blocks(shape, (edge,) * 3),
        low_res=Source.of(low_res),
        volume=Source.of(volume),
        imaging=_Imaging.of(study),
    )
    follow(tasks, f"low-res agreement of {Path(volume.path).name}", progress)
    found = client.gather(tasks)
    confusion, box_confusion = sum(one.confusion for one in found), sum(one.box_confusion for one in found)
    changed, every = sum(one.faces for one in found)
    names = [" + ".join(group) for group in study.low_res.groups]
    voxels = int(confusion.sum())
    if voxels == 0:
        raise InputError(f"{low_res.path}: every voxel is unknown, so nothing can be compared; see low_res.unknown")
    fractions, difference = (confusion.sum(1) / voxels, confusion.sum(0) / voxels), {}
    if low_res.parts:
        given, seen, off = sum(one.sums for one in found) / voxels
        fractions, difference = (given, seen), {"fraction_difference": dict(zip(names, off.tolist(), strict=True))}
    return {
        "path": low_res.path,
        "shape": list(low_res.shape),
        "voxels_compared": voxels,
        "unknown": 1 - voxels / prod(shape),
        "phases": names,
        "volume_fraction": dict(zip(names, fractions[0].tolist(), strict=True)),
        "of_volume": dict(zip(names, fractions[1].tolist(), strict=True)),
        **difference,
        "agreement": float(np.trace(confusion) / voxels),
        "confusion": _by_name(names, confusion),
        "box_agreement": float(np.trace(box_confusion) / voxels),
        "box_confusion": _by_name(names, box_confusion),
        **_shares(names, voxels, study.scale_factor.numerator**3, found),
        "changed_faces": dict(zip(AXES, (changed / np.maximum(every, 1)).tolist(), strict=True)),
        "grid_artefact": grid_artefact(changed, every),
    }


def _by_name(names: Sequence[str], confusion: np.ndarray) -> dict[str, dict[str, int]]:
    return {a: dict(zip(names, map(int, row), strict=True)) for a, row in zip(names, confusion, strict=True)}


def _shares(
    names: Sequence[str], voxels: int, block: int, found: Sequence[_Compared]
) -> dict[str, dict[str, float | None]]:
    """Compute `visible_fraction`, `inside` and `outside`.

    `voxels` is the number of known low-res voxels, and `block` the number of parts in a block.
    """
    visible = np.sum([one.visible for one in found], axis=0)
    low_res_voxels, parts = np.sum([one.away for one in found], axis=0).tolist()
    shares: dict[str, dict[str, float | None]] = {
        "visible_fraction": dict(zip(names, (visible / (voxels * block)).tolist(), strict=True))
    }
    for kind, of, held in zip(("inside", "outside"), low_res_voxels, parts, strict=True):
        shares[kind] = {name: b / (a * block) if a else None for name, a, b in zip(names, of, held, strict=True)}
    return shares
