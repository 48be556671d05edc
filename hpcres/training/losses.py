"""Losses of Algorithm 1 (Dahari et al. 2022), and losses that may be added to it, each a function of tensors.

Cubes are (cubes, phases, z, y, x) and slices are (slices, phases, rows, columns). Both hold phase probabilities or
one-hot labels.
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
    """Return slices of cubes normal to an axis.

    Parameters
    ----------
    volume : Tensor
        (cubes, phases, z, y, x).
    axis : int
        Normal of the slices: 0 z, 1 y, 2 x.
    chosen : Tensor or None
        (cubes, slices): which slices of each cube; None for all.

    Returns
    -------
    Tensor
        (cubes · slices, phases, rows, columns). Rows and columns are the other axes in the order z, y, x.
    """
    if chosen is not None:
        volume = torch.stack([cube.index_select(axis + 1, pick) for cube, pick in zip(volume, chosen, strict=True)])
    return volume.movedim(axis + 2, 1).flatten(0, 1)


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """Return the mean of (‖∇D(x̂)‖₂ − 1)² over mixtures x̂ = mix · real + (1 − mix) · fake.

    Parameters
    ----------
    critic : torch.nn.Module
        The critic D.
    real, fake : Tensor
        (slices, phases, rows, columns), as many of both.
    mix : Tensor
        (slices,): one weight for each slice.

    Returns
    -------
    Tensor
        A number that can be differentiated with respect to the weights of the critic.
    """
    weight = mix.view(-1, 1, 1, 1)
    between = (weight * real + (1 - weight) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def voxel_loss(
    operator: nn.Module, probabilities: Tensor, low_res: Tensor, channels: Sequence[int] | None = None
) -> Tensor:
    """Return the mean squared difference between low-res cubes and what the coarse instrument sees of the output.

    A voxel without any label is unknown and adds nothing. It still counts in the mean, so that a known voxel weighs the
    same in every cube and on every process.

    Parameters
    ----------
    operator : torch.nn.Module
        The imaging operator.
    probabilities : Tensor
        The output, (cubes, phases, z, y, x).
    low_res : Tensor
        The low-res cubes, one-hot or probabilities, (cubes, groups, z, y, x).
    channels : sequence of int or None
        Groups that the loss is about; None for all. With `channels`, both sides are multiplied by the low-res one, so
        that nothing is asked where the coarse image shows none of these groups. This is the loss of the published code
        for a separator.

    Returns
    -------
    Tensor
        A number.
    """
    if channels is not None:
        shown = low_res[:, channels]
        return functional.mse_loss(operator(probabilities)[:, channels] * shown, shown * shown)
    return functional.mse_loss(operator(probabilities) * low_res.sum(1, keepdim=True), low_res)


def block_loss(fractions: Tensor, around: Tensor, labels: bool) -> Tensor:
    """Return the mean over low-res voxels of the square of what the block of a voxel lacks of the voxel's own group.

    Parameters
    ----------
    fractions : Tensor
        Mean of each group's probability over the block of each low-res voxel, (cubes, groups, z, y, x).
    around : Tensor
        Labels one-hot, or probabilities, of the cubes with one low-res voxel more on each side, (cubes, groups, z + 2,
        y + 2, x + 2). Unknown voxels are 0 in all groups, and add nothing.
    labels : bool
        Whether the volume holds labels. A block then needs 98 % of its label where all 6 neighbours have the same
        label, and such a voxel has weight 4. At boundaries, where volume is partial, it needs 55 %. If the volume holds
        probabilities, the block needs the probability.

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
    """Return the mean difference between block fractions and the low-res cubes, by group.

    Parameters
    ----------
    fractions : Tensor
        Block fractions, (cubes, groups, z, y, x).
    low_res : Tensor
        What the low-res cubes hold, one-hot or probabilities, (cubes, groups, z, y, x). Unknown voxels add nothing.

    Returns
    -------
    Tensor
        (groups,): mean over the low-res voxels of block fractions minus what the low-res cubes hold.
    """
    return (fractions * low_res.sum(1, keepdim=True) - low_res).mean((0, 2, 3, 4))


