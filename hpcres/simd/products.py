"""Products of vectors in registers with small matrices, from tables, constant, or from memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from hpcres.simd.registers import (
    Register,
    address_of,
    build_fma,
    build_load,
    build_splat,
    build_store,
    constant,
    intrinsic,
)


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
        vector = Register.of(lanes)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            into, t, step, source, s, offsets, o, table, k, _ = arguments
            kinds = signature.args
            values = []
            for j in range(inputs):
                place = builder.load(address_of(context, builder, kinds[5], offsets, _plus(builder, o, j)))
                at = address_of(context, builder, kinds[3], source, builder.add(s, place))
                values.append(build_load(builder, vector, at))
            for i in range(outputs):
                sum_: Any = None
                for j, value in enumerate(values):
                    at = address_of(context, builder, kinds[7], table, _plus(builder, k, i * inputs + j))
                    factor = build_splat(builder, vector, builder.load(at))
                    sum_ = (
                        builder.fmul(factor, value) if sum_ is None else build_fma(builder, vector, factor, value, sum_)
                    )
                build_store(builder, vector, sum_, address_of(context, builder, kinds[0], into, t))
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
        vector = Register.of(lanes)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            into, t, step, source, s, stride, _ = arguments
            values = []
            for _j in range(len(matrix[0])):
                values.append(build_load(builder, vector, address_of(context, builder, signature.args[3], source, s)))
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
                        sum_ = value if factor == 1 else builder.fmul(constant(vector, factor), value)
                    elif factor == 1:
                        sum_ = builder.fadd(sum_, value)
                    else:
                        sum_ = build_fma(builder, vector, constant(vector, factor), value, sum_)
                build_store(builder, vector, sum_, address_of(context, builder, signature.args[0], into, t))
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
        vector = Register.of(lanes)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            values, v, weights, w, products, m, inputs, outputs, _ = arguments
            kinds = signature.args
            row_starts = [address_of(context, builder, kinds[0], values, v)]
            for _r in range(rows - 1):
                row_starts.append(builder.gep(row_starts[-1], [inputs]))
            column = address_of(context, builder, kinds[2], weights, w)
            sums = [
                [cgutils.alloca_once_value(builder, constant(vector, 0.0)) for _ in range(vectors)] for _ in range(rows)
            ]
            place = cgutils.alloca_once_value(builder, column)
            steps = builder.udiv(inputs, ir.Constant(inputs.type, unrolled))
            with cgutils.for_range(builder, steps) as loop:
                first = builder.mul(loop.index, ir.Constant(inputs.type, unrolled))
                for more in range(unrolled):
                    at = builder.load(place)
                    taken = [
                        build_load(builder, vector, builder.gep(at, [ir.Constant(inputs.type, k * vector.width)]))
                        for k in range(vectors)
                    ]
                    for start, row in zip(row_starts, sums, strict=True):
                        factor = builder.load(builder.gep(start, [_plus(builder, first, more)]))
                        factor = build_splat(builder, vector, factor)
                        for one, sum_ in zip(taken, row, strict=True):
                            builder.store(build_fma(builder, vector, factor, one, builder.load(sum_)), sum_)
                    builder.store(builder.gep(at, [outputs]), place)
            for row in sums:
                for k, sum_ in enumerate(row):
                    at = _plus(builder, m, k * vector.width)
                    build_store(
                        builder, vector, builder.load(sum_), address_of(context, builder, kinds[4], products, at)
                    )
                m = builder.add(m, outputs)
            return context.get_dummy_value()

        i = types.intp
        return types.void(values, i, weights, i, products, i, i, i, lanes), generate

    return multiply


def _plus(builder: Any, number: Any, more: int) -> Any:
    return builder.add(number, ir.Constant(number.type, more))
