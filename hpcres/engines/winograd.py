"""The generator on a CPU: 4³ voxels at a time with 6³ products in place of 4³·3³ (Winograd 1980, Lavin & Gray 2016).

Along an axis, four outputs of a layer are A·((G w) ∘ (B x)): six products. `B` includes the trilinear upsampling
where the layer has one, so no upsampled volume is ever stored. A transposed convolution of stride 2 is, per parity of
its output, a convolution with two taps, with three products for two outputs. Cells of four outputs lie at multiples of
four of each grid's global index. They are always computed whole, from all they can depend on, with the operations of
`simd` in one order. So the labels of a voxel are the same bits whatever block, tile, rank or thread computes them.

Maps are flat float32 arrays (z, y, x, channel). The memory per thread is `WinogradNetwork.block_bytes`.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from hpcres.engines.winograd_axes import G3, G4, Axis, axis_of, product
from hpcres.engines.winograd_kernels import convolve, label
from hpcres.errors import InputError
from hpcres.geometry import Box, Triple, triple
from hpcres.networks.stages import Stage, Stages
from hpcres.simd.registers import EIGHT, WIDEST, width_of


@dataclass(frozen=True)
class _Map:
    """Features of a part of one grid: flat (z, y, x, channels) from global index `origin` on.

    A map with a `ring` holds only the last `ring` planes: plane i takes the place of plane i - ring.
    """

    values: np.ndarray
    origin: Triple
    shape: Triple
    channels: int
    ring: int | None = None

    @property
    def steps(self) -> tuple[int, int]:
        """Distance in floats from one z, and from one y, to the next."""
        return self.shape[1] * self.shape[2] * self.channels, self.shape[2] * self.channels

    def place(self, z: int, y: int, x: int) -> int:
        z0, y0, x0 = self.origin
        return self.planes(z - z0) * self.steps[0] + (y - y0) * self.steps[1] + (x - x0) * self.channels

    def planes(self, z: Any) -> Any:
        """Return where the planes `z`, counted from the origin, are."""
        return z if self.ring is None else z % self.ring


_CELL = 4
"""Outputs of a cell along an axis."""
_RING = 12
"""Planes of the last map but one that are kept: a cell reads up to seven, in three rows of cells that wrote them."""
_NOTHING = _Map(np.empty(0, np.float32), (0, 0, 0), (0, 0, 0), 0)


@dataclass(frozen=True)
class _Layer:
    """A stage with its weights transformed: (6³, inputs, outputs) flat, channels filled up to whole registers."""

    stage: Stage
    inputs: int
    outputs: int
    weights: np.ndarray
    bias: np.ndarray


class Memory:
    """The arrays of one thread, kept from block to block: fresh ones would cost a page fault every 4 KiB.

    Parameters
    ----------
    floats
        Size of each array in floats to begin with. Arrays that grow later would leave holes that nothing else fits.
    """

    def __init__(self, floats: Mapping[str, int] | None = None) -> None:
        self._arrays = {name: _aligned(size) for name, size in (floats or {}).items()}

    def array(self, name: str, size: int) -> np.ndarray:
        """Return the array `name`: float32, of at least `size`, with whatever it held before."""
        if name not in self._arrays or self._arrays[name].size < size:
            self._arrays[name] = _aligned(size)
        return self._arrays[name]

    def touch(self) -> None:
        """Write to every page, so that the system provides it now."""
        for array in self._arrays.values():
            array[:] = 0

    @property
    def bytes(self) -> int:
        """Bytes of all arrays together."""
        return sum(array.nbytes for array in self._arrays.values())


def _aligned(size: int) -> np.ndarray:
    """Return zeros on pages of their own, so that no register of 64 bytes lies across two cache lines.

    Registers across two cache lines halve the speed. Taken from malloc, arrays of this size leave holes in its memory
    that grow with the hours.
    """
    pages = mmap.mmap(-1, max(4 * size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared ones are never huge
    if hasattr(mmap, "MADV_HUGEPAGE") and 4 * size >= 2**22:
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.float32, size)


class WinogradNetwork:
    """A folded generator that turns low-res windows into labels; all threads of a process share it.

    Parameters
    ----------
    folded
        Stages with their weights.
    low_res_shape
        Voxels of the low-res volume along z, y, x.
    endless
        Whether each axis is without ends.
    """

    def __init__(self, folded: Stages, low_res_shape: Sequence[int], endless: Sequence[bool] = (False,) * 3) -> None:
        self._ends = [None if beyond else n for n, beyond in zip(low_res_shape, endless, strict=True)]
        *stages, end = folded.stages
        self._list, self._end = folded, end
        self._layers = [_layer_of(stage) for stage in stages]
        self._places = _places(folded)
        self.phases = folded.phases
        self._end_channels = self._layers[-1].outputs
        self._end_weight, self._end_bias = _aligned(self.phases * 27 * self._end_channels), end.bias.astype(np.float32)
        weight = self._end_weight.reshape(self.phases, 3, 3, 3, self._end_channels)
        weight[..., : end.weight.shape[1]] = end.weight.transpose(0, 2, 3, 4, 1)
        self.channels = self._layers[0].inputs
        """Channels of a window: those of the generator, filled up with zeros."""
        self.together, self.same_bits = 1, True
        self.weight_bytes = sum(layer.weights.nbytes for layer in self._layers)

    def memory(self, edge: int) -> Memory:
        """Allocate all that a thread needs for blocks of up to edge³ high-res voxels, now rather than later."""
        memory = Memory(self._floats(edge))
        memory.touch()
        return memory

    def block_bytes(self, edge: int) -> int:
        """Return the bytes that a thread holds for blocks of edge³: its `memory`, a window and labels."""
        window = self._inner(edge)[0].voxels * self.channels
        return 4 * (sum(self._floats(edge).values()) + window) + edge**3

    def work(self, write: Box) -> float:
        """Count the multiply-adds to label a high-res box, with its margins on every grid.

        The time is about proportional to this number.
        """
        axes = [self._axes(a, write.start[a], write.stop[a]) for a in range(3)]
        total = float(write.voxels * 27 * self._end_channels * self.phases)
        for number, layer in enumerate(self._layers):
            products = layer.inputs * layer.outputs + _TRANSFORMS * (layer.inputs + layer.outputs)
            total += 6.0**3 * products * prod(one[number].cells for one in axes)
        return total

    def _inner(self, edge: int) -> list[Box]:
        """Return the voxels of each grid that a block of edge³ away from the faces takes."""
        start = 64 * edge  # on every grid's cells
        return self._list.parts(Box((start,) * 3, (start + edge,) * 3), cell=_CELL)

    def _floats(self, edge: int) -> dict[str, int]:
        sizes = dict.fromkeys(("values", "products", "planes", "strip"), 0)
        parts = self._inner(edge)[1:-1]
        for layer, part in zip(self._layers, parts, strict=True):
            length = part.shape[0]
            first, last = layer.stage.reads(part.start[0], part.stop[0] - 1)
            rows = _rows_together(layer, length // _CELL)
            sizes["values"] = max(sizes["values"], 36 * rows * layer.inputs)
            sizes["products"] = max(sizes["products"], 36 * rows * layer.outputs)
            sizes["planes"] = max(sizes["planes"], 96 * rows * layer.outputs)
            sizes["strip"] = max(sizes["strip"], 6 * (last + 1 - first) * layer.inputs)
            if layer is not self._layers[-1]:
                place, planes = self._places[layer.stage.name], _RING if layer is self._layers[-2] else length
                sizes[place] = max(sizes.get(place, 0), planes * length**2 * layer.outputs)
        length = parts[-1].shape[0]
        sizes["features"] = 7 * (length + 2) * (length + 10) * self._end_channels
        return sizes

    def paint(self, parts: Sequence[tuple[np.ndarray, Box, Box]], memory: Memory) -> list[np.ndarray]:
        """Compute the `labels` of several blocks.

        Parameters
        ----------
        parts
            For each block (window, place, write), as of `labels`.
        memory
            Arrays of the calling thread.

        Returns
        -------
        list of numpy.ndarray
            uint8 labels (z, y, x) of each block.

        Raises
        ------
        InputError
            Where a logit is not finite.
        """
        painted = []
        for window, place, write in parts:
            labels = self.labels(window, place, write, memory)
            if labels is None:
                raise InputError(
                    "the network's output is not finite, labels would mean nothing; use an earlier checkpoint"
                )
            painted.append(labels)
        return painted

    def arithmetic(self, block_voxels: int) -> str:
        """Return the name of the arithmetic, which is the same for all blocks, tiles and threads."""
        return "winograd fp32"

    def reads(self, write: Box) -> Box:
        """Return the low-res box that the labels of a high-res box depend on; it may leave axes without ends."""
        axes = [self._axes(a, write.start[a], write.stop[a])[0].reads for a in range(3)]
        return Box(triple([r.start for r in axes]), triple([r.stop for r in axes]))

    def _axes(self, axis: int, start: int, stop: int) -> list[Axis]:
        return _cells([layer.stage for layer in self._layers], self._ends[axis], start, stop)

    def labels(self, window: np.ndarray, place: Box, write: Box, memory: Memory) -> np.ndarray | None:
        """Compute the labels of a high-res box.

        Parameters
        ----------
        window
            float32 (z, y, x, channels) of the low-res box `place`.
        place
            Low-res box, which holds `reads(write)`.
        write
            High-res box.
        memory
            Arrays of the calling thread.

        Returns
        -------
        numpy.ndarray or None
            uint8 labels (z, y, x) of `write`; None where a logit is not finite.
        """
        axes = [self._axes(a, write.start[a], write.stop[a]) for a in range(3)]
        here = _Map(window.ravel(), place.start, place.shape, self.channels)
        maps: list[_Map] = []
        for number, layer in enumerate(self._layers[:-1]):
            z, y, x = (one[number] for one in axes)
            shape, ring = (z.stop - z.start, y.stop - y.start, x.stop - x.start), None
            if layer is self._layers[-2]:
                ring = _RING
            values = memory.array(self._places[layer.stage.name], (ring or shape[0]) * prod(shape[1:]) * layer.outputs)
            maps.append(_Map(values, (z.start, y.start, x.start), shape, layer.outputs, ring))
            if ring is None:
                self._run(layer, (z, y, x), here, maps[-1], maps, memory)
                here = maps[-1]
        return self._finish(axes, here, maps, write, memory)

    def _run(
        self,
        layer: _Layer,
        axes: tuple[Axis, Axis, Axis],
        x: _Map,
        out: _Map,
        maps: list[_Map],
        memory: Memory,
        slab: int | None = None,
    ) -> None:
        """Compute one layer over all its cells, or over the row `slab` of them along z."""
        taps = max(one.taps.shape[1] for one in axes)
        shifts = [one.reads.start - origin for one, origin in zip(axes, x.origin, strict=True)]
        rows = _rows_together(layer, axes[2].cells)
        strip_step = 6 * layer.inputs
        tables: list[np.ndarray] = []
        for one, shift, step in zip(axes, (*shifts[:2], 0), (*x.steps, strip_step), strict=True):
            offsets, table = _widened(one, taps)
            offsets = offsets + shift
            tables += [(offsets if tables else x.planes(offsets)) * step, table]
        tables[2] = tables[2] + shifts[2] * layer.inputs
        cells, extent = [one.cells for one in axes], [one.stop - one.start for one in axes]
        start = [one.start for one in axes]
        if slab is not None:
            tables[0], tables[1] = tables[0][slab : slab + 1], tables[1][slab : slab + 1]
            cells[0], extent[0], start[0] = 1, extent[0] - 4 * slab, start[0] + 4 * slab
        columns = len(axes[2].reads)
        wide = _lanes(layer.outputs)
        before, after = (
            _NOTHING if number is None else maps[number] for number in (layer.stage.add_before, layer.stage.add_after)
        )
        convolve(
            x.values,
            layer.inputs,
            taps,
            tuple(np.ascontiguousarray(t).ravel() for t in tables),
            triple(cells),
            layer.stage.kind == "transposed",
            layer.weights,
            layer.bias,
            layer.stage.relu,
            layer.outputs,
            out.values,
            out.place(*start),
            triple(extent),
            out.steps,
            before.values,
            before.place(*start),
            before.steps,
            after.values,
            after.place(*start),
            after.steps,
            rows,
            memory.array("values", 36 * rows * layer.inputs),
            memory.array("products", 36 * rows * layer.outputs),
            memory.array("planes", 96 * rows * layer.outputs),
            memory.array("strip", columns * strip_step),
            memory.array("pile", 16 * taps),
            memory.array("scratch", 64 * 16),
            _lanes(layer.inputs),
            wide,
        )

    def _finish(
        self, axes: list[list[Axis]], x: _Map, maps: list[_Map], write: Box, memory: Memory
    ) -> np.ndarray | None:
        """Compute the last two layers in slabs of four planes.

        Each plane is labelled as soon as the plane behind it is computed.
        """
        *_, feeding, layer = self._layers
        feeds, (z, y, x_axis) = (axes[0][-2], axes[1][-2], axes[2][-2]), (axes[0][-1], axes[1][-1], axes[2][-1])
        fed = 0  # rows of the last layer but one
        channels = layer.outputs
        # One plane or column more on every side, for the padding at true faces, and room to read in eights.
        shape = (7, y.stop - y.start + 2, x_axis.stop - x_axis.start + 10)
        features = memory.array("features", prod(shape) * channels)
        plane, row = shape[1] * shape[2] * channels, shape[2] * channels
        grid = features[: prod(shape) * channels].reshape(*shape, channels)
        zeros = self._end.padding == "zeros"
        grid[6] = 0.0
        labels = np.empty(write.shape, np.uint8)
        logits = np.empty(8 * self.phases, np.float32)
        y0, x0 = write.start[1] - y.start, write.start[2] - x_axis.start
        done = write.start[0]
        start = (z.start, y.start, x_axis.start)
        out = _Map(features[2 * plane + row + channels :], start, (4, *shape[1:]), channels, ring=4)
        for slab in range(z.cells):
            while feeds[0].start + 4 * fed <= z.reads.start + z.taps[slab].max():
                self._run(feeding, feeds, x, maps[-1], maps, memory, fed)
                fed += 1
            grid[:2] = grid[4:6]
            self._run(layer, (z, y, x_axis), maps[-1], out, maps, memory, slab)
            first = z.start + 4 * slab
            ready = min(4, z.stop - first)
            for side, length in ((1, y.stop - y.start), (2, x_axis.stop - x_axis.start)):
                for ghost, edge in ((0, 1), (length + 1, length)):
                    index: list[slice | int] = [slice(2, 2 + ready), slice(None), slice(None)]
                    index[side] = ghost
                    copied = list(index)
                    copied[side] = edge
                    grid[tuple(index)] = 0.0 if zeros else grid[tuple(copied)]
            last = first + ready == z.stop
            while done < write.stop[0] and (done + 1 < first + ready or last):
                places = []
                for neighbour in (done - 1, done, done + 1):
                    inside = min(max(neighbour, z.start), z.stop - 1)
                    places.append(6 if zeros and inside != neighbour else inside - first + 2)
                finite = label(
                    features,
                    np.array([p * plane + y0 * row + x0 * channels for p in places]),
                    row,
                    write.shape[1],
                    write.shape[2],
                    channels,
                    self._end_weight,
                    self._end_bias,
                    self.phases,
                    labels[done - write.start[0]],
                    logits,
                    _lanes(channels),
                )
                if not finite:
                    return None
                done += 1
        assert done == write.stop[0]
        return labels


def _places(folded: Stages) -> dict[str, str]:
    """Choose the array that holds each stage's map: one whose map no later stage reads, or else one more."""
    found: list[str] = []
    for number in range(len(folded.stages) - 1):
        read = folded.added_from(number) | ({number - 1} if number else set())
        taken = {found[i] for i in read}
        found.append(next(place for place in map("map {}".format, range(number + 1)) if place not in taken))
    return {stage.name: place for stage, place in zip(folded.stages, found, strict=False)}


