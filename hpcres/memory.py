"""The memory that is free for this process, and what the C library does with freed memory."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import psutil

_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Of a Linux container or job: control groups of version 2 and 1."""


def free_bytes() -> int:
    """Return how many bytes of memory this process can still have.

    This is what the machine has available, or less if the container of the process is smaller.

    Examples
    --------
    >>> 0 < free_bytes() <= psutil.virtual_memory().total
    True
    """
    free = psutil.virtual_memory().available
    for file in _LIMITS:
        try:
            free = min(free, int(file.read_text()))
        except (OSError, ValueError):  # no such group, or `max`
            continue
    return free


def keep_freed_memory(shared_by_threads: bool = False, large: bool = True) -> None:
    """Let glibc reuse freed blocks instead of giving them back to the kernel.

    Giving blocks back costs up to half of a step in page faults.

    Parameters
    ----------
    shared_by_threads : bool
        Let one thread use what another has freed, so that many threads do not each keep memory of their own.
    large : bool
        Also keep blocks of 1 MiB and more. If there are few such blocks, page faults cost less than the holes that the
        blocks would leave.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            trim_threshold, top_pad, mmap_threshold, mmap_max = -1, -2, -3, -4
            if large:
                libc.mallopt(mmap_max, 0)
            else:
                libc.mallopt(mmap_threshold, 2**20)
            libc.mallopt(trim_threshold, 2**31 - 1)
            libc.mallopt(top_pad, 2**26)
            if shared_by_threads:
                arena_max = -8
                libc.mallopt(arena_max, 1)
