"""The generator without high-res feature maps: all is computed on the coarser grid, eight outputs a cell.

×2 trilinear upsampling and a 3³ convolution are one 3³ convolution of the coarse grid. A transposed convolution is
one of 2³ taps. The last convolution is one of 2³ taps from cells to cells staggered against them. Only uint8 labels are
put in voxel order. The engine works on any torch device and in any float format; on a GPU, TF32 must be off for fp32 to
mean fp32.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from hpcres.engines.batches import Crop, box_of, refuse_not_finite
from hpcres.engines.polyphase_cells import Map, cells_of, in_layout
from hpcres.engines.polyphase_ends import CellEnd, VoxelEnd
from hpcres.engines.polyphase_layers import Convolution, Doubling, Resized, Transposed
from hpcres.geometry import Box
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
        self._list = folded
        *stages, last, end = folded.stages
        self._layers = [self._layer(stage) for stage in stages]
        self._end: CellEnd | VoxelEnd
        if last.scale == 2:
            up = self._layer(last)
            assert isinstance(up, Doubling)
            self._end = CellEnd(up, last, end, self.device, dtype)
        else:
            self._end = VoxelEnd(last, end, self.device, dtype)

    def _layer(self, stage: Stage) -> Convolution | Doubling:
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
        grids, parts = self._boxes(windows.shape[2:], crop)
        given, out = in_layout(windows.to(self.device, self.dtype)), parts[-1]
        x, kept = Map(given, grids[0], grids[0]), dict[int, Map]()
        del given
        for i, layer in enumerate(self._layers):
            x = Map(layer(x, parts[i + 1], kept), parts[i + 1], grids[i + 1])
            kept = {j: x if j == i else kept[j] for j in self._list.added_from(i + 1)}
        batch = len(windows)
        painted = torch.empty(
            (batch, *out.shape) if as_labels else (batch, self.phases, *out.shape),
            dtype=torch.uint8 if as_labels else self.dtype,
            device=self.device,
        )
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        together, slabs = self._slabs(out, x.grid)
        for first, slab in product(range(0, batch, together), slabs):
            some = slice(first, first + together)
            target = painted[some].narrow(-3, slab.start[0] - out.start[0], slab.shape[0])
            finite &= self._paint(Map(x.values[some], x.box, x.grid), slab, target, as_labels)
        refuse_not_finite(finite, self.dtype)
        return painted

    def _paint(self, x: Map, slab: Box, target: Tensor, as_labels: bool) -> Tensor:
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

    def _boxes(self, window: Sequence[int], crop: Crop | None) -> tuple[list[Box], list[Box]]:
        """Return all voxels of each grid over a window, and those that the output needs, the lattice's first."""
        grids = self._list.grids(window)
        return grids, self._list.parts(box_of(crop, grids[-1]), window)

    def _slabs(self, out: Box, grid: Box) -> tuple[int, list[Box]]:
        """Return how many windows the last stages take at a time, and the slabs of `out`.

        `out` is cut along z where one window is too much. `grid` are all voxels that the last stages are given.
        """
        limit, needed = SLAB_BYTES.get(self.device.type, SLAB_BYTES["cpu"]), self._slab_bytes(out, grid)
        if needed <= limit:
            return limit // needed, [out]
        (start, y, x), (stop, *behind) = out.start, out.stop
        step = max(-(-(stop - start) * limit // needed), _THINNEST_SLAB)
        step += step % 2
        starts = range(start - (start + self._end.offset) % 2, stop, step)
        return 1, [Box((max(start, a), y, x), (min(stop, a + step), behind[0], behind[1])) for a in starts]

    def _slab_bytes(self, slab: Box, grid: Box) -> int:
        """Return the bytes that a slab takes at most.

        They are those of feature maps and logits, or of the logits, the highest of them, its index and its label twice.
        """
        item, voxels = self.dtype.itemsize, 8 * cells_of(slab, self._end.offset).voxels
        return max(self._end.held(slab, grid) * item, voxels * ((self.phases + 1) * item + 8 + 2))

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
        (grids, parts), item = self._boxes(window, crop), self.dtype.itemsize
        values = [self.in_channels * grids[0].voxels]
        values += [layer.held(part) for layer, part in zip(self._layers, parts[1:-2], strict=True)]
        working = [layer.working(parts[i + 1], grids[i]) for i, layer in enumerate(self._layers)]
        peak = max(2 * values[0], self._list.most_held(values, working))
        together, slabs = self._slabs(parts[-1], grids[-3])
        slab = min(together, batch) * max(self._slab_bytes(part, grids[-3]) for part in slabs)
        return max(batch * peak * item, batch * (values[-1] * item + parts[-1].voxels) + slab)

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
