"""Sections on what is given: the sharp images, the low-res volume, and how it was formed from the sharp structure."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hpcres.errors import InputError
from hpcres.study.values import PhaseName, Plane, Section, Voxel


class RawHeader(Section):
    """What a file without a header does not say: shape, type of the values, byte order, and offset of the data."""

    shape: tuple[int, int, int]
    dtype: Literal["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"] = "uint8"
    byte_order: Literal["little", "big"] = "little"
    offset_bytes: Annotated[int, Field(ge=0)] = 0


class HighResImage(Section):
    """One sharp image or stack of slices (slice, row, column); sizes may differ between images."""

    path: str
    planes: tuple[Plane, ...] = ()
    """Planes this image shows; required of every image when the material is anisotropic."""
    augment: bool | Literal["mirrors"] | None = None
    """All 8 mirrors and rotations, or `mirrors` for the 4 that keep rows along rows; by default all where the material
    is isotropic, else none. An image listed once per plane can have another answer for each."""


class HighRes(Section):
    """The sharp images: phases, voxel size, isotropy, and the files."""

    phases: dict[int, PhaseName]
    """Label in the images → phase; the order is that of the output's labels 0, 1, 2, …"""
    voxel_size: Voxel
    isotropic: bool = True
    images: Annotated[tuple[HighResImage, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> HighRes:
        _refuse_repeated(list(self.phases.values()))
        if len(self.phases) < 2:
            raise ValueError("phases: at least two are needed to have anything to resolve")
        if len(self.phases) > 16:
            raise ValueError(f"phases: {len(self.phases)} given, at most 16 can be measured; merge some")
        if not self.isotropic:
            normals = {(set("zyx") - set(plane)).pop() for image in self.images for plane in image.planes}
            for image in self.images:
                if not image.planes:
                    raise ValueError(f"images: {image.path} has no planes, which an anisotropic material needs")
            if missing := [axis for axis in "zyx" if axis not in normals]:
                raise ValueError(
                    f"images: none shows the plane normal to {missing[0]}; the critic of that plane would have "
                    f"no example, so give one image with planes for it"
                )
        return self


class LowResChannel(Section):
    """The probability, in every low-res voxel, of a phase or of phases that the coarse image cannot tell apart."""

    path: str
    """As of labels; floats 0 … 1, uint8 0 … 255 or uint16 0 … 65535."""
    phases: PhaseName | tuple[PhaseName, ...]
    raw: RawHeader | None = None


class LowRes(Section):
    """The low-res volume: labels (`path` and `phases`) or probabilities (`channels`)."""

    path: str | None = None
    """TIFF, .npy, .h5:/dataset, raw (with `raw`), or OME-Zarr."""
    phases: dict[int, PhaseName | tuple[PhaseName, ...]] = {}  # noqa: RUF012 - pydantic copies it for each section
    """Label in the volume → phase, or the list of phases the coarse image cannot tell apart."""
    channels: tuple[LowResChannel, ...] = ()
    """Probabilities in place of labels; a voxel where all are 0 is unknown."""
    unknown: tuple[int, ...] = ()
    """Labels of voxels that are damaged or masked: the generator is told nothing of them and fills them in."""
    one_sided: tuple[PhaseName, ...] = ()
    """Phases, as the pore, of which the output may have less than the volume shows: the voxel-wise loss of training
    leaves out the groups they are in, and all voxels that show one of these."""
    raw: RawHeader | None = None

    @model_validator(mode="after")
    def _consistent(self) -> LowRes:
        if self.channels:
            if given := [key for key in ("path", "phases", "unknown", "raw") if getattr(self, key)]:
                raise ValueError(
                    f"{given[0]} is of a label volume, channels are probabilities, and both are given; keep one of "
                    "them (a voxel where all channels are 0 is unknown)"
                )
        elif self.path is None:
            raise ValueError("no volume; give path and phases of one of labels, or channels of probabilities")
        _refuse_repeated([name for names in self.groups for name in names])
        if len(self.groups) < 2:
            what = "channels" if self.channels else "phases"
            raise ValueError(f"{what}: at least two are needed, or the volume tells the generator nothing")
        for label in self.unknown:
            if label in self.phases or self.unknown.count(label) > 1:
                raise ValueError(f"unknown: label {label} is given twice, or has a phase as well; keep one")
        named = [name for group in self.groups for name in group]
        for name in self.one_sided:
            if name not in named:
                hint = difflib.get_close_matches(name, named, 1)
                raise ValueError(
                    f"one_sided: {name!r} is no phase of low_res ({', '.join(named)})"
                    + (f"; did you mean {hint[0]!r}?" if hint else "")
                )
        if not self.two_sided:
            raise ValueError(
                f"one_sided: {', '.join(self.one_sided)} are of all groups, so that the low-res volume would ask "
                "nothing of the output; leave one out"
            )
        return self

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The phases behind each low-res channel, in the order of the file."""
        every = [channel.phases for channel in self.channels] or self.phases.values()
        return tuple((v,) if isinstance(v, str) else v for v in every)

    @property
    def two_sided(self) -> list[int]:
        """Numbers of the groups without a phase of `one_sided`."""
        return [k for k, group in enumerate(self.groups) if not set(group) & set(self.one_sided)]

    @property
    def labels(self) -> tuple[int, ...]:
        """Label of each group in the volume; for probabilities the number of its channel."""
        return tuple(range(len(self.channels))) or tuple(self.phases)

    @property
    def holds(self) -> str:
        """What the volume holds, `probabilities` or `labels`."""
        return "probabilities" if self.channels else "labels"

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the files: one of labels, or one for each channel of probabilities."""
        return tuple(channel.path for channel in self.channels) or (str(self.path),)

    def at(self, paths: Sequence[str], raw: Sequence[RawHeader | None]) -> LowRes:
        """Return the same section for other files.

        Parameters
        ----------
        paths : sequence of str
            One file of labels, or one for each channel.
        raw : sequence of RawHeader or None
            Header of each file, None for a file that has one.

        Raises
        ------
        InputError
            There must be more or fewer files.
        """
        if len(paths) != len(self.paths):
            groups = "; ".join(" + ".join(group) for group in self.groups)
            each = f"a file for each of {len(self.channels)} channels ({groups})"
            due = each if self.channels else "one file of labels"
            raise InputError(f"{', '.join(paths)}: the network was trained on {self.holds}; give {due}")
        if not self.channels:
            return self.model_copy(update={"path": paths[0], "raw": raw[0]})
        every = zip(self.channels, paths, raw, strict=True)
        return self.model_copy(
            update={"channels": tuple(c.model_copy(update={"path": p, "raw": r}) for c, p, r in every)}
        )


def _refuse_repeated(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"phases: {name!r} is named twice; give every label a phase of its own")


class Imaging(Section):
    """How the coarse image was formed from the sharp structure (definitions.md, Downsampling)."""

    operator: Literal["under-resolved", "under-sampled"] = "under-resolved"
    kernel_voxels: Annotated[int, Field(ge=1)] | None = None
    sigma_voxels: Annotated[float, Field(gt=0)] | None = None
    box: bool = False
    """Pixel binning instead of the Gaussian."""
    temperature: Annotated[float, Field(gt=0)] = 100.0
    """Factor on the phase fractions before the softmax that makes them near one-hot."""
