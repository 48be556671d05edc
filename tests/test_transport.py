"""Transport against closed forms, direct solves in float64 and TauFactor; no true error above its estimate."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from math import inf, pi
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import spsolve

from hpcres import cli
from hpcres.errors import InputError
from hpcres.metrics.table import with_error
from hpcres.transport import Conducting, FieldStore, SolveSettings, cells, check_memory, parse_crop, solver, tortuosity
from hpcres.transport.form import Form
from hpcres.transport.in_memory import solve, solve_phase
from hpcres.transport.percolation import Clusters
from hpcres.transport.solver import ROBUST_ROUNDING, Solver, error_bound, robust_estimated_error
from hpcres.transport.threads import Threads
from hpcres.transport.voxels import pack, unpacked
from hpcres.volumes.formats import open_volume

DATA = Path(os.environ.get("HPCRES_DATA", "no HPCRES_DATA"))
real = pytest.mark.skipif(not (DATA / "electrode.tiff").exists(), reason="needs $HPCRES_DATA")
ROUNDING = 1e-6


def direct(labels, conductivity, axis, voxel_size=(1, 1, 1), periodic=(False, False, False)) -> float:
    """D_rel by a sparse direct solve of the 7-point system in float64; nothing of the code under test."""
    k = np.zeros(labels.shape)
    for label, value in conductivity.items():
        k[labels == label] = value
    clusters, _ = ndimage.label(k > 0)
    for a in range(3):  # clusters that meet across periodic sides are one
        if periodic[a] and a != axis:
            first, last = np.take(clusters, 0, a).ravel(), np.take(clusters, -1, a).ravel()
            for i, j in {(i, j) for i, j in zip(first, last, strict=True) if i and j}:
                i, j = clusters.ravel()[[np.flatnonzero(np.isin(clusters, v))[0] for v in (i, j)]] if i != j else (i, j)
                clusters[clusters == max(i, j)] = min(i, j)
    through = np.intersect1d(np.take(clusters, 0, axis), np.take(clusters, -1, axis))
    kept = np.isin(clusters, through[through > 0])
    if not kept.any():
        return 0.0
    index = np.full(labels.shape, -1)
    index[kept] = np.arange(kept.sum())
    n, h = int(kept.sum()), np.asarray(voxel_size, float)
    rows, columns, values, diagonal, right = [], [], [], np.zeros(n), np.zeros(n)
    for a in range(3):
        area = h.prod() / h[a]
        i, j = (np.moveaxis(index, a, 0) for _ in range(2))
        ki = np.moveaxis(k, a, 0)
        pairs = [(i[:-1], j[1:], ki[:-1], ki[1:])]
        if periodic[a] and a != axis and labels.shape[a] > 1:
            pairs.append((i[-1], j[0], ki[-1], ki[0]))
        for p, q, kp, kq in pairs:
            both = (p >= 0) & (q >= 0)
            p, q, kp, kq = p[both], q[both], kp[both], kq[both]
            g = 2 * kp * kq / (kp + kq) * area / h[a]
            np.add.at(diagonal, p, g)
            np.add.at(diagonal, q, g)
            rows += [p, q]
            columns += [q, p]
            values += [-g, -g]
    area = h.prod() / h[axis]
    ends = []
    for side in (0, -1):
        p, kp = np.take(index, side, axis).ravel(), np.take(k, side, axis).ravel()
        p, g = p[p >= 0], 2 * kp[p >= 0] * area / h[axis]
        np.add.at(diagonal, p, g)
        ends.append((p, g))
    np.add.at(right, *ends[1])
    matrix = coo_matrix(
        (np.concatenate([*values, diagonal]), (np.r_[*rows, np.arange(n)], np.r_[*columns, np.arange(n)]))
    )
    u = spsolve(matrix.tocsc(), right)
    size = np.array(labels.shape) * h
    return float((ends[0][1] * u[ends[0][0]]).sum() * size[axis] / (size.prod() / size[axis]))


def check(labels, conductivity, rtol=1e-3, **settings) -> int:
    """Every direction against the direct solve: the true error is within the estimate, which is within rtol."""
    found = solve(labels, conductivity, SolveSettings(rtol=rtol, **settings))
    periodic = settings.get("periodic", (False, False, False))
    checked = 0
    for axis, direction in enumerate("zyx"):
        truth = direct(labels, conductivity, axis, settings.get("voxel_size", (1, 1, 1)), periodic)
        one = found[direction]
        if truth == 0:
            assert (one.state, one.D_rel, one.tau) == ("not percolating", 0.0, inf)
            continue
        assert one.state == "converged"
        assert one.error < rtol
        assert -ROUNDING < one.D_rel / truth - 1 < one.error + ROUNDING
        checked += 1
    return checked


# ---- random systems against a direct solve -----------------------------------------------------------------


@pytest.mark.parametrize("voxel_size", [(1.0, 1.0, 1.0), (1.0, 3.0, 1.0), (4.0, 1.0, 2.0)])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_the_estimate_covers_the_true_error_of_random_phases(share, voxel_size):
    rng, checked = np.random.default_rng(int(100 * share)), 0
    for shape in [(7, 8, 9), (12, 5, 20), (13, 14, 33), (2, 3, 4)]:
        checked += check((rng.random(shape) < share).astype(np.uint8), {1: 1.0}, voxel_size=voxel_size)
    assert checked >= 4


def test_the_estimate_covers_the_true_error_to_any_tolerance():
    labels = (np.random.default_rng(1).random((12, 14, 16)) < 0.6).astype(np.uint8)
    for rtol in (0.1, 0.01, 1e-3, 1e-4, 1e-5):
        assert check(labels, {1: 1.0}, rtol=rtol) == 3


@pytest.mark.parametrize("contrast", [0.5, 0.1, 1e-3])
def test_several_conductivities_match_a_direct_solve(contrast):
    rng = np.random.default_rng(3)
    for shape in [(9, 10, 11), (6, 12, 18)]:
        labels = rng.integers(0, 4, shape).astype(np.uint8)
        assert check(labels, {1: 1.0, 2: contrast, 3: 2.5}, voxel_size=(1, 2, 1)) == 3


@pytest.mark.parametrize("ratio", [15, 50, 1000])
def test_flat_voxels_match_a_direct_solve_in_few_iterations(ratio):
    field = gaussian_filter(np.random.default_rng(100).standard_normal((12, 24, 20)), (1, 4, 4))
    labels = (field > np.quantile(field, 0.55)).astype(np.uint8)
    for voxel_size in ((ratio, 1, 1), (1, 1, ratio), (1, ratio**0.5, ratio)):
        assert check(labels, {1: 1.0}, voxel_size=voxel_size) == 3
        assert (
            max(one.iterations for one in solve(labels, {1: 1.0}, SolveSettings(voxel_size=voxel_size)).values()) <= 15
        )


@pytest.mark.parametrize("poor", [1e-2, 1e-4, 1e-6, 1e-9])
def test_conductivities_far_apart_match_closed_forms_and_a_direct_solve(poor):
    layers = np.zeros((16, 16, 16), np.uint8)
    layers[(np.arange(16) // 2) % 2 == 1] = 1
    for voxel_size in ((1, 1, 1), (30, 1, 1), (1, 1, 200)):
        found = solve(layers, {1: 1.0, 0: poor}, SolveSettings(rtol=1e-5, voxel_size=voxel_size))
        assert found["z"].state == "converged"
        assert -ROBUST_ROUNDING <= found["z"].D_rel / (2 * poor / (1 + poor)) - 1 <= found["z"].error < 1e-5
        assert found["x"].D_rel == pytest.approx((1 + poor) / 2, rel=1e-5)
    cube = np.zeros((16, 16, 16), np.uint8)
    cube[4:12, 4:12, 4:12] = 1  # a good conductor that the poor one surrounds
    assert check(cube, {1: 1.0, 0: poor}) == 3


def test_what_is_claimed_holds_for_voxels_to_1000_and_conductivities_to_1e9():
    """A few of the systems of `bench/transport_error.py --far`, which has thousands."""
    path = Path(__file__).parents[1] / "bench/transport_error.py"
    spec = importlib.util.spec_from_file_location("transport_error", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    solved, kept = 0, []
    for i, (name, labels, conductivity, settings) in enumerate(bench.far_systems(0, 3)):
        direction = "zyx"[i % 3]
        one = solve(
            labels,
            conductivity,
            SolveSettings((direction,), rtol=1e-4, **settings),
            threads=1,
            keep=lambda direction, system, x, k: kept.append(system),
        )[direction]
        if one.percolates:
            truth = bench.exact_d_rel(kept[-1], labels, conductivity, settings["voxel_size"])
            assert one.state == "converged", (name, i)
            assert abs(one.D_rel / truth - 1) <= one.error < 1e-4, (name, i)
            solved += 1
    assert solved > 30


def test_the_least_eigenvalue_seen_is_what_a_claim_is_made_of():
    # Steps of conjugate gradients on eigenvalues 0.02 and 1: a claim that took 0.1 for granted would be five times off.
    steps, sizes = [1.0, 25.0], [1.0, 0.5, 1e-3]
    least = 0.5 * np.linalg.eigvalsh([[1.0, 0.5**0.5], [0.5**0.5, 0.04 + 0.5]])[0]
    assert robust_estimated_error(steps, sizes, 1.0) == pytest.approx(error_bound(steps, sizes, 1.0, min(0.1, least)))
    assert robust_estimated_error([], [0.0], 1.0) == ROBUST_ROUNDING
    assert (
        robust_estimated_error([1.0], [1.0, -1e-9], 1.0) == np.inf
    )  # rounding that would pass for nothing left to correct


class Rounding(Solver):
    """Robust solves of A x = b with eigenvalues of 0.2 to 1.5; x is rounded to multiples of `unit` in every step.

    The residual by recurrence does not see this rounding. The energy is x·A x - 2 b·x + 2 b·A⁻¹ b.
    """

    to_d_rel, contrast, form, bytes = 1.0, 1.0, Form((1, 1, 1), robust=True), 0

    def __init__(self, unit: float) -> None:
        rng, n = np.random.default_rng(0), 30
        q = np.linalg.qr(rng.standard_normal((n, n)))[0]
        self.a, self.b, self.unit = q @ np.diag(np.linspace(0.2, 1.5, n)) @ q.T, rng.standard_normal(n), unit
        self.least = self.b @ np.linalg.solve(self.a, self.b)

    def vector(self):
        return np.zeros(len(self.b))

    solution = vector

    def start(self, x):
        pass

    def find_residual(self, x, r):
        r[:] = self.b - self.a @ x

    def precondition(self, r, z):
        z[:] = r
        return float(r @ z)

    def turn(self, p, z, beta):
        p[:] = z + beta * p
        return float(p @ self.a @ p)

    def advance(self, x, r, p, alpha):
        x[:] = np.round((x + alpha * p) / self.unit) * self.unit
        r -= alpha * (self.a @ p)

    def energy(self, x, end):
        return float(x @ self.a @ x - 2 * self.b @ x + 2 * self.least)


@pytest.mark.parametrize(("unit", "converges"), [(1e-12, True), (3e-3, True), (0.1, False)])
def test_what_rounding_of_the_solution_hides_is_claimed(unit, converges):
    solver = Rounding(unit)
    solved, _ = solver.solve(1e-4)
    truth = solved.D_rel / solver.least - 1
    assert truth <= solved.error
    assert solved.converged == converges == (solved.error < 1e-4)


def test_partitions_of_a_cell_are_ranked_and_unranked():
    numbers, aggregate, mask = cells.partition_tables()
    assert len(numbers) == 21147  # Bell's number of 9: eight voxels and what stands for those that insulate
    assert len({(int(m), *map(int, p)) for m, p in zip(mask, aggregate, strict=True)}) == 21147
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (16, 16, 32)).astype(np.uint8)
    conducts = np.arange(256) > 0
    with Threads(1) as threads:
        bits = pack(labels, conducts, threads)
    strong = np.zeros((3, 256, 256), bool)
    strong[:, np.arange(256), np.arange(256)] = True
    ranks, shared = np.empty((8, 8, 16), np.uint16), (bits, labels, strong, (2, 2, 2), cells.COMPLETIONS)
    assert cells.find_split_cells(*shared, ranks, 0, 8) == (labels > 0).sum()
    for z, y, x in np.ndindex(8, 8, 16):
        block = labels[2 * z : 2 * z + 2, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        expected = sum(ndimage.label(block == value)[1] for value in (1, 2, 3))
        cell = ranks[z, y, x]
        assert numbers[cell] == expected
        assert mask[cell] == sum(int(v > 0) << i for i, v in enumerate(block.reshape(-1)))
        for i, j in itertools.combinations(np.flatnonzero(block.reshape(-1)), 2):
            same = [
                {i, j} <= set(np.flatnonzero(ndimage.label(block == value)[0].reshape(-1) == n))
                for value in (1, 2, 3)
                for n in range(1, ndimage.label(block == value)[1] + 1)
            ]
            assert (aggregate[cell, i] == aggregate[cell, j]) == any(same)


def test_a_direction_one_voxel_thin_is_a_column_each():
    labels = np.random.default_rng(2).integers(0, 3, (1, 20, 30)).astype(np.uint8)
    one = solve(labels, {1: 1.0}, SolveSettings(directions="z"))["z"]
    assert one.D_rel == pytest.approx((labels == 1).mean(), rel=1e-6)
    assert one.tau == pytest.approx(1.0, rel=1e-6)
    several = solve(labels, {0: 1e-4, 1: 1.0, 2: 0.5}, SolveSettings(directions="z", voxel_size=(100, 1, 1)))["z"]
    assert several.D_rel == pytest.approx(np.array([1e-4, 1.0, 0.5])[labels].mean(), rel=1e-5)


@pytest.mark.parametrize("periodic", [(True, True, True), (False, True, False), (False, False, True)])
def test_sides_that_meet_match_a_direct_solve(periodic):
    rng = np.random.default_rng(5)
    for shape in [(8, 8, 16), (6, 10, 14), (7, 9, 11), (5, 1, 34)]:  # cells of an odd number, voxels of an odd number
        labels = rng.integers(0, 3, shape).astype(np.uint8)
        assert check(labels, {1: 1.0, 2: 1.0}, periodic=periodic) >= 2
        assert check(labels, {1: 1.0, 2: 0.2, 0: 0.05}, periodic=periodic) >= 2


# ---- closed forms ------------------------------------------------------------------------------------------


def test_uniform_phase_has_tau_one_in_every_direction():
    for shape in [(12, 10, 14), (2, 2, 2), (5, 33, 17)]:
        for voxel_size in [(1, 1, 1), (1, 5, 2)]:
            for solution in solve_phase(np.ones(shape, bool), SolveSettings(voxel_size=voxel_size)).values():
                assert solution.state == "converged"
                assert solution.tau == pytest.approx(1.0, abs=ROUNDING)


def test_straight_channel_has_tau_one_and_its_area_as_diffusivity():
    mask = np.zeros((16, 8, 8), bool)
    mask[:, 2:5, 3:7] = True
    mask[3, 7, 7] = True  # an island: counts in the volume fraction, carries nothing
    found = solve_phase(mask)
    assert found["z"].D_rel == pytest.approx(12 / 64, rel=ROUNDING)
    assert found["z"].tau_percolating == pytest.approx(1.0, rel=ROUNDING)
    assert found["z"].tau == pytest.approx((12 / 64 + 1 / 1024) / (12 / 64), rel=ROUNDING)
    assert (found["z"].clusters_left_out, found["z"].voxels_left_out) == (1, 1)
    for across in "yx":
        assert found[across].state == "not percolating"
        assert found[across].D_rel == 0.0
        assert found[across].tau == inf
        assert found[across].as_json()["tau"] is None
        assert (found[across].clusters_left_out, found[across].voxels_left_out) == (2, 193)


def test_many_channels_stay_apart_up_to_the_coarsest_level():
    mask = np.zeros((40, 34, 34), bool)
    mask[:, ::2, ::2] = True
    assert solve_phase(mask, SolveSettings(directions="z"))["z"].D_rel == pytest.approx(0.25, rel=ROUNDING)


def test_layers_in_series_and_in_parallel():
    labels = np.zeros((12, 10, 8), np.uint8)
    labels[3:7], labels[7:] = 1, 2
    k = {0: 1.0, 1: 0.1, 2: 5.0}
    shares = [3 / 12, 4 / 12, 5 / 12]
    found = solve(labels, k, SolveSettings(rtol=1e-6, profile=True))
    series = 1 / sum(share / k[i] for i, share in enumerate(shares))
    parallel = sum(share * k[i] for i, share in enumerate(shares))
    assert found["z"].D_rel == pytest.approx(series, rel=2e-6)
    for across in "yx":
        assert found[across].D_rel == pytest.approx(parallel, rel=2e-6)
        assert found[across].tau == pytest.approx(1.0, rel=2e-6)
        assert found[across].profile == pytest.approx([1.0] * labels.shape["zyx".index(across)], rel=1e-5)
    # A layer in series has its own conductivity, half of a face's share aside.
    assert found["z"].profile[0] == pytest.approx(1.0, rel=1e-3)
    assert found["z"].profile[4] == pytest.approx(1.0, rel=1e-3)


def test_layers_of_a_profile_add_up_to_the_volume():
    mask = np.random.default_rng(2).random((14, 15, 16)) < 0.7
    for axis, (_, one) in enumerate(
        solve_phase(mask, SolveSettings(rtol=1e-6, profile=True, periodic=(False, True, True))).items()
    ):
        kept = np.asarray(one.profile)
        through = ndimage.label(mask)[0] == 1  # all but a few voxels are one cluster
        fraction = through.mean(axis=tuple(a for a in range(3) if a != axis))
        assert (kept / fraction).mean() == pytest.approx(1 / one.D_rel, rel=5e-3)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_diagonal_checkerboard_of_one_voxel_does_not_percolate(axis):
    mask = np.indices((6, 7, 8)).sum(0) % 2 == 0
    one = solve_phase(mask, SolveSettings(directions="zyx"[axis]))["zyx"[axis]]
    assert (one.state, one.clusters_left_out, one.voxels_left_out) == ("not percolating", 168, 168)


def test_checkerboard_of_columns_has_the_geometric_mean():
    """Two conductivities in a 2D checkerboard: D = sqrt(k1 k2) exactly; refined, nearer."""
    found = []
    for n in (8, 16, 32):
        tile = np.kron(np.array([[0, 1], [1, 0]], np.uint8), np.ones((n, n), np.uint8))
        tile = np.roll(tile, n // 2, axis=0)  # the faces at potential 0 and 1 are then mirror planes
        labels = np.tile(tile[:, :, None], (1, 1, 2))
        found.append(
            solve(labels, {0: 1.0, 1: 3.0}, SolveSettings(directions="z", periodic=(True, True, True), rtol=1e-5))[
                "z"
            ].D_rel
        )
    errors = [abs(d / 3**0.5 - 1) for d in found]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.01


@pytest.mark.parametrize(("width", "tau"), [(2, 2 * 37.75 / 20), (3, 3 * (55 + 2 * 11 / 30) / 20)])
def test_slanted_strip_of_twenty_voxels_is_a_chain_of_resistors(width, tau):
    """Rows of `width` voxels, each starting below the last one of the row before: every face carries all the current.

    At both ends the face's half resistances in parallel: 3/8 for two voxels, 11/30 for three.
    """
    n = 20
    mask = np.zeros((n, n * (width - 1), 2), bool)
    for i in range(n):
        for j in range(width):
            mask[i, (i * (width - 1) + j) % mask.shape[1]] = True
    one = solve_phase(mask, SolveSettings(directions="z", periodic=(False, True, False), rtol=1e-5))["z"]
    assert one.tau == pytest.approx(tau, rel=1e-5)


def test_slanted_strip_of_squares_is_a_chain_of_resistors():
    """TauFactor's own slanted strip, N = 20: 2×2 voxels in every layer, shifted by one along both sides a layer.

    Layers touch in one voxel, and through a layer the current goes from a square's corner to the opposite one, half
    each way: 1. The first and last square are held at four faces, half a voxel away: 7/24. So 19 + 18 + 2 · 7/24.
    """
    n = 20
    mask = np.zeros((n, n + 1, n + 1), bool)
    for i in range(n):
        mask[i, i : i + 2, i : i + 2] = True
    one = solve_phase(mask, SolveSettings(directions="z", rtol=1e-5))["z"]
    assert one.tau == pytest.approx(4 * (37 + 7 / 12) / 20, rel=1e-5)
    assert round(one.tau, 5) == 7.51667


def test_insulating_spheres_on_a_simple_cubic_lattice_match_sangani_and_acrivos():
    """A. S. Sangani & A. Acrivos, Proc. R. Soc. A 386, 263 (1983), for insulating spheres, volume share c = 0.2."""
    c = 0.2
    radius = (3 * c / (4 * pi)) ** (1 / 3)
    exact = sangani_acrivos(c)
    found = []
    sizes = (24, 48, 96)
    for n in sizes:
        # A quarter of the cell's section and half its length are enough by symmetry.
        at = (np.arange(n // 2) + 0.5) / n
        z, y, x = np.meshgrid(at, at, at, indexing="ij")
        outside = z**2 + y**2 + x**2 > radius**2
        found.append(solve_phase(outside, SolveSettings(directions="z", rtol=1e-5))["z"])
    phi = [one.volume_fraction for one in found]
    # The voxels' own share differs from c a little; to first order D follows it.
    corrected = [one.D_rel + (exact - sangani_acrivos(1 - p)) for one, p in zip(found, phi, strict=True)]
    richardson = 2 * corrected[2] - corrected[1]
    assert abs(richardson / exact - 1) < 3e-3
    assert abs(corrected[2] / exact - 1) < abs(corrected[0] / exact - 1)


def sangani_acrivos(c: float) -> float:
    """Their equation for a simple cubic lattice; insulating spheres have L_i = -(2 i - 1) / (2 i)."""
    one, two, three, four, five = (-(2 * i - 1) / (2 * i) for i in range(1, 6))
    series = 1.305 * two * c ** (10 / 3) * (1 + 0.231 * three * c ** (11 / 3)) / (1 - 0.405 * two * c ** (7 / 3))
    series += 0.0723 * three * c ** (14 / 3) + 0.153 * four * c**6 + 0.0105 * five * c ** (22 / 3)
    return 1 - 3 * c / (-1 / one + c + series)


# ---- TauFactor, threads, clusters, fields ------------------------------------------------------------------


def test_taufactor_agrees_on_64_voxels():
    """TauFactor 1.2.1 has the same faces; it stops where its flux is even to `conv_crit`."""
    from scipy.ndimage import gaussian_filter
    from taufactor import Solver

    mask = gaussian_filter(np.random.default_rng(4).random((64, 64, 64)), 2.5) > 0.5
    peer = Solver(mask.astype(np.uint8), device="cpu")
    peer.solve(verbose=False, conv_crit=1e-3)
    ours = solve_phase(mask, SolveSettings(directions="z", rtol=1e-5))["z"]
    assert float(peer.D_rel[0]) == pytest.approx(ours.D_rel, rel=3e-3)


@real
@pytest.mark.parametrize(("label", "tau"), [(0, 2.077242), (85, 8.735005), (170, 9.121467)])
def test_the_electrode_has_its_known_tau_in_few_iterations(label, tau):
    labels = open_volume(DATA / "electrode.tiff").read
    from hpcres.geometry import Box

    one = solve(labels(Box.whole((256, 256, 256))), {label: 1.0}, SolveSettings(directions="z"))["z"]
    assert 0 <= tau / one.tau - 1 + 2e-6 < one.error + 2e-6 < 1e-3
    assert one.iterations <= 5
    assert one.bytes < 20 * 256**3


def test_any_number_of_threads_gives_the_same_bits():
    labels = np.random.default_rng(6).integers(0, 3, (70, 66, 50)).astype(np.uint8)
    for conductivity in ({0: 1.0, 1: 1.0}, {0: 1.0, 1: 0.3}):
        fields: dict[int, list] = {1: [], 2: [], 5: []}
        found = [
            solve(
                labels,
                conductivity,
                SolveSettings(periodic=(False, False, True), profile=True),
                threads=n,
                keep=lambda direction, system, x, k, to=fields[n]: to.append(x.copy()),
            )
            for n in fields
        ]
        for one in found[1:]:
            assert all(one[d].D_rel == found[0][d].D_rel and one[d].profile == found[0][d].profile for d in "zyx")
        assert all(np.array_equal(a, b) for n in (2, 5) for a, b in zip(fields[1], fields[n], strict=True))


def test_iterations_do_not_grow_with_the_volume():
    from scipy.ndimage import gaussian_filter

    field = gaussian_filter(np.random.default_rng(8).random((96, 96, 96)), 2, mode="wrap")
    iterations = []
    for repeats in (1, 2):
        mask = np.tile(field < np.quantile(field, 0.4), (repeats,) * 3)
        iterations.append(solve_phase(mask, SolveSettings(directions="z", rtol=1e-4))["z"].iterations)
    assert iterations[1] <= iterations[0] + 1


@pytest.mark.parametrize("share", [0.2, 0.32, 0.4, 0.7])
def test_clusters_are_those_of_plain_labelling(share):
    rng = np.random.default_rng(9)
    with Threads(2) as threads:
        for shape in [(7, 8, 9), (1, 5, 33), (40, 31, 50)]:
            mask = rng.random(shape) < share
            bits = pack(mask.astype(np.uint8), np.array([False, True]), threads)
            clusters = Clusters(bits, shape, (False, False, False), threads)
            labels, number = ndimage.label(mask)
            for axis in range(3):
                both = np.intersect1d(np.take(labels, 0, axis), np.take(labels, -1, axis))
                both = both[both > 0]
                through = clusters.through(axis)
                assert np.array_equal(unpacked(through.bits, shape) > 0, np.isin(labels, both))
                assert through.clusters_left_out == number - len(both)
                assert through.voxels_left_out == mask.sum() - np.isin(labels, both).sum()


def test_fields_hold_the_potential_and_a_flux_that_is_the_same_through_every_layer(tmp_path):
    import zarr

    a = np.random.default_rng(10).integers(0, 3, (20, 18, 22)).astype(np.uint8)
    np.save(tmp_path / "a.npy", a)
    found = tortuosity(
        open_volume(tmp_path / "a.npy"),
        conducting=Conducting(phases=("pore", "gel", "solid"), conductivity={"pore": 1.0, "gel": 0.2}),
        settings=SolveSettings(rtol=1e-6, voxel_size=(1.0, 2.0, 1.5), periodic=(False, False, True)),
        field=FieldStore(str(tmp_path / "fields.zarr")),
    )
    for axis, direction in enumerate("zyx"):
        potential = np.asarray(zarr.open_array(tmp_path / "fields.zarr" / "pore + gel" / direction / "potential"))
        flux = np.asarray(zarr.open_array(tmp_path / "fields.zarr" / "pore + gel" / direction / "flux"))
        one = found["results"][axis]
        assert (one["phase"], one["conductivity"]) == ("pore + gel", {"pore": 1.0, "gel": 0.2})
        assert np.isnan(potential[a == 2]).all()
        assert np.nanmin(potential) >= 0
        assert np.nanmax(potential) <= 1
        layers = np.nansum(flux[axis], axis=tuple(k for k in range(3) if k != axis)) / (a.size / a.shape[axis])
        assert layers == pytest.approx([one["D_rel"]] * a.shape[axis], rel=2e-2)
    with pytest.raises(InputError, match="exists already"):
        tortuosity(open_volume(tmp_path / "a.npy"), field=FieldStore(str(tmp_path / "fields.zarr")))


def test_tortuosity_of_a_file_names_phases_and_crop(tmp_path):
    a = np.zeros((8, 8, 8), np.uint8)
    a[:, :4] = 1
    np.save(tmp_path / "a.npy", a)
    volume = open_volume(tmp_path / "a.npy")
    found = tortuosity(
        volume,
        conducting=Conducting(phases=("pore", "solid")),
        settings=SolveSettings(directions="zy"),
        crop="0:8,2:8,:",
    )
    assert found["crop"] == [[0, 8], [2, 8], [0, 8]]
    assert [(r["phase"], r["direction"], r["state"]) for r in found["results"]] == [
        ("pore", "z", "converged"),
        ("pore", "y", "not percolating"),
        ("solid", "z", "converged"),
        ("solid", "y", "not percolating"),
    ]
    assert found["results"][2]["D_rel"] == pytest.approx(1 / 3, rel=ROUNDING)
    with pytest.raises(InputError, match="no such phase"):
        tortuosity(volume, conducting=Conducting(phases=("pore", "solid"), only=("gold",)))
    thin = tortuosity(
        volume, conducting=Conducting(phases=("pore", "solid")), settings=SolveSettings(directions="z"), crop="0:1,:,:"
    )["results"]
    assert [r["D_rel"] for r in thin] == pytest.approx([0.5, 0.5])  # a column each
    for bad in ("0:8", "0:9,:,:", "a:b,:,:", "4:4,:,:"):
        with pytest.raises(InputError, match="`crop`"):
            parse_crop(bad, volume.shape)


def test_what_does_not_converge_has_no_number_and_all_else_is_solved(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "a.npy", (np.random.default_rng(1).random((12, 12, 12)) < 0.7).astype(np.uint8))
    solve_it, axes = solver.Solver.solve, []

    def limited(self, rtol, **settings):
        axes.append(self.geometry[7])
        return solve_it(self, rtol, **{**settings, "limit": 1 if axes[-1] == 1 else 200})

    monkeypatch.setattr(solver.Solver, "solve", limited)
    arguments = ["tortuosity", str(tmp_path / "a.npy"), "--phase", "1", "--output", str(tmp_path / "t.json")]
    monkeypatch.setattr("sys.argv", ["hpcres", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 3
    assert axes == [0, 1, 1, 2]  # float64 is tried before it is given up
    out, err = capsys.readouterr()
    assert "1, y: not solved to --rtol 0.001" in err
    assert "Try a larger --rtol" in err
    assert len(err.strip().splitlines()[-1]) < 300
    assert "written to" in out
    results = json.loads((tmp_path / "t.json").read_text())["volume"]["results"]
    assert [r["state"] for r in results] == ["converged", "not converged", "converged"]
    assert results[1]["D_rel"] is None


def test_numbers_have_the_digits_of_their_error():
    assert with_error(0.216626595, 1.7e-4) == "0.21663"
    assert with_error(2.000005e-8, 2e-13) == "2.000005e-08"
    assert with_error(12.3456, 0.5) == "12.35"
    assert with_error(0.0, 1e-7) == "0"
    assert with_error(1234.5, 0.0) == "1234.5"


def test_labels_of_any_integer_type_keep_their_names(tmp_path):
    a = np.full((6, 6, 6), -5, np.int16)
    a[:, 2:] = 1000
    np.save(tmp_path / "a.npy", a)
    found = tortuosity(open_volume(tmp_path / "a.npy"), settings=SolveSettings(directions="z"))["results"]
    assert [(r["phase"], r["labels"]) for r in found] == [("-5", [-5]), ("1000", [1000])]
    assert found[1]["D_rel"] == pytest.approx(2 / 3, rel=ROUNDING)


def test_a_volume_beyond_memory_is_refused_with_numbers_before_it_is_read():
    with pytest.raises(InputError, match=r"20000 × 20000 × 20000 voxels: needs .* GiB of memory.*`crop`"):
        check_memory((20000, 20000, 20000))


def test_memory_is_checked_again_with_the_voxels_that_conduct(monkeypatch):
    labels = np.ones((15, 16, 17), np.uint8)
    free = 16 * 16 * 16 * 60
    monkeypatch.setattr("hpcres.transport.memory_need.free_bytes", lambda: free)
    check_memory(labels.shape)  # 16 bytes a voxel where 40 % are taken to conduct
    solve(labels, {1: 1.0}, SolveSettings(directions="z"))  # 37
    with pytest.raises(InputError, match="100% conduct, twice over along x because 17 is odd"):
        solve(labels, {1: 1.0}, SolveSettings(directions="z", periodic=(False, False, True)))
