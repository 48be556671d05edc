"""A volume that no single process holds: read plane by plane, solved in slabs over MPI or out of core."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from hpcres.cores import cores
from hpcres.errors import InputError
from hpcres.geometry import AXES, Box
from hpcres.transport.fields import FIELD_PLANES
from hpcres.transport.form import Form
from hpcres.transport.in_memory import solve
from hpcres.transport.memory_need import BYTES_OF_CUBIC, BYTES_PER_VOXEL, check_memory
from hpcres.transport.place import Place
from hpcres.transport.problem import Keep, Means, Report, Solution, SolveSettings
from hpcres.transport.ranked import RankPlace
from hpcres.transport.scratch import BYTES_OF_PYTHON, BYTES_PER_SLAB_VOXEL, ScratchPlace
from hpcres.transport.slab import HALO, Slab, cut
from hpcres.transport.slabs import VolumeInSlabs, solve_in_slabs
from hpcres.transport.threads import Threads
from hpcres.transport.voxels import by_label, planes_of_unit
from hpcres.volumes.volume import Volume


class SlabVolume:
    """The planes of a box of a volume, on the ranks of a communicator or for one process that may hold so many bytes.

    `found` maps each label in it to the number (uint8) that the label has in what `read` gives.
    """

    def __init__(self, volume: Volume, box: Box, means: Means, *, whole_chunks: bool) -> None:
        """Read and count the labels; with `whole_chunks` slabs are whole chunks of a store of fields."""
        comm = means.comm
        self._volume, self._box, self._scratch = volume, box, means.scratch
        self._memory = None if means.memory is None else max(0, means.memory - BYTES_OF_PYTHON)
        self._threads, self._say, self._comm = means.threads or cores(), means.say, comm
        deep, self._active = box.shape[0], comm
        size = comm.Get_size() if comm else 1
        self._unit = FIELD_PLANES if whole_chunks else planes_of_unit(deep, size)
        self._held: tuple[int, np.ndarray] | None = None
        self._blocks: Any = None
        if comm:
            self._number = len(cut(deep, size, self._unit, False))
            # Ranks beyond the number of slabs only wait for results.
            self._active = comm.Split(0 if comm.Get_rank() < self._number else 1, comm.Get_rank())
            if self._works:
                own = cut(deep, self._number, self._unit, False)[comm.Get_rank()]
                # The first rank gathers levels from 2 on: 2 bytes a voxel of the volume, an eighth of what planes take.
                gathered = deep // 8 // means.on_node if comm.Get_rank() == 0 and self._number > 1 else 0
                check_memory((own.planes + gathered, *box.shape[1:]), on_node=means.on_node)
                begin, end = max(0, own.begin - HALO), min(own.end + HALO, deep)
                self._held = begin, self._raw(begin, end)
        self.counts = self._count()
        values = sorted(self.counts)
        if len(values) > 256:
            raise InputError(f"{volume.path}: has {len(values)} different labels; transport is through at most 256")
        self._values: np.ndarray | None = None if volume.dtype == np.uint8 else np.array(values)
        self.found = {v: v if self._values is None else i for i, v in enumerate(values)}
        if self._held is not None:
            self._held = self._held[0], self._small(self._held[1])

    @property
    def _works(self) -> bool:
        return self._comm is None or self._comm.Get_rank() < self._number

    def _count(self) -> dict[int, int]:
        """Count the voxels of each label."""
        total: dict[int, int] = {}
        deep = self._box.shape[0]
        own = cut(deep, self._number, self._unit, False)[self._comm.Get_rank()] if self._comm and self._works else None
        begin, end = (own.begin, min(own.end, deep)) if own else (0, deep if self._works else 0)
        for z in range(begin, end, 16):
            part = self._raw(z, min(z + 16, end))
            if part.dtype == np.uint8:
                number = np.bincount(part.reshape(-1), minlength=256)
                values = np.flatnonzero(number)
                number = number[values]
            else:
                values, number = np.unique(part, return_counts=True)
            for v, n in zip(values, number, strict=True):
                total[int(v)] = total.get(int(v), 0) + int(n)
        if self._comm:
            everywhere = self._comm.allgather(total)
            total = {v: sum(one.get(v, 0) for one in everywhere) for one in everywhere for v in one}
        return total

    def _raw(self, z0: int, z1: int) -> np.ndarray:
        if self._held is not None and self._held[0] <= z0 and z1 <= self._held[0] + len(self._held[1]):
            return self._held[1][z0 - self._held[0] : z1 - self._held[0]]
        start, stop = self._box.start, self._box.stop
        return self._volume.read(Box((start[0] + z0, *start[1:]), (start[0] + z1, *stop[1:])))

    def _small(self, labels: np.ndarray) -> np.ndarray:
        if self._values is None or labels.dtype == np.uint8:
            return labels
        return np.searchsorted(self._values, labels).astype(np.uint8)

    def read(self, z0: int, z1: int) -> np.ndarray:
        """Read planes z0 … z1 - 1 of the box (z, y, x), uint8, with labels replaced by their numbers."""
        return self._small(self._raw(z0, z1))

    def solve(
        self,
        conductivity: Mapping[int, float],
        settings: SolveSettings,
        *,
        report: Report | None = None,
        keep: Keep | None = None,
    ) -> dict[str, Solution]:
        """Solve as `in_memory.solve`, on every rank.

        `keep` gets each slab here in place of the whole system.

        Parameters
        ----------
        conductivity : mapping
            Positive conductivities by number of the label.
        settings, report, keep
            As of `in_memory.solve`.

        Returns
        -------
        dict
            A `Solution` for each direction.

        Raises
        ------
        InputError
            A periodic axis has a length that slabs do not allow, or the solve would not fit.
        """
        found = {}
        for direction in settings.directions:
            solution = self._solve(conductivity, direction, settings, report, keep)
            found[direction] = self._comm.bcast(solution) if self._comm else solution
        return {direction: one for direction, one in found.items() if one is not None}

    def estimate(
        self,
        edge: int,
        conductivity: Mapping[int, float],
        settings: SolveSettings,
        *,
        report: Any = None,
        keep: Any = None,
    ) -> dict[str, Solution]:
        """Solve blocks of this edge alone, and put them together as resistors (see `estimate`).

        Parameters
        ----------
        edge : int
            Edge of the blocks in voxels.
        conductivity : mapping
            Positive conductivities by number of the label.
        settings : SolveSettings
            Directions, voxel edges, and exactness of each block.
        report, keep
            Not called: an estimate has no iterations and no potential.

        Returns
        -------
        dict
            A `Solution` for each direction, of state "estimate" or "not converged".
        """
        from hpcres.transport.estimate import solve_blocks

        start, key = time.perf_counter(), (edge, tuple(conductivity.items()))
        if self._blocks is None or self._blocks[0] != key:

            def read(box: Box) -> np.ndarray:
                return self._small(self._volume.read(box.relative_to([-a for a in self._box.start])))

            alone = SolveSettings(voxel_size=settings.voxel_size, rtol=settings.rtol)
            self._blocks = key, solve_blocks(read, self._box.shape, edge, conductivity, alone, self._threads)
        blocks = self._blocks[1]
        found = {}
        for direction in settings.directions:
            d_rel = blocks.network(AXES.index(direction), settings.edges)
            seconds = time.perf_counter() - start
            # A network that does not percolate does not say that the volume does not: its state is the same.
            found[direction] = Solution(
                "estimate" if blocks.converged else "not converged",
                blocks.fraction,
                None,
                d_rel if blocks.converged else None,
                conductivity=blocks.conductivity,
                percolating_conductivity=None,
                seconds=seconds,
            )
        return found

    def estimated(self, direction: str) -> dict[str, Any]:
        """Return the number of blocks, their mean D_rel and the unreliability of the last estimate."""
        from hpcres.transport.estimate import UNRELIABILITY

        assert self._blocks is not None
        blocks = self._blocks[1]
        return {
            "blocks": int(np.prod(blocks.D_rel.shape[1:])),
            "mean_D_rel": blocks.mean(AXES.index(direction)),
            "unreliability": UNRELIABILITY,
        }

    def _solve(
        self,
        conductivity: Mapping[int, float],
        direction: str,
        settings: SolveSettings,
        report: Report | None,
        keep: Keep | None,
    ) -> Solution | None:
        shape = self._box.shape
        numbers = {number: self.counts[v] for v, number in self.found.items()}
        conducting = sum(numbers[label] for label in conductivity)
        if self._memory is not None:
            form = Form.of(shape, settings.edges, by_label(conductivity)[2])
            levels = form.bytes_of_levels(shape)
            need = BYTES_PER_VOXEL * prod(shape) + (form.bytes_of_vectors + levels) * conducting
            if need <= self._memory:
                labels, alone = self.read(0, shape[0]), replace(settings, directions=(direction,))
                return solve(labels, conductivity, alone, threads=self._threads, report=report, keep=keep)[direction]
        sides = settings.sides(direction, shape)
        for a, p in enumerate(sides):
            step = 4 if a == 0 else 2
            if p and (shape[a] % step or shape[a] < 8):
                raise InputError(
                    f"`periodic` {AXES[a]}: over MPI and out of core the volume must be a multiple of {step} and at "
                    f"least 8 voxels wide there, not {shape[a]}; take a part with `crop`, or solve it in one memory"
                )
        if not self._works:
            return None
        unit = self._unit
        place: Place
        if self._comm:
            place = RankPlace(self._active, cut(shape[0], self._number, unit, sides[0]))
        else:
            assert self._memory is not None
            slab = 3 * BYTES_PER_SLAB_VOXEL * max(1.0, levels / BYTES_OF_CUBIC[1]) * conducting / shape[0]
            while keep is None and unit > 16 and slab * (unit + 2 * HALO) > self._memory:
                unit = max(16, unit // 2 // 8 * 8)
            place = ScratchPlace(self._scratch, self._memory, cut(shape[0], shape[0], unit, sides[0]), self._say)

        def keep_slab(slab: Slab, x: np.ndarray) -> None:
            assert keep is not None
            keep(direction, slab, x, conductivity)

        volume = VolumeInSlabs(place, self.read, shape, unit)
        with Threads(self._threads) as threads:
            solution = solve_in_slabs(
                volume,
                conductivity,
                direction,
                settings,
                threads,
                report=None if report is None else lambda *now: report(direction, *now),
                keep=keep_slab if keep else None,
            )
        place.finish()
        return solution
