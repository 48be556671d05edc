"""The losses of Algorithm 1 (Dahari et al. 2022), and those that may be added to it, each a function of tensors.

Cubes are (cubes, phases, z, y, x), slices (slices, phases, rows, columns), both of phase probabilities or one-hot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcres.imaging import ImagingOperator, largest_channel, one_hot
from hpcres.networks.critic import Critic
from hpcres.networks.resampling import center_crop
from hpcres.study import Study


def volume_slices(volume: Tensor, axis: int, chosen: Tensor | None = None) -> Tensor:
    """Slices normal to `axis` (0 z, 1 y, 2 x) of (cubes, phases, z, y, x): (cubes · slices, phases, rows, columns).

    `chosen`, (cubes, slices), picks slices of each cube; rows and columns are the other axes in the order z, y, x.
    """
    if chosen is not None:
        volume = torch.stack([cube.index_select(axis + 1, pick) for cube, pick in zip(volume, chosen, strict=True)])
    return volume.movedim(axis + 2, 1).flatten(0, 1)


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """Mean of (‖∇D(x̂)‖₂ − 1)² over x̂ = mix · real + (1 − mix) · fake, one weight a slice."""
    weight = mix.view(-1, 1, 1, 1)
    between = (weight * real + (1 - weight) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def voxel_loss(
    operator: nn.Module, probabilities: Tensor, low_res: Tensor, channels: Sequence[int] | None = None
) -> Tensor:
    """Mean squared difference between the low-res cubes, one-hot or probabilities, and what the coarse instrument sees
    of the output.

    A voxel without any label is unknown and adds nothing; it still counts in the mean, so that a known voxel weighs the
    same in every cube and on every process. With `channels` it is over these, both sides multiplied by the low-res one,
    so that nothing is asked where the coarse image shows none of them (the published code's, for a separator).
    """
    if channels is not None:
        shown = low_res[:, channels]
        return functional.mse_loss(operator(probabilities)[:, channels] * shown, shown * shown)
    return functional.mse_loss(operator(probabilities) * low_res.sum(1, keepdim=True), low_res)


def block_loss(fractions: Tensor, around: Tensor, labels: bool) -> Tensor:
    """Mean over low-res voxels of the square of what the block of a voxel lacks of the voxel's own group.

    Parameters
    ----------
    fractions : Tensor
        Mean of each group's probability over the block of each low-res voxel, (cubes, groups, z, y, x).
    around : Tensor
        Labels one-hot, or probabilities, of the cubes with one low-res voxel more on each side,
        (cubes, groups, z + 2, y + 2, x + 2). Unknown voxels are 0 in all groups, and add nothing.
    labels : bool
        Whether the volume holds labels. A block then needs 98 % of its label where all 6 neighbours have the same
        label, and such a voxel has weight 4; at boundaries, where volume is partial, it needs 55 %. Of probabilities
        it needs the probability.

    Returns
    -------
    Tensor
        A number, 0 where no block lacks anything.
    """
    given = center_crop(around, 1)
    known = given.sum(1, keepdim=True)
    least, weight = given, torch.ones_like(known)
    if labels:
        neighbours = [center_crop(around.roll(step, axis), 1) for axis in (2, 3, 4) for step in (1, -1)]
        inside = torch.stack([given, *neighbours]).amin(0)
        least = torch.where(inside > 0, 0.98, 0.55) * given
        weight = 1 + 3 * inside.sum(1, keepdim=True)
    lacking = (least - fractions).clamp(min=0) * known
    return (weight * lacking.square()).sum(1).mean()


def fraction_differences(fractions: Tensor, low_res: Tensor) -> Tensor:
    """(groups,): mean over all known low-res voxels of block fractions minus what the low-res cubes hold."""
    return (fractions * low_res.sum(1, keepdim=True) - low_res).mean((0, 2, 3, 4))


def interpolation_loss(operator: ImagingOperator, probabilities: Tensor, low_res: Tensor) -> Tensor:
    """Cross-entropy of the output, phases merged as the coarse image has them, with the low-res cubes interpolated.

    What a warm-up minimises: an adversarial game begun from an interpolation need not find the low-res volume again
    (as Ledig 2017, 3.2, begins SRGAN from a network trained on the mean square). Unknown voxels add nothing.
    """
    seen = operator.merged(probabilities).clamp(min=1e-6)
    return -(operator.interpolated(low_res) * seen.log()).sum(1).mean()


def face_shares(probabilities: Tensor, period: int) -> Tensor:
    """(axis, position): expected share of faces along z, y, x that part two phases, by their position modulo `period`.

    The expectation is over independent draws of both voxels' phases from `probabilities` (cubes, phases, z, y, x). Of a
    period beyond the cubes' edge there are the positions that they have.
    """
    apply: Any = _FaceShares.apply  # which has no types
    shares: Tensor = apply(probabilities, period)
    return shares


class _FaceShares(torch.autograd.Function):
    """`face_shares`, with its gradient as two products per axis: autograd's fills and adds a volume for each slice."""

    @staticmethod
    def forward(ctx: Any, probabilities: Tensor, period: int) -> Tensor:
        ctx.period = period
        ctx.save_for_backward(probabilities)
        shares = []
        for axis in (2, 3, 4):
            one, next_one = _sides(probabilities, axis)
            others = [other for other in range(5) if other != axis]
            alike = (one * next_one).sum(others) / (one.shape[0] * one[0, 0].numel() / one.shape[axis])
            shares.append(torch.stack([1 - alike[k::period].mean() for k in range(min(period, len(alike)))]))
        return torch.stack(shares)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, None]:
        (probabilities,) = ctx.saved_tensors
        gradient = torch.zeros_like(probabilities)
        for axis, slope in zip((2, 3, 4), slopes, strict=True):
            one, next_one = _sides(probabilities, axis)
            place = torch.arange(one.shape[axis], device=one.device) % ctx.period
            faces = place.bincount(minlength=len(slope)) * (one.shape[0] * one[0, 0].numel() / one.shape[axis])
            weight = -(slope / faces)[place].view([-1 if other == axis else 1 for other in range(5)])
            ours, next_ours = _sides(gradient, axis)
            ours.addcmul_(next_one, weight)
            next_ours.addcmul_(one, weight)
        return gradient, None


