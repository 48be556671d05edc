"""Compilation of kernels: options of numba, a cache of machine code between runs, and the size of vector registers.

The cache (kernel_cache) lies in the first of these folders that can be written: $NUMBA_CACHE_DIR, `__pycache__` beside
the source, the user's cache folder, a private folder in the system's temporary folder. If none can be written, each
process compiles its kernels. The cache separates CPU names and features, so that machines of several kinds can share
an installation.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import llvmlite.binding
import numba


def compiled(function: Any = None, **options: Any) -> Any:
    """Decorate a function, as numba.njit does, to be compiled at its first call and to run without the GIL.

    Parameters
    ----------
    function : function, optional
        Kernel to compile. Without it, the call returns a decorator.
    **options
        Options of numba.njit.

    Returns
    -------
    dispatcher or decorator
        The compiled function, with a cache of machine code where a folder for it can be written.
    """
    if function is None:
        return lambda decorated: compiled(decorated, **options)
    dispatcher = numba.njit(nogil=True, **options)(function)
    kernel_cache = _cache_of(function)
    if kernel_cache is not None:
        dispatcher._cache = kernel_cache
    return dispatcher


def _cache_of(function: Any) -> Any:
    """Return the cache of a kernel's machine code, or None if there can be none."""
    try:
        from hpcres.kernel_cache import KernelCache

        return KernelCache(function)
    except RuntimeError:  # from numba: no folder can be written
        return None
    except (ImportError, AttributeError, TypeError):  # a release of numba whose cache has other classes
        return None


@lru_cache(maxsize=1)
def register_floats() -> int:
    """Return how many floats a vector register holds on the CPU that numba compiles for.

    NUMBA_CPU_NAME and NUMBA_CPU_FEATURES are followed. The answer is taken from the registers that LLVM uses in its
    code for a sum of 16 floats.

    Returns
    -------
    int
        16 with AVX-512, else 8, even where a register holds fewer.
    """
    config: Any = numba.config
    name, features = config.CPU_NAME, config.CPU_FEATURES
    if features is None:
        features = "" if name else llvmlite.binding.get_host_cpu_features().flatten()
    llvmlite.binding.initialize_native_target()
    llvmlite.binding.initialize_native_asmprinter()
    machine = llvmlite.binding.Target.from_default_triple().create_target_machine(
        cpu=name or llvmlite.binding.get_host_cpu_name(), features=features
    )
    vector = "<16 x float>"
    sum_ = f"define {vector} @f({vector} %a) {{ %b = fadd {vector} %a, %a\n ret {vector} %b }}"
    return 16 if "zmm" in machine.emit_assembly(llvmlite.binding.parse_assembly(sum_)) else 8
