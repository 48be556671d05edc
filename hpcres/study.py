"""The study: everything a run needs, each setting with its unit, default and limits, and the places of all results.

Lengths carry their unit (`65 nm`). The module `study_file` reads a study from a file.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    create_model,
    model_validator,
)

from hpcres.errors import InputError
from hpcres.families import Family, family_of, register
from hpcres.geometry import MIRROR, REPLICATE, Boundaries, Boundary
from hpcres.lengths import Length, parse_length
from hpcres.old_names import rename_old_settings

PATCH_VOXELS = 64
"""Scale factors are 64/d, because d low-res voxels must fill so many high-res ones exactly."""
LEAST_SLICE_VOXELS = 16
"""A critic halves a slice four times."""
_FEWEST_LOW_RES = 2  # d: a cube of one low-res voxel would have no structure to learn from


def _scale_factor(value: Any) -> Fraction:
    try:
        scale = Fraction(str(value)).limit_denominator(64) if isinstance(value, float) else Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{value!r} is not a number or a fraction; write 4, 2.5 or 16/3") from None
    low_res_edge = Fraction(PATCH_VOXELS) / scale if scale > 0 else Fraction(0)
    if low_res_edge.denominator != 1 or not _FEWEST_LOW_RES <= low_res_edge <= PATCH_VOXELS:
        fits = [Fraction(PATCH_VOXELS, d) for d in range(_FEWEST_LOW_RES, PATCH_VOXELS + 1)]
        near = min(fits, key=lambda f: abs(f - scale))
        raise ValueError(
            f"{value} is not 64/d with d = {_FEWEST_LOW_RES} … 64, so low-res voxels cannot fill a training cube of "
            f"64; the nearest is {near}"
        )
    return scale


ScaleFactor = Annotated[Fraction, PlainValidator(_scale_factor), PlainSerializer(str)]
Voxel = Annotated[Length, PlainValidator(parse_length), PlainSerializer(str)]
Grid = Annotated[
    tuple[int, int, int], PlainValidator(lambda v: parse_grid(v)), PlainSerializer(lambda v: "x".join(map(str, v)))
]
BoundarySetting = Annotated[
    Boundaries, PlainValidator(lambda v: parse_boundary(v)), PlainSerializer(lambda v: dict(zip("zyx", v, strict=True)))
]
Plane = Literal["zy", "zx", "yx", "yz", "xz", "xy"]
"""Rows and columns of an image: `zx` is a slice normal to y whose rows run along z."""
Device = Literal["auto", "cpu", "cuda"]
PhaseName = Annotated[str, AfterValidator(lambda v: checked_phase_name(v))]


def checked_phase_name(name: str) -> str:
    """Return the name of a phase if it is valid in tables, in keys such as pore|nickel and in paths.

    Raises
    ------
    ValueError
        The name is not valid. The message is worded for the user.
    """
    remedy = "write letters, digits, blanks, - and _"
    if not name or name != name.strip():
        raise ValueError(f"phase name {name!r} is empty, or begins or ends with a blank; {remedy}")
    if bad := next((c for c in name if c in "|/\\" or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")), None):
        what = f"{bad!r}" if bad in "|/\\" else f"the control character {bad!r}"
        raise ValueError(f"phase name {name!r} contains {what}, which separates names in results and paths; {remedy}")
    if name in (".", "..") or ".." in name:
        raise ValueError(f"phase name {name!r} contains .., which leads out of a folder in a path; {remedy}")
    return name


def parse_grid(value: Any) -> tuple[int, int, int]:
    """Parse `8x8x8`, numbers along z, y and x, or a sequence of three numbers, as three integers.

    Raises
    ------
    ValueError
        These are not three numbers of at least 1. The message is worded for the user.
    """
    parts = re.split(r"[x×]", value) if isinstance(value, str) else value
    try:
        z, y, x = (int(part) for part in parts)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is not three numbers; write for example 8x8x8") from None
    if min(z, y, x) < 1:
        raise ValueError(f"{value}: every axis needs at least one; use for example 2x2x2")
    return z, y, x


def parse_boundary(value: Any) -> Boundaries:
    """Parse what lies beyond the volume along z, y and x.

    Parameters
    ----------
    value : str, mapping or sequence
        `periodic` for all axes, `{z: periodic}` with replicate for the other axes, or three words for z, y, x.

    Raises
    ------
    ValueError
        A word is no boundary, or a key is no axis. The message is worded for the user.
    """
    words: Any = (value,) * 3 if isinstance(value, str) else value
    if isinstance(value, dict):
        if unknown := [key for key in value if key not in ("z", "y", "x")]:
            raise ValueError(f"{unknown[0]!r} is no axis; use z, y and x")
        words = [value.get(axis, "replicate") for axis in "zyx"]
    if not isinstance(words, list | tuple) or len(words) != 3:
        raise ValueError(f"{value!r} is neither one word nor one an axis; write periodic or {{z: periodic}}")
    for word in words:
        if word not in get_args(Boundary):
            raise ValueError(f"{word!r} is no boundary; use one of {', '.join(get_args(Boundary))}")
    z, y, x = words
    return z, y, x


class Section(BaseModel):
    """A section of the study, which is immutable and refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
    phases: dict[int, PhaseName | tuple[PhaseName, ...]] = {}
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


