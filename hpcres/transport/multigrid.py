"""A system in memory: its voxels, its hierarchy of coarse levels, and conjugate gradients on them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from scipy.sparse import csc_matrix
from scipy.sparse.linalg import splu

from hpcres.transport import coarse
from hpcres.transport.aggregation import coarser
from hpcres.transport.coarse import Graph, Level
from hpcres.transport.form import Form, contrast
from hpcres.transport.solver import Solver
from hpcres.transport.threads import Threads
from hpcres.transport.voxels import Medium, Voxels, tau_of_layers

DENSE = 160  # aggregates of a level that is solved by its inverse
FACTORED = 4000  # aggregates of a robust level of one cell, from which on it is not made coarser
MOST_FACTORED = 50000  # aggregates of a level whose matrix is factored


class System(Voxels, Solver):
    """Bits, vectors and the hierarchy of one volume and direction."""

    def __init__(self, bits: np.ndarray, medium: Medium, threads: Threads, labels: np.ndarray | None = None) -> None:
        """Set up level 1 and those above it; the arguments are those of `Voxels`."""
        super().__init__(bits, medium, threads, labels)
        self.contrast = contrast(self.resistance)
        graph = self.first_graph()
        level = self.first_level(graph, self.periodic)
        self.levels = hierarchy(level, graph, self.form.after(self.step), self.periodic, self.threads)

    @property
    def bytes(self) -> int:
        """Bytes held for a solve, vectors included."""
        own = (self.bits, self.cells, self.rows)
        levels = sum(level.bytes for level in self.levels)
        return sum(a.nbytes for a in own) + levels + self.form.bytes_of_vectors * self.voxels

    def vector(self) -> np.ndarray:
        """Make a vector of zeros."""
        return np.zeros(self.voxels, self.form.dtype)

    def solution(self) -> Any:
        """Make zeros for x: one vector, or two where `form.two_floats`."""
        return (self.vector(), self.vector()) if self.form.two_floats else self.vector()

    def start(self, x: Any) -> None:
        """Set x to the potential of a uniform volume."""
        self.fill_ramp(x)

    def find_residual(self, x: Any, r: np.ndarray) -> None:
        """Set r = sources - A x."""
        r[:] = 0
        self.subtract_applied(x, 1.0, 1.0, r)

    def energy(self, x: Any, end: float) -> float:
        """Return the energy that x dissipates, with the far face at the potential `end`."""
        return sum(self.energies(x, end))

    def precondition(self, r: np.ndarray, z: np.ndarray) -> float:
        """Set z = M⁻¹ r, and return r · z."""
        first = self.levels[0]
        self.sweep_down(r, first.b)
        coarse.cycle(self.levels, 0, self.threads.each)
        return sum(self.sweep_up(r, first.x, z))

    def turn(self, p: np.ndarray, z: np.ndarray, beta: float) -> float:
        """Set p = z + β p, and return its energy."""
        self.add_scaled(p, z, beta, 1.0)
        return self.energy(p, 0.0)

    def advance(self, x: Any, r: np.ndarray, p: np.ndarray, alpha: float) -> None:
        """Set x += α p and r -= α A p."""
        self.add_to_solution(x, p, alpha)
        self.subtract_applied(p, alpha, 0.0, r)

    def mean_conductivity(self, of_label: np.ndarray) -> float:
        """Return the mean conductivity over the volume, of the voxels that take part."""
        return self.conductivity(of_label) / prod(self.shape)

    def profile(self, x: Any, of_label: np.ndarray) -> np.ndarray:
        """Return tau of each layer along the axis (see `voxels.tau_of_layers`)."""
        return tau_of_layers(*self.layers(x, of_label))


def hierarchy(level: Level, graph: Graph, form: Form, periodic: Sequence[bool], threads: Threads) -> list[Level]:
    """Make the levels from a first one down to one that is small enough for its inverse, or its LU factors.

    Parameters
    ----------
    level : Level
        The first level.
    graph : Graph
        The graph of the first level.
    form : Form
        The form on the first level.
    periodic : sequence of bool
        Axes z, y, x whose sides meet.
    threads : Threads
        Runs the kernels.

    Returns
    -------
    list of Level
    """
    levels, robust = [level], form.robust
    while levels[-1].aggregates > DENSE:
        alone = max(levels[-1].cells) == 1
        if alone and not (robust and levels[-1].aggregates > FACTORED):
            break
        graph_next, rows_next = coarser(levels[-1], graph, form, threads.each)
        if alone and len(graph_next.to_faces) > 0.9 * levels[-1].aggregates:
            levels[-1].parent = None
            break
        graph, form = graph_next, form.after(levels[-1].step)
        levels.append(coarse.as_level(graph, rows_next, periodic, form, threads.each))
    last = levels[-1]
    if last.aggregates <= DENSE or (robust and last.aggregates <= MOST_FACTORED):
        of = np.repeat(np.arange(last.aggregates), np.diff(graph.starts))
        values = graph.values.astype(np.float64)
        # The diagonal of a robust level holds the terms of l1 smoothing, too.
        diagonal = (
            np.bincount(of, values, last.aggregates) + graph.to_faces if robust else last.diagonal.astype(np.float64)
        )
        if last.aggregates <= DENSE:
            matrix = np.diag(diagonal)
            np.add.at(matrix, (of, graph.places), -values)
            last.inverse = np.linalg.inv(matrix) if robust else np.linalg.inv(matrix).astype(np.float32)
        else:
            every = np.arange(last.aggregates)
            entries = np.concatenate([-values, diagonal])
            where = np.concatenate([of, every]), np.concatenate([graph.places, every])
            last.factors = splu(csc_matrix((entries, where), (last.aggregates, last.aggregates)))
    return levels
