"""Boxes and the plan of tiles: integers in, boxes out, without I/O and arrays.

Axes are z, y, x. A low-res voxel of scale factor p/q (lowest terms) is p/q high-res voxels wide, so q low-res voxels
are exactly p high-res ones. Tiles therefore start at multiples of q low-res voxels. On an axis without ends, periodic
or mirror, an index outside 0 … n − 1 stands for one of the n voxels, so boxes there may reach below 0 and beyond n.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise, product
from math import prod
from typing import Literal

from hpcres.errors import InputError

Triple = tuple[int, int, int]
Periodic = tuple[bool, bool, bool]
Boundary = Literal["replicate", "periodic", "mirror"]
"""Beyond an axis of n voxels: nothing, so that each layer of a network repeats its own outermost ones; voxel i mod n at
index i; or the volume's mirror image, voxel −1 − i at i < 0 and 2n − 1 − i at i ≥ n, and so on."""
Boundaries = tuple[Boundary, Boundary, Boundary]
REPLICATE: Boundaries = ("replicate", "replicate", "replicate")
PERIODIC: Boundaries = ("periodic", "periodic", "periodic")
MIRROR: Boundaries = ("mirror", "mirror", "mirror")
AXES = "zyx"


def triple(values: Iterable[int]) -> Triple:
    """Return three numbers as a tuple of int."""
    z, y, x = (int(v) for v in values)
    return z, y, x


def meeting_sides(periodic: Iterable[str]) -> Periodic:
    """Return for z, y and x whether the volume's two sides meet along this axis.

    Raises
    ------
    InputError
        One of the names is no axis.
    """
    chosen = tuple(periodic)
    if unknown := [axis for axis in chosen if axis not in AXES]:
        raise InputError(f"periodic: {unknown[0]!r} is no axis; choose from {', '.join(AXES)}")
    z, y, x = (axis in chosen for axis in AXES)
    return z, y, x


