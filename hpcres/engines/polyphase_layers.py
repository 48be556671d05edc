"""The layers of a generator on cells of a low-res lattice: what each reads, holds and computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import product
from math import ceil, floor, prod
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hpcres.networks.resampling import Taps, linear_taps, resample, upsample
from hpcres.networks.stages import Stage

Crop = tuple[slice, slice, slice]
_Span = tuple[int, int]
Spans = tuple[_Span, _Span, _Span]
"""Half-open ranges of voxels or cells along z, y, x."""


def spans_of(values: Sequence[_Span]) -> Spans:
    """Return three spans as a tuple."""
    z, y, x = values
    return z, y, x


def whole_grid(sizes: Sequence[int]) -> Spans:
    """Return the spans of a whole grid of these sizes."""
    return spans_of([(0, n) for n in sizes])


def _grown(spans: Spans, before: int, after: int) -> Spans:
    return spans_of([(a - before, b + after) for a, b in spans])


def _clipped(spans: Spans, sizes: Sequence[int]) -> Spans:
    return spans_of([(max(a, 0), min(b, n)) for (a, b), n in zip(spans, sizes, strict=True)])


def cells_of(voxels: Spans, offset: int) -> Spans:
    """Return the cells of 2×2×2 voxels that hold these voxels; `offset` is where a cell begins."""
    return spans_of([((a + offset) // 2, (b - 1 + offset) // 2 + 1) for a, b in voxels])


def voxels_in(spans: Spans) -> int:
    """Return how many voxels the spans hold."""
    return prod(b - a for a, b in spans)


def _padded_size(want: Spans, sizes: Sequence[int]) -> int:
    """Return the number of voxels that Map.padded copies: none where nothing lies beyond a face."""
    return 0 if _clipped(want, sizes) == want else voxels_in(want)


@dataclass(frozen=True)
class Map:
    """`values` (batch, channels, z, y, x) of the voxels or cells `spans` of a grid of `sizes`."""

    values: Tensor
    spans: Spans
    sizes: tuple[int, ...]

    def part(self, want: Spans) -> Tensor:
        """Return the values of these voxels, (batch, channel, z, y, x)."""
        values = self.values
        for axis, ((a, b), (c, d)) in enumerate(zip(self.spans, want, strict=True)):
            assert a <= c <= d <= b, (self.spans, want)
            values = values.narrow(axis + 2, c - a, d - c)
        return values

    def padded(self, want: Spans, pad: Literal["replicate", "zeros", "mirrored"]) -> Tensor:
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
        Map(out, want, self.sizes).part(inner).copy_(part)
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


def _in_voxel_order(cells: Map, offset: int, want: Spans) -> Tensor:
    """Reorder (batch, 8 · channels, cells) to (batch, channels, voxels `want`) in the memory layout of `cells`."""
    batch, channels = cells.values.shape[0], cells.values.shape[1] // 8
    apart, shape = cells.values.unflatten(1, (2, 2, 2, channels)), [2 * n for n in cells.values.shape[2:]]
    if _channels_last(cells.values):
        voxels = apart.permute(0, 5, 1, 6, 2, 7, 3, 4).reshape(batch, *shape, channels).permute(0, 4, 1, 2, 3)
    else:
        voxels = apart.permute(0, 4, 5, 1, 6, 2, 7, 3).reshape(batch, channels, *shape)
    return Map(voxels, spans_of([(2 * a - offset, 2 * b - offset) for a, b in cells.spans]), ()).part(want)


def layout_of(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """Return the memory layout that suits a device and a float format.

    Channels last suits oneDNN and tensor cores; cuDNN's other kernels, those for fp32, are made for planes.
    """
    planes = device.type == "cuda" and dtype.itemsize > 2
    return torch.contiguous_format if planes else torch.channels_last_3d


class _Weights:
    """Weight and bias of a convolution without padding, on a device and in its float format."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray, device: torch.device, dtype: torch.dtype) -> None:
        self.weight = torch.from_numpy(weight).to(device, dtype).contiguous(memory_format=layout_of(device, dtype))
        self.bias = torch.from_numpy(bias).to(device, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.conv3d(x, self.weight, self.bias)


class Convolution:
    """A 3³ convolution on one grid, with the outputs of earlier stages that are added to it."""

    scale = 1

    def __init__(self, stage: Stage, device: torch.device, dtype: torch.dtype) -> None:
        self._stage = stage
        self._weights = _Weights(stage.weight, stage.bias, device, dtype)
        self.adds = [i for i in (stage.add_before, stage.add_after) if i is not None]

    def needs(self, out: Spans, sizes: Sequence[int]) -> Spans:
        """Return the voxels of an input of `sizes` that the output voxels `out` depend on."""
        return _clipped(_grown(out, 1, 1), sizes)

    def __call__(self, x: Map, out: Spans, kept: dict[int, Map]) -> Tensor:
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

    def held(self, out: Spans, sizes: Sequence[int]) -> tuple[int, int]:
        """Return how many values are held at most, beyond the input, and how many afterwards.

        At most these are the padded input and the output; afterwards the output.
        """
        after = self._stage.outputs * voxels_in(out)
        return self._stage.inputs * _padded_size(_grown(out, 1, 1), sizes) + after, after


class Doubling(ABC):
    """A stage of scale 2 with cells of `offset`; `cells` is computed on the input's grid, before the ReLU."""

    scale = 2
    offset: int
    adds: tuple[int, ...] = ()

    def __init__(self, stage: Stage) -> None:
        assert stage.relu, stage.name
        self._stage = stage

    @abstractmethod
    def reads(self, cells: Spans) -> Spans:
        """Return the input voxels of some cells, those beyond the faces included."""

    @abstractmethod
    def cells(self, x: Map, cells: Spans) -> Tensor:
        """Compute the outputs of some cells, eight channels of each for its voxels."""

    def needs(self, out: Spans, sizes: Sequence[int]) -> Spans:
        """Return the input voxels that these outputs depend on, inside the grid."""
        return _clipped(self.reads(cells_of(out, self.offset)), sizes)

    def __call__(self, x: Map, out: Spans, kept: dict[int, Map]) -> Tensor:
        """Compute the outputs of some voxels."""
        at = cells_of(out, self.offset)
        return _in_voxel_order(Map(self.cells(x, at).relu_(), at, ()), self.offset, out)

    def held_by_cells(self, cells: Spans, sizes: Sequence[int]) -> int:
        """Return the numbers that are held at once while some cells are computed."""
        outputs = 8 * self._stage.outputs * voxels_in(cells)
        return self._stage.inputs * _padded_size(self.reads(cells), sizes) + outputs

    def held(self, out: Spans, sizes: Sequence[int]) -> tuple[int, int]:
        """Return how many values are held at most, beyond the input, and how many afterwards.

        At most these are the padded input and the cells, or the cells twice; afterwards the voxels.
        """
        at = cells_of(out, self.offset)
        after = 8 * self._stage.outputs * voxels_in(at)
        return max(self.held_by_cells(at, sizes), 2 * after), after


class Resized(Doubling):
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

    def reads(self, cells: Spans) -> Spans:
        """Return the input voxels of some cells, those beyond the faces included."""
        return _grown(cells, 1, 1)

    def cells(self, x: Map, cells: Spans) -> Tensor:
        # Replicated coarse voxels give what replication of the upsampled ones gives.
        """Compute the outputs of some cells, eight channels of each for its voxels."""
        y = self._weights(x.padded(self.reads(cells), "replicate"))
        if self._stage.padding == "zeros":
            for axis, end in product(range(3), range(2)):
                if cells[axis][end] == (0, x.sizes[axis])[end]:
                    self._zeros_beyond(x, cells, axis, end, y)
        return y

    def _zeros_beyond(self, x: Map, cells: Spans, axis: int, end: int, y: Tensor) -> None:
        """Compute again the fine voxels at one face, beyond which the upsampled volume is zero."""
        sizes, faces = x.sizes, list(cells)
        faces[axis] = (0, 1) if end == 0 else (sizes[axis] - 1, sizes[axis])
        near = _clipped(self.reads(spans_of(faces)), sizes)
        fine = upsample(x.part(near), Fraction(2))  # wrong only in its outermost voxels, where the volume goes on
        spans, fine_sizes = spans_of([(2 * a, 2 * b) for a, b in near]), tuple(2 * n for n in sizes)
        voxels = [(2 * a, 2 * b) for a, b in faces]
        voxels[axis] = (0, 1) if end == 0 else (fine_sizes[axis] - 1, fine_sizes[axis])
        face = self._plain(Map(fine, spans, fine_sizes).padded(_grown(spans_of(voxels), 1, 1), "zeros"))
        batch, channels = face.shape[:2]
        shape: list[int] = []
        for other, (a, b) in enumerate(faces):
            shape += [1, 1] if other == axis else [b - a, 2]
        apart = face.reshape(batch, channels, *shape).permute(0, 3, 5, 7, 1, 2, 4, 6)
        target = y.unflatten(1, (2, 2, 2, channels)).narrow(1 + axis, end, 1)
        target.narrow(5 + axis, 0 if end == 0 else y.shape[2 + axis] - 1, 1).copy_(apart)


class Transposed(Doubling):
    """A transposed convolution as one of 2³ taps: the staggered cell c reads the voxels c − 1 and c."""

    offset = 1

    def __init__(self, stage: Stage, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(stage)
        taps = np.array([[2, 0], [3, 1]])  # of parity and coarse tap: output 2c − 1 + parity, input c − 1 + tap
        z, y, x, a, b, c = np.ix_(*[range(2)] * 6)
        weight = stage.weight[:, :, taps[z, a], taps[y, b], taps[x, c]].transpose(2, 3, 4, 1, 0, 5, 6, 7)
        weight = np.ascontiguousarray(weight.reshape(-1, *weight.shape[4:]))
        self._weights = _Weights(weight, np.tile(stage.bias, 8), device, dtype)

    def reads(self, cells: Spans) -> Spans:
        """Return the input voxels of some cells, those beyond the faces included."""
        return _grown(cells, 1, 0)

    def cells(self, x: Map, cells: Spans) -> Tensor:
        """Compute the outputs of some cells, eight channels of each for its voxels."""
        return self._weights(x.padded(self.reads(cells), "zeros"))


class CellEnd:
    """The last two stages where the first of them doubles: from coarse voxels to cells to logits of cells."""

    def __init__(self, up: Doubling, last: Stage, end: Stage, device: torch.device, dtype: torch.dtype) -> None:
        self._up, self._last, self._end = up, last, end
        self.offset = 1 - up.offset
        taps = np.zeros((2, 2, 2, 3))  # parity out, cell tap, parity in, fine tap
        for out, cell, given in product(range(2), repeat=3):
            if 0 <= 2 * cell + given - out < 3:
                taps[out, cell, given, 2 * cell + given - out] = 1
        weight = np.einsum("zadt,ybeu,xcfv,pituv->zyxpdefiabc", taps, taps, taps, end.weight, optimize=True)
        shape = (8 * end.outputs, 8 * end.inputs, 2, 2, 2)
        self._weights = _Weights(weight.reshape(shape), np.tile(end.bias, 8), device, dtype)

    def _features(self, logits: Spans) -> Spans:
        """Return the feature cells that logit cells read, those beyond the faces included."""
        return _grown(logits, self.offset, self._up.offset)

    def _grid(self, sizes: Sequence[int]) -> list[int]:
        return [n + self._up.offset for n in sizes]

    def needs(self, out: Spans, sizes: Sequence[int]) -> Spans:
        """Return the input voxels that these outputs depend on, inside the grid."""
        return _clipped(self._up.reads(_clipped(self._features(cells_of(out, self.offset)), self._grid(sizes))), sizes)

    def logits(self, x: Map, out: Spans) -> Tensor:
        """Compute the logits (batch, 8, phases, cells) of the cells that hold `out`."""
        grid, want = self._grid(x.sizes), self._features(cells_of(out, self.offset))
        at = _clipped(want, grid)
        features = self._up.cells(x, at).relu_()
        if self._up.offset == 0:
            pad: Literal["zeros", "mirrored"] = "zeros" if self._end.padding == "zeros" else "mirrored"
            features = Map(features, at, tuple(grid)).padded(want, pad)
        else:  # half of the outermost cells lies beyond the faces
            for axis, end in product(range(3), range(2)):
                if at[axis][end] == (0, grid[axis])[end]:
                    face = features.narrow(2 + axis, 0 if end == 0 else features.shape[2 + axis] - 1, 1)
                    face = face.unflatten(1, (2, 2, 2, -1))
                    beyond, inside = face.select(1 + axis, end), face.select(1 + axis, 1 - end)
                    beyond.zero_() if self._end.padding == "zeros" else beyond.copy_(inside)
        return self._weights(features).unflatten(1, (8, -1))

    def in_voxel_order(self, values: Tensor, out: Spans) -> Tensor:
        """Reorder (batch, 8, channels, cells) to (batch, channels, voxels `out`)."""
        return _in_voxel_order(Map(values.flatten(1, 2), cells_of(out, self.offset), ()), self.offset, out)

    def held(self, out: Spans, sizes: Sequence[int]) -> int:
        """Return how many values are held at a time beyond the input.

        These are the padded input and the cells, or the cells padded, or the cells and the logits.
        """
        cells, grid = cells_of(out, self.offset), self._grid(sizes)
        want = self._features(cells)
        at = _clipped(want, grid)
        features, padded = (8 * self._last.outputs * size for size in (voxels_in(at), _padded_size(want, grid)))
        logits = 8 * self._end.outputs * voxels_in(cells)
        return max(self._up.held_by_cells(at, sizes), features + padded, (padded or features) + logits)


class VoxelEnd:
    """The last two stages where the first scales by anything but 2: plain, on the high-res voxels of a slab."""

    offset = 0

    def __init__(self, last: Stage, end: Stage, device: torch.device, dtype: torch.dtype) -> None:
        self._last, self._end = last, end
        self._last_weights = _Weights(last.weight, last.bias, device, dtype)
        self._end_weights = _Weights(end.weight, end.bias, device, dtype)

    def _high_res(self, sizes: Sequence[int]) -> tuple[int, ...]:
        return tuple(floor(n * self._last.scale) for n in sizes)

    def _taps(self, out: Spans, sizes: Sequence[int]) -> list[Taps]:
        """Return the taps that give the upsampled voxels from which `out` is computed."""
        upsampled = _clipped(_grown(out, 2, 2), self._high_res(sizes))
        return [
            [[tap for tap in row if tap[1]] for row in _linear_taps(n, self._last.scale)[a:b]]
            for (a, b), n in zip(upsampled, sizes, strict=True)
        ]

    def needs(self, out: Spans, sizes: Sequence[int]) -> Spans:
        """Return the input voxels that these outputs depend on, inside the grid."""
        read = [[j for row in rows for j, _ in row] for rows in self._taps(out, sizes)]
        return spans_of([(min(js), max(js) + 1) for js in read])

    def logits(self, x: Map, out: Spans) -> Tensor:
        """Compute the logits (batch, 1, phases, voxels `out`)."""
        sizes, near = self._high_res(x.sizes), self.needs(out, x.sizes)
        features = _clipped(_grown(out, 1, 1), sizes)
        z, y, x_ = (
            [[(j - start, weight) for j, weight in row] for row in rows]
            for rows, (start, _) in zip(self._taps(out, x.sizes), near, strict=True)
        )
        upsampled = Map(resample(x.part(near), (z, y, x_)), _clipped(_grown(out, 2, 2), sizes), sizes)
        last = self._last_weights(upsampled.padded(_grown(features, 1, 1), self._last.padding)).relu_()
        del upsampled
        return self._end_weights(Map(last, features, sizes).padded(_grown(out, 1, 1), self._end.padding)).unsqueeze(1)

    def in_voxel_order(self, values: Tensor, out: Spans) -> Tensor:
        """Return values in the order of voxels."""
        return values[:, 0]

    def held(self, out: Spans, sizes: Sequence[int]) -> int:
        """Return how many values are held at a time beyond the input.

        The most are held while the last axis is resampled, or by the convolution after it.
        """
        high_res, scale = self._high_res(sizes), self._last.scale
        near, upsampled = _grown(out, 1, 1), _grown(out, 2, 2)
        given = self._last.inputs * voxels_in(_clipped(upsampled, high_res))
        convolved = self._last.outputs * voxels_in(_clipped(near, high_res))
        convolved += self._last.inputs * _padded_size(upsampled, high_res)
        return convolved if scale == 1 else max(ceil(given * (3 + 1 / scale)), given + convolved)


@lru_cache(maxsize=16)
def _linear_taps(size: int, scale: Fraction) -> Taps:
    return linear_taps(size, 1 / scale, floor(size * scale))
