"""Signals that ask for an end: handlers only note them; work looks for them between its pieces and ends by itself.

SIGINT, SIGTERM and SIGHUP ask for an end within ten seconds, SIGUSR1 (a batch system's early warning) for one as soon
as the piece in hand is done. An exception raised by a handler could be lost in a callback of the garbage collector or
of the interpreter, so none is raised: `end_if_asked` raises Stopped where the work calls it.

The process of a command is guarded too: a thread hears the signal even while the main thread imports a library or is
in a long kernel, and ends the process where the work does not.
"""

from __future__ import annotations

import atexit
import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hpcres.errors import Stopped

EXIT_STOPPED, EXIT_AT_ONCE = 75, 130
PATIENCE_SECONDS = 5.0
"""How long the work may go on after the first SIGINT, SIGTERM or SIGHUP; a batch system kills after some 30 s."""
_AGAIN_SECONDS, _AGAIN_LAUNCHED_SECONDS = 0.5, 3.0
"""A SIGINT that follows another sooner is the same key press, passed on by a shell, or by a launcher of processes."""
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "RANK")
NOTHING_WRITTEN = "nothing is written: run it again"
HEARD = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


class _Notes:
    """What was heard since listening began, and what to say of it."""

    def __init__(self, stage: str, kept: str) -> None:
        self.stage, self.kept = stage, kept
        self.received: list[int] = []
        self.status: int | None = None
        """Of the command, once it has said how it ended; what is left is Python's own end."""

    def note(self, number: int, _: object = None) -> None:
        if number not in self.received:
            self.received.append(number)

    def line(self, number: int) -> str:
        return f"{self.stage}: stopped by {signal.Signals(number).name}; {self.kept}"


_notes: _Notes | None = None
_half_made: set[Path] = set()
_publishing = threading.Lock()


def is_first_rank() -> bool:
    """Whether this process is the one that speaks, as the launchers' variables say; True where nothing launched it."""
    return next((os.environ[name] for name in _RANKS if name in os.environ), "0") == "0"


@contextmanager
def listening(stage: str, kept: str = NOTHING_WRITTEN) -> Iterator[list[int]]:
    """Note signals instead of obeying them; yields the list of those received, which grows.

    kept: what is left where the stage is stopped, for the user to read. Inside another `listening` it only says so
    anew for its stage. In a thread other than the main one nothing can be heard, and the list stays empty. In a library
    call a second SIGINT raises KeyboardInterrupt. Stopped, before anything is begun, where a signal came before.
    """
    global _notes
    if _notes is not None:
        notes, before = _notes, (_notes.stage, _notes.kept)
        notes.stage, notes.kept = stage, kept
        end_if_asked()
        try:
            yield notes.received
        finally:
            notes.stage, notes.kept = before
        return
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    notes = _Notes(stage, kept)

    def hear(number: int, _: object) -> None:
        if number == signal.SIGINT and number in notes.received:
            raise KeyboardInterrupt
        notes.note(number)

    old = {number: signal.signal(number, hear) for number in _not_ignored()}
    _notes = notes
    try:
        yield notes.received
    finally:
        _notes = None
        for number, handler in old.items():
            signal.signal(number, handler)


def keeps(kept: str) -> None:
    """Say anew what is left where the stage is stopped from now on."""
    if _notes is not None:
        _notes.kept = kept


def asked() -> bool:
    """Whether a signal asks for an end; cheap, in any thread."""
    return _notes is not None and bool(_notes.received)


def received() -> list[int]:
    """The signals that have come, in their order."""
    return [] if _notes is None else list(_notes.received)


def stopped_by(number: int) -> Stopped:
    """The end of a stage by a signal that came to this process or to another of its job."""
    notes = _notes or _Notes("hpcres", NOTHING_WRITTEN)
    return Stopped(notes.line(number))


def end_if_asked() -> None:
    """Raise Stopped where a signal has come: to be called between the pieces of what has nothing more to save."""
    if _notes is not None and _notes.received:
        raise stopped_by(_notes.received[0])


@contextmanager
def half_made(*paths: Path) -> Iterator[None]:
    """Files or folders that are removed where the process is ended in the middle of the block."""
    _half_made.update(paths)
    try:
        yield
    finally:
        _half_made.difference_update(paths)


@contextmanager
def publishing() -> Iterator[None]:
    """The process is not ended in the middle of the block, which is to be short."""
    with _publishing:
        yield


# ---- the process of a command ------------------------------------------------------------------------------


def guard_process(stage: str) -> None:
    """Hear signals until the process ends, which is within ten seconds of one; call it before heavy imports, once.

    Where the work has not ended by PATIENCE_SECONDS after a SIGINT, SIGTERM or SIGHUP, what is half made is removed,
    one line said, and the process ended with 75; on a second SIGINT at once, with 130.
    """
    global _notes
    notes = _notes = _Notes(stage, NOTHING_WRITTEN)
    heard, told = os.pipe()
    os.set_blocking(told, False)
    for number in _not_ignored():
        signal.signal(number, notes.note)
    # C code writes each signal's number to the pipe at once, whatever the main thread does.
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_guard, args=(notes, heard), name="hpcres-signals", daemon=True).start()
    atexit.register(_ignore)  # the first to be registered is the last to run


def has_said(status: int) -> None:
    """The command has said how it ended: from here on a signal ends the process with this status, without a word."""
    if _notes is not None:
        _notes.status = status


def _guard(notes: _Notes, heard: int) -> None:
    launched = any(name in os.environ for name in _RANKS)
    again = _AGAIN_LAUNCHED_SECONDS if launched else _AGAIN_SECONDS
    deadline: float | None = None
    interrupted: float | None = None
    while True:
        wait: float | None = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([heard], [], [], wait)[0]:
            _end(notes, EXIT_STOPPED, notes.line(notes.received[0]))
        for number in os.read(heard, 256):
            if number not in HEARD:
                continue
            now, name = time.monotonic(), signal.Signals(number).name
            notes.note(number)
            if number == signal.SIGINT and interrupted is not None and now - interrupted > again:
                _end(notes, EXIT_AT_ONCE, f"{notes.stage}: ended by a second {name}; {notes.kept}")
            if number == signal.SIGINT and interrupted is None:
                interrupted = now
            if name != "SIGUSR1" and deadline is None:
                deadline = now + PATIENCE_SECONDS


def _end(notes: _Notes, status: int, line: str) -> None:
    """End the process here and now, from the guarding thread."""
    _publishing.acquire(timeout=1.0)
    for path in list(_half_made):
        # Under another name first, so that nobody can move a part of it into place meanwhile.
        doomed = path.with_name(f"{path.name}.ended")
        with suppress(OSError):
            os.rename(path, doomed)
            shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()
    if notes.status is None and is_first_rank():
        with suppress(OSError):
            os.write(2, f"hpcres: {line}\n".encode(errors="backslashreplace"))
    with suppress(Exception):
        sys.stdout.flush()
    os._exit(status if notes.status is None else notes.status)


def _not_ignored() -> list[int]:
    """What was started to ignore a signal, as nohup does SIGHUP, goes on ignoring it."""
    return [number for number in HEARD if signal.getsignal(number) != signal.SIG_IGN]


def _ignore() -> None:
    """As it ends Python would put back what kills, and a signal then would take the exit status with it."""
    for number in HEARD:
        signal.signal(number, signal.SIG_IGN)
