"""The conducting voxels of a volume, or of some of its planes, and the kernels on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from hpcres.transport import coarse, fluxes, sweeps
from hpcres.transport.aggregation import STRONG
from hpcres.transport.cells import (
    COMPLETIONS,
    TABLES,
    connect_aggregates,
    count_aggregates,
    find_cells,
    find_split_cells,
    partition_tables,
)
from hpcres.transport.coarse import Graph, Level
from hpcres.transport.form import Form
from hpcres.transport.rows import count_rows, pack_planes, scratch_floats
from hpcres.transport.threads import Threads


@dataclass(frozen=True)
class Medium:
    """A whole volume and the direction of the transport, as the equations see them.

    Parameters
    ----------
    shape : sequence of int
        Voxels z, y, x.
    voxel_size : sequence of float
        Voxel edges z, y, x.
    axis : int
        Axis of the transport.
    periodic : sequence of bool
        Axes z, y, x whose two sides meet.
    resistance : ndarray, optional
        Of each of 256 labels; None where all that conducts conducts alike.
    in_float64 : bool
        As of `Form.of`.
    """

    shape: Sequence[int]
    voxel_size: Sequence[float]
    axis: int
    periodic: Sequence[bool]
    resistance: np.ndarray | None = None
    in_float64: bool = False


@dataclass(frozen=True)
class Planes:
    """Planes of a volume.

    Parameters
    ----------
    first : int
        The first one.
    own : tuple of int
        Planes own[0] … own[1] - 1 after the first are worked on.
    unit : int
        Planes of a unit of work.
    """

    first: int
    own: tuple[int, int]
    unit: int


class Voxels:
    """The conducting voxels of a volume, or of some of its planes, and the kernels on them."""

    def __init__(
        self,
        bits: np.ndarray,
        medium: Medium,
        threads: Threads,
        labels: np.ndarray | None = None,
        planes_of: Planes | None = None,
    ) -> None:
        """Set up the voxels, cells and units.

        `bits` and `labels` are of the planes `planes_of`; without, of the whole volume.
        """
        shape, voxel_size, axis, resistance = medium.shape, medium.voxel_size, medium.axis, medium.resistance
        first, own = (0, None) if planes_of is None else (planes_of.first, planes_of.own)
        self.shape, self.threads, self.bits = tuple(shape), threads, bits
        self.labels, self.resistance, self.first = labels, resistance, first
        planes, even = bits.shape[0] - 2, tuple(n + n % 2 for n in shape)
        words = -(-shape[2] // 16)
        assert bits.shape[1:] == (even[1] + 2, words + 2), (bits.shape, shape)
        assert planes == even[0] or own is not None, (bits.shape, shape)
        self.periodic = tuple(bool(p) and a != axis for a, p in enumerate(medium.periodic))
        around = (self.periodic[0] and own is None, *self.periodic[1:])
        set_borders(bits, around)
        before = first if axis == 0 else 0
        self.geometry = (
            planes,
            even[1],
            shape[2],
            words,
            *(int(p) for p in around),
            axis,
            -before,
            shape[axis] - 1 - before,
        )
        h = np.asarray(voxel_size, np.float64)
        unit = h[0] * h[1] * h[2] / h[axis] ** 2
        # Conductances in units of one face along the axis, so that D_rel = energy × length / area in voxels.
        self.form = form = Form.of(self.shape, voxel_size, resistance, medium.in_float64)
        if resistance is not None:
            resistance = self.resistance = resistance.astype(form.dtype)
        self.g = tuple(form.dtype(h.prod() / step**2 / unit) for step in h)
        self.to_d_rel = shape[axis] / (prod(shape) // shape[axis])
        rows = max(2, min(even[1], 2 * (16384 // (words * 16 + 32)), 32))
        self.own = own or (0, planes)
        deep = planes_of_unit(shape[0]) if planes_of is None else planes_of.unit
        self.units = [
            (z, min(z + deep, self.own[1]), y, min(y + rows, even[1]))
            for z in range(self.own[0], self.own[1], deep)
            for y in range(0, even[1], rows)
        ]
        self.floats = scratch_floats(rows, words)
        self.step = form.step(self.shape)
        cells = tuple(n // s for n, s in zip((planes, even[1], shape[2] + shape[2] % 2), self.step, strict=True))
        each = threads.each
        # Conductivities far apart separate the aggregates of a cell; else aggregates follow from the mask.
        self.split = form.robust and form.several
        self.tables: Any = partition_tables() if self.split else TABLES
        self.cells = np.empty(cells, np.uint16 if self.split else np.uint8)
        if self.split:
            assert resistance is not None
            strong, of_voxel = strong_pairs(self.g, self.shape, resistance), self.labels
            shared = (bits, of_voxel, strong, self.step, COMPLETIONS, self.cells)
            self.voxels = sum(each(lambda a, b: find_split_cells(*shared, a, b), cells[0], 8))
        else:
            self.voxels = sum(each(lambda a, b: find_cells(bits, self.step, self.cells, a, b), cells[0], 8))
        counts = np.empty((planes, even[1]), np.int64)
        each(lambda a, b: count_rows(bits, counts, a, b), planes, 16)
        self.rows = np.concatenate([[0], np.cumsum(counts.reshape(-1))])

    def first_graph(self) -> Graph:
        """Make the graph of level 1, and set `aggregates`, where the aggregates of each row of cells begin."""
        each, cells = self.threads.each, self.cells.shape
        counts = np.empty((2, *cells[:2]), np.int64)
        each(lambda a, b: count_aggregates(self.cells, self.tables, counts, a, b), cells[0], 8)
        self.aggregates, number = coarse.accumulated(counts.reshape(2, -1))
        starts, nothing = np.zeros(number + 1, np.int32), (np.empty(0, np.int32), np.empty(0, self.form.dtype))
        to_faces = np.zeros(number, self.form.dtype)
        shared = (
            self.cells,
            self.tables,
            self.step,
            self.aggregates,
            self.geometry,
            self.g,
            self.labels,
            self.resistance,
        )
        rows = cells[0] * cells[1]
        step = max(1, rows // 64)
        each(lambda a, b: connect_aggregates(*shared, starts, *nothing, to_faces, a, b, False), rows, step)
        starts = coarse.running(starts)
        places, values = np.empty(starts[-1], coarse.index_type(number)), np.empty(starts[-1], self.form.dtype)
        each(lambda a, b: connect_aggregates(*shared, starts, places, values, to_faces, a, b, True), rows, step)
        return Graph(starts, places, values, to_faces, self.tables[0][self.cells])

    def first_level(self, graph: Graph, periodic: Sequence[bool]) -> Level:
        """Make level 1 from its graph."""
        return coarse.as_level(graph, self.aggregates, periodic, self.form, self.threads.each, self.split)

    def _over(self, kernel: Callable[..., Any], *arguments: Any) -> list[Any]:
        def one(unit: Any) -> Any:
            scratch = self.threads.scratch(8 * self.floats, self.form.dtype)
            rings = None if self.labels is None else scratch[5 * self.floats :]
            return kernel(unit, self.geometry, self.g, self.bits, *arguments, scratch[: 5 * self.floats], rings)

        return self.threads.over(self.units, one)

    def energies(self, v: Any, end: float) -> list[float]:
        """Return the energy that v dissipates in each unit, the faces on its + sides included.

        For v see `Solver.solution`.
        """
        high, low = v if isinstance(v, tuple) else (v, None)
        return self._over(fluxes.energy, self.rows, self.labels, self.resistance, high, low, end)

    def subtract_applied(self, p: Any, alpha: float, end: float, r: np.ndarray) -> None:
        """Set r -= alpha × (A p - b), where b is what the last face at potential `end` sends in."""
        high, low = p if isinstance(p, tuple) else (p, None)
        if self.form.robust:
            self._over(fluxes.subtract_outflow, self.rows, self.labels, self.resistance, high, low, alpha, end, r)
        else:
            self._over(fluxes.subtract_applied, self.rows, self.labels, self.resistance, high, alpha, end, r)

    @property
    def _cell_tables(self) -> tuple[Any, ...]:
        return self.rows, self.cells, self.tables, self.step, self.aggregates, self.labels, self.resistance

    def sweep_down(self, r: np.ndarray, b: np.ndarray) -> None:
        """Set b to what a red then black sweep from zero leaves of r, summed over each aggregate."""
        self._over(sweeps.sweep_down, *self._cell_tables, r, b)

    def sweep_up(self, r: np.ndarray, coarse_x: np.ndarray, z: np.ndarray) -> list[float]:
        """Compute z from the coarse solution; return the sum of r · z of each unit."""
        scale = self.form.dtype(self.form.correction)
        return self._over(sweeps.sweep_up, *self._cell_tables, r, coarse_x, scale, z)

    def fill_ramp(self, x: Any) -> None:
        """Set x to the potential of a uniform volume."""
        high = x[0] if isinstance(x, tuple) else x
        self.threads.each(
            lambda a, b: fluxes.fill_ramp(self.geometry, self.bits, self.rows, high, a, b), self.geometry[0], 16
        )

    def add_to_solution(self, x: Any, p: np.ndarray, alpha: float, own: slice = slice(None)) -> None:
        """Set x += α p."""
        if not isinstance(x, tuple):
            return self.add_scaled(x[own], p[own], 1.0, alpha)
        high, low, along = x[0][own], x[1][own], p[own]
        self.threads.each(lambda i, j: fluxes.add_two_floats(high, low, along, alpha, i, j), len(high), 1 << 20)

    def add_scaled(self, y: np.ndarray, x: np.ndarray, scale_y: float, scale_x: float) -> None:
        """Set y = scale_y · y + scale_x · x."""
        a, b = self.form.dtype(scale_y), self.form.dtype(scale_x)
        self.threads.each(lambda i, j: fluxes.add_scaled(y, x, a, b, i, j), len(y), 1 << 20)

    def conductivity(self, of_label: np.ndarray) -> float:
        """Sum the conductivity over the own voxels that take part; `of_label` holds the conductivities."""
        assert self.labels is not None
        total, end = 0.0, min(self.own[1], len(self.labels))
        for z in range(self.own[0], end, 16):
            part = self.labels[z : min(z + 16, end)]
            mask = unpacked(self.bits[z : z + 18], part.shape)
            total += float(np.bincount(part[mask > 0], minlength=256) @ of_label)
        return total

    def layers(self, x: Any, of_label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute energy and conductivity of each layer of the volume along the axis, as far as own planes add to them.

        A face between two layers counts half to each.

        Parameters
        ----------
        x : np.ndarray or tuple of np.ndarray
            The potential (see `Solver.solution`), with one plane before the own.
        of_label : np.ndarray
            float (256,), conductivities by label.

        Returns
        -------
        energy, conductivity : np.ndarray
            float64 (layer,): the energy, and the sum of the conductivities of its voxels.
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
        """Compute planes z0 … z1 - 1 of the flux density k ∇u along z, y, x.

        Each value is the mean over a voxel's two faces, in units of the flux density through a uniform volume of
        conductivity 1.

        Parameters
        ----------
        x : np.ndarray or tuple of np.ndarray
            The potential (see `Solver.solution`).
        z0, z1 : int
            Range of planes.
        of_label : np.ndarray
            float (256,), conductivities by label.

        Returns
        -------
        np.ndarray
            float32 (3, z, y, x), NaN where nothing conducts.
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
        """Return potential and half a voxel's resistance of a plane, float64; 0 and inf where nothing conducts."""
        u = self._unpacked(x, z, z + 1)[0]
        conducting = ~np.isnan(u)
        kind = 0.5 if self.labels is None else halves[self.labels[z]]
        return np.where(conducting, u, 0.0), np.where(conducting, kind, np.inf)

    def _unpacked(self, x: Any, z0: int, z1: int) -> np.ndarray:
        """Return planes z0 … z1 - 1 of a potential (z, y, x), float64; NaN where nothing conducts."""
        total = np.zeros((z1 - z0, *self.shape[1:]))
        for part in x if isinstance(x, tuple) else (x,):
            out = np.full(total.shape, np.nan, self.form.dtype)
            fluxes.unpack(self.geometry, self.bits, self.rows, part, z0, out)
            total += out
        return total

    def potential(self, x: Any, z0: int, z1: int) -> np.ndarray:
        """Return planes z0 … z1 - 1 of a potential (z, y, x), float32; NaN where nothing conducts."""
        return self._unpacked(x, z0, z1).astype(np.float32)


