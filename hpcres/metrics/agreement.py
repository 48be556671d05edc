"""Does the sharp volume look, through the coarse instrument, like the coarse image it was made from?

`low_res` of metrics.json: path, shape, voxels_compared, `unknown` (share of low-res voxels that low_res.unknown leaves
out of all that compares), phases (names of its labels, merged ones with ` + `),
volume_fraction {group: share} of the low-res volume and of the super-resolved one (`of_volume`), `agreement`
(share of low-res voxels equal to the imaging operator applied to the volume), `confusion`
{low-res group: {group seen in the volume: voxels}}. Of probabilities, labels are the likeliest groups and
fractions the means, and there is `fraction_difference` {group: mean over low-res voxels of |probability − what the
operator sees|}. And what the low-res lattice left in the volume: `changed_faces`
{axis: [share of faces along it that part two phases, by their position modulo p]} at scale factor p/q, position 0
where a group of q low-res voxels begins, and `lattice_imprint`, the largest departure of one from its axis's mean,
as a share of that mean. Matter knows nothing of the lattice, so these are flat but for chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributed import Client

from hpcres.errors import InputError
from hpcres.geometry import AXES, Box, Triple, blocks, high_res_shape, triple
from hpcres.imaging import ImagingOperator, one_hot
from hpcres.metrics.schedule import Source, follow, submit
from hpcres.study import Study
from hpcres.volumes.phases import PhaseMap, likeliest
from hpcres.volumes.volume import Volume

_BLOCK_HIGH_RES = 128


@lru_cache(maxsize=4)
def _operator(study_json: str) -> ImagingOperator:
    return ImagingOperator.of(Study.of_json(study_json))


def compared_shape(study: Study, low_res_shape: Sequence[int]) -> Triple:
    """Low-res voxels that lie wholly inside the high-res volume."""
    return triple([int(n / study.scale_factor) for n in high_res_shape(low_res_shape, study.scale_factor)])


def changed_faces(window: np.ndarray, own: Box, period: int) -> np.ndarray:
    """int64 (changed or all, axis, position modulo `period`): faces between voxel i and i + 1 along each axis, i in
    `own` (voxels of the window) and i + 1 in the window; position i + 1, counted from own's start."""
    found = np.zeros((2, 3, period), np.int64)
    for axis in range(3):
        stop = list(own.stop)
        stop[axis] = min(stop[axis] + 1, window.shape[axis])
        part = np.moveaxis(window[Box(own.start, triple(stop)).slices], axis, 0)
        changed = [int(np.count_nonzero(a != b)) for a, b in pairwise(part)]
        position = np.arange(1, len(part)) % period
        found[0, axis] = np.bincount(position, changed, period)
        found[1, axis] = np.bincount(position, minlength=period) * part[0].size
    return found


def lattice_imprint(changed: np.ndarray, every: np.ndarray) -> float:
    """Largest departure of the share of `changed_faces` at a position from its axis's mean, as a share of that mean; of
    the positions that have faces."""
    shares = np.ma.masked_array(changed / np.maximum(every, 1), every == 0)
    mean = shares.mean(1, keepdims=True)
    return float((np.ma.abs(shares - mean) / np.ma.where(mean, mean, 1)).filled(0).max())


def _compare(
    box: Box, low_res: Source, volume: Source, study_json: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Voxels of a low-res box by (label in the low-res volume, label of the imaged volume), int64, the faces of the
    high-res voxels inside it as `changed_faces` counts them, and with probabilities (3, group), float64: sums over the
    known voxels of what is given, what is seen, and their absolute difference."""
    study = Study.of_json(study_json)
    operator, sharp = _operator(study_json), volume.open()
    p, q = study.scale_factor.numerator, study.scale_factor.denominator
    # The operator gives the volume's own values away from cut faces, in windows that start at whole low-res voxels.
    before = -(-operator.margin_voxels // p) * q
    start = triple([max(0, s - before) // q * q for s in box.start])
    first = triple([s // q * p for s in start])
    last = [
        min(n, -(-stop * p // q) + max(1, operator.margin_voxels))
        for n, stop in zip(sharp.shape, box.stop, strict=True)
    ]  # fmt: skip
    window = sharp.read(Box(first, triple(last)))
    with torch.inference_mode():
        labels = torch.from_numpy(window.astype(np.int64))[None]
        imaged = operator(one_hot(labels, len(study.phases)))[0]
        seen = imaged.argmax(0).numpy()[box.relative_to(start).slices]
    known = PhaseMap.of(study.low_res, low_res.path).index(low_res.open().read(box))
    given, sums = likeliest(known), None
    if known.ndim == 4:
        fractions = np.moveaxis(imaged.numpy(), 0, 3)[box.relative_to(start).slices] * known.any(-1, keepdims=True)
        sums = np.stack([x.sum((0, 1, 2), dtype=float) for x in (known, fractions, abs(known - fractions))])
    n = len(study.low_res.groups)  # what is unknown is the row after the last, and left out
    confusion = np.bincount(given.ravel().astype(np.int64) * n + seen.ravel(), minlength=n * n)[: n * n].reshape(n, n)
    ends = [min(size, stop * p // q) for size, stop in zip(sharp.shape, box.stop, strict=True)]
    inside = Box(triple([s * p // q for s in box.start]), triple(ends)).relative_to(triple(first))
    return confusion, changed_faces(window, inside, p), sums


def agreement(
    study: Study, low_res: Volume, volume: Volume, *, client: Client, progress: bool = True
) -> dict[str, Any]:
    """The `low_res` entry of metrics.json."""
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
        client, _compare, blocks(shape, (edge,) * 3), low_res=Source.of(low_res), volume=Source.of(volume),
        study_json=study.as_json(),
    )  # fmt: skip
    follow(tasks, f"low-res agreement of {Path(volume.path).name}", progress)
    confusions, faces, sums = zip(*client.gather(tasks), strict=True)
    confusion, (changed, every) = sum(confusions), sum(faces)
    names = [" + ".join(group) for group in study.low_res.groups]
    voxels = int(confusion.sum())
    if voxels == 0:
        raise InputError(f"{low_res.path}: every voxel is unknown, so nothing can be compared; see low_res.unknown")
    fractions, difference = (confusion.sum(1) / voxels, confusion.sum(0) / voxels), {}
    if low_res.parts:
        given, seen, off = sum(sums) / voxels
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
        "confusion": {
            a: dict(zip(names, map(int, row), strict=True)) for a, row in zip(names, confusion, strict=True)
        },
        "changed_faces": dict(zip(AXES, (changed / np.maximum(every, 1)).tolist(), strict=True)),
        "lattice_imprint": lattice_imprint(changed, every),
    }
