"""Agreement with the low-res volume in each voxel's own block: brute force, any chunking, and volumes that deceive the
imaging operator."""

from __future__ import annotations

import doctest
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from test_metrics import small_study

from hpcres import imaging
from hpcres.geometry import Box, high_res_shape
from hpcres.imaging import ImagingOperator, block_majority
from hpcres.metrics import agreement as module
from hpcres.metrics.agreement import agreement, away_from_boundary
from hpcres.metrics.schedule import connect
from hpcres.study import Imaging
from hpcres.volumes.formats import open_volume

GROUPS = {"pore + binder": (0, 2), "solid": (1,)}
UNKNOWN = 200


@pytest.fixture(scope="module")
def client():
    with connect(threads=1) as found:
        yield found


def compared(client, folder, low, sharp, **more):
    """`low_res` of metrics.json of a study whose low-res labels 5 and 9 are pore and binder, and solid."""
    low_res = {"path": str(folder / "low.npy"), "phases": {5: ["pore", "binder"], 9: "solid"}, "unknown": [UNKNOWN]}
    study = small_study(folder, low_res=low_res, **more)
    np.save(folder / "low.npy", low)
    np.save(folder / "sharp.npy", sharp)
    volumes = open_volume(folder / "low.npy"), open_volume(folder / "sharp.npy")
    return agreement(study, *volumes, client=client, progress=False)


