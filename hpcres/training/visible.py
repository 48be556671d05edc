"""What the low-res volume and the high-res images both show, and what to do where they differ.

A single slice is seldom typical of a volume: it may hold 58 % of a phase that is 40 % of the volume (Dahari 2022, case
4). The volume then decides the fractions of the phases that it shows (`low_res.groups`), and where their interfaces
are. The images decide the rest: how the phases that the volume cannot tell apart share their group, how much interface
is between them, and the shape of interfaces.

A distribution of the images is moved to the volume by exponential tilting: of all distributions with the wanted means,
`tilt` gives the one of least relative entropy to the images' own (Csiszár 1975, I-projection).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, product
from math import ceil, sqrt

import numpy as np
import torch
from torch import Tensor

from hpcres.counting.slices import SliceStatistics
from hpcres.imaging import ImagingOperator, one_hot
from hpcres.study import PATCH_VOXELS, Study
from hpcres.volumes.images import images_by_plane

_TYPICAL = 0.02
"""Images are typical of the volume if no visible fraction differs by more than this or three standard errors of chance,
whichever is larger."""
_BAND_PIXELS = 2**20
_FEWEST_PATCHES = 16
"""Patches that the critics are shown are tilted only as far as they still amount to this many independent ones."""
_STEPS = 50
_LONGEST_STEP = 2.0


def tilt(base: Tensor, features: Tensor, wanted: Tensor) -> Tensor:
    """Return shares t = base · exp(λ · features), normalised, whose mean features are as wanted.

    Parameters
    ----------
    base : Tensor
        (rows, places): shares, not negative; float64.
    features : Tensor
        (places, features).
    wanted : Tensor
        (rows, features): the wanted mean features.

    Returns
    -------
    Tensor
        (rows, places). If no such shares exist, those of the last of a fixed number of Newton steps.

    Examples
    --------
    >>> base, first = torch.tensor([[0.5, 0.25, 0.25]]).double(), torch.tensor([[1.0], [0.0], [0.0]]).double()
    >>> [round(share, 3) for share in tilt(base, first, torch.tensor([[0.2]]))[0].tolist()]
    [0.2, 0.4, 0.4]
    """
    centre = base @ features / base.sum(1, keepdim=True)
    spread = ((base @ features.square()) / base.sum(1, keepdim=True) - centre.square()).clamp(min=1e-12).sqrt().mean(0)
    scaled, aim, logs = features / spread, wanted.to(features) / spread, base.log()
    own = torch.zeros_like(aim)
    ridge = 1e-6 * torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
    for _ in range(_STEPS):
        shares = (logs + own @ scaled.mT).softmax(1)
        mean = shares @ scaled
        off = aim - mean
        if float(off.abs().max()) < 1e-7:
            break
        covariance = torch.einsum("rp,pk,pl->rkl", shares, scaled, scaled) - mean[:, :, None] * mean[:, None, :]
        step = torch.linalg.solve(covariance + ridge, off)
        own = own + step * (_LONGEST_STEP / step.abs().amax(1, keepdim=True)).clamp(max=1)
    return (logs + own @ scaled.mT).softmax(1)


@dataclass(frozen=True)
class Beside:
    """The visible phases in the low-res volume, and in the images as the coarse instrument would show them."""

    names: tuple[str, ...]
    """Names of the groups of phases that the low-res volume tells apart."""
    groups: tuple[tuple[int, ...], ...]
    volume: np.ndarray
    """Fraction of each group in the volume."""
    images: np.ndarray
    """Fraction of each group in the images, through the imaging operator."""
    chance: np.ndarray
    """Standard error of `images`, from parts of the images that are about as large as a training cube."""
    phases: np.ndarray
    """Fraction of each phase in the images themselves."""

    @property
    def typical(self) -> bool:
        """Whether chance alone may explain the difference between images and volume."""
        return bool((abs(self.volume - self.images) <= np.maximum(_TYPICAL, 3 * self.chance)).all())

    @property
    def correction(self) -> Correction:
        """The correction from the fractions of the images to those of the volume."""
        return Correction(self.groups, self.phases, self.volume)

    def corrected(self, study: Study) -> Correction | None:
        """Return the correction that training takes, or None.

        Parameters
        ----------
        study : Study
            The study, whose settings decide on a correction.

        Returns
        -------
        Correction or None
            None if the images are typical, if training.atypical_images is follow, or if low_res.one_sided names a
            phase: the volume shows too much of that phase, so its fractions are not those of the material.
        """
        wanted = study.training.atypical_images == "correct" and not study.low_res.one_sided
        return self.correction if wanted and not self.typical else None

    def messages(self, study: Study, reached: float = 1.0) -> Iterator[str]:
        """Yield what `hpcres train` says at its start about the visible phases.

        Parameters
        ----------
        study : Study
            The study.
        reached : float
            How far the weighted patches come, 0 to 1 (`patch_weights`).

        Yields
        ------
        str
            A message for the user.
        """
        shown = ", ".join(
            f"{name} {ours:.1%} and {theirs:.1%}"
            for name, ours, theirs in zip(self.names, self.volume, self.images, strict=True)
        )
        yield (
            f"visible phases in the low-res volume, and in the images as the coarse instrument would show them: {shown}"
        )
        if self.typical:
            return
        if study.low_res.one_sided:
            yield (
                "the images have other fractions than the low-res volume, which shows too much of "
                f"{', '.join(study.low_res.one_sided)} (low_res.one_sided); the images decide all fractions"
            )
        elif self.corrected(study):
            yield (
                "the images are not typical of the volume. The volume decides the fractions and interfaces that it "
                "shows. The images decide how the phases that it does not tell apart share their group, the interfaces "
                "between these, and the shape of interfaces. The critics see weighted patches, whose fractions are "
                f"{reached:.0%} of the way from the images' to the volume's. If the volume lacks thin parts of a "
                "phase, its fractions are not the material's; name the phase that it shows in their place in "
                "low_res.one_sided, or set training.atypical_images=follow"
            )
        else:
            yield (
                "warning: the images are not typical of the volume, and training.atypical_images is "
                f"{study.training.atypical_images}, so the painted volume may follow the images; set "
                "training.atypical_images=correct"
            )


def beside(study: Study, fractions: np.ndarray) -> Beside:
    """Compare the visible phases in the images and in the low-res volume.

    Parameters
    ----------
    study : Study
        Its images are read. Each image is looked at through the study's imaging operator as if it were every slice of a
        volume.
    fractions : ndarray of float64, (groups,)
        Fraction of each group of `low_res.phases` in the low-res volume, in their order; they sum to 1.

    Returns
    -------
    Beside
        The fractions of both, and the standard error of the images' from parts as large as a training cube.

    Raises
    ------
    InputError
        If an image cannot be read or holds labels that the study does not name.
    """
    operator = ImagingOperator.of(study)
    groups = tuple(tuple(study.phases.index(name) for name in group) for group in study.low_res.groups)
    seen, pixels, parts = np.zeros(len(groups)), np.zeros(len(study.phases)), []
    for stacks in images_by_plane(study.high_res).values():
        for stack in stacks:
            pixels += np.bincount(stack.ravel(), minlength=len(pixels))
            for image in stack:
                seen += _as_coarse(image, operator, len(study.phases))
                parts += list(_parts(image, groups))
    spread = np.std(parts, axis=0, ddof=1) / sqrt(len(parts)) if len(parts) > 1 else np.ones(len(groups))
    names = tuple(" + ".join(group) for group in study.low_res.groups)
    return Beside(names, groups, fractions, seen / seen.sum(), spread, pixels / pixels.sum())


def _as_coarse(image: np.ndarray, operator: ImagingOperator, phases: int) -> np.ndarray:
    """Return the pixels of each group in the image (rows, columns) as the coarse instrument would show it.

    This is the operator's view of a volume whose slices are all this image.
    """
    scale = operator.scale
    step = max(1, _BAND_PIXELS // (image.shape[1] * ceil(scale) * scale.numerator)) * scale.numerator
    found = np.zeros(operator.groups)
    for top in range(0, image.shape[0], step):
        band = torch.from_numpy(image[top : top + step].astype(np.int64))
        if min(int(n / scale) for n in band.shape):
            view = operator(one_hot(band.expand(1, ceil(scale), *band.shape), phases))[0, :, 0]
            found += np.bincount(view.argmax(0).flatten().numpy(), minlength=len(found))
    return found


def _parts(image: np.ndarray, groups: Sequence[Sequence[int]]) -> Iterator[list[float]]:
    """Yield fractions of the groups in squares as large as a training cube, or half as wide as a small image."""
    edge = min(PATCH_VOXELS, min(image.shape) // 2)
    for top, left in product(*(range(0, n - edge + 1, edge) for n in image.shape)):
        part = image[top : top + edge, left : left + edge]
        yield [float(np.isin(part, group).mean()) for group in groups]


@dataclass(frozen=True)
class Correction:
    """Moves what the images show to a volume with other fractions of the visible phases."""

    groups: tuple[tuple[int, ...], ...]
    """Phases of each group."""
    images: np.ndarray
    """Fraction of each phase in the images."""
    volume: np.ndarray
    """Fraction of each group in the volume."""

    @cached_property
    def growth(self) -> np.ndarray:
        """For each phase, the fraction of its group in the volume as a multiple of that in the images."""
        found = np.ones(len(self.images))
        for group, fraction in zip(self.groups, self.volume, strict=True):
            found[list(group)] = fraction / max(self.images[list(group)].sum(), 1e-12)
        return found

    @cached_property
    def fractions(self) -> np.ndarray:
        """Wanted fraction of each phase: that of its group in the volume, shared within the group as in the images."""
        wanted = self.images * self.growth
        return wanted / wanted.sum()

    @cached_property
    def _pairs(self) -> list[tuple[int, int]]:
        """Pairs of groups."""
        return list(combinations(range(len(self.groups)), 2))

    @cached_property
    def _hidden(self) -> list[tuple[int, int]]:
        """Pairs of phases of one group."""
        return [pair for group in self.groups for pair in combinations(group, 2)]

    def _of(self, phase: int) -> int:
        return next(k for k, group in enumerate(self.groups) if phase in group)

    def patterns(self, pixels: int, across: int) -> PatternTilt:
        """Return the tilt for patterns of `pixels` labels, row by row, with `across` labels in a row."""
        return PatternTilt(self, pixels, across)

    def seen(self, images: SliceStatistics, ours: SliceStatistics) -> SliceStatistics:
        """Return what the images would show with the volume's visible phases as `ours` has them.

        Fractions are those wanted. Interfaces between visible phases are as many as in `ours`, shared among phases as
        in the images. Interfaces within a group are the images' per volume of the group. Triple-phase points are the
        images' per visible interface. Windows of 3 × 3 are tilted. Correlations are those of `ours`.

        Parameters
        ----------
        images : SliceStatistics
            Statistics of the images.
        ours : SliceStatistics
            Statistics of generated slices.

        Returns
        -------
        SliceStatistics
            Statistics of the images, moved to the volume.
        """
        every = list(combinations(range(len(self.images)), 2))
        by_groups: dict[tuple[int, ...], list[int]] = {}
        for place, pair in enumerate(every):
            by_groups.setdefault(tuple(sorted(map(self._of, pair))), []).append(place)
        areas = np.zeros(images.faces.shape)
        for (one, other), places in by_groups.items():
            theirs = images.interphase_area[:, places]
            if one == other:
                areas[:, places] = theirs * self.growth[self.groups[one][0]]
            else:
                shared = theirs.sum(0) / max(theirs.sum(), 1e-12)
                areas[:, places] = ours.interphase_area[:, places].sum(1, keepdims=True) * shared
        between = [k for of, places in by_groups.items() if of[0] != of[1] for k in places]
        more = ours.interphase_area[:, between].sum() / max(images.interphase_area[:, between].sum(), 1e-12)
        windows = {}
        for spacing in images.windows:
            mine = torch.from_numpy(ours.patterns[spacing])[None]
            whole = torch.from_numpy(images.patterns[spacing])[None]
            windows[spacing] = self.patterns(9, 3).moved(whole, mine, [spacing])[0].numpy()
        return replace(
            ours,
            pixels=self.fractions,
            faces=areas,
            all_faces=np.ones(2),
            corners=np.array([images.tpb * more, 1.0]),
            windows=windows,
        )


class PatternTilt:
    """Moves the shares of label patterns in the images to the volume.

    The moved shares have the wanted phase fractions, and as many neighbours of unlike groups as the generated slices
    have. Neighbours of unlike phases in one group at spacing 1 are as many as the images have per volume of the group.
    Those farther apart are as many as the images have per pair within the group.

    Parameters
    ----------
    correction : Correction
        The correction that the shares follow.
    pixels : int
        Labels in a pattern.
    across : int
        Labels in a row of a pattern.
    """

    def __init__(self, correction: Correction, pixels: int, across: int) -> None:
        phases, groups = len(correction.images), correction.groups
        of = np.array([correction._of(phase) for phase in range(phases)])
        labels = np.stack(np.unravel_index(np.arange(phases**pixels), (phases,) * pixels))
        place = np.arange(pixels).reshape(-1, across)
        sides = [(place[:, :-1].ravel(), place[:, 1:].ravel()), (place[:-1].ravel(), place[1:].ravel())]
        single = [(labels == phase).mean(0) for phase in range(1, phases)]
        visible, inside, hidden = [], [], []
        for one, other in sides:
            a, b = labels[one], labels[other]
            visible += [_pair_share(of[a], of[b], pair) for pair in correction._pairs]
            inside += [((of[a] == g) & (of[b] == g)).mean(0) for g in range(len(groups))]
            hidden += [_pair_share(a, b, pair) for pair in correction._hidden]
        self._single, self._visible, self._hidden = len(single), len(visible), len(hidden)
        self._features = torch.from_numpy(np.stack([*single, *visible, *hidden], axis=1))
        self._inside = torch.from_numpy(np.stack(inside, axis=1))
        self._fractions = torch.from_numpy(correction.fractions[1:])
        groups_of_hidden = [of[a] for a, _ in correction._hidden]
        self._group = torch.tensor(
            [side * len(groups) + g for side in range(2) for g in groups_of_hidden], dtype=torch.int64
        )
        self._growth = torch.tensor([correction.growth[a] for a, _ in correction._hidden] * 2, dtype=torch.float64)

    def moved(self, images: Tensor, ours: Tensor, spacings: Sequence[int]) -> Tensor:
        """Return the shares of the images, moved to slices with shares `ours`.

        Parameters
        ----------
        images : Tensor
            (rows, patterns); rows are by spacing first.
        ours : Tensor
            Shares of generated slices, of the same shape.
        spacings : sequence of int
            Spacings of the patterns, in pixels.

        Returns
        -------
        Tensor
            (rows, patterns), float64.
        """
        device = ours.device
        images, ours = images.double().to(device), ours.detach().double()
        features, inside = self._features.to(device), self._inside.to(device)
        theirs, mine = images @ features, ours @ features
        begin, end = self._single, self._single + self._visible
        wanted = torch.empty_like(theirs)
        wanted[:, :begin] = self._fractions.to(device)
        wanted[:, begin:end] = mine[:, begin:end]
        if self._hidden:
            group = self._group.to(device)
            share = theirs[:, end:] / (images @ inside)[:, group].clamp(min=1e-9)
            wanted[:, end:] = share * (ours @ inside)[:, group]
            near = torch.tensor(spacings, device=device).repeat_interleave(len(images) // len(spacings)) == 1
            wanted[near, end:] = (theirs[:, end:] * self._growth.to(device))[near]
        return tilt(images, features, wanted)


def _pair_share(a: np.ndarray, b: np.ndarray, pair: tuple[int, int]) -> np.ndarray:
    """Return the share of neighbours that are this pair, in either order, from labels (neighbours, patterns)."""
    i, j = pair
    return np.asarray((((a == i) & (b == j)) | ((a == j) & (b == i))).mean(0))


def patch_weights(fractions: np.ndarray, wanted: np.ndarray, independent: float) -> tuple[np.ndarray, float]:
    """Return weights of patches whose mean phase fractions are as wanted, as far as the patches allow.

    Parameters
    ----------
    fractions : ndarray
        (patches, phases): phase fractions of each patch.
    wanted : ndarray
        (phases,): the wanted fractions.
    independent : float
        Number of independent patches that these are together: the images' area over a patch's.

    Returns
    -------
    weights : ndarray
        (patches,); their sum is 1.
    reached : float
        Share of the way from the patches' own mean to the wanted one, 0 to 1. The weights amount to at least 16
        independent patches, or to all that there are.
    """
    mean, features = fractions.mean(0)[1:], torch.from_numpy(fractions[:, 1:])
    base = torch.full((1, len(fractions)), 1 / len(fractions), dtype=torch.float64)
    for reached in np.linspace(1, 0, 21):
        aim = torch.from_numpy(mean + reached * (wanted[1:] - mean))[None]
        weights = tilt(base, features, aim)
        met = bool((abs(weights @ features - aim) < 1e-3).all())
        share = 1 / float(weights.square().sum()) / len(fractions)
        if met and share * independent >= min(_FEWEST_PATCHES, independent):
            break
    return weights[0].numpy(), float(reached)
