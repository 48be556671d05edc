"""The memory that is free for this process, and what the C library does with freed memory."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import psutil

_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Of a Linux container or job: control groups of version 2 and 1."""


def free_bytes() -> int:
    """Memory that this process can still have: what the machine has available, or less where its container is smaller.

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
    """Let glibc reuse freed blocks: giving them back to the kernel costs up to half of a step in page faults.

    With `shared_by_threads`, what one thread frees another may use, so that many threads do not each keep their own.
    Without `large`, blocks of 1 MiB and more are given back: where they are few, faults cost less than the holes that
    they would leave.
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
