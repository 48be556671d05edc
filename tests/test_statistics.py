"""Spatial statistics against brute force and closed forms; any chunking equals the whole."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, sparse
from scipy.sparse.csgraph import dijkstra
from test_metrics import dask_cluster

from hpcres.counting.named import Named
from hpcres.metrics import geodesic as paths
from hpcres.metrics.geodesic import Paths, geodesic
from hpcres.metrics.representative import cells, fitted, representative
from hpcres.metrics.schedule import connect
from hpcres.metrics.shortest_paths import lengths_of_steps
from hpcres.metrics.spectrum import radial_magnitude, spectrum
from hpcres.metrics.statistics import Statistics, described, measure_statistics, statistics
from hpcres.study import Metrics, Representative
from hpcres.volumes.formats import open_volume

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
    path = tmp_path_factory.mktemp("any") / "a.npy"  # an open file is mapped, so that it must not change
    np.save(path, a)
    found = statistics(
        open_volume(path), client=client, labels=labels, which=ALL, lags=lags, block=block, progress=False
    )
    assert found.counts is not None
    assert found.pairs is not None
    assert found.connectivity is not None
    s2, fitting = plain_pairs(a, labels, lags)
    assert np.array_equal(found.counts, s2)
    assert np.array_equal(found.pairs, fitting)
    whole, cut = plain_chords(a, labels)
    for axis in range(3):
        assert np.array_equal(found.whole[axis], whole[axis])
        assert np.array_equal(found.cut[axis], cut[axis])
    for label, one in zip(labels, found.connectivity, strict=True):
        assert (one.voxels, one.clusters, one.largest, one.percolating) == plain_connected(a, label)


def measured(client, tmp_path, a: np.ndarray, block=None, **options) -> Statistics:
    np.save(tmp_path / "a.npy", a)
    labels = options.pop("labels", sorted(int(v) for v in np.unique(a)))
    return statistics(
        open_volume(tmp_path / "a.npy"), client=client, labels=labels, which=ALL, block=block, progress=False, **options
    )


def test_a_worker_killed_in_mid_run_costs_a_retry_and_not_a_digit(client, tmp_path):
    """What waits between blocks is lost with the worker that held it, and is made again from the blocks before."""
    a = structure(6, (60, 56, 88), [0, 1, 2])
    np.save(tmp_path / "a.npy", a)
    volume, killed = open_volume(tmp_path / "a.npy"), []
    chosen: dict[str, Any] = {"labels": [0, 1, 2], "which": ALL, "lags": 12, "progress": False}
    with dask_cluster(tmp_path, 2) as (file, started), connect(str(file)) as remote:
        remote.wait_for_workers(2, timeout=60)
        doomed = next(at for at, worker in remote.scheduler_info()["workers"].items() if worker["name"] == "w0")

        def kill_a_worker_that_holds_planes():
            while not any("_seam" in key for key in remote.has_what([doomed])[doomed]):
                time.sleep(0.01)
            started["w0"].send_signal(signal.SIGKILL)
            killed.append(remote.processing([doomed])[doomed])

        killer = threading.Thread(target=kill_a_worker_that_holds_planes, daemon=True)
        killer.start()
        found = statistics(volume, client=remote, block=(12, 14, 11), **chosen)
        killer.join(timeout=10)
        assert started["w0"].wait(timeout=10) == -signal.SIGKILL
        assert killed[0], "the worker had nothing left to do: kill it sooner"
        assert len(remote.scheduler_info()["workers"]) == 1
    here = statistics(volume, client=client, **chosen)
    for name in ("counts", "pairs", "whole", "cut"):
        for one, other in zip(getattr(found, name), getattr(here, name), strict=True):
            assert np.array_equal(one, other)
    assert found.connectivity == here.connectivity
    assert [one.clusters for one in found.connectivity] == [plain_connected(a, label)[1] for label in (0, 1, 2)]
    assert np.array_equal(found.counts, plain_pairs(a, [0, 1, 2], 12)[0])


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
        "clusters": 4,
        "largest_share": 0.25,
        "percolating_share": {"z": 1.0, "y": 0.0, "x": 1.0},
    }


def test_the_error_of_a_mean_chord_covers_its_scatter_over_independent_volumes(client, tmp_path):
    """Chords side by side cut the same grain: taken for independent they would promise several times too much."""
    rng, means, errors = np.random.default_rng(7), [], []
    for k in range(16):
        smooth = ndimage.gaussian_filter(rng.standard_normal((56, 56, 56)), 2.0, mode="wrap")
        np.save(tmp_path / f"{k}.npy", (smooth > 0.02).astype(np.uint8))
        volume = open_volume(tmp_path / f"{k}.npy")
        found = statistics(volume, client=client, labels=[0, 1], which=["chords"], progress=False)
        chords = described(found, Named({0: "a", 1: "b"}, (2.0, 2.0, 2.0), "micrometer"))["chords"]
        both = [
            (chords[axis][phase]["mean_length"], chords[axis][phase]["standard_error"])
            for axis in "zyx"
            for phase in "ab"
        ]
        means.append([mean for mean, _ in both])
        errors.append([error for _, error in both])
    ratio = np.mean(errors, axis=0) / np.std(means, axis=0, ddof=1)
    assert np.all((ratio > 0.9) & (ratio < 5)), ratio


def test_a_cluster_that_winds_through_every_block_is_one(client, tmp_path):
    """A path that turns back and forth, one voxel thick: cut anywhere, it is one cluster and percolates."""
    a = np.zeros((3, 21, 20), np.uint8)
    a[1, ::2] = 1
    a[1, 1::4, -1] = a[1, 3::4, 0] = 1
    for block in ((3, 21, 20), (1, 4, 7), (2, 1, 3)):
        found = measured(client, tmp_path, a, block)
        assert found.connectivity[1].clusters == 1
        assert found.connectivity[1].percolating == (0, 11 * 20 + 10, 11 * 20 + 10)


def test_a_phase_that_does_not_occur_is_there_with_nothing(client, tmp_path):
    a = np.zeros((5, 6, 7), np.uint8)
    found = measured(client, tmp_path, a, labels=[0, 1], lags=2)
    result = described(found, Named({0: "a", 1: "b"}, (1.0,) * 3, "voxel"))
    assert result["connectivity"]["b"]["clusters"] == 0
    assert result["chords"]["z"]["b"]["mean_length"] is None
    assert result["correlations"]["counts"]["z"]["b|b"] == [0, 0, 0]
    assert result["correlations"]["counts"]["z"]["a|a"] == result["correlations"]["pairs"]["z"] == [210, 168, 126]


def plain_paths(a: np.ndarray, phase: int, axis: int, neighbours: int, lengths) -> dict[str, Paths]:
    """scipy's Dijkstra on the graph of the whole volume, with the same integer lengths."""
    number = np.arange(a.size).reshape(a.shape)
    rows, columns, weights = [], [], []
    for step, weight in zip(*lengths_of_steps(neighbours, lengths), strict=True):
        here = tuple(slice(max(-s, 0), n - max(s, 0)) for s, n in zip(step, a.shape, strict=True))
        there = tuple(slice(max(s, 0), n - max(-s, 0)) for s, n in zip(step, a.shape, strict=True))
        both = (a[here] == phase) & (a[there] == phase)
        rows.append(number[here][both])
        columns.append(number[there][both])
        weights.append(np.full(int(both.sum()), weight))
    graph = sparse.csr_array(
        (np.concatenate(weights).astype(float), (np.concatenate(rows), np.concatenate(columns))), (a.size, a.size)
    )
    own = a.ravel() == phase

    def to(place: int) -> np.ndarray:
        start = number.take(place, axis)[a.take(place, axis) == phase]
        if not start.size:
            return np.full(a.size, np.inf)
        return dijkstra(graph, indices=start, min_only=True)

    def mean(lengths: np.ndarray) -> Paths:
        reached = lengths[np.isfinite(lengths)]
        return Paths(reached.size, int(reached.sum()), lengths.size - reached.size)

    low, high = to(0), to(-1)
    first, last = (number.take(place, axis)[a.take(place, axis) == phase] for place in (0, -1))
    return {"inlet": mean(high[first]), "outlet": mean(low[last]), "whole": mean((low + high)[own])}


