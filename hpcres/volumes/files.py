"""Files and stores that are there whole or not at all: made beside their place, and renamed into it."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpcres.signals import half_made, publishing

ZARR_FILES = ("zarr.json", ".zgroup", ".zarray")
"""What describes a zarr array or group; a folder without any of them is none."""
METADATA_FILES = (*ZARR_FILES, ".zattrs", ".zmetadata")
"""Everything in a zarr that is no chunk."""


def temporary_beside(path: Path) -> Path:
    """A name in the same folder, hidden and of this thread alone, to be renamed to `path` when it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}")


@contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """Where to make a file or folder, which is moved to `path` when the block ends well and removed when it does not.

    An error of the file system then names `path`, not the place beside it that nobody asked for. Where `path` is a
    link, what it leads to is replaced, on the file system that this is on.
    """
    place = path.resolve() if path.is_symlink() else path
    temporary = temporary_beside(place)
    try:
        with half_made(temporary):
            yield temporary
            move_into_place(temporary, place)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def clear_leftovers(path: Path) -> None:
    """Remove what a killed process left half-made in a store and beside it. Only while nobody else writes it."""
    path = path.resolve() if path.is_symlink() else path
    for half in [*path.rglob("*.partial"), *path.glob(".zarr.json.*")]:
        half.unlink()
    for beside in path.absolute().parent.iterdir():
        if beside.name.startswith(f".{path.name}."):
            shutil.rmtree(beside, ignore_errors=True)


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a finished file or folder to `path`; what was there is removed after that."""
    if not path.is_dir():
        with publishing():
            os.replace(temporary, path)
        return
    old = temporary_beside(path.with_name(path.name + ".old"))
    with publishing():
        path.rename(old)
        temporary.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: str | Path, result: Mapping[str, Any]) -> Path:
    """Whole or not at all; NaN and infinities are refused, because JSON has none. Names need not be UTF-8."""
    path = Path(path)
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with made_whole(path) as temporary:
        # A byte of a file name that is no UTF-8 is a lone surrogate to Python, and \udcXX to both of them.
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    return path
