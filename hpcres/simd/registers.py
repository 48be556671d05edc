"""Registers of 8 or 16 numbers, float32 or float64: loads, stores and arithmetic.

The type of a kernel's argument `lanes` selects the width: an int8 stands for 8 numbers, an int16 for 16. WIDEST selects
the registers of float32 of the CPU that numba compiles for. A CPU with shorter registers splits them; values are the
same. The element type of a register is that of the array or the number it is filled from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic as _intrinsic
from numba.extending import models, register_model

from hpcres.compiled import register_floats

SIXTEEN: Any = np.int16(0)
EIGHT: Any = np.int8(0)
WIDEST: Any = SIXTEEN if register_floats() == 16 else EIGHT

intrinsic: Any = _intrinsic  # what it makes is called without the typing context


class Register(types.Type):
    """Numba type of a register of `width` numbers of float32 or float64."""

    def __init__(self, width: int, element: Any = types.float32) -> None:
        self.width, self.element = width, element
        super().__init__(name=f"Register({width}, {element})")

    @classmethod
    def of(cls, lanes: Any, source: Any = types.float32) -> Register:
        """Return the register that `lanes` selects, of the elements of an array type or of a number's type."""
        element = getattr(source, "dtype", source)
        return cls(lanes.bitwidth, types.float64 if element == types.float64 else types.float32)

    @property
    def bytes(self) -> int:
        """Bytes of an element."""
        return int(self.element.bitwidth) // 8

    @property
    def llvm(self) -> ir.VectorType:
        """LLVM type of the register."""
        return ir.VectorType(ir.DoubleType() if self.bytes == 8 else ir.FloatType(), self.width)

    @property
    def suffix(self) -> str:
        """The type's part of the name of an LLVM intrinsic."""
        return f"v{self.width}f{8 * self.bytes}"


@register_model(Register)
class _RegisterModel(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: Register) -> None:
        super().__init__(manager, type_, type_.llvm)


def width_of(lanes: Any) -> int:
    """Return the numbers per register for a value of `lanes`."""
    return 8 * lanes.dtype.itemsize


# ---- what intrinsics are built of --------------------------------------------------------------------------


