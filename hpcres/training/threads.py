"""The number of CPU threads of a training process, lowered while other work uses the cores.

Threads wait for each other at every operation, so one thread whose core is shared delays all others. Two threads on one
free core and one shared core make an eighth of the steps of one thread (docs/training.md, Speed). A number that the
study does not set is lowered as soon as threads wait for a core, and raised again where steps are faster with more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import ceil
from pathlib import Path

import torch

from hpcres.training.distributed import Processes

WAITING_SHARE = 0.2
"""Mean share of a process's threads that wait for a core, above which fewer threads are likely to be faster."""
_WINDOW_SECONDS = 2.0
"""Waiting and speed are averaged over steps that take this many seconds together."""
_RETRY_SECONDS = 60.0
"""Time until more threads are tried again, in seconds. It doubles with each attempt that is not faster."""
_FASTER = 1.1
"""More threads are kept if steps are faster by this factor."""
_ROUNDING = (
    "the number of threads changes how sums are rounded, so no other run gives these exact numbers (training.threads "
    "fixes the number)"
)


def seconds_without_a_core() -> float:
    """Return the seconds that the threads of this process were ready to run while other work had the cores.

    The seconds are summed over the threads. They come from the scheduler's statistics in Linux's /proc, and are 0 on
    other systems.
    """
    waited = 0
    for statistics in Path("/proc/self/task").glob("*/schedstat"):
        try:
            waited += int(statistics.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # the thread has ended, or the kernel keeps no statistics
            continue
    return waited / 1e9


def fewer(threads: int, waiting: float) -> int:
    """Return the number of threads to try next if `waiting` of them, on average, wait for a core."""
    return max(1, threads - max(1, ceil(waiting - 0.1)))


class Threads:
    """The number of threads of this process while it trains.

    Parameters
    ----------
    fixed : bool
        Whether the study sets the number. The number is then kept, and other work on the cores is reported once.
    clock : callable
        Returns seconds of wall-clock time.
    waited : callable
        Returns the seconds that all threads together have waited for a core.
    """

    def __init__(
        self,
        fixed: bool,
        clock: Callable[[], float] = time.monotonic,
        waited: Callable[[], float] = seconds_without_a_core,
    ) -> None:
        self._fixed, self._clock, self._waited = fixed, clock, waited
        self._most = torch.get_num_threads()
        self._warned = False
        self._lower_from = self._raise_from = 0.0
        """Times from which fewer, or more, threads may be tried again."""
        self._patience = _RETRY_SECONDS
        self._before: tuple[int, float] | None = None
        """Threads and seconds of a step before the last change, until it is known whether the change was faster."""
        self._begin_window()

    def _begin_window(self) -> None:
        self._steps, self._seconds, self._waited_seconds = 0, 0.0, 0.0

    def trial(
        self, group: Processes, step_seconds: Callable[[], float], waiting_share: float
    ) -> tuple[float, str | None]:
        """Time a step, and time it with fewer threads if threads wait for a core.

        Collective. A process that has more than `waiting_share` of its threads waiting tries fewer, and keeps these if
        they are faster.

        Parameters
        ----------
        group : Processes
            The processes of the run.
        step_seconds : callable
            Returns the seconds of a step.
        waiting_share : float
            Mean share of threads that wait for a core, above which fewer are tried.

        Returns
        -------
        seconds : float
            Seconds of a step with the number of threads that is kept.
        message : str or None
            For the user, if the number is changed.
        """
        threads = torch.get_num_threads()
        self.step_begins()
        seconds, waiting = step_seconds(), self._waiting()
        lowers = not self._fixed and threads > 1 and waiting > waiting_share * threads
        if not group.largest(lowers)[0]:
            return seconds, None
        if lowers:
            torch.set_num_threads(fewer(threads, waiting))
        seconds_fewer = step_seconds()
        if lowers and seconds_fewer < seconds:
            self._raise_from = self._clock() + self._patience
            return seconds_fewer, _lowered(threads, waiting)
        torch.set_num_threads(threads)
        return min(seconds, seconds_fewer), None

    def step_begins(self) -> None:
        """Note the time at which a step begins, and how long threads have waited until then."""
        self._started, self._waited_before = self._clock(), self._waited()

    def step_ends(self) -> str | None:
        """Judge the steps of the last seconds, and change the number of threads if needed.

        Returns
        -------
        str or None
            A message for the user.
        """
        seconds = self._clock() - self._started
        self._waited_seconds += self._waiting() * seconds
        self._seconds += seconds
        self._steps += 1
        if self._most == 1 or self._seconds < _WINDOW_SECONDS:
            return None
        threads, step_seconds = torch.get_num_threads(), self._seconds / self._steps
        waiting = self._waited_seconds / self._seconds
        self._begin_window()
        if self._before is not None:
            return self._judge_change(step_seconds)
        if threads > 1 and waiting > WAITING_SHARE * threads:
            if self._fixed:
                return self._warning(waiting / threads)
            if self._clock() >= self._lower_from:
                self._change(fewer(threads, waiting), step_seconds)
                return _lowered(threads, waiting)
        elif threads < self._most and self._clock() >= self._raise_from:
            self._change(self._most, step_seconds)
        return None

    def _waiting(self) -> float:
        """Return the mean number of threads that waited for a core since `step_begins`."""
        return (self._waited() - self._waited_before) / max(1e-9, self._clock() - self._started)

    def _change(self, threads: int, step_seconds: float) -> None:
        self._before = torch.get_num_threads(), step_seconds
        torch.set_num_threads(threads)

    def _judge_change(self, step_seconds: float) -> str | None:
        """Keep the last change if steps are faster, else undo it."""
        assert self._before is not None
        (before, seconds_before), threads, self._before = self._before, torch.get_num_threads(), None
        lowered = threads < before
        if step_seconds <= seconds_before if lowered else step_seconds * _FASTER < seconds_before:
            self._patience = _RETRY_SECONDS
            self._raise_from = self._clock() + self._patience
            faster = f"continuing with {threads} threads, {seconds_before / step_seconds:.1f} times as fast"
            return None if lowered else faster
        torch.set_num_threads(before)
        self._patience *= 2
        self._lower_from = self._raise_from = self._clock() + self._patience
        return f"continuing with {before} threads: with {threads} steps are not faster" if lowered else None

    def _warning(self, share: float) -> str | None:
        if self._warned:
            return None
        self._warned = True
        return (
            f"warning: the {self._most} threads of this process wait for a core {share:.0%} of their time, and then "
            "for each other, because other work uses the cores; end that work, or interrupt this run and resume it "
            "with training.threads set to the number of free cores, or unset (then it is lowered while other work runs)"
        )


def _lowered(threads: int, waiting: float) -> str:
    return (
        f"the {threads} threads of this process wait for a core {waiting / threads:.0%} of their time, and then for "
        f"each other, because other work uses the cores; continuing with {torch.get_num_threads()}; {_ROUNDING}"
    )
