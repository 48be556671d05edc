"""Stationary Gaussian fields of any size, block by block: the value at a voxel depends on the seed and its place.

White noise that is a function of place (`hpcres.noise`) is convolved with a kernel whose autocorrelation is the
covariance asked for. The kernel comes from circulant embedding: it is the inverse transform of the square roots of the
eigenvalues of a circulant covariance matrix (Dietrich and Newsam 1997). It is cut off at a finite reach, so a block of
the field needs the noise of that block and of its margin only. Blocks lie on a fixed lattice, whatever box is read.
"""

from __future__ import annotations

from functools import cached_property
from math import ceil, prod
from typing import Literal

import numpy as np
from scipy import fft

from hpcres.cores import cores
from hpcres.geometry import Box, Triple, triple
from hpcres.noise import normals

Covariance = Literal["exponential", "gaussian"]
"""ρ(h) = exp(−h/f) or exp(−h²/f²) at distance h, where f is the distance at which ρ has fallen to 1/e."""
_REACH: dict[Covariance, float] = {"exponential": 6.0, "gaussian": 2.7}
"""Distance in units of f at which the kernel is cut off. The covariance is off by at most 5e-4 and 1e-5 then."""
_BLOCKS = (128, 256)
_BYTES_PER_VOXEL = 20
"""Of the window of a block: noise, two complex copies while it is transformed, and the eigenvalues of an octant."""


def correlation(covariance: Covariance, distance: np.ndarray, feature_voxels: float) -> np.ndarray:
    """Return ρ at a distance.

    Parameters
    ----------
    covariance : str
        `exponential` or `gaussian`.
    distance : ndarray
        Distance h in voxels.
    feature_voxels : float
        Distance at which ρ has fallen to 1/e, in voxels.

    Returns
    -------
    ndarray
        Correlation, float64.

    Examples
    --------
    >>> correlation("gaussian", np.array([0.0, 10.0]), 10.0).round(4)
    array([1.    , 0.3679])
    """
    relative = np.asarray(distance, np.float64) / feature_voxels
    return np.exp(-relative if covariance == "exponential" else -(relative**2))


class FieldPair:
    """Two independent Gaussian fields of zero mean, unit variance and the same covariance.

    Parameters
    ----------
    shape : tuple of int
        Voxels z, y, x of the volume.
    seed : int
        64-bit seed of the noise.
    feature_voxels : float
        Distance at which the correlation has fallen to 1/e, in voxels.
    covariance : str
        `exponential` or `gaussian`.
    """

    def __init__(self, shape: Triple, seed: int, feature_voxels: float, covariance: Covariance) -> None:
        self.shape, self._seed = shape, seed
        self._feature, self._covariance = feature_voxels, covariance
        self.reach = ceil(_REACH[covariance] * feature_voxels)
        """Voxels at which the kernel is cut off."""
        edge = _BLOCKS[0] if 2 * self.reach <= _BLOCKS[0] else _BLOCKS[1]
        self.block = triple([min(edge, n) for n in shape])
        """Voxels z, y, x of the blocks in which the fields are made; they do not depend on what is read."""
        self._window = triple([_even_length(n + 2 * self.reach) for n in self.block])

    @property
    def bytes(self) -> int:
        """Memory that a block takes while it is made."""
        return _BYTES_PER_VOXEL * prod(self._window)

    @cached_property
    def _kernel(self) -> np.ndarray:
        """Octant (z, y, x ≥ 0) of the kernel, float64, zero beyond the reach; its squares over all space add to 1."""
        edge = _even_length(3 * self.reach) // 2 + 1
        square = _squares(triple([edge] * 3))
        eigenvalues = fft.dctn(correlation(self._covariance, np.sqrt(square), self._feature), type=1, workers=cores())
        # The distance around a torus is not smooth half the way around, so a few eigenvalues are slightly negative.
        kernel = fft.idctn(np.sqrt(np.clip(eigenvalues, 0, None)), type=1, workers=cores())
        kernel[square > self.reach**2] = 0
        kernel = kernel[: self.reach + 1, : self.reach + 1, : self.reach + 1]
        return kernel / np.sqrt((_weights(kernel.shape) * kernel**2).sum())

    @cached_property
    def _response(self) -> np.ndarray:
        """Octant of the kernel's Fourier transform on the torus of a window, float32."""
        octant = np.zeros([n // 2 + 1 for n in self._window])
        octant[tuple(slice(n) for n in self._kernel.shape)] = self._kernel
        return fft.dctn(octant, type=1, workers=cores()).astype(np.float32)

    def achieved(self) -> np.ndarray:
        """Return the covariance that the fields have, which the cut of the kernel changes a little.

        Returns
        -------
        ndarray
            float64, an octant (z, y, x ≥ 0) of at least twice the reach.
        """
        octant = np.zeros((2 * self.reach + 2,) * 3)
        octant[tuple(slice(n) for n in self._kernel.shape)] = self._kernel
        return fft.idctn(fft.dctn(octant, type=1) ** 2, type=1)

    def make(self, block: Box) -> np.ndarray:
        """Make a block of both fields.

        Parameters
        ----------
        block : Box
            A block of the lattice of blocks, whole or cut off at the end of the volume.

        Returns
        -------
        ndarray
            complex64 (z, y, x): the two fields are its real and its imaginary part.
        """
        # Indices of noise are never negative: the noise of a voxel lies `reach` further along each axis.
        window = Box(block.start, triple([a + n for a, n in zip(block.start, self._window, strict=True)]))
        white = np.empty(window.shape, np.complex64)
        white.real, white.imag = normals(self._seed, window, 0), normals(self._seed, window, 1)
        spectrum = fft.fftn(white, overwrite_x=True, workers=cores())
        del white
        z_of, y_of, x_of = (np.minimum(np.arange(n), n - np.arange(n)) for n in self._window)
        for z in range(len(spectrum)):
            spectrum[z] *= self._response[z_of[z]][np.ix_(y_of, x_of)]
        fields = fft.ifftn(spectrum, overwrite_x=True, workers=cores())
        return fields[tuple(slice(self.reach, self.reach + n) for n in block.shape)]


def _even_length(least: int) -> int:
    length = fft.next_fast_len(least)
    while length % 2:
        length = fft.next_fast_len(length + 1)
    return int(length)


def _squares(shape: Triple) -> np.ndarray:
    """Return the squared distance of each voxel of an octant to its first voxel."""
    z, y, x = (np.arange(n, dtype=np.float64) ** 2 for n in shape)
    return z[:, None, None] + y[:, None] + x


def _weights(shape: tuple[int, ...]) -> np.ndarray:
    """Return how often each voxel of an octant occurs in the symmetric array that it stands for."""
    z, y, x = (np.minimum(np.arange(n) + 1, 2) for n in shape)
    return z[:, None, None] * y[:, None] * x
