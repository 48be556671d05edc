"""Potential and flux density of solved systems, into a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hpcres.geometry import Triple
from hpcres.metrics.transport.multigrid import System
from hpcres.volumes import FieldStore

_PLANES = 64


class FieldWriter(FieldStore):
    """`<phase>/<direction>/potential` (z, y, x), 0 at the first face and 1 at the last, and `<phase>/<direction>/flux`
    (component z, y, x; z, y, x), as of `System.flux`; both at the voxels that take part, NaN elsewhere."""

    def write(
        self, phase: str, direction: str, system: System, x: np.ndarray, conductivity: Mapping[int, float]
    ) -> None:
        of_label = np.zeros(256)
        for label, k in conductivity.items():
            of_label[label] = k
        name = f"{phase.replace('/', '-')}/{direction}"
        potential, flux = self.add(f"{name}/potential"), self.add(f"{name}/flux", 3)
        z, y, x_ = self.shape
        for a in range(0, z, _PLANES):
            b = min(a + _PLANES, z)
            # An odd periodic axis was solved twice over.
            potential[a:b] = system.potential(x, a, b)[:, :y, :x_]
            flux[:, a:b] = system.flux(x, a, b, of_label)[:, :, :y, :x_]


def field_writer(
    path: str, shape: Sequence[int], voxel_size: Sequence[float], overwrite: bool
) -> FieldWriter:
    place: Triple = (int(shape[0]), int(shape[1]), int(shape[2]))
    attributes: dict[str, Any] = {"hpcres": {"schema": "hpcres fields 1", "voxel_size": list(voxel_size)}}
    return FieldWriter(path, place, attributes, overwrite)
