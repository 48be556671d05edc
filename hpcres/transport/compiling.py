"""How the kernels of transport are compiled: a division by zero gives infinity or NaN, as in IEEE arithmetic."""

from __future__ import annotations

from functools import partial
from typing import Any

from hpcres.compiled import compiled as compiled_in_general

compiled: Any = partial(compiled_in_general, error_model="numpy")
inlined: Any = partial(compiled, forceinline=True)
