"""The cores that this process may use."""

from __future__ import annotations

import os
from collections.abc import MutableMapping


def allowed_cores() -> frozenset[int]:
    """Return the numbers of the cores that this process may use.

    These are all cores of the machine on systems without affinity (macOS).
    """
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def cores() -> int:
    """Return how many cores this process may use."""
    return len(allowed_cores())


def limit_spinning(environment: MutableMapping[str, str]) -> None:
    """Let OpenMP threads that wait for each other spin for about half a millisecond and then sleep.

    Sleeping at once costs a third of the speed of training on free cores. Spinning for as long as OpenMP does by itself
    costs most of the speed on cores shared with other work (docs/training.md, Speed). OpenMP reads its settings when it
    is loaded, so this must be called before torch is imported. Settings of the user are kept.

    Parameters
    ----------
    environment : mapping
        Environment variables of this process, usually `os.environ`; changed in place.

    Examples
    --------
    >>> environment = {"GOMP_SPINCOUNT": "0"}
    >>> limit_spinning(environment)
    >>> environment
    {'GOMP_SPINCOUNT': '0', 'OMP_WAIT_POLICY': 'PASSIVE'}
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "10000")  # GNU's OpenMP, the one of torch's wheels, on Linux
        environment["OMP_WAIT_POLICY"] = "PASSIVE"  # others', which have no such count
