"""The representative-volume curve: how the spread of each metric falls with the size of a sub-volume (Kanit 2003).

Cubes of several edges are drawn from a grid of cells, so that those of one edge never overlap and their scatter is
that of nearly independent samples. They are counted with the faces and edges of their + sides, so that small cubes
lose none and their mean is that of the volume. The variance over the cubes is fitted by D² (V₁/V)^α. The fit at the
whole volume's size is the variance, and its root the standard error, that the whole volume's own value has as a sample
of the material.

α = 1 holds far above the correlation length. A fit over smaller cubes finds less than 1 where larger cubes still gain
less than independent samples would. So both are given: with α fitted, with the range over one standard error of the
fit, and with α = 1 through the largest cubes. Cubes inside the volume cannot show variations over lengths beyond the
volume itself.

metrics.json holds under `statistics.representative`: seed, sizes [{voxels (edge), cubes}], and per metric (named as
in `subvolumes`) {std [per size], mean [per size], exponent, exponent_error, standard_error, range [low, high],
standard_error_1}, null where fewer than two sizes vary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpcres.counting import counts, totals
from hpcres.counting.totals import Counts
from hpcres.geometry import Box, Triple, triple
from hpcres.metrics.schedule import Source, follow, submit
from hpcres.study import Representative
from hpcres.volumes.volume import Volume

if TYPE_CHECKING:
    from distributed import Client

LEAST_CUBES = 8
"""Fewer cells of a size say little of its spread, and what they say is biased by the volume they share."""


@dataclass(frozen=True)
class Fit:
    """Fit of std² = D² (V₁/V)^exponent.

    `standard_error` is that of the whole volume by the fit, and `range` is what one standard error of the fit leaves
    for it. `standard_error_1` is that of the whole volume with exponent 1 through the largest cubes.
    """

    exponent: float
    exponent_error: float
    standard_error: float
    range: tuple[float, float]
    standard_error_1: float


@dataclass(frozen=True)
class Curve:
    """Values of the metrics in cubes of several edges.

    `cubes` maps an edge to the number of cubes. `values` maps metric and phases to an array of values per edge.
    `voxels` is the number of voxels of the volume.
    """

    cubes: Mapping[int, int]
    values: Mapping[str, Mapping[tuple[int, ...], list[np.ndarray]]]
    voxels: int

    def fit(self, values: Sequence[np.ndarray]) -> Fit | None:
        """Fit the variance of `values`, an array per edge, with the size of the cubes (see `fitted`)."""
        return fitted([edge**3 for edge in self.cubes], values, self.voxels)


def cells(seed: int, shape: Sequence[int], edge: int, count: int) -> tuple[Triple, ...]:
    """Draw at most `count` different cells of a grid of cubes that is laid at random.

    Parameters
    ----------
    seed : int
        Seed of the random numbers, together with `edge`.
    shape : sequence of int
        Shape of the volume (z, y, x).
    edge : int
        Edge of a cube in voxels.
    count : int
        Largest number of cells.

    Returns
    -------
    tuple of Triple
        First voxel of each cell.
    """
    random = np.random.default_rng([seed, edge])
    grid = [n // edge for n in shape]
    offset = [int(random.integers(n - g * edge + 1)) for n, g in zip(shape, grid, strict=True)]
    places = (np.unravel_index(int(k), grid) for k in random.permutation(prod(grid))[:count])
    return tuple(triple([o + int(p) * edge for o, p in zip(offset, place, strict=True)]) for place in places)


def fitted(voxels: Sequence[int], values: Sequence[np.ndarray], whole: int) -> Fit | None:
    """Fit a line through ln variance against ln voxels.

    Each size is weighted by how well a variance is known from its number of cubes.

    Parameters
    ----------
    voxels : sequence of int
        Voxels of a cube of each size.
    values : sequence of np.ndarray
        Values of the cubes of each size.
    whole : int
        Number of voxels that the standard error is for.

    Returns
    -------
    Fit or None
        None where fewer than two sizes vary.
    """
    usable = [(v, np.var(x, ddof=1), len(x)) for v, x in zip(voxels, values, strict=True) if len(x) > 1]
    usable = [one for one in usable if one[1] > 0]
    if len(usable) < 2:
        return None
    size, variance, cubes = (np.array(one, float) for one in zip(*usable, strict=True))
    # The logarithm of a variance of n normal values scatters by 2/(n − 1) around a mean that is 1/(n − 1) too low.
    weight, log_variance = (cubes - 1) / 2, np.log(variance) + 1 / (cubes - 1)
    # Around the weighted mean, so that value and slope have errors of their own.
    at = np.log(size)
    middle = np.average(at, weights=weight)
    slope = np.sum(weight * (at - middle) * log_variance) / np.sum(weight * (at - middle) ** 2)
    level = np.average(log_variance, weights=weight)
    left = log_variance - level - slope * (at - middle)
    # Scatter beyond what the cubes explain (a curve that is no straight line) widens the errors.
    wider = max(1.0, np.sum(weight * left**2) / (len(at) - 2)) if len(at) > 2 else 1.0
    level_error = np.sqrt(wider / weight.sum())
    slope_error = np.sqrt(wider / np.sum(weight * (at - middle) ** 2))
    reach = np.log(whole) - middle
    log_error, half = (level + slope * reach) / 2, np.hypot(level_error, slope_error * reach) / 2
    return Fit(
        float(-slope),
        float(slope_error),
        float(np.exp(log_error)),
        (float(np.exp(log_error - half)), float(np.exp(log_error + half))),
        float(np.sqrt(variance[-1] * size[-1] / whole)),
    )


def _count_cell(item: tuple[int, Triple], source: Source, labels: tuple[int, ...]) -> Counts:
    edge, start = item
    volume = source.open()
    box = Box(start, triple([s + edge for s in start]))
    return counts.count(volume.read(box.grown(0, 1, Box.whole(volume.shape))), box.shape, labels)


def representative(
    volume: Volume,
    *,
    client: Client,
    labels: Sequence[int],
    settings: Representative,
    seed: int,
    lengths: tuple[float, float, float] = (1.0, 1.0, 1.0),
    progress: bool = True,
) -> Curve:
    """Measure cubes of every edge of which at least LEAST_CUBES fit side by side.

    Parameters
    ----------
    volume : Volume
        Labels (z, y, x).
    client : Client
        Dask client.
    labels : sequence of int
        Labels of the phases.
    settings : Representative
        Edges of the cubes, and how many of each.
    seed : int
        Seed of the random places.
    lengths : tuple of float
        Voxel edges z, y, x.
    progress : bool
        Whether to show progress.

    Returns
    -------
    Curve
    """
    edges = tuple(e for e in sorted(set(settings.edges)) if prod(n // e for n in volume.shape) >= LEAST_CUBES)
    items = [(edge, start) for edge in edges for start in cells(seed, volume.shape, edge, settings.count)]
    # The largest first, so that no thread is left with one at the end.
    futures = submit(client, _count_cell, items[::-1], source=Source.of(volume), labels=tuple(labels))
    follow(futures, f"representative volume of {Path(volume.path).name}", progress)
    values: dict[str, dict[tuple[int, ...], list[list[float]]]] = {}
    for (edge, _), cube in zip(items, client.gather(futures)[::-1], strict=True):
        for metric, by_key in totals.by_metric(totals.finalize(cube, lengths, labels)).items():
            for key, value in by_key.items():
                per_size = values.setdefault(metric, {}).setdefault(key, [[] for _ in edges])
                per_size[edges.index(edge)].append(value)
    arrays = {m: {k: [np.array(v) for v in sizes] for k, sizes in keys.items()} for m, keys in values.items()}
    return Curve(Counter(edge for edge, _ in items), arrays, prod(volume.shape))
