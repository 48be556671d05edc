"""The solver of `multigrid` on slabs of planes, which lie in the memory of several ranks or on scratch storage.

A slab knows 8 planes of its neighbours on both sides. A cell of level 2 is 4 voxels, so that aggregates, their numbers
within a plane and their neighbours follow without communication. Own planes begin at multiples of 8, where cells have
the colours of the whole volume. Vectors are as in memory, the planes of the neighbours included, and refreshed before a
kernel reads them; `Place` says how. Level 1 stays in slabs, as a graph of which each slab knows its part. Levels from 2
on, an eighth of that and less, are gathered on one rank.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from hpcres.geometry import AXES
from hpcres.transport import Solution, aggregation, coarse
from hpcres.transport.coarse import CHUNK, Graph, Level
from hpcres.transport.form import Form, contrast
from hpcres.transport.multigrid import hierarchy
from hpcres.transport.percolation import Clusters, join_clusters
from hpcres.transport.solver import Solver
from hpcres.transport.threads import Threads
from hpcres.transport.voxels import Voxels, by_label, pack, tau_of_layers

HALO = 8  # planes of voxels
RED, BLACK = 0, 1


@dataclass(frozen=True)
class Extent:
    """Own planes of a slab, padded to even at the volume's end, and how many of its neighbours it knows."""

    begin: int
    end: int
    low: int
    high: int

    @property
    def first(self) -> int:
        """First plane that the slab knows."""
        return self.begin - self.low

    @property
    def planes(self) -> int:
        """Number of planes that the slab knows."""
        return self.low + self.end - self.begin + self.high


