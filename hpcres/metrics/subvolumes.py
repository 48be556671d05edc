"""Distributions over random sub-volumes, as the papers plot them: 256 cubes of 64³ (Dahari 2022, figs. 2 and 5).

metrics.json holds under `subvolumes`: voxels (edge of a cube), count, seed, starts [[z, y, x]], and per metric
{mean, std, values}: volume_fraction and specific_surface_faces per phase, interphase_area per pair, tpb_density,
tpb_normalised; under `transport` {phase: {direction: {D_rel, tau, percolating, count}}} over the first cubes,
where tau is over the percolating ones. Where no sub-volumes are drawn, it holds `skipped`, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpcres.counting import counts, totals
from hpcres.counting.totals import Counts
from hpcres.geometry import AXES, Box, Triple, triple
from hpcres.metrics.schedule import Source, follow, submit
from hpcres.study import SubVolumes
from hpcres.transport import Solution, SolveSettings
from hpcres.transport.in_memory import solve_phase
from hpcres.volumes.volume import Volume

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True)
class Distributions:
    """Values per cube in the order of `starts`; keys are tuples of labels, empty for one number per cube."""

    edge: int
    seed: int
    starts: tuple[Triple, ...] = ()
    values: dict[str, dict[tuple[int, ...], list[float]]] = field(default_factory=dict)
    transport: dict[int, dict[str, list[Solution]]] = field(default_factory=dict)
    skipped: str = ""


def positions(seed: int, shape: Sequence[int], count: int, edge: int) -> tuple[Triple, ...]:
    """Draw the first voxels of `count` cubes anywhere in `shape`.

    The first k cubes are the same for any count ≥ k.

    Parameters
    ----------
    seed : int
        Seed of the random numbers.
    shape : sequence of int
        Shape of the volume (z, y, x), at least `edge` along each axis.
    count : int
        Number of cubes.
    edge : int
        Edge of a cube in voxels.

    Returns
    -------
    tuple of Triple
    """
    room = [n - edge + 1 for n in shape]
    assert min(room) >= 1, (shape, edge)
    drawn = np.random.default_rng(seed).random((count, 3))
    return tuple(triple([int(r * n) for r, n in zip(row, room, strict=True)]) for row in drawn)


def _count_cube(start: Triple, source: Source, edge: int, labels: tuple[int, ...]) -> Counts:
    return counts.count(_cube(start, source, edge), labels=labels)


def _transport_of_cube(
    start: Triple, source: Source, edge: int, labels: tuple[int, ...], lengths: tuple[float, float, float]
) -> dict[int, dict[str, Solution]]:
    cube = _cube(start, source, edge)
    return {i: solve_phase(cube == i, SolveSettings(directions=AXES, voxel_size=lengths), threads=1) for i in labels}


def _cube(start: Triple, source: Source, edge: int) -> np.ndarray:
    return source.open().read(Box(start, triple([s + edge for s in start])))


def subvolumes(
    volume: Volume,
    *,
    client: Client,
    labels: Sequence[int],
    settings: SubVolumes,
    seed: int,
    within: Sequence[int] | None = None,
    lengths: tuple[float, float, float] = (1.0, 1.0, 1.0),
    progress: bool = True,
) -> Distributions:
    """Measure random cubes of a volume.

    Parameters
    ----------
    volume : Volume
        Labels (z, y, x).
    client : Client
        Dask client.
    labels : sequence of int
        Labels of the phases.
    settings : SubVolumes
        Edge and number of the cubes, and how many of them are solved for transport.
    seed : int
        Seed of the random places.
    within : sequence of int, optional
        A shape to stay inside; by default that of the volume.
    lengths : tuple of float
        Voxel edges z, y, x.
    progress : bool
        Whether to show progress.

    Returns
    -------
    Distributions
        With the reason in `skipped` where the cubes do not fit.
    """
    shape, edge = tuple(within or volume.shape), settings.voxels
    if min(shape) < edge:
        size = " × ".join(map(str, shape))
        return Distributions(edge, seed, skipped=f"cubes of {edge} voxels do not fit into {size}")
    starts = positions(seed, shape, settings.count, edge)
    source, name = Source.of(volume), Path(volume.path).name
    fixed = {"source": source, "edge": edge, "labels": tuple(labels)}
    counting = submit(client, _count_cube, starts, **fixed)
    follow(counting, f"sub-volumes of {name}", progress)
    transport: dict[int, dict[str, list[Solution]]] = {}
    if settings.transport_count:
        solving = submit(client, _transport_of_cube, starts[: settings.transport_count], lengths=lengths, **fixed)
        follow(solving, f"transport of sub-volumes of {name}", progress)
        solved = client.gather(solving)
        transport = {i: {axis: [cube[i][axis] for cube in solved] for axis in AXES} for i in labels}
    values: dict[str, dict[tuple[int, ...], list[float]]] = {}
    for cube in client.gather(counting):
        found = totals.finalize(cube, lengths, labels)
        for metric, by_key in totals.by_metric(found).items():
            for key, value in by_key.items():
                values.setdefault(metric, {}).setdefault(key, []).append(value)
    return Distributions(edge, seed, starts, values, transport)
