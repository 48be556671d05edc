"""The χ² model of a porous material (Furat et al. 2025, 2.1.2): excursion sets {X1² + X2² ≥ ν}, and their law.

X1 and X2 are independent Gaussian fields of one covariance. More phases are cut out of the first excursion set, each by
an excursion set of fields of its own. Lengths are in voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, pi, sqrt
from typing import Any

import numpy as np

from hpcres.geometry import Box, Triple, blocks, triple
from hpcres.phantoms.gaussian import Covariance, FieldPair, correlation

_LEGENDRE = 48
"""Nodes of the quadrature of the two-point law: seven digits for ν from 0.5 to 2.5 and correlations below 0.9999."""


@dataclass(frozen=True)
class Excursion:
    """The excursion set of one χ² field.

    Parameters
    ----------
    share : float
        Volume fraction of the set, above 0 and below 1.
    feature_voxels : float
        Distance at which the covariance of the Gaussian fields has fallen to 1/e, in voxels: 1/γ² if it is
        exponential, 1/γ if it is Gaussian.
    covariance : str
        `exponential`, ρ(h) = exp(−γ² h), or `gaussian`, ρ(h) = exp(−γ² h²).

    Examples
    --------
    >>> set_ = Excursion(0.5, 10.0, "gaussian")
    >>> round(set_.threshold, 4), round(float(set_.two_point([10.0])[0]), 4)
    (1.3863, 0.2672)
    """

    share: float
    feature_voxels: float
    covariance: Covariance = "exponential"

    @property
    def threshold(self) -> float:
        """The threshold ν = −2 ln φ of X1² + X2²."""
        return -2 * log(self.share)

    @property
    def gamma(self) -> float:
        """The parameter γ of the covariance, in voxels to the power −1/2 if it is exponential, else −1."""
        return 1 / (sqrt(self.feature_voxels) if self.covariance == "exponential" else self.feature_voxels)

    def two_point(self, distance: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return S2, the probability that two points at a distance are both in the set.

        Parameters
        ----------
        distance : array_like
            Distances in voxels.

        Returns
        -------
        ndarray
            float64.
        """
        return pair_probability(self.threshold, correlation(self.covariance, np.asarray(distance), self.feature_voxels))

    def surface_per_volume(self) -> float:
        """Return the specific surface area S_V, per voxel edge.

        Of the Gaussian covariance it is 4 γ √(ν/π) e^(−ν/2). The surface of the exponential one is a fractal, whose
        area is infinite.
        """
        if self.covariance == "exponential":
            return float("inf")
        return 4 * self.gamma * sqrt(self.threshold / pi) * exp(-self.threshold / 2)

    def face_density(self) -> float:
        """Return the voxel faces between the set and the rest, per voxel and axis: 2 (φ − S2(1))."""
        return 2 * (self.share - float(self.two_point([1.0])[0]))


def pair_probability(threshold: float, correlations: np.ndarray) -> np.ndarray:
    """Return the probability that two χ² variables of two degrees of freedom both exceed a threshold.

    S2 = e^(−2a) + ∫₀^{arcsin ρ} (2a / cos t) exp(−2a / (1 + sin t)) I₁e(2a sin t / cos² t) dt with a = ν/2. I₁e is the
    exponentially scaled Bessel function.

    Parameters
    ----------
    threshold : float
        ν, at least 0.
    correlations : ndarray
        Correlation ρ of the Gaussian variables, 0 to 1.

    Returns
    -------
    ndarray
        float64.

    Examples
    --------
    >>> pair_probability(1.3862943611, np.array([0.0, 0.5, 1.0])).round(6)
    array([0.25    , 0.283531, 0.5     ])
    """
    from scipy.special import ive

    a, rho = threshold / 2, np.asarray(correlations, np.float64)
    nodes, weights = np.polynomial.legendre.leggauss(_LEGENDRE)
    top = np.arcsin(rho)
    t = top[..., None] * (nodes + 1) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        part = 2 * a / np.cos(t) * np.exp(-2 * a / (1 + np.sin(t))) * ive(1, 2 * a * np.sin(t) / np.cos(t) ** 2)
    found = exp(-2 * a) + (part @ weights) * top / 2
    # Next to ρ = 1 the quadrature misses the end of the interval; there S2 is φ (1 − √(ν (1 − ρ)/π)).
    near = exp(-a) * (1 - np.sqrt(threshold * (1 - np.minimum(rho, 1)) / pi))
    return np.where(rho > 1 - 1e-6, near, found)


