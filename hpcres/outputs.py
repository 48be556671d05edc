"""The check that every command makes before it writes: it overwrites no input, and nothing that hpcres did not write.

An output of hpcres is recognised by the content of its file or folder, never by its name.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcres.errors import InputError

STUDY_MARK = "# written by hpcres"
CHECKPOINT_MARK = "hpcres-checkpoint-"


@dataclass(frozen=True)
class Kind:
    """A kind of output, such as a metrics file or a checkpoint."""

    refusal: str
    """What the error says of a file or folder that is not of this kind."""
    recognise: Callable[[Path], bool]
    """Whether an existing file or folder is one that hpcres wrote. It may raise the errors that `is_of` suppresses."""
    is_folder: bool = False


def _begins(pattern: bytes) -> Callable[[Path], bool]:
    """Return a function that recognises a file by a regular expression at the start of its first kilobyte."""

    def recognise(path: Path) -> bool:
        with path.open("rb") as file:
            return re.match(pattern, file.read(1024)) is not None

    return recognise


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 512))
        return b"<footer>hpcres " in file.read()


def _is_checkpoint(path: Path) -> bool:
    with zipfile.ZipFile(path) as file:  # as torch.save writes
        names = [name for name in file.namelist() if name.endswith("/data.pkl")]
        return any(CHECKPOINT_MARK.encode() in file.read(name) for name in names)


def _hpcres_attribute(path: Path) -> Any:
    return json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"].get("hpcres")


def _is_labels(path: Path) -> bool:
    found = _hpcres_attribute(path)
    return found is not None and not _is_fields(path)


def _is_fields(path: Path) -> bool:
    found = _hpcres_attribute(path)
    return isinstance(found, dict) and str(found.get("schema", "")).startswith("hpcres fields ")


def _is_phantom(path: Path) -> bool:
    names = [entry.name for entry in path.iterdir()]
    known = r"truth\.zarr|low_res\.zarr|low_res_\d+\.tif|slices(_[zyx]{2})?\.tif"
    return all(re.fullmatch(known, name) for name in names) and _is_labels(path / "truth.zarr")


METRICS = Kind("is not a metrics file of hpcres", _begins(rb'\s*\{\s*"schema": "hpcres metrics '))
TRANSPORT = Kind("is not a transport file of hpcres", _begins(rb'\s*\{\s*"schema": "hpcres transport '))
STUDY = Kind("is not a study that hpcres saved", _begins(STUDY_MARK.encode()))
TABLE = Kind("is not a table of hpcres train", _begins(b"step,seconds,"))
PAGE = Kind("is not a page of hpcres", _is_page)
CHECKPOINT = Kind("is not a checkpoint of hpcres", _is_checkpoint)
LABELS = Kind("is not a zarr store of hpcres", _is_labels, is_folder=True)
FIELDS = Kind("is not a zarr store of fields of hpcres", _is_fields, is_folder=True)
PHANTOM = Kind("is not a folder with a phantom of hpcres only", _is_phantom, is_folder=True)


def refuse_output(
    path: str | Path,
    kind: Kind,
    *,
    inputs: Iterable[str | Path | None] = (),
    overwrite: bool = False,
    renewed: bool = False,
) -> None:
    """Refuse an output that would destroy an input or anything that hpcres did not write; nothing is changed.

    Parameters
    ----------
    path : path
        The file or folder to be written. The nearest existing folder above it must be writable.
    kind : Kind
        The kind of output. An existing file or folder must be of this kind.
    inputs : iterable of paths
        Files and folders that the command reads; None is skipped. One may name a part of a file, as `file.h5:/dataset`
        does. `path` may not be an input, lie in one or hold one; links are followed.
    overwrite : bool
        Whether an existing output may be replaced.
    renewed : bool
        Whether the command replaces or extends its own earlier result without `overwrite`.

    Raises
    ------
    InputError
        The output is refused.
    """
    path = Path(path)
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir():
        raise InputError(f"{path}: cannot be written, because {nearest} is a file; write elsewhere with `output`")
    if not os.access(nearest, os.W_OK | os.X_OK):
        read_only = hasattr(os, "statvfs") and os.statvfs(nearest).f_flag & os.ST_RDONLY
        why = "read-only file system" if read_only else "permission denied"
        raise InputError(f"{path}: {why} in {nearest}; write elsewhere with `output`")
    for given in inputs:
        if given is not None:
            _refuse_input(path, given)
    if not os.path.lexists(path):
        return
    if not path.exists():
        raise InputError(f"{path}: is a link that leads nowhere; remove it, or write elsewhere with `output`")
    if path.is_dir() != kind.is_folder:
        what = "a folder where a file is due" if path.is_dir() else "a file where a folder is due"
        raise InputError(f"{path}: is {what}; write elsewhere with `output`")
    if not (path.is_dir() or path.is_file()):
        raise InputError(f"{path}: is not a regular file; write elsewhere with `output`")
    if not is_of(path, kind):
        raise InputError(
            f"{path}: exists already and {kind.refusal}, so `overwrite` will not remove it; move it away, or write "
            "elsewhere with `output`"
        )
    if not (overwrite or renewed):
        raise InputError(f"{path}: exists already; give `overwrite`, or write elsewhere with `output`")


def is_of(path: Path, kind: Kind) -> bool:
    """Return whether an existing file or folder is of this kind; False if it cannot be read."""
    with suppress(OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return kind.recognise(path)
    return False


def _refuse_input(path: Path, given: str | Path) -> None:
    place = _file_of(given)
    if place is None:
        return
    if _same(path, place):
        raise InputError(f"{path}: is the input {given} itself, which would be lost; write elsewhere with `output`")
    if any(_same(folder, place) for folder in Path(os.path.realpath(path)).parents):
        raise InputError(f"{path}: lies in the input {given}; write elsewhere with `output`")
    if path.is_dir() and any(_same(folder, path) for folder in (*place.absolute().parents, *place.resolve().parents)):
        raise InputError(f"{path}: holds the input {given}, which would be lost; write elsewhere with `output`")


def _file_of(given: str | Path) -> Path | None:
    """Return the file or folder of an input, without the name of a part of it; None if it does not exist."""
    text = str(given)
    while not os.path.exists(text):
        text, colon, _ = text.rpartition(":")
        if not colon:
            return None
    return Path(text)


def _same(a: Path, b: Path) -> bool:
    """Return whether two paths lead to one file or folder; links are followed."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False
