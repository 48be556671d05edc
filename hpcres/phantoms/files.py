"""The files of `hpcres phantom`: ground truth, low-res volume and slices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpcres import __version__
from hpcres.errors import InputError
from hpcres.geometry import Box, Triple, triple
from hpcres.lengths import cubic
from hpcres.memory import free_bytes
from hpcres.outputs import PHANTOM, refuse_output
from hpcres.phantoms.chi2 import Chi2Volume, Excursion, blocks_meeting
from hpcres.phantoms.materials import BINDER, LEAST_ACTIVE, Seed, no_active, separator, three_phase
from hpcres.progress import progress_display
from hpcres.signals import end_if_signalled
from hpcres.volumes.convert import convert
from hpcres.volumes.files import atomic_write
from hpcres.volumes.formats import open_volume
from hpcres.volumes.tiff import write_images
from hpcres.volumes.volume import Volume, array_volume

if TYPE_CHECKING:
    from hpcres.study import Phantom, Study


KINDS = {"chi2": 2, "three-phase": 3, "separator": 2}
"""Phases of each kind: pore, solid and a further one for each cut; pore, active and binder; pore and polymer."""
_BYTES_PER_VOXEL = 28
"""Of the torus that a kind other than chi2 is made on."""
_PLANES = {0: "yx", 1: "zx", 2: "zy"}
_FINEST_VOXELS = 4
"""Below this feature size the voxel lattice shows."""
_BLOCK_VOXELS = 96
"""High-res edge of the blocks that go one-hot through the imaging operator."""


def phantom_volume(phantom: Phantom, shape: Sequence[int], seed: Seed) -> Volume:
    """Return a study's phantom of any shape and seed as a volume.

    A χ² phantom is made while it is read; phantoms of other kinds are held.

    Parameters
    ----------
    phantom : Phantom
        Section `phantom` of the study.
    shape : sequence of int
        Voxels z, y, x.
    seed : int or sequence of int
        Seed of the fields.

    Returns
    -------
    Volume
        Labels (z, y, x), uint8.
    """
    name = f"{phantom.kind} phantom"
    if phantom.kind == "chi2":
        made = chi2_volume(phantom, shape, seed)
        return Volume(name, made.shape, made.dtype, made.blocks, made.read)
    kind = three_phase if phantom.kind == "three-phase" else separator
    return array_volume(kind(shape, seed, feature_voxels=phantom.feature_voxels, porosity=phantom.porosity), name)


def chi2_volume(phantom: Phantom, shape: Sequence[int], seed: Seed) -> Chi2Volume:
    """Return the χ² model of a study's phantom."""
    first = Excursion(1 - phantom.porosity, phantom.feature_voxels, phantom.covariance)
    return Chi2Volume(
        shape, seed, [first, *(Excursion(cut.share, cut.feature_voxels, cut.covariance) for cut in phantom.cuts)]
    )


def make_phantom(study: Study, overwrite: bool = False, progress: Callable[[str], None] | None = None) -> list[Path]:
    """Write the folder `<output>/phantom/` with the ground truth, the low-res volume and slices.

    The files are:

    - truth.zarr.
    - low_res.zarr, the truth through the study's imaging operator. For a study of probabilities low_res_0.tif,
      low_res_1.tif, …, one for each channel.
    - Slices of another realisation, so that training never sees the truth: slices.tif of an isotropic material, else
      slices_zy.tif, slices_zx.tif and slices_yx.tif. With `slices_porosity` the slices are not typical of the truth.

    The folder appears when it is complete.

    Parameters
    ----------
    study : Study
        Study with a section `phantom`.
    overwrite : bool
        Replace a folder that an earlier call made.
    progress : function, optional
        Called with the name of each part before it is made.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    InputError
        The study does not describe a phantom that can be made.
    """
    phantom, folder = _checked(study, overwrite)
    say = progress or (lambda _: None)
    labels_of = np.array(list(study.high_res.phases), np.int32)
    label_type = np.min_scalar_type(int(labels_of.max())) if labels_of.min() >= 0 else np.dtype(np.int32)
    # A setting that is not used is not listed, so the files have the same bytes as before there was the setting.
    unused = {
        name
        for name in ("slices_porosity", "covariance", "cuts")
        if getattr(phantom, name) == type(phantom).model_fields[name].default
    }
    made_by = phantom.model_dump(mode="json", exclude=unused)
    provenance = {"phantom": made_by, "seed": study.seed, "hpcres_version": __version__}
    with atomic_write(folder) as temporary:
        temporary.mkdir(parents=True)
        for axis, name in _slice_files(study).items():
            say(name)
            stack = labels_of.astype(label_type)[_slices(phantom, study.seed, axis)]
            write_images(temporary / name, stack)
        say("truth.zarr")
        shown = progress is not None
        with progress_display("phantom, shards of truth.zarr", shown=shown) as show:
            convert(
                phantom_volume(phantom, phantom.voxels, (study.seed, 0)),
                temporary / "truth.zarr",
                phases=dict(enumerate(study.phases)),
                voxel_size=cubic(study.high_res.voxel_size),
                provenance=provenance,
                progress=lambda done, total: show(done, total=total),
            )
        say("low_res")
        coarse = Imaged(open_volume(temporary / "truth.zarr"), study)
        if study.low_res.channels:
            for name, fractions in zip(_low_res_files(study), coarse.read(Box.whole(coarse.shape)), strict=True):
                write_images(temporary / name, fractions)
        else:
            names = {label: "+".join(group) for label, group in enumerate(study.low_res.groups)}
            with progress_display("phantom, shards of low_res.zarr", shown=shown) as show:
                convert(
                    Volume(f"{phantom.kind} phantom", coarse.shape, np.dtype(np.uint8), coarse.shape, coarse.read),
                    temporary / "low_res.zarr",
                    phases=names,
                    voxel_size=cubic(study.low_res_voxel_size),
                    provenance=provenance,
                    progress=lambda done, total: show(done, total=total),
                )
        end_if_signalled()
    return [folder / name for name in _files(study)]