class NetworkSettings(Section):
    """Settings that the section `network` of every family has."""

    family: str

    @property
    def may_change(self) -> frozenset[str]:
        """Settings that a resumed run may have different from the run it continues."""
        return frozenset()


class Network(NetworkSettings):
    """Generator and critic of Dahari 2022; widths are exponents of two."""

    family: Literal["superres"] = "superres"
    """The kind of generator, which also decides what else is set under `network` and `training`."""
    width: Annotated[int, Field(ge=2, le=10)] = 8
    least_width: Annotated[int, Field(ge=2, le=10)] | None = None
    """The smallest width that training may choose where `training.minutes` are too few for `training.least_steps` on
    this machine. The critics are then at most 2 wider. By default training does not change the width."""
    residual_blocks: Annotated[int, Field(ge=1, le=16)] = 1
    padding: Literal["replicate", "zeros"] = "replicate"
    last_stage: Literal["resize", "transposed"] = "resize"
    critic_width: Annotated[int, Field(ge=4, le=11)] = 9
    noise_sigma_voxels: Annotated[tuple[Annotated[float, Field(ge=0, le=64)], ...], Field(min_length=1)] = (0.0,)
    """The generator's noise channels: standard deviation, in high-res voxels, of the Gaussian that smooths each. One of
    0, white, as published; smooth noise decides together what lies together."""

    @property
    def may_change(self) -> frozenset[str]:
        """Settings that a resumed run may have different from the run it continues."""
        return frozenset(("least_width",))


class TrainingSettings(Section):
    """Settings that the section `training` of every family has."""

    init_from: str | None = None
    """Another training's checkpoint.pt or best.pt whose weights a new run begins from; none by default, as published.
    Scale factor, widths and noise must be the same; phases may be others."""
    steps: Annotated[int, Field(ge=1)] = 100_000
    """Generator steps."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Wall-clock budget; the learning-rate schedule runs on it where it is given."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    final_learning_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the learning rate left at the end; the decay is linear over the last half."""
    quality_steps: Annotated[int, Field(ge=1)] | None = None
    """Generator steps between two judgements by what a user has (docs/training.md); none by default, as published."""
    keep: Literal["last", "best"] = "last"
    """Whose weights a finished run leaves in checkpoint.pt: the last, or those with the best score."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 10.0
    report_seconds: Annotated[float, Field(gt=0)] = 10.0
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads per process; by default the cores divided by the processes on this node, or fewer while other work
    uses the cores. Another number of threads changes the rounding of the losses."""

    @model_validator(mode="after")
    def _best_is_judged(self) -> TrainingSettings:
        if self.keep == "best" and self.quality_steps is None:
            raise ValueError("keep: best, but nothing is judged; set quality_steps")
        return self

    @property
    def boundaries(self) -> Boundaries:
        """Boundaries that suit a network trained with these settings, for what lies beyond the faces of a volume."""
        return REPLICATE

    @property
    def may_change(self) -> frozenset[str]:
        """Settings that a resumed run may have different from the run it continues."""
        return frozenset(
            ("steps", "minutes", "threads", "report_seconds", "checkpoint_minutes", "quality_steps", "keep")
        ) | {"init_from"}

    def refuse_misfit(self, study: Study) -> None:
        """Raise ValueError if these settings do not fit the rest of the study."""


