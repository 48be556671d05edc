"""Potential and flux density of solved systems, written into a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hpcres.geometry import Triple
from hpcres.transport.voxels import Voxels
from hpcres.volumes.field_store import FieldStore

FIELD_PLANES = 64  # of a chunk, which only one rank may write


class FieldWriter(FieldStore):
    """A store of potentials and flux densities.

    `<phase>/<direction>/potential` is (z, y, x), 0 at the first face and 1 at the last. `<phase>/<direction>/flux` is
    (component z, y, x; z, y, x), as of `System.flux`. Both have values at the voxels that take part, and NaN elsewhere.
    """

    def __init__(
        self, path: str, shape: Triple, attributes: Mapping[str, Any], overwrite: bool, comm: Any = None
    ) -> None:
        """Open the store.

        With `comm` each rank writes planes of its own, all of them whole chunks, and the first rank makes the arrays.
        """
        self._comm = comm
        super().__init__(path, shape, attributes, overwrite, shared=None if comm is None else self._from_first)
        self._arrays: dict[str, Any] = {}

    def _from_first(self, make: Callable[[], Any]) -> Any:
        """Return on every rank what `make` gives on the first rank, when all ranks have come here."""
        self._comm.Barrier()
        return self._comm.bcast(make() if self._comm.Get_rank() == 0 else None)

    def begin(self, phase: str, direction: str) -> None:
        """Make the arrays of what is to be written next; called on every rank."""
        name = _named(phase, direction)
        self._arrays = {"potential": self.add(f"{name}/potential"), "flux": self.add(f"{name}/flux", 3)}

    def write(self, system: Voxels, x: np.ndarray, conductivity: Mapping[int, float]) -> None:
        """Write the own planes of a system.

        Parameters
        ----------
        system : Voxels
            The system that was solved.
        x : np.ndarray
            Its potential, with one more plane on both sides.
        conductivity : mapping
            Conductivities by label.
        """
        of_label = np.zeros(256)
        for label, k in conductivity.items():
            of_label[label] = k
        z, y, x_ = self.shape
        begin, end = system.own
        for a in range(begin, min(end, z - system.first), FIELD_PLANES):
            b = min(a + FIELD_PLANES, end, z - system.first)
            planes = slice(a + system.first, b + system.first)
            # An odd periodic axis was solved twice over.
            self._arrays["potential"][planes] = system.potential(x, a, b)[:, :y, :x_]
            self._arrays["flux"][:, planes] = system.flux(x, a, b, of_label)[:, :, :y, :x_]


def _named(phase: str, direction: str) -> str:
    return f"{phase.replace('/', '-')}/{direction}"


def field_writer(
    path: str, shape: Sequence[int], voxel_size: Sequence[float], overwrite: bool, comm: Any = None
) -> FieldWriter:
    """Open a store for potential and flux density, with the voxel size in its attributes."""
    place: Triple = (int(shape[0]), int(shape[1]), int(shape[2]))
    attributes: dict[str, Any] = {"hpcres": {"schema": "hpcres fields 1", "voxel_size": list(voxel_size)}}
    return FieldWriter(path, place, attributes, overwrite, comm)
