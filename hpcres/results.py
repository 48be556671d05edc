"""The results that the library returns, with the numbers under their names in metrics.json and transport.json."""

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
        Unit of the values, such as `1/micrometer`.
    faces : dict of str to float
        Phase → area of its voxel faces over the volume. For a sphere this is 3/2 of the smooth surface.
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
        Unit of the densities, such as `1/micrometer^2`.
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
        `micrometer` if the voxel size is known, else `voxel`.
    phases : tuple of str
        Names, in the order of the labels.
    volume_fraction : dict of str to float
        Phase → share of the voxels.
    specific_surface_area : SurfaceArea
        Specific surface area of each phase.
    interphase_area : dict of str to float
        `a|b` → share of all interior voxel faces that separate these two phases.
    tpb : TriplePhaseBoundary
        Length of the triple-phase boundary.
    subvolumes, statistics : dict or None
        As in metrics.json (docs/metrics.md); None if they were not asked for.
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
        """Make the measurement from the entry `volume` of a metrics.json."""
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
        """Return the entry `volume` of a metrics.json."""
        return dict(self._entry)

    def to_frame(self) -> Any:
        """Return a pandas.DataFrame with the columns metric, of, unit, value and standard_error.

        Raises
        ------
        InputError
            pandas is not installed.
        """
        return _frame(_COLUMNS, self._rows())

    def _rows(self) -> list[tuple[Any, ...]]:
        return [(row.metric, row.of, row.unit, row.value, row.standard_error) for row in metric_rows(self._entry)]

    def __str__(self) -> str:
        """Return the numbers as a table of text."""
        return metrics_text(self._entry)

    def _repr_html_(self) -> str:
        return _html(_COLUMNS, self._rows())


_COLUMNS = ("metric", "of", "unit", "value", "standard_error")


@dataclass(frozen=True)
class Tortuosity:
    """Transport along one direction through one phase, or through several phases that conduct together.

    Attributes
    ----------
    phase, direction : str
        Phase and direction of the solution.
    D_rel : float
        Effective over bulk diffusivity; an upper bound of the exact value of the discrete problem. 0 if the phase does
        not percolate.
    error : float
        Estimate of how much `D_rel` is too high, as a share of it.
    tau : float
        Tortuosity factor, volume fraction / D_rel (with conductivities mean conductivity / D_rel). Infinite if the
        phase does not percolate.
    tau_percolating : float
        The same with the volume fraction of the percolating part.
    volume_fraction, percolating_fraction : float
        Shares of the voxels.
    iterations : int
        Iterations of the solver.
    check : Check or None
        Result of another solver, if asked for.
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
        """Make the result from one of the `results` of a transport.json that is converged or does not percolate."""
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
        """Return the result as one of the `results` of a transport.json."""
        return dict(self._result)

    def to_frame(self) -> Any:
        """Return a pandas.DataFrame of one row.

        Raises
        ------
        InputError
            pandas is not installed.
        """
        return _frame(*self._row())

    def _row(self) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
        columns = ("phase", "direction", "volume_fraction", "D_rel", "error", "tau", "tau_percolating")
        return columns, [tuple(getattr(self, name) for name in columns)]

    def __str__(self) -> str:
        """Return the result as text, with the result of the check on a line of its own if there is one."""
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
    """Return the rows as an HTML table for notebooks."""

    def cell(value: Any) -> str:
        text = "" if value is None else plain(value) if isinstance(value, float) else str(value)
        return f"<td>{html.escape(text)}</td>"

    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(cell(value) for value in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