class Training(TrainingSettings):
    """Algorithm 1 of Dahari 2022; every choice in it is a setting with the paper's value as default."""

    least_steps: Annotated[int, Field(ge=1)] = 100
    """If a trial shows that `minutes` are not enough for so many steps, training narrows the network
    (network.least_width) or refuses the run. It does neither with `init_from`. Fewer than 100 steps gave no usable
    generator with any recipe."""
    cubes: Annotated[int, Field(ge=1)] = 8
    """Cubes per step, over all processes."""
    cube_voxels: Annotated[int, Field(ge=16, le=512)] = 64
    """High-res voxels along the edge of a training cube, which whole low-res voxels must fill. At 128 the critics see
    four times the area, by one more convolution; memory and time of a cube grow as its volume."""
    slices_per_axis: Annotated[int, Field(ge=1)] | None = None
    """Random slices per cube and axis shown to the critic; by default all, which are 56 of a cube of 64³."""
    planes_apart: bool = False
    """Of an isotropic material, a critic for each plane, so that the slices of each look like the images by themselves
    and no direction differs; as published one for all planes together. An anisotropic material has three anyway."""
    diagonal_slices: bool = False
    """Show critics of their own slices at 45° to two axes, too, which tell of directions that no other slice shows; as
    many as slices_per_axis for each axis, and isotropic materials only. None by default, as published."""
    real_patches: Annotated[int, Field(ge=1)] | Literal["slices"] = 64
    """Patches of the images for each axis and critic step, over all processes, at least one a cube; 64 as in the
    published code. `slices` takes as many as generated slices."""
    penalties: Annotated[int, Field(ge=1)] | Literal["slices"] = 64
    """Pairs of a patch and a generated slice for each axis and critic step whose mixture has its gradient penalised,
    over all processes, at least one a cube; 64 as in the published code. `slices` takes as many as generated slices.
    There are never more than patches or slices."""
    critic_steps: Annotated[int, Field(ge=1)] = 5
    reuse_generated: bool = False
    """One generator forward serves the critic steps and the generator step."""
    adam_betas: tuple[float, float] = (0.5, 0.999)
    gradient_penalty: Annotated[float, Field(ge=0)] = 10.0
    masked_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Mean share of a low-res cube that a box hides from the generator, so that it learns to fill `low_res.unknown`."""
    warm_up_steps: Annotated[int, Field(ge=0)] = 0
    """First generator steps that learn to interpolate the low-res cubes, while the critics learn as ever; none by
    default, as published, and none after `init_from`."""
    noise_gain: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the noise channels' first weights; above 1, volumes of other noise differ more."""
    voxel_weight: Annotated[float, Field(ge=0)] = 10.0
    voxel_threshold: Annotated[float, Field(ge=0)] = 0.005
    fraction_weight: Annotated[float, Field(ge=0)] | None = None
    """Weight of how far the fractions of the visible phases in the whole block of each low-res voxel are off its label,
    beyond a margin for partial volume at boundaries, and off the labels' fractions all over the cubes. By default 800
    where `atypical_images` corrects, else none, as published; the published imaging operator sees the middle of a block
    only, and asks for a majority there."""
    atypical_images: Literal["follow", "correct"] = "follow"
    """Where the images have other fractions of the visible phases than the low-res volume: follow the images all the
    same, as published, or let the volume decide what it shows, and the images what only they show. With
    `low_res.one_sided` the images decide the fractions in any case."""
    lattice_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the square by which the share of faces between two phases differs with the position in the low-res
    lattice; none by default, as published."""
    pattern_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the difference between the shares of 2 × 2 label patterns in generated slices, over the last ten steps
    or so, and in the images; it grows as the learning rate falls. None by default, as published, and none during the
    warm-up."""
    pattern_tolerance: Annotated[float, Field(ge=0)] = 0.0
    """Limit of the voxel loss, as a mean over the last steps. Below it the weights of patterns and thin features grow
    by 3 % a step, from a tenth of their setting to all of it; above it they fall by 10 % a step. 0: they are constant.
    With a large weight from the start, training of some materials does not come to agree with the low-res volume
    (docs/recipes.md, The weight of patterns follows the voxel loss)."""
    pattern_spacings: Annotated[tuple[Annotated[int, Field(ge=1, le=15)], ...], Field(min_length=1)] = (1, 2, 4, 8)
    """How far apart the pixels of such a pattern are: each spacing has patterns of its own."""
    pattern_pixels: Literal[4, 6] = 4
    """Of 2 × 2 pixels, or of 2 × 3 and 3 × 2, which know more of how a phase hangs together and take memory with the
    cube of the number of phases, not its square: of two cubes a step 0.3 GB for three, 1.9 GB for six."""
    thin_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the difference between the shares of pixels, in generated slices and in the images, that differ from
    both neighbours along a line: lines one pixel wide and single pixels. As pattern_weight in all else, but not
    corrected where the images are not typical of the volume."""
    context: Annotated[int, Field(ge=0, le=8)] = 0
    """Low-res voxels around each training cube that the generator sees and nothing is asked of, so that no padding is
    near what the critics see; a multiple of q where the scale factor is p/q. None by default, as published."""
    reach_faces: bool = False
    """Draw cubes so that voxels at the low-res volume's faces are in as many as inner ones; by default, as published,
    every place inside the volume is as likely, and its outermost voxel is in one cube of many."""
    crop_voxels: Annotated[int, Field(ge=0, le=24)] = 4
    """High-res voxels cut from each face of a cube before the critic sees it."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the averaged generator that is saved, less in the first (1 + ema_growth) / (1 − ema) steps; 0 saves the
    generator itself."""
    ema_growth: Annotated[float, Field(ge=0, le=100)] = 0.5
    """Power with which the weight of a step in the average grows in these first steps."""
    recalibration_cubes: Annotated[int, Field(ge=1)] = 32
    """Cubes behind the batch-norm statistics of the saved generator, which are taken anew before it is saved, and
    behind `match_fractions`. Where so many can hold every voxel they are the volume with the noise that its seed
    paints it with, and no more than that takes; else typical ones."""
    match_fractions: bool = False
    """Shift the last biases of the saved generator until these cubes have the phase fractions of the images; where the
    images are of another place than the volume and not typical of it, leave it off."""
    quality_cubes: Annotated[int, Field(ge=1)] = 16
    """Cubes that are judged, always the same."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Number format of the convolutions; `auto` takes the one that a trial measures as faster where the run begins."""
    compile: bool = False
    """Compile the generator with torch.compile; needs a C++ compiler, and the first step takes a minute more."""

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if self.slice_voxels < LEAST_SLICE_VOXELS:
            raise ValueError(
                f"cube_voxels: {self.cube_voxels} less crop_voxels {self.crop_voxels} on both sides leaves slices of "
                f"{self.slice_voxels} voxels, and a critic needs {LEAST_SLICE_VOXELS}; use larger cubes or less crop"
            )
        across, seen = self.pattern_pixels // 2, self.slice_voxels
        if (across - 1) * max(self.pattern_spacings) >= seen:
            raise ValueError(
                f"pattern_spacings: {max(self.pattern_spacings)}, but {across} pixels so far apart are not within the "
                f"{seen} of a slice that are left after the crop; use a smaller spacing or a smaller crop_voxels"
            )
        return self

    @property
    def slice_voxels(self) -> int:
        """Edge, in voxels, of the slices that the critics see."""
        return self.cube_voxels - 2 * self.crop_voxels

    @property
    def padded_voxels(self) -> int:
        """High-res voxels at a cube's faces that padding may have changed, and that are left out of judgements."""
        return 0 if self.context else self.crop_voxels

    @property
    def boundaries(self) -> Boundaries:
        """Boundaries that suit a network trained with these settings, for what lies beyond the faces of a volume."""
        return MIRROR if self.context or self.atypical_images == "correct" else REPLICATE

    @property
    def may_change(self) -> frozenset[str]:
        """Settings that a resumed run may have different from the run it continues."""
        return super().may_change | {"compile", "match_fractions", "least_steps"}

    def refuse_misfit(self, study: Study) -> None:
        """Raise ValueError if cubes, diagonal slices or context do not fit the rest of the study."""
        low_res_edge = self.cube_voxels / study.scale_factor
        if low_res_edge.denominator != 1 or low_res_edge < _FEWEST_LOW_RES:
            every = study.scale_factor.numerator
            raise ValueError(
                f"training.cube_voxels: {self.cube_voxels} high-res voxels are not {_FEWEST_LOW_RES} or more "
                f"whole low-res ones at scale factor {study.scale_factor}; use a multiple of {every}"
            )
        if self.diagonal_slices and not study.high_res.isotropic:
            raise ValueError(
                "training.diagonal_slices: no image shows a plane at 45° of an anisotropic material; set it to false, "
                "or high_res.isotropic to true"
            )
        if (around := self.context) % (q := study.scale_factor.denominator):
            raise ValueError(
                f"training.context: {around} low-res voxels are no whole number of high-res ones at scale factor "
                f"{study.scale_factor}; use a multiple of {q}"
            )


