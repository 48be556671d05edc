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
from fractions import Fraction
from functools import lru_cache
from math import floor, prod
from typing import Any

import numpy as np

from hpcres.compiled import compiled
from hpcres.errors import InputError
from hpcres.geometry import Box, Triple, triple
from hpcres.networks.stages import Stage, Stages
from hpcres.simd.products import combination, fixed_combination, panel
from hpcres.simd.registers import (
    EIGHT,
    WIDEST,
    add,
    floats,
    fma,
    load,
    load_splat,
    multiply,
    rectified,
    store,
    total,
    width_of,
    zero,
)

# ---- one axis ----------------------------------------------------------------------------------------------

# F(4, 3): interpolation at 0, ±1/√2, ±√2 and ∞, which keep the rounding error of fp32 near that of a plain sum.
_POINTS = (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))
_A3 = [[p**i for p in _POINTS] + [float(i == 3)] for i in range(4)]
_G3 = np.array(
    [[p**k / prod(p - other for other in _POINTS if other != p) for k in range(3)] for p in _POINTS] + [[0, 0, 1]]
)
# Row p: coefficients of x (x² − 1/2) (x² − 2) / (x − p), lowest power first; the last row: of the whole product.
_B3 = np.array(
    [[1, 0, -2.5, 0, 1, 0]]
    + [[0, -p * other, -other, p, 1, 0] for p, other in zip(_POINTS[1:], (2, 2, 0.5, 0.5), strict=True)]
    + [[0, 1, 0, -2.5, 0, 1]]
)
# F(2, 2) for the even outputs (first three products) and for the odd ones: taps 3, 1 and 2, 0 of four.
_A4 = [[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]]
_G4 = np.array([[0, 0, 0, 1], [0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0], [1, 0, 0, 0]], float)
_B4 = np.array(
    [[1, -1, 0, 0], [0, 1, 0, 0], [0, -1, 1, 0], [0, 1, -1, 0], [0, 0, 1, 0], [0, 0, -1, 1]], float
)  # of inputs i - 1 … i + 2 for outputs 2 i … 2 i + 3
_TAP_COUNTS = (4, 6, 7)
_combine_4, _combine_6, _combine_7 = (combination(taps, 6) for taps in _TAP_COUNTS)
_one_of_4, _one_of_6, _one_of_7 = (combination(taps, 1) for taps in _TAP_COUNTS)
_panel_5_4, _panel_10_2, _panel_12_1, _panel_2_1 = panel(5, 4), panel(10, 2), panel(12, 1), panel(2, 1)
_four_of_3 = fixed_combination(_A3, ((1, 2), (3, 4)))
_four_of_4 = fixed_combination(_A4)


@dataclass(frozen=True)
class Axis:
    """One axis of one stage for one block, in global indices of the stage's grids.

    Cells of four outputs begin at `start`; outputs beyond `stop` do not exist. `taps` (cell, n) are the inputs that
    each cell reads, as offsets from `reads.start`. `table` (cell, 6, n) holds the weights of these inputs in each
    product.
    """

    start: int
    stop: int
    reads: range
    taps: np.ndarray
    table: np.ndarray

    @property
    def cells(self) -> int:
        """Number of cells."""
        return len(self.taps)


