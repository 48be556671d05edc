"""Comparison of slices of a volume with the high-res images, for volumes whose truth is not known.

The statistics are phase fractions, interphase areas per direction, triple-phase points, two-point correlations up to 16
voxels, and the patterns of 3 × 3 pixels at spacing 1 and 4. tv1 and tv4 are the total-variation distances of the
histograms of these patterns; they are the simplest statistics that tell a network from interpolation. Slices are
compared in the same plane, or in all planes together where the material is isotropic.

In metrics.json a study's volume, and its reference, have `appearance`: cubes (how many were looked at), edge (of
these, voxels) and planes {"all" where isotropic, else "yx", "zx" and "zy": {volume_fraction {phase: share},
interphase_area {"a|b": [faces across rows / all of these, across columns]}, tpb, errors}}. The images have the same
`planes` without errors but with `quarters`, the errors of each quarter of all images against the whole. They show how
large the errors of a piece that small are by chance alone. errors: fraction_error, area_error, correlation_error,
tpb_error, tv1, tv4, as in `errors_between`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcres.counting import counts
from hpcres.counting.slices import SliceStatistics, errors_between, plane_statistics, slice_statistics
from hpcres.geometry import Box, blocks
from hpcres.metrics.schedule import Source, follow, submit
from hpcres.study import HighRes
from hpcres.volumes.images import images_by_plane
from hpcres.volumes.volume import Volume

if TYPE_CHECKING:
    from distributed import Client

_EDGE, _CUBES = 128, 64
"""Of a volume, so many cubes of this edge are looked at, evenly spaced where there are more."""


def appearance_of_images(high_res: HighRes) -> dict[str, Any]:
    """Compute the `planes` of the images.

    Parameters
    ----------
    high_res : HighRes
        The study's high-res images and their phases.

    Returns
    -------
    dict
        For each plane the statistics by phase name, and `quarters`.
    """
    result, phases = {}, len(high_res.phases)
    for plane, stacks in images_by_plane(high_res).items():
        whole = slice_statistics(stacks, phases)
        quarters = [slice_statistics(_quarter(stacks, *divmod(k, 2)), phases) for k in range(4)]
        apart = [errors_between(one, whole, high_res.isotropic) for one in quarters]
        spread = {key: [errors[key] for errors in apart] for key in apart[0]}
        result[plane] = {**_named(whole, high_res), "quarters": spread}
    return result


def _quarter(stacks: Sequence[np.ndarray], down: int, across: int) -> list[np.ndarray]:
    halves = [(s.shape[1] // 2, s.shape[2] // 2) for s in stacks]
    return [
        s[:, down * r : (down + 1) * r, across * c : (across + 1) * c] for s, (r, c) in zip(stacks, halves, strict=True)
    ]


def _named(seen: SliceStatistics, high_res: HighRes) -> dict[str, Any]:
    names = list(high_res.phases.values())
    return {
        "volume_fraction": dict(zip(names, seen.volume_fraction.tolist(), strict=True)),
        "interphase_area": {
            f"{a}|{b}": shares
            for (a, b), shares in zip(combinations(names, 2), seen.interphase_area.T.tolist(), strict=True)
        },
        "tpb": seen.tpb,
    }


def _statistics_of(box: Box, source: Source, high_res: HighRes) -> dict[str, SliceStatistics]:
    index, _ = counts.indexed(source.open().read(box), tuple(range(len(high_res.phases))))
    return plane_statistics([index], high_res)


def appearance(
    volume: Volume, high_res: HighRes, images: Mapping[str, SliceStatistics], *, client: Client, progress: bool = True
) -> dict[str, Any]:
    """Compute the `appearance` of a volume.

    Parameters
    ----------
    volume : Volume
        Labels 0, 1, 2, … in the order of the phases.
    high_res : HighRes
        The study's high-res images and their phases.
    images : mapping
        Statistics of the images by plane.
    client : Client
        Dask client.
    progress : bool
        Whether to show progress.

    Returns
    -------
    dict
        cubes, edge and planes.
    """
    every = blocks(volume.shape, (_EDGE,) * 3)
    count = min(_CUBES, len(every))
    boxes = [every[(2 * k + 1) * len(every) // (2 * count)] for k in range(count)]
    futures = submit(client, _statistics_of, boxes, source=Source.of(volume), high_res=high_res)
    follow(futures, f"slices of {Path(volume.path).name}", progress)
    found: list[dict[str, SliceStatistics]] = client.gather(futures)
    planes = {}
    for plane, wanted in images.items():
        ours = reduce(SliceStatistics.__add__, (one[plane] for one in found))
        planes[plane] = _named(ours, high_res) | {"errors": errors_between(ours, wanted, high_res.isotropic)}
    return {"cubes": count, "edge": _EDGE, "planes": planes}
