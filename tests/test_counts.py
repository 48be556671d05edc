"""Voxels, faces and edges against plain numpy, closed forms and TauFactor, however a volume is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_volumes import plain_counts

from hpcres.counting import counts, totals
from hpcres.errors import InputError
from hpcres.geometry import Box, blocks, following


def by_blocks(a: np.ndarray, block: tuple[int, int, int]) -> totals.Counts:
    """Each block with a margin of one voxel where the volume goes on."""
    parts = [counts.count(a[box.grown(0, 1, Box.whole(a.shape)).slices], box.shape) for box in blocks(a.shape, block)]
    return totals.add_all(parts[::-1])


def by_rims(a: np.ndarray, block: tuple[int, int, int], periodic=(False, False, False)) -> totals.Counts:
    """Each block once, its last planes with the first planes of those beyond."""
    boxes = blocks(a.shape, block)
    inner = [counts.count_inner(np.array_split(a[box.slices], -(-box.shape[0] // 2))) for box in boxes]
    parts, rims = [part for part, _ in inner], [rim for _, rim in inner]
    for rim, near in zip(rims, following(boxes, a.shape, periodic), strict=True):
        parts.append(counts.count_rim(rim, {step: rims[at] for step, at in near.items()}))
    return totals.add_all(parts)


edge = st.integers(1, 9)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(edge, edge, edge),
    block=st.tuples(edge, edge, edge),
    labels=st.lists(st.integers(-100, 100), min_size=1, max_size=16, unique=True),
    dtype=st.sampled_from([np.int8, np.int16, np.int64]),
    voxel_size=st.tuples(*[st.floats(0.1, 10)] * 3),
    periodic=st.tuples(*[st.booleans()] * 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_chunking_gives_the_counts_of_the_whole_and_those_of_plain_numpy(
    shape, block, labels, dtype, voxel_size, periodic, seed
):
    a = np.random.default_rng(seed).choice(np.array(labels, dtype), shape)
    whole = counts.count(a)
    assert by_blocks(a, block) == by_rims(a, block) == whole == plain_counts(a)
    assert totals.finalize(by_rims(a, block), voxel_size) == totals.finalize(whole, voxel_size)
    assert by_rims(a, block, periodic) == plain_counts(a, periodic)


def test_many_labels_in_wide_rows_match_plain_numpy():
    rng = np.random.default_rng(1)
    for n in (2, 3, 4, 5, 16):
        a = rng.integers(0, n, (7, 6, 201)).astype(np.uint8)
        a[2:5, :, 30:170] = 1  # long uniform runs, as in a real image
        assert counts.count(a) == counts.count(a, labels=range(n)) == plain_counts(a)
        assert by_blocks(a, (3, 4, 65)) == plain_counts(a)


def test_taufactor_counts_the_same_faces_and_tpb_edges():
    from taufactor import metrics

    a = np.random.default_rng(4).integers(0, 3, (12, 13, 14)).astype(np.int8)
    total = counts.count(a)
    areas = metrics.interfacial_areas(a, normalize=False, device="cpu")
    assert areas == {pair: sum(n) for pair, n in total.faces.items()}
    tpb = float(metrics.triple_phase_boundary(a))
    assert totals.finalize(total, (1, 1, 1)).tpb_normalised == pytest.approx(tpb, rel=1e-6)


def test_where_sides_meet_every_voxel_has_one_edge_along_each_axis():
    a = np.zeros((4, 6, 8), np.uint8)
    a[2:] = 1
    assert by_rims(a, (3, 4, 5), (True, True, True)).all_edges == (192, 192, 192)


def test_checkerboard_has_every_face_between_the_phases():
    a = (np.indices((4, 5, 6)).sum(0) % 2).astype(np.uint8)
    found = totals.finalize(counts.count(a), (1, 1, 1))
    assert found.interphase_area[0, 1] == 1.0
    assert found.tpb_density == 0.0
    assert found.specific_surface_faces[0] == (3 * 5 * 6 + 4 * 4 * 6 + 4 * 5 * 5) / 120


def test_layers_have_their_area_along_one_axis_only():
    a = np.zeros((8, 5, 7), np.uint8)
    a[3:5] = 1  # two interfaces normal to z
    total = counts.count(a)
    assert total.faces == {(0, 1): (2 * 5 * 7, 0, 0)}
    found = totals.finalize(total, (2.0, 3.0, 5.0))
    assert found.specific_surface_faces[1] == pytest.approx(2 / (8 * 2.0), rel=1e-14)
    assert found.specific_surface_crofton[1] == pytest.approx(4 / 3 / (8 * 2.0), rel=1e-14)


def test_one_box_has_the_surface_of_a_cuboid_with_anisotropic_voxels():
    a = np.zeros((10, 11, 12), np.uint8)
    a[2:5, 3:7, 4:9] = 1
    hz, hy, hx = 0.5, 2.0, 3.0
    bz, by, bx = 3 * hz, 4 * hy, 5 * hx
    found = totals.finalize(counts.count(a), (hz, hy, hx))
    volume = a.size * hz * hy * hx
    assert found.specific_surface_faces[1] == pytest.approx(2 * (bz * by + by * bx + bz * bx) / volume, rel=1e-14)
    assert found.volume_fraction == {0: 1 - 60 / a.size, 1: 60 / a.size}


@pytest.mark.parametrize(("axis", "length"), [(0, 0.5), (1, 2.0), (2, 3.0)])
def test_three_phases_meeting_in_one_line_have_its_length(axis, length):
    """Two quarter spaces and a half space share one straight line through the volume."""
    a = np.zeros((6, 6, 6), np.uint8)
    a[:, :3], a[:, 3:, :3], a[:, 3:, 3:] = 0, 1, 2
    a = np.moveaxis(a, 0, axis)
    total = counts.count(a)
    assert total.edges[0, 1, 2] == tuple(6 if k == axis else 0 for k in range(3))
    found = totals.finalize(total, (0.5, 2.0, 3.0))
    assert found.tpb_density == pytest.approx(6 * length / (216 * 3.0), rel=1e-14)
    assert found.tpb_normalised == 6 / (3 * 6 * 25)


def test_slabs_of_three_phases_never_meet_in_a_line():
    a = np.repeat([0, 1, 2], 3).astype(np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    assert counts.count(a).edges == {}
    assert totals.finalize(counts.count(a), (1, 1, 1)).interphase_area == {
        (0, 1): 16 / (8 * 16 + 2 * 9 * 12),
        (0, 2): 0.0,
        (1, 2): 16 / (8 * 16 + 2 * 9 * 12),
    }


def test_an_edge_of_four_phases_counts_once_and_under_its_own_name():
    a = np.array([[[0, 1], [2, 3]]] * 5, np.uint8)
    total = counts.count(a)
    assert total.edges == {(0, 1, 2, 3): (5, 0, 0)}
    assert totals.finalize(total, (1, 1, 1)).tpb_normalised == 5 / sum(total.all_edges)


def test_labels_that_cannot_be_phases_are_refused():
    with pytest.raises(InputError, match="17 different labels"):
        counts.count(np.arange(17, dtype=np.uint8).reshape(1, 1, 17))
    with pytest.raises(InputError, match="17 different labels"):
        by_blocks(np.arange(17, dtype=np.int16).reshape(1, 1, 17), (1, 1, 4))
    with pytest.raises(InputError, match="label 7"):
        counts.count(np.array([[[0, 1, 7]]], np.uint8), labels=(0, 1))