def interpolation_loss(operator: ImagingOperator, probabilities: Tensor, low_res: Tensor) -> Tensor:
    """Return the cross-entropy of the output with the interpolated low-res cubes.

    The phases of the output are merged as the coarse image has them. Unknown voxels add nothing. A warm-up minimises
    this loss. Adversarial training that begins from an interpolation need not find the low-res volume again. Ledig
    2017, 3.2, likewise begins SRGAN from a network trained on the mean square.

    Parameters
    ----------
    operator : ImagingOperator
        The imaging operator, which merges phases and interpolates cubes.
    probabilities : Tensor
        The output, (cubes, phases, z, y, x).
    low_res : Tensor
        The low-res cubes, one-hot or probabilities, (cubes, groups, z, y, x).

    Returns
    -------
    Tensor
        A number.
    """
    seen = operator.merged(probabilities).clamp(min=1e-6)
    return -(operator.interpolated(low_res) * seen.log()).sum(1).mean()


def face_shares(probabilities: Tensor, period: int) -> Tensor:
    """Return the expected share of faces along z, y, x that part two phases, by their position modulo `period`.

    The expectation is over independent draws of both voxels' phases from `probabilities`.

    Parameters
    ----------
    probabilities : Tensor
        (cubes, phases, z, y, x).
    period : int
        Period of the lattice in voxels.

    Returns
    -------
    Tensor
        (axis, position). If the period is longer than the edge of the cubes, there are only the positions that they
        have.
    """
    apply: Any = _FaceShares.apply  # which has no types
    shares: Tensor = apply(probabilities, period)
    return shares


class _FaceShares(torch.autograd.Function):
    """`face_shares` with its gradient as two products per axis.

    Autograd's gradient would fill and add a volume for each slice.
    """

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
    """Return views of the voxels before and behind each face along `axis`."""
    return volume.narrow(axis, 0, volume.shape[axis] - 1), volume.narrow(axis, 1, volume.shape[axis] - 1)


def lattice_loss(shares: Tensor) -> Tensor:
    """Return the mean square of how far `face_shares` are off flat, as a share of the mean of their axis.

    Real matter does not depend on the low-res lattice. A generator that puts its interfaces midway between low-res
    voxels shows the lattice.

    Parameters
    ----------
    shares : Tensor
        (axis, position), as `face_shares` returns them.

    Returns
    -------
    Tensor
        A number, 0 where the shares of each axis are all alike.
    """
    return (shares / shares.mean(1, keepdim=True) - 1).square().mean()


def as_labels(probabilities: Tensor) -> Tensor:
    """Return the likeliest phases of slices, one-hot, with the gradient of the probabilities.

    The gradient is passed straight through (Bengio 2013). So a loss counts what is painted, and not what was almost
    painted.

    Parameters
    ----------
    probabilities : Tensor
        (slices, phases, rows, columns).

    Returns
    -------
    Tensor
        One-hot, of the same shape.
    """
    return one_hot(largest_channel(probabilities), probabilities.shape[1]) + probabilities - probabilities.detach()


