"""The conjugate gradients and the cycle of the CPU on a torch device, that is, a GPU.

Vectors hold the conducting voxels in the order z, y, x, float32, as on the CPU, and one element more that is zero and
stands for every insulating voxel. A pass works on pieces of the volume, whole rows of a range of z and y, one after the
other. In a piece, bits become a mask, and a running sum along x gives the place of each voxel in the vectors (64 bits).
The rest is plain arithmetic on dense arrays. No index of a voxel is stored. Only sums come back to the host.

Percolation and the hierarchy are set up on the host by the kernels of `percolation`, `sweeps` and `coarse`.
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
from hpcres.transport.device_levels import Cycle
from hpcres.transport.device_window import RED, Piece, Window, inner, of_cell, total
from hpcres.transport.multigrid import System
from hpcres.transport.solver import Solved
from hpcres.transport.threads import Threads
from hpcres.transport.voxels import Medium

PIECES = 100  # of a volume: what a pass needs for one is small beside the vectors
LEAST_PIECE = 1 << 22  # voxels; with fewer, a GPU waits for the next launch
WORK_BYTES, WORK_BYTES_SEVERAL = 34, 50  # held at once for a voxel of a piece, its margins included
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
        self._cycle = Cycle(self.levels, self.threads, device)
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
            w = Window(self, piece, 0)
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
        w = Window(self, piece, 3)
        R, D = r[w.inner(w.places, 1)], w.inverse_diagonal()
        A = (R * D).mul_(w.red(R))
        B = w.around(A).add_(inner(R)).mul_(inner(D)).mul_(~w.red(inner(R)))
        # The sweep leaves nothing at black voxels, and at red ones what black ones changed.
        left = w.around(B).mul_(w.inner(w.mask, 3))
        of_places = torch.stack([left[of_cell(i, self.step)] for i in self._places])
        self._cycle.b.index_add_(0, w.aggregates_of_places(0).view(-1), of_places.view(-1))

    def _sweep_up(self, piece: Piece, r: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Set z of the piece, and return its part of r · z."""
        w = Window(self, piece, 3)
        R, D = r[w.inner(w.places, 1)], w.inverse_diagonal()
        A = R * D
        aggregates = w.aggregates_of_places(2)
        of_places = self._cycle.x.index_select(0, aggregates.view(-1)).view(aggregates.shape)
        del aggregates
        for place, i in enumerate(self._places):
            A[of_cell(i, self.step)].add_(of_places[place], alpha=self.form.correction)
        A.mul_(w.red(A)).mul_(w.inner(w.mask, 1))
        B = w.around(A).add_(inner(R)).mul_(inner(D)).mul_(~w.red(inner(R)))
        R, D = w.inner(R, 2), w.inner(D, 2)
        Z = w.around(B).add_(R).mul_(D).mul_(w.red(R)).add_(inner(B))
        z[w.inner(w.places, 3)] = Z
        return total(Z.mul_(R))

    def _heats(self, piece: Piece, x: torch.Tensor, end: float) -> torch.Tensor:
        """Return the energy dissipated in the piece and the faces on its + sides, in parts."""
        w = Window(self, piece, 1)
        V, here, after = x[w.places], slice(1, -1), slice(2, None)
        sums = [w.heat(V, (here, here), beyond, axis) for axis, beyond in enumerate(((after, here), (here, after)))]
        sums.append(w.heat(V, (here, here, slice(-1)), (here, here, slice(1, None)), 2))
        if self.periodic[2]:
            sums.append(w.heat(V, (here, here, slice(-1, None)), (here, here, slice(1)), 3))
        V, mask = inner(V), inner(w.mask)
        for place, conductance, potential in w.faces(1, end):
            drop = (V[place] - potential).mul_(mask[place])
            sums.append(total(drop.square_().mul_(conductance)))
        return torch.stack(sums)

    def _subtract_applied(self, piece: Piece, p: torch.Tensor, alpha: float, end: float, r: torch.Tensor) -> None:
        w = Window(self, piece, 1)
        V = p[w.places]
        if self.form.robust:
            q = w.outflow(V)
            for place, conductance, potential in w.faces(1, end):
                q[place] += conductance * (inner(V)[place] - potential)
        else:
            q = w.diagonal().mul_(inner(V)).sub_(w.around(V))
            for place, conductance, potential in w.faces(1, end):
                q[place] -= conductance * potential
        places = w.inner(w.places, 1)
        r[places] = r[places].sub_(q.mul_(w.inner(w.mask, 1)), alpha=alpha)
