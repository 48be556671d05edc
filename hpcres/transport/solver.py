"""Conjugate gradients for steady diffusion, and the error of D_rel that they claim."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Any

from scipy.linalg import eigvalsh_tridiagonal

from hpcres.transport.form import Form

ROUNDING = 1e-7
"""Relative error of D_rel by rounding of float32 vectors in the plain form; no smaller error is claimed."""
ROBUST_ROUNDING = 5e-7
"""The same in the robust form, whose conductances may be rounded three times."""
LEAST_EIGENVALUE = 0.1
"""A lower bound of the eigenvalues of M⁻¹ A. The least one measured was 0.13 in the plain form and 0.11 in the robust
form (docs/transport.md)."""


@dataclass(frozen=True)
class Solved:
    """D_rel, an upper bound, and the estimate of its relative error."""

    D_rel: float
    error: float
    iterations: int
    converged: bool
    bytes: int


class Solver(ABC):
    """Conjugate gradients for one system.

    A subclass says what a vector is and what is done with it. In the robust form the solution is the sum of two float32
    vectors, or all vectors are float64. Residuals are sums of currents between neighbours. The residual of the solution
    is computed anew before an error is claimed.
    """

    to_d_rel: float
    contrast: float  # the lowest conductivity over the highest
    form: Form

    @abstractmethod
    def vector(self) -> Any:
        """Make a vector of zeros."""

    @abstractmethod
    def solution(self) -> Any:
        """Make zeros for x; two vectors where `form.two_floats`, the potential and what float32 rounds off it."""

    @abstractmethod
    def start(self, x: Any) -> None:
        """Set x to the potential of a uniform volume."""

    @abstractmethod
    def find_residual(self, x: Any, r: Any) -> None:
        """Set r = sources - A x."""

    @abstractmethod
    def precondition(self, r: Any, z: Any) -> float:
        """Set z = M⁻¹ r, and return r · z."""

    @abstractmethod
    def turn(self, p: Any, z: Any, beta: float) -> float:
        """Set p = z + β p, and return its energy."""

    @abstractmethod
    def advance(self, x: Any, r: Any, p: Any, alpha: float) -> None:
        """Set x += α p and r -= α A p."""

    @abstractmethod
    def energy(self, x: Any, end: float) -> float:
        """Return the energy that x dissipates with the far face at the potential `end`.

        The unit is the conductance of one face.
        """

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Bytes held for a solve, vectors included."""

    def solve(
        self, rtol: float, *, limit: int = 200, report: Callable[[int, float, float], None] | None = None
    ) -> tuple[Solved, Any]:
        """Solve until the estimated error of D_rel is under rtol.

        Parameters
        ----------
        rtol : float
            Estimated relative error of D_rel at which to stop.
        limit : int
            Largest number of iterations.
        report : callable, optional
            report(iterations, D_rel, estimated error), called after every iteration.

        Returns
        -------
        solved : Solved
            D_rel and its estimated error.
        x
            The potential at the conducting voxels.
        """
        x, r, p, z = self.solution(), *(self.vector() for _ in range(3))
        self.start(x)
        self.find_residual(x, r)
        iterate = self._iterate_robustly if self.form.robust else self._iterate
        error, iterations = iterate(x, r, p, z, rtol, limit, report or (lambda *_: None))
        d_rel = self.energy(x, 1.0) * self.to_d_rel
        return Solved(d_rel, error, iterations, error < rtol, self.bytes), x

    def _iterate(
        self, x: Any, r: Any, p: Any, z: Any, rtol: float, limit: int, report: Callable[[int, float, float], None]
    ) -> tuple[float, int]:
        """Iterate in the plain form; return the estimated error, and the number of iterations."""
        energy = self.energy(x, 1.0)
        terms: list[float] = []
        steps: list[float] = []
        sizes: list[float] = []
        error, bound = inf, 0.0 if self.contrast == 1.0 else inf
        while len(terms) < limit and max(error, bound) >= rtol:
            now = self.precondition(r, z)
            if now <= 0:
                # The residual is rounding error. What it and the last iteration may hide bounds the error.
                rest = ((terms[-1] if terms else 0.0) - now) / (LEAST_EIGENVALUE * energy)
                error, bound = max(ROUNDING, rest), 0.0
                break
            sizes.append(now)
            if self.contrast < 1.0 and error < rtol:
                bound = error_bound(steps, sizes, energy, min(LEAST_EIGENVALUE, self.contrast))
                if bound < rtol:
                    break
            steps.append(now / self.turn(p, z, now / sizes[-2] if terms else 0.0))
            self.advance(x, r, p, steps[-1])
            terms.append(steps[-1] * now)
            energy -= terms[-1]
            error = estimated_error(terms, energy)
            report(len(terms), energy * self.to_d_rel, error)
        return max(error, bound), len(terms)

    def _iterate_robustly(
        self, x: Any, r: Any, p: Any, z: Any, rtol: float, limit: int, report: Callable[[int, float, float], None]
    ) -> tuple[float, int]:
        """Iterate in the robust form; return the estimated error, and the number of iterations.

        The energy is recomputed in every iteration, since subtracting terms from it may cancel all of its digits.
        """
        energy, error, iterations, last_restart = self.energy(x, 1.0), inf, 0, inf
        steps: list[float] = []
        sizes = [self.precondition(r, z)]
        while True:
            error = robust_estimated_error(steps, sizes, energy)
            if error < rtol and steps:
                # The residual by recurrence and that of x differ by rounding.
                by_recurrence = sizes[-1]
                self.find_residual(x, r)
                size = self.precondition(r, z)
                rounded = max(1.0, size / by_recurrence) if size >= 0 and by_recurrence > 0 else inf
                error = max(ROBUST_ROUNDING, error * rounded)
                if error < rtol:
                    break
                if size >= 0.5 * last_restart:  # the last restart did not help: rounding limits the error
                    break
                steps, sizes, last_restart = [], [size], size
                error = robust_estimated_error(steps, sizes, energy)
            if error < rtol or iterations == limit or not sizes[-1] > 0:
                break
            steps.append(sizes[-1] / self.turn(p, z, sizes[-1] / sizes[-2] if steps else 0.0))
            self.advance(x, r, p, steps[-1])
            energy, iterations = self.energy(x, 1.0), iterations + 1
            sizes.append(self.precondition(r, z))
            report(iterations, energy * self.to_d_rel, error)
        return error, iterations