@dataclass(frozen=True, order=True)
class Box:
    """Half-open block of voxels [start, stop) along each axis, in voxels of one grid."""

    start: Triple
    stop: Triple

    def __post_init__(self) -> None:
        """Check that no axis stops before it starts."""
        assert all(a <= b for a, b in zip(self.start, self.stop, strict=True)), (self.start, self.stop)

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """Return the box of a whole volume of this shape."""
        return cls((0, 0, 0), triple(shape))

    @property
    def shape(self) -> Triple:
        """Edges z, y, x in voxels."""
        return triple([b - a for a, b in zip(self.start, self.stop, strict=True)])

    @property
    def voxels(self) -> int:
        """Number of voxels."""
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Slices z, y, x that cut the box out of an array."""
        z, y, x = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x

    def clipped(self, other: Box) -> Box:
        """Return the part of this box inside `other`, empty at the nearest corner if the two do not meet."""
        start = [min(max(a, c), d) for a, c, d in zip(self.start, other.start, other.stop, strict=True)]
        stop = [max(min(b, d), a) for b, a, d in zip(self.stop, start, other.stop, strict=True)]
        return Box(triple(start), triple(stop))

    def grown(self, before: int, after: int, within: Box | None = None) -> Box:
        """Return the box with more voxels along each axis, clipped to the box `within` if that is given.

        Parameters
        ----------
        before, after : int
            Voxels added at the start and at the stop of each axis.
        within : Box, optional
            Box that the result may not leave.
        """
        grown = Box(triple([a - before for a in self.start]), triple([b + after for b in self.stop]))
        return grown if within is None else grown.clipped(within)

    def relative_to(self, origin: Sequence[int]) -> Box:
        """Return the box with its coordinates counted from `origin`."""
        return Box(
            triple([a - o for a, o in zip(self.start, origin, strict=True)]),
            triple([b - o for b, o in zip(self.stop, origin, strict=True)]),
        )

    def __str__(self) -> str:
        """Return the ranges of the axes as text, such as `z 0:8 y 0:8 x 0:8`."""
        ends = zip(AXES, self.start, self.stop, strict=True)
        return " ".join(f"{axis} {a}:{b}" for axis, a, b in ends)


def blocks(shape: Sequence[int], block: Sequence[int]) -> list[Box]:
    """Return the blocks of a regular grid in z-major order, clipped at the volume's end.

    Every voxel is in exactly one block.

    Parameters
    ----------
    shape : sequence of int
        Voxels of the volume, z, y, x.
    block : sequence of int
        Edges of a block in voxels, z, y, x.
    """
    whole = Box.whole(shape)
    starts = product(*(range(0, n, b) for n, b in zip(shape, block, strict=True)))
    return [Box(triple(s), triple([a + b for a, b in zip(s, block, strict=True)])).clipped(whole) for s in starts]


def following(boxes: Sequence[Box], shape: Sequence[int], periodic: Periodic) -> list[dict[Triple, int]]:
    """Find, for every block of a regular grid over a volume, the blocks that follow it.

    Around a periodic axis the first block follows the last. Beyond an open end no block follows.

    Parameters
    ----------
    boxes : sequence of Box
        Blocks of the grid.
    shape : sequence of int
        Voxels of the volume, z, y, x.
    periodic : tuple of bool
        Whether the volume is periodic along z, y, x.

    Returns
    -------
    list of dict
        For every block, steps → position in `boxes` of the block that many blocks further along z, y, x. Each step is 0
        or 1, and not all three are 0.
    """
    at = {box.start: place for place, box in enumerate(boxes)}
    found = []
    for box in boxes:
        near = {}
        for step in list(product((0, 1), repeat=3))[1:]:
            edges = zip(box.start, box.stop, step, shape, periodic, strict=True)
            start = [(stop % n if wraps else stop) if s else begin for begin, stop, s, n, wraps in edges]
            if tuple(start) in at:
                near[triple(step)] = at[triple(start)]
        found.append(near)
    return found


@dataclass(frozen=True)
class Piece:
    """Part, inside the volume, of a box that reaches beyond its volume.

    Attributes
    ----------
    source : Box
        Where the piece is in the volume.
    place : Box
        Where the piece is in the box, relative to the box's start.
    steps : tuple of int
        Along z, y, x: 1 if the piece lies in the box as it is in the volume, −1 if it lies back to front.
    """

    source: Box
    place: Box
    steps: Triple


def pieces_of(box: Box, shape: Sequence[int], boundaries: Boundaries) -> list[Piece]:
    """Cut a box where it leaves the volume or comes back to it, in z-major order.

    A box longer than the volume does so several times. A box inside the volume is its only piece.

    Parameters
    ----------
    box : Box
        May reach beyond the volume along axes whose boundary is not `replicate`.
    shape : sequence of int
        Voxels of the volume, z, y, x.
    boundaries : tuple of str
        Boundary of each axis.
    """
    runs: list[list[tuple[int, int, int, int]]] = []
    for start, stop, n, boundary in zip(box.start, box.stop, shape, boundaries, strict=True):
        assert boundary != "replicate" or 0 <= start <= stop <= n, box
        runs.append([])
        for a, b in pairwise([start, *range((start // n + 1) * n, stop, n), stop]):
            back = boundary == "mirror" and a // n % 2 == 1
            runs[-1].append(((-b if back else a) % n, a - start, b - a, -1 if back else 1))
    pieces = []
    for run in product(*runs):
        source, place, length, steps = (triple(part) for part in zip(*run, strict=True))
        pieces.append(Piece(_sized(source, length), _sized(place, length), steps))
    return pieces


def _sized(start: Triple, shape: Triple) -> Box:
    return Box(start, triple([a + n for a, n in zip(start, shape, strict=True)]))


@dataclass(frozen=True)
class Tile:
    """One unit of inference, of storage and of recovery: a tile is a shard, and a shard is a file.

    Attributes
    ----------
    index : int
        Place of the tile in the plan.
    core : Box
        Low-res voxels that the tile owns.
    read : Box
        Low-res voxels that are read for the tile: the core and its halo. It ends where the volume ends, and continues
        beyond on an axis without ends.
    write : Box
        High-res voxels that the tile owns.
    """

    index: int
    core: Box
    read: Box
    write: Box


@dataclass(frozen=True)
class TilePlan:
    """Every tile of a run.

    Attributes
    ----------
    low_res_shape, shape : tuple of int
        Voxels of the low-res volume and of the output, z, y, x.
    scale : Fraction
        High-res voxels per low-res voxel along an axis.
    halo_low_res : int
        Low-res voxels around a tile that its labels depend on.
    chunk_voxels : int
        Edge of a storage chunk in high-res voxels.
    tile_voxels : tuple of int
        Shape of a shard in high-res voxels; the last tiles may be clipped.
    grid : tuple of int
        Tiles along z, y, x.
    boundaries : tuple of str
        What lies beyond the volume along z, y, x.
    tiles : tuple of Tile
        The tiles in z-major order.
    """

    low_res_shape: Triple
    shape: Triple
    scale: Fraction
    halo_low_res: int
    chunk_voxels: int
    tile_voxels: Triple
    grid: Triple
    boundaries: Boundaries
    tiles: tuple[Tile, ...]

    @property
    def endless(self) -> tuple[bool, bool, bool]:
        """Whether each axis, z, y, x, is without ends: periodic or mirror."""
        z, y, x = (boundary != "replicate" for boundary in self.boundaries)
        return z, y, x

    @property
    def halo_overhead(self) -> float:
        """Low-res voxels read per low-res voxel owned, ≥ 1."""
        return sum(t.read.voxels for t in self.tiles) / prod(self.low_res_shape)

    def shifted(self) -> list[Tile]:
        """Return tiles of the plan's size that start half a tile later along each axis.

        These tiles straddle the faces of the plan's tiles. The list is empty if tiles are too small for that. The tiles
        end where the volume ends, and do not wrap.
        """
        p, q = self.scale.numerator, self.scale.denominator
        halves = [min(edge // p, n // q) // 2 * q for n, edge in zip(self.low_res_shape, self.tile_voxels, strict=True)]
        if not any(halves):
            return []
        shape = triple([edge // p * q for edge in self.tile_voxels])
        starts = (range(half, n, edge) for half, n, edge in zip(halves, self.low_res_shape, shape, strict=True))
        whole = Box.whole(self.low_res_shape)
        return [
            _tile(
                i,
                _sized(triple(start), shape).clipped(whole),
                self.low_res_shape,
                self.shape,
                self.scale,
                self.halo_low_res,
                self.boundaries,
            )
            for i, start in enumerate(product(*starts))
        ]


def _tile(
    index: int,
    core: Box,
    low_res_shape: Triple,
    shape: Triple,
    scale: Fraction,
    halo_low_res: int,
    boundaries: Boundaries,
) -> Tile:
    p, q = scale.numerator, scale.denominator
    # The start of a window is rounded down to a multiple of q, where interpolation weights repeat; its end is free.
    before = -(-halo_low_res // q) * q
    beyond = [0 if boundary == "replicate" else before for boundary in boundaries]
    around = Box(triple([-b for b in beyond]), triple([n + b for n, b in zip(low_res_shape, beyond, strict=True)]))
    read = core.grown(before, halo_low_res, around)
    start = triple([s // q * p for s in core.start])
    write = Box(start, triple([-(-e * p // q) for e in core.stop])).clipped(Box.whole(shape))
    return Tile(index, core, read, write)


def high_res_shape(low_res_shape: Sequence[int], scale: Fraction) -> Triple:
    """Return the output voxels along each axis, ⌊n · scale⌋."""
    return triple([int(n * scale) for n in low_res_shape])


def plan_tiles(
    low_res_shape: Sequence[int],
    scale: Fraction,
    tiles: Sequence[int],
    halo_low_res: int,
    chunk_voxels: int,
    boundaries: Boundaries = REPLICATE,
) -> TilePlan:
    """Cut a low-res volume into at most `tiles` tiles along each axis.

    A tile is a whole number of storage chunks, so the grid can be coarser than asked for; the plan's `grid` says what
    it is.

    Parameters
    ----------
    low_res_shape : sequence of int
        Low-res voxels, z, y, x.
    scale : Fraction
        High-res voxels per low-res voxel along an axis.
    tiles : sequence of int
        Largest number of tiles along z, y, x.
    halo_low_res : int
        Low-res voxels around a tile that its labels depend on.
    chunk_voxels : int
        Edge of a storage chunk in high-res voxels.
    boundaries : tuple of str
        What lies beyond the volume along z, y, x.

    Raises
    ------
    InputError
        The volume cannot be cut like this, or cannot be periodic.
    """
    p, q = scale.numerator, scale.denominator
    if min(tiles) < 1:
        raise InputError(f"tiles {'x'.join(map(str, tiles))}: every axis needs at least one tile; use e.g. 2x2x2")
    if chunk_voxels % p:
        raise InputError(
            f"inference.chunk_voxels: {chunk_voxels} voxels are not whole low-res voxels at scale factor {scale}; "
            f"use a multiple of {p}"
        )
    chunk_low_res = chunk_voxels // p * q
    shape = high_res_shape(low_res_shape, scale)
    if min(shape) < 1:
        raise InputError(f"low-res volume {tuple(low_res_shape)}: empty at scale factor {scale}; check its axes")
    for axis, n, boundary in zip(AXES, low_res_shape, boundaries, strict=True):
        if boundary == "periodic" and n % q:
            raise InputError(
                f"inference.boundary: periodic along {axis} with {n} low-res voxels, which are no whole number of "
                f"high-res ones at scale factor {scale}; give it a multiple of {q}, or use mirror or replicate there"
            )
    core_edge = triple([-(-n // t // chunk_low_res) * chunk_low_res for n, t in zip(low_res_shape, tiles, strict=True)])
    cores = blocks(low_res_shape, core_edge)
    return TilePlan(
        triple(low_res_shape),
        shape,
        scale,
        halo_low_res,
        chunk_voxels,
        triple([e // q * p for e in core_edge]),
        triple([-(-n // e) for n, e in zip(low_res_shape, core_edge, strict=True)]),
        boundaries,
        tuple(
            _tile(i, core, triple(low_res_shape), shape, scale, halo_low_res, boundaries)
            for i, core in enumerate(cores)
        ),
    )


def tiles_of_rank(tile_count: int, rank: int, ranks: int) -> range:
    """Return the contiguous range of tiles of a rank.

    The shares of the ranks differ by at most one tile. Ranks beyond the number of tiles get none.
    """
    share, extra = divmod(tile_count, ranks)
    start = rank * share + min(rank, extra)
    return range(start, start + share + (rank < extra))