def by_label(conductivity: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, float]:
    """Tabulate conductivities by label, 256 of them.

    Where conductivities do not differ, the system is solved for 1.

    Parameters
    ----------
    conductivity : mapping
        Positive conductivities of the labels that conduct.

    Returns
    -------
    conducts : np.ndarray
        bool (256,).
    of_label : np.ndarray
        float64 (256,), conductivities.
    resistance : np.ndarray or None
        float64 (256,), half a voxel's resistance; None where conductivities do not differ.
    unit : float
        What D_rel is to be multiplied by.
    """
    conducts, of_label = np.zeros(256, bool), np.zeros(256)
    for label, k in conductivity.items():
        conducts[label], of_label[label] = True, k
    if len(set(conductivity.values())) < 2:
        return conducts, of_label, None, next(iter(conductivity.values()), 1.0)
    with np.errstate(divide="ignore"):
        return conducts, of_label, 0.5 / of_label, 1.0


def tau_of_layers(energy: np.ndarray, conductivity: np.ndarray) -> np.ndarray:
    """Compute tau of each layer along the axis: its mean conductivity / its own D_rel.

    A layer's resistance is the energy it dissipates / flux², and the flux is the energy of all layers, over a drop of
    1. So D_rel of the volume is the harmonic mean of the layers'.

    Parameters
    ----------
    energy, conductivity : np.ndarray
        Of each layer, as `Voxels.layers` gives them for the whole volume.

    Returns
    -------
    np.ndarray
        float64 (layer,).
    """
    return conductivity * energy / energy.sum() ** 2