def estimated_error(terms: Sequence[float], energy: float) -> float:
    """Estimate what is left of the energy after the last iteration, as a share of it.

    A term is what its iteration took off the energy (Hestenes & Stiefel 1952), so what is left is the sum of the terms
    to come. If they were a geometric progression of rate q, that would be q / (1 - q) of the last one. The estimate is
    five times this, with the slower of the last two rates, and never less than half the last term. There is no estimate
    before the third iteration unless the first term is below rounding. docs/transport.md compares estimates with true
    errors.

    Parameters
    ----------
    terms : sequence of float
        The terms α r·z of the iterations.
    energy : float
        Energy after the last iteration.

    Returns
    -------
    float
        The estimate, at least ROUNDING; inf where there is none.
    """
    if energy <= 0:
        return inf
    if len(terms) < 3:
        small = bool(terms) and terms[0] < ROUNDING * energy
        return max(ROUNDING, terms[0] / (LEAST_EIGENVALUE * energy)) if small else inf
    rate = max(b / a for a, b in zip(terms[-3:-1], terms[-2:], strict=True))
    return max(ROUNDING, terms[-1] / energy * max(0.5, 5 * rate / (1 - rate))) if rate < 1 else inf


def error_bound(steps: Sequence[float], sizes: Sequence[float], energy: float, least: float) -> float:
    """Bound what is left of the energy, as a share of it, where no eigenvalue of M⁻¹ A is below `least`.

    Fields of eigenvalues near `least`, such as the potential of well-conducting islands in a poor conductor, converge
    last and add little to the terms of the iterations before. The quadrature of Gauss and Radau bounds what they hold
    (Golub & Meurant 1994; recurrence of Meurant & Tichý 2013).

    Parameters
    ----------
    steps : sequence of float
        α of each iteration.
    sizes : sequence of float
        r · z before each iteration and after the last.
    energy : float
        Of the solution.
    least : float
        A lower bound of the eigenvalues of M⁻¹ A.

    Returns
    -------
    float
        An upper bound; inf where the energy is not positive.
    """
    weight = 0.0
    while weight <= 0:
        weight = 1 / least
        for step, size, after in zip(steps, sizes, sizes[1:], strict=False):
            left = weight - step
            if left <= 0:  # an eigenvalue is below `least`
                weight, least = 0.0, least / 2
                break
            weight = left / (least * left + after / size)
    return weight * sizes[-1] / energy if energy > 0 else inf


def robust_estimated_error(steps: Sequence[float], sizes: Sequence[float], energy: float) -> float:
    """Compute the error that the robust form claims.

    The lower bound of the eigenvalues is LEAST_EIGENVALUE, or half the least Ritz value of the iterations if that is
    less.

    Parameters
    ----------
    steps, sizes, energy
        As of `error_bound`.

    Returns
    -------
    float
        At least ROBUST_ROUNDING; inf where no error can be claimed.
    """
    if not sizes[-1] >= 0 or not all(step > 0 for step in steps):
        return inf
    if sizes[-1] == 0:
        return ROBUST_ROUNDING
    least = LEAST_EIGENVALUE
    if steps:
        # Ritz values: eigenvalues of the Lanczos matrix of conjugate gradients, all above the least of M⁻¹ A.
        ratios = [after / before for before, after in pairwise(sizes)][: len(steps) - 1]
        diagonal = [1 / step for step in steps]
        for i, ratio in enumerate(ratios):
            diagonal[i + 1] += ratio / steps[i]
        off_diagonal = [ratio**0.5 / step for ratio, step in zip(ratios, steps, strict=False)]
        least = min(least, 0.5 * float(eigvalsh_tridiagonal(diagonal, off_diagonal)[0]))
    return max(ROBUST_ROUNDING, error_bound(steps, sizes, energy, least)) if least > 0 else inf
