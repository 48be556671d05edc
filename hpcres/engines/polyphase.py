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
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import product
from math import ceil, floor, prod
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hpcres.errors import InputError
from hpcres.networks.resampling import Taps, linear_taps, resample, upsample
from hpcres.networks.stages import Stage, Stages

Crop = tuple[slice, slice, slice]
_Span = tuple[int, int]
_Spans = tuple[_Span, _Span, _Span]
"""Half-open ranges of voxels or cells along z, y, x."""

SLAB_BYTES = {"cpu": 2**28, "cuda": 2**32}
"""What the feature maps of the last two stages may take at a time, which are computed in slabs of that size."""
_THINNEST_SLAB = 16  # voxels: each slab computes one layer of cells that its neighbour has computed too


def _spans(values: Sequence[_Span]) -> _Spans:
    z, y, x = values
    return z, y, x


def _whole(sizes: Sequence[int]) -> _Spans:
    return _spans([(0, n) for n in sizes])


def _grown(spans: _Spans, before: int, after: int) -> _Spans:
    return _spans([(a - before, b + after) for a, b in spans])


def _clipped(spans: _Spans, sizes: Sequence[int]) -> _Spans:
    return _spans([(max(a, 0), min(b, n)) for (a, b), n in zip(spans, sizes, strict=True)])


