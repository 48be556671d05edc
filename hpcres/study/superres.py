"""Sections `network` and `training` of the family superres: the published network and algorithm, and what was added."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from hpcres.families import Family, register
from hpcres.geometry import MIRROR, REPLICATE, Boundaries
from hpcres.study.family import NetworkSettings, TrainingSettings
from hpcres.study.values import FEWEST_LOW_RES

if TYPE_CHECKING:
    from hpcres.study import Study

LEAST_SLICE_VOXELS = 16
"""A critic halves a slice four times."""


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
        if low_res_edge.denominator != 1 or low_res_edge < FEWEST_LOW_RES:
            every = study.scale_factor.numerator
            raise ValueError(
                f"training.cube_voxels: {self.cube_voxels} high-res voxels are not {FEWEST_LOW_RES} or more "
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
