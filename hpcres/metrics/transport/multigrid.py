"""Conjugate gradients for steady diffusion, preconditioned by multigrid over aggregates of connected voxels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from hpcres.metrics.transport import coarse, fine
from hpcres.metrics.transport.coarse import Graph, Level
from hpcres.metrics.transport.threads import Threads


@dataclass(frozen=True)
class Solved:
    """d_rel is an upper bound; error, the estimate of what it is too high, as a share of it."""

    d_rel: float
    error: float
    iterations: int
    converged: bool
    bytes: int


class System:
    """Bits, vectors and the hierarchy of one volume and direction."""

    def __init__(
        self, bits: np.ndarray, shape: Sequence[int], spacing: Sequence[float], axis: int,
        periodic: Sequence[bool], threads: Threads, labels: np.ndarray | None = None,
        resistance: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.shape, self.threads, self.bits = tuple(shape), threads, bits
        self.labels, self.resistance = labels, resistance
        even = tuple(n + n % 2 for n in shape)
        words = -(-shape[2] // 16)
        assert bits.shape == (even[0] + 2, even[1] + 2, words + 2), (bits.shape, shape)
        self.periodic = tuple(bool(p) and a != axis for a, p in enumerate(periodic))
        self.geometry = (
            even[0], even[1], shape[2], words, *(int(p) for p in self.periodic), axis, 0, shape[axis] - 1
        )
        h = np.asarray(spacing, np.float64)
        unit = h[0] * h[1] * h[2] / h[axis] ** 2
        # Conductances in units of one face along the axis, so that D_rel = energy × length / area in voxels.
        self.g = tuple(np.float32(h.prod() / step**2 / unit) for step in h)
        self.to_d_rel = shape[axis] / (prod(shape) // shape[axis])
        rows = max(2, min(even[1], 2 * (16384 // (words * 16 + 32)), 32))
        deep = max(16, min(64, even[0] // 4 // 2 * 2))
        self.units = [
            (z, min(z + deep, even[0]), y, min(y + rows, even[1]))
            for z in range(0, even[0], deep) for y in range(0, even[1], rows)
        ]  # fmt: skip
        self.floats = fine.scratch_floats(rows, words)
        cells = tuple(n // 2 for n in (even[0], even[1], shape[2] + shape[2] % 2))
        self.cells = np.empty(cells, np.uint8)
        each = threads.each
        self.voxels = sum(each(lambda a, b: fine.find_cells(bits, self.cells, a, b), cells[0], 8))
        counts = np.empty(even[:2], np.int64)
        each(lambda a, b: fine.count_rows(bits, counts, a, b), even[0], 16)
        self.rows = np.concatenate([[0], np.cumsum(counts.reshape(-1))])
        self.levels = self._hierarchy()

    def _hierarchy(self) -> list[Level]:
        each, cells = self.threads.each, self.cells.shape
        counts = np.empty((2, *cells[:2]), np.int64)
        each(lambda a, b: fine.count_parts(self.cells, counts, a, b), cells[0], 8)
        self.parts, number = coarse.accumulated(counts.reshape(2, -1))
        starts, nothing = np.zeros(number + 1, np.int64), (np.empty(0, np.int32), np.empty(0, np.float32))
        to_faces = np.zeros(number, np.float32)
        shared = (self.cells, self.parts, self.geometry, self.g, self.labels, self.resistance)
        rows = cells[0] * cells[1]
        step = max(1, rows // 64)
        each(lambda a, b: fine.connect_parts(*shared, starts, *nothing, to_faces, a, b, False), rows, step)
        starts = coarse.running(starts)
        places, values = np.empty(starts[-1], coarse.index_type(number)), np.empty(starts[-1], np.float32)
        each(lambda a, b: fine.connect_parts(*shared, starts, places, values, to_faces, a, b, True), rows, step)
        graph = Graph(starts, places, values, to_faces, fine.PARTS[self.cells])
        levels = [coarse.as_level(graph, self.parts, self.periodic, each)]
        while levels[-1].parts > coarse.DENSE and max(levels[-1].cells) > 1:
            graph, rows_next = coarse.coarser(levels[-1], graph, each)
            levels.append(coarse.as_level(graph, rows_next, self.periodic, each))
        last = levels[-1]
        if last.parts <= coarse.DENSE:
            matrix = np.diag(last.diagonal.astype(np.float64))
            of = np.repeat(np.arange(last.parts), np.diff(graph.starts))
            np.add.at(matrix, (of, graph.places), -graph.values.astype(np.float64))
            last.inverse = np.linalg.inv(matrix).astype(np.float32)
        return levels

    @property
    def bytes(self) -> int:
        own = (self.bits, self.cells, self.rows)
        return sum(a.nbytes for a in own) + sum(level.bytes for level in self.levels) + 16 * self.voxels

    def _over(self, kernel: Callable[..., Any], *arguments: Any) -> list[Any]:
        def one(unit: Any) -> Any:
            return kernel(unit, self.geometry, self.g, self.bits, *arguments, self.threads.scratch(self.floats))

        return self.threads.over(self.units, one)

    def energy(self, v: np.ndarray, end: float) -> float:
        return sum(self._over(fine.energy, self.rows, self.labels, self.resistance, v, end))

    def subtract_applied(self, p: np.ndarray, alpha: float, end: float, r: np.ndarray) -> None:
        self._over(fine.subtract_applied, self.rows, self.labels, self.resistance, p, alpha, end, r)

    def precondition(self, r: np.ndarray, z: np.ndarray) -> float:
        """z = M⁻¹ r; returns r · z."""
        first = self.levels[0]
        shared = (self.rows, self.cells, self.parts, self.labels, self.resistance, r)
        self._over(fine.sweep_down, *shared, first.b)
        coarse.cycle(self.levels, 0, self.threads.each)
        return sum(self._over(fine.sweep_up, *shared, first.x, z))

    def add_scaled(self, y: np.ndarray, x: np.ndarray, scale_y: float, scale_x: float) -> None:
        a, b = np.float32(scale_y), np.float32(scale_x)
        self.threads.each(lambda i, j: fine.add_scaled(y, x, a, b, i, j), len(y), 1 << 20)

    def solve(
        self, rtol: float, *, limit: int = 200, report: Callable[[int, float, float], None] | None = None
    ) -> tuple[Solved, np.ndarray]:
        """Stops when the estimated error of D_rel is under rtol; with the potential at conducting voxels."""
        x, r, p, z = (np.zeros(self.voxels, np.float32) for _ in range(4))
        self.threads.each(
            lambda a, b: fine.fill_ramp(self.geometry, self.bits, self.rows, x, a, b), self.geometry[0], 16
        )
        self.subtract_applied(x, 1.0, 1.0, r)
        energy = self.energy(x, 1.0)
        terms: list[float] = []
        before, error = 0.0, 1.0
        for iteration in range(limit):
            now = self.precondition(r, z)
            self.add_scaled(p, z, now / before if iteration else 0.0, 1.0)
            alpha = now / self.energy(p, 0.0)
            self.add_scaled(x, p, 1.0, alpha)
            self.subtract_applied(p, alpha, 0.0, r)
            before = now
            terms.append(alpha * now)
            energy -= terms[-1]
            error = sum(terms[-2:]) / energy if len(terms) > 1 else 1.0
            if report is not None:
                report(iteration + 1, energy * self.to_d_rel, error)
            if error < rtol:
                break
        d_rel = self.energy(x, 1.0) * self.to_d_rel
        return Solved(d_rel, error, len(terms), error < rtol, self.bytes), x


def pack(labels: np.ndarray, conducts: np.ndarray, threads: Threads, periodic: Sequence[bool]) -> np.ndarray:
    nz, ny, nx = labels.shape
    bits = np.zeros((nz + nz % 2 + 2, ny + ny % 2 + 2, -(-nx // 16) + 2), np.uint16)
    threads.each(lambda a, b: fine.pack(labels, conducts, bits, a, b), nz, 8)
    return bits


def wrap(bits: np.ndarray, periodic: Sequence[bool]) -> None:
    if periodic[0]:
        bits[0], bits[-1] = bits[-2], bits[1]
    if periodic[1]:
        bits[:, 0], bits[:, -1] = bits[:, -2], bits[:, 1]
