"""Every voxel in exactly one tile, every tile whole chunks, every share within one of the others."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcres.errors import InputError
from hpcres.geometry import Box, Piece, blocks, pieces_of, plan_tiles, tiles_of_rank

edges = st.integers(1, 40)
scales = st.sampled_from([Fraction(64, d) for d in range(2, 65)])
any_boundaries = st.tuples(*[st.sampled_from(["replicate", "periodic", "mirror"])] * 3)


@settings(max_examples=80, deadline=None)
@given(st.tuples(edges, edges, edges), scales, st.tuples(*[st.integers(1, 5)] * 3), st.integers(0, 9))
def test_tiles_partition_both_grids(low_res_shape, scale, tiles, halo):
    plan = plan_tiles(low_res_shape, scale, tiles, halo, 64)
    q = scale.denominator
    owner = np.zeros(plan.low_res_shape, np.uint8)
    for tile in plan.tiles:
        owner[tile.core.slices] += 1
        assert all(a % q == 0 for a in tile.read.start)
        assert all(w % t == 0 for w, t in zip(tile.write.start, plan.tile_voxels, strict=True))
        assert all(b % t == 0 or b == n for b, t, n in zip(tile.write.stop, plan.tile_voxels, plan.shape, strict=True))
        for axis in range(3):
            assert tile.read.start[axis] in (0, tile.core.start[axis] - -(-halo // q) * q) or (
                tile.read.start[axis] == 0
            )
            assert tile.read.stop[axis] == min(tile.core.stop[axis] + halo, low_res_shape[axis])
    assert (owner == 1).all()
    assert sum(t.write.voxels for t in plan.tiles) == np.prod(plan.shape)
    assert all(t % 64 == 0 for t in plan.tile_voxels)
    assert all(g <= t for g, t in zip(plan.grid, tiles, strict=True))


@given(st.integers(0, 50), st.integers(1, 12))
def test_shares_are_even_and_complete(tiles, ranks):
    shares = [tiles_of_rank(tiles, rank, ranks) for rank in range(ranks)]
    assert [t for share in shares for t in share] == list(range(tiles))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_blocks_cover_a_ragged_volume_once():
    seen = np.zeros((7, 9, 4), int)
    for block in blocks(seen.shape, (3, 4, 8)):
        seen[block.slices] += 1
    assert (seen == 1).all()


def test_box_clipping_of_disjoint_boxes_is_empty():
    assert Box((0, 0, 0), (2, 2, 2)).clipped(Box((5, 5, 5), (7, 7, 7))).voxels == 0


@pytest.mark.parametrize(
    ("tiles", "chunk", "words"), [((0, 1, 1), 64, "at least one tile"), ((1, 1, 1), 33, "use a multiple of 16")]
)
def test_impossible_plans_are_refused_in_words(tiles, chunk, words):
    with pytest.raises(InputError, match=words):
        plan_tiles((30, 30, 30), Fraction(16, 3), tiles, 5, chunk)


@settings(max_examples=80, deadline=None)
@given(st.tuples(edges, edges, edges), scales, st.tuples(*[st.integers(1, 4)] * 3), st.integers(0, 60), any_boundaries)
def test_windows_hold_the_whole_halo_beyond_a_face_that_is_no_end(lengths, scale, tiles, halo, boundaries):
    q = scale.denominator
    low_res_shape = [-(-n // q) * q if b == "periodic" else n for n, b in zip(lengths, boundaries, strict=True)]
    plan = plan_tiles(low_res_shape, scale, tiles, halo, 64, boundaries)
    assert plan.endless == tuple(b != "replicate" for b in boundaries)
    before = -(-halo // q) * q
    for tile in plan.tiles:
        for axis, n in enumerate(low_res_shape):
            start, stop = tile.core.start[axis] - before, tile.core.stop[axis] + halo
            expected = (start, stop) if plan.endless[axis] else (max(start, 0), min(stop, n))
            assert (tile.read.start[axis], tile.read.stop[axis]) == expected


@settings(max_examples=200, deadline=None)
@given(*[st.tuples(*[st.integers(*range_)] * 3) for range_ in ((1, 6), (-25, 25), (1, 20))], any_boundaries)
def test_pieces_are_the_volume_repeated_or_mirrored_without_end(shape, start, extent, boundaries):
    volume = np.arange(np.prod(shape)).reshape(shape)
    stop = [a + n for a, n in zip(start, extent, strict=True)]
    for axis, boundary in enumerate(boundaries):
        if boundary == "replicate":  # the window ends where the volume does
            start = (*start[:axis], 0, *start[axis + 1 :])
            stop[axis] = shape[axis]
    box = Box(start, tuple(stop))
    window = np.full(box.shape, -1)
    for piece in pieces_of(box, shape, boundaries):
        assert piece.source.clipped(Box.whole(shape)) == piece.source
        assert (window[piece.place.slices] == -1).all()
        window[piece.place.slices] = volume[piece.source.slices][tuple(slice(None, None, s) for s in piece.steps)]
    beyond = {"replicate": 0, "periodic": 45, "mirror": 45}
    for axis, boundary in enumerate(boundaries):
        pad = [(0, 0)] * 3
        pad[axis] = (beyond[boundary],) * 2
        volume = np.pad(volume, pad, mode="wrap" if boundary == "periodic" else "symmetric")
    where = [slice(a + beyond[kind], b + beyond[kind]) for a, b, kind in zip(start, stop, boundaries, strict=True)]
    assert (window == volume[tuple(where)]).all()


@pytest.mark.parametrize("boundary", ["replicate", "periodic", "mirror"])
def test_a_box_inside_is_one_piece(boundary):
    box = Box((0, 2, 3), (4, 5, 6))
    assert pieces_of(box, (4, 5, 6), (boundary,) * 3) == [Piece(box, box.relative_to(box.start), (1, 1, 1))]


def test_periodic_length_must_be_whole_high_res_voxels():
    with pytest.raises(InputError, match=r"periodic along y with 31 low-res voxels.*multiple of 5"):
        plan_tiles((30, 31, 31), Fraction(8, 5), (1, 1, 1), 5, 64, ("replicate", "periodic", "mirror"))


@settings(max_examples=80, deadline=None)
@given(st.tuples(edges, edges, edges), scales, st.tuples(*[st.integers(1, 4)] * 3), st.integers(1, 6))
def test_shifted_tiles_straddle_the_faces(low_res_shape, scale, tiles, times):
    plan = plan_tiles(low_res_shape, scale, tiles, 5, 64 * times)
    p, q = scale.numerator, scale.denominator
    seen = np.zeros(plan.shape, np.uint8)
    shifted = plan.shifted()
    for tile in shifted:
        seen[tile.write.slices] += 1
        assert all(a % q == 0 and b % p == 0 for a, b in zip(tile.core.start, tile.write.start, strict=True))
        assert all(n <= edge for n, edge in zip(tile.write.shape, plan.tile_voxels, strict=True))
    assert seen.max(initial=0) <= 1
    assert bool(shifted) == any(
        min(edge // p, n // q) > 1 for n, edge in zip(low_res_shape, plan.tile_voxels, strict=True)
    )
    if shifted:  # every face between two tiles is inside some shifted tile, unless the volume is q voxels thin there
        for axis, (n, edge) in enumerate(zip(plan.shape, plan.tile_voxels, strict=True)):
            if min(edge, n) >= 2 * p:
                starts = {tile.write.start[axis] for tile in shifted}
                assert not starts & set(range(0, n, edge))
                assert min(starts) < edge
