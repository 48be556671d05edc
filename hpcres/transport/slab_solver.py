"""The solver of `multigrid` on slabs of planes, which lie in the memory of several ranks or on scratch storage.

A slab knows 8 planes of its neighbours on both sides. A cell of level 2 is 4 voxels, so that aggregates, their numbers
within a plane and their neighbours follow without communication. Own planes begin at multiples of 8, where cells have
the colours of the whole volume. Vectors are as in memory, the planes of the neighbours included, and refreshed before a
kernel reads them; `Place` says how. Level 1 stays in slabs, as a graph of which each slab knows its part. Levels from 2
on, an eighth of that and less, are gathered on one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from hpcres.transport import coarse
from hpcres.transport.coarse import CHUNK, Graph, Level
from hpcres.transport.form import contrast
from hpcres.transport.multigrid import hierarchy
from hpcres.transport.place import Place, TwoFloatVector
from hpcres.transport.slab import BLACK, RED, Slab
from hpcres.transport.solver import Solver
from hpcres.transport.threads import Threads


class SlabSolver(Solver):
    """The slabs of one volume and direction that are worked on here, their hierarchy, and the operations on vectors."""

    def __init__(self, place: Place, slabs: Sequence[Slab], threads: Threads) -> None:
        self.place, self.slabs, self.threads = place, slabs, threads
        self.to_d_rel, self.contrast, self.form = slabs[0].to_d_rel, contrast(slabs[0].resistance), slabs[0].form
        pieces = []
        for slab in slabs:
            level, piece = slab.build()
            place.keep_level(slab, level)
            self._mixed = level.mixed
            pieces.append(piece)
        counted = place.everyone([piece.counts for piece in pieces])
        rows, aggregates = coarse.accumulated(np.concatenate(counted, axis=1))
        below = slabs[0].cells_next[1]
        self.starts = rows[:, ::below]
        kind = coarse.index_type(aggregates)
        for slab, piece in zip(slabs, pieces, strict=True):
            named = self._numbers_in_volume(slab).astype(kind, copy=False)
            piece.places = (named[piece.places[0]], named[piece.places[1]])
        voxels = sum(slab.own_part(0)[0].stop - slab.own_part(0)[0].start for slab in slabs)
        place.refuse_coarse(aggregates, sum(slab.bits.nbytes + slab.cells.nbytes for slab in slabs), voxels)
        all_pieces = place.to_first(pieces)
        self.levels: list[Level] = []
        if all_pieces is not None:
            del pieces

            def joined(name: str) -> np.ndarray:
                assert all_pieces is not None
                array = np.concatenate([getattr(piece, name)[c] for c in (RED, BLACK) for piece in all_pieces])
                for piece in all_pieces:
                    setattr(piece, name, None)
                return array

            degrees = coarse.running(np.concatenate([[0], joined("degrees")]).astype(np.int64))
            numbers = np.concatenate([piece.numbers for piece in all_pieces])
            places, values, to_faces = joined("places"), joined("values"), joined("to_faces")
            all_pieces = None
            one, graph = slabs[0], Graph(degrees, places, values, to_faces, numbers)
            form = self.form.after(one.step).after(one.step_next)
            level = coarse.as_level(graph, rows, one.periodic, form, threads.each)
            self.levels = hierarchy(level, graph, form, one.periodic, threads)
        self.b, self.x = place.vector(slabs, 1), place.vector(slabs, 1)
        self.b_next, self.x_next = place.vector(slabs, 2), place.vector(slabs, 2)

    def _numbers_in_volume(self, slab: Slab) -> np.ndarray:
        """Return the numbers in the volume of the aggregates of level 2 that a slab knows."""
        starts, planes = slab.starts(2), self.starts.shape[1] - 1
        numbers = np.empty(starts[1, -1], np.int64)
        for k in range(starts.shape[1] - 1):
            at = k + slab.first // slab.planes_per(2)
            # Around a periodic axis with an odd number of cells red is black.
            swapped = (at % planes - at) & 1
            for colour in (RED, BLACK):
                begin, end = starts[colour, k], starts[colour, k + 1]
                numbers[begin:end] = self.starts[colour ^ swapped, at % planes] + np.arange(end - begin)
        return numbers

    def visit(self, *stages: Callable[[Slab], None]) -> None:
        """Run stages on every slab here, one stage after the other on each."""
        self.place.run(self.slabs, *stages)

    def _sum(self, found: Mapping[int, list[float]]) -> float:
        """Add one number a unit, in the order of units wherever they are from."""
        return sum(v for slab in self.place.everyone([found[s.number] for s in self.slabs]) for v in slab)

    @property
    def bytes(self) -> int:
        """Bytes held everywhere for a solve, vectors included."""
        here = self.place.bytes(self.slabs) + sum(level.bytes for level in self.levels)
        return sum(self.place.everyone([here] + [0] * (len(self.slabs) - 1)))

    def vector(self) -> Any:
        """Make a vector of zeros."""
        return self.place.vector(self.slabs, 0)

    def solution(self) -> Any:
        """Make zeros for x: one vector, or two where `form.two_floats`."""
        return TwoFloatVector(self.vector(), self.vector()) if self.form.two_floats else self.vector()

    def start(self, x: Any) -> None:
        """Set x to the potential of a uniform volume."""

        def ramp(slab: Slab) -> None:
            values = x.of(slab)
            slab.fill_ramp(values)
            x.put(slab, values)

        self.visit(ramp)

    def find_residual(self, x: Any, r: Any) -> None:
        """Set r = sources - A x."""

        def find(slab: Slab) -> None:
            left = r.of(slab)
            left[:] = 0
            slab.subtract_applied(x.of(slab, 1), 1.0, 1.0, left)
            r.put(slab, left)

        self.visit(find)

    def energy(self, x: Any, end: float) -> float:
        """Return the energy that x dissipates, with the far face at the potential `end`."""
        found: dict[int, list[float]] = {}

        def measure(slab: Slab) -> None:
            found[slab.number] = slab.energies(x.of(slab, 1), end)

        self.visit(measure)
        return self._sum(found)

    def turn(self, p: Any, z: Any, beta: float) -> float:
        """Set p = z + β p, and return its energy."""
        found: dict[int, list[float]] = {}

        def add(slab: Slab) -> None:
            values, own = p.of(slab), slab.own_part(0)[0]
            slab.add_scaled(values[own], z.of(slab)[own], beta, 1.0)
            p.put(slab, values)

        def measure(slab: Slab) -> None:
            found[slab.number] = slab.energies(p.of(slab, 1), 0.0)

        self.visit(add, measure)
        return self._sum(found)

    def advance(self, x: Any, r: Any, p: Any, alpha: float) -> None:
        """Set x += α p and r -= α A p."""

        def step(slab: Slab) -> None:
            own, along = slab.own_part(0)[0], p.of(slab, 1)
            values, left = x.of(slab), r.of(slab)
            slab.add_to_solution(values, along, alpha, own)
            x.put(slab, values)
            slab.subtract_applied(along, alpha, 0.0, left)
            r.put(slab, left)

        self.visit(step)

    def precondition(self, r: Any, z: Any) -> float:
        """Set z = M⁻¹ r, and return r · z."""
        found: dict[int, list[float]] = {}

        def down(slab: Slab) -> None:
            b = self.b.of(slab)
            slab.sweep_down(r.of(slab, 2), b)
            self.b.put(slab, b)

        def up(slab: Slab) -> None:
            values = z.of(slab)
            # Two planes of voxels beyond the own ones, as of r.
            correction = self.x.of(slab, 2 // slab.step[0], (RED, BLACK))
            found[slab.number] = slab.sweep_up(r.of(slab, 2), correction, values)
            z.put(slab, values)

        self.visit(down)
        self._cycle()
        self.visit(up)
        return self._sum(found)

    # ---- level 1, as `coarse.cycle` ------------------------------------------------------------------------

    def _relaxed(self, colour: int) -> Callable[[Slab], None]:
        """Make the stage that relaxes one colour from the other."""

        def relax(slab: Slab) -> None:
            level, b = self.place.level(slab), self.b.of(slab)
            x = self.x.of(slab, 1, (RED, BLACK) if level.mixed else (1 - colour,))
            own = slab.own_part(1)[colour]
            out = level.spare if level.mixed else x
            graph = (level.places, level.values, *level.more, level.diagonal, b)
            begin = own.start
            self.threads.each(lambda i, j: coarse.relax(*graph, x, out, begin + i, begin + j), own.stop - begin, CHUNK)
            if level.mixed:
                x[own] = out[own]
            self.x.put(slab, x)

        return relax

    def _from_zero(self, slab: Slab) -> None:
        level, b, x = self.place.level(slab), self.b.of(slab), self.x.of(slab)
        red, black = slab.own_part(1)
        coarse.relax_from_zero(b, level.diagonal, x, red.start, red.stop)
        x[black] = 0
        self.x.put(slab, x)

    def _restrict(self, slab: Slab) -> None:
        level, b, out = self.place.level(slab), self.b.of(slab), self.b_next.of(slab)
        x = self.x.of(slab, 1, (RED, BLACK) if level.mixed else (BLACK,))
        graph = (level.places, level.values, *level.more, level.diagonal, b)
        lowest, highest = slab.own_planes(2)
        rows, first = (highest - lowest) * slab.cells_next[1], lowest * slab.cells_next[1]
        self.threads.each(
            lambda i, j: coarse.restrict(
                *graph,
                x,
                level.to_faces,
                level.parent,
                slab.aggregates,
                slab.aggregates_next,
                level.cells,
                slab.cells_next,
                level.step,
                2 if level.mixed else 1,
                first + i,
                first + j,
                out,
            ),
            rows,
            max(1, rows // 64),
        )
        self.b_next.put(slab, out)

    def _prolong(self, slab: Slab) -> None:
        level, x, correction = self.place.level(slab), self.x.of(slab), self.x_next.of(slab)
        for own in slab.own_part(1)[: 2 if level.mixed else 1]:
            coarse.prolong(correction, level.parent, x, slab.form.dtype(level.correction), own.start, own.stop)
        self.x.put(slab, x)

    def _cycle(self) -> None:
        for visit in range(2):
            before = [self._from_zero] if visit == 0 else [self._relaxed(RED)] if self._mixed else []
            self.visit(*before, self._relaxed(BLACK), self._restrict)
            b, x = (self.levels[0].b, self.levels[0].x) if self.levels else (None, None)
            self.place.collect(self.b_next, self.slabs, b, self.starts)
            if self.levels:
                coarse.cycle(self.levels, 0, self.threads.each)
            self.place.spread(x, self.x_next, self.slabs, self.starts)
            self.visit(self._prolong, self._relaxed(BLACK), self._relaxed(RED))

    # ---- what was solved -----------------------------------------------------------------------------------

    def mean_conductivity(self, of_label: np.ndarray) -> float:
        """Return the mean conductivity over the volume, of the voxels that take part."""
        found = self.place.everyone([slab.conductivity(of_label) for slab in self.slabs])
        return sum(found) / prod(self.slabs[0].shape)

    def layers(self, x: Any, of_label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute as `Voxels.layers`, of the whole volume."""
        found: list[Any] = []
        self.visit(lambda slab: found.append(slab.layers(x.of(slab, 1), of_label)))
        everywhere = self.place.everyone(found)
        energy, conductivity = (np.sum([one[i] for one in everywhere], axis=0) for i in range(2))
        return energy, conductivity
