"""Slices of volumes side by side: the same region of each, at the same magnification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

import numpy as np

from hpcres.geometry import AXES, Box, Triple, triple
from hpcres.lengths import EdgeLengths
from hpcres.pages import render
from hpcres.reports import drawing
from hpcres.study import Study
from hpcres.volumes.formats import file_of, read_images
from hpcres.volumes.phases import PHASE_COLOURS, PhaseMap, likeliest
from hpcres.volumes.volume import Volume

_SLICE_VOXELS = 256
"""Largest edge of a slice shown, in high-res voxels; larger volumes show their middle."""
UNKNOWN_COLOUR = np.full(3, 255.0)


@dataclass(frozen=True)
class View:
    """A volume as the slices show it.

    Attributes
    ----------
    title : str
        Name of the volume on the page.
    volume : Volume
        Labels or probabilities.
    step : Fraction
        Edge of the volume's voxels in high-res voxels.
    colours : ndarray
        Colours of the volume's labels.
    values : tuple of int
        Labels, in the order of the colours.
    unknown : tuple of int
        Labels of voxels that are unknown.
    """

    title: str
    volume: Volume
    step: Fraction
    colours: np.ndarray
    values: tuple[int, ...]
    unknown: tuple[int, ...] = ()


@dataclass(frozen=True)
class Crop:
    """The middle of a training image.

    Attributes
    ----------
    source : str
        Picture as a data URI.
    name : str
        Name of the image's file.
    rows, columns : int
        Size of the picture in pixels.
    of_rows, of_columns : int
        Size of the image in pixels.
    """

    source: str
    name: str
    rows: int
    columns: int
    of_rows: int
    of_columns: int


def slices_section(
    views: Sequence[View], legend: Mapping[str, np.ndarray], voxel: EdgeLengths, unit: str, crop: Crop | None
) -> str:
    """Return the section with a grid of images, a row for each plane and a column for each volume.

    All images show the same physical region. A training image follows.

    Parameters
    ----------
    views : sequence of View
        The volumes.
    legend : mapping
        Name → colour.
    voxel : tuple of float
        Edges z, y, x of a high-res voxel, in `unit`.
    unit : str
        Symbol of the unit, for the scale bars.
    crop : Crop or None
        The middle of a training image.

    Returns
    -------
    str
        HTML of the section.
    """
    main = next(s for s in views if s.step == 1)
    middle = [n // 2 for n in main.volume.shape]
    planes, shown_edge = [], 0
    for axis in range(3):
        sides = [a for a in range(3) if a != axis]
        start, stop = list(middle), [m + 1 for m in middle]
        for a in sides:
            # From whole coarse voxels on, so that every column shows the same region.
            period = views[0].step.numerator
            start[a] = max(0, main.volume.shape[a] - _SLICE_VOXELS) // 2 // period * period
            stop[a] = min(start[a] + _SLICE_VOXELS // period * period, main.volume.shape[a])
        region = Box(triple(start), triple(stop))
        shown_edge = region.shape[sides[1]]
        name = "".join(AXES[a] for a in sides)
        high, wide = (region.shape[a] * voxel[a] for a in sides)
        pictures = [
            {"alt": f"{view.title}, {name} plane", "source": drawing.picture(_slice(view, region, axis), view.colours)}
            for view in views
        ]
        planes.append(
            {
                "axis": AXES[axis],
                "middle": middle[axis],
                "sides": name,
                "pictures": pictures,
                "bar": _scale_bar(shown_edge, voxel[sides[1]], unit),
                "ratio": "" if len(set(voxel)) == 1 else f"{wide:.6g}/{high:.6g}",
            }
        )
    return render(
        "slices",
        titles=[view.title for view in views],
        planes=planes,
        legend=[(name, ",".join(str(int(c)) for c in colour)) for name, colour in legend.items()],
        whole=all(n <= _SLICE_VOXELS for n in main.volume.shape),
        shown_edge=shown_edge,
        crop=crop,
        crop_bar=None if crop is None else _scale_bar(crop.columns, voxel[2], unit),
    )


def _slice(view: View, region: Box, axis: int) -> np.ndarray:
    """Return the labels of a high-res region that is one voxel thin along `axis`.

    The result has positions (row, column) of the view's voxels: the number of the label in `view.values`.
    """
    start = [floor(a / view.step) for a in region.start]
    stop = [ceil(b / view.step) for b in region.stop]
    stop[axis] = start[axis] + 1
    box = Box(triple(start), triple(stop)).clipped(Box.whole(view.volume.shape))
    low_res = PhaseMap(view.values, view.volume.path, view.unknown).index(view.volume.read(box))
    return likeliest(low_res).squeeze(axis)


def training_crop(study: Study, colours: np.ndarray, shape: Triple) -> Crop | None:
    """Return the middle of the first high-res image; None if there is no image or its file does not exist.

    Parameters
    ----------
    study : Study
        Study that names the images.
    colours : ndarray
        Colours of the phases.
    shape : tuple of int
        Voxels z, y, x of the painted volume; the largest limits the size of the crop.

    Returns
    -------
    Crop or None
        The middle of the image.
    """
    if not study.high_res.images or not exists(study.high_res.images[0].path):
        return None
    image = study.high_res.images[0]
    first = PhaseMap(tuple(study.high_res.phases), image.path).index(read_images(image.path)[:1])[0]
    edges = [min(_SLICE_VOXELS, max(shape), n) for n in first.shape]
    at = [(n - e) // 2 for n, e in zip(first.shape, edges, strict=True)]
    part = first[at[0] : at[0] + edges[0], at[1] : at[1] + edges[1]]
    return Crop(drawing.picture(part, colours), Path(image.path).name, edges[0], edges[1], *first.shape)


def palette(count: int) -> np.ndarray:
    """Return the colours of the first `count` phases, float64 (count, 3); they repeat if there are too few."""
    return np.array([PHASE_COLOURS[i % len(PHASE_COLOURS)] for i in range(count)], float)


def _scale_bar(shown_voxels: int, voxel: float, unit: str) -> dict[str, Any]:
    """Return the share of the image, in percent, and the text of a bar of a round length, at most a third of it."""
    longest = shown_voxels * voxel / 3
    power = 10.0 ** floor(log10(longest))
    length = max(step * power for step in (1, 2, 5) if step * power <= longest * (1 + 1e-9))
    text = f"{length / 1000:g} µm" if unit == "nm" and length >= 1000 else f"{length:g} {unit}"
    return {"share": 100 * length / (shown_voxels * voxel), "text": text}


def exists(path: str) -> bool:
    """Return whether the file of an input exists."""
    return file_of(path).exists()
