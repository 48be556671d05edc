"""Voxels, faces and edges of a label volume in one pass, as integers that add up however the volume is cut.

The steps are `count(block)`, `add(a, b)` and `finalize(total, voxel_size)`. A block owns its voxels and the faces and
edges on their + side. It counts them in one of two ways. Either it is given one more voxel at the end of each axis
where the volume goes on. Or it is counted by itself up to its last planes (`count_inner`), and these are counted when
the first planes of the blocks beyond are known (`count_rim`); then every voxel is read once. Either way the sum over
any partition is `count(whole)`. Definitions in docs/metrics.md: volume fraction, specific surface and TPB density after
Gayon-Lombardo et al. 2020 (eqs. S6, S7, D.1), interphase area and normalised TPB after Dahari et al. 2022 (fig. 2,
section 2.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from hpcres.compiled import compiled
from hpcres.counting.few_phases import count_few
from hpcres.counting.many_phases import count_many
from hpcres.counting.totals import MAX_PHASES, Counts, add
from hpcres.errors import InputError
from hpcres.geometry import Triple, triple

_FIRST_LABELS = [tuple(range(n)) for n in (1, 2, 3, 4)]


def count(block: np.ndarray, owned: Sequence[int] | None = None, labels: Sequence[int] | None = None) -> Counts:
    """Count the voxels, faces and edges of an integer block.

    Parameters
    ----------
    block : np.ndarray
        Integer labels (z, y, x).
    owned : sequence of int, optional
        How many of the first voxels per axis to count; by default all. Along each axis the block has either `owned`
        voxels (the volume ends there) or one more.
    labels : sequence of int, optional
        Labels that may occur; by default those that are found.

    Returns
    -------
    Counts

    Raises
    ------
    InputError
        A label is not among `labels`, or there are more than 16 labels.
    """
    shape = tuple(block.shape) if owned is None else tuple(owned)
    assert all(0 <= b - o <= 1 for b, o in zip(block.shape, shape, strict=True)), (block.shape, shape)
    if block.size == 0 or min(shape) == 0:
        return Counts()
    z, y, x = shape
    found = None
    if labels is not None and tuple(labels) in _FIRST_LABELS and block.dtype == np.uint8:
        # Labels that are positions already are checked while they are counted, without another pass over memory.
        found, present = _counted(count_few, np.ascontiguousarray(block), z, y, x, len(labels)), tuple(labels)
    if found is None:
        index, present = indexed(block, labels)
        found = _counted(count_few if len(present) <= 4 else count_many, index, z, y, x, len(present))
    assert found is not None
    (voxels, faces, edges), n = found, len(present)
    pairs = faces.reshape(3, n, n)
    pairs = pairs + pairs.transpose(0, 2, 1)
    iz, iy, ix = (min(o, b - 1) for o, b in zip(shape, block.shape, strict=True))
    return Counts(
        voxels={present[i]: int(voxels[i]) for i in range(n) if voxels[i]},
        faces={
            (present[i], present[j]): triple(pairs[:, i, j])
            for i, j in combinations(range(n), 2)
            if pairs[:, i, j].any()
        },
        edges={
            tuple(label for i, label in enumerate(present) if mask >> i & 1): triple(edges[:, mask])
            for mask in np.flatnonzero(edges[0] | edges[1] | edges[2])
        },
        all_faces=(iz * y * x, z * iy * x, z * y * ix),
        all_edges=(z * iy * ix, iz * y * ix, iz * iy * x),
    )


@dataclass(frozen=True)
class Rim:
    """Outermost planes of a block of `shape`, normal to z, y, x.

    The axes of each plane are the two remaining ones, in their order.
    """

    shape: Triple
    first: tuple[np.ndarray, np.ndarray, np.ndarray]
    last: tuple[np.ndarray, np.ndarray, np.ndarray]

    @classmethod
    def of(cls, block: np.ndarray) -> Rim:
        """Copy the outermost planes of a block (z, y, x)."""

        def planes(place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return block[place].copy(), block[:, place].copy(), block[:, :, place].copy()

        return cls(triple(block.shape), planes(0), planes(-1))

    @classmethod
    def stacked(cls, parts: Sequence[Rim]) -> Rim:
        """Combine the rims of slabs along z into the rim of the block that they make."""
        head, tail = parts[0], parts[-1]
        first, last = (
            [np.concatenate([getattr(part, side)[axis] for part in parts]) for axis in (1, 2)]
            for side in ("first", "last")
        )
        shape = (sum(part.shape[0] for part in parts), *head.shape[1:])
        return cls(triple(shape), (head.first[0], first[0], first[1]), (tail.last[0], last[0], last[1]))


def count_inner(slabs: Iterable[np.ndarray], labels: Sequence[int] | None = None) -> tuple[Counts, Rim]:
    """Count a block without its last plane along each axis, and keep its rim.

    Parameters
    ----------
    slabs : iterable of np.ndarray
        The block as slabs (z, y, x) along z, one after the other, so that no more than one need be held.
    labels : sequence of int, optional
        As in `count`.

    Returns
    -------
    counts : Counts
        What `count` finds of the block without its last plane along each axis.
    rim : Rim
        The outermost planes of the block.
    """
    total, rims = Counts(), list[Rim]()
    for slab in slabs:
        if rims:
            seam = np.stack([rims[-1].last[0], slab[0]])
            total = add(total, count(seam, (1, slab.shape[1] - 1, slab.shape[2] - 1), labels))
        total = add(total, count(slab, [n - 1 for n in slab.shape], labels))
        rims.append(Rim.of(slab))
        del slab  # before the next one is read
    return total, Rim.stacked(rims)


def count_rim(rim: Rim, beyond: Mapping[Triple, Rim], labels: Sequence[int] | None = None) -> Counts:
    """Count what the last planes of a block own.

    The sum of `count_inner` and this is `count` of the block.

    Parameters
    ----------
    rim : Rim
        The outermost planes of the block.
    beyond : mapping
        The rims of the blocks that follow, by how many blocks further they are along z, y, x (0 or 1 each): all seven,
        except those beyond an end of the volume. Around a periodic axis the first block follows the last.
    labels : sequence of int, optional
        As in `count`.

    Returns
    -------
    Counts
    """
    around = {(0, 0, 0): rim, **beyond}
    total = Counts()
    for axis in range(3):
        # The plane itself and the one that follows, each with a margin along the axes not yet dealt with.
        one, other = (k for k in range(3) if k != axis)
        owned = [rim.shape[one] - (one < axis), rim.shape[other] - (other < axis)]
        sheets = []
        for step in (0, 1):
            rows = []
            for beside in (0, 1):
                pieces = []
                for along in (0, 1):
                    place = [0, 0, 0]
                    place[axis], place[one], place[other] = step, beside, along
                    near = around.get(triple(place))
                    if near is None or (beside and one < axis) or (along and other < axis):
                        continue
                    plane = (near.first if step else near.last)[axis]
                    pieces.append(plane[: 1 if beside else None, : 1 if along else None])
                if pieces:
                    rows.append(np.concatenate(pieces, axis=1))
            if rows:
                sheets.append(np.concatenate(rows, axis=0))
        found = count(np.stack(sheets), (1, *owned), labels)
        total = add(total, _turned(found, axis))
    return total


def _turned(total: Counts, axis: int) -> Counts:
    """Reorder the counts of a block whose first axis is `axis` of the volume, the others following in their order."""

    def turn(n: Triple) -> Triple:
        rest = iter(n[1:])
        return triple([n[0] if k == axis else next(rest) for k in range(3)])

    return Counts(
        total.voxels,
        {k: turn(n) for k, n in total.faces.items()},
        {k: turn(n) for k, n in total.edges.items()},
        turn(total.all_faces),
        turn(total.all_edges),
    )


def _counted(
    kernel: Callable[..., bool], index: np.ndarray, z: int, y: int, x: int, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    voxels, faces, edges = (np.zeros(s, np.int64) for s in (n, (3, n * n), (3, 1 << n)))
    return (voxels, faces, edges) if kernel(index, z, y, x, n, voxels, faces, edges) else None


def indexed(block: np.ndarray, labels: Sequence[int] | None) -> tuple[np.ndarray, tuple[int, ...]]:
    """Replace labels by their positions in the sorted labels.

    Parameters
    ----------
    block : np.ndarray
        Integer labels.
    labels : sequence of int or None
        Labels that may occur; None for those that are found.

    Returns
    -------
    index : np.ndarray
        Positions, uint8, of the shape of the block.
    labels : tuple of int
        The sorted labels.

    Raises
    ------
    InputError
        A label is not among `labels`, or there are more than 16 labels.
    """
    assert block.dtype.kind in "iu", block.dtype
    if labels is not None and tuple(labels) == tuple(range(len(labels))) and block.dtype == np.uint8:
        if block.max() < len(labels):
            return np.ascontiguousarray(block), tuple(labels)
    if block.dtype.itemsize == 1:
        flat = np.ascontiguousarray(block).view(np.uint8).ravel()
        found = np.sort(np.flatnonzero(_seen(flat)).astype(np.uint8).view(block.dtype))
    else:
        found = np.unique(block)
    known = tuple(int(v) for v in found) if labels is None else tuple(sorted(int(v) for v in labels))
    if unknown := [int(v) for v in found if int(v) not in known]:
        raise InputError(
            f"label {unknown[0]} has no phase; known are {', '.join(map(str, known))}; measure it with its own study"
        )
    if len(known) > MAX_PHASES:
        raise InputError(
            f"{len(known)} different labels in one block ({known[0]} … {known[-1]}), at most {MAX_PHASES} phases can "
            f"be measured; is this a segmented image?"
        )
    if block.dtype.itemsize == 1:
        table = np.zeros(256, np.uint8)
        table[np.array(known).astype(block.dtype).view(np.uint8)] = np.arange(len(known))
        return _through(flat, table).reshape(block.shape), known
    return np.searchsorted(np.array(known), block).astype(np.uint8), known


@compiled
def _seen(flat):
    seen = np.zeros(256, np.uint8)
    for i in range(flat.size):
        seen[flat[i]] = 1
    return seen


@compiled
def _through(flat, table):
    out = np.empty(flat.size, np.uint8)
    for i in range(flat.size):
        out[i] = table[flat[i]]
    return out
