"""Super-resolve segmented 3D images of porous materials on a cluster, and measure them.

The functions below do what the commands of the same names do, on files and on arrays. They are imported when they are
first used, so that `import hpcres` takes a few milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hpcres.errors import InputError, Stopped, Unfinished
    from hpcres.library import convert, infer, measure, open, phantom, report, tortuosity, train
    from hpcres.results import Measurement, SurfaceArea, Tortuosity, TriplePhaseBoundary

_HOMES = {
    "hpcres.errors": ("InputError", "Stopped", "Unfinished"),
    "hpcres.library": ("convert", "infer", "measure", "open", "phantom", "report", "tortuosity", "train"),
    "hpcres.results": ("Measurement", "SurfaceArea", "Tortuosity", "TriplePhaseBoundary"),
}
__all__ = [
    "InputError",
    "Measurement",
    "Stopped",
    "SurfaceArea",
    "Tortuosity",
    "TriplePhaseBoundary",
    "Unfinished",
    "convert",
    "infer",
    "measure",
    "open",
    "phantom",
    "report",
    "tortuosity",
    "train",
]


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'hpcres' has no attribute {name!r}")
    from importlib import import_module

    found = globals()[name] = getattr(import_module(home), name)
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
