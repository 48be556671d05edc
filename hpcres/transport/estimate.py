"""Blocks solved alone and put together: an estimate without a bound, for comparison with others who do so.

Blocks are cut at their faces. A pore that winds through several blocks is lost, and one that ends within a block counts
as through. `bench/transport.py --blocks` measures how far off that is, and docs/transport.md has the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import spsolve

from hpcres.geometry import AXES, Box
from hpcres.transport.in_memory import solve
from hpcres.transport.problem import SolveSettings

UNRELIABILITY = (
    "an estimate of unknown error, measured -100 to +9 % off as a network and -6 to +680 % as a mean, of either sign"
)


@dataclass(frozen=True)
class Blocks:
    """Results of all blocks of a volume.

    `D_rel` is that of every block along each axis, (axis, z, y, x). `lengths` are those of the blocks along each axis,
    in voxels.
    """

    D_rel: np.ndarray
    lengths: tuple[np.ndarray, np.ndarray, np.ndarray]
    conductivity: float  # mean over the volume
    fraction: float
    converged: bool

    def mean(self, axis: int) -> float:
        """Return the mean of D_rel over all blocks, by volume."""
        z, y, x = self.lengths
        volume = z[:, None, None] * y[:, None] * x
        return float((self.D_rel[axis] * volume).sum() / volume.sum())

    def network(self, axis: int, voxel_size: Sequence[float]) -> float:
        """Return D_rel of the blocks as resistors between their centres, outer faces as of the whole volume.

        Parameters
        ----------
        axis : int
            Axis of the transport.
        voxel_size : sequence of float
            Voxel edges z, y, x.

        Returns
        -------
        float
            0 where no path of blocks leads from face to face.
        """
        shape = self.D_rel.shape[1:]
        edges = [np.asarray(n, float) * h for n, h in zip(self.lengths, voxel_size, strict=True)]
        index, halves = np.arange(np.prod(shape)).reshape(shape), []
        rows, columns, values = [], [], []
        for a in range(3):
            along = np.expand_dims(edges[a], [b for b in range(3) if b != a])
            area = np.ones(shape)
            for b in range(3):
                if b != a:
                    area = area * np.expand_dims(edges[b], [c for c in range(3) if c != b])
            with np.errstate(divide="ignore"):
                halves.append(np.moveaxis(0.5 * along / (self.D_rel[a] * area), a, 0))
            i = np.moveaxis(index, a, 0)
            g = 1 / (halves[a][:-1] + halves[a][1:])
            rows += [i[:-1][g > 0], i[1:][g > 0]]
            columns += [i[1:][g > 0], i[:-1][g > 0]]
            values += [g[g > 0], g[g > 0]]
        ends = [(np.moveaxis(index, axis, 0)[side].ravel(), 1 / halves[axis][side].ravel()) for side in (0, -1)]
        size = index.size
        between = coo_matrix(
            (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), (size, size)
        ).tocsr()
        _, cluster = connected_components(between, directed=False)
        first, last = (cluster[i[g > 0]] for i, g in ends)
        kept = np.flatnonzero(np.isin(cluster, np.intersect1d(first, last)))
        if not len(kept):
            return 0.0
        to_faces = [np.bincount(i, g, size)[kept] for i, g in ends]
        among = between[kept][:, kept]
        diagonal = np.asarray(among.sum(axis=1)).ravel() + to_faces[0] + to_faces[1]
        places = np.arange(len(kept))
        u = spsolve((coo_matrix((diagonal, (places, places))).tocsr() - among).tocsc(), to_faces[1])
        length, area = edges[axis].sum(), np.prod([edges[b].sum() for b in range(3) if b != axis])
        return float((to_faces[0] * u).sum() * length / area)


def solve_blocks(
    read: Callable[[Box], np.ndarray],
    shape: Sequence[int],
    edge: int,
    conductivity: Mapping[int, float],
    settings: SolveSettings,
    threads: int | None = None,
) -> Blocks:
    """Solve every block of edge³ voxels alone, along all three axes.

    Parameters
    ----------
    read : callable
        read(box) returns labels (z, y, x), uint8.
    shape : sequence of int
        Voxels of the volume z, y, x.
    edge : int
        Edge of a block in voxels.
    conductivity : mapping
        Positive conductivities of the labels that conduct.
    settings : SolveSettings
        Voxel edges and exactness.
    threads : int, optional
        By default all cores.

    Returns
    -------
    Blocks
    """
    ends = [[*range(0, n, edge), n] for n in shape]
    # A last block of one voxel has no direction through it.
    ends = [[*e[:-2], e[-1]] if len(e) > 2 and e[-1] - e[-2] < 2 else e for e in ends]
    number = [len(e) - 1 for e in ends]
    d_rel, mean, fraction, converged = np.zeros((3, *number)), 0.0, 0.0, True
    for place in np.ndindex(*number):
        z, y, x = ((e[i], e[i + 1]) for e, i in zip(ends, place, strict=True))
        labels = read(Box((z[0], y[0], x[0]), (z[1], y[1], x[1])))
        found = solve(labels, conductivity, settings, threads=threads)
        for axis, direction in enumerate(AXES):
            d_rel[(axis, *place)] = found[direction].D_rel or 0.0
            converged &= found[direction].state != "not converged"
        share = labels.size / float(np.prod([int(n) for n in shape]))
        mean, fraction = mean + share * found["z"].conductivity, fraction + share * found["z"].volume_fraction
    z_lengths, y_lengths, x_lengths = (np.diff(e) for e in ends)
    return Blocks(d_rel, (z_lengths, y_lengths, x_lengths), mean, fraction, converged)
