"""Lengths with units, from users and files, and the edge lengths of a voxel along z, y and x.

Unit names are those of OME-Zarr (UDUNITS-2). The symbols and spellings of OME-XML, ImageJ and users are understood.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import inf
from typing import Any, NamedTuple

from hpcres.errors import InputError
from hpcres.geometry import AXES

EdgeLengths = tuple[float, float, float]
"""Voxel edges z, y, x in one unit."""

MICROMETERS = {
    "yoctometer": 1e-18,
    "zeptometer": 1e-15,
    "attometer": 1e-12,
    "femtometer": 1e-9,
    "picometer": 1e-6,
    "angstrom": 1e-4,
    "nanometer": 1e-3,
    "micrometer": 1.0,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "decimeter": 1e5,
    "meter": 1e6,
    "decameter": 1e7,
    "hectometer": 1e8,
    "kilometer": 1e9,
    "megameter": 1e12,
    "gigameter": 1e15,
    "terameter": 1e18,
    "petameter": 1e21,
    "exameter": 1e24,
    "zettameter": 1e27,
    "yottameter": 1e30,
    "thou": 25.4,
    "point": 25400 / 72,
    "line": 25400 / 12,
    "inch": 25400.0,
    "foot": 304800.0,
    "yard": 914400.0,
    "mile": 1609344e3,
    "astronomical_unit": 149597870700e6,
    "light_year": 9460730472580800e6,
    "parsec": 3.0856775814913673e22,
}
"""Length of each unit in micrometers."""

RELATIVE = "voxel"
"""Unit of voxel edges of which only the ratio is known."""

_SYMBOLS = {
    "Ym": "yottameter",
    "Zm": "zettameter",
    "Em": "exameter",
    "Pm": "petameter",
    "Tm": "terameter",
    "Gm": "gigameter",
    "Mm": "megameter",
    "km": "kilometer",
    "hm": "hectometer",
    "dam": "decameter",
    "m": "meter",
    "dm": "decimeter",
    "cm": "centimeter",
    "mm": "millimeter",
    "µm": "micrometer",
    "um": "micrometer",
    "nm": "nanometer",
    "pm": "picometer",
    "fm": "femtometer",
    "am": "attometer",
    "zm": "zeptometer",
    "ym": "yoctometer",
    "Å": "angstrom",
    "thou": "thou",
    "li": "line",
    "in": "inch",
    '"': "inch",
    "ft": "foot",
    "yd": "yard",
    "mi": "mile",
    "ua": "astronomical_unit",
    "ly": "light_year",
    "pc": "parsec",
    "pt": "point",
    "px": RELATIVE,
    "reference frame": RELATIVE,
}
_NAMES = {
    "micron": "micrometer",
    "ångström": "angstrom",
    "ångstrom": "angstrom",
    "angström": "angstrom",
    "inche": "inch",
    "feet": "foot",
    "pixel": RELATIVE,
    "voxel": RELATIVE,
}
_COMMON = ("nm", "µm", "mm", "cm", "m", "Å", "inch", "voxel")


def unit_name(text: str) -> str | None:
    """Return the OME-Zarr name of a unit: `voxel` for pixels and the like, None for text that is no unit of length.

    Case matters for symbols (mm, Mm). It does not matter for names, which may be plural or in British spelling.
    """
    # ImageJ writes µ as the six characters \u00B5. Unicode has two µ and two Å.
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m.group(1), 16)), text).strip(" \t\r\n\0")
    for known, unit in _SYMBOLS.items():
        if unicodedata.normalize("NFKC", known) == unicodedata.normalize("NFKC", text):
            return unit
    name = text.lower()
    name = name.removesuffix("s").replace("metre", "meter")
    name = _NAMES.get(name, name)
    return name if name in MICROMETERS or name == RELATIVE else None


class Length(NamedTuple):
    """A length and the name of its unit."""

    length: float
    unit: str
    """Of MICROMETERS, or RELATIVE."""

    @property
    def micrometers(self) -> float:
        """The length in µm; KeyError for a length in voxels."""
        return self.length * MICROMETERS[self.unit]

    def times(self, factor: Fraction) -> Length:
        """Return the length multiplied by a factor, in the same unit."""
        return Length(self.length * float(factor), self.unit)

    def __str__(self) -> str:
        """Return the length with the symbol of its unit, such as `65 nm`."""
        return f"{self.length:.10g} {short_unit(self.unit)}"


def short_unit(unit: str) -> str:
    """Return the symbol of a unit, such as `nm` for nanometer; any other text is returned unchanged."""
    return next((symbol for symbol, name in _SYMBOLS.items() if name == unit and unit != RELATIVE), unit)


def parse_length(value: object) -> Length:
    """Parse a length with its unit, such as `65 nm`.

    Raises
    ------
    ValueError
        The text has no positive number or no known unit. The message is worded for the user.
    """
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
    if not 0 < length < inf:
        raise ValueError(f"{value!r}: the length must be a positive number")
    return Length(length, unit)


@dataclass(frozen=True)
class VoxelEdges:
    """The edge length of a voxel along each axis, None where it is unknown.

    The known edges are either all lengths, or all in `voxel`, and then only their ratio has a meaning.

    Attributes
    ----------
    z, y, x : Length or None
        Edges along the axes.
    note : str
        Why something that the file states is not used.
    """

    z: Length | None = None
    y: Length | None = None
    x: Length | None = None
    note: str = ""

    @classmethod
    def of(cls, edges: Sequence[Length | None], note: str = "") -> VoxelEdges:
        """Make voxel edges from the edges along z, y, x; edges without information become unknown.

        These are edges in `voxel` beside a length, equal edges in `voxel` beside an unknown edge, and three edges of 1
        voxel.
        """
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
        """The edges along z, y, x."""
        return self.z, self.y, self.x

    @property
    def missing(self) -> list[str]:
        """Axes along which the edge is unknown while it is known along others."""
        unknown = [axis for axis, edge in zip(AXES, self.each, strict=True) if edge is None]
        return unknown if len(unknown) < 3 else []

    @property
    def known(self) -> bool:
        """Whether all three edges are known as lengths."""
        return all(edge is not None and edge.unit in MICROMETERS for edge in self.each)

    def lengths(self, where: str, remedy: str = "give all three lengths") -> tuple[EdgeLengths, str]:
        """Return the edges z, y, x in one unit.

        Parameters
        ----------
        where : str
            File or setting, for the message.
        remedy : str
            End of the message.

        Returns
        -------
        edges : tuple of float
            (1, 1, 1) where no edge is known.
        unit : str
            The unit that all edges have, else `micrometer`. It is `voxel` where no edge is known, and `unit` where only
            the ratio is known.

        Raises
        ------
        InputError
            Only some edges are known: neither they nor cubic voxels would give a right number.
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
        if len({edge.unit for edge in edges}) > 1:
            z, y, x = (edge.micrometers for edge in edges)
            return (z, y, x), "micrometer"
        z, y, x = (edge.length for edge in edges)
        unit = edges[0].unit
        return (z, y, x), unit if unit != RELATIVE or z == y == x == 1 else "unit"

    def agrees_with(self, other: VoxelEdges, tolerance: float = 1e-6) -> bool:
        """Return whether the edges that both know differ by at most `tolerance`, relative to `other`.

        If one or both are in `voxel`, the ratios between the axes are compared.
        """
        both = [(a, b) for a, b in zip(self.each, other.each, strict=True) if a is not None and b is not None]
        ratios = [ratio(a, b) for a, b in both]
        if any(RELATIVE in (a.unit, b.unit) for a, b in both):
            return max(ratios) <= min(ratios) * (1 + tolerance)
        return all(abs(one - 1) <= tolerance for one in ratios)

    def __str__(self) -> str:
        """Return the edges as text: one number for a cubic voxel, else one for each axis, or `unknown`."""
        edges = [edge for edge in self.each if edge is not None]
        if not edges:
            return "unknown"
        if len(edges) == 3 and len({edge.unit for edge in edges}) == 1:
            sizes = [edge.length for edge in edges]
            numbers = " × ".join(f"{h:.10g}" for h in (sizes[:1] if len(set(sizes)) == 1 else sizes))
            return f"{numbers} {short_unit(edges[0].unit)}"
        return ", ".join(f"{a} {e or 'unknown'}" for a, e in zip(AXES, self.each, strict=True))


