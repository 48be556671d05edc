"""Conjugate gradients for steady diffusion, preconditioned by multigrid over aggregates of connected voxels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, prod
from typing import Any

import numpy as np
from scipy.linalg import eigvalsh_tridiagonal
from scipy.sparse import csc_matrix
from scipy.sparse.linalg import splu

from hpcres.metrics.transport import coarse, fine
from hpcres.metrics.transport.coarse import STRONG, WIDEST_PITCH, Coarsening, Graph, Level
from hpcres.metrics.transport.threads import Threads

ROUNDING = 1e-7  # of float32 vectors, on D_rel; no smaller error is claimed
ROBUST_ROUNDING = 5e-7  # of the robust form: of conductances in float32
LEAST_CONTRAST = 0.1  # of conductivities, lowest over highest; below it, and for flat voxels, the solver is robust
# Of conductances, largest over smallest, in float32: rounding of a correction in a good conductor must not dissipate
# more than what the correction gains in a poor one. Beyond, all is float64.
WIDEST_RANGE = 1e5


@dataclass(frozen=True)
class Solved:
    """d_rel is an upper bound; error, the estimate of what it is too high, as a share of it."""

    d_rel: float
    error: float
    iterations: int
    converged: bool
    bytes: int


class Voxels:
    """The conducting voxels of a volume, or of some of its planes, and the kernels on them."""

    def __init__(
        self, bits: np.ndarray, shape: Sequence[int], spacing: Sequence[float], axis: int,
        periodic: Sequence[bool], threads: Threads, labels: np.ndarray | None = None,
        resistance: np.ndarray | None = None, *, first: int = 0, own: tuple[int, int] | None = None,
        unit_planes: int | None = None, careful: bool = False,
    ) -> None:  # fmt: skip
        """shape: of the whole volume. bits begin at its plane `first`, and planes own[0] … own[1] - 1 after that one
        are worked on; without `own` they are the whole volume. labels: of the same planes. careful: robust and in
        float64, whatever voxels and conductivities are."""
        self.shape, self.threads, self.bits = tuple(shape), threads, bits
        self.labels, self.resistance, self.first = labels, resistance, first
        planes, even = bits.shape[0] - 2, tuple(n + n % 2 for n in shape)
        words = -(-shape[2] // 16)
        assert bits.shape[1:] == (even[1] + 2, words + 2), (bits.shape, shape)
        assert planes == even[0] or own is not None, (bits.shape, shape)
        self.periodic = tuple(bool(p) and a != axis for a, p in enumerate(periodic))
        around = (self.periodic[0] and own is None, *self.periodic[1:])
        set_borders(bits, around)
        before = first if axis == 0 else 0
        self.geometry = (
            planes, even[1], shape[2], words, *(int(p) for p in around), axis, -before, shape[axis] - 1 - before
        )
        h = np.asarray(spacing, np.float64)
        unit = h[0] * h[1] * h[2] / h[axis] ** 2
        # Conductances in units of one face along the axis, so that D_rel = energy × length / area in voxels.
        self.real = np.float64 if careful else real_of(self.shape, spacing, resistance)
        if resistance is not None:
            resistance = self.resistance = resistance.astype(self.real)
        self.g = tuple(self.real(h.prod() / step**2 / unit) for step in h)
        self.to_d_rel = shape[axis] / (prod(shape) // shape[axis])
        rows = max(2, min(even[1], 2 * (16384 // (words * 16 + 32)), 32))
        self.own = own or (0, planes)
        deep = unit_planes or planes_of_unit(shape[0])
        self.units = [
            (z, min(z + deep, self.own[1]), y, min(y + rows, even[1]))
            for z in range(self.own[0], self.own[1], deep) for y in range(0, even[1], rows)
        ]  # fmt: skip
        self.floats = fine.scratch_floats(rows, words)
        self.coarsening = coarsening_of(self.shape, spacing, resistance, careful)
        self.robust, self.step = self.coarsening.robust, self.coarsening.step(self.shape)
        cells = tuple(
            n // s for n, s in zip((planes, even[1], shape[2] + shape[2] % 2), self.step, strict=True)
        )
        each = threads.each
        # Parts of a cell are apart where conductivities are; else its mask says what they are.
        self.split = self.robust and resistance is not None
        self.tables: Any = fine.partition_tables() if self.split else fine.TABLES
        self.cells = np.empty(cells, np.uint16 if self.split else np.uint8)
        if self.split:
            assert resistance is not None
            strong, of_voxel = strong_pairs(self.g, self.shape, resistance), self.labels
            shared = (bits, of_voxel, strong, self.step, fine.COMPLETIONS, self.cells)
            self.voxels = sum(each(lambda a, b: fine.find_split_cells(*shared, a, b), cells[0], 8))
        else:
            self.voxels = sum(each(lambda a, b: fine.find_cells(bits, self.step, self.cells, a, b), cells[0], 8))
        counts = np.empty((planes, even[1]), np.int64)
        each(lambda a, b: fine.count_rows(bits, counts, a, b), planes, 16)
        self.rows = np.concatenate([[0], np.cumsum(counts.reshape(-1))])

    def first_graph(self) -> Graph:
        """The graph of level 1; sets `parts`, where the parts of each row of cells begin."""
        each, cells = self.threads.each, self.cells.shape
        counts = np.empty((2, *cells[:2]), np.int64)
        each(lambda a, b: fine.count_parts(self.cells, self.tables, counts, a, b), cells[0], 8)
        self.parts, number = coarse.accumulated(counts.reshape(2, -1))
        starts, nothing = np.zeros(number + 1, np.int32), (np.empty(0, np.int32), np.empty(0, self.real))
        to_faces = np.zeros(number, self.real)
        shared = (
            self.cells, self.tables, self.step, self.parts, self.geometry, self.g, self.labels, self.resistance
        )  # fmt: skip
        rows = cells[0] * cells[1]
        step = max(1, rows // 64)
        each(lambda a, b: fine.connect_parts(*shared, starts, *nothing, to_faces, a, b, False), rows, step)
        starts = coarse.running(starts)
        places, values = np.empty(starts[-1], coarse.index_type(number)), np.empty(starts[-1], self.real)
        each(lambda a, b: fine.connect_parts(*shared, starts, places, values, to_faces, a, b, True), rows, step)
        return Graph(starts, places, values, to_faces, self.tables[0][self.cells])

    def first_level(self, graph: Graph, periodic: Sequence[bool]) -> Level:
        return coarse.as_level(graph, self.parts, periodic, self.robust, self.threads.each, self.split)

    def _over(self, kernel: Callable[..., Any], *arguments: Any) -> list[Any]:
        def one(unit: Any) -> Any:
            scratch = self.threads.scratch(8 * self.floats, self.real)
            rings = None if self.labels is None else scratch[5 * self.floats :]
            return kernel(unit, self.geometry, self.g, self.bits, *arguments, scratch[: 5 * self.floats], rings)

        return self.threads.over(self.units, one)

    def energies(self, v: Any, end: float) -> list[float]:
        """Dissipated by v in each unit, the faces on its + sides included; v may be in two (see `Solver.solution`)."""
        high, low = v if isinstance(v, tuple) else (v, None)
        return self._over(fine.energy, self.rows, self.labels, self.resistance, high, low, end)

    def subtract_applied(self, p: Any, alpha: float, end: float, r: np.ndarray) -> None:
        high, low = p if isinstance(p, tuple) else (p, None)
        if self.robust:
            self._over(fine.subtract_outflow, self.rows, self.labels, self.resistance, high, low, alpha, end, r)
        else:
            self._over(fine.subtract_applied, self.rows, self.labels, self.resistance, high, alpha, end, r)

    @property
    def _cell_tables(self) -> tuple[Any, ...]:
        return self.rows, self.cells, self.tables, self.step, self.parts, self.labels, self.resistance

    def sweep_down(self, r: np.ndarray, b: np.ndarray) -> None:
        self._over(fine.sweep_down, *self._cell_tables, r, b)

    def sweep_up(self, r: np.ndarray, coarse_x: np.ndarray, z: np.ndarray) -> list[float]:
        """z from the coarse solution; the sum of r · z of each unit."""
        scale = self.real(coarse.ROBUST_CORRECTION if self.robust else coarse.OVERCORRECTION)
        return self._over(fine.sweep_up, *self._cell_tables, r, coarse_x, scale, z)

    def fill_ramp(self, x: Any) -> None:
        high = x[0] if isinstance(x, tuple) else x
        self.threads.each(
            lambda a, b: fine.fill_ramp(self.geometry, self.bits, self.rows, high, a, b), self.geometry[0], 16
        )

    def add_to_solution(self, x: Any, p: np.ndarray, alpha: float, own: slice = slice(None)) -> None:
        """x += α p."""
        if not isinstance(x, tuple):
            return self.add_scaled(x[own], p[own], 1.0, alpha)
        high, low, along = x[0][own], x[1][own], p[own]
        self.threads.each(lambda i, j: fine.add_in_two(high, low, along, alpha, i, j), len(high), 1 << 20)

    def add_scaled(self, y: np.ndarray, x: np.ndarray, scale_y: float, scale_x: float) -> None:
        a, b = self.real(scale_y), self.real(scale_x)
        self.threads.each(lambda i, j: fine.add_scaled(y, x, a, b, i, j), len(y), 1 << 20)

    def conductivity(self, of_label: np.ndarray) -> float:
        """Sum over the own voxels that take part; of_label: conductivities."""
        assert self.labels is not None
        total, end = 0.0, min(self.own[1], len(self.labels))
        for z in range(self.own[0], end, 16):
            part = self.labels[z : min(z + 16, end)]
            mask = unpacked(self.bits[z : z + 18], part.shape)
            total += float(np.bincount(part[mask > 0], minlength=256) @ of_label)
        return total

    def layers(self, x: Any, of_label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Energy and conductivity of each layer of the volume along the axis, as far as own planes add to them.

        A face between two layers counts half to each. Needs x one plane before the own.
        """
        axis = self.geometry[7]
        n, deep = self.shape[axis], self.shape[0]
        energy, conductivity = np.zeros(n + 1), np.zeros(n)
        halves = np.full(256, np.inf)
        halves[of_label > 0] = 0.5 / of_label[of_label > 0]
        begin, end = self.own[0], min(self.own[1], deep - self.first)
        before: tuple[np.ndarray, np.ndarray] | None = None
        if begin > 0:
            before = self._plane(x, begin - 1, halves)
        elif self.geometry[4]:
            before = self._plane(x, deep - 1, halves)
        for z in range(begin, end):
            here, layer_z = self._plane(x, z, halves), z + self.first
            for a in range(3):
                near = before if a == 0 else _shifted(here, a - 1, 1, self.periodic[a])
                if near is not None:
                    heat = float(self.g[a]) / (here[1] + near[1]) * (here[0] - near[0]) ** 2
                    _add_layers(energy, heat, axis, layer_z, 0.5 if a == axis else 1.0, a == axis)
            for layer, potential in ((0, 0.0), (n - 1, 1.0)):
                if axis == 0 and layer_z != layer:
                    continue
                u, half = (v if axis == 0 else np.take(v, layer, axis - 1) for v in here)
                energy[layer] += float((float(self.g[axis]) / half * (u - potential) ** 2).sum())
            k = 0.5 / here[1]
            if axis == 0:
                conductivity[layer_z] = k.sum()
            else:
                conductivity += k.sum(axis=2 - axis)
            before = here
        return energy[:n], conductivity

    def flux(self, x: Any, z0: int, z1: int, of_label: np.ndarray) -> np.ndarray:
        """Planes z0 … z1 - 1 of the flux density k ∇u along z, y, x: (3, z, y, x), float32, NaN where nothing conducts.

        In units of that through a uniform volume of conductivity 1. Each is the mean over a voxel's two faces.
        """
        axis, deep = self.geometry[7], min(self.geometry[0], self.shape[0] - self.first)
        halves = np.full(256, np.inf)
        halves[of_label > 0] = 0.5 / of_label[of_label > 0]
        # g = area / length of a voxel, in units of that along the axis: to a density, in units of 1 / voxels.
        scale = [self.shape[axis] * (float(self.g[a])) ** 0.5 for a in range(3)]
        out = np.empty((3, z1 - z0, *self.shape[1:]), np.float32)
        nothing = np.zeros(self.shape[1:]), np.full(self.shape[1:], np.inf)

        def plane(z: int) -> tuple[np.ndarray, np.ndarray]:
            if self.geometry[4]:
                z %= deep
            return self._plane(x, z, halves) if 0 <= z < deep else nothing

        before, here = plane(z0 - 1), plane(z0)
        for z in range(z0, z1):
            after = plane(z + 1)
            for a in range(3):
                low, high = before, after
                if a > 0:
                    low, high = (_shifted(here, a - 1, step, self.periodic[a]) for step in (1, -1))
                faces = [(here[0] - low[0]) / (here[1] + low[1]), (high[0] - here[0]) / (here[1] + high[1])]
                if a == axis:
                    index = np.indices(self.shape[1:])[a - 1] if a else z
                    faces[0] = np.where(index == self.geometry[8], here[0] / here[1], faces[0])
                    faces[1] = np.where(index == self.geometry[9], (1 - here[0]) / here[1], faces[1])
                out[a, z - z0] = np.where(np.isinf(here[1]), np.nan, 0.5 * scale[a] * (faces[0] + faces[1]))
            before, here = here, after
        return out

    def _plane(self, x: Any, z: int, halves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Potential and half a voxel's resistance of a plane, float64; 0 and inf where nothing conducts."""
        u = self._unpacked(x, z, z + 1)[0]
        conducting = ~np.isnan(u)
        kind = 0.5 if self.labels is None else halves[self.labels[z]]
        return np.where(conducting, u, 0.0), np.where(conducting, kind, np.inf)

    def _unpacked(self, x: Any, z0: int, z1: int) -> np.ndarray:
        """Planes z0 … z1 - 1 of a potential (z, y, x), float64; NaN where nothing conducts."""
        total = np.zeros((z1 - z0, *self.shape[1:]))
        for part in x if isinstance(x, tuple) else (x,):
            out = np.full(total.shape, np.nan, self.real)
            fine.unpack(self.geometry, self.bits, self.rows, part, z0, out)
            total += out
        return total

    def potential(self, x: Any, z0: int, z1: int) -> np.ndarray:
        """Planes z0 … z1 - 1 of a potential (z, y, x), float32; NaN where nothing conducts."""
        return self._unpacked(x, z0, z1).astype(np.float32)


class Solver(ABC):
    """Conjugate gradients; what they do to vectors is that of a subclass, where a vector is whatever it says.

    The robust form is for voxels far from cubic and conductivities far apart, where float32 leaves nothing of small
    differences. The solution is in two floats, or in float64 as all vectors where that is not enough; residuals are
    sums of currents between neighbours; and the last one is computed anew from the solution before an error is claimed.
    """

    to_d_rel: float
    contrast: float  # the lowest conductivity over the highest
    robust: bool
    real: Any  # np.float32 or np.float64, of vectors

    @property
    def in_two(self) -> bool:
        return self.robust and self.real is np.float32

    @abstractmethod
    def vector(self) -> Any:
        """Zeros."""

    @abstractmethod
    def solution(self) -> Any:
        """Zeros, for x; where `in_two`, two floats for each: what one holds, and what it leaves out."""

    @abstractmethod
    def start(self, x: Any) -> None:
        """x, the potential of a uniform volume."""

    @abstractmethod
    def leave(self, x: Any, r: Any) -> None:
        """r, what x leaves of the sources."""

    @abstractmethod
    def precondition(self, r: Any, z: Any) -> float:
        """z = M⁻¹ r; returns r · z."""

    @abstractmethod
    def turn(self, p: Any, z: Any, beta: float) -> float:
        """p = z + β p; returns its energy."""

    @abstractmethod
    def advance(self, x: Any, r: Any, p: Any, alpha: float) -> None:
        """x += α p, r -= α A p."""

    @abstractmethod
    def energy(self, x: Any, end: float) -> float:
        """Dissipated by x with the far face at the potential `end`, in units of one face's conductance."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Held for a solve, vectors included."""

    def solve(
        self, rtol: float, *, limit: int = 200, report: Callable[[int, float, float], None] | None = None
    ) -> tuple[Solved, Any]:
        """Stops when the estimated error of D_rel is under rtol; with the potential at the conducting voxels.

        report(iterations, D_rel, estimated error).
        """
        x, r, p, z = self.solution(), *(self.vector() for _ in range(3))
        self.start(x)
        self.leave(x, r)
        iterate = self._iterate_robustly if self.robust else self._iterate
        error, iterations = iterate(x, r, p, z, rtol, limit, report or (lambda *_: None))
        d_rel = self.energy(x, 1.0) * self.to_d_rel
        return Solved(d_rel, error, iterations, error < rtol, self.bytes), x

    def _iterate(
        self, x: Any, r: Any, p: Any, z: Any, rtol: float, limit: int, report: Callable[[int, float, float], None]
    ) -> tuple[float, int]:
        """The estimated error, and the number of iterations."""
        energy = self.energy(x, 1.0)
        terms: list[float] = []
        steps: list[float] = []
        sizes: list[float] = []
        error, bound = inf, 0.0 if self.contrast == 1.0 else inf
        while len(terms) < limit and max(error, bound) >= rtol:
            now = self.precondition(r, z)
            if now <= 0:
                # Nothing is left to correct, or rounding is all that is.
                if max(-now, terms[-1] if terms else 0.0) < rtol * energy:
                    error, bound = ROUNDING, 0.0
                break
            sizes.append(now)
            if self.contrast < 1.0 and error < rtol:
                bound = error_bound(steps, sizes, energy, min(LEAST_EIGENVALUE, self.contrast))
                if bound < rtol:
                    break
            steps.append(now / self.turn(p, z, now / sizes[-2] if terms else 0.0))
            self.advance(x, r, p, steps[-1])
            terms.append(steps[-1] * now)
            energy -= terms[-1]
            error = estimated_error(terms, energy)
            report(len(terms), energy * self.to_d_rel, error)
        return max(error, bound), len(terms)

    def _iterate_robustly(
        self, x: Any, r: Any, p: Any, z: Any, rtol: float, limit: int, report: Callable[[int, float, float], None]
    ) -> tuple[float, int]:
        """As `_iterate`. The energy is recomputed in every iteration, since what is taken off it may be all of it."""
        energy, error, iterations, before = self.energy(x, 1.0), inf, 0, inf
        steps: list[float] = []
        sizes = [self.precondition(r, z)]
        while True:
            error = claim(steps, sizes, energy)
            if error < rtol and steps:
                # What the recurrence left, and what x leaves of the sources: rounding is what sets them apart.
                recurred = sizes[-1]
                self.leave(x, r)
                anew = self.precondition(r, z)
                error = max(error, ROBUST_ROUNDING, error * anew / recurred) if anew >= 0 and recurred > 0 else inf
                if error < rtol:
                    break
                if anew >= 0.5 * before:  # the recurrence began anew before, and rounding is all that is left
                    break
                steps, sizes, before = [], [anew], anew
                error = claim(steps, sizes, energy)
            if error < rtol or iterations == limit or not sizes[-1] > 0:
                break
            steps.append(sizes[-1] / self.turn(p, z, sizes[-1] / sizes[-2] if steps else 0.0))
            self.advance(x, r, p, steps[-1])
            energy, iterations = self.energy(x, 1.0), iterations + 1
            sizes.append(self.precondition(r, z))
            report(iterations, energy * self.to_d_rel, error)
        return error, iterations


class System(Voxels, Solver):
    """Bits, vectors and the hierarchy of one volume and direction."""

    def __init__(self, *arguments: Any, careful: bool = False) -> None:
        super().__init__(*arguments, careful=careful)
        self.contrast = contrast(self.resistance)
        graph = self.first_graph()
        level = self.first_level(graph, self.periodic)
        self.levels = hierarchy(level, graph, self.coarsening.after(self.step), self.periodic, self.threads)

    @property
    def bytes(self) -> int:
        own = (self.bits, self.cells, self.rows)
        levels = sum(level.bytes for level in self.levels)
        return sum(a.nbytes for a in own) + levels + bytes_of_vectors(self.robust, self.real) * self.voxels

    def vector(self) -> np.ndarray:
        return np.zeros(self.voxels, self.real)

    def solution(self) -> Any:
        return (self.vector(), self.vector()) if self.in_two else self.vector()

    def start(self, x: Any) -> None:
        self.fill_ramp(x)

    def leave(self, x: Any, r: np.ndarray) -> None:
        r[:] = 0
        self.subtract_applied(x, 1.0, 1.0, r)

    def energy(self, x: Any, end: float) -> float:
        return sum(self.energies(x, end))

    def precondition(self, r: np.ndarray, z: np.ndarray) -> float:
        first = self.levels[0]
        self.sweep_down(r, first.b)
        coarse.cycle(self.levels, 0, self.threads.each)
        return sum(self.sweep_up(r, first.x, z))

    def turn(self, p: np.ndarray, z: np.ndarray, beta: float) -> float:
        self.add_scaled(p, z, beta, 1.0)
        return self.energy(p, 0.0)

    def advance(self, x: Any, r: np.ndarray, p: np.ndarray, alpha: float) -> None:
        self.add_to_solution(x, p, alpha)
        self.subtract_applied(p, alpha, 0.0, r)

    def mean_conductivity(self, of_label: np.ndarray) -> float:
        """Over the volume, of the voxels that take part."""
        return self.conductivity(of_label) / prod(self.shape)

    def profile(self, x: Any, of_label: np.ndarray) -> np.ndarray:
        return tau_of_layers(*self.layers(x, of_label))


def by_label(conductivity: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, float]:
    """Of the 256 labels: which conduct, how well, and half a voxel's resistance, where conductivities differ.

    Where they do not, it is solved for 1, and the last number is what D_rel is to be multiplied by.
    """
    conducts, of_label = np.zeros(256, bool), np.zeros(256)
    for label, k in conductivity.items():
        conducts[label], of_label[label] = True, k
    if len(set(conductivity.values())) < 2:
        return conducts, of_label, None, next(iter(conductivity.values()), 1.0)
    with np.errstate(divide="ignore"):
        return conducts, of_label, 0.5 / of_label, 1.0


def contrast(resistance: np.ndarray | None) -> float:
    """The lowest conductivity over the highest."""
    if resistance is None:
        return 1.0
    finite = resistance[np.isfinite(resistance)]
    return float(finite.min() / finite.max())


def tau_of_layers(energy: np.ndarray, conductivity: np.ndarray) -> np.ndarray:
    """tau of each layer along the axis: its mean conductivity / its own D_rel.

    A layer's resistance is the energy it dissipates / flux², and the flux is the energy of all, over a drop of 1; so
    D_rel of the volume is the harmonic mean of the layers'.
    """
    return conductivity * energy / energy.sum() ** 2


def coarsening_of(
    shape: Sequence[int], spacing: Sequence[float], resistance: np.ndarray | None, careful: bool = False
) -> Coarsening:
    """How voxels are coarsened: robustly where they are far from cubic, or conductivities far apart, or `careful`."""
    z, y, x = map(float, spacing)
    several = [h for h, n in zip((z, y, x), shape, strict=True) if n > 1] or [1.0]
    flat = max(several) > WIDEST_PITCH * (1 + 1e-9) * min(several)
    return Coarsening((z, y, x), careful or flat or contrast(resistance) < LEAST_CONTRAST)


def real_of(shape: Sequence[int], spacing: Sequence[float], resistance: np.ndarray | None) -> Any:
    """np.float32, or np.float64 where conductances differ by more than it can hold."""
    several = [h for h, n in zip(spacing, shape, strict=True) if n > 1] or [1.0]
    reach = (max(several) / min(several)) ** 2 / contrast(resistance)
    return np.float64 if reach > WIDEST_RANGE else np.float32


def bytes_of_vectors(robust: bool, real: Any) -> int:
    """Of x, r, p and z, for a conducting voxel."""
    return 32 if real is np.float64 else 20 if robust else 16


BYTES_PER_PART = 108  # of a level and its set-up, for one part


def bytes_per_conducting_voxel(
    shape: Sequence[int], spacing: Sequence[float], resistance: np.ndarray | None, careful: bool = False
) -> tuple[float, float]:
    """What vectors, and the hierarchy with its set-up, hold at most for a conducting voxel.

    A cell of v voxels has about 1.25 parts; in the robust form with several conductivities, twice as many.
    """
    coarsening = coarsening_of(shape, spacing, resistance, careful)
    robust, real = coarsening.robust, np.float64 if careful else real_of(shape, spacing, resistance)
    cells, share, parts = tuple(shape), 1.0, 0.0
    while max(cells) > 1:
        step = coarsening.step(cells)
        cells = tuple(-(-n // s) for n, s in zip(cells, step, strict=True))
        coarsening, share = coarsening.after(step), share / prod(step)
        parts += share
    several = 2 if robust and resistance is not None else 1
    wide = 1.6 if real is np.float64 else 1.0
    return bytes_of_vectors(robust, real), BYTES_PER_PART * 1.25 * several * wide * min(parts, 2.0)


def strong_pairs(g: Sequence[float], shape: Sequence[int], resistance: np.ndarray) -> np.ndarray:
    """[axis, label, label]: whether two neighbours of these labels are coupled as strongly as either may be to any."""
    half = resistance.astype(np.float64)
    most = max(float(g[a]) for a in range(3) if shape[a] > 1 or max(shape) == 1)
    with np.errstate(invalid="ignore"):
        between = 1 / (half[:, None] + half)
        alone = 0.5 / np.minimum(half[:, None], half)
    return np.stack([float(v) * between >= STRONG * most * alone for v in g])


def hierarchy(
    level: Level, graph: Graph, coarsening: Coarsening, periodic: Sequence[bool], threads: Threads
) -> list[Level]:
    """Levels from one and its graph on, down to one that is small enough for its inverse, or its factors."""
    levels, robust = [level], coarsening.robust
    while levels[-1].parts > coarse.DENSE:
        alone = max(levels[-1].cells) == 1
        if alone and not (robust and levels[-1].parts > coarse.FACTORED):
            break
        step = coarsening.step(levels[-1].cells)
        graph_next, rows_next = coarse.coarser(levels[-1], graph, step, robust, threads.each)
        if alone and len(graph_next.to_faces) > 0.9 * levels[-1].parts:
            levels[-1].parent = None
            break
        graph, coarsening = graph_next, coarsening.after(step)
        levels.append(coarse.as_level(graph, rows_next, periodic, robust, threads.each))
    last = levels[-1]
    if last.parts <= coarse.DENSE or (robust and last.parts <= coarse.MOST_FACTORED):
        of = np.repeat(np.arange(last.parts), np.diff(graph.starts))
        values = graph.values.astype(np.float64)
        # Not the level's own diagonal: it holds what keeps sweeps from diverging, too.
        diagonal = np.bincount(of, values, last.parts) + graph.to_faces if robust else last.diagonal.astype(np.float64)
        if last.parts <= coarse.DENSE:
            matrix = np.diag(diagonal)
            np.add.at(matrix, (of, graph.places), -values)
            last.inverse = np.linalg.inv(matrix) if robust else np.linalg.inv(matrix).astype(np.float32)
        else:
            every = np.arange(last.parts)
            entries = np.concatenate([-values, diagonal])
            where = np.concatenate([of, every]), np.concatenate([graph.places, every])
            last.factors = splu(csc_matrix((entries, where), (last.parts, last.parts)))
    return levels


def planes_of_unit(planes: int, least: int = 1) -> int:
    """How deep a unit is; smaller where there would be fewer than `least`."""
    deep = max(16, min(64, planes // 4 // 8 * 8))
    while deep > 16 and planes < least * deep:
        deep = max(16, deep // 2 // 8 * 8)
    return deep


def estimated_error(terms: Sequence[float], energy: float) -> float:
    """What is left of the energy after the last iteration, as a share of it, from the terms α r·z of the iterations.

    A term is what its iteration took off the energy (Hestenes & Stiefel 1952), so what is left is the sum of those to
    come. Were they a geometric progression of rate q, that would be q / (1 - q) of the last one; we take five times
    this, with the slower of the last two rates, and never less than half the last term. No claim before the third
    iteration, unless the first took nothing off. How far that holds is measured in docs/transport.md.
    """
    if energy <= 0:
        return inf
    if len(terms) < 3:
        return ROUNDING if terms and terms[0] < ROUNDING * energy else inf
    rate = max(b / a for a, b in zip(terms[-3:-1], terms[-2:], strict=True))
    return max(ROUNDING, terms[-1] / energy * max(0.5, 5 * rate / (1 - rate))) if rate < 1 else inf


LEAST_EIGENVALUE = 0.1  # of M⁻¹ A; 0.13 was the least seen for one conductivity, 0.11 in the robust form


def error_bound(steps: Sequence[float], sizes: Sequence[float], energy: float, least: float) -> float:
    """An upper bound on what is left of the energy, as a share of it, where no eigenvalue of M⁻¹ A is below `least`.

    Well-conducting islands in a poor conductor may converge last, and hide in the terms behind all that converges
    sooner. The quadrature of Gauss and Radau (Golub & Meurant 1994; recurrence of Meurant & Tichý 2013) bounds what
    they hold. steps: α of each iteration; sizes: r · z before each and after the last.
    """
    weight = 0.0
    while weight <= 0:
        weight = 1 / least
        for step, size, after in zip(steps, sizes, sizes[1:], strict=False):
            left = weight - step
            if left <= 0:  # an eigenvalue is below `least` after all
                weight, least = 0.0, least / 2
                break
            weight = left / (least * left + after / size)
    return weight * sizes[-1] / energy if energy > 0 else inf


def claim(steps: Sequence[float], sizes: Sequence[float], energy: float) -> float:
    """The error that the robust form claims: `error_bound` with what these iterations know of the least eigenvalue."""
    if not sizes[-1] >= 0 or not all(step > 0 for step in steps):
        return inf
    if sizes[-1] == 0:
        return ROBUST_ROUNDING
    least = LEAST_EIGENVALUE
    if steps:
        # The matrix of Lanczos that conjugate gradients make on their way; its eigenvalues are above the least.
        turns = [after / before for before, after in pairwise(sizes)][: len(steps) - 1]
        diagonal = [1 / step for step in steps]
        for i, turn in enumerate(turns):
            diagonal[i + 1] += turn / steps[i]
        beside = [turn**0.5 / step for turn, step in zip(turns, steps, strict=False)]
        least = min(least, 0.5 * float(eigvalsh_tridiagonal(diagonal, beside)[0]))
    return max(ROBUST_ROUNDING, error_bound(steps, sizes, energy, least)) if least > 0 else inf


def pack(labels: np.ndarray, conducts: np.ndarray, threads: Threads) -> np.ndarray:
    """Bits (as in `fine`) of the voxels of uint8 labels (z, y, x) for which conducts[label]."""
    nz, ny, nx = labels.shape
    bits = np.zeros((nz + nz % 2 + 2, ny + ny % 2 + 2, -(-nx // 16) + 2), np.uint16)
    threads.each(lambda a, b: fine.pack(labels, conducts, bits, a, b), nz, 8)
    return bits


def set_borders(bits: np.ndarray, periodic: Sequence[bool]) -> None:
    """The planes and rows outside: those of the opposite side, or nothing."""
    bits[0], bits[-1] = (bits[-2], bits[1]) if periodic[0] else (0, 0)
    bits[:, 0], bits[:, -1] = (bits[:, -2], bits[:, 1]) if periodic[1] else (0, 0)


def _shifted(
    plane: tuple[np.ndarray, np.ndarray], axis: int, step: int, periodic: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Each voxel's neighbour before it (step 1) or after it (-1) along an axis of the plane; at an edge that is not
    periodic, one that insulates."""
    u, half = (np.roll(v, step, axis) for v in plane)
    if not periodic:
        edge: list[Any] = [slice(None), slice(None)]
        edge[axis] = 0 if step > 0 else -1
        u[tuple(edge)], half[tuple(edge)] = 0.0, np.inf
    return u, half


def _add_layers(energy: np.ndarray, heat: np.ndarray, axis: int, z: int, share: float, split: bool) -> None:
    """Of the faces towards - of a plane z of voxels: `share` to the layer of each, and as much to the one before."""
    if axis == 0:
        energy[z] += share * heat.sum()
        if split:
            energy[z - 1] += share * heat.sum()
        return
    of_layer = share * heat.sum(axis=2 - axis)
    energy[:-1] += of_layer
    if split:
        energy[: len(of_layer) - 1] += of_layer[1:]


def unpacked(bits: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The conducting voxels as uint8 (z, y, x)."""
    words = np.ascontiguousarray(bits[1 : shape[0] + 1, 1 : shape[1] + 1, 1:-1])
    return np.unpackbits(words.view(np.uint8), axis=2, bitorder="little")[:, :, : shape[2]]