def _files(study: Study) -> list[str]:
    return ["truth.zarr", *_low_res_files(study), *_slice_files(study).values()]


def _low_res_files(study: Study) -> list[str]:
    return [f"low_res_{channel}.tif" for channel in range(len(study.low_res.channels))] or ["low_res.zarr"]


def _slice_files(study: Study) -> dict[int, str]:
    """Return the files of the slices by the normal axis of their plane."""
    return {0: "slices.tif"} if study.high_res.isotropic else {a: f"slices_{p}.tif" for a, p in _PLANES.items()}


def _checked(study: Study, overwrite: bool) -> tuple[Phantom, Path]:
    """Return the phantom's section and folder, after a check for every fault of the study that would show later."""
    phantom, folder = study.phantom, study.folder / "phantom"
    if phantom is None:
        raise InputError(
            f"study {study.name}: has no phantom section, so there is none to make; add for example "
            "`phantom: {kind: three-phase, voxels: 256x256x256}`"
        )
    if phantom.kind != "chi2" and (phantom.cuts or phantom.covariance != "exponential"):
        raise InputError(
            f"phantom.{'cuts' if phantom.cuts else 'covariance'}: is of kind chi2, this phantom is {phantom.kind}; "
            "drop it, or set phantom.kind=chi2"
        )
    due = KINDS[phantom.kind] + len(phantom.cuts)
    if len(study.phases) != due:
        raise InputError(
            f"phantom.kind: {phantom.kind} has {due} phases, high_res.phases {len(study.phases)} "
            f"({', '.join(study.phases)}); name {due}"
        )
    if phantom.kind == "separator" and study.high_res.isotropic:
        raise InputError("phantom.kind: separator is anisotropic, high_res.isotropic is true; set it to false")
    if study.low_res is None:
        raise InputError(f"study {study.name}: has no low_res, and a phantom is made with a low-res volume; add it")
    if study.low_res.labels != tuple(range(len(study.low_res.labels))):
        raise InputError(
            f"low_res.phases: labels {', '.join(map(str, study.low_res.phases))}, but low_res.zarr of a "
            f"phantom has 0 … {len(study.low_res.phases) - 1}; write these"
        )
    if phantom.kind != "chi2" and phantom.feature_voxels < _FINEST_VOXELS:
        raise InputError(
            f"phantom.feature_voxels: {phantom.feature_voxels} is below {_FINEST_VOXELS} voxels, where "
            "the lattice shows; make it larger"
        )
    for key in ("porosity", "slices_porosity") if phantom.kind == "three-phase" else ():
        porosity = getattr(phantom, key)
        if porosity is not None and 1 - porosity - BINDER <= LEAST_ACTIVE:
            raise InputError(no_active(key, porosity, BINDER))
    made = {str(folder / name) for name in _files(study)}
    for key, path in (
        *(("high_res.images", image.path) for image in study.high_res.images),
        *(("low_res", path) for path in study.low_res.paths),
        ("reference.volume", study.reference.volume),
    ):
        if path and Path(path).parent == folder and path not in made:
            raise InputError(
                f"{key}: phantom makes no {Path(path).name}; use one of {', '.join(sorted(Path(p).name for p in made))}"
            )
    low_res = [int(n / study.scale_factor) for n in phantom.voxels]
    if min(low_res) < 1:
        raise InputError(f"phantom.voxels: {'x'.join(map(str, phantom.voxels))} has no whole low-res voxel; use more")
    refuse_output(folder, PHANTOM, overwrite=overwrite)
    if phantom.kind == "chi2":
        need = max(chi2_volume(phantom, shape, 0).bytes for shape in _shapes(study, phantom))
        need += prod(phantom.voxels[1:]) * 256  # a row of shards
        why, remedy = "phantom.feature_voxels", f"{phantom.feature_voxels:g}"
    else:
        need = int(
            _BYTES_PER_VOXEL * max(prod(n + 6 * phantom.feature_voxels for n in s) for s in _shapes(study, phantom))
        )
        why, remedy = "phantom.voxels", "x".join(map(str, phantom.voxels))
    have = free_bytes()
    if need > have:
        raise InputError(
            f"{why}: {remedy} needs {need / 2**30:.1f} GiB, {have / 2**30:.1f} GiB are free; make it smaller"
        )
    return phantom, folder


