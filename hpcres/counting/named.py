"""What counts say of a material, by the names of its phases and with units: the layout of metrics.json, and its spread.

Beside `counts` because painting needs both, and nothing of Dask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcres.counting import counts
from hpcres.counting.counts import Counts, Densities
from hpcres.lengths import MICROMETERS


@dataclass(frozen=True)
class Named:
    """How a volume's labels are called and how long its voxels are."""

    phases: dict[int, str]
    voxel_size: tuple[float, float, float]
    unit: str

    @property
    def length_unit(self) -> str:
        return "micrometer" if self.unit in MICROMETERS else self.unit

    @property
    def lengths(self) -> tuple[float, float, float]:
        """Voxel edges in `length_unit`."""
        z, y, x = (h * MICROMETERS.get(self.unit, 1.0) for h in self.voxel_size)
        return z, y, x

    def join(self, labels: Sequence[int]) -> str:
        return "|".join(self.phases[i] for i in labels)

    def values(self, by_metric: Mapping[str, Mapping[tuple[int, ...], Any]]) -> dict[str, Any]:
        """Whatever is known per metric and labels (`counts.by_metric`) by name, what has no labels by itself."""
        return {
            metric: by_labels[()] if () in by_labels else {self.join(key): value for key, value in by_labels.items()}
            for metric, by_labels in by_metric.items()
        }


def described(total: Counts, named: Named) -> dict[str, Any]:
    """Counts and the numbers derived from them, keyed by phase name, with units."""
    found = counts.finalize(total, named.lengths, tuple(named.phases))
    per_length = f"1/{named.length_unit}"
    return {
        "voxel_size": list(named.voxel_size),
        "voxel_unit": named.unit,
        "length_unit": named.length_unit,
        "phases": [{"label": label, "name": name} for label, name in named.phases.items()],
        "counts": {
            "voxels": {name: total.voxels.get(label, 0) for label, name in named.phases.items()},
            "faces": {named.join(pair): list(n) for pair, n in total.faces.items()},
            "edges": {named.join(some): list(n) for some, n in total.edges.items()},
            "all_faces": list(total.all_faces),
            "all_edges": list(total.all_edges),
        },
        **_named_densities(found, named, per_length),
    }


def _named_densities(found: Densities, named: Named, per_length: str) -> dict[str, Any]:
    return {
        "volume_fraction": {named.phases[i]: v for i, v in found.volume_fraction.items()},
        "specific_surface_area": {
            "unit": per_length,
            "faces": {named.phases[i]: v for i, v in found.specific_surface_faces.items()},
            "crofton": {named.phases[i]: v for i, v in found.specific_surface_crofton.items()},
        },
        "interphase_area": {named.join(pair): v for pair, v in found.interphase_area.items()},
        "tpb": {
            "unit": f"{per_length}^2",
            "density": found.tpb_density,
            "normalised": found.tpb_normalised,
            "by_phases": {
                named.join(some): {"density": v, "normalised": found.tpb_normalised_by_phases[some]}
                for some, v in found.tpb_density_by_phases.items()
            },
        },
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation and the values; null where there are none."""
    array = np.asarray(values, float)
    return {
        "mean": float(array.mean()) if array.size else None,
        "std": float(array.std(ddof=1)) if array.size > 1 else None,
        "values": array.tolist(),
    }


def spread(several: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `summary` of every number derived from counts over several `described` volumes of the same phases.

    A set of phases that meets in some of them only counts as 0 in the others.
    """

    def over(found: Sequence[Any]) -> Any:
        first = next(one for one in found if one is not None)
        if isinstance(first, str):
            return first
        if not isinstance(first, Mapping):
            return summary([one or 0.0 for one in found])
        keys = dict.fromkeys(key for one in found for key in one or ())
        return {key: over([(one or {}).get(key) for one in found]) for key in keys}

    keys = ("volume_fraction", "specific_surface_area", "interphase_area", "tpb")
    return {key: over([one[key] for one in several]) for key in keys}
