"""May this be written? One answer for every command: no input is touched, and nothing that hpcres did not write.

A kind of output is recognised by what stands in the file or folder, never by its name.
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
    """What a command writes: what to say of anything else, how to recognise one that hpcres wrote, and whether it is a
    folder."""

    otherwise: str
    recognise: Callable[[Path], bool]
    is_folder: bool = False


def _begins(pattern: bytes) -> Callable[[Path], bool]:
    """Of a file whose first kilobyte matches the regular expression."""

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


METRICS = Kind("is no metrics file of hpcres", _begins(rb'\s*\{\s*"schema": "hpcres metrics '))
TRANSPORT = Kind("is no transport file of hpcres", _begins(rb'\s*\{\s*"schema": "hpcres transport '))
STUDY = Kind("is no study saved by hpcres", _begins(STUDY_MARK.encode()))
TABLE = Kind("is no table of hpcres train", _begins(b"step,seconds,"))
PAGE = Kind("is no page of hpcres", _is_page)
CHECKPOINT = Kind("is no checkpoint of hpcres", _is_checkpoint)
LABELS = Kind("is no zarr store of hpcres", _is_labels, is_folder=True)
FIELDS = Kind("is no zarr store of fields of hpcres", _is_fields, is_folder=True)
PHANTOM = Kind("holds more than a phantom, or holds no phantom", _is_phantom, is_folder=True)


def refuse_output(
    path: str | Path, kind: Kind, *, inputs: Iterable[str | Path | None] = (), overwrite: bool = False,
    renewed: bool = False,
) -> None:  # fmt: skip
    """InputError unless `path` may be written as an output of this kind; nothing is changed.

    It may not be an input, lie in one or hold one, by whatever links. What is there already must be of the kind, and
    is replaced only with `overwrite`, or where the command renews its own result (`renewed`). Its folder, or the
    nearest that is there, must be writable. An input may name a part of a file, as file.h5:/dataset does.
    """
    path = Path(path)
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir():
        raise InputError(f"{path}: cannot be written, because {nearest} is a file; write elsewhere with --output")
    if not os.access(nearest, os.W_OK | os.X_OK):
        read_only = hasattr(os, "statvfs") and os.statvfs(nearest).f_flag & os.ST_RDONLY
        why = "read-only file system" if read_only else "permission denied"
        raise InputError(f"{path}: {why} in {nearest}; write elsewhere with --output")
    for given in inputs:
        if given is not None:
            _refuse_input(path, given)
    if not os.path.lexists(path):
        return
    if not path.exists():
        raise InputError(f"{path}: is a link that leads nowhere; remove it, or write elsewhere with --output")
    if path.is_dir() != kind.is_folder:
        what = "a folder where a file is due" if path.is_dir() else "a file where a folder is due"
        raise InputError(f"{path}: is {what}; write elsewhere with --output")
    if not (path.is_dir() or path.is_file()):
        raise InputError(f"{path}: is no regular file; write elsewhere with --output")
    if not is_of(path, kind):
        raise InputError(
            f"{path}: exists already and {kind.otherwise}, so --overwrite will not remove it; move it away, or write "
            "elsewhere with --output"
        )
    if not (overwrite or renewed):
        raise InputError(f"{path}: exists already; give --overwrite, or write elsewhere with --output")


def is_of(path: Path, kind: Kind) -> bool:
    """Whether a file or folder that is there is of this kind; False for what cannot be read."""
    with suppress(OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return kind.recognise(path)
    return False


def _refuse_input(path: Path, given: str | Path) -> None:
    place = _file_of(given)
    if place is None:
        return
    whole = path.absolute()
    if _same(whole, place):
        raise InputError(f"{path}: is the input {given} itself, which would be lost; write elsewhere with --output")
    if any(_same(folder, place) for folder in Path(os.path.realpath(path)).parents):
        raise InputError(f"{path}: lies in the input {given}; write elsewhere with --output")
    if whole.is_dir() and any(_same(folder, whole) for folder in (*place.absolute().parents, *place.resolve().parents)):
        raise InputError(f"{path}: holds the input {given}, which would be lost; write elsewhere with --output")


def _file_of(given: str | Path) -> Path | None:
    """The file or folder of an input, without the name of a part of it; None where there is none."""
    text = str(given)
    while not os.path.exists(text):
        text, colon, _ = text.rpartition(":")
        if not colon:
            return None
    return Path(text)


def _same(a: Path, b: Path) -> bool:
    """Whether two paths are one file or folder, by whatever links."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False