class Inference(Section):
    """How the volume is painted: tiles, storage, boundaries, precision, and the number of seeds."""

    output_voxels: Grid | None = None
    """Shape of the output, z, y, x, where no low-res volume gives it: of a generator fed by latents alone."""
    tiles: Grid = (2, 2, 2)
    chunk_voxels: Literal[16, 32, 64, 128] | None = None
    """Inner chunk of the store; 128, or 64 where the volume is below 512³."""
    boundary: BoundarySetting | None = None
    """What lies beyond the volume, z, y, x: its outermost voxels again (`replicate`, as published), its other side
    (`periodic`) or its mirror image (`mirror`). One for all axes or as `{z: periodic}`, where the others replicate; by
    default mirror for a network trained with context, which has never seen a face, or with `atypical_images:
    correct`, whose fractions are calibrated so; else replicate."""
    codec: Literal["zstd", "lz4"] = "zstd"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Half precision is faster, above all on GPUs, and changes labels; infer says how many."""
    ensemble: Annotated[int, Field(ge=1, le=255)] = 1
    """Seeds to paint, from the study's on: labels of the first, the share of seeds that agree, and metrics of all."""
    threads: Annotated[int, Field(ge=1)] | None = None


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
        "volume_fraction", "specific_surface_area", "interphase_area", "tpb_density", "normalised_tpb", "tau", "D_rel"
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


