"""Sections on what is measured, and on what the measured numbers are compared with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hpcres.study.values import Section


class SubVolumes(Section):
    """Random cubes whose spread the papers plot."""

    count: Annotated[int, Field(ge=0)] = 256
    voxels: Annotated[int, Field(ge=8)] = 64
    transport_count: Annotated[int, Field(ge=0)] = 0
    """Of these, how many also get a tortuosity factor per phase (a few hundredths of a second each)."""


class Representative(Section):
    """Cubes of several edges whose spread says how large a volume must be."""

    count: Annotated[int, Field(ge=8)] = 64
    """Of each edge, or as many as fit side by side."""
    edges: tuple[Annotated[int, Field(ge=4)], ...] = (16, 24, 32, 48, 64, 96, 128, 192, 256)
    """In voxels; those of which fewer than eight fit are left out."""


class Spectrum(Section):
    """Slices whose Fourier transforms are compared."""

    slices: Annotated[int, Field(ge=1)] = 16
    """Normal to each axis, evenly spaced."""
    voxels: Annotated[int, Field(ge=8)] = 256
    """Edge of the square in the middle of a slice that is transformed."""


Statistic = Literal["correlations", "chords", "connectivity", "spectrum", "representative", "geodesic"]


class Metrics(Section):
    """What is measured of a volume, and with which options."""

    subvolumes: SubVolumes = SubVolumes()
    statistics: tuple[Statistic, ...] = ("correlations", "chords", "connectivity", "spectrum", "representative")
    """What is measured beside the counts; geodesic costs as much as all else many times over."""
    lags: Annotated[int, Field(ge=1)] = 64
    """Largest distance of correlations, in voxels along the axis."""
    geodesic_neighbours: Literal[6, 26] = 26
    """Steps of geodesic paths: through faces, or also through edges and corners, each as long as it is."""
    spectrum: Spectrum = Spectrum()
    representative: Representative = Representative()


class Published(Section):
    """A value from the literature that the report shows beside the measured one."""

    metric: Literal[
        "volume_fraction", "specific_surface_faces", "interphase_area", "tpb_density", "tpb_normalised", "tau", "D_rel"
    ]
    of: str = ""
    """Phase, or pair as `pore|nickel`, that the figure belongs to; lengths in µm."""
    value: float
    spread: float | None = None
    source: str


class Reference(Section):
    """References that the result is compared with."""

    volume: str | None = None
    """Ground truth of the same region, labels as in `high_res.phases`' order; never used for training."""
    published: tuple[Published, ...] = ()
