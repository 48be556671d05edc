"""Correlations, chords and clusters of a whole volume in one pass of Dask over its blocks, exact for any blocks.

A block is read once. In each direction the following waits between blocks: one plane with the open run of every line
and the cluster that its last voxel belongs to, and the bits of as many planes as there are lags.

In metrics.json a volume's `statistics` hold those of the following that were asked for:

    correlations  lags [0 … n] voxels, pairs {axis: [pairs that fit]}, counts {axis: {"a|b": [pairs]}}: S2_ab(r), the
                  share of pairs with x in a and x + r in b, is counts / pairs; r in voxels along the axis
    chords        {axis: {phase: {whole, cut}}}, each {length [voxels], count [chords]}; `cut` are those that touch an
                  outer face; voxel_share_cut; mean_length of the whole ones, its standard_error (null for fewer than
                  two) and mean_length_by_voxels, in length_unit
    connectivity  {phase: {clusters, largest_share, percolating_share {axis: share}}}, of the phase's voxels, by faces
    spectrum, representative, geodesic: see spectrum.py, representative.py, geodesic.py
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcres.counting import counts
from hpcres.counting.bitplanes import pack, transposed
from hpcres.counting.chords import Carry, Ends, in_planes, runs_of, stitch
from hpcres.counting.clusters import Clusters, Connected, clusters_of, join, touching
from hpcres.counting.correlations import complete, pairs_across, pairs_inside, rows_along, tail_of
from hpcres.counting.named import Named
from hpcres.geometry import AXES, Box, Triple, blocks
from hpcres.metrics import geodesic as paths
from hpcres.metrics.representative import Curve, representative
from hpcres.metrics.schedule import Source, block_shape, block_voxels, follow, threads_of
from hpcres.metrics.spectrum import spectrum
from hpcres.study import Metrics
from hpcres.volumes.volume import Volume

if TYPE_CHECKING:
    from distributed import Client, Future

BLOCK_VOXELS = 2**23
"""Large enough for what a task costs, and small enough that what a block turns into is of no account."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of p phases in the order they were asked for; None for what was not asked for.

    `counts` is int64 (axis, lag, i, j), pairs of voxels. `pairs` is (axis, lag), the pairs that fit into the volume.
    `whole` and `cut` are, per axis, int64 (phase, length): chords, with those that touch an outer face in `cut`.
    `connectivity` is by phase.
    """

    counts: np.ndarray | None = None
    pairs: np.ndarray | None = None
    whole: list[np.ndarray] | None = None
    cut: list[np.ndarray] | None = None
    connectivity: list[Connected] | None = None


@dataclass(frozen=True)
class _Leaf:
    """Results of one block: sums, and per axis what the next block must know."""

    box: Box
    place: int
    planes: list[np.ndarray]
    pairs: np.ndarray | None = None
    heads: list[np.ndarray] = field(default_factory=list)
    tails: list[np.ndarray] = field(default_factory=list)
    inside: list[np.ndarray] = field(default_factory=list)
    ends: list[Ends] = field(default_factory=list)
    clusters: Clusters | None = None


@dataclass(frozen=True)
class _Seam:
    """A column of blocks up to some block along an axis; its last plane waits for the first plane of the next block."""

    place: int
    phase: np.ndarray
    number: np.ndarray | None
    met: list[np.ndarray]
    carry: Carry
    pairs: np.ndarray | None
    tail: np.ndarray | None


def _block(item: tuple[int, Box], source: Source, labels: tuple[int, ...], lags: int, clusters: bool) -> _Leaf:
    place, box = item
    volume, phases = source.open(), len(labels)

    block, _ = counts.indexed(volume.read(box), labels)
    planes = pack(block, phases)
    turned = transposed(planes, block.shape[2])
    inside, ends, runs = runs_of(block, planes, phases)
    outer = [(a == 0, b == n) for a, b, n in zip(box.start, box.stop, volume.shape, strict=True)]
    pairs, heads, tails = None, [], []
    if lags:
        rows = rows_along(planes, turned)
        pairs = pairs_inside(rows, lags)
        heads = [np.ascontiguousarray(of[:, :, : 0 if low else lags]) for of, (low, _) in zip(rows, outer, strict=True)]
        tails = [tail_of(None, of, 0 if high else lags) for of, (_, high) in zip(rows, outer, strict=True)]
    return _Leaf(
        box,
        place,
        in_planes(block, planes, turned, phases),
        pairs,
        heads,
        tails,
        inside,
        ends,
        clusters_of(runs, planes, block.shape, phases, place, outer) if clusters else None,
    )


def _seam(before: _Seam | None, leaf: _Leaf, axis: int, axis_length: int, lags: int) -> _Seam:
    ends, own, met = leaf.ends[axis], leaf.clusters, []
    thickness = leaf.box.shape[axis]
    carry = stitch(before.carry if before else None, ends, leaf.inside[axis], thickness, axis_length)
    pairs, tail = None, leaf.tails[axis] if lags else None
    if before is not None:
        met, pairs = before.met, before.pairs
        if own is not None:
            assert before.number is not None
            phases, numbers = (before.phase, ends.first_phase), (before.number, own.first[axis])
            met = [*met, touching(phases, numbers, (before.place, leaf.place))]
        if before.tail is not None and tail is not None:
            between = pairs_across(before.tail, leaf.heads[axis], lags)
            pairs = between if pairs is None else pairs + between
            if leaf.box.stop[axis] < axis_length:
                tail = tail_of(before.tail, tail, lags)
    return _Seam(leaf.place, ends.last_phase, own.last[axis] if own else None, met, carry, pairs, tail)


def _sums(leaf: _Leaf) -> _Leaf:
    """Keep of a block what the whole volume's numbers need, without its planes."""
    own = leaf.clusters
    if own is not None:
        own = Clusters(own.name, own.phase, own.voxels, own.faces, own.inside, own.largest_inside, (), ())
    return _Leaf(leaf.box, leaf.place, leaf.planes, leaf.pairs, clusters=own)


