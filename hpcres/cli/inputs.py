"""The inputs of the commands: a study, or a bare volume and its voxel size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hpcres.errors import InputError
from hpcres.lengths import VoxelEdges, parse_voxel_edges
from hpcres.outputs import STUDY, refuse_output
from hpcres.study import Study
from hpcres.study_file import files_of, load_study, saved_study

if TYPE_CHECKING:
    from hpcres.volumes.volume import Volume


def is_study(source: str) -> bool:
    return Path(source).suffix in (".yaml", ".yml")


def study_for(stage: str, source: str, settings: tuple[str, ...], output: str | None) -> Study:
    """The study, with a check before hours of work that the stage can save its copy beside the results."""
    study = load_study(source, settings, output)
    copy = saved_study(study, stage)
    if copy.exists() and copy.samefile(source):
        if settings or output:
            raise InputError(
                f"{copy}: is the study that is read, and the settings from --set and --output would be saved in it; "
                "write elsewhere with --output, or copy the study first"
            )
        return study
    refuse_output(copy, STUDY, inputs=[*study.inputs, *files_of(source)], renewed=True)
    return study


def refuse_settings(source: str, settings: tuple[str, ...]) -> None:
    if settings:
        raise InputError(f"--set {settings[0]}: {source} is a volume, not a study; drop --set")


def refuse_voxel_size(source: str, voxel_size: str | None) -> None:
    if voxel_size:
        raise InputError(f"{source}: a study has its own voxel size; drop --voxel-size")


def painted_volume(study: Study) -> Volume:
    """The study's labels.zarr."""
    from hpcres.volumes.formats import open_volume

    if not study.labels_path.exists():
        raise InputError(f"{study.labels_path}: not there yet; run hpcres infer first")
    return open_volume(study.labels_path)


def voxel_edges_of(volume: Volume, text: str | None) -> tuple[VoxelEdges, list[str]]:
    """The voxel size from --voxel-size, else from the file, and notes on an unknown or overridden size.

    The notes are printed beside a result only: an error is one line.
    """
    own = volume.edges
    try:
        edges = parse_voxel_edges(text) if text else own
    except ValueError as error:
        raise InputError(f"--voxel-size: {error}") from None
    if text and not edges.agrees_with(own):
        return edges, [f"{volume.path}: --voxel-size {edges} overrides the file's own, {own}"]
    if not text:
        _, unit = edges.lengths(volume.path, "give all three with --voxel-size Z,Y,X, such as 1um,250nm,250nm")
        because = f" ({own.note})" if own.note else ""
        if unit == "voxel":
            return edges, [f"{volume.path}: gives no voxel size{because}; lengths are in voxels"]
        if unit == "unit":
            found = f"{volume.path}: gives only the ratio of the voxel edges, {own}{because}"
            return edges, [f"{found}; give lengths with --voxel-size"]
    return edges, []
