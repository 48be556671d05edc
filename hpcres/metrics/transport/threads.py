"""Kernels that release the GIL, over units of work that do not depend on the number of threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np


class Threads:
    """Runs kernels over units; the units do not depend on the number of threads, and results come in their order."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._pool = ThreadPoolExecutor(number) if number > 1 else None
        self._own = threading.local()

    def scratch(self, floats: int) -> np.ndarray:
        if getattr(self._own, "scratch", None) is None or len(self._own.scratch) < floats:
            self._own.scratch = np.zeros(floats, np.float32)
        return self._own.scratch

    def each(self, function: Callable[[int, int], Any], number: int, step: int) -> list[Any]:
        if number <= step:
            return [function(0, number)]
        if self._pool is None:
            return [function(a, min(a + step, number)) for a in range(0, number, step)]
        begins = range(0, number, step)
        return list(self._pool.map(lambda a: function(a, min(a + step, number)), begins))

    def over(self, units: Sequence[Any], function: Callable[[Any], Any]) -> list[Any]:
        if self._pool is None:
            return [function(unit) for unit in units]
        return list(self._pool.map(function, units))

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
