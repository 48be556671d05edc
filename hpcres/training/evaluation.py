"""Evaluation of a generator from what its user has: the high-res images and the low-res volume, never a truth.

The generator is applied to a few fixed low-res cubes, which together are typical of the volume. The slices of the
generated cubes are compared with the images (metrics.appearance). The imaging operator is applied to the generated
cubes, and the result is compared with the low-res cubes they were made from. The grid artefact in them is measured
(metrics.agreement). The score is the mean of all errors, each in units of what counts as good; lower is better.

Two more errors are reported and are not part of the score. The imaging operator does not weigh all voxels of a low-res
voxel's block alike, so a generator can put a phase where it is hardly seen. `box_disagreement` is the share of known
low-res voxels whose label is not the group with the most high-res voxels in their own block. `visible_fraction_error`
is the largest difference between a group's share of the high-res voxels and its share of the low-res cubes.
"""

from __future__ import annotations

import numpy as np
import torch

from hpcres.counting.lattice import changed_faces, grid_artefact
from hpcres.counting.slices import SliceStatistics, errors_between, plane_statistics, slice_statistics
from hpcres.geometry import Box
from hpcres.imaging import ImagingOperator, block_majority, likeliest, one_hot
from hpcres.networks.resampling import center_crop
from hpcres.networks.superres import SuperResGenerator
from hpcres.study import Study
from hpcres.training.data.cubes import LowResCubes
from hpcres.training.visible import Correction
from hpcres.volumes.images import images_by_plane

GOOD = {
    "fraction_error": 0.01,
    "area_error": 0.07,
    "tpb_error": 0.15,
    "correlation_error": 0.01,
    "disagreement": 0.005,
    "tv1": 0.03,
    "tv4": 0.06,
    "grid_artefact": 0.1,
}
"""The error of each kind that counts as good. It adds 1 to the sum whose mean is the score."""
_JUDGED = 2**31 + 1
"""Kind of draw for the cubes that are judged (data.cubes.LowResCubes.draw)."""


class Evaluator:
    """Evaluates generators of a study, always on the same low-res cubes and noise.

    Parameters
    ----------
    study : Study
        The study, whose images are read.
    low_res : LowResCubes
        Cubes of the low-res volume.
    operator : ImagingOperator
        The imaging operator of the study.
    correction : Correction or None
        Correction of images that are not typical of the volume.
    """

    def __init__(
        self, study: Study, low_res: LowResCubes, operator: ImagingOperator, correction: Correction | None = None
    ) -> None:
        self._correction = correction
        self._context = low_res.context if correction is None else low_res.whole_context
        self._study, self._low_res, self._operator = study, low_res, operator
        self._cubes = low_res.typical(study.training.quality_cubes, _JUDGED)
        self._isotropic, phases = study.high_res.isotropic, len(study.phases)
        self._images = [slice_statistics(stacks, phases) for stacks in images_by_plane(study.high_res).values()]

    @property
    def columns(self) -> list[str]:
        """Names of the values that `evaluate` returns."""
        every = self._errors(self._images[0], self._images[0])
        tpb = ["tpb", "tpb_images"] if "tpb_error" in every else []
        beside = ["box_disagreement", "visible_fraction_error"]
        return ["score", *every, "disagreement", "grid_artefact", *beside, *tpb]

    def _errors(self, ours: SliceStatistics, images: SliceStatistics) -> dict[str, float]:
        if self._correction is None:
            return errors_between(ours, images, self._isotropic)
        found = errors_between(ours, self._correction.seen(images, ours), self._isotropic)
        del found["correlation_error"]  # of the visible phases the images do not know them, and the others follow
        return found

    @torch.no_grad()
    def evaluate(self, generator: SuperResGenerator, device: torch.device) -> tuple[dict[str, float], np.ndarray]:
        """Return the score and the errors of a generator, and a slice to show.

        Parameters
        ----------
        generator : SuperResGenerator
            The generator to evaluate.
        device : torch.device
            Where to compute.

        Returns
        -------
        found : dict of str to float
            The score and the errors. If there is an error of the TPB, also `tpb` of the generated slices and
            `tpb_images` of the images.
        labels : ndarray
            The middle slice normal to z of the first cube as labels, uint8 (row, column).
        """
        phases, settings = len(self._study.phases), self._study.training
        painted, right, voxels = [], 0, 0
        blocks = _Blocks(self._operator, self._low_res.channels)
        for cube in self._cubes:
            low_res, given = self._low_res.draw(0, [cube], device, _JUDGED, context=self._context)
            labels = likeliest(low_res)
            found = generator(given, self._context).argmax(1)
            seen = self._operator(one_hot(found, phases)).argmax(1)
            right += int((seen == labels).sum())
            voxels += int((labels < self._low_res.channels).sum())
            blocks.add(found, low_res)
            painted.append(found[0].to(torch.uint8).cpu())
        inner = [center_crop(cube, 0 if self._context else settings.padded_voxels).numpy() for cube in painted]
        ours = list(plane_statistics(inner, self._study.high_res).values())
        every = [self._errors(mine, images) for mine, images in zip(ours, self._images, strict=True)]
        worst = {key: max(one[key] for one in every) for key in every[0] if all(key in one for one in every)}
        worst["disagreement"] = 1 - right / max(1, voxels)
        period = self._study.scale_factor.numerator
        faces = [changed_faces(cube, Box.whole(cube.shape), period) for cube in inner]
        worst["grid_artefact"] = grid_artefact(*np.sum(faces, axis=0))
        found_tpb = {"tpb": ours[0].tpb, "tpb_images": self._images[0].tpb} if "tpb_error" in worst else {}
        score = float(np.mean([worst[key] / GOOD[key] for key in worst]))
        return {"score": score, **worst, **blocks.errors(), **found_tpb}, painted[0][len(painted[0]) // 2].numpy()


class _Blocks:
    """Contents of the blocks of known low-res voxels, summed over cubes."""

    def __init__(self, operator: ImagingOperator, groups: int) -> None:
        self._operator, self._groups = operator, groups
        self._right = self._known = 0
        self._given, self._found = np.zeros(groups), np.zeros(groups, np.int64)

    def add(self, found: torch.Tensor, low_res: torch.Tensor) -> None:
        """Count the phases `found` (batch, z, y, x), and the labels or probabilities `low_res` they were made from."""
        labels = likeliest(low_res)
        known = labels < self._groups
        counts = self._operator.block_counts(found)
        self._right += int((block_majority(counts, labels) == labels).sum())
        self._known += int(known.sum())
        self._given += one_hot(low_res.cpu(), self._groups).double().sum((0, 2, 3, 4)).numpy()
        self._found += (counts * known[:, None]).sum((0, 2, 3, 4)).cpu().numpy()

    def errors(self) -> dict[str, float]:
        known, block = max(1, self._known), self._operator.scale.numerator**3
        off = np.abs(self._found / block - self._given) / known
        return {"box_disagreement": 1 - self._right / known, "visible_fraction_error": float(off.max())}
