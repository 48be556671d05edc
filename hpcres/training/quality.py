"""How good a generator is, by what its user has: the high-res images and the low-res volume, never a truth.

A few fixed cubes, together typical of the volume, are generated and their slices compared with the images
(metrics.appearance), and through the imaging operator with the low-res cubes they were made from; and what the low-res
lattice left in them is measured (metrics.agreement). The score is the mean of all errors, each in units of what counts
as good; lower is better.
"""

from __future__ import annotations

import numpy as np
import torch

from hpcres.geometry import Box
from hpcres.imaging import ImagingOperator, likeliest, one_hot
from hpcres.metrics.agreement import changed_faces, lattice_imprint
from hpcres.metrics.appearance import errors_between, images_by_plane, look, planes_seen
from hpcres.networks.resampling import middle
from hpcres.networks.superres import SuperResGenerator
from hpcres.study import Study
from hpcres.training.samples import LowResCubes

GOOD = {
    "fraction_error": 0.01, "area_error": 0.07, "tpb_error": 0.15, "correlation_error": 0.01, "disagreement": 0.005,
    "tv1": 0.03, "tv4": 0.06, "lattice_imprint": 0.1,
}  # fmt: skip
"""The error of each kind that adds 1 to the sum whose mean is the score."""
_JUDGED = 2**31 + 1
"""Kind of draw for the cubes that are judged (samples.LowResCubes.draw)."""


class Judge:
    """Judges generators of a study, always on the same low-res cubes and noise."""

    def __init__(self, study: Study, low_res: LowResCubes, operator: ImagingOperator) -> None:
        self._study, self._low_res, self._operator = study, low_res, operator
        self._cubes = low_res.typical(study.training.quality_cubes, _JUDGED)
        self._isotropic, phases = study.high_res.isotropic, len(study.phases)
        self._images = [look(stacks, phases) for stacks in images_by_plane(study.high_res).values()]

    @property
    def columns(self) -> list[str]:
        """Of what `judge` returns."""
        every = errors_between(self._images[0], self._images[0], self._isotropic)
        tpb = ["tpb", "tpb_images"] if "tpb_error" in every else []
        return ["score", *every, "disagreement", "lattice_imprint", *tpb]

    @torch.no_grad()
    def judge(self, generator: SuperResGenerator, device: torch.device) -> tuple[dict[str, float], np.ndarray]:
        """Score, errors and what they are of; and the middle slice normal to z of the first cube as labels."""
        phases, settings = len(self._study.phases), self._study.training
        painted, right, voxels = [], 0, 0
        for cube in self._cubes:
            low_res, given = self._low_res.draw(0, [cube], device, _JUDGED)
            labels = likeliest(low_res)
            found = generator(given, settings.surroundings).argmax(1)
            seen = self._operator(one_hot(found, phases)).argmax(1)
            right += int((seen == labels).sum())
            voxels += int((labels < self._low_res.channels).sum())
            painted.append(found[0].to(torch.uint8).cpu())
        inner = [middle(cube, settings.padded_voxels).numpy() for cube in painted]
        ours = list(planes_seen(inner, self._study.high_res).values())
        every = [
            errors_between(mine, images, self._isotropic) for mine, images in zip(ours, self._images, strict=True)
        ]
        worst = {key: max(one[key] for one in every) for key in every[0] if all(key in one for one in every)}
        worst["disagreement"] = 1 - right / max(1, voxels)
        period = self._study.scale_factor.numerator
        faces = [changed_faces(cube, Box.whole(cube.shape), period) for cube in inner]
        worst["lattice_imprint"] = lattice_imprint(*np.sum(faces, axis=0))
        found_tpb = {"tpb": ours[0].tpb, "tpb_images": self._images[0].tpb} if "tpb_error" in worst else {}
        score = float(np.mean([worst[key] / GOOD[key] for key in worst]))
        return {"score": score, **worst, **found_tpb}, painted[0][len(painted[0]) // 2].numpy()
