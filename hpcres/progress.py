"""The progress display of every stage: a bar on a terminal, else a line every few seconds, both with the time left.

A terminal has one bar at a time. Lines of other messages appear above it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn

_LINE_SECONDS = 5.0


class Show(Protocol):
    """Function that shows how much of a piece of work is done."""

    def __call__(
        self, done: float, words: str = "", *, total: float | None = None, above: RenderableType | None = None
    ) -> None:
        """Show that `done` is done.

        Parameters
        ----------
        done : float
            Amount that is done.
        words : str
            The same in words; "done of total" by default.
        total : float, optional
            Amount of the work, where it is known only now.
        above : rich renderable, optional
            What a terminal shows above the bar, in place of what it showed there before.
        """


class _Bar(Progress):
    """A progress bar below something else."""

    above: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.above is not None:
            yield self.above
        yield from super().get_renderables()


def on_terminal() -> bool:
    """Tell whether stderr is a terminal, on which a bar can be shown."""
    return Console(stderr=True).is_terminal


@contextmanager
def progress_display(
    what: str,
    total: float | None = None,
    *,
    shown: bool = True,
    bar: bool = True,
    line: Callable[[str], None] | None = None,
    seconds: float = _LINE_SECONDS,
    keep: bool = False,
) -> Iterator[Show]:
    """Show the progress of a piece of work on stderr while the context lasts.

    Parameters
    ----------
    what : str
        Name of the work.
    total : float, optional
        Amount of the work.
    shown : bool
        False to show nothing.
    bar : bool
        Whether to show a bar where stderr is a terminal.
    line : function, optional
        Called with each line where no bar is shown. By default the line is printed on stderr behind `what`.
    seconds : float
        Least time between two lines. The last line, at the end of the work, comes in any case.
    keep : bool
        Whether what a terminal shows last stays there.

    Yields
    ------
    Show
        To be called whenever more is done.

    Examples
    --------
    >>> with progress_display("counting", 8, line=print, seconds=0) as show:
    ...     show(8)
    8 of 8
    """
    if not shown:
        yield lambda done, words="", *, total=None, above=None: None
        return
    if bar and on_terminal():
        with _Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[words]}"),
            console=Console(stderr=True),
            transient=not keep,
        ) as display:
            job = display.add_task(what, total=total, words="")

            def draw(text: str, done: float, total: float | None, above: RenderableType | None) -> None:
                display.above = above or display.above
                display.update(job, completed=done, total=total, words=text)

            yield _shower(total, draw, 0)
        return

    def print_line(text: str, *_: object) -> None:
        if line is None:
            print(f"{what}: {text}", file=sys.stderr, flush=True)
        else:
            line(text)

    yield _shower(total, print_line, seconds)


def _shower(
    known: float | None, draw: Callable[[str, float, float | None, RenderableType | None], None], seconds: float
) -> Show:
    """Return a function that draws the state of the work with the time left, at most once in so many seconds."""
    drawn, ended, first = time.monotonic(), False, list[tuple[float, float]]()

    def show(done: float, words: str = "", *, total: float | None = None, above: RenderableType | None = None) -> None:
        nonlocal drawn, ended
        now, whole = time.monotonic(), known if total is None else total
        if not first:  # work that goes on where it stopped does not begin at 0
            first.append((now, done))
        last = whole is not None and done >= whole
        if now - drawn < seconds and (ended or not last):
            return
        drawn, ended = now, last
        text = words or (f"{done:g}" if whole is None else f"{done:g} of {whole:g}")
        began, before = first[0]
        if whole is not None and before < done < whole:
            text += f", {duration((now - began) * (whole - done) / (done - before))} left"
        draw(text, done, whole, above)

    return show


def duration(seconds: float) -> str:
    """Format a duration in a unit that suits it.

    Examples
    --------
    >>> duration(42.4), duration(600), duration(11_000)
    ('42 s', '10 minutes', '3.06 hours')
    """
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