def pattern_shares(slices: Sequence[Tensor], spacings: Sequence[int], pixels: int = 4) -> Tensor:
    """Return the expected share of each label pattern in slices.

    A pattern has 2 × 2 pixels that are a spacing apart. With six pixels, patterns are of 2 × 3 and of 3 × 2. The
    expectation is over independent draws of all pixels' phases.

    Parameters
    ----------
    slices : sequence of Tensor
        (slices, phases, rows, columns) for each normal axis z, y, x.
    spacings : sequence of int
        Distances between the pixels of a pattern, in pixels.
    pixels : int
        Pixels of a pattern, 4 or 6.

    Returns
    -------
    Tensor
        (spacing · axis · shape, phases ** pixels). The place of a pattern is its labels as digits. Labels are read row
        by row, those of 3 × 2 column by column.
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
    """Return the expected share of pixels in slices that differ from both their neighbours, where these are alike.

    The two neighbours are those down a column, or those along a row. Such pixels form lines one pixel wide and single
    pixels, of which gratings and dots are made. To patterns of 2 × 2 a grating is a row of interfaces.

    Parameters
    ----------
    slices : sequence of Tensor
        (slices, phases, rows, columns) for each normal axis z, y, x.

    Returns
    -------
    Tensor
        (axis · direction, 2): the share of such pixels, and the share of the others.
    """
    shares = []
    for some in slices:
        for direction in (2, 3):
            pixels = some.movedim(direction, 0)
            shares.append((pixels[:-2] * (1 - pixels[1:-1]) * pixels[2:]).sum(2).mean())
    thin = torch.stack(shares)
    return torch.stack([thin, 1 - thin], dim=1)


def pattern_loss(shares: Tensor, images: Tensor) -> Tensor:
    """Return how far the shares s of patterns are off those of the images, t: Σ (s − t)² / (s + t), the mean over rows.

    Near t the loss is half the square of the relative error times t. So rare patterns count, such as the corners where
    three phases meet. A pattern that the images lack is pushed away with slope 1, however rare it is.

    Parameters
    ----------
    shares : Tensor
        The shares s, as `pattern_shares` or `thin_shares` return them.
    images : Tensor
        The shares t, of the same shape.

    Returns
    -------
    Tensor
        A number, 0 where the shares are the same.
    """
    return ((shares - images).square() / (shares + images).clamp(min=1e-12)).sum(1).mean()


class Critics(nn.Module):
    """Critics of slices: one for all three planes, or one for each.

    An isotropic material has one critic for slices in all three planes. An anisotropic material, or
    training.planes_apart, has one for each plane. With training.diagonal_slices there are as many more for the slices
    at 45°, which are less sharp.

    One critic for all planes sees only the mixture of the planes. The mixture can be right where no plane is. Rows and
    columns are in the order z, y, x. A structure stretched along z then shows along rows, and a structure stretched
    along x shows along columns. A structure stretched along y shows along rows in one plane and along columns in
    another, so nothing determines the extent along y.
    """

    def __init__(self, study: Study) -> None:
        super().__init__()
        edge = study.training.slice_voxels
        count = 1 if study.high_res.isotropic and not study.training.planes_apart else 3
        kinds = 2 if study.training.diagonal_slices else 1
        self.planes = 3 * kinds
        """Number of kinds of slices: normal to z, y, x; with diagonal_slices also those at 45° that contain z, y, x."""
        self.critics = nn.ModuleList(
            Critic(len(study.phases), edge, study.network.critic_width) for _ in range(count * kinds)
        )

    def _groups(self, slices: Sequence[Tensor]) -> list[Tensor]:
        if len(self.critics) == self.planes:
            return list(slices)
        return [torch.cat(list(slices[first : first + 3])) for first in range(0, self.planes, 3)]

    def score(self, slices: Sequence[Tensor]) -> Tensor:
        """Return the mean over the critics of the mean value of slices.

        Parameters
        ----------
        slices : sequence of Tensor
            Slices (slices, phases, rows, columns) by plane, as many for each plane.

        Returns
        -------
        Tensor
            A number.
        """
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
        """Return the estimated Wasserstein distance and the gradient penalty, as means over the planes.

        Both come from one forward, so that their sum is one backward, as DistributedDataParallel needs.

        Parameters
        ----------
        real : sequence of Tensor
            Patches of the images by plane, as data.draws.CriticDraw.real.
        fake : sequence of Tensor
            Generated slices (slices, phases, rows, columns) by plane.
        mix : sequence of Tensor
            As data.draws.CriticDraw.mix.
        pairs : sequence of Tensor or None
            As data.draws.CriticDraw.pairs.
        shares : sequence of float
            As data.draws.CriticDraw.shares.

        Returns
        -------
        wasserstein, penalty : Tensor
            Two numbers.
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