class Phantom(Section):
    """Ground truth, low-res volume and slices made by `hpcres phantom`."""

    kind: Literal["three-phase", "chi2", "separator"] = "three-phase"
    voxels: Grid = (256, 256, 256)
    feature_voxels: Annotated[float, Field(gt=0)] = 12.0
    """Length scale of the structure, in high-res voxels."""
    porosity: Annotated[float, Field(gt=0, lt=1)] = 0.4
    slices_porosity: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of the realisation that the slices are cut from; by default that of the volume."""
    slices: Annotated[int, Field(ge=1)] = 2
    """High-res slices cut per plane from a volume of another seed than the truth."""
    slice_voxels: Annotated[int, Field(ge=64)] | None = None
    """Edge of these slices, which are square; by default they are as large as the volume's faces."""


class Cluster(Section):
    """Resources to ask Slurm for; `hpcres plan` turns them into the sbatch lines."""

    partition: str | None = None
    train_nodes: Annotated[int, Field(ge=1)] = 1
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    infer_nodes: Annotated[int, Field(ge=1)] = 1
    ranks_per_node: Annotated[int, Field(ge=1)] = 2
    cores_per_rank: Annotated[int, Field(ge=1)] = 1
    train_hours: Annotated[float, Field(gt=0)] = 12.0


