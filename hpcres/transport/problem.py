"""What is solved along which directions, how exactly, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Literal

from hpcres.errors import InputError
from hpcres.geometry import AXES, Box, triple

DEFAULT_RTOL = 1e-3
INSULATED = (False, False, False)
Report = Callable[[str, int, float, float], None]
"""Called after every iteration with direction, iterations, D_rel so far and its estimated error."""
Keep = Callable[[str, Any, Any, Mapping[int, float]], None]
"""Called with direction, system or slab, potential and conductivities of what was solved."""


@dataclass(frozen=True)
class SolveSettings:
    """Along which directions, with which boundaries and how exactly transport is solved.

    Parameters
    ----------
    directions : sequence of str
        Any of z, y, x.
    voxel_size : sequence of float, optional
        Voxel edges z, y, x, in any one unit. By default those that a volume states, and cubic voxels where none are
        stated.
    periodic : sequence of bool
        Axes z, y, x whose two sides meet, where they are not the direction's own. Other sides are insulated.
    rtol : float
        Estimated relative error of D_rel at which a solve stops.
    profile : bool
        Whether to compute tau of each layer.
    """

    directions: Sequence[str] = AXES
    voxel_size: Sequence[float] | None = None
    periodic: Sequence[bool] = INSULATED
    rtol: float = DEFAULT_RTOL
    profile: bool = False

    @property
    def edges(self) -> tuple[float, float, float]:
        """Voxel edges z, y, x; 1 where they are not given."""
        z, y, x = self.voxel_size or (1.0, 1.0, 1.0)
        return z, y, x

    def sides(self, direction: str, shape: Sequence[int]) -> tuple[bool, bool, bool]:
        """Return whether the two sides of each axis meet in a solve along a direction.

        An axis of one voxel meets itself, which changes nothing.
        """
        z, y, x = (
            bool(meets) and axis != direction and n > 1
            for axis, meets, n in zip(AXES, self.periodic, shape, strict=True)
        )
        return z, y, x


@dataclass(frozen=True)
class Means:
    """Processors and memory of a solve.

    With `comm` its ranks hold the volume. With `memory` it is solved out of core where the process would hold more than
    so many bytes. With `device`, and neither of these, it is solved on that device. Else it is held in memory.

    Parameters
    ----------
    threads : int, optional
        By default all cores.
    device : torch.device, optional
        Device to solve on.
    comm : optional
        An mpi4py communicator.
    on_node : int
        Number of ranks of `comm` on this node.
    memory : int, optional
        Bytes of memory that the process may hold.
    scratch : Path
        Folder of the scratch files of a solve out of core.
    say : callable
        say(line), called with what a solve out of core takes.
    """

    threads: int | None = None
    device: Any = None
    comm: Any = None
    on_node: int = 1
    memory: int | None = None
    scratch: Path = Path()
    say: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class Solution:
    """Transport along one direction; dimensionless."""

    state: Literal["converged", "not percolating", "not converged", "estimate"]
    volume_fraction: float
    percolating_fraction: float | None
    D_rel: float | None
    error: float | None = None
    conductivity: float = 0.0  # mean over the volume, and of what percolates
    percolating_conductivity: float | None = 0.0
    clusters_left_out: int = 0
    voxels_left_out: int = 0
    iterations: int = 0
    seconds: float = 0.0
    bytes: int = 0
    profile: tuple[float, ...] | None = None

    @property
    def percolates(self) -> bool:
        """False where the state is "not percolating"."""
        return self.state != "not percolating"

    @property
    def tau(self) -> float | None:
        """Mean conductivity of the volume / D_rel; inf where D_rel is 0, None where it is not known."""
        return self._tau(self.conductivity)

    @property
    def tau_percolating(self) -> float | None:
        """Mean conductivity of what percolates / D_rel; inf where D_rel is 0, None where it is not known."""
        return self._tau(self.percolating_conductivity)

    def _tau(self, conductivity: float | None) -> float | None:
        if self.D_rel is None or conductivity is None:
            return None
        return conductivity / self.D_rel if self.D_rel > 0 else inf

    def as_json(self) -> dict[str, Any]:
        """Return the entries of a result in transport.json.

        JSON has no infinity: tau is null where the state says "not percolating".
        """
        tau, tau_percolating = (None if t in (None, inf) else t for t in (self.tau, self.tau_percolating))
        return {
            "state": self.state,
            "volume_fraction": self.volume_fraction,
            "percolating_fraction": self.percolating_fraction,
            "clusters_left_out": self.clusters_left_out,
            "voxels_left_out": self.voxels_left_out,
            "D_rel": self.D_rel,
            "error": self.error,
            "tau": tau,
            "tau_percolating": tau_percolating,
            "iterations": self.iterations,
            "seconds": round(self.seconds, 3),
            "bytes": self.bytes,
            "profile": None if self.profile is None else list(self.profile),
        }


def parse_crop(text: str, shape: Sequence[int]) -> Box:
    """Parse `z0:z1,y0:y1,x0:x1` inside `shape`; an empty side (`:`) is the whole axis.

    Parameters
    ----------
    text : str
        The crop as the user writes it.
    shape : sequence of int
        Shape of the volume (z, y, x).

    Returns
    -------
    Box

    Raises
    ------
    InputError
        The text is not three ranges, or a range is empty or not inside the volume.
    """
    parts = text.split(",")
    try:
        sides = [part.split(":") for part in parts]
        ends = [(int(a or 0), int(b or n)) for (a, b), n in zip(sides, shape, strict=True)]
    except ValueError:
        raise InputError(f"`crop` {text}: not three ranges; write for example 0:256,0:256,0:256") from None
    for axis, (a, b), n in zip(AXES, ends, shape, strict=True):
        if not 0 <= a < b <= n:
            raise InputError(f"`crop` {text}: {axis} {a}:{b} is not inside 0:{n}; choose a range inside")
    return Box(triple([a for a, _ in ends]), triple([b for _, b in ends]))