UNKNOWN = VoxelEdges()


def ratio(a: Length, b: Length) -> float:
    """Return a / b; if only one of the two is in voxels, the number of µm for each voxel or its inverse."""
    return a.length * MICROMETERS.get(a.unit, 1.0) / (b.length * MICROMETERS.get(b.unit, 1.0))


def cubic(edge: Length) -> VoxelEdges:
    """Return voxel edges that have the same length along all axes."""
    return VoxelEdges(edge, edge, edge)


def edges_of(values: Sequence[Any], units: Sequence[str | None]) -> VoxelEdges:
    """Return voxel edges from a file's metadata.

    Parameters
    ----------
    values : sequence
        For z, y, x, as the file has them. An edge is unknown if this is no positive number.
    units : sequence of str or None
        For z, y, x. Edges in the same unit that is no unit of length, or all without one, have a ratio. Edges in
        different such units are unknown, and so are edges in one of them beside a length.
    """
    names = [unit_name(unit or "") for unit in units]
    others = {unit for unit, name in zip(units, names, strict=True) if name not in MICROMETERS}
    edges = [
        _length_of(value, name or RELATIVE) if name in MICROMETERS or len(others) == 1 else None
        for value, name in zip(values, names, strict=True)
    ]
    strange = [unit for unit in dict.fromkeys(units) if unit and unit_name(unit) is None]
    return VoxelEdges.of(edges, "; ".join(f"{unit!r} is no unit of length" for unit in strange))


def _length_of(value: Any, unit: str) -> Length | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return Length(number, unit) if 0 < number < inf else None


def parse_voxel_edges(text: str) -> VoxelEdges:
    """Parse `65 nm` for cubic voxels, or `2um,250nm,250nm` along z, y, x.

    Raises
    ------
    ValueError
        The text is not one length or three, or it mixes lengths with voxels. The message is worded for the user.
    """
    edges = [parse_length(part) for part in text.split(",")]
    if len(edges) == 1:
        return cubic(edges[0])
    if len(edges) != 3:
        raise ValueError(f"{text!r} is {len(edges)} lengths; write one, or three for z, y and x as 2um,250nm,250nm")
    if len({edge.unit in MICROMETERS for edge in edges}) > 1:
        raise ValueError(f"{text!r} mixes lengths with voxels; give all three as lengths")
    z, y, x = edges
    return VoxelEdges(z, y, x)