def _closed(seam: _Seam) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], np.ndarray | int]:
    return seam.carry.whole, seam.carry.cut, seam.met, 0 if seam.pairs is None else seam.pairs


def statistics(
    volume: Volume,
    *,
    client: Client,
    labels: Sequence[int],
    which: Collection[str],
    lags: int = 0,
    block: Triple | None = None,
    progress: bool = True,
) -> Statistics:
    """Count correlations, chords and connectivity of a volume; the result is the same for any `block`.

    Parameters
    ----------
    volume : Volume
        Labels (z, y, x).
    client : Client
        Dask client.
    labels : sequence of int
        Labels of the phases.
    which : collection of str
        Any of "correlations", "chords" and "connectivity".
    lags : int
        Largest distance of correlations in voxels.
    block : Triple, optional
        Shape of a block; by default one that follows from chunks and threads.
    progress : bool
        Whether to show progress.

    Returns
    -------
    Statistics
    """
    lags = lags if "correlations" in which else 0
    if not {"correlations", "chords", "connectivity"} & set(which):
        return Statistics()
    shape, phases, known = volume.shape, len(labels), tuple(labels)
    limit = min(BLOCK_VOXELS, block_voxels(shape, volume.dtype.itemsize, threads_of(client)))
    cut_into = block or block_shape(shape, volume.chunks, limit)
    boxes = blocks(shape, cut_into)
    grid = [-(-n // b) for n, b in zip(shape, cut_into, strict=True)]
    fixed = {"source": Source.of(volume), "labels": known, "lags": lags, "clusters": "connectivity" in which}
    sums: list[Future[Any]] = []
    before: list[dict[tuple[int, ...], Future[Any]]] = [{}, {}, {}]
    for place, (at, box) in enumerate(zip(product(*map(range, grid)), boxes, strict=True)):
        # What is joined makes room, so it goes before any other block; left to itself Dask would first read them all.
        leaf = client.submit(_block, (place, box), **fixed, priority=-2 * place - 1, pure=False)
        after: dict[str, Any] = {"priority": -2 * place, "pure": False}
        sums.append(client.submit(_sums, leaf, **after))
        for axis, columns in enumerate(before):
            column = tuple(k for a, k in enumerate(at) if a != axis)
            columns[column] = client.submit(_seam, columns.get(column), leaf, axis, shape[axis], lags, **after)
    ends = [[client.submit(_closed, seam, priority=1, pure=False) for seam in columns.values()] for columns in before]
    del leaf, before, columns  # or the client would hold on to what they stand for
    sums += [column for axis in ends for column in axis]
    follow(sums, f"correlations, chords and clusters of {Path(volume.path).name}", progress)
    found = client.gather(sums)
    own: list[_Leaf] = found[: len(boxes)]
    planes = [np.zeros((phases, n), np.int64) for n in shape]
    for one in own:
        for axis, total in enumerate(planes):
            total[:, one.box.start[axis] : one.box.stop[axis]] += one.planes[axis]
    s2 = fitting = connected = None
    whole: list[np.ndarray] | None
    cut: list[np.ndarray] | None
    closed, met = iter(found[len(boxes) :]), []
    whole, cut = ([np.zeros((phases, n + 1), np.int64) for n in shape] for _ in range(2))
    pairs = sum((one.pairs for one in own if one.pairs is not None), np.zeros((3, lags + 1, 1, 1), np.int64))
    for axis in range(3):
        for _ in ends[axis]:
            part, part_cut, touch, between = next(closed)
            whole[axis] += part
            cut[axis] += part_cut
            pairs[axis] += between
            met += touch
    if "correlations" in which:
        s2, fitting = complete(pairs, planes)
    if "connectivity" in which:
        connected = join([one.clusters for one in own if one.clusters is not None], met, planes[0].sum(1))
    if "chords" not in which:
        whole = cut = None
    return Statistics(s2, fitting, whole, cut, connected)


def measure_statistics(
    volume: Volume,
    named: Named,
    settings: Metrics,
    *,
    client: Client,
    seed: int = 0,
    block: Triple | None = None,
    scratch: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Compute the `statistics` of metrics.json that the settings ask for.

    Parameters
    ----------
    volume : Volume
        Labels (z, y, x).
    named : Named
        Names of the labels, and the voxel size.
    settings : Metrics
        Which statistics to compute, and their settings.
    client : Client
        Dask client.
    seed : int
        Seed of the representative-volume curve.
    block : Triple, optional
        Shape of a block; by default one that follows from chunks and threads.
    scratch : Path, optional
        A folder that all workers see.
    progress : bool
        Whether to show progress.

    Returns
    -------
    dict
        The entry `statistics`.
    """
    which, labels = settings.statistics, tuple(named.phases)
    found = statistics(
        volume, client=client, labels=labels, which=which, lags=settings.lags, block=block, progress=progress
    )
    result = described(found, named)
    lengths: dict[str, Any] = {"client": client, "labels": labels, "lengths": named.lengths, "progress": progress}
    if "spectrum" in which:
        slices, edge = settings.spectrum.slices, settings.spectrum.voxels
        result["spectrum"] = spectrum(volume, slices=slices, edge=edge, **lengths)
    if "representative" in which:
        curve = representative(volume, settings=settings.representative, seed=seed, **lengths)
        result["representative"] = {"seed": seed, **_curve(curve, named)}
    if "geodesic" in which:
        near = settings.geodesic_neighbours
        axes = paths.geodesic(volume, neighbours=near, block=block, scratch=scratch, **lengths)
        names = list(named.phases.values())
        result["geodesic"] = paths.described(axes, names, volume.shape, named.lengths, near)
    return result


def _curve(curve: Curve, named: Named) -> dict[str, Any]:
    def one(values: list[np.ndarray]) -> dict[str, Any]:
        fit = curve.fit(values)
        return {
            "std": [float(v.std(ddof=1)) for v in values],
            "mean": [float(v.mean()) for v in values],
            "exponent": fit and fit.exponent,
            "exponent_error": fit and fit.exponent_error,
            "standard_error": fit and fit.standard_error,
            "range": fit and list(fit.range),
            "standard_error_1": fit and fit.standard_error_1,
        }

    sizes: Mapping[int, int] = curve.cubes
    return {
        "sizes": [{"voxels": edge, "cubes": cubes} for edge, cubes in sizes.items()],
        **named.values({m: {k: one(v) for k, v in keys.items()} for m, keys in curve.values.items()}),
    }


def described(found: Statistics, named: Named) -> dict[str, Any]:
    """Return correlations, chords and connectivity as metrics.json has them, phases by name."""
    names, result = list(named.phases.values()), {}
    if found.counts is not None and found.pairs is not None:
        pairs = list(product(range(len(names)), repeat=2))
        result["correlations"] = {
            "lags": list(range(found.counts.shape[1])),
            "pairs": {axis: found.pairs[a].tolist() for a, axis in enumerate(AXES)},
            "counts": {
                axis: {f"{names[i]}|{names[j]}": found.counts[a, :, i, j].tolist() for i, j in pairs}
                for a, axis in enumerate(AXES)
            },
        }
    if found.whole is not None and found.cut is not None:
        means = np.array([[_mean(of) or 1.0 for of in axis] for axis in found.whole])
        result["chords"] = {
            axis: {
                name: _chords(found.whole[a][i], found.cut[a][i], named.lengths[a], np.delete(means[:, i], a).prod())
                for i, name in enumerate(names)
            }
            for a, axis in enumerate(AXES)
        }
    if found.connectivity is not None:
        result["connectivity"] = {
            name: {
                "clusters": one.clusters,
                "largest_share": one.largest / one.voxels if one.voxels else 0.0,
                "percolating_share": {
                    axis: n / one.voxels if one.voxels else 0.0 for axis, n in zip(AXES, one.percolating, strict=True)
                },
            }
            for name, one in zip(names, found.connectivity, strict=True)
        }
    return result


def _mean(whole: np.ndarray) -> float:
    number = int(whole.sum())
    return int(whole @ np.arange(len(whole))) / number if number else 0.0


def _chords(whole: np.ndarray, cut: np.ndarray, length: float, across: float) -> dict[str, Any]:
    """Describe the chords of a phase along an axis, as metrics.json has them.

    `across` is the number of voxels of the cross-section in which chords depend on each other, since they cut the same
    grain.
    """
    sizes = np.arange(len(whole))
    number, in_whole, in_cut = int(whole.sum()), int(whole @ sizes), int(cut @ sizes)
    mean, error = _mean(whole), None
    if number > 1:
        variance = float(whole @ (sizes - mean) ** 2) / (number - 1)
        error = sqrt(variance / max(number / across, 1.0)) * length
    return {
        **{
            key: {"length": np.flatnonzero(of).tolist(), "count": of[np.flatnonzero(of)].tolist()}
            for key, of in (("whole", whole), ("cut", cut))
        },
        "voxel_share_cut": in_cut / (in_whole + in_cut) if in_whole + in_cut else 0.0,
        "mean_length": mean * length if number else None,
        "standard_error": error,
        "mean_length_by_voxels": int(whole @ sizes**2) / in_whole * length if in_whole else None,
    }
