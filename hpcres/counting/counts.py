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
from dataclasses import dataclass, field
from functools import reduce
from itertools import combinations
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from hpcres.compiled import compiled
from hpcres.errors import InputError
from hpcres.geometry import Triple, triple

MAX_PHASES = 16
_FIRST_LABELS = [tuple(range(n)) for n in (1, 2, 3, 4)]


@dataclass(frozen=True)
class Counts:
    """Integer counts, keyed by label; triples are per axis z, y, x.

    A face counts along its normal, an edge along its direction. `faces` holds pairs of different labels (smaller
    first). `edges` holds the edges whose four voxels show three or four different labels, by the exact set of labels.
    An edge with four labels is listed under its four and under none of their triples, so that the sum over `edges` is
    the number of TPB edges. `all_faces` and `all_edges` count the interior faces and edges, whatever labels they
    separate.
    """

    voxels: dict[int, int] = field(default_factory=dict)
    faces: dict[tuple[int, int], Triple] = field(default_factory=dict)
    edges: dict[tuple[int, ...], Triple] = field(default_factory=dict)
    all_faces: Triple = (0, 0, 0)
    all_edges: Triple = (0, 0, 0)

    @property
    def labels(self) -> tuple[int, ...]:
        """Labels that occur, sorted."""
        return tuple(sorted(self.voxels))


@dataclass(frozen=True)
class Densities:
    """Numbers derived from counts; lengths in the unit of the voxel size, keys as in `Counts`.

    `specific_surface_faces` (1/length) is the area of all voxel faces between a phase and any other / volume.
    `specific_surface_crofton` is two thirds of it (isotropic Cauchy–Crofton). `interphase_area` is dimensionless: faces
    between two phases / all interior faces. `tpb_density` (1/length²) is the length of edges that touch three or more
    phases / volume. `tpb_normalised` is the number of such edges / all interior edges. Both are also given by set of
    phases.
    """

    volume_fraction: dict[int, float]
    specific_surface_faces: dict[int, float]
    specific_surface_crofton: dict[int, float]
    interphase_area: dict[tuple[int, int], float]
    tpb_density: float
    tpb_normalised: float
    tpb_density_by_phases: dict[tuple[int, ...], float]
    tpb_normalised_by_phases: dict[tuple[int, ...], float]


def _popcount_instruction(typing_context, word):
    return types.uint64(types.uint64), lambda context, builder, signature, args: builder.ctpop(args[0])