def _cells(stages: Sequence[Stage], length: int | None, start: int, stop: int) -> list[Axis]:
    """Return every stage's cells along an axis of `length` low-res voxels, for high-res voxels [start, stop)."""
    lengths = [length]
    for stage in stages:
        lengths.append(None if lengths[-1] is None else stage.length(lengths[-1]))
    start, stop = start - 1, stop + 1  # for the last convolution
    found: list[Axis] = []
    for number in reversed(range(len(stages))):
        end, stage = lengths[number + 1], stages[number]
        if end is not None:
            start, stop = max(start, 0), min(stop, end)
        found.insert(0, axis_of(stage.kind, stage.scale, stage.padding, start, stop, lengths[number]))
        start, stop = found[0].reads.start, found[0].reads.stop
    return found


def reach_low_res(folded: Stages) -> int:
    """Return how many low-res voxels beyond a box its cells can depend on.

    The one voxel more on the + side of a box is included.
    """
    p, q = folded.scale.numerator, folded.scale.denominator
    reach = 0
    for start in range(0, _CELL * q, q):  # cells lie alike every four low-res voxels, weights every q
        first, last = folded.needed(start * p // q, start * p // q, _CELL)[0]
        reach = max(reach, start - first, last + 1 - start)
    return reach


def _layer_of(stage: Stage) -> _Layer:
    inputs, outputs = stage.inputs, stage.outputs
    if stage.kind == "transposed":
        change, weight = G4, stage.weight.transpose(2, 3, 4, 0, 1)
    else:
        change, weight = G3, stage.weight.transpose(2, 3, 4, 1, 0)
    shape = (6, 6, 6, _filled(inputs), _filled(outputs))
    filled = _aligned(prod(shape))
    for first in range(0, inputs, 32):  # in parts, because these are doubles
        some = weight[..., first : first + 32, :]
        for _ in range(3):  # each turn transforms the first axis and moves it behind the other two
            some = np.moveaxis(product(change, some), 0, 2)
        filled.reshape(shape)[..., first : first + some.shape[3], :outputs] = some
    bias = np.zeros(_filled(outputs), np.float32)
    bias[:outputs] = stage.bias
    return _Layer(stage, _filled(inputs), _filled(outputs), filled, bias)


def _filled(channels: int) -> int:
    return 8 if channels <= 8 else -(-channels // 16) * 16


def _lanes(channels: int) -> np.generic:
    return WIDEST if channels % width_of(WIDEST) == 0 else EIGHT


def _rows_together(layer: _Layer, row: int) -> int:
    """Return how many cells to transform before multiplying, in a `row` of them: parts of it, or several rows.

    The number is what half of a core's second-level cache holds. Where the weights are larger than that, they are read
    again each time. If they come from the cache that cores share, the cells should leave room in it. If they come from
    memory, each reading should serve many cells.
    """
    rows = max(12, _CACHE_BYTES // 2 // (36 * 4 * (layer.inputs + layer.outputs)))
    if layer.weights.nbytes > _CACHE_BYTES // 2:
        rows = max(rows, 24 if layer.weights.nbytes <= 16 * _CACHE_BYTES else 192)
    return (rows // row * row if rows > row else -(-row // -(-row // rows))) + 1  # the remainder is taken in twos


_CACHE_BYTES = 2**20
_TRANSFORMS = 8
"""About how many multiply-adds transform one of a cell's 6³ inputs or outputs."""


def _widened(one: Axis, taps: int) -> tuple[np.ndarray, np.ndarray]:
    more = taps - one.taps.shape[1]
    if not more:
        return one.taps, one.table
    return np.pad(one.taps, ((0, 0), (0, more)), mode="edge"), np.pad(one.table, ((0, 0), (0, 0), (0, more)))
