"""Spatial statistics against brute force and closed forms; any chunking equals the whole."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from hpcres.metrics.named import Named
from hpcres.metrics.schedule import connect
from hpcres.metrics.statistics import Statistics, described, statistics
from hpcres.volumes import open_volume

ALL = ("correlations", "chords", "connectivity")


@pytest.fixture(scope="module")
def client():
    with connect(threads=2) as local:
        yield local


def plain_pairs(a: np.ndarray, labels: list[int], lags: int) -> tuple[np.ndarray, np.ndarray]:
    s2, fitting = np.zeros((3, lags + 1, len(labels), len(labels)), int), np.zeros((3, lags + 1), int)
    for axis in range(3):
        b = np.moveaxis(a, axis, 0)
        for r in range(min(lags + 1, len(b))):
            first, second = b[: len(b) - r], b[r:]
            fitting[axis, r] = first.size
            for i, p in enumerate(labels):
                for j, q in enumerate(labels):
                    s2[axis, r, i, j] = np.count_nonzero((first == p) & (second == q))
    return s2, fitting


def plain_chords(a: np.ndarray, labels: list[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Line by line, voxel by voxel."""
    whole, cut = ([np.zeros((len(labels), n + 1), int) for n in a.shape] for _ in range(2))
    for axis in range(3):
        n = a.shape[axis]
        for line in np.moveaxis(a, axis, -1).reshape(-1, n):
            ends = [0, *(np.flatnonzero(np.diff(line)) + 1), n]
            for begin, end in pairwise(ends):
                to = cut if begin == 0 or end == n else whole
                to[axis][labels.index(int(line[begin])), end - begin] += 1
    return whole, cut


def plain_connected(a: np.ndarray, label: int) -> tuple[int, int, int, tuple[int, ...]]:
    marked, count = ndimage.label(a == label)
    sizes = np.bincount(marked.ravel(), minlength=count + 1)[1:]
    through = []
    for axis in range(3):
        ends = set(np.unique(marked.take(0, axis))) & set(np.unique(marked.take(-1, axis))) - {0}
        through.append(int(sum(sizes[k - 1] for k in ends)))
    return int(sizes.sum()), count, int(sizes.max(initial=0)), tuple(through)


def structure(seed: int, shape: tuple[int, int, int], labels: list[int]) -> np.ndarray:
    """Noise, smoothed over 0 to 2 voxels, cut into phases of unequal shares."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.standard_normal(shape), rng.choice([0, 0.6, 2.0]))
    levels = np.quantile(smooth, np.sort(rng.random(len(labels) - 1)))
    return np.array(labels, np.uint8)[np.digitize(smooth, levels)]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 90)),
    block=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 90)),
    labels=st.lists(st.integers(0, 255), min_size=1, max_size=5, unique=True).map(sorted),
    lags=st.integers(0, 80),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_chunking_gives_the_statistics_of_plain_numpy(client, tmp_path_factory, shape, block, labels, lags, seed):
    block = tuple(max(b, -(-n // 3)) for b, n in zip(block, shape, strict=True))  # few enough tasks for a test
    a = structure(seed, shape, labels)
    path = tmp_path_factory.getbasetemp() / "any.npy"
    np.save(path, a)
    found = statistics(
        open_volume(path), client=client, labels=labels, which=ALL, lags=lags, block=block, progress=False
    )
    assert found.s2 is not None
    assert found.fitting is not None
    assert found.connected is not None
    s2, fitting = plain_pairs(a, labels, lags)
    assert np.array_equal(found.s2, s2)
    assert np.array_equal(found.fitting, fitting)
    whole, cut = plain_chords(a, labels)
    for axis in range(3):
        assert np.array_equal(found.whole[axis], whole[axis])
        assert np.array_equal(found.cut[axis], cut[axis])
    for label, one in zip(labels, found.connected, strict=True):
        assert (one.voxels, one.clusters, one.largest, one.percolating) == plain_connected(a, label)


def measured(client, tmp_path, a: np.ndarray, block=None, **options) -> Statistics:
    np.save(tmp_path / "a.npy", a)
    labels = options.pop("labels", sorted(int(v) for v in np.unique(a)))
    return statistics(
        open_volume(tmp_path / "a.npy"), client=client, labels=labels, which=ALL, block=block, progress=False, **options
    )


def test_layers_in_closed_form(client, tmp_path):
    """Layers of 3 and 5 voxels normal to y: S2 repeats every 8, chords are 3 and 5 along y and whole lines besides."""
    layers = np.tile(np.repeat(np.array([0, 1], np.uint8), (3, 5)), 4)
    a = np.broadcast_to(layers[None, :, None], (6, 32, 10)).copy()
    found = measured(client, tmp_path, a, (4, 7, 10), lags=16)
    result = described(found, Named({0: "a", 1: "b"}, (1.0, 0.5, 2.0), "nanometer"))
    s2 = np.array(result["correlations"]["counts"]["y"]["a|a"]) / result["correlations"]["pairs"]["y"]
    assert s2[0] == 3 / 8
    assert s2[8] == 9 / 24
    assert s2[16] == 6 / 16
    assert s2[3] == 0
    assert result["correlations"]["counts"]["x"]["a|b"] == [0] * 17
    chords = result["chords"]["y"]["a"]
    assert chords["whole"] == {"length": [3], "count": [3 * 60]}
    assert chords["cut"] == {"length": [3], "count": [60]}
    assert chords["mean_length"] == pytest.approx(3 * 0.5e-3)
    assert chords["voxel_share_cut"] == 0.25
    assert result["chords"]["z"]["b"]["cut"] == {"length": [6], "count": [20 * 10]}
    assert result["chords"]["z"]["b"]["mean_length"] is None
    assert result["connectivity"]["b"] == {
        "clusters": 4, "largest_share": 0.25, "percolating_share": {"z": 1.0, "y": 0.0, "x": 1.0},
    }  # fmt: skip


def test_a_cluster_that_winds_through_every_block_is_one(client, tmp_path):
    """A path that turns back and forth, one voxel thick: cut anywhere, it is one cluster and percolates."""
    a = np.zeros((3, 21, 20), np.uint8)
    a[1, ::2] = 1
    a[1, 1::4, -1] = a[1, 3::4, 0] = 1
    for block in ((3, 21, 20), (1, 4, 7), (2, 1, 3)):
        found = measured(client, tmp_path, a, block)
        assert found.connected[1].clusters == 1
        assert found.connected[1].percolating == (0, 11 * 20 + 10, 11 * 20 + 10)


def test_a_phase_that_does_not_occur_is_there_with_nothing(client, tmp_path):
    a = np.zeros((5, 6, 7), np.uint8)
    found = measured(client, tmp_path, a, labels=[0, 1], lags=2)
    result = described(found, Named({0: "a", 1: "b"}, (1.0,) * 3, "voxel"))
    assert result["connectivity"]["b"]["clusters"] == 0
    assert result["chords"]["z"]["b"]["mean_length"] is None
    assert result["correlations"]["counts"]["z"]["b|b"] == [0, 0, 0]
    assert result["correlations"]["counts"]["z"]["a|a"] == result["correlations"]["pairs"]["z"] == [210, 168, 126]
