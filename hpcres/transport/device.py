"""The conjugate gradients and the cycle of the CPU on a torch device, that is, a GPU.

Vectors hold the conducting voxels in the order z, y, x, float32, as on the CPU, and one element more that is zero and
stands for every insulating voxel. A pass works on pieces of the volume, whole rows of a range of z and y, one after the
other. In a piece, bits become a mask, and a running sum along x gives the place of each voxel in the vectors (64 bits).
The rest is plain arithmetic on dense arrays. No index of a voxel is stored. Only sums come back to the host.

Percolation and the hierarchy are set up on the host by the kernels of `percolation`, `fine` and `coarse`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch

from hpcres.errors import InputError
from hpcres.transport import coarse
from hpcres.transport.coarse import Level
from hpcres.transport.multigrid import System
from hpcres.transport.solver import Solved
from hpcres.transport.threads import Threads
from hpcres.transport.voxels import Medium

PIECES = 100  # of a volume: what a pass needs for one is small beside the vectors
LEAST_PIECE = 1 << 22  # voxels; with fewer, a GPU waits for the next launch
MATRIX = 512  # aggregates of a level from which on the cycle is one matrix: one launch instead of hundreds
RED = (0, 3, 5, 6)  # places of a cell of 2×2×2, 4 dz + 2 dy + dx, with even z + y + x
WORK_BYTES, WORK_BYTES_SEVERAL = 34, 50  # held at once for a voxel of a piece, its margins included
Piece = tuple[int, int, int, int]
"""Planes and rows: z0, z1, y0, y1; all even."""


def find_device(name: str) -> torch.device:
    """Return the torch device `cuda` or `cuda:1`.

    Parameters
    ----------
    name : str
        `cuda`, or `cuda:` and a number.

    Returns
    -------
    torch.device

    Raises
    ------
    InputError
        The name is not that of a GPU, or there is no such device.
    """
    if not re.fullmatch(r"cuda(:(0|[1-9]\d?))?", name):
        raise InputError(f"`device` {name}: not a GPU; write cuda, or cuda:1 for the second one")
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(name)
    if number <= (device.index or 0):
        raise InputError(f"`device` {name}: torch {torch.__version__} sees {number} CUDA devices; drop the option")
    return device


def check_device_memory(
    device: torch.device, shape: Sequence[int], voxels: int, several: bool, per_voxel: float
) -> None:
    """Raise InputError where a solve would not fit on a GPU.

    Parameters
    ----------
    device : torch.device
        Devices that are no GPU are not checked.
    shape : sequence of int
        Voxels z, y, x.
    voxels : int
        Number of conducting voxels.
    several : bool
        Whether there are several conductivities.
    per_voxel : float
        Bytes for each conducting voxel.

    Raises
    ------
    InputError
        The solve needs more memory than is free on the GPU.
    """
    if device.type != "cuda":
        return
    size = prod(shape)
    work = 1.2 * max(size / PIECES, min(size, LEAST_PIECE)) * (WORK_BYTES_SEVERAL if several else WORK_BYTES)
    need = size * (0.15 + several) + work + voxels * per_voxel
    free = torch.cuda.mem_get_info(device)[0]
    if need > free:
        raise InputError(
            f"volume of {' × '.join(map(str, shape))} voxels: needs {need / 2**30:.1f} GiB on {device}, "
            f"{free / 2**30:.1f} GiB are free; drop `device`, or take a part with `crop`"
        )


class DeviceSystem(System):
    """A `System` whose vectors and levels are on a device; its potential comes back as an array."""

    def __init__(
        self, device: torch.device, bits: np.ndarray, medium: Medium, threads: Threads, labels: np.ndarray | None = None
    ) -> None:
        """Set up the system on the host and copy it to the device; all other arguments are those of `System`."""
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        super().__init__(bits, medium, threads, labels)
        planes, rows, columns = self.geometry[:3]
        self._width = columns + columns % 2
        number = self.levels[0].aggregates
        self._cycle = _Cycle(self.levels, self.threads, device)
        self.levels = []
        put = self._put
        words = np.ascontiguousarray(self.bits[1:-1, 1:-1, 1:-1])
        self._bits = put(words.view(np.uint8)[:, :, : -(-columns // 8)])
        self._before = put((self.rows[:-1].astype(np.int64) - 1).reshape(planes, rows))
        self._aggregates = put(self.aggregates[:, :-1].astype(coarse.index_type(number + 1)))
        self._labels = None if self.labels is None else put(self.labels)
        self._resistance = None if self.resistance is None else put(self.resistance)
        self.dtype = torch.float64 if self.form.dtype is np.float64 else torch.float32
        # A sweep leaves a residual at red voxels only. In cells that are not 2×2×2 these are at different places.
        within = [i for i in range(8) if all((i >> 2 - a & 1) < n for a, n in enumerate(self.step))]
        self._places = RED if self.step == (2, 2, 2) else tuple(within)
        self._cells = put(self.cells.astype(np.int16)) if self.split else None
        self._numbers, self._aggregate_of_place = put(self.tables[0]), put(self.tables[1].T[list(self._places)])
        edge = max((planes * rows / PIECES) ** 0.5, (LEAST_PIECE / columns) ** 0.5)
        deep, high = (-(-n // (2 * max(1, round(n / edge)))) * 2 for n in (planes, rows))
        self._pieces = [
            (z, min(z + deep, planes), y, min(y + high, rows))
            for z in range(0, planes, deep)
            for y in range(0, rows, high)
        ]
        self._most = (deep + 6) * (high + 6) * self._width
        # Only sweeps on the host need them.
        del self.cells, self.aggregates

    def _put(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    @property
    def held(self) -> int:
        """Bytes on the device, those of the vectors included; temporaries aside."""
        own = [
            self._bits,
            self._before,
            self._aggregates,
            self._labels,
            self._resistance,
            self._cells,
            self._numbers,
            self._aggregate_of_place,
        ]
        vectors = (3 * self.dtype.itemsize + (8 if self.form.robust else 4)) * (self.voxels + 1)
        return sum(t.nbytes for t in own if t is not None) + self._cycle.bytes + vectors

    @property
    def bytes(self) -> int:
        """Largest number of bytes: as torch counted on a GPU, else what is held and what a piece may take."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return self.held + self._most * (WORK_BYTES if self._labels is None else WORK_BYTES_SEVERAL)

    def solve(
        self, rtol: float, *, limit: int = 200, report: Callable[[int, float, float], None] | None = None
    ) -> tuple[Solved, Any]:
        """Solve as `Solver.solve`, with the potential as an array on the host.

        Raises
        ------
        InputError
            The device runs out of memory.
        """
        try:
            solved, x = super().solve(rtol, limit=limit, report=report)
        except torch.OutOfMemoryError:
            raise InputError(
                f"{self.device}: out of memory at {self.bytes / 2**30:.1f} GiB, with more in use by others than when "
                "the solve began; run it again when the GPU is free, drop `device`, or take a part with `crop`"
            ) from None
        return solved, x[:-1].cpu().numpy()

    def vector(self) -> Any:
        """Make a vector of zeros on the device."""
        return torch.zeros(self.voxels + 1, dtype=self.dtype, device=self.device)

    def solution(self) -> Any:
        """Make zeros for x; in the robust form float64, which a GPU has, instead of two float32 vectors."""
        kind = torch.float64 if self.form.robust else self.dtype
        return torch.zeros(self.voxels + 1, dtype=kind, device=self.device)

    def start(self, x: Any) -> None:
        """Set x to the potential of a uniform volume."""
        axis, (first, last) = self.geometry[7], self.geometry[8:10]
        for piece in self._pieces:
            w = _Window(self, piece, 0)
            ramp = torch.arange(w.mask.shape[axis], device=self.device) + (piece[2 * axis] if axis < 2 else 0)
            ramp = ramp.to(x.dtype)
            ramp = ((ramp - first + 0.5) / (last - first + 1)).view([-1 if a == axis else 1 for a in range(3)])
            x[w.places] = w.mask * ramp

    def find_residual(self, x: Any, r: Any) -> None:
        """Set r = sources - A x."""
        r.zero_()
        for piece in self._pieces:
            self._subtract_applied(piece, x, 1.0, 1.0, r)

    def turn(self, p: Any, z: Any, beta: float) -> float:
        """Set p = z + β p, and return its energy."""
        p.mul_(beta).add_(z)
        return self.energy(p, 0.0)

    def advance(self, x: Any, r: Any, p: Any, alpha: float) -> None:
        """Set x += α p and r -= α A p."""
        x.add_(p, alpha=alpha)
        for piece in self._pieces:
            self._subtract_applied(piece, p, alpha, 0.0, r)

    def precondition(self, r: Any, z: Any) -> float:
        """Set z = M⁻¹ r, and return r · z."""
        self._cycle.b.zero_()
        for piece in self._pieces:
            self._sweep_down(piece, r)
        self._cycle.run()
        return float(torch.stack([self._sweep_up(piece, r, z) for piece in self._pieces]).sum())

    def energy(self, x: Any, end: float) -> float:
        """Return the energy that x dissipates, with the far face at the potential `end`."""
        return float(torch.cat([self._heats(piece, x, end) for piece in self._pieces]).sum())

    # What one piece takes is dropped on return, before the next one.

    def _sweep_down(self, piece: Piece, r: torch.Tensor) -> None:
        w = _Window(self, piece, 3)
        R, D = r[w.inner(w.places, 1)], w.inverse_diagonal()
        A = (R * D).mul_(w.red(R))
        B = w.around(A).add_(_inner(R)).mul_(_inner(D)).mul_(~w.red(_inner(R)))
        # The sweep leaves nothing at black voxels, and at red ones what black ones changed.
        left = w.around(B).mul_(w.inner(w.mask, 3))
        of_places = torch.stack([left[_of_cell(i, self.step)] for i in self._places])
        self._cycle.b.index_add_(0, w.aggregates_of_places(0).view(-1), of_places.view(-1))

    def _sweep_up(self, piece: Piece, r: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Set z of the piece, and return its part of r · z."""
        w = _Window(self, piece, 3)
        R, D = r[w.inner(w.places, 1)], w.inverse_diagonal()
        A = R * D
        aggregates = w.aggregates_of_places(2)
        of_places = self._cycle.x.index_select(0, aggregates.view(-1)).view(aggregates.shape)
        del aggregates
        for place, i in enumerate(self._places):
            A[_of_cell(i, self.step)].add_(of_places[place], alpha=self.form.correction)
        A.mul_(w.red(A)).mul_(w.inner(w.mask, 1))
        B = w.around(A).add_(_inner(R)).mul_(_inner(D)).mul_(~w.red(_inner(R)))
        R, D = w.inner(R, 2), w.inner(D, 2)
        Z = w.around(B).add_(R).mul_(D).mul_(w.red(R)).add_(_inner(B))
        z[w.inner(w.places, 3)] = Z
        return _total(Z.mul_(R))

    def _heats(self, piece: Piece, x: torch.Tensor, end: float) -> torch.Tensor:
        """Return the energy dissipated in the piece and the faces on its + sides, in parts."""
        w = _Window(self, piece, 1)
        V, here, after = x[w.places], slice(1, -1), slice(2, None)
        sums = [w.heat(V, (here, here), beyond, axis) for axis, beyond in enumerate(((after, here), (here, after)))]
        sums.append(w.heat(V, (here, here, slice(-1)), (here, here, slice(1, None)), 2))
        if self.periodic[2]:
            sums.append(w.heat(V, (here, here, slice(-1, None)), (here, here, slice(1)), 3))
        V, mask = _inner(V), _inner(w.mask)
        for place, conductance, potential in w.faces(1, end):
            drop = (V[place] - potential).mul_(mask[place])
            sums.append(_total(drop.square_().mul_(conductance)))
        return torch.stack(sums)

    def _subtract_applied(self, piece: Piece, p: torch.Tensor, alpha: float, end: float, r: torch.Tensor) -> None:
        w = _Window(self, piece, 1)
        V = p[w.places]
        if self.form.robust:
            q = w.outflow(V)
            for place, conductance, potential in w.faces(1, end):
                q[place] += conductance * (_inner(V)[place] - potential)
        else:
            q = w.diagonal().mul_(_inner(V)).sub_(w.around(V))
            for place, conductance, potential in w.faces(1, end):
                q[place] -= conductance * potential
        places = w.inner(w.places, 1)
        r[places] = r[places].sub_(q.mul_(w.inner(w.mask, 1)), alpha=alpha)


def _inner(t: torch.Tensor) -> torch.Tensor:
    return t[1:-1, 1:-1]


def _total(t: torch.Tensor) -> torch.Tensor:
    """Sum rows in float32, and their sums in float64: all in float64 would need a copy of t."""
    return t.sum(-1).sum(dtype=torch.float64)


def _of_cell(i: int, step: Sequence[int]) -> tuple[slice, ...]:
    return slice(i >> 2, None, step[0]), slice(i >> 1 & 1, None, step[1]), slice(i & 1, None, step[2])


class _Window:
    """A piece with `margin` planes and rows around it, dense (z, y, x); x is padded to an even number.

    Arrays on it, or on less of its margin, are told apart by their shapes.
    """

    def __init__(self, system: DeviceSystem, piece: Piece, margin: int) -> None:
        self._system, self._piece, self._margin = system, piece, margin
        planes, rows = system.geometry[:2]
        (z0, z1), (y0, y1) = ((a - margin, b + margin) for a, b in (piece[:2], piece[2:]))
        self._z, z_in = self._wrapped(z0, z1, planes, system.geometry[4])
        self._y, y_in = self._wrapped(y0, y1, rows, system.geometry[5])
        words = system._bits.index_select(0, self._z).index_select(1, self._y)
        for axis, inside in enumerate((z_in, y_in)):
            words.narrow(axis, 0, inside.start).zero_()
            words.narrow(axis, inside.stop, words.shape[axis] - inside.stop).zero_()
        bit = torch.arange(8, dtype=torch.uint8, device=system.device)
        spread = (words.unsqueeze(-1) >> bit).bitwise_and_(1).flatten(2)[..., : system._width]
        if spread.shape[2] < system._width:
            spread = torch.nn.functional.pad(spread, (0, system._width - spread.shape[2]))
        self.mask = spread.bool()
        del words, spread
        places = self.mask.cumsum(2, dtype=torch.int64)
        places.add_(system._before.index_select(0, self._z).index_select(1, self._y).unsqueeze(-1))
        self.places = places.masked_fill_(~self.mask, system.voxels)
        self._between: tuple[torch.Tensor, ...] | None = None
        if system._labels is not None:
            assert system._resistance is not None
            labels = system._labels
            labels = labels.index_select(0, self._z.clamp(max=labels.shape[0] - 1))
            labels = labels.index_select(1, self._y.clamp(max=labels.shape[1] - 1)).int()
            if labels.shape[2] < system._width:
                labels = torch.nn.functional.pad(labels, (0, system._width - labels.shape[2]))
            half = system._resistance.index_select(0, labels.view(-1)).view(labels.shape)
            self._half = half.masked_fill_(~self.mask, torch.inf)
            gz, gy, gx = map(float, system.g)
            self._between = (
                (half[1:] + half[:-1]).reciprocal_().mul_(gz),
                (half[:, 1:] + half[:, :-1]).reciprocal_().mul_(gy),
                (half[..., 1:] + half[..., :-1]).reciprocal_().mul_(gx),
                (half[..., 0] + half[..., -1]).reciprocal_().mul_(gx),
            )

    def _wrapped(self, begin: int, end: int, number: int, periodic: int) -> tuple[torch.Tensor, slice]:
        """Return the indices that stand for begin … end - 1, and which of them stand for themselves or wrap."""
        at = torch.arange(begin, end, device=self._system.device)
        if periodic:
            return at.remainder_(number), slice(0, end - begin)
        return at.clamp_(0, number - 1), slice(max(0, -begin), min(end, number) - begin)

    def inner(self, t: torch.Tensor, by: int) -> torch.Tensor:
        """Return t without `by` planes and rows of its margin."""
        return t[by : t.shape[0] - by, by : t.shape[1] - by]

    def red(self, like: torch.Tensor) -> torch.Tensor:
        """Mark the voxels with even z + y + x; a window's z and y begin both even or both odd."""
        z, y, x = (torch.arange(n, device=self._system.device) & 1 for n in like.shape)
        return (z[:, None] ^ y).unsqueeze(-1) == x

    def around(self, v: torch.Tensor) -> torch.Tensor:
        """Sum conductance × v over the six neighbours; the result has one plane and row of margin less."""
        system, own = self._system, _inner(v)
        if self._between is None:
            gz, gy, gx = map(float, system.g)
            s = (v[:-2, 1:-1] + v[2:, 1:-1]).mul_(gz)
            s.add_(v[1:-1, :-2], alpha=gy).add_(v[1:-1, 2:], alpha=gy)
            s[..., 1:].add_(own[..., :-1], alpha=gx)
            s[..., :-1].add_(own[..., 1:], alpha=gx)
            if system.periodic[2]:
                s[..., 0].add_(own[..., -1], alpha=gx)
                s[..., -1].add_(own[..., 0], alpha=gx)
            return s
        less = (len(self.mask) - len(v)) // 2
        cz, cy, cx, wrap = (self.inner(c, less) for c in self._between)
        s = cz[:-1, 1:-1] * v[:-2, 1:-1]
        s.addcmul_(cz[1:, 1:-1], v[2:, 1:-1])
        s.addcmul_(cy[1:-1, :-1], v[1:-1, :-2]).addcmul_(cy[1:-1, 1:], v[1:-1, 2:])
        s[..., 1:].addcmul_(_inner(cx), own[..., :-1])
        s[..., :-1].addcmul_(_inner(cx), own[..., 1:])
        if system.periodic[2]:
            s[..., 0].addcmul_(_inner(wrap), own[..., -1])
            s[..., -1].addcmul_(_inner(wrap), own[..., 0])
        return s

    def outflow(self, v: torch.Tensor) -> torch.Tensor:
        """Sum the currents to the six neighbours; the result has one plane and row of margin less."""
        system, own, less = self._system, _inner(v), (len(self.mask) - len(v)) // 2
        mask = self.inner(self.mask, less)
        s, here = torch.zeros_like(own), slice(1, -1)
        every: list[Any] = [((slice(-2), here), 0, slice(-1)), ((slice(2, None), here), 0, slice(1, None))]
        every += [((here, slice(-2)), 1, slice(-1)), ((here, slice(2, None)), 1, slice(1, None))]
        for place, axis, face in every:
            drop = (own - v[place]).mul_(mask[place])
            if self._between is None:
                s.add_(drop, alpha=float(system.g[axis]))
            else:
                between = self.inner(self._between[axis], less)
                s.addcmul_(drop, between[face, here] if axis == 0 else between[here, face])
        drop = own[..., 1:] - own[..., :-1]
        drop.mul_(_inner(mask)[..., 1:]).mul_(_inner(mask)[..., :-1])
        drop.mul_(float(system.g[2]) if self._between is None else _inner(self.inner(self._between[2], less)))
        s[..., 1:].add_(drop)
        s[..., :-1].sub_(drop)
        if system.periodic[2]:
            drop = (own[..., 0] - own[..., -1]).mul_(_inner(mask)[..., 0]).mul_(_inner(mask)[..., -1])
            drop.mul_(float(system.g[2]) if self._between is None else _inner(self.inner(self._between[3], less)))
            s[..., 0].add_(drop)
            s[..., -1].sub_(drop)
        return s

    def diagonal(self) -> torch.Tensor:
        """Sum the conductances of each voxel, those to the faces included.

        The values where nothing conducts have no meaning.
        """
        d = self.around(self.mask.to(self._system.dtype))
        for place, conductance, _ in self.faces(1, 0.0):
            d[place] += conductance
        return d

    def inverse_diagonal(self) -> torch.Tensor:
        """Return 1 / `diagonal`, 0 where nothing conducts."""
        return self.diagonal().reciprocal_().masked_fill_(~_inner(self.mask), 0.0)

    def faces(self, cut: int, end: float) -> list[tuple[Any, Any, float]]:
        """Find the two outer faces in the window less `cut` of its margin.

        Returns, for each face that is there, the place of its voxels, the conductance to them, and its potential, 0 or
        `end`.
        """
        system, found = self._system, []
        axis, g = system.geometry[7], float(system.g[system.geometry[7]])
        begin = self._piece[2 * axis] - self._margin + cut if axis < 2 else 0
        extent = self.mask.shape[axis] - 2 * cut if axis < 2 else self.mask.shape[2]
        for at, potential in ((system.geometry[8], 0.0), (system.geometry[9], end)):
            if 0 <= at - begin < extent:
                place: tuple[Any, ...] = (*(slice(None),) * axis, at - begin)
                half = 0.5 if self._between is None else self.inner(self._half, cut)[place]
                found.append((place, g / half, potential))
        return found

    def heat(self, v: torch.Tensor, voxels: Any, neighbours: Any, axis: int) -> torch.Tensor:
        """Return the energy dissipated over the faces between some voxels and their neighbours along an axis.

        Axis 3 stands for the faces across the sides along x.
        """
        drop = (v[neighbours] - v[voxels]).mul_(self.mask[neighbours]).mul_(self.mask[voxels]).square_()
        if self._between is None:
            return _total(drop).mul_(float(self._system.g[min(axis, 2)]))
        own, beyond = slice(1, -1), slice(1, None)
        between = self._between[axis][beyond if axis == 0 else own, beyond if axis == 1 else own]
        return _total(drop.mul_(between.view(drop.shape) if axis == 3 else between))

    def aggregates_of_places(self, margin: int) -> torch.Tensor:
        """Return the aggregate of each voxel at the system's places, (place, z, y, x of cells).

        The values where nothing conducts have no meaning. `margin` must be even.
        """
        system, by, step = self._system, self._margin - margin, self._system.step
        mask = self.inner(self.mask, by)
        shape = [n // s for n, s in zip(mask.shape, step, strict=True)]
        z, y = (at[by : len(at) - by : s] // s for at, s in ((self._z, step[0]), (self._y, step[1])))
        if system._cells is None:
            cell = torch.zeros(shape, dtype=torch.uint8, device=system.device)
            for i in range(8):
                if all((i >> 2 - a & 1) < n for a, n in enumerate(step)):
                    cell.bitwise_or_(mask[_of_cell(i, step)].to(torch.uint8) << i)
        else:
            cell = system._cells.index_select(0, z).index_select(1, y)
        cell = cell.int().view(-1)
        number = system._numbers.index_select(0, cell).view(shape)
        row = z[:, None] * (system.geometry[1] // step[1]) + y[None, :]
        start = torch.empty(shape, dtype=system._aggregates.dtype, device=system.device)
        for odd in (0, 1):
            some = number[..., odd::2]
            # The aggregates of one colour of cells are counted along a row.
            begin = system._aggregates[z[:, None] + y[None, :] + odd & 1, row].unsqueeze(-1)
            start[..., odd::2] = some.cumsum(2, dtype=start.dtype).sub_(some).add_(begin)
        aggregate = system._aggregate_of_place.index_select(1, cell).view(-1, *shape)
        return aggregate + start


class _Level:
    """A coarse level on the device: six neighbours of every aggregate, the first of all, then the second, and so on."""

    def __init__(self, level: Level, device: torch.device) -> None:
        def put(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self.aggregates, self.red, self.mixed, self.correction = (
            level.aggregates,
            level.red,
            level.mixed,
            level.correction,
        )
        self.diagonal = put(level.diagonal)
        self.places, self.values = put(level.places.T), put(level.values.T)
        self.more = tuple(map(put, level.more))
        self.more_from_black = int(np.searchsorted(level.more[0], level.red))
        self.parent = (
            None if level.parent is None else put(level.parent[: level.aggregates if level.mixed else level.red])
        )
        # One element more, for what is in no aggregate.
        self.to_faces = None if level.to_faces is None else put(level.to_faces)
        self.b, self.x = (torch.zeros(level.aggregates + 1, dtype=self.diagonal.dtype, device=device) for _ in range(2))

    @property
    def bytes(self) -> int:
        """Bytes on the device."""
        arrays = (self.diagonal, self.places, self.values, *self.more, self.to_faces, self.parent, self.b, self.x)
        return sum(t.nbytes for t in arrays if t is not None)

    def around(self, begin: int, end: int) -> torch.Tensor:
        """Return b + the sum of conductance × x over neighbours, of red aggregates (0 to `red`), black ones or all."""
        s = self.b[begin:end].clone()
        for places, values in zip(self.places, self.values, strict=True):
            s.addcmul_(values[begin:end], self.x.index_select(0, places[begin:end]))
        a = 0 if begin == 0 else self.more_from_black
        b = self.more_from_black if end == self.red else len(self.more[0])
        if b > a:
            of, places, values = (t[a:b] for t in self.more)
            s.index_add_(0, of - begin, values * self.x.index_select(0, places))
        return s

    def residual(self, end: int) -> torch.Tensor:
        """Return the residual of the first `end` aggregates.

        That of a robust level is a sum of currents (see `coarse.restrict`).
        """
        if self.to_faces is None:
            return self.around(0, end).addcmul_(self.diagonal[:end], self.x[:end], value=-1)
        s, own = self.b[:end].addcmul(self.to_faces[:end], self.x[:end], value=-1), self.x[:end]
        for places, values in zip(self.places, self.values, strict=True):
            s.addcmul_(values[:end], self.x.index_select(0, places[:end]).sub_(own))
        more = self.more_from_black if end == self.red else len(self.more[0])
        if more:
            of, places, values = (t[:more] for t in self.more)
            s.index_add_(0, of, values * (self.x.index_select(0, places) - self.x.index_select(0, of)))
        return s

    def sweep(self, begin: int, end: int) -> None:
        """Relax the aggregates begin … end - 1: red ones, black ones or all."""
        if end > begin:
            torch.div(self.around(begin, end), self.diagonal[begin:end], out=self.x[begin:end])


class _Cycle:
    """The coarse levels and their W-cycle (`coarse.cycle`), the lowest of them as one matrix."""

    def __init__(self, levels: list[Level], threads: Threads, device: torch.device) -> None:
        """Move the levels to the device; `levels` is emptied."""
        at = next((i for i, level in enumerate(levels) if level.aggregates <= MATRIX), len(levels) - 1)
        lowest = levels[at]
        self._matrix: torch.Tensor | None = None
        self._factors = lowest.factors if lowest.aggregates > MATRIX else None
        if lowest.aggregates <= MATRIX or lowest.inverse is not None:
            matrix = np.empty((lowest.aggregates, lowest.aggregates), lowest.b.dtype)
            for aggregate in range(lowest.aggregates):
                lowest.b[:], lowest.b[aggregate] = 0, 1
                coarse.cycle(levels, at, threads.each)
                matrix[:, aggregate] = lowest.x
            self._matrix = torch.from_numpy(matrix).to(device)
        del levels[at + 1 :]
        self._levels = []
        while levels:
            self._levels.append(_Level(levels.pop(0), device))
        self.b, self.x = self._levels[0].b, self._levels[0].x

    @property
    def bytes(self) -> int:
        """Bytes on the device."""
        return sum(level.bytes for level in self._levels) + (0 if self._matrix is None else self._matrix.nbytes)

    def run(self, at: int = 0) -> None:
        """Set x ≈ A⁻¹ b on a level."""
        level = self._levels[at]
        red, aggregates, x, b = level.red, level.aggregates, level.x, level.b
        if at + 1 == len(self._levels):
            if self._factors is not None:
                solved = self._factors.solve(b[:-1].double().cpu().numpy())
                x[:-1] = torch.from_numpy(solved).to(x)
            elif self._matrix is None:
                torch.div(b[:-1], level.diagonal, out=x[:-1])
            else:
                torch.mv(self._matrix, b[:-1], out=x[:-1])
            return
        below, corrected = self._levels[at + 1], aggregates if level.mixed else red
        parent = level.parent
        assert parent is not None
        for visit in range(2):
            if visit == 0:
                x.zero_()
                torch.div(b[:red], level.diagonal[:red], out=x[:red])
            elif level.mixed:
                level.sweep(0, red)
            level.sweep(red, aggregates)
            below.b.zero_()
            below.b.index_add_(0, parent, level.residual(corrected))
            self.run(at + 1)
            x[:corrected].add_(below.x.index_select(0, parent), alpha=level.correction)
            level.sweep(red, aggregates)
            level.sweep(0, red)
