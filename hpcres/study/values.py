"""Values of settings that have a syntax of their own, and the base of all sections."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, PlainSerializer, PlainValidator

from hpcres.geometry import Boundaries, Boundary
from hpcres.lengths import Length, parse_length

PATCH_VOXELS = 64
"""Scale factors are 64/d, because d low-res voxels must fill so many high-res ones exactly."""
FEWEST_LOW_RES = 2
"""The least d: a cube of one low-res voxel would have no structure to learn from."""


def _scale_factor(value: Any) -> Fraction:
    try:
        scale = Fraction(str(value)).limit_denominator(64) if isinstance(value, float) else Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{value!r} is not a number or a fraction; write 4, 2.5 or 16/3") from None
    low_res_edge = Fraction(PATCH_VOXELS) / scale if scale > 0 else Fraction(0)
    if low_res_edge.denominator != 1 or not FEWEST_LOW_RES <= low_res_edge <= PATCH_VOXELS:
        fits = [Fraction(PATCH_VOXELS, d) for d in range(FEWEST_LOW_RES, PATCH_VOXELS + 1)]
        near = min(fits, key=lambda f: abs(f - scale))
        raise ValueError(
            f"{value} is not 64/d with d = {FEWEST_LOW_RES} … 64, so low-res voxels cannot fill a training cube of "
            f"64; the nearest is {near}"
        )
    return scale


ScaleFactor = Annotated[Fraction, PlainValidator(_scale_factor), PlainSerializer(str)]
Voxel = Annotated[Length, PlainValidator(parse_length), PlainSerializer(str)]
Grid = Annotated[
    tuple[int, int, int], PlainValidator(lambda v: parse_grid(v)), PlainSerializer(lambda v: "x".join(map(str, v)))
]
BoundarySetting = Annotated[
    Boundaries, PlainValidator(lambda v: parse_boundary(v)), PlainSerializer(lambda v: dict(zip("zyx", v, strict=True)))
]
Plane = Literal["zy", "zx", "yx", "yz", "xz", "xy"]
"""Rows and columns of an image: `zx` is a slice normal to y whose rows run along z."""
Device = Literal["auto", "cpu", "cuda"]
PhaseName = Annotated[str, AfterValidator(lambda v: checked_phase_name(v))]


def checked_phase_name(name: str) -> str:
    """Return the name of a phase if it is valid in tables, in keys such as pore|nickel and in paths.

    Raises
    ------
    ValueError
        The name is not valid. The message is worded for the user.
    """
    remedy = "write letters, digits, blanks, - and _"
    if not name or name != name.strip():
        raise ValueError(f"phase name {name!r} is empty, or begins or ends with a blank; {remedy}")
    if bad := next((c for c in name if c in "|/\\" or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")), None):
        what = f"{bad!r}" if bad in "|/\\" else f"the control character {bad!r}"
        raise ValueError(f"phase name {name!r} contains {what}, which separates names in results and paths; {remedy}")
    if name in (".", "..") or ".." in name:
        raise ValueError(f"phase name {name!r} contains .., which leads out of a folder in a path; {remedy}")
    return name


def parse_grid(value: Any) -> tuple[int, int, int]:
    """Parse `8x8x8`, numbers along z, y and x, or a sequence of three numbers, as three integers.

    Raises
    ------
    ValueError
        These are not three numbers of at least 1. The message is worded for the user.
    """
    parts = re.split(r"[x×]", value) if isinstance(value, str) else value
    try:
        z, y, x = (int(part) for part in parts)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is not three numbers; write for example 8x8x8") from None
    if min(z, y, x) < 1:
        raise ValueError(f"{value}: every axis needs at least one; use for example 2x2x2")
    return z, y, x


def parse_boundary(value: Any) -> Boundaries:
    """Parse what lies beyond the volume along z, y and x.

    Parameters
    ----------
    value : str, mapping or sequence
        `periodic` for all axes, `{z: periodic}` with replicate for the other axes, or three words for z, y, x.

    Raises
    ------
    ValueError
        A word is no boundary, or a key is no axis. The message is worded for the user.
    """
    words: Any = (value,) * 3 if isinstance(value, str) else value
    if isinstance(value, dict):
        if unknown := [key for key in value if key not in ("z", "y", "x")]:
            raise ValueError(f"{unknown[0]!r} is no axis; use z, y and x")
        words = [value.get(axis, "replicate") for axis in "zyx"]
    if not isinstance(words, list | tuple) or len(words) != 3:
        raise ValueError(f"{value!r} is neither one word nor one an axis; write periodic or {{z: periodic}}")
    for word in words:
        if word not in get_args(Boundary):
            raise ValueError(f"{word!r} is no boundary; use one of {', '.join(get_args(Boundary))}")
    z, y, x = words
    return z, y, x


class Section(BaseModel):
    """A section of the study, which is immutable and refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
