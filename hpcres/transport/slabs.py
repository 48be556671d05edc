"""One direction of a volume, solved in slabs of planes on several ranks or out of core."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from hpcres.geometry import AXES
from hpcres.transport.form import Form
from hpcres.transport.percolation import Clusters, Through, join_clusters
from hpcres.transport.place import Place
from hpcres.transport.problem import Solution, SolveSettings
from hpcres.transport.slab import Slab
from hpcres.transport.slab_solver import SlabSolver
from hpcres.transport.threads import Threads
from hpcres.transport.voxels import Medium, by_label, pack, tau_of_layers

ReadPlanes = Callable[[int, int], np.ndarray]
"""read(z0, z1) returns the labels of planes z0 … z1 - 1 (z, y, x), uint8."""


@dataclass(frozen=True)
class VolumeInSlabs:
    """A volume that is solved in slabs.

    Parameters
    ----------
    place : Place
        Where the slabs are.
    read : callable
        Reads planes (see `ReadPlanes`).
    shape : sequence of int
        Voxels of the volume z, y, x.
    unit_planes : int
        Planes of a unit.
    """

    place: Place
    read: ReadPlanes
    shape: Sequence[int]
    unit_planes: int

    def clusters(self, conducts: np.ndarray, sides: Sequence[bool], threads: Threads) -> tuple[list[Any], np.ndarray]:
        """Find the clusters of each slab here, and count the voxels of each label in the volume."""
        counts, found, last = [], [], len(self.place.extents) - 1
        for number in self.place.here:
            extent = self.place.extents[number]
            labels = self.read(extent.begin, min(extent.end, self.shape[0]))
            counts.append(np.bincount(labels.reshape(-1), minlength=256))
            bits = pack(labels, conducts, threads)
            found.append(Clusters(bits, labels.shape, (False, *sides[1:]), threads))
            found[-1].is_slab(number == 0, number == last)
        return found, sum(self.place.everyone(counts), np.zeros(256, np.int64))

    def solver(self, medium: Medium, threads: Threads) -> SlabSolver:
        """Set up the slabs here; the place already holds their bits."""
        slabs, deep = [], self.shape[0]
        for number in self.place.here:
            extent = self.place.extents[number]
            read_labels = None
            if medium.resistance is not None:
                planes = range(extent.first, min(extent.first + extent.planes, deep + extent.high * medium.periodic[0]))
                read_labels = self.place.keep_labels(number, _around(self.read, planes, deep))
            bits = self.place.with_neighbours(number)
            slabs.append(Slab(number, extent, self.unit_planes, bits, medium, threads, read_labels))
        return SlabSolver(self.place, slabs, threads)


def solve_in_slabs(
    volume: VolumeInSlabs,
    conductivity: Mapping[int, float],
    direction: str,
    settings: SolveSettings,
    threads: Threads,
    *,
    report: Callable[[int, float, float], None] | None = None,
    keep: Callable[[Slab, np.ndarray], None] | None = None,
) -> Solution:
    """Solve transport along one direction, in slabs.

    Parameters
    ----------
    volume : VolumeInSlabs
        The volume and its slabs.
    conductivity : mapping
        Positive conductivities of the labels that conduct.
    direction : str
        z, y or x.
    settings : SolveSettings
        Voxel edges, boundaries, exactness.
    threads : Threads
        Runs the kernels.
    report : callable, optional
        report(iterations, D_rel, estimated error), called after every iteration where `place.first`.
    keep : callable, optional
        keep(slab, potential), called for every slab here.

    Returns
    -------
    Solution
    """
    place, voxels, start = volume.place, prod(volume.shape), time.perf_counter()
    axis, sides = AXES.index(direction), settings.sides(direction, volume.shape)
    conducts, of_label, resistance, unit = by_label(conductivity)
    found, counted = volume.clusters(conducts, sides, threads)
    fraction, mean = float(counted[conducts].sum()) / voxels, float(counted @ of_label) / voxels
    again = join_clusters(place, found, sides[0])[axis]
    through: list[Through] = [one.through(axis) for one in found]
    aggregates = sum(len(one.touches) for one in found)
    del found
    sums = np.sum(place.everyone([(t.voxels, t.clusters_left_out, t.voxels_left_out) for t in through]), axis=0)
    kept = int(sums[0])
    left_out: dict[str, Any] = {"clusters_left_out": int(sums[1]) - again, "voxels_left_out": int(sums[2])}
    if kept == 0:
        seconds = time.perf_counter() - start
        return Solution("not percolating", fraction, 0.0, 0.0, 0.0, mean, 0.0, **left_out, seconds=seconds)
    held = [t.bits for t in through]
    del through
    progress = partial(_scaled, report, unit) if report is not None and place.first else None

    def solver_of(in_float64: bool) -> SlabSolver:
        form = Form.of(volume.shape, settings.edges, resistance, in_float64)
        place.expect(kept, aggregates, 0 if resistance is None else voxels, form, volume.shape)
        place.hold(held)
        return volume.solver(Medium(volume.shape, settings.edges, axis, sides, resistance, in_float64), threads)

    solver = solver_of(False)
    solved, potential = solver.solve(settings.rtol, report=progress)
    if not solved.converged and solver.form.dtype is np.float32:
        del solver, potential
        solver = solver_of(True)
        solved, potential = solver.solve(settings.rtol, report=progress)
    share = kept / voxels
    conducted = share * unit if resistance is None else solver.mean_conductivity(of_label)
    layers = tuple(map(float, tau_of_layers(*solver.layers(potential, of_label)))) if settings.profile else None
    if keep is not None:
        solver.visit(lambda slab: keep(slab, potential.of(slab, 1)))
    return Solution(
        "converged" if solved.converged else "not converged",
        fraction,
        share,
        solved.D_rel * unit if solved.converged else None,
        solved.error if solved.converged else None,
        mean,
        conducted,
        **left_out,
        iterations=solved.iterations,
        seconds=time.perf_counter() - start,
        bytes=solved.bytes,
        profile=layers,
    )


def _around(read: ReadPlanes, planes: range, deep: int) -> np.ndarray:
    """Read planes that may reach around the volume's ends."""
    cuts = [planes.start, *(end for end in (0, deep) if planes.start < end < planes.stop), planes.stop]
    parts = [read(a % deep, (b - 1) % deep + 1) for a, b in pairwise(cuts)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _scaled(report: Callable[[int, float, float], None], unit: float, iterations: int, d: float, error: float) -> None:
    report(iterations, d * unit, error)
