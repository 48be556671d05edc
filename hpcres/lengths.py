"""Lengths with their units: what users write and files say, and the edges of a voxel along z, y and x.

Unit names are those of OME-Zarr (UDUNITS-2); spellings are those of OME-XML, ImageJ and users.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from hpcres.errors import InputError
from hpcres.geometry import AXES

Spacing = tuple[float, float, float]
"""Voxel edges z, y, x in one unit."""

MICROMETERS = {
    "yoctometer": 1e-18, "zeptometer": 1e-15, "attometer": 1e-12, "femtometer": 1e-9, "picometer": 1e-6,
    "angstrom": 1e-4, "nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3, "centimeter": 1e4, "decimeter": 1e5,
    "meter": 1e6, "decameter": 1e7, "hectometer": 1e8, "kilometer": 1e9, "megameter": 1e12, "gigameter": 1e15,
    "terameter": 1e18, "petameter": 1e21, "exameter": 1e24, "zettameter": 1e27, "yottameter": 1e30,
    "thou": 25.4, "point": 25400 / 72, "line": 25400 / 12, "inch": 25400.0, "foot": 304800.0, "yard": 914400.0,
    "mile": 1609344e3, "astronomical_unit": 149597870700e6, "light_year": 9460730472580800e6,
    "parsec": 3.0856775814913673e22,
}  # fmt: skip
"""Units of length, in micrometers."""

RELATIVE = "voxel"
"""Unit of edges of which a file says the ratio alone."""

_SYMBOLS = {
    "Ym": "yottameter", "Zm": "zettameter", "Em": "exameter", "Pm": "petameter", "Tm": "terameter", "Gm": "gigameter",
    "Mm": "megameter", "km": "kilometer", "hm": "hectometer", "dam": "decameter", "m": "meter", "dm": "decimeter",
    "cm": "centimeter", "mm": "millimeter", "µm": "micrometer", "um": "micrometer", "nm": "nanometer",
    "pm": "picometer", "fm": "femtometer", "am": "attometer", "zm": "zeptometer", "ym": "yoctometer",
    "Å": "angstrom", "thou": "thou", "li": "line", "in": "inch", '"': "inch", "ft": "foot", "yd": "yard", "mi": "mile",
    "ua": "astronomical_unit", "ly": "light_year", "pc": "parsec", "pt": "point", "px": RELATIVE,
    "reference frame": RELATIVE,
}  # fmt: skip
_NAMES = {
    "micron": "micrometer", "ångström": "angstrom", "ångstrom": "angstrom", "angström": "angstrom", "inche": "inch",
    "feet": "foot", "pixel": RELATIVE, "voxel": RELATIVE,
}  # fmt: skip
_COMMON = ("nm", "µm", "mm", "cm", "m", "Å", "inch", "voxel")


def unit_name(text: str) -> str | None:
    """The unit's OME-Zarr name, `voxel` for pixels and the like, None for what is no unit of length.

    Symbols count with their case (mm, Mm); names do not, and may be plural and British.
    """
    # ImageJ writes µ as the six characters \u00B5, and Unicode has two µ and two Å.
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m.group(1), 16)), text).strip(" \t\r\n\0")
    for known, unit in _SYMBOLS.items():
        if unicodedata.normalize("NFKC", known) == unicodedata.normalize("NFKC", text):
            return unit
    name = text.lower()
    name = name.removesuffix("s").replace("metre", "meter")
    name = _NAMES.get(name, name)
    return name if name in MICROMETERS or name == RELATIVE else None


class Length(tuple[float, str]):
    """A length and the name of its unit: of a cubic voxel's edges, or of one edge."""

    def __new__(cls, length: float, unit: str) -> Length:
        return super().__new__(cls, (length, unit))

    def __getnewargs__(self) -> tuple[float, str]:
        return self.length, self.unit

    @property
    def length(self) -> float:
        return self[0]

    @property
    def unit(self) -> str:
        return self[1]

    @property
    def micrometers(self) -> float | None:
        """None of a length in voxels."""
        return self.length * MICROMETERS[self.unit] if self.unit in MICROMETERS else None

    def times(self, factor: Fraction) -> Length:
        return Length(self.length * float(factor), self.unit)

    def __str__(self) -> str:
        return f"{self.length:.10g} {short_unit(self.unit)}"


def short_unit(unit: str) -> str:
    """`nm` for nanometer; what is no unit of length as it is."""
    return next((symbol for symbol, name in _SYMBOLS.items() if name == unit and unit != RELATIVE), unit)


def parse_length(value: object) -> Length:
    """`65 nm` as a length; ValueError in words."""
    if isinstance(value, Length):
        return value
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*([^\d\s.,+-][^\d,]*?)\s*", str(value))
    if not match:
        raise ValueError(f"{value!r} has no length with a unit; write for example 65 nm")
    unit = unit_name(match.group(2))
    if unit is None:
        raise ValueError(f"unit {match.group(2)!r} is not known; use one of {', '.join(_COMMON)}")
    try:
        length = float(match.group(1))
    except ValueError:
        length = 0.0
    if not 0 < length < float("inf"):
        raise ValueError(f"{value!r}: the length must be a positive number")
    return Length(length, unit)


