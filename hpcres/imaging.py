"""Imaging operator: what the coarse instrument shows of a sharp volume (Dahari 2022, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcres.networks.resampling import (
    Taps,
    area_taps,
    blur_taps,
    by_matrices,
    linear_taps,
    matrix_of,
    nearest_taps,
    resample,
)
from hpcres.study import Imaging, Study


def one_hot(labels: Tensor, channels: int) -> Tensor:
    """Encode labels one-hot; probabilities are returned unchanged.

    Parameters
    ----------
    labels : Tensor
        Integer labels (batch, z, y, x), or probabilities in floating point.
    channels : int
        Number of channels; a label of this value or above is 0 in all channels.

    Returns
    -------
    Tensor
        (batch, channels, z, y, x), float32 for labels.
    """
    if labels.is_floating_point():
        return labels
    return torch.stack([labels == channel for channel in range(channels)], dim=1).float()


def largest_channel(x: Tensor) -> Tensor:
    """Return x.argmax(1), the first of equal channels, several times as fast as torch where channels are few.

    Examples
    --------
    >>> largest_channel(torch.tensor([[0.2, 0.6, 0.2], [0.5, 0.0, 0.5]]))
    tensor([1, 0])
    """
    largest, found = x[:, 0], torch.zeros(x[:, 0].shape, dtype=torch.int64, device=x.device)
    for channel in range(1, x.shape[1]):
        found = found.masked_fill(x[:, channel] > largest, channel)
        largest = torch.maximum(largest, x[:, channel])
    return found


def likeliest(low_res: Tensor) -> Tensor:
    """Return the labels, or for probabilities the channel with the largest one.

    Parameters
    ----------
    low_res : Tensor
        Integer labels (batch, z, y, x), which are returned unchanged, or probabilities (batch, channels, z, y, x).

    Returns
    -------
    Tensor
        (batch, z, y, x). For probabilities the first of equal channels, or the number of channels where all are 0.
    """
    if not low_res.is_floating_point():
        return low_res
    return torch.where(low_res.amax(1) > 0, largest_channel(low_res), low_res.shape[1])


def block_majority(counts: Tensor, labels: Tensor) -> Tensor:
    """Return the group with the most high-res voxels in each low-res voxel's own block.

    Parameters
    ----------
    counts : Tensor
        Integers (batch, groups, z, y, x), as `ImagingOperator.block_counts` gives them.
    labels : Tensor
        Coarse labels (batch, z, y, x), integers; the number of groups where the voxel is unknown.

    Returns
    -------
    Tensor
        int64 (batch, z, y, x). Of several largest groups the coarse label if it is one of them, else the first.
    """
    own = labels.long().clamp(max=counts.shape[1] - 1)
    largest = counts.amax(1)
    return torch.where(counts.gather(1, own[:, None])[:, 0] == largest, own, counts.argmax(1))


def gaussian_kernel(scale: Fraction, settings: Imaging) -> Tensor:
    """Return the weights of the blur along one axis.

    By default the kernel has k = ⌈s⌉ voxels, made odd downwards, and σ = 0.3((k − 1)/2 − 1) + 0.8. `settings` can set
    both.

    Parameters
    ----------
    scale : Fraction
        Scale factor s.
    settings : Imaging
        Section `imaging` of the study, with `kernel_voxels` and `sigma_voxels` in high-res voxels.

    Returns
    -------
    Tensor
        float32 (k,), with the sum 1.
    """
    size = settings.kernel_voxels or ceil(scale) - (ceil(scale) % 2 == 0)
    sigma = settings.sigma_voxels or 0.3 * ((size - 1) / 2 - 1) + 0.8
    place = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.exp(-0.5 * (place / sigma) ** 2)
    return (weights / weights.sum()).float()


class ImagingOperator(nn.Module):
    """Map phase probabilities at high resolution to what the coarse instrument shows.

    The input is (batch, phases, z, y, x), the output (batch, groups, ⌊z/s⌋, ⌊y/s⌋, ⌊x/s⌋) at scale factor s. An
    under-resolved image is blurred and downsampled linearly, or binned. An under-sampled image takes the nearest
    voxels. The output of an under-resolved image is near one-hot, by a softmax at low temperature, except where the
    coarse image has fractions itself.

    A window of a volume gives the volume's values if it starts at a multiple of p voxels (scale factor p/q), at places
    `margin_voxels` away from its cut faces.

    Parameters
    ----------
    scale : Fraction
        High-res voxels per low-res voxel along an axis.
    groups : sequence of sequence of int
        For each low-res channel the indices of its phases: those that the coarse image cannot tell apart.
    settings : Imaging
        Section `imaging` of the study.
    fractions : bool
        Whether the coarse image has fractions of phases in place of labels.
    """

    kernel: Tensor
    merge: Tensor

    def __init__(
        self, scale: Fraction, groups: Sequence[Sequence[int]], settings: Imaging, fractions: bool = False
    ) -> None:
        super().__init__()
        self.scale, self.settings, self.fractions, self.groups = scale, settings, fractions, len(groups)
        merge = torch.zeros(len(groups), 1 + max(max(g) for g in groups))
        for channel, group in enumerate(groups):
            merge[channel, list(group)] = 1
        self.register_buffer("merge", merge)
        self.register_buffer("kernel", gaussian_kernel(scale, settings))
        self._matrices: dict[tuple[int, Callable[[int, Fraction, int], Taps], bool], Tensor] = {}

    @classmethod
    def of(cls, study: Study) -> ImagingOperator:
        """Build the operator that maps phases, in the study's order, to the study's low-res volume."""
        groups = [[study.phases.index(name) for name in group] for group in study.low_res.groups]
        return cls(study.scale_factor, groups, study.imaging, bool(study.low_res.channels))

    @property
    def margin_voxels(self) -> int:
        """High-res voxels beyond a low-res voxel's own extent that its value can depend on."""
        return 0 if self.settings.operator == "under-sampled" else len(self.kernel) // 2 + 1

    def forward(self, probabilities: Tensor) -> Tensor:
        """Apply the operator to phase probabilities.

        Parameters
        ----------
        probabilities : Tensor
            (batch, phases, z, y, x) at high resolution.

        Returns
        -------
        Tensor
            (batch, groups, ⌊z/s⌋, ⌊y/s⌋, ⌊x/s⌋).
        """
        kind: Callable[[int, Fraction, int], Taps] = linear_taps
        blurred = False
        if self.settings.operator == "under-sampled":
            kind = nearest_taps
        elif self.settings.box:
            kind = area_taps
        else:
            blurred = True
        x = self._downsampled(probabilities, kind, blurred)
        if self.settings.operator == "under-sampled" or self.fractions:
            return x
        return functional.softmax(x * self.settings.temperature, dim=1)

    def block_fractions(self, probabilities: Tensor) -> Tensor:
        """Return the mean of each group over the block of each low-res voxel.

        Parameters
        ----------
        probabilities : Tensor
            (batch, phases, z, y, x) at high resolution.

        Returns
        -------
        Tensor
            (batch, groups, ⌊z/s⌋, ⌊y/s⌋, ⌊x/s⌋).
        """
        return self._downsampled(probabilities, area_taps)

    def block_counts(self, labels: Tensor) -> Tensor:
        """Count the high-res voxels of each group in each low-res voxel's own block, all with the same weight.

        Parameters
        ----------
        labels : Tensor
            Phases (batch, z, y, x), integers, at high resolution; they start at a multiple of p voxels (scale factor
            p/q).

        Returns
        -------
        Tensor
            int32 (batch, groups, ⌊z/s⌋, ⌊y/s⌋, ⌊x/s⌋). Each high-res voxel is cut into q parts along each axis, so that
            a block holds p³ whole parts. A voxel on the border of two blocks counts in both by its parts.

        Examples
        --------
        >>> operator = ImagingOperator(Fraction(3, 2), [[0], [1, 2]], Imaging())
        >>> labels = torch.tensor([0, 1, 2]).expand(1, 3, 3, 3)
        >>> operator.block_counts(labels)[0, :, 0, 0].tolist()
        [[18, 0], [9, 27]]
        """
        group = self.merge.argmax(0)[labels.long()]
        x = torch.stack([group == channel for channel in range(len(self.merge))], dim=1).int()
        whole = self.scale.numerator
        z, y, x_ = (
            [[(j, weight * whole) for j, weight in row] for row in area_taps(n, self.scale, int(n / self.scale))]
            for n in labels.shape[1:]
        )
        return resample(x, (z, y, x_))

    def interpolated(self, low_res: Tensor) -> Tensor:
        """Interpolate low-res values linearly at high-res voxels.

        The interpolation is between the places that low-res voxels show, so that under-sampling gives `low_res` back
        (at integer scale factors).

        Parameters
        ----------
        low_res : Tensor
            (batch, groups, z, y, x).

        Returns
        -------
        Tensor
            (batch, groups, ⌊z·s⌋, ⌊y·s⌋, ⌊x·s⌋).
        """
        place = Fraction(0) if self.settings.operator == "under-sampled" else Fraction(1, 2)
        z, y, x = (linear_taps(n, 1 / self.scale, int(n * self.scale), place) for n in low_res.shape[2:])
        return resample(low_res, (z, y, x))

    def merged(self, probabilities: Tensor) -> Tensor:
        """Add the probabilities of the phases in each group: (batch, phases, z, y, x) → (batch, groups, z, y, x)."""
        return torch.einsum("gp,bpzyx->bgzyx", self.merge, probabilities)

    def _downsampled(
        self, probabilities: Tensor, kind: Callable[[int, Fraction, int], Taps], blurred: bool = False
    ) -> Tensor:
        """Downsample (batch, phases, z, y, x) to (batch, groups, ⌊z/s⌋, ⌊y/s⌋, ⌊x/s⌋), after a blur if `blurred`.

        If the gradient is needed, the operator is applied as a matrix along each axis, which takes a tenth of the time.
        Otherwise it is applied tap by tap, so that a window of a volume has the values of the whole bit for bit.
        """
        if probabilities.requires_grad:
            matrices = [self._matrix(n, kind, blurred) for n in probabilities.shape[2:]]
            return self.merged(by_matrices(probabilities, matrices))
        x = self.merged(probabilities)
        if blurred:
            x = self._blur(x)
        z, y, x_ = (kind(n, self.scale, int(n / self.scale)) for n in x.shape[2:])
        return resample(x, (z, y, x_))

    def _matrix(self, size: int, kind: Callable[[int, Fraction, int], Taps], blurred: bool) -> Tensor:
        """Return the operator along an axis of `size` voxels as a matrix, float64 (⌊size/s⌋, size)."""
        if (size, kind, blurred) not in self._matrices:
            matrix = matrix_of(kind(size, self.scale, int(size / self.scale)), size)
            if blurred:
                matrix = matrix @ matrix_of(blur_taps(size, self.kernel.tolist()), size)
            self._matrices[size, kind, blurred] = matrix
        return self._matrices[size, kind, blurred]

    def _blur(self, x: Tensor) -> Tensor:
        half, channels = len(self.kernel) // 2, x.shape[1]
        for axis in range(3):
            shape = [1, 1, 1]
            shape[axis] = len(self.kernel)
            pad = [0] * 6
            pad[4 - 2 * axis] = half
            pad[5 - 2 * axis] = len(self.kernel) - 1 - half
            weight = self.kernel.to(x.dtype).view(1, 1, *shape).expand(channels, 1, *shape)
            x = functional.conv3d(functional.pad(x, pad, mode="replicate"), weight, groups=channels)
        return x
