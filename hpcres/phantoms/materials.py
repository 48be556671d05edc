"""Ground truths from Gaussian random fields: a three-phase electrode and a separator.

Every field depends on shape, seed and parameters alone. It is white noise, filtered by FFT on a torus that is larger
than the volume, so that opposite faces are independent. Lengths are in voxels, arrays are (z, y, x).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, pi, sqrt

import numpy as np
from scipy import fft
from scipy.special import ndtri

from hpcres.cores import cores
from hpcres.errors import InputError
from hpcres.geometry import Triple, triple

Seed = int | Sequence[int]
BINDER, LEAST_ACTIVE = 0.15, 0.02
"""Shares of a three-phase electrode: of the binder, and what the active material must be more than."""


def three_phase(
    shape: Sequence[int], seed: Seed, *, feature_voxels: float, porosity: float = 0.4, binder: float = BINDER
) -> np.ndarray:
    """Return the labels of a three-phase electrode in the given shares: 0 pore, 1 active material, 2 binder.

    Active material is the excursion set of a smooth Gaussian field whose mean chord in it is `feature_voxels` (Rice:
    √−ρ''(0) exp(−t²/2)/π crossings per length). Of the other voxels, binder takes those nearest to the particles or
    between two of them, patch by patch, so that all three phases meet. The computation takes about 20 bytes per voxel
    of the torus.

    Parameters
    ----------
    shape : sequence of int
        Voxels z, y, x.
    seed : int or sequence of int
        Seed of the fields.
    feature_voxels : float
        Mean chord of the active material, in voxels.
    porosity, binder : float
        Shares of the pore and of the binder.

    Returns
    -------
    ndarray
        uint8 (z, y, x).

    Raises
    ------
    InputError
        Too little is left for the active material.
    """
    active = 1 - porosity - binder
    if active <= LEAST_ACTIVE:
        raise InputError(no_active("porosity", porosity, binder))
    length = _correlation_length(feature_voxels, active, 5 / 3)
    bulk = _smooth_field(shape, (*_words(seed), 0), (length,) * 3)
    particles = _top_share(bulk, active)
    bulk += _smooth_field(shape, (*_words(seed), 1), (1.2 * length,) * 3)
    bulk[particles] = -np.inf
    labels = particles.astype(np.uint8)
    labels[_top_share(bulk, binder)] = 2
    return labels


def no_active(key: str, porosity: float, binder: float) -> str:
    """Return the message that too little is left for the active material."""
    return f"phantom.{key}: {porosity} leaves no active material beside binder {binder}; lower it"


def separator(
    shape: Sequence[int], seed: Seed, *, feature_voxels: float, porosity: float = 0.4, fibrils: float = 0.3
) -> np.ndarray:
    """Return the labels of a dry-stretched separator: 0 pore, 1 polymer.

    The polymer consists of lamellae about `feature_voxels` thick, stacked along x, and of fibrils half as thick, which
    run along x between the lamellae. The porosity is as asked for. The computation takes about 20 bytes per voxel of
    the torus.

    Parameters
    ----------
    shape : sequence of int
        Voxels z, y, x.
    seed : int or sequence of int
        Seed of the fields.
    feature_voxels : float
        Thickness of the lamellae, in voxels.
    porosity : float
        Share of the pore.
    fibrils : float
        Share of the polymer that is in fibrils.

    Returns
    -------
    ndarray
        uint8 (z, y, x).
    """
    solid = 1 - porosity
    lamellae = solid * (1 - fibrils)
    thick, wide = _correlation_length(feature_voxels, lamellae, 5), 2.5 * feature_voxels
    polymer = _top_share(_smooth_field(shape, (*_words(seed), 0), (wide, wide, thick), layered=True), lamellae)
    thin = _correlation_length(feature_voxels / 2, solid * fibrils / (1 - lamellae), 5 / 3)
    strands = _smooth_field(shape, (*_words(seed), 1), (thin, thin, 3 * feature_voxels))
    strands[polymer] = np.inf
    return _top_share(strands, solid).astype(np.uint8)


def _correlation_length(chord: float, share: float, curvature: float) -> float:
    """Return the length ℓ for which the excursion set with this share of the voxels has this mean chord.

    The mean chord is 2·share / crossings per length, where −ρ''(0) = curvature/ℓ².
    """
    return chord * exp(-0.5 * ndtri(1 - share) ** 2) / pi * sqrt(curvature) / (2 * share)


def _smooth_field(shape: Sequence[int], seed: Seed, lengths: Sequence[float], layered: bool = False) -> np.ndarray:
    """Return a Gaussian field of unit variance, float32, with a preferred distance and no grid in it.

    The spectral density is |κ|² exp(−|κ|²/2), where κ = k·ℓ per axis (−ρ'' = 5/3ℓ²). If the field is layered along x,
    it is κx⁴ exp(−|κ|²/2) (−ρ'' = 5/ℓ²).
    """
    torus = _torus(shape, [4 * length for length in lengths])
    spectrum = fft.rfftn(_white(torus, seed, 1), overwrite_x=True, workers=cores())
    square = np.zeros(spectrum.shape, np.float32)
    for axis, (n, length) in enumerate(zip(torus, lengths, strict=True)):
        wave = fft.rfftfreq(n) if axis == 2 else fft.fftfreq(n)
        along = ((2 * pi * length * wave) ** 2).astype(np.float32)[_along(axis)]
        square += along
    spectrum *= along if layered else np.sqrt(square)
    square *= np.float32(-0.25)
    spectrum *= np.exp(square, out=square)
    del square
    field = fft.irfftn(spectrum, torus, overwrite_x=True, workers=cores())
    deviation = field.std(dtype=np.float64)
    return field[tuple(slice(n) for n in shape)] / np.float32(deviation)


def _torus(shape: Sequence[int], padding: Sequence[float]) -> Triple:
    return triple([fft.next_fast_len(int(n + p) + 1, real=True) for n, p in zip(shape, padding, strict=True)])


def _white(torus: Triple, seed: Seed, parts: int) -> np.ndarray:
    """Return white noise: float32 for one part, complex64 for two."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(list(_words(seed)))))
    noise = generator.standard_normal((*torus[:2], torus[2] * parts), np.float32)
    return noise if parts == 1 else noise.view(np.complex64)


def _words(seed: Seed) -> tuple[int, ...]:
    return (seed,) if isinstance(seed, int) else tuple(seed)


def _distance(n: int, step: float) -> np.ndarray:
    """Return the distance of each voxel to voxel 0 around a ring of n voxels."""
    place = np.arange(n, dtype=np.float32)
    return np.minimum(place, n - place) * np.float32(step)


def _along(axis: int) -> tuple[slice | None, ...]:
    return tuple(slice(None) if a == axis else None for a in range(3))


def _top_share(field: np.ndarray, share: float) -> np.ndarray:
    """Return an array that is True for the given share of voxels with the highest values."""
    count = round(share * field.size)
    if count in (0, field.size):
        return np.full(field.shape, count > 0)
    threshold = np.partition(field, field.size - count, axis=None)[field.size - count]
    return field >= threshold