def correlations_for(threshold: float, probabilities: np.ndarray) -> np.ndarray:
    """Return the correlations at which `pair_probability` has the given values.

    Parameters
    ----------
    threshold : float
        ν.
    probabilities : ndarray
        Values of S2. Below φ² the correlation is 0, above φ it is 1.

    Returns
    -------
    ndarray
        float64, 0 to 1.
    """
    # S2 increases with ρ, so a table is inverted; it is dense next to 1, where S2 behaves like a square root.
    table = 1 - np.linspace(1, 0, 4001) ** 2
    return np.interp(probabilities, pair_probability(threshold, table), table, left=0.0, right=1.0)


class Chi2Volume:
    """A realisation of the model, of any size, read box by box; labels do not depend on the boxes that are read.

    Label 0 is the outside of the first excursion set. The rest of a set that a later set cuts keeps its label; what is
    in the k-th set and in all before it has label k.

    Parameters
    ----------
    shape : sequence of int
        Voxels z, y, x.
    seed : int or sequence of int
        Seed of the fields.
    sets : sequence of Excursion
        The first excursion set, and those that cut it.
    """

    dtype: np.dtype[Any] = np.dtype(np.uint8)

    def __init__(self, shape: Sequence[int], seed: int | Sequence[int], sets: Sequence[Excursion]) -> None:
        self.shape: Triple = triple(shape)
        words = [seed] if isinstance(seed, int) else list(seed)
        seeds = np.random.SeedSequence(words).generate_state(len(sets), np.uint64)
        self._sets = [
            (one, FieldPair(self.shape, int(word), one.feature_voxels, one.covariance))
            for one, word in zip(sets, seeds, strict=True)
        ]

    @property
    def blocks(self) -> Triple:
        """Blocks z, y, x in which the labels are made; boxes of whole blocks are the fastest to read."""
        return self._sets[0][1].block

    @property
    def bytes(self) -> int:
        """Memory that reading takes besides what is read."""
        return max(fields.bytes for _, fields in self._sets)

    def read(self, box: Box) -> np.ndarray:
        """Return the labels of a box, uint8 (z, y, x).

        Blocks of fields that the box cuts are made whole, so boxes of whole blocks are the fastest to read.
        """
        labels = np.zeros(box.shape, np.uint8)
        for number, (one, fields) in enumerate(self._sets):
            threshold = np.float32(one.threshold)
            for block in blocks_meeting(box, fields.block, self.shape):
                common = block.clipped(box)
                place, own = common.relative_to(box.start).slices, common.relative_to(block.start).slices
                before = labels[place]
                if not (before == number).any():
                    continue
                pair = fields.make(block)[own]
                inside = pair.real**2 + pair.imag**2 >= threshold
                before[inside & (before == number)] = number + 1
        return labels


def blocks_meeting(box: Box, edge: Triple, shape: Triple) -> list[Box]:
    """Return the blocks of a lattice that begins at voxel 0 which have voxels in the box."""
    first = [a // n for a, n in zip(box.start, edge, strict=True)]
    counts = [-(-b // n) - f for b, n, f in zip(box.stop, edge, first, strict=True)]
    found = []
    for place in blocks(counts, (1, 1, 1)):
        at = [(f + p) * n for f, p, n in zip(first, place.start, edge, strict=True)]
        found.append(Box(triple(at), triple([min(a + n, s) for a, n, s in zip(at, edge, shape, strict=True)])))
    return found
