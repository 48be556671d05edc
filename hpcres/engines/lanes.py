"""Vectors of 8 or 16 floats for numba kernels, in registers, with explicit fused multiply-adds.

The type of a kernel's argument `lanes` selects the width: an int8 stands for 8 floats, an int16 for 16. WIDEST selects
the registers of the CPU that numba compiles for. Every operation is an IEEE one in the order it is written, so a value
does not depend on the width, the compiler or the neighbours it is computed with. Arrays are flat float32; indices
are in floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic as _intrinsic
from numba.extending import models, register_model

from hpcres.compiled import register_floats

WIDEST: Any = np.int16(0) if register_floats() == 16 else np.int8(0)
NARROW: Any = np.int8(0)


intrinsic: Any = _intrinsic  # what it makes is called without the typing context


class Lanes(types.Type):
    """Numba type of a register of `width` floats."""

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__(name=f"Lanes({width})")

    @property
    def llvm(self) -> ir.VectorType:
        """LLVM type of the register."""
        return ir.VectorType(ir.FloatType(), self.width)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: Lanes) -> None:
        super().__init__(manager, type_, type_.llvm)


def width_of(lanes: Any) -> int:
    """Return the floats per register for a value of `lanes`."""
    return 8 * lanes.dtype.itemsize


@intrinsic
def floats(typing: Any, lanes: Any) -> Any:
    """Return the floats per register, inside a kernel."""
    return types.intp(lanes), lambda context, builder, signature, _: context.get_constant(types.intp, lanes.bitwidth)


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _load(builder: Any, type_: Lanes, address: Any) -> Any:
    return builder.load(builder.bitcast(address, type_.llvm.as_pointer()), align=4)


def _store(builder: Any, type_: Lanes, value: Any, address: Any) -> None:
    builder.store(value, builder.bitcast(address, type_.llvm.as_pointer()), align=4)


def _splat(builder: Any, type_: Lanes, number: Any) -> Any:
    nothing = ir.Constant(type_.llvm, ir.Undefined)
    first = builder.insert_element(nothing, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(
        first, nothing, ir.Constant(ir.VectorType(ir.IntType(32), type_.width), [0] * type_.width)
    )


def _fma(builder: Any, type_: Lanes, a: Any, b: Any, c: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(type_.llvm, [type_.llvm] * 3), f"llvm.fma.v{type_.width}f32"
    )
    return builder.call(function, [a, b, c])


def _constant(type_: Lanes, number: float) -> Any:
    return ir.Constant(type_.llvm, [float(np.float32(number))] * type_.width)


@intrinsic
def load(typing: Any, array: Any, index: Any, lanes: Any) -> Any:
    """Load the floats at array[index …] into a register."""
    out = Lanes(lanes.bitwidth)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _load(builder, out, _address(context, builder, signature.args[0], arguments[0], arguments[1]))

    return out(array, types.intp, lanes), generate


@intrinsic
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Store a register: array[index …] = value."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], arguments[0], arguments[1])
        _store(builder, value, arguments[2], address)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


@intrinsic
def splat(typing: Any, array: Any, index: Any, lanes: Any) -> Any:
    """Load array[index] into every lane of a register."""
    out = Lanes(lanes.bitwidth)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], arguments[0], arguments[1])
        return _splat(builder, out, builder.load(address))

    return out(array, types.intp, lanes), generate


@intrinsic
def zero(typing: Any, lanes: Any) -> Any:
    """Return a register of zeros."""
    out = Lanes(lanes.bitwidth)
    return out(lanes), lambda context, builder, signature, arguments: _constant(out, 0.0)


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """Compute a · b + c, rounded once."""
    return a(a, a, a), lambda context, builder, signature, arguments: _fma(builder, a, *arguments)


@intrinsic
def add(typing: Any, a: Any, b: Any) -> Any:
    """Compute a + b."""
    return a(a, a), lambda context, builder, signature, arguments: builder.fadd(*arguments)


@intrinsic
def multiply(typing: Any, a: Any, b: Any) -> Any:
    """Compute a · b."""
    return a(a, a), lambda context, builder, signature, arguments: builder.fmul(*arguments)


@intrinsic
def rectified(typing: Any, a: Any) -> Any:
    """Compute max(a, 0); NaN stays NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        nothing = _constant(a, 0.0)
        return builder.select(builder.fcmp_ordered("<", arguments[0], nothing), nothing, arguments[0])

    return a(a), generate


