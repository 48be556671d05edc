"""Comparison of the voxel sizes in a study's files with those of the study."""

from __future__ import annotations

from collections.abc import Sequence

from hpcres.errors import InputError
from hpcres.geometry import AXES
from hpcres.lengths import RELATIVE, Length, VoxelEdges, cubic, ratio
from hpcres.study import Study
from hpcres.volumes.formats import file_of, open_images, open_volume
from hpcres.volumes.volume import Volume

MISMATCH = 0.02
"""Largest relative difference between a file's voxel edge and the study's."""


def compare_sizes(
    study: Study,
    *,
    low_res: Volume | None = None,
    high_res: Sequence[Volume] = (),
    images: bool = False,
    reference: bool = False,
) -> list[str]:
    """Compare the voxel sizes that files state with the study's.

    An edge that a file does not state is not compared. A file that states only the ratio of its edges must have cubic
    voxels.

    Parameters
    ----------
    study
        Study whose voxel size and scale factor are compared.
    low_res
        Volume compared with voxel_size × scale_factor, as are the volumes of its channels.
    high_res
        Volumes compared with voxel_size.
    images, reference
        Compare the study's images (rows and columns) and its reference volume too, where the files exist.

    Returns
    -------
    list of str
        A line for each file that differs, where study.allow_voxel_size_mismatch is set.

    Raises
    ------
    InputError
        Where a file differs by more than 2 % along an axis, and allow_voxel_size_mismatch is not set.
    """
    size, scale, coarse = study.high_res.voxel_size, study.scale_factor, study.low_res_voxel_size
    lines = []
    for part in (low_res.parts or (low_res,)) if low_res is not None else ():
        due = f"high_res.voxel_size × scale_factor is {coarse} ({size} × {scale})"
        lines.append(refuse_other_size(part.path, part.edges, coarse, study.allow_voxel_size_mismatch, due))
    fine = [(volume.path, volume.edges) for volume in high_res]
    for path in dict.fromkeys(image.path for image in study.high_res.images) if images else ():
        if file_of(path).exists():
            edges = open_images(path).edges
            fine.append((path, VoxelEdges.of([None, edges.y, edges.x])))  # slices may be any distance apart
    if reference and study.reference.volume is not None and file_of(study.reference.volume).exists():
        fine.append((study.reference.volume, open_volume(study.reference.volume).edges))
    lines += [refuse_other_size(path, edges, size, study.allow_voxel_size_mismatch) for path, edges in fine]
    return [line for line in lines if line is not None]


def refuse_other_size(path: str, edges: VoxelEdges, due: Length, allowed: bool, setting: str = "") -> str | None:
    """Compare a file's voxel edges with an edge length of the study.

    Parameters
    ----------
    path
        File, for messages.
    edges
        Voxel edges of the file; unknown ones are not compared.
    due
        Edge length of the study.
    allowed
        The study's allow_voxel_size_mismatch.
    setting
        The setting that gives `due`, and its value, for messages.

    Returns
    -------
    str or None
        A line on the difference, where it is allowed; None where there is none.

    Raises
    ------
    InputError
        Where they differ by more than 2 % along an axis, and this is not allowed.
    """
    if edges.agrees_with(cubic(due), MISMATCH):
        return None
    known = [(axis, edge) for axis, edge in zip(AXES, edges.each, strict=True) if edge is not None]
    if RELATIVE in (due.unit, known[0][1].unit):
        found = f"its voxels are not cubes ({edges})"
    else:
        axis, edge = max(known, key=lambda one: abs(ratio(one[1], due) - 1))
        found = f"its voxels are {edge} along {axis}"
    setting = setting or f"high_res.voxel_size is {due}"
    if allowed:
        return f"{path}: {found}, but in the study {setting}, which is used (allow_voxel_size_mismatch)"
    raise InputError(
        f"{path}: {found}, but in the study {setting}; correct the study or the file, or set "
        "allow_voxel_size_mismatch: true to use the study's"
    )