@lru_cache(maxsize=4096)
def axis_of(kind: str, scale: Fraction, padding: str, start: int, stop: int, input_length: int | None) -> Axis:
    """Return the cells that cover outputs [start, stop) of a stage along one axis.

    Parameters
    ----------
    kind, scale, padding
        As of the stage.
    start, stop
        Half-open range of outputs, in global indices.
    input_length
        Input voxels along the axis; None along an axis without ends.

    Returns
    -------
    Axis
        The cells, which may reach beyond the outputs asked for.
    """
    end = None if input_length is None else floor(input_length * scale)
    first, last = start // 4, -(-stop // 4)
    rows = []
    for cell in range(first, last):
        taken = [_inputs(kind, scale, padding, 4 * cell + i, input_length, end) for i in _window(kind)]
        low = min((j for one in taken for j in one), default=0)
        high = max((j for one in taken for j in one), default=0)
        weights = np.zeros((len(taken), high - low + 1))
        for i, one in enumerate(taken):
            for j, weight in one.items():
                weights[i, j - low] += float(weight)
        rows.append((low, _product(_B4 if kind == "transposed" else _B3, weights)))
    width = next(n for n in _TAP_COUNTS if n >= max(table.shape[1] for _, table in rows))
    reads = range(min(low for low, _ in rows), max(low + table.shape[1] for low, table in rows))
    taps = np.array([[min(low + j, reads.stop - 1) for j in range(width)] for low, _ in rows]) - reads.start
    tables = np.zeros((len(rows), 6, width), np.float32)
    for number, (_, table) in enumerate(rows):
        tables[number, :, : table.shape[1]] = table
    begin, finish = 4 * first, 4 * last
    return Axis(begin, finish if end is None else min(finish, end), reads, taps.astype(np.int64), tables)


def _product(matrix: np.ndarray, some: np.ndarray) -> np.ndarray:
    """Compute Σ_k matrix[:, k] · some[k], summed in the order k = 0, 1, ….

    The order of BLAS depends on the processor.
    """
    total = np.zeros((len(matrix), *some.shape[1:]))
    for column, one in zip(matrix.T, some, strict=True):
        for row, factor in zip(total, column, strict=True):
            if factor:
                row += factor * one
    return total


def _window(kind: str) -> range:
    """Return the positions that a cell of outputs 0 … 3 reads.

    They are the outputs and their neighbours, or the inputs of a transposed convolution.
    """
    return range(4) if kind == "transposed" else range(-1, 5)


def _inputs(
    kind: str, scale: Fraction, padding: str, index: int, length: int | None, end: int | None
) -> dict[int, Fraction]:
    """Return the inputs, with weights, behind one position of a cell's window."""
    if kind == "transposed":  # index is 4·cell + i: inputs 2·cell − 1 + i
        place = index // 4 * 2 - 1 + index % 4
        return {place: Fraction(1)} if length is None or 0 <= place < length else {}
    if end is not None and not 0 <= index < end:
        if padding == "zeros":
            return {}
        index = min(max(index, 0), end - 1)
    if kind == "convolution":
        return {index: Fraction(1)}
    position = (index + Fraction(1, 2)) / scale - Fraction(1, 2)
    if length is not None:
        position = min(max(position, Fraction(0)), Fraction(length - 1))
    low = floor(position)
    weight = position - low
    return {low: 1 - weight, low + 1: weight} if weight else {low: Fraction(1)}


# ---- kernels -----------------------------------------------------------------------------------------------


@compiled
def _combine(taps, target, t, step, source, s, offsets, o, table, k, lanes):
    if taps == 4:
        _combine_4(target, t, step, source, s, offsets, o, table, k, lanes)
    elif taps == 6:
        _combine_6(target, t, step, source, s, offsets, o, table, k, lanes)
    else:
        _combine_7(target, t, step, source, s, offsets, o, table, k, lanes)


@compiled
def _combine_to_one(taps, target, t, source, s, offsets, o, table, k, lanes):
    if taps == 4:
        _one_of_4(target, t, 0, source, s, offsets, o, table, k, lanes)
    elif taps == 6:
        _one_of_6(target, t, 0, source, s, offsets, o, table, k, lanes)
    else:
        _one_of_7(target, t, 0, source, s, offsets, o, table, k, lanes)


