"""Numbers derived from counts, by phase name and with units, as in metrics.json, and their spread over volumes.

The module lies beside `counts` because painting needs both, and nothing of Dask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcres.counting import totals
from hpcres.counting.totals import Counts, Densities
from hpcres.lengths import MICROMETERS


@dataclass(frozen=True)
class Named:
    """Names of a volume's labels, and the size of its voxels (edges z, y, x in `unit`)."""

    phases: dict[int, str]
    voxel_size: tuple[float, float, float]
    unit: str

    @property
    def length_unit(self) -> str:
        """Unit of lengths: micrometer where `unit` converts to it, else `unit`."""
        return "micrometer" if self.unit in MICROMETERS else self.unit

    @property
    def lengths(self) -> tuple[float, float, float]:
        """Voxel edges in `length_unit`."""
        z, y, x = (h * MICROMETERS.get(self.unit, 1.0) for h in self.voxel_size)
        return z, y, x

    def join(self, labels: Sequence[int]) -> str:
        """Join the names of labels with `|`."""
        return "|".join(self.phases[i] for i in labels)

    def values(self, by_metric: Mapping[str, Mapping[tuple[int, ...], Any]]) -> dict[str, Any]:
        """Replace labels by names in values per metric and labels (`totals.by_metric`).

        A value that has no labels stands by itself.
        """
        return {
            metric: by_labels[()] if () in by_labels else {self.join(key): value for key, value in by_labels.items()}
            for metric, by_labels in by_metric.items()
        }


def described(total: Counts, named: Named) -> dict[str, Any]:
    """Return counts and the numbers derived from them, keyed by phase name, with units.

    Parameters
    ----------
    total : Counts
        Counts of a volume.
    named : Named
        Names of its labels, and its voxel size.

    Returns
    -------
    dict
        The entries `voxel_size` to `tpb` of a volume in metrics.json.
    """
    found = totals.finalize(total, named.lengths, tuple(named.phases))
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
    """Return mean, sample standard deviation and the values; mean and deviation are null where they do not exist."""
    array = np.asarray(values, float)
    return {
        "mean": float(array.mean()) if array.size else None,
        "std": float(array.std(ddof=1)) if array.size > 1 else None,
        "values": array.tolist(),
    }


def spread(several: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the `summary` of every number derived from counts over several volumes.

    A set of phases that meets only in some of the volumes counts as 0 in the others.

    Parameters
    ----------
    several : sequence of mapping
        The volumes as `described` gives them, all of the same phases.

    Returns
    -------
    dict
        The tree of volume_fraction, specific_surface_area, interphase_area and tpb, with a `summary` for each number.
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
