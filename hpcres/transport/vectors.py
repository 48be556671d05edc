"""Registers of 16 numbers for numba kernels, filled from and emptied into arrays that leave out insulating voxels.

A lane mask is an integer whose bit i stands for lane i. Machines with shorter registers split them; values are the
same. Arrays are flat, float32 or float64, and so are the registers filled from them; indices are in elements.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic as _intrinsic
from numba.extending import models, register_model

from hpcres.compiled import compiled as compiled_in_general
from hpcres.compiled import register_floats

compiled: Any = partial(compiled_in_general, error_model="numpy")
inlined: Any = partial(compiled, forceinline=True)
LANES = 16
_COMPRESSES = register_floats() == LANES

intrinsic: Any = _intrinsic  # what it makes is called without the typing context
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_DOUBLES = ir.VectorType(ir.DoubleType(), LANES)
_BITS = ir.VectorType(ir.IntType(1), LANES)
_HALF = LANES // 2


class Floats(types.Type):
    """A register of 16 floats."""

    def __init__(self) -> None:
        super().__init__(name="Floats16")


class Doubles(types.Type):
    """A register of 16 numbers in float64, or of running sums."""

    def __init__(self) -> None:
        super().__init__(name="Doubles16")


FLOATS, DOUBLES = Floats(), Doubles()


@register_model(Floats)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: Floats) -> None:
        super().__init__(manager, type_, _FLOATS)


@register_model(Doubles)
class _DoublesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: Doubles) -> None:
        super().__init__(manager, type_, _DOUBLES)


def _mask(builder: Any, number: Any) -> Any:
    return builder.bitcast(builder.trunc(number, ir.IntType(LANES)), _BITS)


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _all(kind: Any, number: float) -> Any:
    return ir.Constant(kind, [number] * LANES)


def _register(number: Any) -> Any:
    """Return the type of register for numbers, or for an array of them."""
    kind = getattr(number, "dtype", number)
    return DOUBLES if kind == types.float64 else FLOATS


def _wide(value: Any) -> bool:
    """Tell whether a register is of float64."""
    return bool(value.type == _DOUBLES)


def _half_of(builder: Any, value: Any, upper: int) -> Any:
    places = ir.Constant(ir.VectorType(ir.IntType(32), _HALF), [upper * _HALF + i for i in range(_HALF)])
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), places)


def _both(builder: Any, low: Any, high: Any) -> Any:
    places = ir.Constant(ir.VectorType(ir.IntType(32), LANES), list(range(LANES)))
    return builder.shuffle_vector(low, high, places)


@intrinsic
def popcount(typing: Any, number: Any) -> Any:
    """Count the set bits of an int64."""
    return types.int64(types.int64), lambda context, builder, signature, arguments: _call(
        builder, "llvm.ctpop.i64", ir.IntType(64), [arguments[0]]
    )


@intrinsic
def lowest(typing: Any, number: Any) -> Any:
    """Return the place of the lowest set bit of an int64 that is not 0."""
    return types.int64(types.int64), lambda context, builder, signature, arguments: _call(
        builder, "llvm.cttz.i64", ir.IntType(64), [arguments[0], ir.Constant(ir.IntType(1), 1)]
    )


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """Load the numbers at array[index …]."""
    result = _register(array)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], *arguments)
        kind = context.get_value_type(result)
        return builder.load(builder.bitcast(address, kind.as_pointer()), align=8 if kind == _DOUBLES else 4)

    return result(array, types.intp), generate


@intrinsic
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Set array[index …] = value."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], *arguments[:2])
        kind = arguments[2].type
        builder.store(arguments[2], builder.bitcast(address, kind.as_pointer()), align=8 if kind == _DOUBLES else 4)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


@intrinsic
def spread(typing: Any, array: Any, index: Any, mask: Any) -> Any:
    """Load array[index], array[index + 1], … into the lanes of the mask, 0 into the others."""
    result = _register(array)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, mask = _address(context, builder, signature.args[0], *arguments[:2]), _mask(builder, arguments[2])
        if result is FLOATS:
            return _call(builder, "llvm.masked.expandload.v16f32", _FLOATS, [address, mask, _all(_FLOATS, 0.0)])
        # No machine has registers of 16 doubles: two of 8, the second from where the first ends.
        kind = ir.VectorType(ir.DoubleType(), _HALF)
        halves = []
        for upper in (0, 1):
            few = _half_of(builder, mask, upper)
            halves.append(
                _call(builder, "llvm.masked.expandload.v8f64", kind, [address, few, ir.Constant(kind, [0.0] * _HALF)])
            )
            address = builder.gep(address, [_lanes_of_first_half(builder, arguments[2])])
        return _both(builder, *halves)

    return result(array, types.intp, types.int64), generate


def _lanes_of_first_half(builder: Any, mask: Any) -> Any:
    few = builder.and_(mask, ir.Constant(ir.IntType(64), (1 << _HALF) - 1))
    return _call(builder, "llvm.ctpop.i64", ir.IntType(64), [few])


@intrinsic
def gathered(typing: Any, value: Any, mask: Any) -> Any:
    """Move the lanes of the mask side by side into the lowest lanes, 0 into the others."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = _mask(builder, arguments[1])
        if _wide(arguments[0]):
            place = cgutils.alloca_once(builder, _DOUBLES)
            builder.store(_all(_DOUBLES, 0.0), place)
            address = builder.bitcast(place, ir.DoubleType().as_pointer())
            for upper in (0, 1):
                half, few = (_half_of(builder, v, upper) for v in (arguments[0], bits))
                _call(builder, "llvm.masked.compressstore.v8f64", ir.VoidType(), [half, address, few])
                address = builder.gep(address, [_lanes_of_first_half(builder, arguments[1])])
            return builder.load(place)
        nothing = _all(_FLOATS, 0.0)
        if _COMPRESSES:
            return _call(builder, "llvm.x86.avx512.mask.compress.v16f32", _FLOATS, [arguments[0], nothing, bits])
        place = cgutils.alloca_once_value(builder, nothing)
        first = builder.bitcast(place, ir.FloatType().as_pointer())
        _call(builder, "llvm.masked.compressstore.v16f32", ir.VoidType(), [arguments[0], first, bits])
        return builder.load(place)

    return value(value, types.int64), generate


