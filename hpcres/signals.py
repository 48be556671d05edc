"""Signals that end a command: a handler only notes the signal, and the work checks for it between its pieces.

SIGINT, SIGTERM and SIGHUP end a command within ten seconds. SIGUSR1, the early warning of a batch system, ends it when
the current piece of work is done. Handlers raise no exception, because Python drops an exception that is raised inside
a callback of the garbage collector. `end_if_signalled` raises Stopped where the work calls it.

`guard_process` adds a thread to the process of a command. The thread receives signals also while the main thread
imports a library or runs a long kernel, and ends the process if the work does not.
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
"""How long the work may continue after the first SIGINT, SIGTERM or SIGHUP. Batch systems kill after about 30 s."""
_SAME_KEY_SECONDS, _SAME_KEY_LAUNCHED_SECONDS = 0.5, 3.0
"""A SIGINT that follows the first one sooner comes from the same key press, by way of a shell or an MPI launcher."""
_FINISH_RENAME_SECONDS = 2.0
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "RANK")
NOTHING_WRITTEN = "nothing is written: run it again"
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


class _Notes:
    """The signals that came to a stage, and the text on what is saved for the stage's last line."""

    def __init__(self, stage: str, saved: str) -> None:
        self.stage, self.saved = stage, saved
        self.received: list[int] = []
        self.status: int | None = None
        """The exit status of the command, when its last line is printed and only Python's shutdown is left."""

    def note(self, number: int, _: object = None) -> None:
        if number not in self.received:
            self.received.append(number)

    def line(self, number: int) -> str:
        return f"{self.stage}: stopped by {signal.Signals(number).name}; {self.saved}"


_notes: _Notes | None = None
_half_made: set[Path] = set()
_renaming = threading.Lock()


def is_first_rank() -> bool:
    """Return whether this process is rank 0 by the launcher's environment variables; True if nothing launched it."""
    return next((os.environ[name] for name in _RANKS if name in os.environ), "0") == "0"


@contextmanager
def handling_signals(stage: str, saved: str = NOTHING_WRITTEN) -> Iterator[list[int]]:
    """Note signals inside the block instead of ending the process.

    Inside another such block only `stage` and `saved` change. In a library call, without `guard_process`, a second
    SIGINT raises KeyboardInterrupt. Python cannot set handlers in a thread other than the main one; the block then runs
    without them.

    Parameters
    ----------
    stage : str
        Name of the command or function, the first word of the message.
    saved : str
        What is saved if the stage is stopped now and how to resume, the end of the message. See `set_saved`.

    Yields
    ------
    list of int
        Numbers of the signals that have come, in their order. It grows while the block runs.

    Raises
    ------
    Stopped
        A signal came before the block began.
    """
    global _notes
    if _notes is not None:
        notes, before = _notes, (_notes.stage, _notes.saved)
        notes.stage, notes.saved = stage, saved
        end_if_signalled()
        try:
            yield notes.received
        finally:
            notes.stage, notes.saved = before
        return
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    notes = _Notes(stage, saved)

    def handle(number: int, _: object) -> None:
        if number == signal.SIGINT and number in notes.received:
            raise KeyboardInterrupt
        notes.note(number)

    old = {number: signal.signal(number, handle) for number in _not_ignored()}
    _notes = notes
    try:
        yield notes.received
    finally:
        _notes = None
        for number, handler in old.items():
            signal.signal(number, handler)


def set_saved(saved: str) -> None:
    """Replace, from now on, the text on what is saved and how to resume in the message of a stop."""
    if _notes is not None:
        _notes.saved = saved


def signals_received() -> list[int]:
    """Return the numbers of the signals that have come, in their order."""
    return [] if _notes is None else list(_notes.received)


def stopped_by(number: int) -> Stopped:
    """Return the error that ends a stage on a signal to this process or to another process of its job."""
    notes = _notes or _Notes("hpcres", NOTHING_WRITTEN)
    return Stopped(notes.line(number))


def end_if_signalled() -> None:
    """Raise Stopped if a signal has come.

    This is for long loops, at places where nothing more can be saved.
    """
    if _notes is not None and _notes.received:
        raise stopped_by(_notes.received[0])


@contextmanager
def half_made(*paths: Path) -> Iterator[None]:
    """Register files or folders that are removed if `guard_process` ends the process inside the block."""
    _half_made.update(paths)
    try:
        yield
    finally:
        _half_made.difference_update(paths)


@contextmanager
def renaming() -> Iterator[None]:
    """Protect renames that belong together: `guard_process` waits up to two seconds for the end of the block.

    If `guard_process` must end the process inside a longer block, it removes nothing, because a half-made folder may
    then be the only copy of a result.
    """
    with _renaming:
        yield


# ---- the process of a command ------------------------------------------------------------------------------


def guard_process(stage: str) -> None:
    """Note signals until the process ends, and end the process within ten seconds of a signal.

    Call this once, before heavy imports. If the work has not ended PATIENCE_SECONDS after a SIGINT, SIGTERM or SIGHUP,
    a thread removes half-made files, prints one line, and ends the process with status 75. On a second SIGINT it does
    so at once, with status 130.

    Parameters
    ----------
    stage : str
        Name of the command, the first word of the message.
    """
    global _notes
    notes = _notes = _Notes(stage, NOTHING_WRITTEN)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in _not_ignored():
        signal.signal(number, notes.note)
    # C code writes the number of each signal to the pipe at once, whatever the main thread does.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_guard, args=(notes, reader), name="hpcres-signals", daemon=True).start()
    atexit.register(_ignore_signals)  # registered first, so that it runs last


def set_exit_status(status: int) -> None:
    """Set the status with which a signal ends the process from now on, without another line.

    The command calls this when it has printed its last line.
    """
    if _notes is not None:
        _notes.status = status


def _guard(notes: _Notes, reader: int) -> None:
    launched = any(name in os.environ for name in _RANKS)
    same_key = _SAME_KEY_LAUNCHED_SECONDS if launched else _SAME_KEY_SECONDS
    deadline: float | None = None
    interrupted: float | None = None
    while True:
        wait: float | None = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([reader], [], [], wait)[0]:
            _end(notes, EXIT_STOPPED, notes.line(notes.received[0]))
        for number in os.read(reader, 256):
            if number not in SIGNALS:
                continue
            now, name = time.monotonic(), signal.Signals(number).name
            notes.note(number)
            if number == signal.SIGINT and interrupted is not None and now - interrupted > same_key:
                _end(notes, EXIT_AT_ONCE, f"{notes.stage}: ended by a second {name}; {notes.saved}")
            if number == signal.SIGINT and interrupted is None:
                interrupted = now
            if name != "SIGUSR1" and deadline is None:
                deadline = now + PATIENCE_SECONDS


def _end(notes: _Notes, status: int, line: str) -> None:
    """End the process from the guarding thread."""
    if _renaming.acquire(timeout=_FINISH_RENAME_SECONDS):
        for path in list(_half_made):
            # Renamed first, so that the main thread cannot move a part of it into place meanwhile.
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
    """Return the signals that the process was not started to ignore, as nohup makes it ignore SIGHUP."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def _ignore_signals() -> None:
    """Ignore signals during Python's shutdown, which restores handlers that would replace the exit status."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
