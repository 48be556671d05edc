"""What the arguments of the library may be, and the volumes, voxel edges and studies that they stand for."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import ValidationError

from hpcres.errors import InputError
from hpcres.geometry import Box
from hpcres.inputs import voxel_edges_of
from hpcres.lengths import VoxelEdges
from hpcres.study import Study, study_model
from hpcres.study.file import load_study
from hpcres.volumes.formats import open_volume
from hpcres.volumes.phases import PhaseMap
from hpcres.volumes.volume import NotALabel, Volume, array_volume

log = logging.getLogger("hpcres")
AnyVolume = Any
"""A path, a `Volume`, or what has shape, dtype and slices like an array."""
VoxelSize = str | Sequence[str] | None
"""`50 nm`, or three such lengths along z, y and x."""


def volume_of(given: AnyVolume, phases: Sequence[str] | Mapping[int, str] | None) -> Volume:
    """Return the given path, volume or array as a volume.

    If `phases` is a mapping, the labels of the volume are 0, 1, 2, … in its order.
    """
    if isinstance(given, Volume):
        volume = given
    elif isinstance(given, str | os.PathLike):
        volume = open_volume(os.fspath(given))
    elif hasattr(given, "shape") and hasattr(given, "dtype"):
        volume = array_volume(given, "array")
    else:
        kind = type(given).__name__
        raise InputError(f"volume: {kind} is neither a path nor an array; give one with shape and dtype")
    if not isinstance(phases, Mapping):
        return volume
    phase_map = PhaseMap(tuple(phases), volume.path)

    def read(box: Box) -> np.ndarray:
        try:
            return phase_map.index(volume.read(box))
        except InputError as error:
            raise NotALabel(str(error)) from None

    return replace(
        volume, dtype=np.dtype(np.uint8), phases=tuple(phases.values()), _read=read, _read_unwritten=None, _reopen=None
    )


def edges_of(volume: Volume, given: VoxelSize) -> VoxelEdges:
    """Return the voxel size that was given, else the file's own.

    Raises
    ------
    InputError
        The voxel size is known along some axes only.
    """
    text = given if given is None or isinstance(given, str) else ",".join(map(str, given))
    edges, notes = voxel_edges_of(volume, text)
    if text:  # of an unknown size the result says so itself
        log_warnings(notes)
    return edges


def warn_of_absent_chunks(volume: Volume) -> None:
    """Log how many chunks of a volume in files are absent."""
    from hpcres.volumes.absent import absent_chunks

    log_warnings(() if volume.in_memory else absent_chunks(volume))


def log_warnings(lines: Iterable[object]) -> None:
    """Log each line as a warning for the user."""
    for line in lines:
        log.warning("%s", line)


def study_of(
    given: Study | Mapping[str, Any] | str | os.PathLike[str],
    settings: Sequence[str],
    output: str | os.PathLike[str] | None,
) -> Study:
    """Return the study that is given, that a mapping describes, or that a file holds with `settings` over it.

    Raises
    ------
    InputError
        The study is not valid, or settings are given without a file.
    """
    where = None if output is None else os.fspath(output)
    if isinstance(given, str | os.PathLike):
        return load_study(os.fspath(given), settings, where)
    if settings:
        raise InputError(f"settings {settings[0]}: are for a study file; change the study itself")
    try:
        study = given if isinstance(given, Study) else study_model(dict(given)).model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"study: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return study if where is None else study.model_copy(update={"output": where})
