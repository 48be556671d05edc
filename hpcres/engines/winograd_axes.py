"""One axis of a layer in Winograd's form: its cells, their windows of inputs, and the transform of its inputs.

Along an axis, four outputs of a layer are A·((G w) ∘ (B x)): six products. `B` includes the trilinear upsampling where
the layer has one. A transposed convolution of stride 2 is, per parity of its output, a convolution with two taps, with
three products for two outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import floor, prod

import numpy as np

# F(4, 3): interpolation at 0, ±1/√2, ±√2 and ∞, which keep the rounding error of fp32 near that of a plain sum.
_POINTS = (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))
A3 = [[p**i for p in _POINTS] + [float(i == 3)] for i in range(4)]
G3 = np.array(
    [[p**k / prod(p - other for other in _POINTS if other != p) for k in range(3)] for p in _POINTS] + [[0, 0, 1]]
)
# Row p: coefficients of x (x² − 1/2) (x² − 2) / (x − p), lowest power first; the last row: of the whole product.
_B3 = np.array(
    [[1, 0, -2.5, 0, 1, 0]]
    + [[0, -p * other, -other, p, 1, 0] for p, other in zip(_POINTS[1:], (2, 2, 0.5, 0.5), strict=True)]
    + [[0, 1, 0, -2.5, 0, 1]]
)
# F(2, 2) for the even outputs (first three products) and for the odd ones: taps 3, 1 and 2, 0 of four.
A4 = [[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]]
G4 = np.array([[0, 0, 0, 1], [0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0], [1, 0, 0, 0]], float)
_B4 = np.array(
    [[1, -1, 0, 0], [0, 1, 0, 0], [0, -1, 1, 0], [0, 1, -1, 0], [0, 0, 1, 0], [0, 0, -1, 1]], float
)  # of inputs i - 1 … i + 2 for outputs 2 i … 2 i + 3
TAP_COUNTS = (4, 6, 7)


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
        rows.append((low, product(_B4 if kind == "transposed" else _B3, weights)))
    width = next(n for n in TAP_COUNTS if n >= max(table.shape[1] for _, table in rows))
    reads = range(min(low for low, _ in rows), max(low + table.shape[1] for low, table in rows))
    taps = np.array([[min(low + j, reads.stop - 1) for j in range(width)] for low, _ in rows]) - reads.start
    tables = np.zeros((len(rows), 6, width), np.float32)
    for number, (_, table) in enumerate(rows):
        tables[number, :, : table.shape[1]] = table
    begin, finish = 4 * first, 4 * last
    return Axis(begin, finish if end is None else min(finish, end), reads, taps.astype(np.int64), tables)


def product(matrix: np.ndarray, some: np.ndarray) -> np.ndarray:
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