def _sides(volume: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Views of the voxels before and behind each face along `axis`."""
    return volume.narrow(axis, 0, volume.shape[axis] - 1), volume.narrow(axis, 1, volume.shape[axis] - 1)


def lattice_loss(shares: Tensor) -> Tensor:
    """Mean square of how far `face_shares` are off flat, as a share of their axis's mean.

    Matter knows nothing of the low-res lattice; a generator that puts its interfaces midway between low-res voxels
    shows it.
    """
    return (shares / shares.mean(1, keepdim=True) - 1).square().mean()


def as_labels(probabilities: Tensor) -> Tensor:
    """The likeliest phases of (slices, phases, rows, columns), one-hot, with the gradient of the probabilities.

    Straight through (Bengio 2013), so that what is painted is counted, not what was almost painted.
    """
    return one_hot(largest_channel(probabilities), probabilities.shape[1]) + probabilities - probabilities.detach()


def pattern_shares(slices: Sequence[Tensor], spacings: Sequence[int], pixels: int = 4) -> Tensor:
    """(spacing · axis · shape, phases ** pixels): expected share of each label pattern in `slices` by normal axis z, y,
    x, of 2 × 2 pixels `spacing` apart or, where there are 6, of 2 × 3 and of 3 × 2.

    A pattern's place is its labels, read row by row, those of 3 × 2 column by column, as digits. The expectation is
    over independent draws of all pixels' phases.
    """
    shares = []
    for apart in spacings:
        for some in slices:
            for turned in (some,) if pixels == 4 else (some, some.mT):
                line = turned
                for _ in range(pixels // 2 - 1):
                    width = line.shape[3] - apart
                    line = (line[:, :, None, :, :width] * turned[:, None, :, :, -width:]).flatten(1, 2)
                upper, lower = line[:, :, :-apart].flatten(2), line[:, :, apart:].flatten(2)
                shares.append((upper @ lower.mT).mean(0).flatten() / upper.shape[2])
    return torch.stack(shares)


def thin_shares(slices: Sequence[Tensor]) -> Tensor:
    """(axis · direction, 2): expected share of pixels in `slices`, by normal axis z, y, x, that differ from both their
    neighbours down a column, or along a row, where these are alike; and of the others.

    Lines one pixel wide and single pixels, of which gratings and dots are made. To patterns of 2 × 2 a grating is a row
    of interfaces.
    """
    shares = []
    for some in slices:
        for direction in (2, 3):
            pixels = some.movedim(direction, 0)
            shares.append((pixels[:-2] * (1 - pixels[1:-1]) * pixels[2:]).sum(2).mean())
    thin = torch.stack(shares)
    return torch.stack([thin, 1 - thin], dim=1)


def pattern_loss(shares: Tensor, images: Tensor) -> Tensor:
    """How far shares s, `pattern_shares` or `thin_shares`, are off those of the images, t: Σ (s − t)² / (s + t), the
    mean over their rows.

    Near t it is half the square of the relative error times t, so that rare patterns count, as the corners where three
    phases meet do; and a pattern that the images lack is pushed away with slope 1, however rare it is.
    """
    return ((shares - images).square() / (shares + images).clamp(min=1e-12)).sum(1).mean()


class Critics(nn.Module):
    """One critic for slices in all three planes of an isotropic material, else, or with `planes_apart`, one for each.
    With `diagonal_slices` as many more for the slices at 45°, which are less sharp.

    One for all holds the mixture of the planes only, which can be right where no plane is: with rows and columns in the
    order z, y, x a structure stretched along z shows along rows and one along x along columns, but one along y along
    rows in one plane and along columns in another, so that nothing holds y.
    """

    def __init__(self, study: Study) -> None:
        super().__init__()
        edge = study.training.slice_voxels
        count = 1 if study.high_res.isotropic and not study.training.planes_apart else 3
        kinds = 2 if study.training.diagonal_slices else 1
        self.planes = 3 * kinds
        """Of slices: normal to z, y, x; with diagonal_slices also those at 45° that contain z, y, x."""
        self.critics = nn.ModuleList(
            Critic(len(study.phases), edge, study.network.critic_width) for _ in range(count * kinds)
        )

    def _groups(self, slices: Sequence[Tensor]) -> list[Tensor]:
        if len(self.critics) == self.planes:
            return list(slices)
        return [torch.cat(list(slices[first : first + 3])) for first in range(0, self.planes, 3)]

    def score(self, slices: Sequence[Tensor]) -> Tensor:
        """Mean over the critics of the mean value; `slices` by plane, as many for each."""
        values = [critic(x).mean() for critic, x in zip(self.critics, self._groups(slices), strict=True)]
        return torch.stack(values).mean()

    def forward(
        self,
        real: Sequence[Tensor],
        fake: Sequence[Tensor],
        mix: Sequence[Tensor],
        pairs: Sequence[Tensor] | None = None,
        shares: Sequence[float] = (1.0, 1.0),
    ) -> tuple[Tensor, Tensor]:
        """Estimated Wasserstein distance and gradient penalty, means over the planes; arguments as in
        samples.CriticDraw.

        Both come from one forward, so that their sum is one backward, as DistributedDataParallel needs.
        """
        distances, penalties = [], []
        ours, theirs = self._groups(real), self._groups(fake)
        first, second = ours, theirs
        if pairs is not None:
            first = self._groups([some[pair[0]] for some, pair in zip(real, pairs, strict=True)])
            second = self._groups([some[pair[1]] for some, pair in zip(fake, pairs, strict=True)])
        every = zip(self.critics, ours, theirs, first, second, self._groups(mix), strict=True)
        for critic, patches, slices, one, other, weights in every:
            of_real, of_fake = critic(torch.cat([patches, slices])).split([len(patches), len(slices)])
            distances.append(of_real.mean() * shares[0] - of_fake.mean())
            penalties.append(gradient_penalty(critic, one, other, weights) * shares[1])
        return torch.stack(distances).mean(), torch.stack(penalties).mean()
