"""Radial FFT magnitude of slices (Dahari 2022, fig. 18).

The 0/1 map of every phase in a slice is Fourier transformed (numpy's, no window, no division). ln(1 + |F|) of the
centred transform is averaged over rings of spatial frequency and over the maps. Slices are cut to the same middle
square, so that volumes of different size compare. Where the two edges of a pixel differ, rings are rings of true
frequency, as wide as one step of the finer resolved axis and up to the smaller Nyquist frequency.

metrics.json holds it under `statistics.spectrum`: slices and, by the axis that they are normal to, pixels [rows,
columns], frequency [middle of each ring, in 1/length_unit], magnitude [mean over the slices] and standard_error [of
that mean, as if the slices were independent].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcres.counting import counts
from hpcres.geometry import AXES, Box, triple
from hpcres.metrics.schedule import Source, follow, submit
from hpcres.volumes.volume import Volume

if TYPE_CHECKING:
    from distributed import Client


def radial_magnitude(labels: np.ndarray, phases: int, spacing: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Average ln(1 + |F|) of one slice over rings of spatial frequency.

    The mean of the slice (frequency 0) is left out.

    Parameters
    ----------
    labels : np.ndarray
        Labels (row, column) below `phases`.
    phases : int
        Number of phases.
    spacing : tuple of float
        Pixel edges along rows' and columns' index.

    Returns
    -------
    frequency : np.ndarray
        Middle of each ring, cycles per unit of `spacing`.
    magnitude : np.ndarray
        Mean over each ring and over the phases.
    """
    along = [np.fft.fftfreq(n, h) for n, h in zip(labels.shape, spacing, strict=True)]
    width = 1 / max(n * h for n, h in zip(labels.shape, spacing, strict=True))
    rings = int(np.floor(1 / (2 * max(spacing)) / width + 1e-9))
    # Rounded at halves, ring k holds the frequencies nearest to k widths.
    ring = np.floor(np.hypot(along[0][:, None], along[1][None, :]) / width + 0.5).astype(int)
    pixels = np.bincount(ring.ravel())[1 : rings + 1]
    total = np.zeros(len(pixels))
    for phase in range(phases):
        magnitude = np.log1p(np.abs(np.fft.fft2(labels == phase)))
        total += np.bincount(ring.ravel(), magnitude.ravel())[1 : rings + 1]
    return np.arange(1, len(pixels) + 1) * width, total / (np.maximum(pixels, 1) * phases)


def _slice(
    at: tuple[int, int], source: Source, labels: tuple[int, ...], lengths: tuple[float, float, float], edge: int
) -> tuple[np.ndarray, np.ndarray]:
    axis, place = at
    volume = source.open()
    start = [max(0, n - edge) // 2 for n in volume.shape]
    stop = [a + min(n, edge) for a, n in zip(start, volume.shape, strict=True)]
    start[axis], stop[axis] = place, place + 1
    index, _ = counts.indexed(volume.read(Box(triple(start), triple(stop))), labels)
    row, column = (h for a, h in enumerate(lengths) if a != axis)
    return radial_magnitude(index.squeeze(axis), len(labels), (row, column))


def spectrum(
    volume: Volume,
    *,
    client: Client,
    labels: Sequence[int],
    lengths: tuple[float, float, float],
    slices: int,
    edge: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Compute the radial FFT magnitude of evenly spaced slices normal to each axis.

    Parameters
    ----------
    volume : Volume
        Labels (z, y, x).
    client : Client
        Dask client.
    labels : sequence of int
        Labels of the phases.
    lengths : tuple of float
        Voxel edges z, y, x.
    slices : int
        Largest number of slices normal to each axis.
    edge : int
        Edge of the middle square in voxels; slices are cut to at most `edge` × `edge`.
    progress : bool
        Whether to show progress.

    Returns
    -------
    dict
        The entry `statistics.spectrum` by axis.
    """
    items, result = [], {}
    for axis, n in enumerate(volume.shape):
        count = min(slices, n)
        items += [(axis, int((k + 0.5) * n / count)) for k in range(count)]
    futures = submit(client, _slice, items, source=Source.of(volume), labels=tuple(labels), lengths=lengths, edge=edge)
    follow(futures, f"spectra of {Path(volume.path).name}", progress)
    found = client.gather(futures)
    for axis, name in enumerate(AXES):
        own = [one for (a, _), one in zip(items, found, strict=True) if a == axis]
        values = np.array([magnitude for _, magnitude in own])
        error = values.std(axis=0, ddof=1) / np.sqrt(len(own)) if len(own) > 1 else None
        result[name] = {
            "slices": len(own),
            "pixels": [min(n, edge) for a, n in enumerate(volume.shape) if a != axis],
            "frequency": own[0][0].tolist(),
            "magnitude": values.mean(axis=0).tolist(),
            "standard_error": None if error is None else error.tolist(),
        }
    return result