def blocks_of(sharp, scale):
    """Each low-res voxel's own block, from a volume whose voxels are cut into q parts along each axis."""
    p, q = scale.numerator, scale.denominator
    fine = sharp.repeat(q, 0).repeat(q, 1).repeat(q, 2)
    for place in np.ndindex(*(n // p for n in fine.shape)):
        yield place, fine[tuple(slice(i * p, i * p + p) for i in place)]


def brute_force(low, sharp, scale):
    """The five entries, one low-res voxel at a time."""
    names = list(GROUPS)
    label_of = dict(zip((5, 9, UNKNOWN), (*names, None), strict=True))
    confusion = {a: dict.fromkeys(names, 0) for a in names}
    parts, away, whole = dict.fromkeys(names, 0), {}, 0
    for place, block in blocks_of(sharp, scale):
        label = label_of[int(low[place])]
        held = {name: int(np.isin(block, phases).sum()) for name, phases in GROUPS.items()}
        if label is None:
            continue
        largest = [name for name in names if held[name] == max(held.values())]
        confusion[label][label if label in largest else largest[0]] += 1
        whole += block.size
        near = {label_of[int(v)] for v in low[tuple(slice(max(0, i - 1), i + 2) for i in place)].ravel()}
        for name in names:
            parts[name] += held[name]
            kind = None if None in near else "inside" if near == {name} else "outside" if name not in near else None
            if kind:
                away.setdefault((kind, name), []).append(Fraction(held[name], block.size))
    shares = {
        kind: {name: float(sum(v) / len(v)) if (v := away.get((kind, name))) else None for name in names}
        for kind in ("inside", "outside")
    }
    right = sum(confusion[name][name] for name in names)
    return {
        "box_agreement": right / (whole // block.size),
        "box_confusion": confusion,
        "visible_fraction": {name: parts[name] / whole for name in names},
        **shares,
    }


def blobs(shape, seed, smooth):
    field = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), smooth)
    return np.digitize(field, np.quantile(field, [0.3, 0.6])).astype(np.uint8)


def coarse_of(sharp, shape, scale, seed):
    """Labels that mostly agree with the volume, with wrong and unknown ones among them."""
    random = np.random.default_rng(seed)
    place = [
        np.minimum(((np.arange(n) + 0.5) * float(scale)).astype(int), m - 1)
        for n, m in zip(shape, sharp.shape, strict=True)
    ]
    low = np.where(sharp[np.ix_(*place)] == 1, 9, 5).astype(np.uint8)
    low[random.random(shape) < 0.005] = 9
    low[random.random(shape) < 0.005] = UNKNOWN
    return low


@pytest.mark.parametrize("scale", ["4", "8/3", "2"])
def test_blocks_are_what_brute_force_counts_however_the_volume_is_cut(client, tmp_path, monkeypatch, scale):
    scale, shape = Fraction(scale), (11, 13, 8)
    sharp = blobs(high_res_shape(shape, scale), 1, 2.5 * float(scale))
    if scale == 2:  # noise: many blocks have as many voxels of either group
        sharp = np.random.default_rng(0).integers(0, 2, sharp.shape, np.uint8)
    low = coarse_of(sharp, shape, scale, 3)
    random = np.random.default_rng(4)
    sharp = np.where(random.random(sharp.shape) < 0.1, random.integers(0, 3, sharp.shape, np.uint8), sharp)
    truth = brute_force(low, sharp, scale)
    found = {}
    for edge in (1, 16, 24, 128):
        monkeypatch.setattr(module, "_BLOCK_HIGH_RES", edge)
        found[edge] = compared(client, tmp_path, low, sharp, scale=str(scale), imaging={"operator": "under-resolved"})
        assert found[edge] == found[1]
    assert {key: found[1][key] for key in truth} == truth  # ratios of the same integers
    if scale != 2:
        assert all(0.8 < share < 1 for share in truth["inside"].values())
        assert all(0 < share < 0.2 for share in truth["outside"].values())
    assert 0.5 < truth["box_agreement"] < 1
    assert sum(sum(row.values()) for row in found[1]["box_confusion"].values()) == found[1]["voxels_compared"]
    assert sum(found[1]["visible_fraction"].values()) == pytest.approx(1)


@pytest.mark.parametrize("scale", ["4", "8/3"])
def test_counts_of_a_block_are_whole_numbers_that_add_up(scale):
    scale = Fraction(scale)
    labels = torch.from_numpy(np.random.default_rng(2).integers(0, 3, (2, 16, 17, 24)))
    operator = ImagingOperator(scale, [[0, 2], [1]], Imaging())
    counts = operator.block_counts(labels)
    assert counts.dtype == torch.int32
    assert torch.equal(counts.sum(1), torch.full_like(counts[:, 0], scale.numerator**3))
    for batch in range(2):
        for place, block in blocks_of(labels[batch].numpy(), scale):
            assert counts[(batch, 1, *place)] == (block == 1).sum()
    assert torch.equal(operator.block_counts(labels[:, 8:])[:, :, 1:], counts[:, :, 1 + int(8 / scale) :])


def test_the_examples_of_imaging_are_right():
    failed, tried = doctest.testmod(imaging)
    assert failed == 0
    assert tried > 3


def test_a_tie_goes_to_the_coarse_label():
    counts = torch.tensor([[3, 3, 2], [3, 1, 4], [2, 4, 2], [3, 3, 2]]).T[None, :, :, None, None]
    labels = torch.tensor([1, 0, 2, 3])[None, :, None, None]
    assert block_majority(counts, labels).flatten().tolist() == [1, 2, 1, 0]
    assert block_majority(counts, torch.zeros_like(labels).byte()).flatten().tolist() == [0, 2, 1, 0]


def test_away_from_a_boundary_are_voxels_with_27_like_labels():
    labels = np.random.default_rng(5).choice(4, (9, 8, 7), p=[0.8, 0.1, 0.08, 0.02]).astype(np.uint8)
    found = away_from_boundary(labels, Box.whole(labels.shape), 3)
    for place in np.ndindex(labels.shape):
        near = set(labels[tuple(slice(max(0, i - 1), i + 2) for i in place)].ravel().tolist())
        for group in range(3):
            assert found[(0, group, *place)] == (near == {group})
            assert found[(1, group, *place)] == (group not in near and 3 not in near)
    own = Box((2, 0, 3), (5, 8, 6))
    around = own.grown(1, 1, Box.whole(labels.shape))
    part = away_from_boundary(labels[around.slices], own.relative_to(around.start), 3)
    assert np.array_equal(part, found[:, :, *own.slices])


def hidden(low, keep):
    """A volume at scale factor 8 in which pore is solid where `keep` says no, of each block's voxels."""
    blocks = np.where(low[:, None, :, None, :, None] == 9, 1, np.where(keep[None, :, None, :, None, :], 0, 1))
    return blocks.reshape([8 * n for n in low.shape]).astype(np.uint8)


def corners(edge):
    """Voxels of a block of 8³ but for cubes of `edge`³ at its corners."""
    end = (np.arange(8) < edge) | (np.arange(8) >= 8 - edge)
    return ~(end[:, None, None] & end[:, None] & end)


def test_a_surplus_at_the_corners_of_blocks_agrees_and_is_found(client, tmp_path):
    """The published operator weighs the corners of 3³, 42 % of a block of 8³, with 12 %."""
    low = np.full((6, 6, 6), 5, np.uint8)
    low[4:] = 9
    honest, surplus = (
        compared(client, tmp_path, low, hidden(low, keep), scale=8, imaging={"operator": "under-resolved"})
        for keep in (np.ones((8, 8, 8), bool), corners(3))
    )
    assert honest["agreement"] == honest["box_agreement"] == surplus["agreement"] == surplus["box_agreement"] == 1
    assert surplus["of_volume"] == surplus["volume_fraction"]
    assert honest["visible_fraction"] == honest["volume_fraction"]
    assert (honest["inside"]["pore + binder"], honest["outside"]["solid"]) == (1, 0)
    share = 8 * 3**3 / 8**3
    assert surplus["visible_fraction"]["solid"] == pytest.approx(1 / 3 + 2 / 3 * share)
    assert surplus["outside"] == {"pore + binder": 0, "solid": share}
    assert surplus["inside"] == {"pore + binder": 1 - share, "solid": 1}


def test_a_majority_at_the_faces_of_blocks_agrees_and_is_found(client, tmp_path):
    """The published operator weighs the outer shell, 58 % of a block of 8³, with 8 %."""
    low = np.full((6, 6, 6), 5, np.uint8)
    low[4:] = 9
    core = np.zeros((8, 8, 8), bool)
    core[1:7, 1:7, 1:7] = True
    found = compared(client, tmp_path, low, hidden(low, core), scale=8, imaging={"operator": "under-resolved"})
    assert found["agreement"] == 1
    assert found["box_agreement"] == pytest.approx(1 / 3)
    assert found["box_confusion"] == {
        "pore + binder": {"pore + binder": 0, "solid": 144},
        "solid": {"pore + binder": 0, "solid": 72},
    }
    assert found["outside"]["solid"] == 1 - 6**3 / 8**3


def test_where_no_voxel_is_away_from_a_boundary_nothing_is_said(client, tmp_path):
    low = np.array([5, 9], np.uint8)[np.indices((4, 4, 4)).sum(0) % 2]
    found = compared(client, tmp_path, low, (low == 9).astype(np.uint8).repeat(2, 0).repeat(2, 1).repeat(2, 2))
    assert found["box_agreement"] == 1
    assert found["inside"] == found["outside"] == {"pore + binder": None, "solid": None}
