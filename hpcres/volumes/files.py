"""Files and stores that are there whole or not at all: made beside their place, and renamed into it."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpcres.errors import InputError

ZARR_FILES = ("zarr.json", ".zgroup", ".zarray")
"""What describes a zarr array or group; a folder without any of them is none."""


def refuse_existing(path: str | Path, overwrite: bool) -> None:
    """InputError where `path` is there already and may not be replaced, or its folder could not be written."""
    path = Path(path)
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir():
        raise InputError(f"{path}: cannot be written, because {nearest} is a file; write elsewhere with --output")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written, no permission in {nearest}; write elsewhere with --output")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists already; remove it, write elsewhere with --output, or give --overwrite")
    if path.exists() and not any((path / name).is_file() for name in ZARR_FILES):
        raise InputError(f"{path}: exists and is no zarr, so --overwrite will not remove it; write elsewhere")


def temporary_beside(path: Path) -> Path:
    """A name in the same folder, hidden and of this thread alone, to be renamed to `path` when it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}")


@contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """Where to make a file or folder, which is moved to `path` when the block ends well and removed when it does not.

    An error of the file system then names `path`, not the place beside it that nobody asked for.
    """
    temporary = temporary_beside(path)
    try:
        yield temporary
        move_into_place(temporary, path)
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
    for half in [*path.rglob("*.partial"), *path.glob(".zarr.json.*")]:
        half.unlink()
    for beside in path.absolute().parent.iterdir():
        if beside.name.startswith(f".{path.name}."):
            shutil.rmtree(beside, ignore_errors=True)


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a finished file or folder to `path`; what was there is removed after that."""
    if not path.is_dir():
        os.replace(temporary, path)
        return
    old = temporary_beside(path.with_name(path.name + ".old"))
    path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old, ignore_errors=True)
