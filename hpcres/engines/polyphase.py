"""The generator without high-res feature maps: all is computed on the coarser grid, eight outputs a cell.

×2 trilinear upsampling and a 3³ convolution are one 3³ convolution of the coarse grid. A transposed convolution is
one of 2³ taps. The last convolution is one of 2³ taps from cells to cells staggered against them. Only uint8 labels are
put in voxel order. The engine works on any torch device and in any float format; on a GPU, TF32 must be off for fp32 to
mean fp32.

Along each axis a cell c of offset 0 holds the fine voxels 2c and 2c + 1, one of offset 1 holds 2c − 1 and 2c. The
channels of cells are (parity z, parity y, parity x, channel), flattened.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import product
from math import floor, prod

import torch
from torch import Tensor

from hpcres.engines.batches import refuse_not_finite
from hpcres.engines.polyphase_layers import (
    CellEnd,
    Convolution,
    Crop,
    Doubling,
    Map,
    Resized,
    Spans,
    Transposed,
    VoxelEnd,
    cells_of,
    layout_of,
    spans_of,
    voxels_in,
    whole_grid,
)
from hpcres.networks.stages import Stage, Stages

SLAB_BYTES = {"cpu": 2**28, "cuda": 2**32}
"""What the feature maps of the last two stages may take at a time, which are computed in slabs of that size."""
_THINNEST_SLAB = 16  # voxels: each slab computes one layer of cells that its neighbour has computed too


class Polyphase:
    """The folded network on `device` in `dtype`: windows of low-res values in, labels of high-res voxels out.

    A window is (channels + 1, z, y, x): one channel per low-res phase and the noise. Its ends are faces of the volume,
    where every layer pads by its own rule. With a `crop` of high-res voxels only these are computed, each layer as far
    as they need it: a halo beyond the crop has no effect on them.

    Parameters
    ----------
    folded
        Stages with their weights.
    device
        Device of torch.
    dtype
        Float format of the computation.
    """

    def __init__(self, folded: Stages, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.scale, self.in_channels, self.phases = folded.scale, folded.inputs, folded.phases
        self.device, self.dtype = torch.device(device), dtype
        *stages, last, end = folded.stages
        self._stages: list[Convolution | Doubling] = [self._stage(stage) for stage in stages]
        self._kept = {i for stage in self._stages for i in stage.adds}
        self._end: CellEnd | VoxelEnd
        if last.scale == 2:
            up = self._stage(last)
            assert isinstance(up, Doubling)
            self._end = CellEnd(up, last, end, self.device, dtype)
        else:
            self._end = VoxelEnd(last, end, self.device, dtype)

    def _stage(self, stage: Stage) -> Convolution | Doubling:
        if stage.kind == "convolution":
            return Convolution(stage, self.device, self.dtype)
        assert stage.scale == 2, stage.name
        return (Resized if stage.kind == "resized" else Transposed)(stage, self.device, self.dtype)

    def labels(self, windows: Tensor, crop: Crop | None = None) -> Tensor:
        """Compute the labels of windows: the phase of the highest logit, the lowest of equals.

        Parameters
        ----------
        windows
            (batch, channels + 1, z, y, x) in any float format.
        crop
            High-res voxels of a window to compute, along z, y, x; by default all.

        Returns
        -------
        Tensor
            uint8 (batch, z, y, x).

        Raises
        ------
        InputError
            Where the logits are not finite.
        """
        return self._run(windows, crop, as_labels=True)

    def logits(self, windows: Tensor, crop: Crop | None = None) -> Tensor:
        """Compute the logits of windows, as `labels` compares them.

        Parameters
        ----------
        windows, crop
            As of `labels`.

        Returns
        -------
        Tensor
            (batch, phases, z, y, x) in `dtype`.
        """
        return self._run(windows, crop, as_labels=False)

    @torch.inference_mode()
    def _run(self, windows: Tensor, crop: Crop | None, as_labels: bool) -> Tensor:
        assert windows.ndim == 5, windows.shape
        assert windows.shape[1] == self.in_channels, windows.shape
        out, spans, sizes = self._ranges(windows.shape[2:], crop)
        given = windows.to(self.device, self.dtype).contiguous(memory_format=layout_of(self.device, self.dtype))
        x, kept = Map(given, whole_grid(sizes[0]), sizes[0]), dict[int, Map]()
        del given
        for i, stage in enumerate(self._stages):
            x = Map(stage(x, spans[i + 1], kept), spans[i + 1], sizes[i + 1])
            if i in self._kept:
                kept[i] = x
            kept = {j: kept[j] for later in self._stages[i + 1 :] for j in later.adds if j in kept}
        batch, shape = len(windows), [b - a for a, b in out]
        painted = torch.empty(
            (batch, *shape) if as_labels else (batch, self.phases, *shape),
            dtype=torch.uint8 if as_labels else self.dtype,
            device=self.device,
        )
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        together, slabs = self._slabs(out, sizes[-1])
        for first, slab in product(range(0, batch, together), slabs):
            some = slice(first, first + together)
            target = painted[some].narrow(-3, slab[0][0] - out[0][0], slab[0][1] - slab[0][0])
            finite &= self._paint(Map(x.values[some], x.spans, x.sizes), slab, target, as_labels)
        refuse_not_finite(finite, self.dtype)
        return painted

    def _paint(self, x: Map, slab: Spans, target: Tensor, as_labels: bool) -> Tensor:
        """Write the labels or logits of a slab to `target`; return whether every highest logit is finite."""
        logits = self._end.logits(x, slab)
        if not as_labels:
            target.copy_(self._end.in_voxel_order(logits, slab))
            return torch.ones((), dtype=torch.bool, device=self.device)
        # max gives the first of equal values, so ties go to the lowest label; it hands on a NaN.
        best, labels = logits.max(2, keepdim=True)
        target.copy_(self._end.in_voxel_order(labels.to(torch.uint8), slab)[:, 0])
        lowest, highest = best.aminmax()
        return lowest.isfinite() & highest.isfinite()

    def _ranges(self, window: Sequence[int], crop: Crop | None) -> tuple[Spans, list[Spans], list[tuple[int, ...]]]:
        """Return the high-res voxels asked for, and the voxels needed of each grid with the sizes of the grids.

        The grids are those of the input and of the output of each stage.
        """
        sizes = [tuple(window)]
        for stage in self._stages:
            sizes.append(tuple(stage.scale * n for n in sizes[-1]))
        high_res = [floor(n * self.scale) for n in window]
        out = whole_grid(high_res)
        if crop is not None:
            bounds = [part.indices(n) for part, n in zip(crop, high_res, strict=True)]
            out = spans_of([(start, stop) for start, stop, _ in bounds])
        assert all(a < b for a, b in out), (crop, high_res)
        spans = [self._end.needs(out, sizes[-1])]
        for stage, given in zip(reversed(self._stages), reversed(sizes[:-1]), strict=True):
            spans.insert(0, stage.needs(spans[0], given))
        return out, spans, sizes

    def _slabs(self, out: Spans, sizes: Sequence[int]) -> tuple[int, list[Spans]]:
        """Return how many windows the last stages take at a time, and the slabs of `out`.

        `out` is cut along z where one window is too much.
        """
        limit, needed = SLAB_BYTES.get(self.device.type, SLAB_BYTES["cpu"]), self._slab_bytes(out, sizes)
        (start, stop), y, x = out
        if needed <= limit:
            return limit // needed, [out]
        step = max(-(-(stop - start) * limit // needed), _THINNEST_SLAB)
        step += step % 2
        starts = range(start - (start + self._end.offset) % 2, stop, step)
        return 1, [((max(start, a), min(stop, a + step)), y, x) for a in starts]

    def _slab_bytes(self, slab: Spans, sizes: Sequence[int]) -> int:
        """Return the bytes that a slab takes at most.

        They are those of feature maps and logits, or of the logits, the highest of them, its index and its label twice.
        """
        item, voxels = self.dtype.itemsize, 8 * voxels_in(cells_of(slab, self._end.offset))
        return max(self._end.held(slab, sizes) * item, voxels * ((self.phases + 1) * item + 8 + 2))

    def batch_bytes(self, window: Sequence[int], batch: int = 1, crop: Crop | None = None) -> int:
        """Estimate the peak bytes of the tensors for a batch of windows; weights are not counted.

        Per high-res voxel these are 1 for the label, 1/8 of the last upsampling's input channels in `dtype`, and at
        most SLAB_BYTES in all. What a library's convolution needs for itself comes on top.

        Parameters
        ----------
        window
            Low-res voxels of a window along z, y, x.
        batch
            Number of windows.
        crop
            High-res voxels of a window to compute; by default all.

        Returns
        -------
        int
            Bytes.
        """
        out, spans, sizes = self._ranges(window, crop)
        values, item = self.in_channels * prod(window), self.dtype.itemsize
        peak, kept = 2 * values, dict[int, int]()
        for i, stage in enumerate(self._stages):
            others = sum(size for j, size in kept.items() if j != i - 1)
            most, after = stage.held(spans[i + 1], sizes[i])
            peak = max(peak, values + others + most)
            values = kept[i] = after
            kept = {j: kept[j] for later in self._stages[i + 1 :] for j in later.adds if j in kept}
        together, slabs = self._slabs(out, sizes[-1])
        slab = min(together, batch) * max(self._slab_bytes(part, sizes[-1]) for part in slabs)
        return max(batch * peak * item, batch * (values * item + voxels_in(out)) + slab)

    def largest_batch(self, window: Sequence[int], memory_bytes: int, crop: Crop | None = None) -> int:
        """Return how many windows fit into memory at a time, 1 to 4096.

        Parameters
        ----------
        window
            Low-res voxels of a window along z, y, x.
        memory_bytes
            Bytes that the tensors may take.
        crop
            High-res voxels of a window to compute; by default all.

        Returns
        -------
        int
            Number of windows, at least 1.
        """
        fitting = bisect_right(range(1, 4097), memory_bytes, key=lambda batch: self.batch_bytes(window, batch, crop))
        return max(1, fitting)
