"""The inputs of the stages: a study, or a bare volume and its voxel size, and where their results go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpcres.errors import InputError
from hpcres.lengths import VoxelEdges, parse_voxel_edges
from hpcres.outputs import STUDY, refuse_output
from hpcres.study import Study
from hpcres.study.file import files_of, load_study, saved_study

if TYPE_CHECKING:
    from hpcres.volumes.volume import Volume

DEFAULT_STUDY = "study.yaml"
"""The study file that a command reads if none is named."""


@dataclass(frozen=True)
class Given:
    """What a stage is given: its source, and where its results go.

    Parameters
    ----------
    source : str
        A study file, or a label volume of any format.
    command : str
        The command, for the provenance of results.
    settings, output
        As in `hpcres.train`; of a bare volume `output` is the file to write, or None.
    voxel_size : str, optional
        Of a bare volume, in place of the file's own.
    overwrite : bool
        Replace results: a store, metrics of another bare volume, or all of transport.json.
    """

    source: str
    command: str
    settings: Sequence[str] = ()
    output: str | None = None
    voxel_size: str | None = None
    overwrite: bool = False


def is_study(source: str) -> bool:
    """Return whether the name of an input ends like a study file: .yaml or .yml."""
    return Path(source).suffix in (".yaml", ".yml")


def study_for(stage: str, source: str, settings: Sequence[str], output: str | None) -> Study:
    """Load the study, after a check that the stage can save its copy beside the results.

    The check is made before hours of work.

    Parameters
    ----------
    stage : str
        Name of the stage.
    source : str
        Path of the study file.
    settings : sequence of str
        `section.key=value`; these take precedence over the file.
    output : str or None
        Folder of results, in place of the study's own.

    Raises
    ------
    InputError
        The study is not valid, or its copy cannot be saved beside the results.
    """
    study = load_study(source, settings, output)
    copy = saved_study(study, stage)
    if copy.exists() and copy.samefile(source):
        if settings or output:
            raise InputError(
                f"{copy}: is the study that is read, and the settings from `set` and `output` would be saved in it; "
                "write elsewhere with `output`, or copy the study first"
            )
        return study
    refuse_output(copy, STUDY, inputs=[*study.inputs, *files_of(source)], renewed=True)
    return study


def refuse_settings(source: str, settings: Sequence[str]) -> None:
    """Raise InputError if settings of a study are given with a volume."""
    if settings:
        raise InputError(f"`set` {settings[0]}: {source} is a volume, not a study; drop `set`")


def refuse_voxel_size(source: str, voxel_size: str | None) -> None:
    """Raise InputError if a voxel size is given with a study."""
    if voxel_size:
        raise InputError(f"{source}: a study has its own voxel size; drop `voxel_size`")


def painted_volume(study: Study) -> Volume:
    """Open the study's labels.zarr.

    Raises
    ------
    InputError
        The store does not exist yet.
    """
    from hpcres.volumes.formats import open_volume  # zarr; commands that need no volume start without it

    if not study.labels_path.exists():
        raise InputError(f"{study.labels_path}: not there yet; run hpcres infer first")
    return open_volume(study.labels_path)


def voxel_edges_of(volume: Volume, text: str | None) -> tuple[VoxelEdges, list[str]]:
    """Return the voxel size that is given, else the file's own, and notes on an unknown or overridden size.

    The notes are printed beside a result only: an error is one line.

    Parameters
    ----------
    volume : Volume
        The input.
    text : str or None
        The voxel size that is given: one length, or three along z, y and x.

    Returns
    -------
    edges : VoxelEdges
        Edges of a voxel.
    notes : list of str
        Lines for the user.

    Raises
    ------
    InputError
        `text` cannot be parsed, or the file gives the voxel size along some axes only.
    """
    own = volume.edges
    try:
        edges = parse_voxel_edges(text) if text else own
    except ValueError as error:
        raise InputError(f"`voxel_size`: {error}") from None
    if text and not edges.agrees_with(own):
        return edges, [f"{volume.path}: `voxel_size` {edges} overrides the file's own, {own}"]
    if not text:
        _, unit = edges.lengths(volume.path, "give all three with `voxel_size` Z,Y,X, such as 1um,250nm,250nm")
        because = f" ({own.note})" if own.note else ""
        if unit == "voxel":
            return edges, [f"{volume.path}: gives no voxel size{because}; lengths are in voxels"]
        if unit == "unit":
            found = f"{volume.path}: gives only the ratio of the voxel edges, {own}{because}"
            return edges, [f"{found}; give lengths with `voxel_size`"]
    return edges, []
