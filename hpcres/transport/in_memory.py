"""Transport through labels that this process holds, on its cores or with vectors and levels on a GPU."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from hpcres.cores import cores
from hpcres.geometry import AXES
from hpcres.transport.form import Form
from hpcres.transport.memory_need import LEFT_OF_SET_UP, check_memory
from hpcres.transport.multigrid import System
from hpcres.transport.percolation import Clusters, Through
from hpcres.transport.problem import Keep, Report, Solution, SolveSettings
from hpcres.transport.threads import Threads
from hpcres.transport.voxels import Medium, by_label, pack, unpacked


def solve_phase(
    mask: np.ndarray, settings: SolveSettings | None = None, *, threads: int | None = None, **more: Any
) -> dict[str, Solution]:
    """Solve transport through a mask (z, y, x), for each direction; arguments are those of `solve`."""
    return solve(np.asarray(mask, bool).view(np.uint8), {1: 1.0}, settings, threads=threads, **more)


def solve(
    labels: np.ndarray,
    conductivity: Mapping[int, float],
    settings: SolveSettings | None = None,
    *,
    threads: int | None = None,
    report: Report | None = None,
    keep: Keep | None = None,
    device: Any = None,
) -> dict[str, Solution]:
    """Solve transport through labels, for each direction.

    The result is the same bits for any number of threads.

    Parameters
    ----------
    labels : np.ndarray
        uint8 (z, y, x).
    conductivity : mapping
        Positive conductivities of the labels that conduct.
    settings : SolveSettings, optional
        Directions, voxel edges, boundaries, exactness.
    threads : int, optional
        By default all cores.
    report : callable, optional
        Called after every iteration (see `problem.Report`).
    keep : callable, optional
        keep(direction, system, potential, conductivity) gets what was solved.
    device : torch.device, optional
        Device to solve on, after set-up on the cores.

    Returns
    -------
    dict
        A `Solution` for each direction.

    Raises
    ------
    InputError
        The solve would not fit in memory.
    """
    assert labels.dtype == np.uint8, labels.dtype
    assert all(k > 0 for k in conductivity.values()), conductivity
    settings = settings or SolveSettings()
    results = {}
    with Threads(threads or cores()) as pool:
        labelled = _Labelled.of(labels, conductivity, settings, pool, device)
        found: tuple[tuple[bool, ...], Any] | None = None
        for direction in settings.directions:
            start, sides = time.perf_counter(), settings.sides(direction, labels.shape)
            if found is None or found[0] != sides:
                found = sides, Clusters(pack(labels, labelled.conducts, pool), labels.shape, sides, pool)
            through = found[1].through(AXES.index(direction))
            if direction == settings.directions[-1]:
                found = None
            solution = labelled.solve(direction, through, report, keep)
            results[direction] = replace(solution, seconds=time.perf_counter() - start)
    return results


@dataclass(frozen=True)
class _Labelled:
    """Labels and how they conduct."""

    labels: np.ndarray
    conductivity: Mapping[int, float]
    conducts: np.ndarray
    of_label: np.ndarray
    resistance: np.ndarray | None
    unit: float
    fraction: float
    mean: float
    settings: SolveSettings
    pool: Threads
    device: Any

    @classmethod
    def of(
        cls, labels: np.ndarray, conductivity: Mapping[int, float], settings: SolveSettings, pool: Threads, device: Any
    ) -> _Labelled:
        conducts, of_label, resistance, unit = by_label(conductivity)
        counted = sum(pool.each(lambda a, b: np.bincount(labels[a:b].reshape(-1), minlength=256), len(labels), 16))
        fraction, mean = float(counted[conducts].sum()) / labels.size, float(counted @ of_label) / labels.size
        known = (conductivity, conducts, of_label, resistance, unit, fraction, mean)
        return cls(labels, *known, settings, pool, device)

    def solve(self, direction: str, through: Through, report: Report | None, keep: Keep | None) -> Solution:
        """Solve along a direction, in float64 where float32 does not converge."""
        left_out: dict[str, Any] = {
            "clusters_left_out": through.clusters_left_out,
            "voxels_left_out": through.voxels_left_out,
        }
        if through.voxels == 0:
            return Solution("not percolating", self.fraction, 0.0, 0.0, 0.0, self.mean, 0.0, **left_out)
        progress = None if report is None else partial(_scaled, report, direction, self.unit)
        rtol, share = self.settings.rtol, through.voxels / self.labels.size
        system = self._system(direction, through.bits, share, in_float64=False)
        solved, potential = system.solve(rtol, report=progress)
        if not solved.converged and system.form.dtype is np.float32:
            del system, potential
            system = self._system(direction, through.bits, share, in_float64=True)
            solved, potential = system.solve(rtol, report=progress)
        kept = share * self.unit if self.resistance is None else system.mean_conductivity(self.of_label)
        layers = None
        if self.settings.profile:
            layers = tuple(float(t) for t in system.profile(potential, self.of_label))
        if keep is not None:
            keep(direction, system, potential, self.conductivity)
        return Solution(
            "converged" if solved.converged else "not converged",
            self.fraction,
            share,
            solved.D_rel * self.unit if solved.converged else None,
            solved.error if solved.converged else None,
            self.mean,
            kept,
            **left_out,
            iterations=solved.iterations,
            bytes=solved.bytes + (self.labels.nbytes if self.device is None else 0),
            profile=layers,
        )

    def _system(self, direction: str, bits: np.ndarray, share: float, *, in_float64: bool) -> Any:
        """Make the system of the conducting voxels in `bits`, a `share` of all.

        InputError is raised where the system would not fit in memory.
        """
        labels, device, shape = self.labels, self.device, self.labels.shape
        sides = self.settings.sides(direction, shape)
        odd = [a for a in range(3) if sides[a] and shape[a] % 2]
        form = Form.of(shape, self.settings.edges, self.resistance, in_float64)
        vectors, levels = float(form.bytes_of_vectors), form.bytes_of_levels(shape)
        check_memory(shape, share, odd, held=(vectors if device is None else 0.0, levels))
        if odd:
            # Red and black meet nowhere around an odd number of voxels: twice the volume is the same system.
            mask = unpacked(bits, shape)
            for a in odd:
                mask, labels = (np.concatenate([v, v], axis=a) for v in (mask, labels))
            bits = pack(mask, np.arange(256) > 0, self.pool)
        make: Any = System
        if device is not None:
            from hpcres.transport.device import DeviceSystem, check_device_memory

            voxels = round(share * labels.size)
            check_device_memory(device, labels.shape, voxels, form.several, vectors + LEFT_OF_SET_UP * levels)
            make = partial(DeviceSystem, device)
        axis = AXES.index(direction)
        medium = Medium(labels.shape, self.settings.edges, axis, sides, self.resistance, in_float64)
        return make(bits, medium, self.pool, None if self.resistance is None else labels)


def _scaled(report: Report, direction: str, unit: float, iterations: int, d_rel: float, error: float) -> None:
    report(direction, iterations, d_rel * unit, error)
