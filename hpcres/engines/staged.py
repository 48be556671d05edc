"""Any list of stages in torch: every kind and activation, each layer as far as a block needs it.

The engine works on any torch device and in any float format. Labels of a voxel may differ by rounding with the block
it is computed in. High-res feature maps are held whole, so a block takes more memory than in the polyphase form, which
computes residual and doubling stages only.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import ceil, floor

import torch
from torch import Tensor
from torch.nn import functional

from hpcres.engines.batches import Crop, box_of, refuse_not_finite
from hpcres.geometry import Box, triple
from hpcres.networks.resampling import Taps, linear_taps, nearest_taps, resample
from hpcres.networks.stages import Activation, Stage, Stages

_SAME_LABELS: tuple[Activation, ...] = ("none", "softmax", "sigmoid")
"""Activations that are not computed: they change no label at the end of a list."""


class Staged:
    """A list of stages on `device` in `dtype`: windows of the lattice in, labels of output voxels out.

    The ends of a window are faces of the volume, where every stage pads by its own rule. With a `crop` of output voxels
    only these are computed; a halo beyond them has no effect on them.

    Parameters
    ----------
    stages : Stages
        Stages with their weights.
    device : torch.device or str
        Device of torch.
    dtype : torch.dtype
        Float format of the computation.

    Examples
    --------
    One logit is the sum of a voxel and its neighbours, and its sign tells which of two phases the voxel is:

    >>> import numpy as np
    >>> from fractions import Fraction
    >>> weight = np.full((1, 1, 3, 3, 3), 1.0)
    >>> end = Stage("end", "convolution", 1, 1, activation="sigmoid", weight=weight, bias=np.zeros(1))
    >>> Staged(Stages((end,), Fraction(1))).labels(torch.tensor([[[[[-1.0, -1.0, 3.0, 3.0]]]]])).tolist()
    [[[[0, 1, 1, 1]]]]
    """

    def __init__(self, stages: Stages, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.scale, self.in_channels, self.phases = stages.scale, stages.inputs, stages.phases
        self.device, self.dtype = torch.device(device), dtype
        self._list, self._stages = stages, stages.stages
        self._weights = [
            tuple(torch.from_numpy(values).to(self.device, dtype) for values in (stage.weight, stage.bias, stage.slope))
            for stage in stages.stages
        ]

    def labels(self, windows: Tensor, crop: Crop | None = None) -> Tensor:
        """Compute the labels of windows: the phase of the highest logit, the lowest of equals.

        Parameters
        ----------
        windows
            (batch, channels, z, y, x) in any float format.
        crop
            Output voxels of a window to compute, along z, y, x; by default all.

        Returns
        -------
        Tensor
            uint8 (batch, z, y, x). Where the last stage has one channel, the label is whether its logit is above 0.

        Raises
        ------
        InputError
            Where the logits are not finite.
        """
        logits = self.logits(windows, crop)
        refuse_not_finite(logits.isfinite().all(), self.dtype)
        labels = logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(1)
        return labels.to(torch.uint8)

    @torch.inference_mode()
    def logits(self, windows: Tensor, crop: Crop | None = None) -> Tensor:
        """Compute the logits of windows, before a softmax or sigmoid at the end.

        Parameters
        ----------
        windows, crop
            As of `labels`.

        Returns
        -------
        Tensor
            (batch, channels of the last stage, z, y, x) in `dtype`.
        """
        assert windows.shape[1] == self.in_channels, windows.shape
        grids, parts = self._boxes(windows.shape[2:], crop)
        x = _part(windows.to(self.device, self.dtype), grids[0], parts[0])
        kept: dict[int, Tensor] = {}
        for number in range(len(self._stages)):
            # Nothing here refers to the output of the layer, which would then be held while the next is computed.
            x = self._joined(number, self._layer(number, x, parts, grids[number]), parts, kept)
            kept = {other: x if other == number else kept[other] for other in self._list.added_from(number + 1)}
        return x

    def _computed(self, number: int, box: Box, out: Box) -> Box:
        """Return the outputs that a layer computes from the voxels `box`: all of theirs, or no more than `out`."""
        stage, scale = self._stages[number], int(self._stages[number].scale)
        if stage.kind == "shuffle":
            return Box(triple([a * scale for a in box.start]), triple([b * scale for b in box.stop]))
        if stage.kind == "transposed":
            start = [a * scale - stage.crop for a in box.start]
            return Box(triple(start), triple([(b - 1) * scale - stage.crop + stage.kernel for b in box.stop]))
        return out

    def _layer(self, number: int, x: Tensor, parts: Sequence[Box], grid: Box) -> Tensor:
        """Compute the outputs of a layer; x is the part of its input, all of which is `grid`."""
        stage, (weight, bias, _) = self._stages[number], self._weights[number]
        box, out = parts[number], parts[number + 1]
        if stage.kind == "shuffle":
            return _part(_shuffled(x, int(stage.scale)), self._computed(number, box, out), out)
        if stage.kind == "transposed":
            y = functional.conv_transpose3d(x, weight, bias, stride=int(stage.scale))
            return _part(y, self._computed(number, box, out), out)
        around = stage.kernel // 2
        if stage.kind == "resized":
            fine = Box.whole([stage.length(n) for n in grid.shape])
            upsampled = out.grown(around, around, fine)
            z, y_, x_ = (
                _cut(_taps(stage.interpolation, n, stage.scale), a, b, begin)
                for n, a, b, begin in zip(grid.shape, upsampled.start, upsampled.stop, box.start, strict=True)
            )
            x, box, grid = resample(x, (z, y_, x_)), upsampled, fine
        padded = _padded(_part(x, box, out.grown(around, around, grid)), grid, out, stage)
        return functional.conv3d(padded, weight, bias)

    def _joined(self, number: int, y: Tensor, parts: Sequence[Box], kept: dict[int, Tensor]) -> Tensor:
        """Apply the activation of a stage to y, and add outputs of earlier stages before and after it."""
        stage, slope = self._stages[number], self._weights[number][2]
        if stage.add_before is not None:
            y = y + _part(kept[stage.add_before], parts[stage.add_before + 1], parts[number + 1])
        if stage.activation == "relu":
            y = y.relu()
        elif stage.activation == "leaky":
            y = functional.leaky_relu(y, float(slope[0]))
        elif stage.activation == "prelu":
            y = functional.prelu(y, slope)
        else:
            assert stage.activation in _SAME_LABELS, stage
        if stage.add_after is not None:
            y = y + _part(kept[stage.add_after], parts[stage.add_after + 1], parts[number + 1])
        return y

    def _boxes(self, window: Sequence[int], crop: Crop | None) -> tuple[list[Box], list[Box]]:
        """Return all voxels of each grid over a window, and those that the output needs, the lattice's first."""
        grids = self._list.grids(window)
        return grids, self._list.parts(box_of(crop, grids[-1]), window)

    def batch_bytes(self, window: Sequence[int], batch: int = 1, crop: Crop | None = None) -> int:
        """Estimate the peak bytes of the tensors for a batch of windows.

        Weights are not counted, nor what a library's convolution needs for itself.

        Parameters
        ----------
        window
            Lattice voxels of a window along z, y, x.
        batch
            Number of windows.
        crop
            Output voxels of a window to compute; by default all.

        Returns
        -------
        int
            Bytes.
        """
        grids, parts = self._boxes(window, crop)
        values, working = self._list.values([grids[0], *parts[1:]]), []
        for number in range(len(self._stages)):
            values[number + 1], most = self._held(number, parts[number], grids[number], parts[number + 1])
            working.append(most)
        peak, item = self._list.most_held(values, working), self.dtype.itemsize
        logits, voxels = self._stages[-1].outputs * parts[-1].voxels, parts[-1].voxels
        # Two masks and the magnitudes of logits tell whether all are finite; then the labels are int64 and uint8.
        labelling = values[-1] * item + max(logits * (item + 2), 9 * voxels)
        return batch * (4 * values[0] + max(peak * item, labelling))  # the caller holds float32 windows

    def _held(self, number: int, box: Box, grid: Box, out: Box) -> tuple[int, int]:
        """Return how many values are held of the outputs `out` of a stage, and how many while it is computed.

        The input, which is not counted, has the voxels `box` of `grid`.
        """
        stage = self._stages[number]
        outputs, computed = stage.outputs * out.voxels, stage.outputs * self._computed(number, box, out).voxels
        copied = bool(stage.adds) or stage.activation not in _SAME_LABELS
        most = computed + (outputs if copied else 0)
        if stage.kind in ("convolution", "resized"):
            fine, around = Box.whole([stage.length(n) for n in grid.shape]), stage.kernel // 2
            want = out.grown(around, around)
            upsampled = 0 if stage.kind == "convolution" else stage.inputs * want.clipped(fine).voxels
            together = (3 if stage.interpolation == "linear" else 2) + 1 / stage.scale  # along the last axis
            padded = 0 if want.clipped(fine) == want else stage.inputs * want.voxels
            most = max(most, ceil(upsampled * together), upsampled + padded + outputs)
        return outputs if copied else computed, most


