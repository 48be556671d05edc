"""How good a generator is, by what its user has: the high-res images and the low-res volume, never a truth.

A few fixed cubes are generated and their slices compared with the images in the same plane (all planes where the
material is isotropic): phase fractions, interphase areas per direction, triple-phase points, two-point correlations
up to 16 voxels, and the patterns of 3 × 3 pixels at spacing 1 and 4 (total-variation distance; the least that tells
a network from interpolation). The score is the mean of all errors, each in units of what counts as good; lower is
better.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

from hpcres.imaging import ImagingOperator, one_hot
from hpcres.networks.superres import SuperResGenerator
from hpcres.study import PATCH_VOXELS, Study
from hpcres.training.samples import LowResCubes, RealSlices

GOOD = {
    "fraction_error": 0.01, "area_error": 0.07, "tpb_error": 0.15, "correlation_error": 0.01, "disagreement": 0.005,
    "tv1": 0.03, "tv4": 0.06,
}  # fmt: skip
"""The error of each kind that adds 1 to the sum whose mean is the score."""
_JUDGED = 2**31 + 1
"""Kind of draw for the cubes that are judged (samples.LowResCubes.draw)."""
_LAGS = 16
_RARE = 1e-3
"""Interphase areas below this share of all faces say little of a few cubes and are left out of the worst."""
_MAX_PATTERN_PHASES = 4


@dataclass(frozen=True)
class Seen:
    """Shares in a set of 2D label images. Directions are along rows' index (down) and along columns' index (across)."""

    fractions: np.ndarray
    areas: np.ndarray
    """(direction, pair): faces between two phases / all faces of that direction."""
    correlations: np.ndarray
    """(direction, phase, lag): P(both pixels a lag apart are of the phase)."""
    tpb: float
    """Inner corners of pixels where at least three phases meet / all of them: normalised TPB of isotropic matter."""
    patterns: dict[int, np.ndarray]


def look(stacks: Iterable[np.ndarray], phases: int) -> Seen:
    """What stacks (slice, row, column) of labels below `phases` show; every pixel, face and pair counts the same."""
    pairs = list(combinations(range(phases), 2))
    pixels = np.zeros(phases, np.int64)
    faces, all_faces = np.zeros((2, len(pairs)), np.int64), np.zeros(2, np.int64)
    together, all_pairs = np.zeros((2, phases, _LAGS), np.int64), np.zeros((2, _LAGS), np.int64)
    corners = all_corners = 0
    spacings = (1, 4) if phases <= _MAX_PATTERN_PHASES else ()
    patterns = {spacing: np.zeros(phases**9, np.int64) for spacing in spacings}
    for stack in stacks:
        pixels += np.bincount(stack.ravel(), minlength=phases)
        bits = np.left_shift(np.uint16(1), stack, dtype=np.uint16)
        for direction in range(2):
            turned = np.moveaxis(bits, 1 + direction, 0)
            both = turned[1:] | turned[:-1]
            all_faces[direction] += both.size
            found = np.bincount(both.ravel(), minlength=1 << phases)
            faces[direction] += [found[1 << i | 1 << j] for i, j in pairs]
            for lag in range(1, min(_LAGS, len(turned) - 1) + 1):
                same = turned[lag:] & turned[:-lag]
                found = np.bincount(same.ravel(), minlength=1 << phases)
                together[direction, :, lag - 1] += [found[1 << i] for i in range(phases)]
                all_pairs[direction, lag - 1] += same.size
        here = bits[:, 1:, 1:] | bits[:, 1:, :-1] | bits[:, :-1, 1:] | bits[:, :-1, :-1]
        rest = here & (here - np.uint16(1))
        corners += int(np.count_nonzero(rest & (rest - np.uint16(1))))
        all_corners += here.size
        for spacing, histogram in patterns.items():
            rows, columns = (n - 2 * spacing for n in stack.shape[1:])
            code = np.zeros((len(stack), max(0, rows), max(0, columns)), np.int32)
            for k in range(9 if code.size else 0):
                down, across = (spacing * step for step in divmod(k, 3))
                code = code * phases + stack[:, down : down + rows, across : across + columns]
            histogram += np.bincount(code.ravel(), minlength=phases**9)
    return Seen(
        pixels / pixels.sum(), faces / all_faces[:, None], together / np.maximum(all_pairs, 1)[:, None],
        corners / all_corners, {spacing: found / max(1, found.sum()) for spacing, found in patterns.items()},
    )  # fmt: skip


def errors_between(ours: Seen, images: Seen, isotropic: bool) -> dict[str, float]:
    """Fractions: largest difference; areas and TPB: relative, the worst pair; correlations: root mean square."""

    def over_directions(values: np.ndarray) -> np.ndarray:
        return values.mean(axis=0, keepdims=True) if isotropic else values

    areas, wanted = over_directions(ours.areas), over_directions(images.areas)
    common = wanted > _RARE
    apart = over_directions(ours.correlations) - over_directions(images.correlations)
    found = {
        "fraction_error": float(np.abs(ours.fractions - images.fractions).max()),
        "area_error": float(np.abs(areas[common] / wanted[common] - 1).max()) if common.any() else 0.0,
        "correlation_error": float(np.sqrt(np.square(apart).mean())),
    }
    if images.tpb:
        found["tpb_error"] = abs(ours.tpb / images.tpb - 1)
    for spacing, histogram in images.patterns.items():
        found[f"tv{spacing}"] = float(np.abs(ours.patterns[spacing] - histogram).sum() / 2)
    return found


class Judge:
    """Judges generators of a study, always on the same low-res cubes and noise."""

    def __init__(self, study: Study, low_res: LowResCubes, real: RealSlices, operator: ImagingOperator) -> None:
        self._study, self._low_res, self._operator = study, low_res, operator
        self._isotropic = study.high_res.isotropic
        self._images = [look(real.images(axis), len(study.phases)) for axis in range(1 if self._isotropic else 3)]

    @property
    def columns(self) -> list[str]:
        """Of what `judge` returns."""
        every = errors_between(self._images[0], self._images[0], self._isotropic)
        tpb = ["tpb", "tpb_images"] if "tpb_error" in every else []
        return ["score", *every, "disagreement", *tpb]

    @torch.no_grad()
    def judge(self, generator: SuperResGenerator, device: torch.device) -> tuple[dict[str, float], np.ndarray]:
        """Score, errors and what they are of; and the middle slice normal to z of the first cube as labels."""
        phases, settings = len(self._study.phases), self._study.training
        painted, right, voxels = [], 0, 0
        for cube in range(settings.quality_cubes):
            labels, given = self._low_res.draw(0, range(cube, cube + 1), device, _JUDGED)
            found = generator(given).argmax(1)
            seen = self._operator(one_hot(found, phases)).argmax(1)
            right += int((seen == labels).sum())
            voxels += labels.numel()
            painted.append(found[0].to(torch.uint8).cpu().numpy())
        ours = self._slices(painted, settings.crop_voxels)
        every = [
            errors_between(mine, images, self._isotropic) for mine, images in zip(ours, self._images, strict=True)
        ]
        worst = {key: max(one[key] for one in every) for key in every[0] if all(key in one for one in every)}
        worst["disagreement"] = 1 - right / voxels
        found_tpb = {"tpb": ours[0].tpb, "tpb_images": self._images[0].tpb} if "tpb_error" in worst else {}
        score = float(np.mean([worst[key] / GOOD[key] for key in worst]))
        return {"score": score, **worst, **found_tpb}, painted[0][PATCH_VOXELS // 2]

    def _slices(self, cubes: Sequence[np.ndarray], crop: int) -> list[Seen]:
        """What is seen of cubes in each plane, or in all of them together."""
        kept = slice(crop, PATCH_VOXELS - crop)
        planes = [[np.moveaxis(cube[kept, kept, kept], axis, 0) for cube in cubes] for axis in range(3)]
        phases = len(self._study.phases)
        if self._isotropic:
            return [look([stack for plane in planes for stack in plane], phases)]
        return [look(plane, phases) for plane in planes]
