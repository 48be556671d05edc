"""Registers of 16 numbers with masks of lanes, filled from and emptied into arrays that leave out some voxels.

A mask is an integer whose bit i stands for lane i.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from hpcres.compiled import register_floats
from hpcres.simd.registers import SIXTEEN, Register, address_of, build_call, constant, intrinsic, width_of

_LANES = width_of(SIXTEEN)
_HALF = _LANES // 2
_BITS = ir.VectorType(ir.IntType(1), _LANES)
_COMPRESSES = register_floats() == _LANES


def _register(array: Any) -> Register:
    return Register(_LANES, array.dtype)


def _mask(builder: Any, number: Any) -> Any:
    return builder.bitcast(builder.trunc(number, ir.IntType(_LANES)), _BITS)


def _few(builder: Any, number: Any) -> Any:
    """Build the mask of the `number` lowest lanes."""
    one = ir.Constant(ir.IntType(64), 1)
    return _mask(builder, builder.sub(builder.shl(one, number), one))


def _half_of(builder: Any, value: Any, upper: int) -> Any:
    places = ir.Constant(ir.VectorType(ir.IntType(32), _HALF), [upper * _HALF + i for i in range(_HALF)])
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), places)


def _both(builder: Any, low: Any, high: Any) -> Any:
    places = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), list(range(_LANES)))
    return builder.shuffle_vector(low, high, places)


def _lanes_of_first_half(builder: Any, mask: Any) -> Any:
    few = builder.and_(mask, ir.Constant(ir.IntType(64), (1 << _HALF) - 1))
    return build_call(builder, "llvm.ctpop.i64", ir.IntType(64), [few])


def _of_memory(what: str, kind: Register, place: Any) -> str:
    """Return the name of the masked load or store of a register at a pointer."""
    pointer = "p0" if getattr(place.type, "is_opaque", False) else f"p0{kind.suffix}"
    return f"llvm.masked.{what}.{kind.suffix}.{pointer}"


@intrinsic
def spread(typing: Any, array: Any, index: Any, mask: Any) -> Any:
    """Load array[index], array[index + 1], … into the lanes of the mask, 0 into the others."""
    out = _register(array)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, mask = address_of(context, builder, signature.args[0], *arguments[:2]), _mask(builder, arguments[2])
        if out.bytes == 4:
            given = [address, mask, constant(out, 0.0)]
            return build_call(builder, f"llvm.masked.expandload.{out.suffix}", out.llvm, given)
        # No machine has registers of 16 doubles: two of 8, the second from where the first ends.
        half = Register(_HALF, out.element)
        halves = []
        for upper in (0, 1):
            given = [address, _half_of(builder, mask, upper), constant(half, 0.0)]
            halves.append(build_call(builder, f"llvm.masked.expandload.{half.suffix}", half.llvm, given))
            address = builder.gep(address, [_lanes_of_first_half(builder, arguments[2])])
        return _both(builder, *halves)

    return out(array, types.intp, types.int64), generate


@intrinsic
def gathered(typing: Any, value: Any, mask: Any) -> Any:
    """Move the lanes of the mask side by side into the lowest lanes, 0 into the others."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits, nothing = _mask(builder, arguments[1]), constant(value, 0.0)
        if value.bytes == 8:
            half_type = Register(_HALF, value.element)
            place = cgutils.alloca_once(builder, value.llvm)
            builder.store(nothing, place)
            address = builder.bitcast(place, ir.DoubleType().as_pointer())
            for upper in (0, 1):
                half, few = (_half_of(builder, v, upper) for v in (arguments[0], bits))
                name = f"llvm.masked.compressstore.{half_type.suffix}"
                build_call(builder, name, ir.VoidType(), [half, address, few])
                address = builder.gep(address, [_lanes_of_first_half(builder, arguments[1])])
            return builder.load(place)
        if _COMPRESSES:
            given = [arguments[0], nothing, bits]
            return build_call(builder, f"llvm.x86.avx512.mask.compress.{value.suffix}", value.llvm, given)
        place = cgutils.alloca_once_value(builder, nothing)
        first = builder.bitcast(place, ir.FloatType().as_pointer())
        name = f"llvm.masked.compressstore.{value.suffix}"
        build_call(builder, name, ir.VoidType(), [arguments[0], first, bits])
        return builder.load(place)

    return value(value, types.int64), generate


@intrinsic
def load_few(typing: Any, array: Any, index: Any, number: Any) -> Any:
    """Load the `number` numbers at array[index …] into the lowest lanes, 0 into the others; touch nothing beyond."""
    out = _register(array)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = address_of(context, builder, signature.args[0], *arguments[:2])
        place = builder.bitcast(address, out.llvm.as_pointer())
        given = [place, ir.Constant(ir.IntType(32), out.bytes), _few(builder, arguments[2]), constant(out, 0.0)]
        return build_call(builder, _of_memory("load", out, place), out.llvm, given)

    return out(array, types.intp, types.int64), generate


@intrinsic
def store_few(typing: Any, array: Any, index: Any, value: Any, number: Any) -> Any:
    """Set array[index …] to the `number` lowest lanes; touch nothing beyond."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = address_of(context, builder, signature.args[0], *arguments[:2])
        place = builder.bitcast(address, value.llvm.as_pointer())
        given = [arguments[2], place, ir.Constant(ir.IntType(32), value.bytes), _few(builder, arguments[3])]
        build_call(builder, _of_memory("store", value, place), ir.VoidType(), given)
        return context.get_dummy_value()

    return types.void(array, types.intp, value, types.int64), generate


@intrinsic
def keep(typing: Any, value: Any, mask: Any) -> Any:
    """Keep the lanes of the mask; set the others to 0."""
    return value(value, types.int64), lambda context, builder, signature, arguments: builder.select(
        _mask(builder, arguments[1]), arguments[0], constant(value, 0.0)
    )


@intrinsic
def inverse(typing: Any, value: Any, mask: Any) -> Any:
    """Compute 1 / value in the lanes of the mask; set the others to 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits, one = _mask(builder, arguments[1]), constant(value, 1.0)
        safe = builder.select(bits, arguments[0], one)
        return builder.select(bits, builder.fdiv(one, safe), constant(value, 0.0))

    return value(value, types.int64), generate
