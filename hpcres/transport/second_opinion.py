"""The same transport by TauFactor (Kench et al. 2023), which many groups use, as a second opinion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from typing import Any

import numpy as np

from hpcres.errors import InputError
from hpcres.geometry import AXES, Box
from hpcres.memory import free_bytes
from hpcres.transport.problem import parse_crop
from hpcres.volumes.volume import Volume

_BYTES_PER_VOXEL = 64
"""What TauFactor 1.2.1 holds at most: 62.6 bytes a voxel at 200³ (peak of the process, less what it held before)."""
_CONVERGENCE = 1e-3
"""Largest difference of the fluxes of two layers, relative to the largest flux, at which TauFactor stops."""


@dataclass(frozen=True)
class Check:
    """The same transport by another solver.

    Attributes
    ----------
    solver : str
        Name and version.
    D_rel, tau : float
        Its numbers.
    difference : float
        Its D_rel / ours − 1.
    reason : str
        Why they differ.
    """

    solver: str
    D_rel: float
    tau: float
    difference: float
    reason: str

    def __str__(self) -> str:
        """Format the check as one line."""
        return (
            f"{self.solver}: D_rel {self.D_rel:.6g}, tau {self.tau:.6g}, D_rel {self.difference:+.2%} of ours; "
            f"{self.reason}"
        )


def refuse_check(
    check: str,
    volumes: Iterable[Volume],
    voxel_size: Sequence[float],
    *,
    asked: Mapping[str, object],
    crop: str | None = None,
) -> None:
    """Raise InputError where TauFactor cannot solve the volumes, before the time of a solve is spent.

    TauFactor solves one phase of cubic voxels with insulated sides, with the whole volume in memory.

    Parameters
    ----------
    check : str
        Name of the other solver; `taufactor` is the only one.
    volumes : iterable of Volume
        Labels (z, y, x).
    voxel_size : sequence of float
        Edges z, y, x in one unit.
    asked : mapping
        Argument → its value, of those that TauFactor has no counterpart for.
    crop : str, optional
        The part of the volumes that is solved.

    Raises
    ------
    InputError
        There is no such solver, one of `asked` is set, voxels are not cubic, or there is too little memory.
    """
    if check != "taufactor":
        raise InputError(f"`check`: {check!r} is no solver that hpcres can ask; write 'taufactor', or drop it")
    if other := next((name for name, value in asked.items() if value), None):
        raise InputError(f"`check` {check}: TauFactor cannot solve with `{other}`; drop one of them")
    for volume in volumes:
        shape = volume.shape if crop is None else parse_crop(crop, volume.shape).shape
        if len(set(voxel_size)) > 1:
            raise InputError(f"{volume.path}: TauFactor's solver takes cubic voxels only; drop the check")
        need, free = prod(shape) * _BYTES_PER_VOXEL, free_bytes()
        if need > free:
            raise InputError(
                f"{volume.path}: TauFactor needs {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free; "
                "drop the check, or take a part of the volume"
            )


def by_taufactor(volume: Volume, result: Mapping[str, Any]) -> Check:
    """Solve with TauFactor what `result`, one of those of transport.json, has solved.

    Parameters
    ----------
    volume : Volume
        Labels (z, y, x) that `refuse_check` does not refuse.
    result : mapping
        One phase of conductivity 1, converged or not percolating.

    Returns
    -------
    Check
    """
    from taufactor import Solver

    (a, b), (c, d), (e, f) = result["settings"]["crop"] or [[0, n] for n in volume.shape]
    box = Box((a, c, e), (b, d, f))
    conducts = np.isin(volume.read(box), result["labels"])
    solver = Solver(np.moveaxis(conducts, AXES.index(result["direction"]), 0).astype(np.uint8), device="cpu")
    name = f"TauFactor {version('taufactor')}"
    if result["state"] == "not percolating":
        return Check(name, 0.0, float("inf"), 0.0, "the phase does not percolate")
    solver.solve(verbose=False, conv_crit=_CONVERGENCE)
    d_rel = float(np.ravel(solver.D_rel)[0])
    flux = solver.flux_1d[0]
    uneven = float((flux.max() - flux.min()) / flux.max())
    state = "stopped" if solver.converged else "did not converge"
    return Check(
        name,
        d_rel,
        result["volume_fraction"] / d_rel,
        d_rel / result["D_rel"] - 1,
        f"it {state} after {solver.iter} iterations, where the fluxes of its layers differ by {uneven:.1e}; ours is at "
        f"most {result['error']:.1e} too high. Both put the potentials on the outer faces",
    )
