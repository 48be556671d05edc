"""The memory of a solve that holds the whole volume, checked before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from hpcres.errors import InputError
from hpcres.geometry import AXES
from hpcres.memory import free_bytes

BYTES_PER_VOXEL = 2.0  # labels, bits, cells
BYTES_OF_CUBIC = (16.0, 19.5)  # of vectors and coarse levels for a conducting voxel, in the plain form
LEFT_OF_SET_UP = 0.68  # share of the coarse levels' bytes that is still held after their set-up


def check_memory(
    shape: Sequence[int],
    conducting: float | None = None,
    doubled: Sequence[int] = (),
    on_node: int = 1,
    held: tuple[float, float] = BYTES_OF_CUBIC,
) -> None:
    """Raise InputError where the solve would not fit in memory, with the numbers and what to do.

    Parameters
    ----------
    shape : sequence of int
        Voxels z, y, x.
    conducting : float, optional
        Share of the voxels that conduct, once it is known, with labels in memory; until then 0.4 is assumed.
    doubled : sequence of int
        Axes along which the volume is solved twice over.
    on_node : int
        Processes that each need as much on this node.
    held : tuple of float
        Bytes of vectors and of coarse levels for a conducting voxel (see `form.Form`).

    Raises
    ------
    InputError
        The solve needs more memory than is free.
    """
    share = 0.4 if conducting is None else conducting
    per_voxel = BYTES_PER_VOXEL + sum(held) * share
    per_voxel *= 2 ** len(doubled)
    need, free = prod(shape) * per_voxel, free_bytes() / on_node
    if need > free:
        edge = int((free / per_voxel) ** (1 / 3)) // 16 * 16
        size = " × ".join(map(str, shape))
        odd = "".join(f", twice over along {AXES[a]} because {shape[a]} is odd and periodic" for a in doubled)
        raise InputError(
            f"volume of {size} voxels: needs {need / 2**30:.1f} GiB of memory ({per_voxel:.0f} bytes a voxel where "
            f"{share:.0%} conduct{odd}), {free / 2**30:.1f} GiB are free; solve it out of core with `memory`, "
            f"or on more nodes with mpirun, or take a part with `crop` 0:{edge},0:{edge},0:{edge}"
        )
