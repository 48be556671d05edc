"""Threads for kernels that release the GIL, over units of work that do not depend on the number of threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import numpy as np


class Threads:
    """Threads that run kernels over units.

    The units do not depend on the number of threads, and results come in their order.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._pool = ThreadPoolExecutor(number - 1) if number > 1 else None
        self._own = threading.local()

    def scratch(self, number: int, kind: Any = np.float32) -> np.ndarray:
        """Return scratch memory of at least so many elements, the same for every kernel of a thread."""
        own = getattr(self._own, "scratch", None)
        if own is None or len(own) < number or own.dtype != kind:
            own = self._own.scratch = np.zeros(number, kind)
        return own

    def each(self, function: Callable[[int, int], Any], number: int, step: int) -> list[Any]:
        """Run function(begin, end) over 0 … number - 1, `step` at a time; results in order."""
        return self.over(range(0, max(number, 1), step), lambda a: function(a, min(a + step, number)))

    def over(self, units: Sequence[Any], function: Callable[[Any], Any]) -> list[Any]:
        """Run a function on each unit; results in the order of the units."""
        if self._pool is None or len(units) < 2:
            return [function(unit) for unit in units]
        results: list[Any] = [None] * len(units)
        places = count()  # its next() is atomic, and far cheaper than a future a unit

        def work() -> None:
            while (place := next(places)) < len(units):
                results[place] = function(units[place])

        others = [self._pool.submit(work) for _ in range(min(self.number, len(units)) - 1)]
        try:
            work()
        finally:
            for other in others:
                other.result()
        return results

    def __enter__(self) -> Threads:
        """Return the threads themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