def _trailing_zeros_instruction(typing_context, word):
    def generate(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


popcount: Any = intrinsic(_popcount_instruction)
trailing_zeros: Any = intrinsic(_trailing_zeros_instruction)


def _of_64_bytes(test: Callable[[Any, Any], Any]) -> Any:
    """Make a compiled function of `row` and `first` that gives one bit for each of the 64 bytes from `first` on.

    The lowest bit is that of the first byte.
    """

    def instructions(typing_context, row, first):
        def generate(context, builder, signature, args):
            # One or two instructions where vectors are wide; no loop of ours comes near.
            vector = ir.VectorType(ir.IntType(8), 64)
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            address = builder.bitcast(builder.gep(data, [args[1]]), vector.as_pointer())
            return builder.bitcast(test(builder, builder.load(address, align=1)), ir.IntType(64))

        return types.uint64(row, types.int64), generate

    return intrinsic(instructions)


def _constant(voxels: Any, value: int) -> Any:
    return ir.Constant(voxels.type, [value] * 64)


_BITS = ir.VectorType(ir.IntType(1), 64)
_low_bits = _of_64_bytes(lambda builder, v: builder.trunc(v, _BITS))
_high_bits = _of_64_bytes(lambda builder, v: builder.trunc(builder.lshr(v, _constant(v, 1)), _BITS))
_third_bits = _of_64_bytes(lambda builder, v: builder.trunc(builder.lshr(v, _constant(v, 2)), _BITS))
_fourth_bits = _of_64_bytes(lambda builder, v: builder.trunc(builder.lshr(v, _constant(v, 3)), _BITS))
_above_three = _of_64_bytes(lambda builder, v: builder.icmp_unsigned(">", v, _constant(v, 3)))


@compiled
def pack_phases(row, planes, first, n):
    """Set bit x of the words planes[p, first:] where row[x] is phase p < n, for n up to four.

    The result is not 0 if a voxel is none of the n phases.
    """
    whole, strange = row.shape[0] // 64, np.uint64(0)
    for word in range(whole):
        low, high = _low_bits(row, 64 * word), _high_bits(row, 64 * word)
        strange |= _above_three(row, 64 * word)
        if n < 4:
            strange |= low & high
        if n < 3:
            strange |= high
        if n < 2:
            strange |= low
        planes[0, first + word] = ~(low | high)
        if n > 1:
            planes[1, first + word] = low & ~high
        if n > 2:
            planes[2, first + word] = high & ~low
        if n > 3:
            planes[3, first + word] = low & high
    if row.shape[0] % 64:
        for x in range(64 * whole, row.shape[0]):
            strange |= np.uint64(row[x] >= n)
        for p in range(n):
            bits = np.uint64(0)
            for x in range(64 * whole, row.shape[0]):
                bits |= np.uint64(row[x] == p) << np.uint64(x & 63)
            planes[p, first + whole] = bits
    return strange


@compiled
def _pack_slice(labels, owned, followed, voxels, beside, pairs, n):
    """Pack a slice into bit planes (n, words): its voxels, the voxels one further along x, and either of the two.

    Only voxels that are owned along x have bits. `owned` has a bit for every owned voxel, and `followed` for every
    owned voxel that has a next one along x. The result is False where a voxel is none of the n phases.
    """
    rows, length = labels.shape
    words, one, rest = (length + 63) // 64, np.uint64(1), np.uint64(63)
    strange = np.uint64(0)
    if length % 64:
        for y in range(rows):
            strange |= pack_phases(labels[y], voxels, y * words, n)
    else:
        strange = pack_phases(labels.reshape(labels.size), voxels, 0, n)
    size = rows * words
    for p in range(n):
        here, there, either = voxels[p, : size + 1], beside[p, :size], pairs[p, :size]
        for w in range(size):
            there[w] = ((here[w] >> one) | (here[w + 1] << rest)) & followed[w]
        for w in range(size):
            here[w] &= owned[w]
            either[w] = here[w] | there[w]
    return strange == 0


@compiled
def _either(a, b, out, n):
    for p in range(n):
        one, other, both = a[p], b[p], out[p]
        for w in range(both.shape[0]):
            both[w] = one[w] | other[w]


@compiled
def _add_faces(a, b, shift, words, n, faces):
    """Add the faces between the phases of `words` words of `a` and those of `b`, `shift` words further on."""
    for i in range(n):
        for j in range(i + 1, n):
            ai, aj, bi, bj = a[i, :words], a[j, :words], b[i, shift : shift + words], b[j, shift : shift + words]
            found = np.uint64(0)
            for w in range(words):
                found += popcount((ai[w] & bj[w]) | (aj[w] & bi[w]))
            faces[i * n + j] += np.int64(found)


@compiled
def _add_edges(a, b, shift, words, n, edges):
    """Add the edges whose four voxels are a pair in `a` and a pair in `b`, `shift` words further on.

    `a` and `b` hold the phases of the two voxels of a pair together.
    """
    a0, a1, a2 = a[0, :words], a[1, :words], a[2, :words]
    end = shift + words
    b0, b1, b2 = b[0, shift:end], b[1, shift:end], b[2, shift:end]
    if n == 3:
        found = np.uint64(0)
        for w in range(words):
            found += popcount((a0[w] | b0[w]) & (a1[w] | b1[w]) & (a2[w] | b2[w]))
        edges[0b0111] += np.int64(found)
        return
    a3, b3 = a[3, :words], b[3, shift:end]
    no0, no1, no2, no3, four = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
    for w in range(words):
        e0, e1, e2, e3 = a0[w] | b0[w], a1[w] | b1[w], a2[w] | b2[w], a3[w] | b3[w]
        no0 += popcount(e1 & e2 & e3 & ~e0)
        no1 += popcount(e0 & e2 & e3 & ~e1)
        no2 += popcount(e0 & e1 & e3 & ~e2)
        no3 += popcount(e0 & e1 & e2 & ~e3)
        four += popcount(e0 & e1 & e2 & e3)
    edges[0b1110] += np.int64(no0)
    edges[0b1101] += np.int64(no1)
    edges[0b1011] += np.int64(no2)
    edges[0b0111] += np.int64(no3)
    edges[0b1111] += np.int64(four)


@compiled
def _count_few(block, nz, ny, nx, n, voxels, faces, edges):
    """Count up to four phases, 64 voxels at a time.

    A slice is one bit plane per phase, and counts are population counts. The owned shape is (nz, ny, nx). `voxels` is
    (n), `faces` (3, n·n) by pair, and `edges` (3, 2ⁿ) by set of phases. The result is False where a voxel is none of 0
    … n - 1; the counts are then of no use.
    """
    rows, words = block.shape[1], (block.shape[2] + 63) // 64
    # Beyond its end a row, a slice and the volume have no phase at all (the last row and slice of zeros), so nothing
    # is counted against what is not there, and fewer than three phases are left for an edge.
    size, owned_words = (rows + 1) * words, ny * words
    here, there = np.zeros((n, size), np.uint64), np.zeros((n, size), np.uint64)
    here_pairs, there_pairs = np.zeros((n, size), np.uint64), np.zeros((n, size), np.uint64)
    beside, there_beside = np.zeros((n, size), np.uint64), np.zeros((n, size), np.uint64)
    columns = np.zeros((n, size), np.uint64)
    owned, followed = np.zeros(rows * words, np.uint64), np.zeros(rows * words, np.uint64)
    for x in range(nx):
        bit = np.uint64(1) << np.uint64(x & 63)
        owned[x >> 6 :: words] |= bit
        if x + 1 < block.shape[2]:
            followed[x >> 6 :: words] |= bit
    known = _pack_slice(block[0], owned, followed, here, beside, here_pairs, n)
    for z in range(nz):
        if z + 1 < block.shape[0]:
            known &= _pack_slice(block[z + 1], owned, followed, there, there_beside, there_pairs, n)
        else:
            there[:] = np.uint64(0)
            there_pairs[:] = np.uint64(0)
        for p in range(n):
            found, plane = np.uint64(0), here[p, :owned_words]
            for w in range(owned_words):
                found += popcount(plane[w])
            voxels[p] += np.int64(found)
        _add_faces(here, there, 0, owned_words, n, faces[0])
        _add_faces(here, here, words, owned_words, n, faces[1])
        _add_faces(here, beside, 0, owned_words, n, faces[2])
        if n > 2:
            _add_edges(here_pairs, here_pairs, words, owned_words, n, edges[0])
            _add_edges(here_pairs, there_pairs, 0, owned_words, n, edges[1])
            _either(here, there, columns, n)
            _add_edges(columns, columns, words, owned_words, n, edges[2])
        here, there = there, here
        here_pairs, there_pairs = there_pairs, here_pairs
        beside, there_beside = there_beside, beside
    return known


@compiled
def pack_bits(row, planes, first):
    """Set bit x of the words planes[k, first:] to bit k of row[x], for k below 4."""
    whole = row.shape[0] // 64
    for word in range(whole):
        planes[0, first + word] = _low_bits(row, 64 * word)
        planes[1, first + word] = _high_bits(row, 64 * word)
        planes[2, first + word] = _third_bits(row, 64 * word)
        planes[3, first + word] = _fourth_bits(row, 64 * word)
    if row.shape[0] % 64:
        for k in range(4):
            bits = np.uint64(0)
            for x in range(64 * whole, row.shape[0]):
                bits |= np.uint64((row[x] >> k) & 1) << np.uint64(x & 63)
            planes[k, first + whole] = bits


@compiled
def _unequal(a, b, shift, out):
    """Mark in `out` the voxels whose phase in `a` differs from that in `b`, `shift` words further on."""
    a0, a1, a2, a3 = a[0], a[1], a[2], a[3]
    b0, b1, b2, b3 = b[0, shift:], b[1, shift:], b[2, shift:], b[3, shift:]
    for w in range(out.shape[0]):
        out[w] = (a0[w] ^ b0[w]) | (a1[w] ^ b1[w]) | (a2[w] ^ b2[w]) | (a3[w] ^ b3[w])


@compiled
def _unequal_in_slice(labels, followed, planes, along_x, along_y):
    """Pack the bits of a slice's phases, and mark where a voxel's phase differs from the next along x and along y."""
    rows, length = labels.shape
    words, one, rest = (length + 63) // 64, np.uint64(1), np.uint64(63)
    if length % 64:
        for y in range(rows):
            pack_bits(labels[y], planes, y * words)
    else:
        pack_bits(labels.reshape(labels.size), planes, 0)
    size = rows * words
    for k in range(4):
        here = planes[k, : size + 1]
        for w in range(size):
            step = here[w] ^ ((here[w] >> one) | (here[w + 1] << rest))
            along_x[w] = (step if k == 0 else along_x[w] | step) & followed[w]
    _unequal(planes, planes, words, along_y[: size - words])


@compiled
def _crossings(a, b, c, d, out):
    """Mark where three of the four steps around an edge, from voxel to voxel, change the phase.

    Fewer than three changes do not show three phases. Steps a and b are opposite each other, and so are c and d.
    """
    for w in range(out.shape[0]):
        out[w] = (a[w] & b[w] & (c[w] | d[w])) | (c[w] & d[w] & (a[w] | b[w]))


@compiled
def _places(found, owned, length, places):
    """List the positions in a flat slice (rows of `length`) where `found` and `owned` have a bit; return how many."""
    words, one, n = (length + 63) // 64, np.uint64(1), 0
    for y in range(owned.shape[0] // words):
        for word in range(words):
            w = y * words + word
            bits = found[w] & owned[w]
            start, end = np.uint64(y * length + 64 * word), n + int(popcount(bits))
            # Eight at a time whether there are as many or not: a branch a bit would be guessed wrong once a word.
            while True:
                for k in range(8):
                    places[n + k] = start + trailing_zeros(bits)
                    bits &= bits - one
                n += 8
                if n >= end:
                    break
            n = end
    return n


@compiled
def _add_faces_at(places, found, near, far, shift, n, faces):
    """Add the faces between voxels of the flat slices `near` and `far` at the first `found` places.

    The voxel of `far` lies `shift` further on than that of `near`.
    """
    further, phases = np.uint64(shift), np.uint64(n)
    for k in range(found):
        at = places[k]
        faces[k & 1, np.uint64(near[at]) * phases + np.uint64(far[at + further])] += 1


@compiled
def _add_edges_at(places, found, near, far, shift, edges):
    """Add the edges between two voxels of `near` and two of `far`, `shift` apart in either."""
    phase, further = np.uint64(1), np.uint64(shift)
    for k in range(found):
        at, beside = places[k], places[k] + further
        shown = (phase << near[at]) | (phase << near[beside]) | (phase << far[at]) | (phase << far[beside])
        edges[shown] += 1


@compiled
def _count_many(block, nz, ny, nx, n, voxels, faces, edges):
    """Count up to sixteen phases: 64 voxels at a time where no phase changes, one by one where one does.

    The owned shape is (nz, ny, nx). `voxels` is (n), `faces` (3, n·n) by ordered pair, and `edges` (3, 2ⁿ) by set of
    phases.
    """
    rows, length = block.shape[1], block.shape[2]
    words = (length + 63) // 64
    size, owned_words = (rows + 1) * words, ny * words
    here, there = np.zeros((4, size), np.uint64), np.zeros((4, size), np.uint64)
    # Beyond the ends nothing changes: these stay 0 there.
    here_x, there_x = np.zeros(size, np.uint64), np.zeros(size, np.uint64)
    here_y, there_y = np.zeros(size, np.uint64), np.zeros(size, np.uint64)
    along_z, beside, crossings = np.zeros(size, np.uint64), np.zeros(size, np.uint64), np.zeros(owned_words, np.uint64)
    owned, followed = np.zeros(owned_words, np.uint64), np.zeros(rows * words, np.uint64)
    for x in range(length):
        bit = np.uint64(1) << np.uint64(x & 63)
        if x < nx:
            owned[x >> 6 :: words] |= bit
        if x + 1 < length:
            followed[x >> 6 :: words] |= bit
    places = np.empty(owned_words * 64 + 8, np.uint64)  # unsigned: no place is looked at from the end
    pairs = np.zeros((3, 2, n * n), np.int64)  # turn by turn, since one counter cannot be added to at every cycle
    _unequal_in_slice(block[0], followed, here, here_x, here_y)
    for z in range(nz):
        last = z + 1 == block.shape[0]
        near = block[z].reshape(rows * length)
        far = near if last else block[z + 1].reshape(rows * length)
        if last:
            along_z[:] = np.uint64(0)
        else:
            _unequal_in_slice(block[z + 1], followed, there, there_x, there_y)
            _unequal(here, there, 0, along_z[: rows * words])
        _add_voxels(here, owned, n, voxels)
        _add_faces_at(places, _places(along_z, owned, length, places), near, far, 0, n, pairs[0])
        _add_faces_at(places, _places(here_y, owned, length, places), near, near, length, n, pairs[1])
        _add_faces_at(places, _places(here_x, owned, length, places), near, near, 1, n, pairs[2])
        _next_along_x(here_y, beside)
        _crossings(here_x, here_x[words:], here_y, beside, crossings)
        _add_edges_at(places, _places(crossings, owned, length, places), near, near[length:], 1, edges[0])
        if not last:
            _next_along_x(along_z, beside)
            _crossings(here_x, there_x, along_z, beside, crossings)
            _add_edges_at(places, _places(crossings, owned, length, places), near, far, 1, edges[1])
            _crossings(here_y, there_y, along_z, along_z[words:], crossings)
            _add_edges_at(places, _places(crossings, owned, length, places), near, far, length, edges[2])
        here, there = there, here
        here_x, there_x = there_x, here_x
        here_y, there_y = there_y, here_y
    for axis in range(3):
        faces[axis] += pairs[axis, 0] + pairs[axis, 1]
    for shown in range(1 << n):
        rest = shown & (shown - 1)
        if rest & (rest - 1) == 0:
            edges[:, shown] = 0  # fewer than three after all
    return True


@compiled
def _next_along_x(bits, out):
    for w in range(bits.shape[0] - 1):
        out[w] = (bits[w] >> np.uint64(1)) | (bits[w + 1] << np.uint64(63))


@compiled
def _add_voxels(planes, owned, n, voxels):
    for p in range(n):
        # Flips the bits that phase p has not.
        f0, f1 = np.uint64(0) - np.uint64(~p & 1), np.uint64(0) - np.uint64(~p >> 1 & 1)
        f2, f3 = np.uint64(0) - np.uint64(~p >> 2 & 1), np.uint64(0) - np.uint64(~p >> 3 & 1)
        b0, b1, b2, b3 = planes[0], planes[1], planes[2], planes[3]
        found = np.uint64(0)
        for w in range(owned.shape[0]):
            found += popcount((b0[w] ^ f0) & (b1[w] ^ f1) & (b2[w] ^ f2) & (b3[w] ^ f3) & owned[w])
        voxels[p] += np.int64(found)


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
        found, present = _counted(_count_few, np.ascontiguousarray(block), z, y, x, len(labels)), tuple(labels)
    if found is None:
        index, present = indexed(block, labels)
        found = _counted(_count_few if len(present) <= 4 else _count_many, index, z, y, x, len(present))
    assert found is not None
    (voxels, faces, edges), n = found, len(present)
    pairs = faces.reshape(3, n, n)
    pairs = pairs + pairs.transpose(0, 2, 1)
    iz, iy, ix = (min(o, b - 1) for o, b in zip(shape, block.shape, strict=True))
    return Counts(
        voxels={present[i]: int(voxels[i]) for i in range(n) if voxels[i]},
        faces={
            (present[i], present[j]): _ints(pairs[:, i, j])
            for i, j in combinations(range(n), 2)
            if pairs[:, i, j].any()
        },
        edges={
            tuple(label for i, label in enumerate(present) if mask >> i & 1): _ints(edges[:, mask])
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


def _ints(values: Sequence[int] | np.ndarray) -> Triple:
    z, y, x = (int(v) for v in values)
    return z, y, x


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


def add(a: Counts, b: Counts) -> Counts:
    """Add the counts of two disjoint parts.

    Parameters
    ----------
    a, b : Counts
        Counts of the two parts.

    Returns
    -------
    Counts

    Raises
    ------
    InputError
        There are more than 16 labels in total.
    """

    def merged(p: dict[Any, Any], q: dict[Any, Any]) -> dict[Any, Any]:
        return {k: _plus(p[k], q[k]) if k in p and k in q else p.get(k, q.get(k)) for k in sorted(p.keys() | q.keys())}

    total = Counts(
        merged(a.voxels, b.voxels),
        merged(a.faces, b.faces),
        merged(a.edges, b.edges),
        _plus(a.all_faces, b.all_faces),
        _plus(a.all_edges, b.all_edges),
    )
    if len(total.voxels) > MAX_PHASES:
        raise InputError(
            f"{len(total.voxels)} different labels in the volume, at most {MAX_PHASES} phases can be measured; "
            f"is this a segmented image?"
        )
    return total


def to_json(total: Counts) -> dict[str, Any]:
    """Convert counts to a JSON tree whose keys are labels, and sets of labels as `0|1|2`."""
    return {
        "voxels": {str(label): n for label, n in total.voxels.items()},
        "faces": {"|".join(map(str, pair)): list(n) for pair, n in total.faces.items()},
        "edges": {"|".join(map(str, some)): list(n) for some, n in total.edges.items()},
        "all_faces": list(total.all_faces),
        "all_edges": list(total.all_edges),
    }


def from_json(tree: Mapping[str, Any]) -> Counts:
    """Read counts from the tree that `to_json` makes.

    Parameters
    ----------
    tree : mapping
        A tree as `to_json` makes it.

    Returns
    -------
    Counts

    Raises
    ------
    KeyError, TypeError, ValueError
        The tree is anything else.
    """

    def labels(key: str) -> tuple[int, ...]:
        return tuple(int(label) for label in key.split("|"))

    faces: dict[Any, Triple] = {labels(key): _ints(n) for key, n in tree["faces"].items()}
    return Counts(
        {int(label): int(n) for label, n in tree["voxels"].items()},
        faces,
        {labels(key): _ints(n) for key, n in tree["edges"].items()},
        _ints(tree["all_faces"]),
        _ints(tree["all_edges"]),
    )


def _plus(p, q):
    return p + q if isinstance(p, int) else tuple(i + j for i, j in zip(p, q, strict=True))


def add_all(parts: Sequence[Counts]) -> Counts:
    """Add the counts of any number of disjoint parts."""
    return reduce(add, parts, Counts())


def finalize(total: Counts, voxel_size: Sequence[float], labels: Sequence[int] | None = None) -> Densities:
    """Derive lengths, areas and fractions from counts.

    Parameters
    ----------
    total : Counts
        Counts of at least one voxel.
    voxel_size : sequence of float
        Edge lengths z, y, x of a voxel.
    labels : sequence of int, optional
        The phases to list; by default those found.

    Returns
    -------
    Densities
        Lengths in the unit of `voxel_size`.
    """
    hz, hy, hx = voxel_size
    n = sum(total.voxels.values())
    assert n > 0
    volume = n * hz * hy * hx
    labels = tuple(sorted(total.labels if labels is None else labels))
    face_area, edge_length = (hy * hx, hz * hx, hz * hy), (hz, hy, hx)

    def weigh(per_axis: Sequence[int], weights: Sequence[float]) -> float:
        return sum(c * w for c, w in zip(per_axis, weights, strict=True))

    def share(number: int, of: int) -> float:
        return number / of if of else 0.0

    surface = {}
    for i in labels:
        own = [f for pair, f in total.faces.items() if i in pair]
        surface[i] = weigh([sum(f[axis] for f in own) for axis in range(3)], face_area) / volume
    all_faces, all_edges = sum(total.all_faces), sum(total.all_edges)
    tpb = [sum(e[axis] for e in total.edges.values()) for axis in range(3)]
    return Densities(
        volume_fraction={i: total.voxels.get(i, 0) / n for i in labels},
        specific_surface_faces=surface,
        specific_surface_crofton={i: s * 2 / 3 for i, s in surface.items()},
        interphase_area={
            pair: share(sum(total.faces.get(pair, (0, 0, 0))), all_faces) for pair in combinations(labels, 2)
        },
        tpb_density=weigh(tpb, edge_length) / volume,
        tpb_normalised=share(sum(tpb), all_edges),
        tpb_density_by_phases={k: weigh(e, edge_length) / volume for k, e in total.edges.items()},
        tpb_normalised_by_phases={k: share(sum(e), all_edges) for k, e in total.edges.items()},
    )


def by_metric(found: Densities) -> dict[str, dict[tuple[int, ...], float]]:
    """Return the numbers that are followed over sub-volumes: by metric, then by phase, pair, or () for the whole."""
    return {
        "volume_fraction": {(i,): v for i, v in found.volume_fraction.items()},
        "specific_surface_faces": {(i,): v for i, v in found.specific_surface_faces.items()},
        "interphase_area": {pair: v for pair, v in found.interphase_area.items()},
        "tpb_density": {(): found.tpb_density},
        "tpb_normalised": {(): found.tpb_normalised},
    }
