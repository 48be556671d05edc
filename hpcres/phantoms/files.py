"""The files of `hpcres phantom`: ground truth, low-res volume and slices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpcres import __version__
from hpcres.errors import InputError
from hpcres.geometry import Box, Triple, blocks, triple
from hpcres.lengths import cubic
from hpcres.outputs import PHANTOM, refuse_output
from hpcres.phantoms.chi2 import Chi2Volume, Excursion
from hpcres.phantoms.materials import BINDER, LEAST_ACTIVE, Seed, no_active, separator, three_phase
from hpcres.signals import end_if_signalled
from hpcres.volumes.convert import convert
from hpcres.volumes.files import atomic_write
from hpcres.volumes.tiff import write_images
from hpcres.volumes.volume import array_volume

if TYPE_CHECKING:
    from hpcres.study import Phantom, Study


KINDS = {"chi2": 2, "three-phase": 3, "separator": 2}
"""Phases of each kind: pore and solid; pore, active and binder; pore and polymer."""
_BYTES_PER_VOXEL = 28
_PLANES = {0: "yx", 1: "zx", 2: "zy"}
_FINEST_VOXELS = 4
"""Below this feature size the voxel lattice shows."""
_BLOCK_VOXELS = 96
"""High-res edge of the blocks that go one-hot through the imaging operator."""


def phantom_labels(phantom: Phantom, shape: Sequence[int], seed: Seed) -> np.ndarray:
    """Return the labels of a study's phantom for any shape and seed.

    The study's `feature_voxels` is, for the χ²-field, the distance at which the covariance has fallen to 1/e.

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
    ndarray
        uint8 (z, y, x).
    """
    if phantom.kind == "chi2":
        sets = [Excursion(1 - phantom.porosity, phantom.feature_voxels)]
        return Chi2Volume(shape, seed, sets).read(Box.whole(shape))
    kind = three_phase if phantom.kind == "three-phase" else separator
    return kind(shape, seed, feature_voxels=phantom.feature_voxels, porosity=phantom.porosity)


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
    unused = {"slices_porosity"} if phantom.slices_porosity is None else None
    made_by = phantom.model_dump(mode="json", exclude=unused)
    provenance = {"phantom": made_by, "seed": study.seed, "hpcres_version": __version__}
    with atomic_write(folder) as temporary:
        temporary.mkdir(parents=True)
        for axis, name in _slice_files(study).items():
            say(name)
            stack = labels_of.astype(label_type)[_slices(phantom, study.seed, axis)]
            write_images(temporary / name, stack)
        say("truth.zarr")
        truth = phantom_labels(phantom, phantom.voxels, (study.seed, 0))
        voxel = study.high_res.voxel_size
        convert(
            array_volume(truth, f"{phantom.kind} phantom"),
            temporary / "truth.zarr",
            phases=dict(enumerate(study.phases)),
            voxel_size=cubic(voxel),
            provenance=provenance,
        )
        say("low_res")
        coarse, voxel = imaged(truth, study), study.low_res_voxel_size
        if study.low_res.channels:
            for name, fractions in zip(_low_res_files(study), coarse, strict=True):
                write_images(temporary / name, fractions)
        else:
            names = {label: "+".join(group) for label, group in enumerate(study.low_res.groups)}
            convert(
                array_volume(coarse, f"{phantom.kind} phantom"),
                temporary / "low_res.zarr",
                phases=names,
                voxel_size=cubic(voxel),
                provenance=provenance,
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
    due = KINDS[phantom.kind]
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
    torus = max(prod(n + 6 * phantom.feature_voxels for n in shape) for shape in _shapes(study, phantom))
    need, have = _BYTES_PER_VOXEL * torus, _memory_bytes()
    if need > have:
        raise InputError(
            f"phantom.voxels: {'x'.join(map(str, phantom.voxels))} needs {need / 2**30:.1f} GiB, "
            f"{have / 2**30:.1f} GiB are free; make it smaller"
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
    slab = phantom_labels(phantom, _slab_shape(phantom, axis), (seed, 1 + axis))
    return np.ascontiguousarray(np.moveaxis(slab, axis, 0)[:: _slice_distance(phantom)])


def imaged(truth: np.ndarray, study: Study) -> np.ndarray:
    """Apply the study's imaging operator to the truth, block by block, so that only one block at a time is one-hot.

    Parameters
    ----------
    truth : ndarray
        Labels (z, y, x).
    study : Study
        Study with the phases, the scale factor and the imaging operator.

    Returns
    -------
    ndarray
        Low-res labels (z, y, x), uint8, or fractions (channel, z, y, x), float32.
    """
    import torch

    from hpcres.imaging import ImagingOperator, one_hot

    scale, phases = study.scale_factor, len(study.phases)
    p, q = scale.numerator, scale.denominator
    operator = ImagingOperator.of(study)
    margin = -(-operator.margin_voxels // p)
    shape = [int(n / scale) for n in truth.shape]
    coarse: np.ndarray = np.empty(shape, np.uint8)
    if operator.fractions:
        coarse = np.empty((len(study.low_res.channels), *shape), np.float32)
    edge = max(1, _BLOCK_VOXELS // p)
    # Blocks are counted in repeats of the sampling pattern: p high-res voxels, q low-res ones.
    for block in blocks([-(-n // q) for n in shape], (edge,) * 3):
        first = [max(a - margin, 0) for a in block.start]
        window = truth[tuple(slice(a * p, (b + margin) * p) for a, b in zip(first, block.stop, strict=True))]
        with torch.no_grad():
            imaged = operator(one_hot(torch.from_numpy(window)[None], phases))[0]
        seen = (imaged if operator.fractions else imaged.argmax(0)).numpy()
        inside = [slice((a - f) * q, (b - f) * q) for a, b, f in zip(block.start, block.stop, first, strict=True)]
        z, y, x = (slice(a * q, b * q) for a, b in zip(block.start, block.stop, strict=True))
        coarse[..., z, y, x] = seen[(..., *inside)]
    return coarse


def _memory_bytes() -> float:
    """Return the free memory in bytes, with what the system would give back; infinite if the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")
