"""Vector registers for numba kernels: loads, stores, arithmetic, masks and products of matrices.

Every operation is an IEEE one in the order it is written, so a value does not depend on the compiler or on the
neighbours it is computed with. Arrays are flat; indices are in elements.
"""
