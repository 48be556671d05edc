"""Integer counts by label: what they are, how they add up, and their form in JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import combinations
from typing import Any

from hpcres.errors import InputError
from hpcres.geometry import Triple, triple

MAX_PHASES = 16


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

    faces: dict[Any, Triple] = {labels(key): triple(n) for key, n in tree["faces"].items()}
    return Counts(
        {int(label): int(n) for label, n in tree["voxels"].items()},
        faces,
        {labels(key): triple(n) for key, n in tree["edges"].items()},
        triple(tree["all_faces"]),
        triple(tree["all_edges"]),
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