def strong_pairs(g: Sequence[float], shape: Sequence[int], resistance: np.ndarray) -> np.ndarray:
    """Tell whether the edge between two neighbouring voxels is strong (see `aggregation`), by axis and their labels.

    Parameters
    ----------
    g : sequence of float
        Conductance of a face between two voxels of conductivity 1, normal to z, y, x.
    shape : sequence of int
        Voxels along z, y, x.
    resistance : ndarray of float, shape (256,)
        Half a voxel's resistance by label.

    Returns
    -------
    ndarray of bool, shape (3, 256, 256)
    """
    half = resistance.astype(np.float64)
    most = max(float(g[a]) for a in range(3) if shape[a] > 1 or max(shape) == 1)
    with np.errstate(invalid="ignore"):
        between = 1 / (half[:, None] + half)
        alone = 0.5 / np.minimum(half[:, None], half)
    return np.stack([float(v) * between >= STRONG * most * alone for v in g])


def planes_of_unit(planes: int, least: int = 1) -> int:
    """Return how many planes a unit has; fewer where there would be fewer units than `least`."""
    deep = max(16, min(64, planes // 4 // 8 * 8))
    while deep > 16 and planes < least * deep:
        deep = max(16, deep // 2 // 8 * 8)
    return deep


def pack(labels: np.ndarray, conducts: np.ndarray, threads: Threads) -> np.ndarray:
    """Pack into bits (as in `rows`) the voxels of uint8 labels (z, y, x) for which conducts[label]."""
    nz, ny, nx = labels.shape
    bits = np.zeros((nz + nz % 2 + 2, ny + ny % 2 + 2, -(-nx // 16) + 2), np.uint16)
    threads.each(lambda a, b: pack_planes(labels, conducts, bits, a, b), nz, 8)
    return bits


def set_borders(bits: np.ndarray, periodic: Sequence[bool]) -> None:
    """Set the planes and rows outside: those of the opposite side, or nothing."""
    bits[0], bits[-1] = (bits[-2], bits[1]) if periodic[0] else (0, 0)
    bits[:, 0], bits[:, -1] = (bits[:, -2], bits[:, 1]) if periodic[1] else (0, 0)


def _shifted(
    plane: tuple[np.ndarray, np.ndarray], axis: int, step: int, periodic: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return each voxel's neighbour before it (step 1) or after it (-1) along an axis of the plane.

    At an edge that is not periodic, the neighbour is one that insulates.
    """
    u, half = (np.roll(v, step, axis) for v in plane)
    if not periodic:
        edge: list[Any] = [slice(None), slice(None)]
        edge[axis] = 0 if step > 0 else -1
        u[tuple(edge)], half[tuple(edge)] = 0.0, np.inf
    return u, half


def _add_layers(energy: np.ndarray, heat: np.ndarray, axis: int, z: int, share: float, split: bool) -> None:
    """Add the heat of the faces on the - side of the voxels of plane z to the layers.

    `share` of it goes to the layer of each voxel and, with `split`, as much to the layer before.
    """
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
    """Unpack the conducting voxels as uint8 (z, y, x)."""
    words = np.ascontiguousarray(bits[1 : shape[0] + 1, 1 : shape[1] + 1, 1:-1])
    return np.unpackbits(words.view(np.uint8), axis=2, bitorder="little")[:, :, : shape[2]]
