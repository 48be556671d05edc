"""A slab of planes of a volume, with 8 planes of its neighbours on both sides.

A cell of level 2 is 4 voxels, so that aggregates, their numbers within a plane and their neighbours follow without
communication. Own planes begin at multiples of 8, where cells have the colours of the whole volume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from hpcres.transport import aggregation, coarse
from hpcres.transport.coarse import Level
from hpcres.transport.threads import Threads
from hpcres.transport.voxels import Medium, Planes, Voxels

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
        medium: Medium,
        threads: Threads,
        read_labels: Callable[[], np.ndarray] | None = None,
    ) -> None:
        self.number, self.extent, self._read_labels = number, extent, read_labels
        own = (extent.low, extent.low + extent.end - extent.begin)
        super().__init__(bits, medium, threads, planes_of=Planes(extent.first, own, unit_planes))
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
