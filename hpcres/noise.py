"""Normals as a function of place: the value at low-res voxel (z, y, x) depends on the seed and that index alone.

Philox4x32-10 (Salmon et al. 2011) on the voxel index, sixteen bits of each word through a table of normal
quantiles: integers and one look-up, so the same on every machine, for every tiling and in any order. Smoothed, a value
is a sum over the same voxels in the same order wherever the box it is asked for ends.
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
    """Standard normals, float32 (z, y, x), for a box of global low-res voxel indices (each below 2³²).

    `seed` is 64-bit; `channel` (below 2³²) gives independent fields of the same seed.
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
    """Weights along one axis, float64, of an odd number of low-res voxels, that make white noise one of correlation
    exp(−h² / 4σ²) at distance h and unit variance; σ in high-res voxels. σ = 0 gives the single weight 1.

    Decimal arithmetic has the same result on every machine; a library's exp differs by processor in its last bit.
    """
    sigma = sigma_voxels / float(scale)
    reach = ceil(_REACH * sigma)
    with localcontext(prec=28):
        places = [Decimal(place) / Decimal(sigma or 1) for place in range(-reach, reach + 1)]
        taps = [(-place * place / 2).exp() for place in places]
        norm = sum((tap * tap for tap in taps), Decimal()).sqrt()
        return np.array([float(tap / norm) for tap in taps])


def smoothed(white: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """float32 (z, y, x) by the same `taps` along each axis, without the outermost len(taps) // 2 voxels."""
    from scipy.ndimage import correlate1d  # takes a second to import, and only smooth noise needs it

    reach = len(taps) // 2
    for axis in range(3) if reach else ():
        white = correlate1d(white, taps, axis)
    return white[tuple(slice(reach, n - reach) for n in white.shape)]


def noise_of(seed: int, channel: int, taps: np.ndarray, box: Box, ends: Triple) -> np.ndarray:
    """Smoothed normals, float32 (z, y, x), of a box of low-res voxels: what a volume painted with `seed` has there.

    Noise begins anew after `ends` voxels: those of the volume along an axis on which it repeats, else NOISE_VOXELS.
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