def _cells(voxels: _Spans, offset: int) -> _Spans:
    return _spans([((a + offset) // 2, (b - 1 + offset) // 2 + 1) for a, b in voxels])


def _size(spans: _Spans) -> int:
    return prod(b - a for a, b in spans)


def _padded_size(want: _Spans, sizes: Sequence[int]) -> int:
    """Return the number of voxels that _Map.padded copies: none where nothing lies beyond a face."""
    return 0 if _clipped(want, sizes) == want else _size(want)


@dataclass(frozen=True)
class _Map:
    """`values` (batch, channels, z, y, x) of the voxels or cells `spans` of a grid of `sizes`."""

    values: Tensor
    spans: _Spans
    sizes: tuple[int, ...]

    def part(self, want: _Spans) -> Tensor:
        values = self.values
        for axis, ((a, b), (c, d)) in enumerate(zip(self.spans, want, strict=True)):
            assert a <= c <= d <= b, (self.spans, want)
            values = values.narrow(axis + 2, c - a, d - c)
        return values

    def padded(self, want: _Spans, pad: Literal["replicate", "zeros", "mirrored"]) -> Tensor:
        """Return the part `want`, which may reach one beyond the faces of the grid.

        'mirrored' continues cells as replication continues their voxels: the parities change places.
        """
        inner = _clipped(want, self.sizes)
        part = self.part(inner)
        if inner == want:
            return part
        layout = torch.channels_last_3d if _channels_last(part) else torch.contiguous_format
        shape = (*part.shape[:2], *(b - a for a, b in want))
        out = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=layout)
        if pad == "zeros":
            out.zero_()
        _Map(out, want, self.sizes).part(inner).copy_(part)
        for axis, end in product(range(3), range(2)):
            if pad != "zeros" and want[axis][end] != inner[axis][end]:
                outer, face = (0, 1) if end == 0 else (out.shape[axis + 2] - 1, out.shape[axis + 2] - 2)
                source = out.narrow(axis + 2, face, 1)
                if pad == "mirrored":
                    source = source.unflatten(1, (2, 2, 2, -1)).flip(1 + axis).flatten(1, 4)
                out.narrow(axis + 2, outer, 1).copy_(source)
        return out


def _channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1


def _in_voxel_order(cells: _Map, offset: int, want: _Spans) -> Tensor:
    """Reorder (batch, 8 · channels, cells) to (batch, channels, voxels `want`) in the memory layout of `cells`."""
    batch, channels = cells.values.shape[0], cells.values.shape[1] // 8
    apart, shape = cells.values.unflatten(1, (2, 2, 2, channels)), [2 * n for n in cells.values.shape[2:]]
    if _channels_last(cells.values):
        voxels = apart.permute(0, 5, 1, 6, 2, 7, 3, 4).reshape(batch, *shape, channels).permute(0, 4, 1, 2, 3)
    else:
        voxels = apart.permute(0, 4, 5, 1, 6, 2, 7, 3).reshape(batch, channels, *shape)
    return _Map(voxels, _spans([(2 * a - offset, 2 * b - offset) for a, b in cells.spans]), ()).part(want)


def _layout(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """Return the memory layout that suits a device and a float format.

    Channels last suits oneDNN and tensor cores; cuDNN's other kernels, those for fp32, are made for planes.
    """
    planes = device.type == "cuda" and dtype.itemsize > 2
    return torch.contiguous_format if planes else torch.channels_last_3d


class _Weights:
    """Weight and bias of a convolution without padding, on a device and in its float format."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray, device: torch.device, dtype: torch.dtype) -> None:
        self.weight = torch.from_numpy(weight).to(device, dtype).contiguous(memory_format=_layout(device, dtype))
        self.bias = torch.from_numpy(bias).to(device, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.conv3d(x, self.weight, self.bias)


class _Convolution:
    """A 3³ convolution on one grid, with the outputs of earlier stages that are added to it."""

    scale = 1

    def __init__(self, stage: Stage, device: torch.device, dtype: torch.dtype) -> None:
        self._stage = stage
        self._weights = _Weights(stage.weight, stage.bias, device, dtype)
        self.adds = [i for i in (stage.add_before, stage.add_after) if i is not None]

    def needs(self, out: _Spans, sizes: Sequence[int]) -> _Spans:
        """Return the voxels of an input of `sizes` that the output voxels `out` depend on."""
        return _clipped(_grown(out, 1, 1), sizes)

    def __call__(self, x: _Map, out: _Spans, kept: dict[int, _Map]) -> Tensor:
        """Compute the output voxels `out`; `kept` are outputs of earlier stages."""
        stage = self._stage
        y = self._weights(x.padded(_grown(out, 1, 1), stage.padding))
        if stage.add_before is not None:
            y += kept[stage.add_before].part(out)
        if stage.relu:
            y.relu_()
        if stage.add_after is not None:
            y += kept[stage.add_after].part(out)
        return y

    def held(self, out: _Spans, sizes: Sequence[int]) -> tuple[int, int]:
        """Return how many values are held at most, beyond the input, and how many afterwards.

        At most these are the padded input and the output; afterwards the output.
        """
        after = self._stage.outputs * _size(out)
        return self._stage.inputs * _padded_size(_grown(out, 1, 1), sizes) + after, after


class _Doubling:
    """A stage of scale 2 with cells of `offset`; `cells` is computed on the input's grid, before the ReLU."""

    scale = 2
    offset: int
    adds: tuple[int, ...] = ()

    def __init__(self, stage: Stage) -> None:
        assert stage.relu, stage.name
        self._stage = stage

    def reads(self, cells: _Spans) -> _Spans:
        """Return the input voxels of some cells, those beyond the faces included."""
        raise NotImplementedError

    def cells(self, x: _Map, cells: _Spans) -> Tensor:
        raise NotImplementedError

    def needs(self, out: _Spans, sizes: Sequence[int]) -> _Spans:
        return _clipped(self.reads(_cells(out, self.offset)), sizes)

    def __call__(self, x: _Map, out: _Spans, kept: dict[int, _Map]) -> Tensor:
        at = _cells(out, self.offset)
        return _in_voxel_order(_Map(self.cells(x, at).relu_(), at, ()), self.offset, out)

    def held_by_cells(self, cells: _Spans, sizes: Sequence[int]) -> int:
        outputs = 8 * self._stage.outputs * _size(cells)
        return self._stage.inputs * _padded_size(self.reads(cells), sizes) + outputs

    def held(self, out: _Spans, sizes: Sequence[int]) -> tuple[int, int]:
        """Return how many values are held at most, beyond the input, and how many afterwards.

        At most these are the padded input and the cells, or the cells twice; afterwards the voxels.
        """
        at = _cells(out, self.offset)
        after = 8 * self._stage.outputs * _size(at)
        return max(self.held_by_cells(at, sizes), 2 * after), after


class _Resized(_Doubling):
    """×2 trilinear upsampling and a 3³ convolution as one of 3³ taps: cell c reads the voxels c − 1 to c + 1."""

    offset = 0

    def __init__(self, stage: Stage, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(stage)
        taps = np.zeros((2, 3, 3))  # parity, coarse tap, fine tap
        for parity, fine in product(range(2), range(3)):
            coarse, odd = divmod(parity + fine - 1, 2)
            taps[parity, coarse + 1, fine] = 0.75
            taps[parity, coarse + (2 if odd else 0), fine] = 0.25
        weight = np.einsum("zat,ybu,xcv,oituv->zyxoiabc", taps, taps, taps, stage.weight, optimize=True)
        self._weights = _Weights(weight.reshape(-1, *weight.shape[4:]), np.tile(stage.bias, 8), device, dtype)
        if stage.padding == "zeros":
            self._plain = _Weights(stage.weight, stage.bias, device, dtype)

    def reads(self, cells: _Spans) -> _Spans:
        return _grown(cells, 1, 1)

    def cells(self, x: _Map, cells: _Spans) -> Tensor:
        # Replicated coarse voxels give what replication of the upsampled ones gives.
        y = self._weights(x.padded(self.reads(cells), "replicate"))
        if self._stage.padding == "zeros":
            for axis, end in product(range(3), range(2)):
                if cells[axis][end] == (0, x.sizes[axis])[end]:
                    self._zeros_beyond(x, cells, axis, end, y)
        return y

    def _zeros_beyond(self, x: _Map, cells: _Spans, axis: int, end: int, y: Tensor) -> None:
        """Compute again the fine voxels at one face, beyond which the upsampled volume is zero."""
        sizes, faces = x.sizes, list(cells)
        faces[axis] = (0, 1) if end == 0 else (sizes[axis] - 1, sizes[axis])
        near = _clipped(self.reads(_spans(faces)), sizes)
        fine = upsample(x.part(near), Fraction(2))  # wrong only in its outermost voxels, where the volume goes on
        spans, fine_sizes = _spans([(2 * a, 2 * b) for a, b in near]), tuple(2 * n for n in sizes)
        voxels = [(2 * a, 2 * b) for a, b in faces]
        voxels[axis] = (0, 1) if end == 0 else (fine_sizes[axis] - 1, fine_sizes[axis])
        face = self._plain(_Map(fine, spans, fine_sizes).padded(_grown(_spans(voxels), 1, 1), "zeros"))
        batch, channels = face.shape[:2]
        shape: list[int] = []
        for other, (a, b) in enumerate(faces):
            shape += [1, 1] if other == axis else [b - a, 2]
        apart = face.reshape(batch, channels, *shape).permute(0, 3, 5, 7, 1, 2, 4, 6)
        target = y.unflatten(1, (2, 2, 2, channels)).narrow(1 + axis, end, 1)
        target.narrow(5 + axis, 0 if end == 0 else y.shape[2 + axis] - 1, 1).copy_(apart)


class _Transposed(_Doubling):
    """A transposed convolution as one of 2³ taps: the staggered cell c reads the voxels c − 1 and c."""

    offset = 1

    def __init__(self, stage: Stage, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(stage)
        taps = np.array([[2, 0], [3, 1]])  # of parity and coarse tap: output 2c − 1 + parity, input c − 1 + tap
        z, y, x, a, b, c = np.ix_(*[range(2)] * 6)
        weight = stage.weight[:, :, taps[z, a], taps[y, b], taps[x, c]].transpose(2, 3, 4, 1, 0, 5, 6, 7)
        weight = np.ascontiguousarray(weight.reshape(-1, *weight.shape[4:]))
        self._weights = _Weights(weight, np.tile(stage.bias, 8), device, dtype)

    def reads(self, cells: _Spans) -> _Spans:
        return _grown(cells, 1, 0)

    def cells(self, x: _Map, cells: _Spans) -> Tensor:
        return self._weights(x.padded(self.reads(cells), "zeros"))


class _CellEnd:
    """The last two stages where the first of them doubles: from coarse voxels to cells to logits of cells."""

    def __init__(self, up: _Doubling, last: Stage, end: Stage, device: torch.device, dtype: torch.dtype) -> None:
        self._up, self._last, self._end = up, last, end
        self.offset = 1 - up.offset
        taps = np.zeros((2, 2, 2, 3))  # parity out, cell tap, parity in, fine tap
        for out, cell, given in product(range(2), repeat=3):
            if 0 <= 2 * cell + given - out < 3:
                taps[out, cell, given, 2 * cell + given - out] = 1
        weight = np.einsum("zadt,ybeu,xcfv,pituv->zyxpdefiabc", taps, taps, taps, end.weight, optimize=True)
        shape = (8 * end.outputs, 8 * end.inputs, 2, 2, 2)
        self._weights = _Weights(weight.reshape(shape), np.tile(end.bias, 8), device, dtype)

    def _features(self, logits: _Spans) -> _Spans:
        """Return the feature cells that logit cells read, those beyond the faces included."""
        return _grown(logits, self.offset, self._up.offset)

    def _grid(self, sizes: Sequence[int]) -> list[int]:
        return [n + self._up.offset for n in sizes]

    def needs(self, out: _Spans, sizes: Sequence[int]) -> _Spans:
        return _clipped(self._up.reads(_clipped(self._features(_cells(out, self.offset)), self._grid(sizes))), sizes)

    def logits(self, x: _Map, out: _Spans) -> Tensor:
        """Compute the logits (batch, 8, phases, cells) of the cells that hold `out`."""
        grid, want = self._grid(x.sizes), self._features(_cells(out, self.offset))
        at = _clipped(want, grid)
        features = self._up.cells(x, at).relu_()
        if self._up.offset == 0:
            pad: Literal["zeros", "mirrored"] = "zeros" if self._end.padding == "zeros" else "mirrored"
            features = _Map(features, at, tuple(grid)).padded(want, pad)
        else:  # half of the outermost cells lies beyond the faces
            for axis, end in product(range(3), range(2)):
                if at[axis][end] == (0, grid[axis])[end]:
                    face = features.narrow(2 + axis, 0 if end == 0 else features.shape[2 + axis] - 1, 1)
                    face = face.unflatten(1, (2, 2, 2, -1))
                    beyond, inside = face.select(1 + axis, end), face.select(1 + axis, 1 - end)
                    beyond.zero_() if self._end.padding == "zeros" else beyond.copy_(inside)
        return self._weights(features).unflatten(1, (8, -1))

    def in_voxel_order(self, values: Tensor, out: _Spans) -> Tensor:
        """Reorder (batch, 8, channels, cells) to (batch, channels, voxels `out`)."""
        return _in_voxel_order(_Map(values.flatten(1, 2), _cells(out, self.offset), ()), self.offset, out)

    def held(self, out: _Spans, sizes: Sequence[int]) -> int:
        """Return how many values are held at a time beyond the input.

        These are the padded input and the cells, or the cells padded, or the cells and the logits.
        """
        cells, grid = _cells(out, self.offset), self._grid(sizes)
        want = self._features(cells)
        at = _clipped(want, grid)
        features, padded = (8 * self._last.outputs * size for size in (_size(at), _padded_size(want, grid)))
        logits = 8 * self._end.outputs * _size(cells)
        return max(self._up.held_by_cells(at, sizes), features + padded, (padded or features) + logits)


class _VoxelEnd:
    """The last two stages where the first scales by anything but 2: plain, on the high-res voxels of a slab."""

    offset = 0

    def __init__(self, last: Stage, end: Stage, device: torch.device, dtype: torch.dtype) -> None:
        self._last, self._end = last, end
        self._last_weights = _Weights(last.weight, last.bias, device, dtype)
        self._end_weights = _Weights(end.weight, end.bias, device, dtype)

    def _high_res(self, sizes: Sequence[int]) -> tuple[int, ...]:
        return tuple(floor(n * self._last.scale) for n in sizes)

    def _taps(self, out: _Spans, sizes: Sequence[int]) -> list[Taps]:
        """Return the taps that give the upsampled voxels from which `out` is computed."""
        upsampled = _clipped(_grown(out, 2, 2), self._high_res(sizes))
        return [
            [[tap for tap in row if tap[1]] for row in _linear_taps(n, self._last.scale)[a:b]]
            for (a, b), n in zip(upsampled, sizes, strict=True)
        ]

    def needs(self, out: _Spans, sizes: Sequence[int]) -> _Spans:
        read = [[j for row in rows for j, _ in row] for rows in self._taps(out, sizes)]
        return _spans([(min(js), max(js) + 1) for js in read])

    def logits(self, x: _Map, out: _Spans) -> Tensor:
        """Compute the logits (batch, 1, phases, voxels `out`)."""
        sizes, near = self._high_res(x.sizes), self.needs(out, x.sizes)
        features = _clipped(_grown(out, 1, 1), sizes)
        z, y, x_ = (
            [[(j - start, weight) for j, weight in row] for row in rows]
            for rows, (start, _) in zip(self._taps(out, x.sizes), near, strict=True)
        )
        upsampled = _Map(resample(x.part(near), (z, y, x_)), _clipped(_grown(out, 2, 2), sizes), sizes)
        last = self._last_weights(upsampled.padded(_grown(features, 1, 1), self._last.padding)).relu_()
        del upsampled
        return self._end_weights(_Map(last, features, sizes).padded(_grown(out, 1, 1), self._end.padding)).unsqueeze(1)

    def in_voxel_order(self, values: Tensor, out: _Spans) -> Tensor:
        return values[:, 0]

    def held(self, out: _Spans, sizes: Sequence[int]) -> int:
        """Return how many values are held at a time beyond the input.

        The most are held while the last axis is resampled, or by the convolution after it.
        """
        high_res, scale = self._high_res(sizes), self._last.scale
        near, upsampled = _grown(out, 1, 1), _grown(out, 2, 2)
        given = self._last.inputs * _size(_clipped(upsampled, high_res))
        convolved = self._last.outputs * _size(_clipped(near, high_res))
        convolved += self._last.inputs * _padded_size(upsampled, high_res)
        return convolved if scale == 1 else max(ceil(given * (3 + 1 / scale)), given + convolved)


@lru_cache(maxsize=16)
def _linear_taps(size: int, scale: Fraction) -> Taps:
    return linear_taps(size, 1 / scale, floor(size * scale))


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
        self._stages: list[_Convolution | _Doubling] = [self._stage(stage) for stage in stages]
        self._kept = {i for stage in self._stages for i in stage.adds}
        self._end: _CellEnd | _VoxelEnd
        if last.scale == 2:
            up = self._stage(last)
            assert isinstance(up, _Doubling)
            self._end = _CellEnd(up, last, end, self.device, dtype)
        else:
            self._end = _VoxelEnd(last, end, self.device, dtype)

    def _stage(self, stage: Stage) -> _Convolution | _Doubling:
        if stage.kind == "convolution":
            return _Convolution(stage, self.device, self.dtype)
        assert stage.scale == 2, stage.name
        return (_Resized if stage.kind == "resized" else _Transposed)(stage, self.device, self.dtype)

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
        given = windows.to(self.device, self.dtype).contiguous(memory_format=_layout(self.device, self.dtype))
        x, kept = _Map(given, _whole(sizes[0]), sizes[0]), dict[int, _Map]()
        del given
        for i, stage in enumerate(self._stages):
            x = _Map(stage(x, spans[i + 1], kept), spans[i + 1], sizes[i + 1])
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
            finite &= self._paint(_Map(x.values[some], x.spans, x.sizes), slab, target, as_labels)
        refuse_not_finite(finite, self.dtype)
        return painted

    def _paint(self, x: _Map, slab: _Spans, target: Tensor, as_labels: bool) -> Tensor:
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

    def _ranges(self, window: Sequence[int], crop: Crop | None) -> tuple[_Spans, list[_Spans], list[tuple[int, ...]]]:
        """Return the high-res voxels asked for, and the voxels needed of each grid with the sizes of the grids.

        The grids are those of the input and of the output of each stage.
        """
        sizes = [tuple(window)]
        for stage in self._stages:
            sizes.append(tuple(stage.scale * n for n in sizes[-1]))
        high_res = [floor(n * self.scale) for n in window]
        out = _whole(high_res)
        if crop is not None:
            bounds = [part.indices(n) for part, n in zip(crop, high_res, strict=True)]
            out = _spans([(start, stop) for start, stop, _ in bounds])
        assert all(a < b for a, b in out), (crop, high_res)
        spans = [self._end.needs(out, sizes[-1])]
        for stage, given in zip(reversed(self._stages), reversed(sizes[:-1]), strict=True):
            spans.insert(0, stage.needs(spans[0], given))
        return out, spans, sizes

    def _slabs(self, out: _Spans, sizes: Sequence[int]) -> tuple[int, list[_Spans]]:
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

    def _slab_bytes(self, slab: _Spans, sizes: Sequence[int]) -> int:
        """Return the bytes that a slab takes at most.

        They are those of feature maps and logits, or of the logits, the highest of them, its index and its label twice.
        """
        item, voxels = self.dtype.itemsize, 8 * _size(_cells(slab, self._end.offset))
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
        return max(batch * peak * item, batch * (values * item + _size(out)) + slab)

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


class TorchEngine(Protocol):
    """A list of stages on a torch device: windows in, labels out."""

    device: torch.device
    dtype: torch.dtype

    def labels(self, windows: Tensor, crop: Crop | None = None) -> Tensor:
        """Compute the uint8 labels (batch, z, y, x) of windows (batch, channels, z, y, x)."""
        ...

    def batch_bytes(self, window: Sequence[int], batch: int = 1, crop: Crop | None = None) -> int:
        """Estimate the peak bytes of the tensors for `batch` windows of (z, y, x) voxels."""
        ...


def refuse_not_finite(finite: Tensor, dtype: torch.dtype) -> None:
    """Raise InputError where `finite`, a tensor of one boolean, is False; `dtype` is named in the message."""
    if not finite:
        raise InputError(
            f"the network's output is not finite in {_name(dtype)}, labels would mean nothing; use "
            + ("an earlier checkpoint" if dtype == torch.float32 else "float32, or an earlier checkpoint")
        )


def paint_batches(
    network: TorchEngine, windows: Sequence[np.ndarray], crops: Sequence[Crop], batch: int
) -> tuple[list[np.ndarray], int]:
    """Compute the labels of windows in batches.

    Windows of one shape and crop go through the network `batch` at a time, half as many where memory runs out.

    Parameters
    ----------
    network
        Engine that computes the labels.
    windows
        Floats (channels + 1, z, y, x) each.
    crops
        High-res voxels of each window to compute.
    batch
        Number of windows at a time to begin with.

    Returns
    -------
    labels : list of numpy.ndarray
        uint8 (z, y, x) of each window's crop, in their order.
    batch : int
        Number of windows at a time that fitted.

    Raises
    ------
    InputError
        Where the memory does not suffice for one window, or the logits are not finite.
    """
    painted: list[np.ndarray] = [np.empty(0, np.uint8)] * len(windows)
    alike: dict[object, list[int]] = {}
    for i, (window, crop) in enumerate(zip(windows, crops, strict=True)):
        alike.setdefault((window.shape, tuple((part.start, part.stop) for part in crop)), []).append(i)
    for group in alike.values():
        while group:
            part = group[:batch]
            labels = _paint_if_it_fits(network, [windows[i] for i in part], crops[part[0]])
            if labels is not None:
                for i, of_window in zip(part, labels, strict=True):
                    painted[i] = of_window
                group = group[batch:]
            elif len(part) > 1:
                batch = len(part) // 2
            else:
                shape = windows[part[0]].shape[1:]
                raise InputError(
                    f"a window of {'x'.join(map(str, shape))} low-res voxels needs about "
                    f"{network.batch_bytes(shape, 1, crops[part[0]]) / 1e9:.1f} GB in {_name(network.dtype)}, which "
                    f"{network.device} does not have free; use smaller blocks or a device with more memory"
                )
    return painted, batch


def _paint_if_it_fits(network: TorchEngine, windows: list[np.ndarray], crop: Crop) -> np.ndarray | None:
    try:
        return network.labels(torch.from_numpy(np.stack(windows)), crop).cpu().numpy()
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:  # how torch's CPU allocator and NVIDIA's libraries say it
        if not any(words in str(error) for words in ("allocate memory", "not enough memory", "ALLOC_FAILED")):
            raise
    # Only here, with the exception gone, are the tensors of the attempt gone too.
    if network.device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