def cut(planes: int, number: int, deep: int, periodic: bool) -> list[Extent]:
    """Cut a volume into at most `number` slabs, as even as whole units of `deep` planes allow.

    Where there are several slabs, none has fewer than 8 planes.

    Parameters
    ----------
    planes : int
        Planes of the volume.
    number : int
        Largest number of slabs.
    deep : int
        Planes of a unit.
    periodic : bool
        Whether the first and the last slab meet.

    Returns
    -------
    list of Extent
    """
    even = planes + planes % 2
    units = max(1, -(-even // deep))
    if units > 1 and even - (units - 1) * deep < HALO:
        units -= 1
    number = min(number, units)
    begins = [deep * (i * units // number) for i in range(number)] + [even]
    return [
        Extent(a, b, HALO if periodic or a > 0 else 0, HALO if periodic or b < even else 0) for a, b in pairwise(begins)
    ]


@dataclass
class Piece:
    """A slab's contribution to the graph of level 2, its own aggregates only, red then black."""

    counts: np.ndarray  # (2, own rows of cells)
    degrees: tuple[np.ndarray, np.ndarray]
    places: tuple[np.ndarray, np.ndarray]  # numbered within the slab
    values: tuple[np.ndarray, np.ndarray]
    to_faces: tuple[np.ndarray, np.ndarray]
    numbers: np.ndarray  # aggregates of each cell (z, y, x)


class Slab(Voxels):
    """Own planes of one slab and 8 of its neighbours."""

    def __init__(
        self,
        number: int,
        extent: Extent,
        unit_planes: int,
        bits: np.ndarray,
        *arguments: Any,
        read_labels: Callable[[], np.ndarray] | None = None,
        in_float64: bool = False,
    ) -> None:
        self.number, self.extent, self._read_labels = number, extent, read_labels
        own = (extent.low, extent.low + extent.end - extent.begin)
        super().__init__(bits, *arguments, first=extent.first, own=own, unit_planes=unit_planes, in_float64=in_float64)
        whole = [-(-n // s) for n, s in zip(self.shape, self.step, strict=True)]
        self.step_next = self.form.after(self.step).step(whole)

    @property
    def labels(self) -> np.ndarray | None:
        """Labels of the planes that the slab knows, from `read_labels`; None without it."""
        return None if self._read_labels is None else self._read_labels()

    @labels.setter
    def labels(self, labels: np.ndarray | None) -> None:
        assert labels is None

    def planes_per(self, kind: int) -> int:
        """Return how many planes of voxels are in a plane of voxels (kind 0), or of cells of level 1 or 2."""
        return (1, self.step[0], self.step[0] * self.step_next[0])[kind]

    def own_planes(self, kind: int) -> tuple[int, int]:
        """Return the range of own planes of voxels, or of cells of level 1 or 2, from this slab's first."""
        return self.own[0] // self.planes_per(kind), -(-self.own[1] // self.planes_per(kind))

    def starts(self, kind: int) -> np.ndarray:
        """Return where a plane begins in a vector of voxels or of aggregates of level 1 or 2: (colours, planes + 1)."""
        if kind == 0:
            return self.rows[None, :: self.geometry[1]]
        if kind == 1:
            return self.aggregates[:, :: self.cells.shape[1]]
        return self.aggregates_next[:, :: self.cells_next[1]]

    def own_part(self, kind: int) -> list[slice]:
        """Return the own part of a vector, by colour."""
        a, b = self.own_planes(kind)
        return [slice(int(row[a]), int(row[b])) for row in self.starts(kind)]

    def build(self) -> tuple[Level, Piece]:
        """Build level 1 of this slab, and its own aggregate of level 2."""
        graph, each, step = self.first_graph(), self.threads.each, self.step_next
        level = self.first_level(graph, (False, *self.periodic[1:]))
        below: Any = tuple(-(-n // s) for n, s in zip(level.cells, step, strict=True))
        self.cells_next = below
        rows, numbers = below[0] * below[1], graph.numbers
        at_once = max(1, rows // 64)
        most = max(each(lambda a, b: aggregation.count_members(numbers, below, step, a, b), rows, at_once))
        numbers_next, counts = np.zeros(below, np.int32), np.zeros((2, rows), np.int64)
        parent = np.full(level.aggregates, -1, graph.places.dtype)
        csr = (graph.starts, graph.places, graph.values)
        # Edges of aggregates in the outermost planes of the halo are missing here. No aggregate within 4 planes of the
        # own ones depends on them.
        couplings = aggregation.couplings_of(graph, self.form, each)
        each(
            lambda a, b: aggregation.join_aggregates(
                *csr, numbers, self.aggregates, below, step, most, *couplings, a, b, parent, numbers_next, counts
            ),
            rows,
            at_once,
        )
        self.aggregates_next, aggregates = coarse.accumulated(counts)
        each(
            lambda a, b: aggregation.number_aggregates(
                numbers, self.aggregates, step, self.aggregates_next, numbers_next, most, a, b, parent
            ),
            rows,
            at_once,
        )
        degrees, to_faces = np.zeros(aggregates + 1, np.int64), np.zeros(aggregates, self.form.dtype)
        lowest, highest = self.own_planes(2)
        first, last = lowest * below[1], highest * below[1]
        found = each(
            lambda a, b: aggregation.connect(
                *csr,
                graph.to_faces,
                numbers,
                self.aggregates,
                step,
                numbers_next,
                self.aggregates_next,
                parent,
                most,
                first + a,
                first + b,
                degrees,
                to_faces,
            ),
            last - first,
            at_once,
        )
        level.parent, level.step = parent, step
        own = self.own_part(2)
        red, red_values, black, black_values = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return level, Piece(
            counts[:, first:last],
            (degrees[1:][own[0]], degrees[1:][own[1]]),
            (red, black),
            (red_values, black_values),
            (to_faces[own[0]], to_faces[own[1]]),
            numbers_next[lowest:highest],
        )


class Place(ABC):
    """Where the slabs of a volume are: which are worked on here, and how vectors and sums get to others."""

    extents: list[Extent]
    here: Sequence[int]  # slabs that are worked on here
    first = True  # this is where levels from 2 on are, and what speaks

    @abstractmethod
    def run(self, slabs: Sequence[Slab], *stages: Callable[[Slab], None]) -> None:
        """Run each stage on every slab; a stage sees what the one before it did to a slab and its neighbours."""

    @abstractmethod
    def everyone(self, values: list[Any]) -> list[Any]:
        """Return a value of every slab, given those of the slabs here, from everywhere and in the order of slabs."""

    @abstractmethod
    def to_first(self, values: list[Any]) -> list[Any] | None:
        """Return as `everyone`, only where `first`; None elsewhere."""

    @abstractmethod
    def vector(self, slabs: Sequence[Slab], kind: int) -> Any:
        """Make a vector of zeros, at voxels (kind 0) or at aggregates of level 1 or 2.

        of(slab, planes, colours) of the vector is a slab's array with the planes of its neighbours refreshed. put(slab,
        array) keeps the slab's own part.
        """

    @abstractmethod
    def hold(self, bits: list[np.ndarray]) -> None:
        """Hold the bits of the own planes of the slabs here, for `with_neighbours`."""

    @abstractmethod
    def with_neighbours(self, number: int) -> np.ndarray:
        """Return a slab's bits with those of its neighbours, and empty planes outside."""

    @abstractmethod
    def next_planes(self, planes: list[np.ndarray], periodic: bool) -> list[np.ndarray | None]:
        """Return for every slab here what the slab before it gave as `planes`.

        Around a periodic axis the last slab is before the first. At the volume's face the result is None.
        """

    @abstractmethod
    def keep_labels(self, number: int, labels: np.ndarray) -> Callable[[], np.ndarray]:
        """Keep the labels of a slab and its neighbours, and return a function that reads them again."""

    @abstractmethod
    def expect(self, kept: int, aggregates: int, labels: int, form: Form, shape: Sequence[int]) -> None:
        """Prepare for a solve.

        Parameters
        ----------
        kept : int
            Conducting voxels.
        aggregates : int
            Aggregates in cells of 2×2×2 voxels.
        labels : int
            Voxels whose labels are needed.
        form : Form
            The form of the system.
        shape : sequence of int
            Voxels of the whole volume z, y, x.
        """

    @abstractmethod
    def refuse_coarse(self, aggregates: int, bits: int, voxels: int) -> None:
        """Raise InputError where so many aggregates of level 2, in the whole volume, and bytes of bits are too much."""

    @abstractmethod
    def finish(self) -> None:
        """End the work, when all is done."""

    @abstractmethod
    def keep_level(self, slab: Slab, level: Level) -> None:
        """Keep level 1 of a slab, for `level`."""

    @abstractmethod
    def level(self, slab: Slab) -> Level:
        """Return what `keep_level` kept of a slab."""

    @abstractmethod
    def collect(self, vector: Any, slabs: Sequence[Slab], whole: np.ndarray | None, starts: np.ndarray) -> None:
        """Gather the own parts of a vector at level 2, from everywhere into `whole` where `first`."""

    @abstractmethod
    def spread(self, whole: np.ndarray | None, vector: Any, slabs: Sequence[Slab], starts: np.ndarray) -> None:
        """Distribute `whole`, where `first`, to the own parts of a vector at level 2 everywhere."""

    @abstractmethod
    def bytes(self, slabs: Sequence[Slab]) -> int:
        """Return the bytes that slabs hold here, vectors included."""


class TwoFloatVector:
    """A vector that is the sum of two float32 vectors; its arrays are pairs."""

    def __init__(self, high: Any, low: Any) -> None:
        self._parts = high, low

    def of(self, slab: Slab, planes: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return a slab's pair of arrays, with `planes` planes of its neighbours refreshed."""
        high, low = (part.of(slab, planes) for part in self._parts)
        return high, low

    def put(self, slab: Slab, arrays: tuple[np.ndarray, np.ndarray]) -> None:
        """Keep a slab's own part of a pair of arrays."""
        for part, array in zip(self._parts, arrays, strict=True):
            part.put(slab, array)


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

    def _run(self, *stages: Callable[[Slab], None]) -> None:
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

        self._run(ramp)

    def find_residual(self, x: Any, r: Any) -> None:
        """Set r = sources - A x."""

        def find(slab: Slab) -> None:
            left = r.of(slab)
            left[:] = 0
            slab.subtract_applied(x.of(slab, 1), 1.0, 1.0, left)
            r.put(slab, left)

        self._run(find)

    def energy(self, x: Any, end: float) -> float:
        """Return the energy that x dissipates, with the far face at the potential `end`."""
        found: dict[int, list[float]] = {}

        def measure(slab: Slab) -> None:
            found[slab.number] = slab.energies(x.of(slab, 1), end)

        self._run(measure)
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

        self._run(add, measure)
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

        self._run(step)

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

        self._run(down)
        self._cycle()
        self._run(up)
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
            self._run(*before, self._relaxed(BLACK), self._restrict)
            b, x = (self.levels[0].b, self.levels[0].x) if self.levels else (None, None)
            self.place.collect(self.b_next, self.slabs, b, self.starts)
            if self.levels:
                coarse.cycle(self.levels, 0, self.threads.each)
            self.place.spread(x, self.x_next, self.slabs, self.starts)
            self._run(self._prolong, self._relaxed(BLACK), self._relaxed(RED))

    # ---- what was solved -----------------------------------------------------------------------------------

    def mean_conductivity(self, of_label: np.ndarray) -> float:
        """Return the mean conductivity over the volume, of the voxels that take part."""
        found = self.place.everyone([slab.conductivity(of_label) for slab in self.slabs])
        return sum(found) / prod(self.slabs[0].shape)

    def layers(self, x: Any, of_label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute as `Voxels.layers`, of the whole volume."""
        found: list[Any] = []
        self._run(lambda slab: found.append(slab.layers(x.of(slab, 1), of_label)))
        everywhere = self.place.everyone(found)
        energy, conductivity = (np.sum([one[i] for one in everywhere], axis=0) for i in range(2))
        return energy, conductivity


# ---- one volume ----------------------------------------------------------------------------------------------


def solve_in_slabs(
    place: Place,
    read: Callable[[int, int], np.ndarray],
    shape: Sequence[int],
    conductivity: Mapping[int, float],
    direction: str,
    spacing: Sequence[float],
    periodic: Sequence[bool],
    rtol: float,
    threads: Threads,
    unit_planes: int,
    *,
    profile: bool = False,
    report: Callable[[int, float, float], None] | None = None,
    keep: Callable[[Slab, np.ndarray], None] | None = None,
) -> Solution:
    """Solve transport along one direction, in slabs.

    Parameters
    ----------
    place : Place
        Where the slabs are.
    read : callable
        read(z0, z1) returns the labels of these planes (z, y, x), uint8.
    shape : sequence of int
        Voxels of the volume z, y, x.
    conductivity : mapping
        Positive conductivities of the labels that conduct.
    direction : str
        z, y or x.
    spacing : sequence of float
        Voxel edges z, y, x.
    periodic : sequence of bool
        Axes z, y, x whose two sides meet, for this direction.
    rtol : float
        Estimated relative error of D_rel at which the solve stops.
    threads : Threads
        Runs the kernels.
    unit_planes : int
        Planes of a unit.
    profile : bool
        Whether to compute tau of each layer.
    report : callable, optional
        report(iterations, D_rel, estimated error), called after every iteration where `place.first`.
    keep : callable, optional
        keep(slab, potential), called for every slab here.

    Returns
    -------
    Solution
    """
    axis, start = AXES.index(direction), time.perf_counter()
    conducts, of_label, resistance, unit = by_label(conductivity)
    uniform = resistance is None
    counts, found, last = [], [], len(place.extents) - 1
    for number in place.here:
        extent = place.extents[number]
        labels = read(extent.begin, min(extent.end, shape[0]))
        counts.append(np.bincount(labels.reshape(-1), minlength=256))
        across = (False, *periodic[1:])
        bits = pack(labels, conducts, threads)
        found.append(Clusters(bits, labels.shape, across, threads))
        found[-1].is_slab(number == 0, number == last)
    counted = sum(place.everyone(counts))
    voxels = prod(shape)
    fraction, mean = float(counted[conducts].sum()) / voxels, float(counted @ of_label) / voxels
    again = join_clusters(place, found, periodic[0])[axis]
    through = [one.through(axis) for one in found]
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
    progress = None
    if report is not None and place.first:
        progress = partial(_scaled, report, unit)

    def solver_of(in_float64: bool) -> SlabSolver:
        form = Form.of(shape, spacing, resistance, in_float64)
        place.expect(kept, aggregates, 0 if uniform else voxels, form, shape)
        place.hold(held)
        slabs = []
        for number in place.here:
            extent = place.extents[number]
            read_labels = None
            if not uniform:
                planes = range(extent.first, min(extent.first + extent.planes, shape[0] + extent.high * periodic[0]))
                read_labels = place.keep_labels(number, _around(read, planes, shape[0]))
            slabs.append(
                Slab(
                    number,
                    extent,
                    unit_planes,
                    place.with_neighbours(number),
                    shape,
                    spacing,
                    axis,
                    periodic,
                    threads,
                    None,
                    resistance,
                    read_labels=read_labels,
                    in_float64=in_float64,
                )
            )
        return SlabSolver(place, slabs, threads)

    solver = solver_of(False)
    solved, potential = solver.solve(rtol, report=progress)
    if not solved.converged and solver.form.dtype is np.float32:
        del solver, potential
        solver = solver_of(True)
        solved, potential = solver.solve(rtol, report=progress)
    share = kept / voxels
    conducted = share * unit if uniform else solver.mean_conductivity(of_label)
    layers = tuple(map(float, tau_of_layers(*solver.layers(potential, of_label)))) if profile else None
    if keep is not None:
        solver._run(lambda slab: keep(slab, potential.of(slab, 1)))
    return Solution(
        "converged" if solved.converged else "not converged",
        fraction,
        share,
        solved.d_rel * unit if solved.converged else None,
        solved.error if solved.converged else None,
        mean,
        conducted,
        **left_out,
        iterations=solved.iterations,
        seconds=time.perf_counter() - start,
        bytes=solved.bytes,
        profile=layers,
    )


def _around(read: Callable[[int, int], np.ndarray], planes: range, deep: int) -> np.ndarray:
    """Read planes that may reach around the volume's ends."""
    cuts = [planes.start, *(end for end in (0, deep) if planes.start < end < planes.stop), planes.stop]
    parts = [read(a % deep, (b - 1) % deep + 1) for a, b in pairwise(cuts)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _scaled(report: Callable[[int, float, float], None], unit: float, iterations: int, d: float, error: float) -> None:
    report(iterations, d * unit, error)