def _shapes(study: Study, phantom: Phantom) -> list[Triple]:
    return [phantom.voxels, *(_slab_shape(phantom, axis) for axis in _slice_files(study))]


def _slice_distance(phantom: Phantom) -> int:
    """Return the voxels between slices of one stack, far enough apart to be independent."""
    return int(5 * phantom.feature_voxels) + 1


def _slab_shape(phantom: Phantom, axis: int) -> Triple:
    edges = list(phantom.voxels)
    if phantom.slice_voxels is not None:
        edges = [phantom.slice_voxels] * 3
    edges[axis] = (phantom.slices - 1) * _slice_distance(phantom) + 1
    return triple(edges)


def _slices(phantom: Phantom, seed: int, axis: int) -> np.ndarray:
    """Return slices normal to `axis` (slice, row, column), cut from a realisation made for them alone."""
    if phantom.slices_porosity is not None:
        phantom = phantom.model_copy(update={"porosity": phantom.slices_porosity})
    volume = phantom_volume(phantom, _slab_shape(phantom, axis), (seed, 1 + axis))
    planes = []
    for place in range(0, volume.shape[axis], _slice_distance(phantom)):
        start, stop = [0, 0, 0], list(volume.shape)
        start[axis], stop[axis] = place, place + 1
        planes.append(volume.read(Box(triple(start), triple(stop))).squeeze(axis))
    return np.stack(planes)


class Imaged:
    """The low-res volume that a study's imaging operator makes of a truth, computed while it is read.

    Parameters
    ----------
    truth : Volume
        Labels (z, y, x).
    study : Study
        Study with the phases, the scale factor and the imaging operator.
    """

    def __init__(self, truth: Volume, study: Study) -> None:
        from hpcres.imaging import ImagingOperator

        self._truth, self._phases, self._channels = truth, len(study.phases), len(study.low_res.channels)
        self._scale, self._operator = study.scale_factor, ImagingOperator.of(study)
        self.shape = triple([int(n / study.scale_factor) for n in truth.shape])

    def read(self, box: Box) -> np.ndarray:
        """Return a box of the low-res volume: labels (z, y, x), uint8, or fractions (channel, z, y, x), float32.

        Only a block at a time is one-hot.
        """
        import torch

        from hpcres.imaging import one_hot

        p, q = self._scale.numerator, self._scale.denominator
        coarse: np.ndarray = np.empty(box.shape, np.uint8)
        if self._operator.fractions:
            coarse = np.empty((self._channels, *box.shape), np.float32)
        margin, edge = -(-self._operator.margin_voxels // p), max(1, _BLOCK_VOXELS // p)
        # Blocks are whole repeats of the sampling pattern: p high-res voxels, q low-res ones.
        for block in blocks_meeting(box, (edge * q,) * 3, self.shape):
            first = [max(a // q - margin, 0) for a in block.start]
            stop = [min((-(-b // q) + margin) * p, n) for b, n in zip(block.stop, self._truth.shape, strict=True)]
            window = self._truth.read(Box(triple([a * p for a in first]), triple(stop)))
            with torch.no_grad():
                imaged = self._operator(one_hot(torch.from_numpy(window)[None], self._phases))[0]
            seen = (imaged if self._operator.fractions else imaged.argmax(0)).numpy()
            common = block.clipped(box)
            inside = common.relative_to([a * q for a in first]).slices
            coarse[(..., *common.relative_to(box.start).slices)] = seen[(..., *inside)]
        return coarse