@compiled
def _take_in(g, x, channels, taps, zo, zt, tz, yo, yt, ty, xo, xt, first, last, values, t0, rows, strip, pile, lanes):
    """Transform the inputs of cells first … last of a row for product g along z, into `values`.

    `values` is (6, 6, rows, channels) and is filled from row t0 on.
    """
    width = floats(lanes)
    piled = np.empty(taps, np.int64)
    for j in range(taps):
        piled[j] = j * width
    begin, end = xo[first * taps] // (6 * channels), xo[last * taps - 1] // (6 * channels) + 1
    for column in range(begin, end):
        for c in range(0, channels, width):
            at = column * channels + c
            for j in range(taps):
                _combine_to_one(
                    taps, pile, j * width, x, yo[ty * taps + j] + at, zo, tz * taps, zt, (tz * 6 + g) * taps, lanes
                )
            _combine(taps, strip, 6 * column * channels + c, channels, pile, 0, piled, 0, yt, ty * 6 * taps, lanes)
    for cell in range(first, last):
        at = (t0 + cell - first) * channels
        if taps == 4:
            _along_x(values, at, rows * channels, strip, xo, xt, cell, channels, lanes)
            continue
        for i in range(6):
            for c in range(0, channels, width):
                _combine(
                    taps,
                    values,
                    6 * i * rows * channels + at + c,
                    rows * channels,
                    strip,
                    i * channels + c,
                    xo,
                    cell * taps,
                    xt,
                    cell * 6 * taps,
                    lanes,
                )


@compiled
def _along_x(values, at, step, strip, xo, xt, cell, channels, lanes):
    """Do the last of the three transforms for four taps, which takes most of the time: its table stays in registers."""
    width, k = floats(lanes), 24 * cell
    s0, s1, s2, s3 = xo[4 * cell], xo[4 * cell + 1], xo[4 * cell + 2], xo[4 * cell + 3]
    a0, a1, a2, a3 = _four(xt, k, lanes)
    b0, b1, b2, b3 = _four(xt, k + 4, lanes)
    c0, c1, c2, c3 = _four(xt, k + 8, lanes)
    d0, d1, d2, d3 = _four(xt, k + 12, lanes)
    e0, e1, e2, e3 = _four(xt, k + 16, lanes)
    f0, f1, f2, f3 = _four(xt, k + 20, lanes)
    for i in range(0, 6 * channels, channels):
        for c in range(i, i + channels, width):
            p, q = load(strip, s0 + c, lanes), load(strip, s1 + c, lanes)
            r, s = load(strip, s2 + c, lanes), load(strip, s3 + c, lanes)
            t = at + c - i
            store(values, t, fma(a3, s, fma(a2, r, fma(a1, q, multiply(a0, p)))))
            store(values, t + step, fma(b3, s, fma(b2, r, fma(b1, q, multiply(b0, p)))))
            store(values, t + 2 * step, fma(c3, s, fma(c2, r, fma(c1, q, multiply(c0, p)))))
            store(values, t + 3 * step, fma(d3, s, fma(d2, r, fma(d1, q, multiply(d0, p)))))
            store(values, t + 4 * step, fma(e3, s, fma(e2, r, fma(e1, q, multiply(e0, p)))))
            store(values, t + 5 * step, fma(f3, s, fma(f2, r, fma(f1, q, multiply(f0, p)))))
        at += 6 * step


@compiled
def _four(table, k, lanes):
    return (
        load_splat(table, k, lanes),
        load_splat(table, k + 1, lanes),
        load_splat(table, k + 2, lanes),
        load_splat(table, k + 3, lanes),
    )


@compiled
def _multiply(g, values, weights, products, rows, used, inputs, outputs, lanes):
    """Compute products (6, 6, rows, outputs) = values (6, 6, rows, inputs) · weights (6, 6, 6, inputs, outputs)[g].

    Only the first `used` rows are computed.
    """
    width = floats(lanes)
    for f in range(36):
        v, w, m = f * rows * inputs, (36 * g + f) * inputs * outputs, f * rows * outputs
        together = 5 if outputs % (4 * width) == 0 else 10 if outputs % (2 * width) == 0 else 12
        whole = used // together * together
        if together == 5:
            for k in range(0, outputs, 4 * width):
                for t in range(0, whole, 5):
                    _panel_5_4(
                        values, v + t * inputs, weights, w + k, products, m + t * outputs + k, inputs, outputs, lanes
                    )
        elif together == 10:
            for k in range(0, outputs, 2 * width):
                for t in range(0, whole, 10):
                    _panel_10_2(
                        values, v + t * inputs, weights, w + k, products, m + t * outputs + k, inputs, outputs, lanes
                    )
        else:
            for k in range(0, outputs, width):
                for t in range(0, whole, 12):
                    _panel_12_1(
                        values, v + t * inputs, weights, w + k, products, m + t * outputs + k, inputs, outputs, lanes
                    )
        for k in range(0, outputs, width):
            for t in range(whole, used, 2):
                _panel_2_1(
                    values, v + t * inputs, weights, w + k, products, m + t * outputs + k, inputs, outputs, lanes
                )


