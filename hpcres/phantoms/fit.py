"""The χ² model that fits a measured two-point function: threshold and covariance (Furat et al. 2025, 2.1.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from hpcres.errors import InputError
from hpcres.phantoms.chi2 import Excursion, correlations_for, pair_probability
from hpcres.phantoms.gaussian import Covariance

_LEAST_CORRELATION = 0.1
"""Correlations below this are not fitted: chance decides what is measured of them."""


@dataclass(frozen=True)
class Fit:
    """A χ² model fitted to a phase, and how far it is off what was measured.

    Attributes
    ----------
    model : Excursion
        The fitted excursion set.
    lags : int
        Largest distance that was fitted, in voxels.
    s2_misfit : float
        Root mean square of the model's S2 − the measured one, over all lags that were measured.
    face_misfit : float
        Model's voxel faces of the phase per voxel / measured ones − 1. Both are 2 (φ − S2(1)), so this is also the
        misfit of the specific surface area that voxel faces give.
    """

    model: Excursion
    lags: int
    s2_misfit: float
    face_misfit: float


def fit(s2: Sequence[float] | np.ndarray) -> list[Fit]:
    """Fit the threshold and both covariances to the two-point function of a phase.

    The threshold follows from the volume fraction, S2(0). S2 increases with the correlation ρ, so each S2 gives a ρ.
    −ln ρ is γ² h if the covariance is exponential, and γ² h² if it is Gaussian; γ² is the slope of a least-squares line
    through the origin. A lag's weight is that of −ln ρ if every S2 has the same error.

    Parameters
    ----------
    s2 : array_like
        S2 at distances 0, 1, 2, … voxels.

    Returns
    -------
    list of Fit
        One for each covariance, the better one first.

    Raises
    ------
    InputError
        The phase is absent or fills everything, or S2 falls to its limit within a voxel.

    Examples
    --------
    >>> best, other = fit(Excursion(0.4, 8.0, "gaussian").two_point(range(20)))
    >>> best.model.covariance, round(best.model.feature_voxels, 3), best.s2_misfit < 1e-6 < other.s2_misfit
    ('gaussian', 8.0, True)
    """
    measured = np.asarray(s2, np.float64)
    share = float(measured[0])
    if not 0 < share < 1:
        raise InputError(f"calibrate: the phase has a share of {share:g}, and no model fits it; name another phase")
    threshold = -2 * np.log(share)
    correlations = correlations_for(threshold, measured)
    low = np.flatnonzero(correlations[1:] < _LEAST_CORRELATION)
    last = int(low[0]) if len(low) else len(measured) - 1
    if last < 1:
        raise InputError(
            "calibrate: neighbouring voxels of the phase are not correlated, so no covariance can be fitted; use a "
            "finer image"
        )
    lag, rho = np.arange(1, last + 1), np.clip(correlations[1 : last + 1], 0, 1 - 1e-9)
    step = 1e-4 * (1 - rho)
    slope = (pair_probability(threshold, rho + step) - pair_probability(threshold, rho - step)) / (2 * step)
    weight = (rho * slope) ** 2
    found = []
    for covariance in get_args(Covariance):
        distance = lag.astype(float) if covariance == "exponential" else lag.astype(float) ** 2
        gamma_squared = float((weight * distance * -np.log(rho)).sum() / (weight * distance**2).sum())
        feature = 1 / gamma_squared if covariance == "exponential" else gamma_squared**-0.5
        model = Excursion(share, feature, covariance)
        off = model.two_point(np.arange(len(measured))) - measured
        faces = model.face_density() / (2 * (share - float(measured[1]))) - 1
        found.append(Fit(model, last, float(np.sqrt(np.mean(off**2))), faces))
    return sorted(found, key=lambda one: one.s2_misfit)