def _part(x: Tensor, box: Box, want: Box) -> Tensor:
    """Return the voxels `want` of x, which has the voxels `box`."""
    assert want.clipped(box) == want, (box, want)
    return x[(..., *want.relative_to(box.start).slices)]


def _padded(x: Tensor, grid: Box, out: Box, stage: Stage) -> Tensor:
    """Pad x with as many voxels beyond the faces as the convolution of `out` reads.

    x has all voxels inside the grid that this convolution reads.
    """
    around, pads = stage.kernel // 2, []
    for a, b, n in reversed(list(zip(out.start, out.stop, grid.stop, strict=True))):
        pads += [max(0, around - a), max(0, b + around - n)]
    if not any(pads):
        return x
    return functional.pad(x, pads, mode="replicate" if stage.padding == "replicate" else "constant")


def _shuffled(x: Tensor, edge: int) -> Tensor:
    """Reorder (batch, c·edge³, z, y, x) to (batch, c, z·edge, y·edge, x·edge)."""
    z, y, x_ = x.shape[2:]
    apart = x.unflatten(1, (-1, edge, edge, edge)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return apart.reshape(x.shape[0], -1, z * edge, y * edge, x_ * edge)


@lru_cache(maxsize=64)
def _taps(interpolation: str, size: int, scale: Fraction) -> Taps:
    taps_of = nearest_taps if interpolation == "nearest" else linear_taps
    return taps_of(size, 1 / scale, floor(size * scale))


def _cut(taps: Taps, first: int, stop: int, begin: int) -> Taps:
    """Return the taps of the outputs first … stop − 1, without those of weight 0; inputs are counted from `begin`."""
    return [[(place - begin, weight) for place, weight in row if weight] for row in taps[first:stop]]
