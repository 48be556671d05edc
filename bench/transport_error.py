"""How often, and by how much, the estimated error of D_rel is above or below the true one.

    python bench/transport_error.py                  182 systems of 13 kinds (30 seconds)
    python bench/transport_error.py --first 1000     others of the same kinds
    python bench/transport_error.py --far --number 140   2100 systems, voxels to 1000 : 1, conductivities to 1e9 : 1

Every system is solved to 17 tolerances from 0.1 to 1e-5. The estimate at each different stop is compared with the true
error, D_rel over that of `exact_d_rel` minus 1. Errors below 1e-6 are not compared: they are rounding of float32.

With --far a system is solved to 1e-3 and 1e-5, and every claim is compared, however small.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_matrix, diags
from scipy.sparse.linalg import cg, splu

from hpcres.geometry import Box
from hpcres.phantoms.chi2 import Chi2Volume, Excursion
from hpcres.phantoms.materials import separator, three_phase
from hpcres.transport import SolveSettings
from hpcres.transport.in_memory import solve
from hpcres.transport.multigrid import System
from hpcres.transport.voxels import unpacked

FLOOR = 1e-6


def blobs(shape, seed, sigma, share):
    field = gaussian_filter(np.random.default_rng(seed).random(shape, np.float32), sigma, mode="wrap")
    return (field < np.quantile(field, share)).astype(np.uint8)


def tubes(shape, seed):
    """Random straight tubes of 1 to 3 voxels, at right angles."""
    rng, mask = np.random.default_rng(seed), np.zeros(shape, np.uint8)
    for _ in range(60):
        axis, wide = rng.integers(3), int(rng.integers(1, 4))
        at = [slice(int(a), int(a) + wide) for a in rng.integers(0, shape)]
        at[axis] = slice(None) if rng.random() < 0.5 else slice(at[axis].start, at[axis].start + 12)
        mask[tuple(at)] = 1
    return mask


def systems(first: int, number: int):
    """name, labels, conductivity, settings."""
    for seed in range(first, first + number):
        rng = np.random.default_rng(seed)
        size = int(rng.integers(16, 33))
        cube = (size, size + 2, size - 3)
        contrast = float(10 ** rng.uniform(-3, 0))
        share = float(rng.uniform(0.3, 0.8))
        one: dict[int, float] = {1: 1.0}
        yield "blobs, sigma 1", blobs(cube, seed, 1.0, share), one, {}
        yield "blobs, sigma 2.5", blobs(cube, seed, 2.5, share), one, {}
        gamma_squared = float(rng.uniform(0.03, 0.3))
        chi2 = Chi2Volume(cube, seed, [Excursion(1 - share, 1 / gamma_squared)]).read(Box.whole(cube))
        yield "chi2 phantoms", chi2, {0: 1.0}, {}
        yield "separators", separator(cube, seed, feature_voxels=float(rng.uniform(3, 8)), porosity=share), {0: 1.0}, {}
        yield "tubes", tubes(cube, seed), one, {}
        yield "random, near the threshold", (rng.random(cube) < rng.uniform(0.32, 0.36)).astype(np.uint8), one, {}
        yield "random", (rng.random(cube) < share).astype(np.uint8), one, {}
        voxel_size = tuple(float(v) for v in 10 ** rng.uniform(-0.5, 0.5, 3))
        yield "blobs, voxels up to 10 : 1", blobs(cube, seed, 1.5, share), one, {"voxel_size": voxel_size}
        yield "blobs, periodic sides", blobs(cube, seed, 1.5, share), one, {"periodic": (True, True, True)}
        thin = (size, 3, 40) if seed % 2 else (4, 40, size)
        yield "thin", blobs(thin, seed, 1.2, 0.7), one, {}
        two = three_phase(cube, seed, feature_voxels=float(rng.uniform(3, 8)))
        yield "two conductivities", two, {0: 1.0, 2: contrast}, {"periodic": (seed % 3 == 0,) * 3}
        yield "two, voxels up to 10 : 1", two, {0: 1.0, 2: contrast}, {"voxel_size": voxel_size}
        yield "three, random", rng.integers(0, 4, cube).astype(np.uint8), {1: 1.0, 2: contrast, 3: contrast**0.5}, {}


def far_systems(first: int, number: int):
    """name, labels, conductivity, settings: voxels far from cubic, conductivities far apart, and both."""
    for seed in range(first, first + number):
        for reach in ("voxels", "conductivities", "both"):
            for kind in ("blobs", "layers", "fibres", "random", "thin"):
                rng = np.random.default_rng([seed, len(reach), len(kind)])
                shape = tuple(int(n) for n in rng.integers(6, 21, 3))
                if kind == "thin":
                    shape = (*shape[:2], int(rng.integers(1, 4)))
                    shape = tuple(int(n) for n in rng.permutation(shape))
                labels = far_labels(kind, shape, rng)
                voxel_size, conductivity = (1.0, 1.0, 1.0), {1: 1.0}
                if reach != "conductivities":
                    wide = 10 ** rng.uniform(0.3, 3)
                    edges = wide ** rng.permutation([0.0, rng.choice([0.0, 1.0, rng.uniform()]), 1.0])
                    voxel_size = tuple(float(h) for h in edges)
                if reach != "voxels":
                    apart = 10 ** -rng.uniform(0, 9)
                    values = apart ** rng.permutation([0.0, rng.uniform(), 1.0])
                    conductivity = {i: float(k) for i, k in enumerate(values)}
                    if rng.random() < 0.3:
                        del conductivity[int(rng.integers(3))]
                yield (
                    f"{kind}, {reach}",
                    labels,
                    conductivity,
                    {"voxel_size": voxel_size, "periodic": (seed % 4 == 0,) * 3},
                )


def far_labels(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Three labels; about half of the voxels have label 1."""
    if kind in ("blobs", "thin"):
        field = gaussian_filter(rng.standard_normal(shape), rng.uniform(0.5, 2.5))
        return np.digitize(field, np.quantile(field, [0.2, 0.8])).astype(np.uint8)
    if kind == "random":
        return rng.choice(3, shape, p=[(1 - (p := rng.uniform(0.4, 0.9))) / 2, p, (1 - p) / 2]).astype(np.uint8)
    if kind == "layers":
        axis, thick = int(rng.integers(3)), int(rng.integers(1, 4))
        labels = (np.indices(shape)[axis] // thick % 3).astype(np.uint8)
        flipped = rng.random(shape) < rng.choice([0.0, 0.05, 0.2])
        labels[flipped] = rng.integers(0, 3, int(flipped.sum()))
        return labels
    labels = np.zeros(shape, np.uint8)
    for _ in range(int(rng.integers(10, 40))):
        axis, wide = int(rng.integers(3)), int(rng.integers(1, 4))
        at = [slice(int(a), int(a) + wide) for a in rng.integers(0, shape)]
        at[axis] = slice(None)
        labels[tuple(at)] = rng.integers(1, 3)
    return labels


def exact_d_rel(system: System, labels: np.ndarray, conductivity: dict[int, float], voxel_size: Any) -> float:
    """D_rel of the conducting voxels of a system, float64, independent of the solver.

    Its own matrix is solved and the solution refined twice. Residual and energy are sums over differences between
    neighbours, which are not rounded off where conductances are far apart. The energy exceeds the exact one by the
    square of the field's error.
    """
    mask = unpacked(system.bits, system.shape) > 0
    labels = np.tile(labels, [n // m for n, m in zip(system.shape, labels.shape, strict=True)])
    axis, h, index = system.geometry[7], np.asarray(voxel_size, float), np.full(mask.shape, -1)
    n = int(mask.sum())
    index[mask] = np.arange(n)
    k = np.array([conductivity.get(i, 0.0) for i in range(256)])[labels]
    one, other, between = [], [], []
    for a in range(3):
        i, ki = np.moveaxis(index, a, 0), np.moveaxis(k, a, 0)
        pairs = [(i[:-1], i[1:], ki[:-1], ki[1:])] + ([(i[-1], i[0], ki[-1], ki[0])] if system.periodic[a] else [])
        for p, q, kp, kq in pairs:
            both = (p >= 0) & (q >= 0) & (p != q)
            one, other = [*one, p[both]], [*other, q[both]]
            between.append(2 * h.prod() / h[a] ** 2 / (1 / kp[both] + 1 / kq[both]))
    p, q, g = map(np.concatenate, (one, other, between))
    i, ki = np.moveaxis(index, axis, 0), np.moveaxis(k, axis, 0)
    ends = [(i[s][i[s] >= 0], 2 * h.prod() / h[axis] ** 2 * ki[s][i[s] >= 0]) for s in (0, -1)]
    diagonal = np.bincount(p, g, n) + np.bincount(q, g, n) + sum(np.bincount(at, f, n) for at, f in ends)
    matrix = coo_matrix((-g, (p, q)), (n, n)) + coo_matrix((-g, (q, p)), (n, n)) + diags(diagonal)
    inverse = solver_of(matrix, diagonal)
    u = np.zeros(n)
    for _ in range(3):
        current = g * (u[q] - u[p])
        left = np.bincount(p, current, n) - np.bincount(q, current, n)
        for (at, f), potential in zip(ends, (0.0, 1.0), strict=True):
            left += np.bincount(at, f * (potential - u[at]), n)
        u = u + inverse(left)
    energy = float((g * (u[q] - u[p]) ** 2).sum())
    energy += sum(float((f * (potential - u[at]) ** 2).sum()) for (at, f), potential in zip(ends, (0, 1), strict=True))
    size = np.array(mask.shape) * h
    return energy * size[axis] ** 2 / size.prod()


def solver_of(matrix: Any, diagonal: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """LU factors of a small matrix; of a large one, whose factors would fill memory, conjugate gradients to 1e-11."""
    if matrix.shape[0] < 10000:
        return splu(matrix.tocsc()).solve

    def iterate(right: np.ndarray) -> np.ndarray:
        if not right.any():
            return right
        u, failed = cg(matrix.tocsr(), right, rtol=1e-11, M=diags(1 / diagonal), maxiter=20000)
        assert not failed
        return u

    return iterate


def compare_far(first: int, number: int) -> None:
    """Claims beside truths, and iterations, of systems far from cubic and uniform."""
    lines: dict[str, list[tuple[float, float, float, int]]] = {}
    failed = 0
    for i, (name, labels, conductivity, settings) in enumerate(far_systems(first, number)):
        direction, truth, kept = "zyx"[i % 3], None, []
        for rtol in (1e-3, 1e-5):
            one = solve(
                labels,
                conductivity,
                SolveSettings((direction,), rtol=rtol, **settings),
                threads=1,
                keep=lambda direction, system, x, k, to=kept: to.append(system),
            )[direction]
            if not one.percolates:
                break
            if one.state != "converged":
                failed += 1
                print(f"{one.state}: {name}, seed {first + i // 15}, {direction}, rtol {rtol}", flush=True)
                continue
            truth = truth or exact_d_rel(kept[0], labels, conductivity, settings["voxel_size"])
            lines.setdefault(name, []).append((rtol, one.error, one.D_rel / truth - 1, one.iterations))
            if abs(one.D_rel / truth - 1) > one.error:
                print(f"above the claim: {name}, seed {first + i // 15}, {direction}: {lines[name][-1]}", flush=True)
    lines["all"] = [one for of in lines.values() for one in of]
    heads = "kind, far | solves | true error above the claim | claim / true: least | median | iterations to 1e-3: mean"
    print(f"| {heads} | most | to 1e-5: mean | most |\n|" + "---|" * 9)
    for name, of in lines.items():
        above = sum(abs(true) > claimed for _, claimed, true, _ in of)
        ratio = np.array([claimed / abs(true) for _, claimed, true, _ in of if true])
        counts = [[n for to, _, _, n in of if to == rtol] for rtol in (1e-3, 1e-5)]
        spent = " | ".join(f"{np.mean(c):.1f} | {max(c)}" for c in counts)
        print(f"| {name} | {len(of)} | {above} | {ratio.min():.2f} | {np.median(ratio):.1f} | {spent} |", flush=True)
    print(f"{failed} solves did not converge")


def stops(labels, conductivity, settings, axis: int) -> list[tuple[float, float, int]]:
    """Estimate, true error and iterations of every different stop on the way to 1e-5; nothing where none percolates."""
    found, truth, kept = {}, 0.0, []
    for rtol in 10 ** -np.linspace(1, 5, 17):
        one = solve(
            labels,
            conductivity,
            SolveSettings(("zyx"[axis],), rtol=float(rtol), **settings),
            threads=1,
            keep=None if truth else lambda direction, system, x, k: kept.append(system),
        )["zyx"[axis]]
        if not one.percolates:
            return []
        assert one.state == "converged"
        assert one.error < rtol
        truth = truth or exact_d_rel(kept[0], labels, conductivity, settings.get("voxel_size", (1.0, 1.0, 1.0)))
        found[one.iterations] = one.error, one.D_rel / truth - 1, one.iterations
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=500, help="the first seed")
    parser.add_argument("--number", type=int, default=14, help="of systems of each kind")
    parser.add_argument("--far", action="store_true", help="voxels to 1000 : 1 and conductivities to 1e9 : 1")
    options = parser.parse_args()
    if options.far:
        compare_far(options.first, options.number)
        return
    lines: dict[str, list[list[tuple[float, float, int]]]] = {}
    for i, (name, *system) in enumerate(systems(options.first, options.number)):
        lines.setdefault(name, []).append(stops(*system, axis=i % 3))
    lines["all"] = [one for of in lines.values() for one in of]
    heads = "kind | percolate | stops | true error above the estimate | estimate / true: least | median | 95 % below"
    print(f"| {heads} | iterations to 1e-3 |\n|" + "---|" * 8)
    for name, of in lines.items():
        every = [stop for one in of for stop in one]
        above = sum(true > max(estimate, FLOOR) for estimate, true, _ in every)
        ratio = np.array([estimate / true for estimate, true, _ in every if true > FLOOR])
        count = [min(n for estimate, _, n in one if estimate < 1e-3) for one in of if one]
        print(
            f"| {name} | {sum(map(bool, of))} of {len(of)} | {len(every)} | {above} | {ratio.min():.2f} | "
            f"{np.median(ratio):.1f} | {np.quantile(ratio, 0.95):.0f} | {np.mean(count):.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
