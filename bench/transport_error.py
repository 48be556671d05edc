"""How often, and by how much, the estimated error of D_rel is above or below the true one.

    python bench/transport_error.py                  182 systems of 13 kinds (30 seconds)
    python bench/transport_error.py --first 1000     others of the same kinds

Every system is solved to 17 tolerances from 0.1 to 1e-5, and the estimate at each different stop is set beside the true
error: D_rel over that of a solve in float64 (conjugate gradients to a residual of 1e-11, on a matrix that is put
together here). Below 1e-6 rounding of float32 is all that is left, and nothing is compared.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_matrix, diags
from scipy.sparse.linalg import cg

from hpcres.metrics.transport import solve
from hpcres.metrics.transport.multigrid import System, unpacked
from hpcres.phantoms import chi2_field, separator, three_phase

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
        yield "chi2 phantoms", chi2_field(cube, seed, gamma_squared=gamma_squared, porosity=share), {0: 1.0}, {}
        yield "separators", separator(cube, seed, feature_voxels=float(rng.uniform(3, 8)), porosity=share), {0: 1.0}, {}
        yield "tubes", tubes(cube, seed), one, {}
        yield "random, near the threshold", (rng.random(cube) < rng.uniform(0.32, 0.36)).astype(np.uint8), one, {}
        yield "random", (rng.random(cube) < share).astype(np.uint8), one, {}
        spacing = tuple(float(v) for v in 10 ** rng.uniform(-0.5, 0.5, 3))
        yield "blobs, voxels up to 10 : 1", blobs(cube, seed, 1.5, share), one, {"spacing": spacing}
        yield "blobs, periodic sides", blobs(cube, seed, 1.5, share), one, {"periodic": (True, True, True)}
        thin = (size, 3, 40) if seed % 2 else (4, 40, size)
        yield "thin", blobs(thin, seed, 1.2, 0.7), one, {}
        two = three_phase(cube, seed, feature_voxels=float(rng.uniform(3, 8)))
        yield "two conductivities", two, {0: 1.0, 2: contrast}, {"periodic": (seed % 3 == 0,) * 3}
        yield "two, voxels up to 10 : 1", two, {0: 1.0, 2: contrast}, {"spacing": spacing}
        yield "three, random", rng.integers(0, 4, cube).astype(np.uint8), {1: 1.0, 2: contrast, 3: contrast**0.5}, {}


def true_d_rel(system: System, labels: np.ndarray, conductivity: dict[int, float], spacing: Any) -> float:
    """In float64, of the voxels that take part."""
    mask = unpacked(system.bits, system.shape) > 0
    labels = np.tile(labels, [n // m for n, m in zip(system.shape, labels.shape, strict=True)])
    axis, h, index = system.geometry[7], np.asarray(spacing, float), np.full(mask.shape, -1)
    n = int(mask.sum())
    index[mask] = np.arange(n)
    k = np.array([conductivity.get(i, 0.0) for i in range(256)])[labels]
    rows, columns, values, diagonal, right = [], [], [], np.zeros(n), np.zeros(n)
    for a in range(3):
        scale = h.prod() / h[a] ** 2
        i, ki = np.moveaxis(index, a, 0), np.moveaxis(k, a, 0)
        pairs = [(i[:-1], i[1:], ki[:-1], ki[1:])]
        if system.periodic[a]:
            pairs.append((i[-1], i[0], ki[-1], ki[0]))
        for p, q, kp, kq in pairs:
            both = (p >= 0) & (q >= 0)
            p, q, g = p[both], q[both], 2 * scale / (1 / kp[both] + 1 / kq[both])
            np.add.at(diagonal, p, g)
            np.add.at(diagonal, q, g)
            rows, columns, values = [*rows, p, q], [*columns, q, p], [*values, -g, -g]
        if a == axis:
            for side in (0, -1):
                p = i[side][i[side] >= 0]
                np.add.at(diagonal, p, 2 * scale * ki[side][i[side] >= 0])
                if side:
                    np.add.at(right, p, 2 * scale * ki[side][i[side] >= 0])
    off = coo_matrix((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), (n, n)).tocsr()
    u, failed = cg(off + diags(diagonal), right, rtol=1e-11, M=diags(1 / diagonal), maxiter=20000)
    assert not failed
    # The energy, (sum of the last face's sources) - b · u, is exact to the square of the field's error.
    size = np.array(mask.shape) * h
    return float((right.sum() - right @ u) * size[axis] ** 2 / size.prod())


def stops(labels, conductivity, settings, axis: int) -> list[tuple[float, float, int]]:
    """Estimate, true error and iterations of every different stop on the way to 1e-5; nothing where none percolates."""
    found, truth, kept = {}, 0.0, []
    for rtol in 10 ** -np.linspace(1, 5, 17):
        one = solve(
            labels, conductivity, directions="zyx"[axis], rtol=float(rtol), threads=1, **settings,
            keep=None if truth else lambda direction, system, x, k: kept.append(system),
        )["zyx"[axis]]  # fmt: skip
        if not one.percolates:
            return []
        assert one.state == "converged"
        assert one.error < rtol
        truth = truth or true_d_rel(kept[0], labels, conductivity, settings.get("spacing", (1.0, 1.0, 1.0)))
        found[one.iterations] = one.error, one.d_rel / truth - 1, one.iterations
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=500, help="the first seed")
    parser.add_argument("--number", type=int, default=14, help="of systems of each kind")
    options = parser.parse_args()
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
            f"{np.median(ratio):.1f} | {np.quantile(ratio, 0.95):.0f} | {np.mean(count):.1f} |", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
