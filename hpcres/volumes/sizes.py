"""The voxel sizes that the files of a study say of themselves, beside those that the study has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hpcres.errors import InputError
from hpcres.geometry import AXES
from hpcres.lengths import RELATIVE, Length, VoxelEdges, ratio
from hpcres.study import Study
from hpcres.volumes.formats import file_of, open_images, open_volume
from hpcres.volumes.volume import Volume

MISMATCH = 0.02
"""Share by which a file's voxel edge may differ from the study's."""


def compare_sizes(
    study: Study, *, low_res: Volume | None = None, high_res: Sequence[Volume] = (), images: bool = False,
    reference: bool = False,
) -> list[str]:  # fmt: skip
    """Compare what files say of their voxels with the study: `low_res` with voxel_size × scale_factor, `high_res`
    volumes, and the study's images and reference where those are there and asked for, with voxel_size.

    A file that says nothing is taken at the study's word, one that says a ratio only must be of cubes.

    Returns
    -------
    list of str
        A line for each file that differs, where study.allow_voxel_size_mismatch is set.

    Raises
    ------
    InputError
        Where a file differs by more than 2 % along an axis, and that is not set.
    """
    size, scale = study.high_res.voxel_size, study.scale_factor
    fine = f"high_res.voxel_size is {size}"
    coarse = f"high_res.voxel_size × scale_factor is {study.low_res_voxel_size} ({size} × {scale})"

    def said() -> Iterator[tuple[str, VoxelEdges, Length, str]]:
        if low_res is not None:
            for part in low_res.parts or (low_res,):
                yield part.path, part.edges, study.low_res_voxel_size, coarse
        for volume in high_res:
            yield volume.path, volume.edges, size, fine
        for path in dict.fromkeys(image.path for image in study.high_res.images) if images else ():
            if file_of(path).exists():
                own = open_images(path).edges
                yield path, VoxelEdges.of([None, own.y, own.x]), size, fine  # slices may be any distance apart
        if reference and study.reference.volume is not None and file_of(study.reference.volume).exists():
            volume = open_volume(study.reference.volume)
            yield volume.path, volume.edges, size, fine

    return [line for one in said() if (line := refuse_other_size(*one[:3], study.allow_voxel_size_mismatch, one[3]))]


def refuse_other_size(path: str, edges: VoxelEdges, due: Length, allowed: bool, why: str = "") -> str | None:
    """InputError where known edges differ from the study's, `due`, by more than 2 %; a line instead if that is allowed.

    why: how the study comes to it.
    """
    if (different := _difference(edges, due)) is None:
        return None
    why = why or f"high_res.voxel_size is {due}"
    if allowed:
        return f"{path}: {different}, but in the study {why}, which is taken (allow_voxel_size_mismatch)"
    raise InputError(
        f"{path}: {different}, but in the study {why}; correct the study or the file, or set "
        "allow_voxel_size_mismatch: true to go on with the study's"
    )


def _difference(edges: VoxelEdges, due: Length) -> str | None:
    """What of the edges is not as `due`; None where all that can be compared is."""
    there = [(axis, edge) for axis, edge in zip(AXES, edges.each, strict=True) if edge is not None]
    if not there:
        return None
    if due.unit != RELATIVE and there[0][1].unit != RELATIVE:
        wrong = [(axis, edge) for axis, edge in there if abs((ratio(edge, due) or 1.0) - 1) > MISMATCH]
        return f"its voxels are {wrong[0][1]} along {wrong[0][0]}" if wrong else None
    first = there[0][1]
    if all(abs((ratio(edge, first) or 1.0) - 1) <= MISMATCH for _, edge in there):
        return None
    return f"its voxels are no cubes ({edges})"
