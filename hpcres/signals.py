"""A batch system's warning that time is up: noted where the work in hand is finished and saved, else the way out."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf

from hpcres.errors import Stopped

_WAY_OUT_SECONDS = 60.0


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGUSR1 are put in the list instead of ending the process (in the main thread only)."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    old = {s: signal.signal(s, lambda number, _: received.append(number)) for s in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def ended_by_signals(what: str) -> Iterator[None]:
    """SIGTERM, SIGUSR1 and SIGINT raise Stopped in what has nothing to save: scratch goes, nothing is written.

    Those that follow within a minute are passed over, so that nothing on the way out is broken off, and a later one is
    obeyed again, should the first have been raised where Python drops exceptions (in the main thread only).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    come = -inf

    def end(number: int, _: object) -> None:
        nonlocal come
        if time.monotonic() - come > _WAY_OUT_SECONDS:
            come = time.monotonic()
            raise Stopped(f"{what}: stopped by {signal.Signals(number).name}; nothing is written: run it again")

    # What was started to ignore a signal, as a shell's background jobs do SIGINT, goes on ignoring it.
    heard = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    old = {s: signal.signal(s, end) for s in heard if signal.getsignal(s) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in old.items():
            # All is cleared by now, and Python, as it ends, would put back what kills.
            signal.signal(number, handler if come == -inf else signal.SIG_IGN)