@compiled
def _gather(transposed, g, products, rows, used, channels, planes, scratch, lanes):
    """Transform product g along z to outputs along y and x, into `planes`.

    `planes` is (rows, channels, 6, 4, 4) with a register for each group of channels.
    """
    width, plane = floats(lanes), rows * channels
    for t in range(used):
        for c in range(0, channels, width):
            at, m = 96 * (t * channels + c) + 16 * g * width, t * channels + c
            for y in range(6):
                if transposed:
                    _four_of_4(scratch, 4 * y * width, width, products, m + 6 * y * plane, plane, lanes)
                else:
                    _four_of_3(scratch, 4 * y * width, width, products, m + 6 * y * plane, plane, lanes)
            for x in range(4):
                if transposed:
                    _four_of_4(planes, at + x * width, 4 * width, scratch, x * width, 4 * width, lanes)
                else:
                    _four_of_3(planes, at + x * width, 4 * width, scratch, x * width, 4 * width, lanes)


@compiled
def _give_out(
    transposed,
    planes,
    t0,
    channels,
    begin,
    end,
    bias,
    relu,
    out,
    at,
    z_step,
    y_step,
    depth,
    height,
    length,
    before,
    b_at,
    bz_step,
    by_step,
    after,
    a_at,
    az_step,
    ay_step,
    scratch,
    lanes,
):
    """Write the outputs of cells begin … end of a row, 4³ each as far as depth × height × length reaches.

    They go into `out` from `at` on. `before` is added ahead of the ReLU and `after` behind it, where they are not
    empty.
    """
    width = floats(lanes)
    for cell in range(begin, end):
        for c in range(0, channels, width):
            b, first = load(bias, c, lanes), 96 * ((t0 + cell - begin) * channels + c)
            for yx in range(16):
                if transposed:
                    _four_of_4(scratch, yx * width, 16 * width, planes, first + yx * width, 16 * width, lanes)
                else:
                    _four_of_3(scratch, yx * width, 16 * width, planes, first + yx * width, 16 * width, lanes)
            inside = min(4, length - 4 * cell)
            for z in range(min(4, depth)):
                for y in range(min(4, height)):
                    for x in range(inside):
                        value = add(load(scratch, (16 * z + 4 * y + x) * width, lanes), b)
                        along = (4 * cell + x) * channels + c
                        if before.size:
                            value = add(value, load(before, b_at + z * bz_step + y * by_step + along, lanes))
                        if relu:
                            value = rectified(value)
                        if after.size:
                            value = add(value, load(after, a_at + z * az_step + y * ay_step + along, lanes))
                        store(out, at + z * z_step + y * y_step + along, value)


