"""Atomic writing of files and stores: each is made under a temporary name in the same folder, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpcres.signals import half_made, renaming

ZARR_FILES = ("zarr.json", ".zgroup", ".zarray")
"""Names of the files that describe a zarr array or group; a folder without any of them is not one."""
METADATA_FILES = (*ZARR_FILES, ".zattrs", ".zmetadata")
"""Names of all files in a zarr other than chunks."""


def temporary_beside(path: Path) -> Path:
    """Return a hidden name in the folder of `path` that only this thread uses, for a file to be renamed to `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Provide a temporary path for a file or folder that is renamed to `path` at the end of the block.

    The temporary file or folder is removed if the block raises or a signal ends the process. If `path` is a link, the
    target of the link is replaced, and the temporary path is beside the target.

    Parameters
    ----------
    path
        File or folder to write.

    Yields
    ------
    Path
        The temporary path.

    Raises
    ------
    OSError
        As raised inside the block or on renaming. It names `path`, which the user knows, not the temporary path.
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
    """Remove the half-made files that a killed process left in a store and beside it.

    No process may write the store meanwhile.
    """
    path = path.resolve() if path.is_symlink() else path
    for half in [*path.rglob("*.partial"), *path.glob(".zarr.json.*")]:
        half.unlink()
    for beside in path.absolute().parent.iterdir():
        if beside.name.startswith(f".{path.name}."):
            shutil.rmtree(beside, ignore_errors=True)


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a finished file or folder to `path`; an earlier folder there is removed afterwards."""
    if not path.is_dir():
        with renaming():
            os.replace(temporary, path)
        return
    old = temporary_beside(path.with_name(path.name + ".old"))
    with renaming():
        path.rename(old)
        temporary.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: str | Path, result: Mapping[str, Any]) -> Path:
    """Write JSON atomically and return its path.

    Parameters
    ----------
    path
        File to write; missing folders above it are made.
    result
        Values to write.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    ValueError
        For NaN and infinities, which JSON lacks.
    """
    path = Path(path)
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        # A file name that is not UTF-8 has lone surrogates in Python; JSON writes them as \udcXX.
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    return path