@settings(max_examples=12, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 11)] * 3),
    block=st.tuples(*[st.integers(2, 6)] * 3),
    phases=st.integers(2, 4),
    neighbours=st.sampled_from([6, 26]),
    lengths=st.sampled_from([(1.0, 1.0, 1.0), (2.0, 1.0, 1.3)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_chunking_gives_the_paths_of_dijkstra_over_the_whole(
    client, tmp_path_factory, shape, block, phases, neighbours, lengths, seed
):
    block = tuple(max(b, -(-n // 3)) for b, n in zip(block, shape, strict=True))
    labels = list(range(phases))
    a = structure(seed, shape, labels)
    path = tmp_path_factory.mktemp("paths") / "a.npy"
    np.save(path, a)
    found = geodesic(
        open_volume(path),
        client=client,
        labels=labels,
        neighbours=neighbours,
        lengths=lengths,
        block=block,
        progress=False,
    )
    for axis, name in enumerate("zyx"):
        for phase in labels:
            assert found[name][phase] == plain_paths(a, phase, axis, neighbours, lengths)


def test_straight_and_winding_paths_in_closed_form(client, tmp_path):
    """A uniform phase has 1 however its voxels are shaped. Along y a path that turns back and forth has to go
    through every row; through faces that is 10 rows of 19 steps and 20 steps along y."""
    a = np.zeros((3, 21, 20), np.uint8)
    np.save(tmp_path / "uniform.npy", a)
    uniform = open_volume(tmp_path / "uniform.npy")
    for neighbours in (6, 26):
        found = geodesic(
            uniform,
            client=client,
            labels=[0],
            neighbours=neighbours,
            lengths=(3.0, 1.0, 2.0),
            block=(2, 8, 7),
            progress=False,
        )
        result = paths.described(found, ["all"], a.shape, (3.0, 1.0, 2.0), neighbours)
        assert all(result[axis]["all"][form]["tau"] == 1 for axis in "zyx" for form in ("inlet", "outlet", "whole"))
    a[1, ::2] = 1
    a[1, 1::4, -1] = a[1, 3::4, 0] = 1
    a[1, 4, 4] = 2
    np.save(tmp_path / "a.npy", a)
    winding = open_volume(tmp_path / "a.npy")
    found = geodesic(winding, client=client, labels=[0, 1, 2], neighbours=6, block=(3, 5, 6), progress=False)
    result = paths.described(found, ["a", "b", "c"], a.shape, (1.0, 1.0, 1.0), 6)
    assert result["y"]["b"]["inlet"] == {"tau": None, "voxels": 0, "unreachable": 20}
    a[1, 4, 4] = 1
    np.save(tmp_path / "b.npy", a)
    mended = open_volume(tmp_path / "b.npy")
    found = geodesic(mended, client=client, labels=[0, 1], neighbours=6, block=(3, 5, 6), progress=False)
    result = paths.described(found, ["a", "b"], a.shape, (1.0, 1.0, 1.0), 6)
    # From the first row's voxel x to its end, 19 − x; then nine whole rows and, in the last one, none along x.
    assert result["y"]["b"]["inlet"]["tau"] == pytest.approx((9.5 + 9 * 19 + 20) / 20)
    assert result["y"]["b"]["whole"]["unreachable"] == 0


def test_spectrum_of_waves_stands_at_their_frequency(client, tmp_path):
    """Stripes of period 8 pixels of 0.5: all at rings 1/4 and its odd multiples; of a pixel's own shape, not its
    number."""
    stripes = np.broadcast_to((np.arange(64) // 4 % 2).astype(np.uint8), (32, 64))
    for spacing, labels in (((1.0, 0.5), stripes), ((0.5, 1.0), stripes.T)):
        frequency, magnitude = radial_magnitude(labels, 2, spacing)
        assert frequency[-1] == 0.5
        assert frequency[magnitude.argmax()] == 0.25
        assert np.all(magnitude[frequency != 0.25] < 1e-9)
    rng = np.random.default_rng(1)
    a = (rng.random((40, 30, 50)) < 0.3).astype(np.uint8)
    np.save(tmp_path / "a.npy", a)
    found = spectrum(
        open_volume(tmp_path / "a.npy"),
        client=client,
        labels=[0, 1],
        lengths=(1.0,) * 3,
        slices=7,
        edge=32,
        progress=False,
    )
    assert found["z"]["pixels"] == [30, 32]
    assert found["y"]["slices"] == 7
    # White noise: |F|² is exponential with mean φ (1 − φ) pixels at every frequency.
    expected = np.log1p(np.sqrt(rng.exponential(0.21 * 32 * 30, 200_000))).mean()
    assert np.mean(found["z"]["magnitude"]) == pytest.approx(expected, abs=0.03)
    assert np.abs(np.array(found["z"]["magnitude"]) - expected).max() < 6 * max(found["z"]["standard_error"])


def test_cells_of_one_size_never_overlap():
    for edge in (4, 7, 16):
        starts = np.array(cells(3, (33, 40, 57), edge, 2000))
        assert len(starts) == prod(n // edge for n in (33, 40, 57))
        covered = np.zeros((33, 40, 57), int)
        for z, y, x in starts:
            covered[z : z + edge, y : y + edge, x : x + edge] += 1
        assert covered.max() == 1
        assert covered.sum() == len(starts) * edge**3
        assert cells(3, (33, 40, 57), edge, 2) == tuple(map(tuple, starts[:2].tolist()))


def test_representative_curve_of_independent_voxels_has_exponent_one(client, tmp_path):
    """Of independent voxels the fraction of V has standard error √(φ (1 − φ) / V); and what the fit says of whole
    volumes is how their fractions scatter."""
    rng = np.random.default_rng(2)
    a = (rng.random((96, 80, 90)) < 0.3).astype(np.uint8)
    np.save(tmp_path / "a.npy", a)
    curve = representative(
        open_volume(tmp_path / "a.npy"),
        client=client,
        labels=[0, 1],
        seed=1,
        progress=False,
        settings=Representative(count=200, edges=(4, 6, 8, 12, 16, 24, 48)),
    )
    assert list(curve.cubes) == [4, 6, 8, 12, 16, 24]
    fit = curve.fit(curve.values["volume_fraction"][1,])
    assert fit is not None
    truth = np.sqrt(0.21 / a.size)
    assert abs(fit.exponent - 1) < 3 * fit.exponent_error < 0.2
    assert abs(np.log(fit.standard_error / truth)) < 2 * np.log(fit.range[1] / fit.standard_error) < 0.6
    assert fit.standard_error_1 == pytest.approx(truth, rel=0.4)
    # Faces are counted with those of the + sides, so that small cubes are not poorer in them.
    means = [v.mean() for v in curve.values["specific_surface_faces"][1,]]
    assert means[0] == pytest.approx(means[-1], rel=0.03)


def test_fit_recovers_a_power_law_within_its_error():
    rng = np.random.default_rng(5)
    sizes, hits = [e**3 for e in (16, 24, 32, 48, 64)], 0
    for _ in range(200):
        values = [rng.normal(0.4, 0.5 * size**-0.4, 64) for size in sizes]
        fit = fitted(sizes, values, 1000**3)
        assert fit is not None
        hits += abs(fit.exponent - 0.8) < fit.exponent_error
    assert 110 < hits < 170  # two thirds
    assert fitted(sizes, [np.ones(9)] * 5, 10**9) is None


def test_real_electrode_in_blocks(client, real_data):
    """A corner of a real image; scipy's labels and plain slicing as the truth."""
    volume = open_volume(real_data / "electrode.tiff")
    from hpcres.geometry import Box

    a = volume.read(Box((0, 0, 0), (60, 70, 130)))
    labels = sorted(int(v) for v in np.unique(a))
    found = statistics(volume, client=client, labels=labels, which=ALL, lags=20, block=(100, 256, 90), progress=False)
    again = statistics(volume, client=client, labels=labels, which=ALL, lags=20, progress=False)
    assert np.array_equal(found.counts, again.counts)
    assert found.connectivity == again.connectivity
    assert all(np.array_equal(p, q) for p, q in zip(found.whole, again.whole, strict=True))
    whole = volume.read(Box.whole(volume.shape))
    assert int(found.counts[1, 13, 0, 1]) == np.count_nonzero(
        (whole[:, :-13] == labels[0]) & (whole[:, 13:] == labels[1])
    )
    one = found.connectivity[0]
    assert (one.voxels, one.clusters, one.largest, one.percolating) == plain_connected(whole, labels[0])


def test_everything_asked_for_is_in_the_file(client, tmp_path):
    a = structure(1, (48, 50, 52), [0, 1, 2])
    np.save(tmp_path / "a.npy", a)
    volume, named = open_volume(tmp_path / "a.npy"), Named({0: "a", 1: "b", 2: "c"}, (65.0,) * 3, "nanometer")
    every = ("correlations", "chords", "connectivity", "spectrum", "representative", "geodesic")
    chosen = Metrics(statistics=every, lags=8)
    result = measure_statistics(volume, named, chosen, client=client, scratch=tmp_path, progress=False)
    assert tuple(result) == every
    assert result["representative"]["tpb_density"]["standard_error"] > 0
    assert result["spectrum"]["x"]["frequency"][-1] <= 0.5 / 0.065 * (1 + 1e-9)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]  # the scratch space is gone
    some = measure_statistics(volume, named, Metrics(statistics=("chords",)), client=client, progress=False)
    assert some["chords"] == result["chords"]
    assert list(some) == ["chords"]


def test_report_and_table_show_it_beside_the_truth(client, tmp_path):
    from hpcres.metrics.measure import Work, measure
    from hpcres.metrics.table import metric_rows, metrics_text
    from hpcres.reports.write import report_volume

    every = Metrics(statistics=("correlations", "chords", "connectivity", "spectrum", "representative", "geodesic"))
    np.save(tmp_path / "a.npy", structure(3, (48, 52, 50), [0, 1, 2]))
    volume = open_volume(tmp_path / "a.npy")
    entry = measure(volume, Work(client, scratch=tmp_path, progress=False), statistics=every)
    text = metrics_text({"volume": entry})
    assert "± standard error" in text
    assert "mean geodesic tortuosity" in text
    fitted_rows = [row for row in metric_rows({"volume": entry}) if row.metric == "volume fraction"]
    assert all(row.standard_error is not None and 0 < row.standard_error < 0.2 for row in fitted_rows)
    errors = {(row.metric, row.of): row.standard_error for row in metric_rows({"volume": entry})}
    for phase in "012":
        crofton = errors["specific surface, Crofton", phase]
        assert crofton == pytest.approx(errors["specific surface, faces", phase] * 2 / 3)
    page = report_volume(volume, {"volume": entry, "reference": entry}, tmp_path / "r.html").read_text()
    for panel in (
        "Two-point correlations",
        "Chord lengths",
        "Radial spectrum",
        "Connected share",
        "Mean geodesic tortuosity",
        "Representative volume",
        "± standard error",
        "2, truth",
    ):
        assert panel in page


@pytest.mark.parametrize(
    "signals",
    [(signal.SIGINT, signal.SIGTERM, signal.SIGINT), pytest.param((signal.SIGTERM,), marks=pytest.mark.variant)],
)
def test_a_signal_in_mid_run_leaves_nothing_behind(tmp_path, signals):
    """Those that follow the first do not break off what removes the scratch folder."""
    np.save(tmp_path / "a.npy", structure(5, (120, 120, 120), [0, 1]))
    options = ("--with", "geodesic", "--output", "metrics.json", "--without", "representative", "--without", "spectrum")
    command = [sys.executable, "-m", "hpcres", "metrics", "a.npy", *options]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # jobs in the background of a shell ignore it
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as run:
        while not any(tmp_path.glob("hpcres-geodesic-*")):
            assert run.poll() is None
            time.sleep(0.02)
        for one in signals:
            run.send_signal(one)
            time.sleep(0.1)
        said = run.communicate(timeout=60)[1]
    assert run.returncode == 75
    lines = [line for line in said.splitlines() if not re.match(r"(geodesic|counting|correlations).*: ", line)]
    assert lines == [f"hpcres: metrics: stopped by {signals[0].name}; nothing is written: run it again"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]
