"""What the library returns: numbers under the names that metrics.json and transport.json have for them."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any

from hpcres.errors import InputError
from hpcres.metrics.table import metric_rows, metrics_text, plain, transport_text

if TYPE_CHECKING:
    from hpcres.transport.second_opinion import Check


@dataclass(frozen=True)
class SurfaceArea:
    """Specific surface area of each phase.

    Attributes
    ----------
    unit : str
        Of the values, such as `1/micrometer`.
    faces : dict of str to float
        Phase → area of its voxel faces over the volume. That of a sphere is 3/2 of the smooth surface.
    crofton : dict of str to float
        Phase → 2/3 of `faces`, an estimate of the smooth surface of an isotropic material.
    """

    unit: str
    faces: dict[str, float]
    crofton: dict[str, float]


@dataclass(frozen=True)
class TriplePhaseBoundary:
    """Length of voxel edges at which three or more phases meet.

    Attributes
    ----------
    unit : str
        Of the densities, such as `1/micrometer^2`.
    density : float
        Length over volume.
    normalised : float
        Share of the interior voxel edges.
    by_phases : dict of str to dict
        `a|b|c` → {density, normalised} of the edges where these phases meet and no other.
    """

    unit: str
    density: float
    normalised: float
    by_phases: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Measurement:
    """The numbers of a label volume, by the names of its phases.

    Attributes
    ----------
    shape : tuple of int
        Voxels z, y, x.
    voxel_size : tuple of float
        Voxel edges z, y, x in `voxel_unit`.
    voxel_unit, length_unit : str
        `micrometer` wherever the voxel size is known; `voxel` where it is not.
    phases : tuple of str
        Names, in the order of the labels.
    volume_fraction : dict of str to float
        Phase → share of the voxels.
    specific_surface_area : SurfaceArea
    interphase_area : dict of str to float
        `a|b` → share of all interior voxel faces that part these two phases.
    tpb : TriplePhaseBoundary
    subvolumes, statistics : dict or None
        As in metrics.json (docs/metrics.md); None where they were not asked for.
    """

    shape: tuple[int, int, int]
    voxel_size: tuple[float, float, float]
    voxel_unit: str
    length_unit: str
    phases: tuple[str, ...]
    volume_fraction: dict[str, float]
    specific_surface_area: SurfaceArea
    interphase_area: dict[str, float]
    tpb: TriplePhaseBoundary
    subvolumes: dict[str, Any] | None
    statistics: dict[str, Any] | None
    _entry: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Measurement:
        """From the entry `volume` of a metrics.json."""
        z, y, x = entry["shape"]
        dz, dy, dx = entry["voxel_size"]
        return cls(
            (z, y, x),
            (dz, dy, dx),
            entry["voxel_unit"],
            entry["length_unit"],
            tuple(phase["name"] for phase in entry["phases"]),
            entry["volume_fraction"],
            SurfaceArea(**entry["specific_surface_area"]),
            entry["interphase_area"],
            TriplePhaseBoundary(**entry["tpb"]),
            entry.get("subvolumes"),
            entry.get("statistics"),
            entry,
        )

    def to_dict(self) -> dict[str, Any]:
        """The entry `volume` of a metrics.json."""
        return dict(self._entry)

    def to_frame(self) -> Any:
        """A pandas.DataFrame with the columns metric, of, unit, value and standard_error."""
        return _frame(_COLUMNS, self._rows())

    def _rows(self) -> list[tuple[Any, ...]]:
        return [(row.metric, row.of, row.unit, row.value, row.error) for row in metric_rows(self._entry)]

    def __str__(self) -> str:
        return metrics_text(self._entry)

    def _repr_html_(self) -> str:
        return _html(_COLUMNS, self._rows())


_COLUMNS = ("metric", "of", "unit", "value", "standard_error")


@dataclass(frozen=True)
class Tortuosity:
    """Transport through one phase, or several that conduct together, along one direction.

    Attributes
    ----------
    phase, direction : str
        What was solved.
    D_rel : float
        Effective over bulk diffusivity; an upper bound of the exact value of the discrete problem. 0 where the phase
        does not percolate.
    error : float
        Estimate of how much `D_rel` is too high, as a share of it.
    tau : float
        Tortuosity factor, volume fraction / D_rel (with conductivities mean conductivity / D_rel). Infinite where the
        phase does not percolate.
    tau_percolating : float
        The same with the volume fraction of what percolates.
    volume_fraction, percolating_fraction : float
        Shares of the voxels.
    iterations : int
    check : Check or None
        What another solver found, if asked for.
    """

    phase: str
    direction: str
    D_rel: float
    error: float
    tau: float
    tau_percolating: float
    volume_fraction: float
    percolating_fraction: float
    iterations: int
    check: Check | None
    _result: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, result: Mapping[str, Any], check: Check | None = None) -> Tortuosity:
        """From one of the `results` of a transport.json that is converged or does not percolate."""
        tau, tau_percolating = (inf if result[name] is None else result[name] for name in ("tau", "tau_percolating"))
        return cls(
            result["phase"],
            result["direction"],
            result["D_rel"],
            result["error"],
            tau,
            tau_percolating,
            result["volume_fraction"],
            result["percolating_fraction"],
            result["iterations"],
            check,
            result,
        )

    def to_dict(self) -> dict[str, Any]:
        """One of the `results` of a transport.json."""
        return dict(self._result)

    def to_frame(self) -> Any:
        """A pandas.DataFrame of one row."""
        return _frame(*self._row())

    def _row(self) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
        columns = ("phase", "direction", "volume_fraction", "D_rel", "error", "tau", "tau_percolating")
        return columns, [tuple(getattr(self, name) for name in columns)]

    def __str__(self) -> str:
        lines = [transport_text(self._result), *([str(self.check)] if self.check else [])]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return _html(*self._row())


def _frame(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    try:
        import pandas
    except ImportError:
        raise InputError("to_frame needs pandas, which is not installed; pip install pandas, or use to_dict") from None
    return pandas.DataFrame(list(rows), columns=list(columns))


def _html(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table for notebooks."""

    def cell(value: Any) -> str:
        text = "" if value is None else plain(value) if isinstance(value, float) else str(value)
        return f"<td>{html.escape(text)}</td>"

    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(cell(value) for value in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