class Study(Section):
    """A study of the family superres.

    `study_model` gives the model of another family. It is this one with other sections `network` and `training`. If the
    family needs no low-res volume, `low_res` may be None. If it needs no images, there may be none.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    output: str = "results"
    """Folder for everything the stages write."""
    scale_factor: ScaleFactor
    recipe: Literal["auto"] | None = None
    """`auto`: training chooses a shipped recipe by the images, the scale factor, the visible phases, the minutes and
    the speed of this machine, and says why. What the study sets under `network` and `training` goes before the recipe.
    By default there is no recipe, and settings that are not given are as published."""
    high_res: HighRes
    low_res: LowRes
    imaging: Imaging = Imaging()
    network: Network = Network()
    training: Training = Training()
    inference: Inference = Inference()
    metrics: Metrics = Metrics()
    reference: Reference = Reference()
    phantom: Phantom | None = None
    cluster: Cluster = Cluster()
    device: Device = "auto"
    allow_voxel_size_mismatch: bool = False
    """Use the study's voxel size where a file gives one that differs by more than 2 %, instead of refusing it."""

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        if self.low_res is not None:
            self._refuse_other_phases(self.low_res)
        self.training.refuse_misfit(self)
        return self

    def _refuse_other_phases(self, low_res: LowRes) -> None:
        """Raise ValueError if the low-res volume has a phase that the images lack, or lacks one of theirs."""
        known = set(self.high_res.phases.values())
        named = [name for group in low_res.groups for name in group]
        for name in named:
            if name not in known:
                hint = difflib.get_close_matches(name, known, 1)
                raise ValueError(
                    f"low_res.phases: {name!r} is no phase of high_res ({', '.join(sorted(known))})"
                    + (f"; did you mean {hint[0]!r}?" if hint else "")
                )
        for name in self.high_res.phases.values():
            if name not in named:
                raise ValueError(
                    f"low_res.phases: {name!r} has no place, so the generator could not put it anywhere; list it "
                    f"with the phase it cannot be told from, as [{named[0]}, {name}]"
                )

    def plain(self, **options: Any) -> dict[str, Any]:
        """Return all settings as plain dicts, lists and numbers for JSON and YAML.

        pydantic's own JSON mode refuses file names that are not UTF-8.

        Parameters
        ----------
        **options
            Options of pydantic's model_dump.
        """
        return _plain(self.model_dump(**options))

    def as_json(self) -> str:
        """Return all settings that are not None as JSON text."""
        return json.dumps(self.plain(exclude_none=True))

    @staticmethod
    def of_json(text: str) -> Study:
        """Return the study that `as_json` wrote.

        A setting that an earlier version did not have gets the value that describes what that version did.

        Raises
        ------
        pydantic.ValidationError
            The text is not a valid study.
        """
        settings = json.loads(text)
        rename_old_settings(settings)
        model = study_model(settings)
        if model is Study:
            settings["training"] = {"real_patches": "slices", "penalties": "slices"} | settings.get("training", {})
        return model.model_validate(settings)

    @property
    def phases(self) -> tuple[str, ...]:
        """Phase names in the order 0, 1, 2, … of the output's labels."""
        return tuple(self.high_res.phases.values())

    @property
    def low_res_voxel_size(self) -> Length:
        """Edge of a low-res voxel: the high-res voxel size times the scale factor."""
        return self.high_res.voxel_size.times(self.scale_factor)

    @property
    def folder(self) -> Path:
        """Folder for everything the stages write."""
        return Path(self.output)

    @property
    def inputs(self) -> list[str]:
        """Paths of all input files that the study names."""
        named = [image.path for image in self.high_res.images], () if self.low_res is None else self.low_res.paths
        single = self.reference.volume, self.training.init_from
        return [*(path for paths in named for path in paths), *(path for path in single if path is not None)]

    @property
    def checkpoint_path(self) -> Path:
        """Path of checkpoint.pt, which training writes and inference reads."""
        return self.folder / "checkpoint.pt"

    @property
    def best_path(self) -> Path:
        """Path of the generator with the best score so far, if training judges generators."""
        return self.folder / "best.pt"

    @property
    def labels_path(self) -> Path:
        """Path of the painted volume, labels.zarr."""
        return self.folder / "labels.zarr"

    @property
    def metrics_path(self) -> Path:
        """Path of metrics.json."""
        return self.folder / "metrics.json"

    @property
    def transport_path(self) -> Path:
        """Path of transport.json."""
        return self.folder / "transport.json"

    @property
    def report_path(self) -> Path:
        """Path of the page, report.html."""
        return self.folder / "report.html"


class _HighResWithoutImages(HighRes):
    images: tuple[HighResImage, ...] = ()


@cache
def _model_of(family: Family) -> type[Study]:
    if family.name == "superres":
        return Study
    fields: dict[str, Any] = {
        "network": (family.network, Field(default_factory=lambda: family.network())),
        "training": (family.training, Field(default_factory=lambda: family.training())),
    }
    if not family.needs_low_res:
        fields["low_res"] = (LowRes | None, None)
    if not family.needs_images:
        fields["high_res"] = (_HighResWithoutImages, ...)
    return create_model("Study", __base__=Study, **fields)


def study_model(settings: Any) -> type[Study]:
    """Return the model that validates these settings, by their network.family.

    Parameters
    ----------
    settings : object
        Content of a study file.

    Raises
    ------
    InputError
        No family has this name.
    """
    network = settings.get("network") if isinstance(settings, dict) else None
    return _model_of(family_of(network.get("family", "superres") if isinstance(network, dict) else "superres"))


register(
    Family(
        "superres",
        Network,
        Training,
        "hpcres.networks.superres:of_study",
        "hpcres.networks.superres:of_config",
        "hpcres.training.superres:SuperResTrainer",
        "hpcres.training.autotune:as_chosen",
    )
)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