@intrinsic
def load_few(typing: Any, array: Any, index: Any, number: Any) -> Any:
    """Load the `number` numbers at array[index …] into the lowest lanes, 0 into the others; touch nothing beyond."""
    result = _register(array)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = context.get_value_type(result)
        address = _address(context, builder, signature.args[0], *arguments[:2])
        place = builder.bitcast(address, kind.as_pointer())
        few = _few(builder, arguments[2])
        align = ir.Constant(ir.IntType(32), 8 if kind == _DOUBLES else 4)
        return _call(builder, _memory("load", place), kind, [place, align, few, _all(kind, 0.0)])

    return result(array, types.intp, types.int64), generate


@intrinsic
def store_few(typing: Any, array: Any, index: Any, value: Any, number: Any) -> Any:
    """Set array[index …] to the `number` lowest lanes; touch nothing beyond."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = arguments[2].type
        address = _address(context, builder, signature.args[0], *arguments[:2])
        place = builder.bitcast(address, kind.as_pointer())
        few = _few(builder, arguments[3])
        align = ir.Constant(ir.IntType(32), 8 if kind == _DOUBLES else 4)
        _call(builder, _memory("store", place), ir.VoidType(), [arguments[2], place, align, few])
        return context.get_dummy_value()

    return types.void(array, types.intp, value, types.int64), generate


def _few(builder: Any, number: Any) -> Any:
    one = ir.Constant(ir.IntType(64), 1)
    return _mask(builder, builder.sub(builder.shl(one, number), one))


def _memory(what: str, place: Any) -> str:
    element = "f64" if place.type.pointee == _DOUBLES else "f32"
    pointer = "p0" if getattr(place.type, "is_opaque", False) else f"p0v16{element}"
    return f"llvm.masked.{what}.v16{element}.{pointer}"


@intrinsic
def splat(typing: Any, number: Any) -> Any:
    """Put a number into every lane."""
    result = _register(number)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        nothing = ir.Constant(context.get_value_type(result), ir.Undefined)
        first = builder.insert_element(nothing, arguments[0], ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))

    return result(number), generate


@intrinsic
def add(typing: Any, a: Any, b: Any) -> Any:
    """Add two registers."""
    return a(a, a), lambda context, builder, signature, arguments: builder.fadd(*arguments)


@intrinsic
def subtract(typing: Any, a: Any, b: Any) -> Any:
    """Subtract register b from register a."""
    return a(a, a), lambda context, builder, signature, arguments: builder.fsub(*arguments)


@intrinsic
def multiply(typing: Any, a: Any, b: Any) -> Any:
    """Multiply two registers."""
    return a(a, a), lambda context, builder, signature, arguments: builder.fmul(*arguments)


@intrinsic
def divide(typing: Any, a: Any, b: Any) -> Any:
    """Divide register a by register b."""
    return a(a, a), lambda context, builder, signature, arguments: builder.fdiv(*arguments)


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """Compute a · b + c, rounded once."""
    return a(a, a, a), lambda context, builder, signature, arguments: _call(
        builder, f"llvm.fma.v16f{64 if _wide(arguments[0]) else 32}", arguments[0].type, list(arguments)
    )


@intrinsic
def keep(typing: Any, value: Any, mask: Any) -> Any:
    """Keep the lanes of the mask; set the others to 0."""
    return value(value, types.int64), lambda context, builder, signature, arguments: builder.select(
        _mask(builder, arguments[1]), arguments[0], _all(arguments[0].type, 0.0)
    )


@intrinsic
def inverse(typing: Any, value: Any, mask: Any) -> Any:
    """Compute 1 / value in the lanes of the mask; set the others to 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = arguments[0].type
        bits, one = _mask(builder, arguments[1]), _all(kind, 1.0)
        safe = builder.select(bits, arguments[0], one)
        return builder.select(bits, builder.fdiv(one, safe), _all(kind, 0.0))

    return value(value, types.int64), generate


@intrinsic
def no_sum(typing: Any) -> Any:
    """Return sums of nothing: 0 in every lane."""
    return DOUBLES(), lambda context, builder, signature, arguments: ir.Constant(_DOUBLES, [0.0] * LANES)


@intrinsic
def add_product(typing: Any, sums: Any, a: Any, b: Any) -> Any:
    """Add the product of two numbers to each lane's float64 sum; of two floats it is exact in float64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = [v if _wide(v) else builder.fpext(v, _DOUBLES) for v in arguments[1:]]
        return _call(builder, "llvm.fma.v16f64", _DOUBLES, [*wide, arguments[0]])

    return sums(sums, a, a), generate


@intrinsic
def total(typing: Any, sums: Any) -> Any:
    """Add all lanes together, halves onto each other."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, width = arguments[0], LANES
        while width > 1:
            width //= 2
            places = ir.VectorType(ir.IntType(32), width)
            nothing = ir.Constant(value.type, ir.Undefined)
            halves = [
                builder.shuffle_vector(value, nothing, ir.Constant(places, list(range(at, at + width))))
                for at in (0, width)
            ]
            value = builder.fadd(*halves)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return types.float64(sums), generate
