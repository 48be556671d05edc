"""Section `phantom`: a made structure whose truth is known."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hpcres.study.values import Grid, Section

Covariance = Literal["exponential", "gaussian"]


class Cut(Section):
    """An excursion set of fields of its own, which cuts a further phase out of the last one (`kind: chi2`)."""

    share: Annotated[float, Field(gt=0, lt=1)]
    """Of the phase that is cut, how much the further phase takes."""
    feature_voxels: Annotated[float, Field(gt=0)] = 12.0
    covariance: Covariance = "exponential"


class Phantom(Section):
    """Ground truth, low-res volume and slices made by `hpcres phantom`."""

    kind: Literal["three-phase", "chi2", "separator"] = "three-phase"
    voxels: Grid = (256, 256, 256)
    feature_voxels: Annotated[float, Field(gt=0)] = 12.0
    """Length scale of the structure, in high-res voxels: of `chi2` the distance at which the covariance has fallen to
    1/e."""
    covariance: Covariance = "exponential"
    """Of the fields of `chi2`: exp(−h/f), as Furat et al. 2025 print it, whose surface is a fractal, or exp(−h²/f²)."""
    cuts: tuple[Cut, ...] = ()
    """Of `chi2`: further phases, each cut out of the one before it; the first cut is made in the solid."""
    porosity: Annotated[float, Field(gt=0, lt=1)] = 0.4
    slices_porosity: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of the realisation that the slices are cut from; by default that of the volume."""
    slices: Annotated[int, Field(ge=1)] = 2
    """High-res slices cut per plane from a volume of another seed than the truth."""
    slice_voxels: Annotated[int, Field(ge=64)] | None = None
    """Edge of these slices, which are square; by default they are as large as the volume's faces."""
