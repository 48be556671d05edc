"""How many threads a training process computes with: as many as it gets cores for.

Threads wait for each other at every operation, so that one whose core does other work holds up all: two threads on
one free core and one shared core make a tenth of the steps of one thread (docs/training.md, Speed). Where the number
is not set, it is lowered as soon as threads stand ready without a core, and raised again where that is faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import ceil
from pathlib import Path

import torch

STARVED = 0.2
"""Share of their time that threads stand ready without a core, from which on fewer are likely to be faster."""
_WINDOW_SECONDS = 2.0
"""Steps are looked at together until they have taken so long."""
_RETRY_SECONDS = 60.0
"""After so long more threads are tried again; each time in vain it is twice as long."""
_FASTER = 1.1
"""More threads are kept where steps are so many times faster."""
_ROUNDED = (
    "with another number of threads sums are rounded otherwise, so this run's numbers are its own (training.threads "
    "fixes the number)"
)


def seconds_without_a_core() -> float:
    """How long this process's threads, summed, have stood ready to run while other work had the cores.

    Linux says so in /proc (scheduler statistics); 0 where the system does not.
    """
    waited = 0
    for statistics in Path("/proc/self/task").glob("*/schedstat"):
        try:
            waited += int(statistics.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # a thread that ended meanwhile, or a kernel that keeps no count
            continue
    return waited / 1e9


def fewer(threads: int, starved: float) -> int:
    """The number to go on with where `starved` of the threads, on average, stand ready without a core."""
    return max(1, threads - max(1, ceil(starved - 0.1)))


class Threads:
    """The threads of this process while it trains. `fixed`: the user has set their number, and only a warning is due.

    `clock` gives seconds, `waited` those that all threads together have stood without a core.
    """

    def __init__(
        self, fixed: bool, clock: Callable[[], float] = time.monotonic,
        waited: Callable[[], float] = seconds_without_a_core,
    ) -> None:  # fmt: skip
        self._fixed, self._clock, self._waited = fixed, clock, waited
        self._most = torch.get_num_threads()
        self._warned = False
        self._lower_from = self._raise_from = 0.0
        """When fewer, and more, may be tried again."""
        self._patience = _RETRY_SECONDS
        self._before: tuple[int, float] | None = None
        """Threads and seconds of a step before a change, while it is not known whether that was a gain."""
        self._begin_window()

    def _begin_window(self) -> None:
        self._steps, self._seconds, self._starved_seconds = 0, 0.0, 0.0

    def try_out(self, seconds_of_a_step: Callable[[], float]) -> str | None:
        """Before the first step: look at a trial, and at another with fewer threads where these lack cores; what to
        tell the user, if anything."""
        threads = torch.get_num_threads()
        if self._fixed or threads == 1:
            return None
        self.step_begins()
        step, starved = seconds_of_a_step(), self.starved()
        if starved <= STARVED * threads:
            return None
        self._change(fewer(threads, starved), step)
        return self._judge_change(seconds_of_a_step()) or _lowered(threads, starved)

    def try_one(self, seconds_of_a_step: Callable[[], float], step: float) -> tuple[float, str | None]:
        """Seconds of a step by one thread, if they are fewer than `step`, and what to tell the user; else as before."""
        threads = torch.get_num_threads()
        if self._fixed:
            return step, None
        torch.set_num_threads(1)
        alone = seconds_of_a_step()
        if alone < step:
            self._raise_from = self._clock() + self._patience
            return alone, f"going on with one thread, {step / alone:.1f} times as fast as {threads}; {_ROUNDED}"
        torch.set_num_threads(threads)
        return step, None

    def step_begins(self) -> None:
        self._started, self._waited_before = self._clock(), self._waited()

    def starved(self) -> float:
        """How many threads have stood without a core, on average, since `step_begins`."""
        return (self._waited() - self._waited_before) / max(1e-9, self._clock() - self._started)

    def step_ends(self) -> str | None:
        """Look at the steps of late; what to tell the user, if anything. May change the number of threads."""
        taken = self._clock() - self._started
        self._starved_seconds += self.starved() * taken
        self._seconds += taken
        self._steps += 1
        if self._most == 1 or self._seconds < _WINDOW_SECONDS:
            return None
        threads, step = torch.get_num_threads(), self._seconds / self._steps
        starved = self._starved_seconds / self._seconds
        self._begin_window()
        if self._before is not None:
            return self._judge_change(step)
        if threads > 1 and starved > STARVED * threads:
            if self._fixed:
                return self._warning(starved / threads)
            if self._clock() >= self._lower_from:
                self._change(fewer(threads, starved), step)
                return _lowered(threads, starved)
        elif threads < self._most and self._clock() >= self._raise_from:
            self._change(self._most, step)
        return None

    def _change(self, threads: int, step: float) -> None:
        self._before = torch.get_num_threads(), step
        torch.set_num_threads(threads)

    def _judge_change(self, step: float) -> str | None:
        """Keep what the last change gained, or take it back."""
        assert self._before is not None
        (before, step_before), threads, self._before = self._before, torch.get_num_threads(), None
        lowered = threads < before
        if step <= step_before if lowered else step * _FASTER < step_before:
            self._patience = _RETRY_SECONDS
            self._raise_from = self._clock() + self._patience
            return None if lowered else f"going on with {threads} threads, {step_before / step:.1f} times as fast"
        torch.set_num_threads(before)
        self._patience *= 2
        self._lower_from = self._raise_from = self._clock() + self._patience
        return f"going on with {before} threads: {threads} are no faster" if lowered else None

    def _warning(self, share: float) -> str | None:
        if self._warned:
            return None
        self._warned = True
        return (
            f"warning: the {self._most} threads of this process wait for a core {share:.0%} of their time, then for "
            "each other: other work has the cores; end that work, or begin this again with training.threads=1 (as many "
            "as there are cores to spare), or unset, which has the number found"
        )


def _lowered(threads: int, starved: float) -> str:
    return (
        f"the {threads} threads of this process wait for a core {starved / threads:.0%} of their time, then for each "
        f"other: other work has the cores; going on with {torch.get_num_threads()}; {_ROUNDED}"
    )