@dataclass(frozen=True)
class VoxelEdges:
    """How long a voxel is along each axis, as far as that is known.

    All edges that are known are lengths, or all are ratios in `voxel`. note: what a file says and we cannot use.
    """

    z: Length | None = None
    y: Length | None = None
    x: Length | None = None
    note: str = ""

    @classmethod
    def of(cls, edges: Sequence[Length | None], note: str = "") -> VoxelEdges:
        """Of edges z, y, x. A ratio beside a length, or beside an axis of which nothing is known, says nothing where
        it is that of a square."""
        if any(e is not None and e.unit in MICROMETERS for e in edges):
            edges = [e if e is not None and e.unit in MICROMETERS else None for e in edges]
        elif None in edges and len({e.length for e in edges if e is not None}) == 1:
            edges = [None] * 3
        elif all(e is not None and e.length == 1 for e in edges):
            edges = [None] * 3
        z, y, x = edges
        return cls(z, y, x, note)

    @property
    def each(self) -> tuple[Length | None, Length | None, Length | None]:
        return self.z, self.y, self.x

    @property
    def missing(self) -> list[str]:
        """Axes along which the edge is unknown, where others are known."""
        unknown = [axis for axis, edge in zip(AXES, self.each, strict=True) if edge is None]
        return unknown if len(unknown) < 3 else []

    @property
    def known(self) -> bool:
        """Whether all three are, as lengths."""
        return all(edge is not None and edge.unit in MICROMETERS for edge in self.each)

    def lengths(self, where: str, remedy: str = "give all three lengths") -> tuple[Spacing, str]:
        """Edges z, y, x and their unit: the common one, else micrometer; `voxel` where nothing is known, and `unit`
        where the ratio is.

        InputError naming `where`, the axis and the remedy where some edges are known and some are not: a number from
        them would be wrong, and one from cubic voxels too.
        """
        if self.missing:
            found = ", ".join(f"{a} {e}" for a, e in zip(AXES, self.each, strict=True) if e is not None)
            note = f"; {self.note}" if self.note else ""
            raise InputError(
                f"{where}: the voxel size along {' and '.join(self.missing)} is not known ({found}{note}), so no "
                f"length, area or tortuosity would be right; {remedy}"
            )
        edges = [edge for edge in self.each if edge is not None]
        if not edges:
            return (1.0, 1.0, 1.0), RELATIVE
        units = {edge.unit for edge in edges}
        if units == {RELATIVE}:
            values = [edge.length for edge in edges]
            unit = RELATIVE if set(values) == {1.0} else "unit"
        elif len(units) == 1:
            unit, values = edges[0].unit, [edge.length for edge in edges]
        else:
            unit, values = "micrometer", [edge.micrometers or 0.0 for edge in edges]
        z, y, x = values
        return (z, y, x), unit

    def agrees_with(self, other: VoxelEdges, tolerance: float = 1e-6) -> bool:
        """Whether no edge that both know differs by more than this share; ratios beside lengths: of one another."""
        both = [(a, b) for a, b in zip(self.each, other.each, strict=True) if a is not None and b is not None]
        if any((a.unit == RELATIVE) != (b.unit == RELATIVE) for a, b in both):
            absolute = [(a.micrometers or a.length) / (b.micrometers or b.length) for a, b in both]
            return max(absolute) <= min(absolute) * (1 + tolerance)
        return all(abs((ratio(a, b) or 0.0) - 1) <= tolerance for a, b in both)

    def __str__(self) -> str:
        edges = [edge for edge in self.each if edge is not None]
        if not edges:
            return "unknown"
        if len(edges) == 3 and len({edge.unit for edge in edges}) == 1:
            sizes = [edge.length for edge in edges]
            numbers = " × ".join(f"{h:.10g}" for h in (sizes[:1] if len(set(sizes)) == 1 else sizes))
            return f"{numbers} {short_unit(edges[0].unit)}"
        return ", ".join(f"{a} {e or 'unknown'}" for a, e in zip(AXES, self.each, strict=True))


UNKNOWN = VoxelEdges()


def ratio(a: Length, b: Length) -> float | None:
    """a / b; None where one is a length and the other is in voxels."""
    if a.unit == b.unit:
        return a.length / b.length
    if a.micrometers is None or b.micrometers is None:
        return None
    return a.micrometers / b.micrometers


def cubic(edge: Length) -> VoxelEdges:
    """Three edges of one length."""
    return VoxelEdges(edge, edge, edge)


def edges_of(values: Sequence[object], units: Sequence[str | None]) -> VoxelEdges:
    """Edges z, y, x as a file gives them: unknown where the number is not positive, or where units other than of length
    differ; else those leave the ratio."""
    names = [unit_name(unit or "") for unit in units]
    others = {unit for unit, name in zip(units, names, strict=True) if name not in MICROMETERS}
    edges = [
        _length_of(value, RELATIVE if name is None else name)
        if name in MICROMETERS or len(others) == 1 else None
        for value, name in zip(values, names, strict=True)
    ]  # fmt: skip
    strange = [unit for unit in dict.fromkeys(units) if unit and unit_name(unit) is None]
    return VoxelEdges.of(edges, "; ".join(f"{unit!r} is no unit of length" for unit in strange))


def _length_of(value: object, unit: str) -> Length | None:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return Length(number, unit) if 0 < number < float("inf") else None


def parse_voxel_edges(text: str) -> VoxelEdges:
    """`65 nm`, or `2um,250nm,250nm` along z, y, x; ValueError in words."""
    edges = [parse_length(part) for part in text.split(",")]
    if len(edges) == 1:
        return cubic(edges[0])
    if len(edges) != 3:
        raise ValueError(f"{text!r} is {len(edges)} lengths; write one, or three for z, y and x as 2um,250nm,250nm")
    if len({edge.unit in MICROMETERS for edge in edges}) > 1:
        raise ValueError(f"{text!r} mixes lengths with voxels; give all three as lengths")
    z, y, x = edges
    return VoxelEdges(z, y, x)
