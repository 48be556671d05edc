"""Bits of 64-bit words, and one bit of each of 64 bytes as a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types

from hpcres.simd.registers import address_of, intrinsic


def _word(number: Any) -> Any:
    """Return the type of a word: uint64 stays, all other integers become int64."""
    return types.uint64 if number == types.uint64 else types.int64


@intrinsic
def popcount(typing: Any, number: Any) -> Any:
    """Count the set bits of a word."""
    word = _word(number)
    return word(word), lambda context, builder, signature, arguments: builder.ctpop(arguments[0])


@intrinsic
def trailing_zeros(typing: Any, number: Any) -> Any:
    """Return the place of the lowest set bit of a word, 64 if there is none."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    word = _word(number)
    return word(word), generate


def _of_64_bytes(test: Callable[[Any, Any], Any]) -> Any:
    """Make an intrinsic of `row` and `first` that gives one bit for each of the 64 bytes from `first` on.

    The lowest bit is that of the first byte.
    """

    def instructions(typing: Any, row: Any, first: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            # One or two instructions where vectors are wide; no loop of ours comes near.
            vector = ir.VectorType(ir.IntType(8), 64)
            address = address_of(context, builder, signature.args[0], arguments[0], arguments[1])
            voxels = builder.load(builder.bitcast(address, vector.as_pointer()), align=1)
            return builder.bitcast(test(builder, voxels), ir.IntType(64))

        return types.uint64(row, types.int64), generate

    return intrinsic(instructions)


def _constant(voxels: Any, value: int) -> Any:
    return ir.Constant(voxels.type, [value] * 64)


_BITS = ir.VectorType(ir.IntType(1), 64)
low_bits = _of_64_bytes(lambda builder, v: builder.trunc(v, _BITS))
second_bits = _of_64_bytes(lambda builder, v: builder.trunc(builder.lshr(v, _constant(v, 1)), _BITS))
third_bits = _of_64_bytes(lambda builder, v: builder.trunc(builder.lshr(v, _constant(v, 2)), _BITS))
fourth_bits = _of_64_bytes(lambda builder, v: builder.trunc(builder.lshr(v, _constant(v, 3)), _BITS))
above_three = _of_64_bytes(lambda builder, v: builder.icmp_unsigned(">", v, _constant(v, 3)))