def address_of(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Build the address of an element of an array."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def build_load(builder: Any, type_: Register, address: Any) -> Any:
    """Build the load of a register from an address of elements."""
    return builder.load(builder.bitcast(address, type_.llvm.as_pointer()), align=type_.bytes)


def build_store(builder: Any, type_: Register, value: Any, address: Any) -> None:
    """Build the store of a register to an address of elements."""
    builder.store(value, builder.bitcast(address, type_.llvm.as_pointer()), align=type_.bytes)


def build_splat(builder: Any, type_: Register, number: Any) -> Any:
    """Build a register that has a number in every lane."""
    nothing = ir.Constant(type_.llvm, ir.Undefined)
    first = builder.insert_element(nothing, number, ir.Constant(ir.IntType(32), 0))
    places = ir.Constant(ir.VectorType(ir.IntType(32), type_.width), [0] * type_.width)
    return builder.shuffle_vector(first, nothing, places)


def build_call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """Build the call of an LLVM intrinsic."""
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def build_fma(builder: Any, type_: Register, a: Any, b: Any, c: Any) -> Any:
    """Build a · b + c, rounded once."""
    return build_call(builder, f"llvm.fma.{type_.suffix}", type_.llvm, [a, b, c])


def constant(type_: Register, number: float) -> Any:
    """Return a register that has a constant in every lane."""
    rounded = float(np.float32(number)) if type_.bytes == 4 else float(number)
    return ir.Constant(type_.llvm, [rounded] * type_.width)


# ---- intrinsics --------------------------------------------------------------------------------------------


@intrinsic
def floats(typing: Any, lanes: Any) -> Any:
    """Return the numbers per register, inside a kernel."""
    return types.intp(lanes), lambda context, builder, signature, _: context.get_constant(types.intp, lanes.bitwidth)


@intrinsic
def load(typing: Any, array: Any, index: Any, lanes: Any) -> Any:
    """Load the numbers at array[index …] into a register."""
    out = Register.of(lanes, array)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return build_load(builder, out, address_of(context, builder, signature.args[0], arguments[0], arguments[1]))

    return out(array, types.intp, lanes), generate


@intrinsic
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Store a register: array[index …] = value."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = address_of(context, builder, signature.args[0], arguments[0], arguments[1])
        build_store(builder, value, arguments[2], address)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


@intrinsic
def load_splat(typing: Any, array: Any, index: Any, lanes: Any) -> Any:
    """Load array[index] into every lane of a register."""
    out = Register.of(lanes, array)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = address_of(context, builder, signature.args[0], arguments[0], arguments[1])
        return build_splat(builder, out, builder.load(address))

    return out(array, types.intp, lanes), generate


@intrinsic
def splat(typing: Any, number: Any, lanes: Any) -> Any:
    """Put a number into every lane."""
    out = Register.of(lanes, number)
    return out(number, lanes), lambda context, builder, signature, arguments: build_splat(builder, out, arguments[0])


@intrinsic
def zero(typing: Any, lanes: Any) -> Any:
    """Return a register of zeros, float32."""
    out = Register.of(lanes)
    return out(lanes), lambda context, builder, signature, arguments: constant(out, 0.0)


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """Compute a · b + c, rounded once."""
    return a(a, a, a), lambda context, builder, signature, arguments: build_fma(builder, a, *arguments)


@intrinsic
def add(typing: Any, a: Any, b: Any) -> Any:
    """Compute a + b."""
    return a(a, a), lambda context, builder, signature, arguments: builder.fadd(*arguments)


@intrinsic
def subtract(typing: Any, a: Any, b: Any) -> Any:
    """Compute a − b."""
    return a(a, a), lambda context, builder, signature, arguments: builder.fsub(*arguments)


@intrinsic
def multiply(typing: Any, a: Any, b: Any) -> Any:
    """Compute a · b."""
    return a(a, a), lambda context, builder, signature, arguments: builder.fmul(*arguments)


@intrinsic
def divide(typing: Any, a: Any, b: Any) -> Any:
    """Compute a / b."""
    return a(a, a), lambda context, builder, signature, arguments: builder.fdiv(*arguments)


@intrinsic
def rectified(typing: Any, a: Any) -> Any:
    """Compute max(a, 0); NaN stays NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        nothing = constant(a, 0.0)
        return builder.select(builder.fcmp_ordered("<", arguments[0], nothing), nothing, arguments[0])

    return a(a), generate


@intrinsic
def no_sum(typing: Any) -> Any:
    """Return 16 sums of nothing, float64."""
    out = Register(16, types.float64)
    return out(), lambda context, builder, signature, arguments: constant(out, 0.0)


@intrinsic
def add_product(typing: Any, sums: Any, a: Any, b: Any) -> Any:
    """Add the product of two numbers to each lane's float64 sum; of two of float32 it is exact in float64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        exact = a.bytes == 8
        one, other = (v if exact else builder.fpext(v, sums.llvm) for v in arguments[1:])
        return build_fma(builder, sums, one, other, arguments[0])

    return sums(sums, a, a), generate


@intrinsic
def total(typing: Any, a: Any) -> Any:
    """Sum the lanes by adding the upper half to the lower half until one is left."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, width = arguments[0], a.width
        while width > 1:
            width //= 2
            nothing, places = ir.Constant(value.type, ir.Undefined), ir.VectorType(ir.IntType(32), width)
            halves = [
                builder.shuffle_vector(value, nothing, ir.Constant(places, list(range(at, at + width))))
                for at in (0, width)
            ]
            value = builder.fadd(*halves)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return a.element(a), generate