@intrinsic
def total(typing: Any, a: Any) -> Any:
    """Sum the lanes by adding the upper half to the lower half until one is left."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, width = arguments[0], a.width
        while width > 1:
            half = width // 2
            nothing = ir.Constant(value.type, ir.Undefined)
            parts = [
                builder.shuffle_vector(
                    value, nothing, ir.Constant(ir.VectorType(ir.IntType(32), half), list(range(at, at + half)))
                )
                for at in (0, half)
            ]
            value, width = builder.fadd(*parts), half
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return types.float32(a), generate


def combination(inputs: int, outputs: int) -> Any:
    """Make an intrinsic that sums `inputs` vectors with coefficients from a table, `outputs` times.

    The intrinsic computes target[t + i·step …] = Σ_j table[k + i·inputs + j] · source[s + offsets[o + j] …].

    Parameters
    ----------
    inputs
        Number of vectors in each sum.
    outputs
        Number of sums.

    Returns
    -------
    intrinsic
        Called as (target, t, step, source, s, offsets, o, table, k, lanes).
    """

    @intrinsic
    def combine(
        typing: Any,
        target: Any,
        t: Any,
        step: Any,
        source: Any,
        s: Any,
        offsets: Any,
        o: Any,
        table: Any,
        k: Any,
        lanes: Any,
    ) -> Any:
        vector = Lanes(lanes.bitwidth)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            into, t, step, source, s, offsets, o, table, k, _ = arguments
            kinds = signature.args
            values = []
            for j in range(inputs):
                place = builder.load(_address(context, builder, kinds[5], offsets, _plus(builder, o, j)))
                at = _address(context, builder, kinds[3], source, builder.add(s, place))
                values.append(_load(builder, vector, at))
            for i in range(outputs):
                sum_: Any = None
                for j, value in enumerate(values):
                    at = _address(context, builder, kinds[7], table, _plus(builder, k, i * inputs + j))
                    factor = _splat(builder, vector, builder.load(at))
                    sum_ = builder.fmul(factor, value) if sum_ is None else _fma(builder, vector, factor, value, sum_)
                _store(builder, vector, sum_, _address(context, builder, kinds[0], into, t))
                t = builder.add(t, step)
            return context.get_dummy_value()

        i = types.intp
        return types.void(target, i, i, source, i, offsets, i, table, i, lanes), generate

    return combine


def fixed_combination(matrix: Sequence[Sequence[float]], pairs: Sequence[tuple[int, int]] = ()) -> Any:
    """Make an intrinsic that multiplies vectors by a constant matrix.

    The intrinsic computes target[t + i·step …] = Σ_j matrix[i][j] · source[s + j·stride …].

    Parameters
    ----------
    matrix
        Rows of the matrix.
    pairs
        Columns (p, q) that enter every row as their sum or their difference alone; the sum and the difference are
        formed once.

    Returns
    -------
    intrinsic
        Called as (target, t, step, source, s, stride, lanes).
    """

    @intrinsic
    def combine(typing: Any, target: Any, t: Any, step: Any, source: Any, s: Any, stride: Any, lanes: Any) -> Any:
        vector = Lanes(lanes.bitwidth)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            into, t, step, source, s, stride, _ = arguments
            values = []
            for _j in range(len(matrix[0])):
                values.append(_load(builder, vector, _address(context, builder, signature.args[3], source, s)))
                s = builder.add(s, stride)
            sums = {p: (q, builder.fadd(values[p], values[q]), builder.fsub(values[p], values[q])) for p, q in pairs}
            second = {q for q, _, _ in sums.values()}
            for row in matrix:
                sum_: Any = None
                for j, factor in enumerate(row):
                    if j in second or factor == 0:
                        continue
                    value = values[j]
                    if j in sums:
                        q, plus, minus = sums[j]
                        assert abs(row[q]) == abs(factor), "the columns of a pair differ in more than sign"
                        value = plus if row[q] == factor else minus
                    if sum_ is None:
                        sum_ = value if factor == 1 else builder.fmul(_constant(vector, factor), value)
                    elif factor == 1:
                        sum_ = builder.fadd(sum_, value)
                    else:
                        sum_ = _fma(builder, vector, _constant(vector, factor), value, sum_)
                _store(builder, vector, sum_, _address(context, builder, signature.args[0], into, t))
                t = builder.add(t, step)
            return context.get_dummy_value()

        i = types.intp
        return types.void(target, i, i, source, i, i, lanes), generate

    return combine


def panel(rows: int, vectors: int) -> Any:
    """Make an intrinsic that multiplies `rows` rows of one matrix with `vectors` registers' columns of another.

    The intrinsic computes products[m + r·outputs + …] = Σ_i values[v + r·inputs + i] · weights[w + i·outputs + …], with
    i = 0 … inputs − 1 in this order; inputs is a multiple of 4. The sums stay in registers.

    Parameters
    ----------
    rows
        Rows of `values`.
    vectors
        Registers of columns of `weights`.

    Returns
    -------
    intrinsic
        Called as (values, v, weights, w, products, m, inputs, outputs, lanes).
    """
    unrolled = 4

    @intrinsic
    def multiply(
        typing: Any,
        values: Any,
        v: Any,
        weights: Any,
        w: Any,
        products: Any,
        m: Any,
        inputs: Any,
        outputs: Any,
        lanes: Any,
    ) -> Any:
        vector = Lanes(lanes.bitwidth)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            values, v, weights, w, products, m, inputs, outputs, _ = arguments
            kinds = signature.args
            row_starts = [_address(context, builder, kinds[0], values, v)]
            for _r in range(rows - 1):
                row_starts.append(builder.gep(row_starts[-1], [inputs]))
            column = _address(context, builder, kinds[2], weights, w)
            sums = [
                [cgutils.alloca_once_value(builder, _constant(vector, 0.0)) for _ in range(vectors)]
                for _ in range(rows)
            ]
            place = cgutils.alloca_once_value(builder, column)
            steps = builder.udiv(inputs, ir.Constant(inputs.type, unrolled))
            with cgutils.for_range(builder, steps) as loop:
                first = builder.mul(loop.index, ir.Constant(inputs.type, unrolled))
                for more in range(unrolled):
                    at = builder.load(place)
                    taken = [
                        _load(builder, vector, builder.gep(at, [ir.Constant(inputs.type, k * vector.width)]))
                        for k in range(vectors)
                    ]
                    for start, row in zip(row_starts, sums, strict=True):
                        factor = builder.load(builder.gep(start, [_plus(builder, first, more)]))
                        factor = _splat(builder, vector, factor)
                        for one, sum_ in zip(taken, row, strict=True):
                            builder.store(_fma(builder, vector, factor, one, builder.load(sum_)), sum_)
                    builder.store(builder.gep(at, [outputs]), place)
            for row in sums:
                for k, sum_ in enumerate(row):
                    at = _plus(builder, m, k * vector.width)
                    _store(builder, vector, builder.load(sum_), _address(context, builder, kinds[4], products, at))
                m = builder.add(m, outputs)
            return context.get_dummy_value()

        i = types.intp
        return types.void(values, i, weights, i, products, i, i, i, lanes), generate

    return multiply


def _plus(builder: Any, number: Any, more: int) -> Any:
    return builder.add(number, ir.Constant(number.type, more))
