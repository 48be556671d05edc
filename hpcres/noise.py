"""Normals as a function of place: the value at low-res voxel (z, y, x) depends only on the seed and on this index.

The voxel index is the input of Philox4x32-10 (Salmon et al. 2011). Sixteen bits of each word select an entry in a
table of normal quantiles. This takes only integers and one look-up, so values are the same on every machine, for every
tiling and in any order. A smoothed value is a sum over the same voxels in the same order wherever the requested box
ends.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction
from math import ceil
from statistics import NormalDist

import numpy as np

from hpcres.compiled import compiled
from hpcres.geometry import PERIODIC, Box, Triple, pieces_of

NOISE_VOXELS = 2**32
"""As far as the noise reaches along each axis, in low-res voxels."""
_REACH = 3
"""Standard deviations of a Gaussian at which it is cut off."""
# Quantiles at the middle of 65536 equal slices of probability, scaled to unit variance.
_QUANTILES = np.array([NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(65536)])
_QUANTILES = (_QUANTILES / np.sqrt(np.mean(_QUANTILES**2))).astype(np.float32)


@compiled(inline="always")
def _philox(c0, c1, c2, c3, k0, k1):
    mask = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * c0
        p1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & mask, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & mask
        k0 = (k0 + np.uint64(0x9E3779B9)) & mask
        k1 = (k1 + np.uint64(0xBB67AE85)) & mask
    return c0, c1, c2, c3


@compiled
def _fill(out, z0, y0, x0, k0, k1, channel, quantiles):
    nz, ny, nx = out.shape
    shift = np.uint64(16)
    for z in range(nz):
        for y in range(ny):
            # One Philox block serves four neighbours along x: the lane is x mod 4 of the global index.
            first = x0 // 4
            last = (x0 + nx - 1) // 4
            for block in range(first, last + 1):
                words = _philox(np.uint64(block), np.uint64(y0 + y), np.uint64(z0 + z), np.uint64(channel), k0, k1)
                for lane in range(4):
                    x = block * 4 + lane - x0
                    if 0 <= x < nx:
                        out[z, y, x] = quantiles[words[lane] >> shift]


def normals(seed: int, box: Box, channel: int = 0) -> np.ndarray:
    """Return standard normals for a box of low-res voxels.

    Parameters
    ----------
    seed : int
        64-bit seed.
    box : Box
        Global indices of low-res voxels, each at least 0 and below 2³².
    channel : int
        Below 2³²; each channel is an independent field of the same seed.

    Returns
    -------
    ndarray
        float32 (z, y, x).
    """
    assert min(box.start) >= 0, box
    assert max(box.stop) <= NOISE_VOXELS, box
    out = np.empty(box.shape, np.float32)
    z, y, x = box.start
    key = seed % 2**64
    if out.size:
        _fill(out, z, y, x, np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32), channel, _QUANTILES)
    return out


def gaussian_taps(sigma_voxels: float, scale: Fraction) -> np.ndarray:
    """Return the weights along one axis that smooth white noise to a Gaussian correlation.

    The smoothed noise has correlation exp(−h² / 4σ²) at distance h and unit variance. Decimal arithmetic has the same
    result on every machine; a library's exp differs by processor in its last bit.

    Parameters
    ----------
    sigma_voxels : float
        σ in high-res voxels. 0 gives the single weight 1.
    scale : Fraction
        High-res voxels per low-res voxel along an axis.

    Returns
    -------
    ndarray
        float64, one weight for each of an odd number of low-res voxels.
    """
    sigma = sigma_voxels / float(scale)
    reach = ceil(_REACH * sigma)
    with localcontext(prec=28):
        places = [Decimal(place) / Decimal(sigma or 1) for place in range(-reach, reach + 1)]
        taps = [(-place * place / 2).exp() for place in places]
        norm = sum((tap * tap for tap in taps), Decimal()).sqrt()
        return np.array([float(tap / norm) for tap in taps])


def smoothed(white: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Smooth white noise by the same weights along each axis.

    Parameters
    ----------
    white : ndarray
        float32 (z, y, x).
    taps : ndarray
        Weights of an odd number of voxels, as `gaussian_taps` gives them.

    Returns
    -------
    ndarray
        float32 (z, y, x), without the outermost len(taps) // 2 voxels on each side.
    """
    from scipy.ndimage import correlate1d  # takes a second to import, and only smooth noise needs it

    reach = len(taps) // 2
    for axis in range(3) if reach else ():
        white = correlate1d(white, taps, axis)
    return white[tuple(slice(reach, n - reach) for n in white.shape)]


def noise_of(seed: int, channel: int, taps: np.ndarray, box: Box, ends: Triple) -> np.ndarray:
    """Return the smoothed normals that a volume painted with `seed` has in a box of low-res voxels.

    Parameters
    ----------
    seed, channel : int
        As in `normals`.
    taps : ndarray
        Weights along an axis, as `gaussian_taps` gives them.
    box : Box
        Low-res voxels.
    ends : tuple of int
        Voxels along z, y, x after which the noise starts anew: those of the volume along an axis on which it repeats,
        else NOISE_VOXELS.

    Returns
    -------
    ndarray
        float32 (z, y, x).
    """
    reach = len(taps) // 2
    return smoothed(_white(seed, channel, box.grown(reach, reach), ends), taps)  # held by nobody else while it is


def _white(seed: int, channel: int, box: Box, ends: Triple) -> np.ndarray:
    pieces = pieces_of(box, ends, PERIODIC)
    parts = [normals(seed, piece.source, channel) for piece in pieces]
    if len(parts) == 1:
        return parts[0]
    white = np.empty(box.shape, np.float32)
    for piece, part in zip(pieces, parts, strict=True):
        white[piece.place.slices] = part
    return white
