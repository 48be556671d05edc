"""Any list of stages in torch: every kind and activation, each layer as far as a block needs it.

The engine works on any torch device and in any float format. Labels of a voxel may differ by rounding with the block
it is computed in. High-res feature maps are held whole, so a block takes more memory than in the polyphase form, which
computes residual and doubling stages only.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import floor, prod

import torch
from torch import Tensor
from torch.nn import functional

from hpcres.engines.batches import refuse_not_finite
from hpcres.engines.polyphase_layers import Crop
from hpcres.networks.resampling import Taps, linear_taps, nearest_taps, resample
from hpcres.networks.stages import Stage, Stages

_Span = tuple[int, int]
_Spans = tuple[_Span, ...]
"""Half-open ranges of voxels along z, y, x."""


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
        sizes, spans = self._ranges(windows.shape[2:], crop)
        x = _part(windows.to(self.device, self.dtype), _whole(sizes[0]), spans[0])
        kept: dict[int, Tensor] = {}
        for number, stage in enumerate(self._stages):
            out = spans[number + 1]
            y = _part(*self._layer(number, x, spans[number], sizes[number], out), out)
            if stage.add_before is not None:
                y = y + _part(kept[stage.add_before], spans[stage.add_before + 1], out)
            x = self._activated(number, y)
            if stage.add_after is not None:
                x = x + _part(kept[stage.add_after], spans[stage.add_after + 1], out)
            kept = {other: kept[other] for other in self._read_after(number) if other in kept}
            if number in self._read_after(number):
                kept[number] = x
        return x

    def _read_after(self, number: int) -> set[int]:
        """Return the stages whose outputs are added behind stage `number`."""
        return {other for later in self._stages[number + 1 :] for other in later.adds}

    def _layer(self, number: int, x: Tensor, span: _Spans, size: Sequence[int], out: _Spans) -> tuple[Tensor, _Spans]:
        """Compute the outputs of a layer, at least those of `out`, and return which they are.

        x are the voxels `span` of a grid of `size`.
        """
        stage, (weight, bias, _) = self._stages[number], self._weights[number]
        if stage.kind == "shuffle":
            edge = int(stage.scale)
            return _shuffled(x, edge), tuple((a * edge, b * edge) for a, b in span)
        if stage.kind == "transposed":
            stride = int(stage.scale)
            y = functional.conv_transpose3d(x, weight, bias, stride=stride)
            begins = [a * stride - stage.crop for a, _ in span]
            return y, tuple((a, a + n) for a, n in zip(begins, y.shape[2:], strict=True))
        if stage.kind == "resized":
            fine = [stage.length(n) for n in size]
            upsampled = _clipped(_grown(out, stage.kernel // 2), fine)
            z, y_, x_ = (
                _cut(_taps(stage.interpolation, n, stage.scale), along, a)
                for n, along, (a, _) in zip(size, upsampled, span, strict=True)
            )
            x, span, size = resample(x, (z, y_, x_)), upsampled, fine
        padded = _padded(_part(x, span, _clipped(_grown(out, stage.kernel // 2), size)), size, out, stage)
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

    def _ranges(self, window: Sequence[int], crop: Crop | None) -> tuple[list[tuple[int, ...]], list[_Spans]]:
        """Return the size of each grid, the lattice's first, and the voxels of each that the output needs."""
        sizes = [tuple(window)]
        for stage in self._stages:
            sizes.append(tuple(stage.length(n) for n in sizes[-1]))
        out = _whole(sizes[-1])
        if crop is not None:
            out = tuple((part.start, part.stop) for part in crop)
        assert all(0 <= a < b <= n for (a, b), n in zip(out, sizes[-1], strict=True)), (crop, sizes)
        axes = [self._list.needed(a, b - 1) for a, b in out]
        spans = [
            _clipped([(axis[grid][0], axis[grid][1] + 1) for axis in axes], size) for grid, size in enumerate(sizes)
        ]
        return sizes, spans

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
        sizes, spans = self._ranges(window, crop)
        held = [self.in_channels * prod(window)]
        held += [stage.outputs * _size(span) for stage, span in zip(self._stages, spans[1:], strict=True)]
        peak = 2 * held[0]
        for number, stage in enumerate(self._stages):
            grid = sizes[number + 1] if stage.kind == "resized" else sizes[number]
            read = _clipped(_grown(spans[number + 1], stage.kernel // 2), grid) if stage.kind == "resized" else ()
            upsampled = stage.inputs * _size(read) * 4 if read else 0  # while the last axis is resampled
            padded = stage.inputs * _size(_grown(spans[number + 1], stage.kernel // 2))
            if stage.kind in ("transposed", "shuffle"):
                padded = stage.outputs * _size(spans[number + 1])  # with what lies beyond the part
            others = sum(held[other + 1] for other in self._read_after(number - 1) if other < number - 1)
            peak = max(peak, others + held[number] + max(upsampled, padded + 2 * held[number + 1]))
        return batch * (peak * self.dtype.itemsize + 9 * _size(spans[-1]))


def _whole(sizes: Sequence[int]) -> _Spans:
    return tuple((0, n) for n in sizes)


def _grown(spans: Sequence[_Span], by: int) -> _Spans:
    return tuple((a - by, b + by) for a, b in spans)


def _clipped(spans: Sequence[_Span], sizes: Sequence[int]) -> _Spans:
    return tuple((max(a, 0), min(b, n)) for (a, b), n in zip(spans, sizes, strict=True))


def _size(spans: Sequence[_Span]) -> int:
    return prod(b - a for a, b in spans)


def _part(x: Tensor, span: _Spans, want: _Spans) -> Tensor:
    """Return the voxels `want` of x, which has the voxels `span`."""
    for axis, ((a, b), (c, d)) in enumerate(zip(span, want, strict=True)):
        assert a <= c <= d <= b, (span, want)
        x = x.narrow(axis + 2, c - a, d - c)
    return x


def _padded(x: Tensor, size: Sequence[int], out: _Spans, stage: Stage) -> Tensor:
    """Pad x with as many voxels beyond the faces as the convolution of `out` reads.

    x has all voxels inside the grid that this convolution reads.
    """
    around, pads = stage.kernel // 2, []
    for (a, b), n in zip(reversed(out), reversed(size), strict=True):
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


def _cut(taps: Taps, along: _Span, begin: int) -> Taps:
    """Return the taps of the outputs `along`, without those of weight 0; inputs are counted from `begin`."""
    return [[(place - begin, weight) for place, weight in row if weight] for row in taps[along[0] : along[1]]]
