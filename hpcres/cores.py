"""The cores that this process may use."""

from __future__ import annotations

import os


def allowed_cores() -> frozenset[int]:
    """Numbers of the cores that this process may use; all cores of the machine on systems without affinity (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def cores() -> int:
    """How many cores this process may use."""
    return len(allowed_cores())
