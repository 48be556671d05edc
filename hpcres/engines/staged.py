"""Any list of stages in torch: every kind and activation, each layer as far as a block needs it.

The engine works on any torch device and in any float format. Labels of a voxel may differ by rounding with the block
it is computed in. High-res feature maps are held whole, so a block takes more memory than in the polyphase form, which
computes residual and doubling stages only.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import floor

import torch
from torch import Tensor
from torch.nn import functional

from hpcres.engines.batches import Crop, box_of, refuse_not_finite
from hpcres.geometry import Box, triple
from hpcres.networks.resampling import Taps, linear_taps, nearest_taps, resample
from hpcres.networks.stages import Stage, Stages


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
        for number, stage in enumerate(self._stages):
            out = parts[number + 1]
            y = _part(*self._layer(number, x, parts[number], grids[number], out), out)
            if stage.add_before is not None:
                y = y + _part(kept[stage.add_before], parts[stage.add_before + 1], out)
            x = self._activated(number, y)
            if stage.add_after is not None:
                x = x + _part(kept[stage.add_after], parts[stage.add_after + 1], out)
            kept = {other: x if other == number else kept[other] for other in self._list.added_from(number + 1)}
        return x

    def _layer(self, number: int, x: Tensor, box: Box, grid: Box, out: Box) -> tuple[Tensor, Box]:
        """Compute the outputs of a layer, at least those of `out`, and return which they are.

        x are the voxels `box` of `grid`.
        """
        stage, (weight, bias, _) = self._stages[number], self._weights[number]
        if stage.kind == "shuffle":
            edge = int(stage.scale)
            given = Box(triple([a * edge for a in box.start]), triple([b * edge for b in box.stop]))
            return _shuffled(x, edge), given
        if stage.kind == "transposed":
            stride = int(stage.scale)
            y = functional.conv_transpose3d(x, weight, bias, stride=stride)
            begin = [a * stride - stage.crop for a in box.start]
            return y, Box(triple(begin), triple([a + n for a, n in zip(begin, y.shape[2:], strict=True)]))
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
        return functional.conv3d(padded, weight, bias), out

    def _activated(self, number: int, y: Tensor) -> Tensor:
        kind, slope = self._stages[number].activation, self._weights[number][2]
        if kind == "relu":
            return y.relu()
        if kind == "leaky":
            return functional.leaky_relu(y, float(slope[0]))
        if kind == "prelu":
            return functional.prelu(y, slope)
        return y  # softmax and sigmoid change no label

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
        values = self._list.values([grids[0], *parts[1:]])
        working = [self._working(number, parts[number + 1], grids[number]) for number in range(len(self._stages))]
        peak = max(2 * values[0], self._list.most_held(values, working))
        return batch * (peak * self.dtype.itemsize + 9 * parts[-1].voxels)

    def _working(self, number: int, out: Box, grid: Box) -> int:
        """Return how many values computing the outputs `out` of a stage takes beside its input, all of which is `grid`.

        They are the padded input and the output twice, or what resampling takes.
        """
        stage, around = self._stages[number], self._stages[number].kernel // 2
        outputs, padded = stage.outputs * out.voxels, stage.inputs * out.grown(around, around).voxels
        if stage.kind in ("transposed", "shuffle"):
            padded = outputs  # with what lies beyond the part
        if stage.kind != "resized":
            return padded + 2 * outputs
        fine = Box.whole([stage.length(n) for n in grid.shape])
        upsampled = stage.inputs * out.grown(around, around, fine).voxels
        return max(4 * upsampled, padded + 2 * outputs)  # four times while the last axis is resampled


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