@compiled
def _convolve(
    x,
    inputs,
    taps,
    tables,
    cells,
    transposed,
    weights,
    bias,
    relu,
    outputs,
    out,
    place,
    extent,
    steps,
    before,
    b_place,
    b_steps,
    after,
    a_place,
    a_steps,
    rows,
    values,
    products,
    planes,
    strip,
    pile,
    scratch,
    narrow,
    wide,
):
    """Compute one stage: `cells` (z, y, x) of outputs, some rows of them at a time.

    Of the 6³ products of these rows, 6² are computed at a time. x (…, inputs) is the input and `out` the output.
    `place` is where the first output goes, `extent` how many outputs there are, `steps` the distance of z and y
    neighbours in `out`; likewise for `before` and `after`. `narrow` are the lanes of the inputs, `wide` those of the
    outputs.
    """
    zo, zt, yo, yt, xo, xt = tables
    together = max(1, rows // cells[2])
    parts = -(-cells[2] // rows)
    for tz in range(cells[0]):
        for ty0 in range(0, cells[1], together):
            ty1 = min(ty0 + together, cells[1])
            for part in range(parts):
                tx0, tx1 = part * cells[2] // parts, (part + 1) * cells[2] // parts
                length = tx1 - tx0
                used = (ty1 - ty0) * length
                for g in range(6):
                    for ty in range(ty0, ty1):
                        _take_in(
                            g,
                            x,
                            inputs,
                            taps,
                            zo,
                            zt,
                            tz,
                            yo,
                            yt,
                            ty,
                            xo,
                            xt,
                            tx0,
                            tx1,
                            values,
                            (ty - ty0) * length,
                            rows,
                            strip,
                            pile,
                            narrow,
                        )
                    _multiply(g, values, weights, products, rows, used, inputs, outputs, wide)
                    _gather(transposed, g, products, rows, used, outputs, planes, scratch, wide)
                for ty in range(ty0, ty1):
                    _give_out(
                        transposed,
                        planes,
                        (ty - ty0) * length,
                        outputs,
                        tx0,
                        tx1,
                        bias,
                        relu,
                        out,
                        place + 4 * (tz * steps[0] + ty * steps[1]),
                        steps[0],
                        steps[1],
                        extent[0] - 4 * tz,
                        extent[1] - 4 * ty,
                        extent[2],
                        before,
                        b_place + 4 * (tz * b_steps[0] + ty * b_steps[1]),
                        b_steps[0],
                        b_steps[1],
                        after,
                        a_place + 4 * (tz * a_steps[0] + ty * a_steps[1]),
                        a_steps[0],
                        a_steps[1],
                        scratch,
                        wide,
                    )


@compiled
def _label(features, planes, y_step, height, length, channels, weights, bias, phases, labels, logits, lanes):
    """Compute the last convolution and the most likely phase of one plane of `height` × `length` voxels.

    features is (…, y, x, channels). `planes` are where the three planes around the plane start, one voxel before the
    first output in y and x. weights is (phase, dz, dy, dx, channel). Returns whether every logit was finite.
    """
    width = floats(lanes)
    nothing = np.float32(0)  # what infinite or undefined logits turn into NaN
    for y in range(height):
        for x in range(0, length, 8):
            for p in range(phases):
                a, b, c, d = zero(lanes), zero(lanes), zero(lanes), zero(lanes)
                e, f, g, h = zero(lanes), zero(lanes), zero(lanes), zero(lanes)
                w = p * 27 * channels
                for dz in range(3):
                    for dy in range(3):
                        at = planes[dz] + (y + dy) * y_step + x * channels
                        for _ in range(0, channels, width):
                            w0, w1 = load(weights, w, lanes), load(weights, w + channels, lanes)
                            w2 = load(weights, w + 2 * channels, lanes)
                            f0, f1 = load(features, at, lanes), load(features, at + channels, lanes)
                            f2, f3 = load(features, at + 2 * channels, lanes), load(features, at + 3 * channels, lanes)
                            a, b = fma(w2, f2, fma(w1, f1, fma(w0, f0, a))), fma(w2, f3, fma(w1, f2, fma(w0, f1, b)))
                            f4, f5 = load(features, at + 4 * channels, lanes), load(features, at + 5 * channels, lanes)
                            c, d = fma(w2, f4, fma(w1, f3, fma(w0, f2, c))), fma(w2, f5, fma(w1, f4, fma(w0, f3, d)))
                            f6, f7 = load(features, at + 6 * channels, lanes), load(features, at + 7 * channels, lanes)
                            e, f = fma(w2, f6, fma(w1, f5, fma(w0, f4, e))), fma(w2, f7, fma(w1, f6, fma(w0, f5, f)))
                            f8, f9 = load(features, at + 8 * channels, lanes), load(features, at + 9 * channels, lanes)
                            g, h = fma(w2, f8, fma(w1, f7, fma(w0, f6, g))), fma(w2, f9, fma(w1, f8, fma(w0, f7, h)))
                            at += width
                            w += width
                        w += 2 * channels
                q = 8 * p
                logits[q], logits[q + 1], logits[q + 2], logits[q + 3] = total(a), total(b), total(c), total(d)
                logits[q + 4], logits[q + 5], logits[q + 6], logits[q + 7] = total(e), total(f), total(g), total(h)
            for i in range(min(8, length - x)):
                best, label = logits[i] + bias[0], 0
                nothing += best * np.float32(0)
                for p in range(1, phases):
                    value = logits[8 * p + i] + bias[p]
                    nothing += value * np.float32(0)
                    better = value > best
                    best, label = value if better else best, p if better else label
                labels[y, x + i] = label
    return nothing == 0


# ---- the network -------------------------------------------------------------------------------------------


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
        self._layers = [_layer_of(stage) for stage in stages]
        self._end = end
        self._places = _places(stages)
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
        window = len(self._inner(edge)[0].reads) ** 3 * self.channels
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

    def _inner(self, edge: int) -> list[Axis]:
        start = 64 * edge  # on every grid's cells
        return _cells([layer.stage for layer in self._layers], None, start, start + edge)

    def _floats(self, edge: int) -> dict[str, int]:
        axes = self._inner(edge)
        sizes = dict.fromkeys(("values", "products", "planes", "strip"), 0)
        for layer, axis in zip(self._layers, axes, strict=True):
            length, rows = axis.stop - axis.start, _rows_together(layer, axis.cells)
            sizes["values"] = max(sizes["values"], 36 * rows * layer.inputs)
            sizes["products"] = max(sizes["products"], 36 * rows * layer.outputs)
            sizes["planes"] = max(sizes["planes"], 96 * rows * layer.outputs)
            sizes["strip"] = max(sizes["strip"], 6 * len(axis.reads) * layer.inputs)
            if layer is not self._layers[-1]:
                place, planes = self._places[layer.stage.name], _RING if layer is self._layers[-2] else length
                sizes[place] = max(sizes.get(place, 0), planes * length**2 * layer.outputs)
        length = axes[-1].stop - axes[-1].start
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
        _convolve(
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
                finite = _label(
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


def _places(stages: Sequence[Stage]) -> dict[str, str]:
    """Choose the array that holds each stage's map: one whose map no later stage reads, or else one more."""
    found: dict[str, str] = {}
    for number, stage in enumerate(stages):
        read = {stages[number - 1].name} if number else set[str]()
        for later in stages[number:]:
            read |= {stages[i].name for i in (later.add_before, later.add_after) if i is not None}
        taken = {found[name] for name in read if name in found}
        found[stage.name] = next(place for place in map("map {}".format, range(len(stages))) if place not in taken)
    return found


def _cells(stages: Sequence[Stage], length: int | None, start: int, stop: int) -> list[Axis]:
    """Return every stage's cells along an axis of `length` low-res voxels, for high-res voxels [start, stop)."""
    lengths = [length]
    for stage in stages:
        lengths.append(None if lengths[-1] is None else floor(lengths[-1] * stage.scale))
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
    stages = folded.stages[:-1]
    p, q = folded.scale.numerator, folded.scale.denominator
    reach = 0
    for start in range(0, 4 * q, q):  # cells lie alike every four low-res voxels, weights every q
        reads = _cells(stages, None, start * p // q, start * p // q + 1)[0].reads
        reach = max(reach, start - reads.start, reads.stop - start)
    return reach


def _layer_of(stage: Stage) -> _Layer:
    inputs, outputs = stage.inputs, stage.outputs
    if stage.kind == "transposed":
        change, weight = _G4, stage.weight.transpose(2, 3, 4, 0, 1)
    else:
        change, weight = _G3, stage.weight.transpose(2, 3, 4, 1, 0)
    shape = (6, 6, 6, _filled(inputs), _filled(outputs))
    filled = _aligned(prod(shape))
    for first in range(0, inputs, 32):  # in parts, because these are doubles
        some = weight[..., first : first + 32, :]
        for _ in range(3):  # each turn transforms the first axis and moves it behind the other two
            some = np.moveaxis(_product(change, some), 0, 2)
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
