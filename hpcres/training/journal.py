"""Reports of a run while it goes on: tables, TensorBoard events, slices over time, progress and a page.

The tables are training.csv and quality.csv. Progress is a live table on a terminal, or lines to the logger
hpcres.train. training.html shows all of it.
"""

from __future__ import annotations

import csv
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.table import Table

from hpcres.old_names import with_new_columns
from hpcres.progress import Show, on_terminal, progress_display
from hpcres.training.events import Events
from hpcres.training.folder import RunFolder
from hpcres.volumes.phases import PHASE_COLOURS

log = logging.getLogger("hpcres.train")
_FLOAT = "{:.6g}"
_SHOWN_ROWS = 10


class _Rows:
    """A CSV file, without the rows after `resume_step`, which a killed run has left."""

    def __init__(self, path: Path, columns: list[str], resume_step: int) -> None:
        self._columns = columns
        kept = _rows_up_to(path, columns, resume_step)
        self._file = path.open("w", newline="", encoding="utf-8")
        self._csv = csv.writer(self._file)
        self._csv.writerows([columns, *kept])
        self._file.flush()

    def add(self, row: Mapping[str, float]) -> None:
        self._csv.writerow([v if isinstance(v := row[c], int) else _FLOAT.format(v) for c in self._columns])
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Shown:
    """A column that a terminal or a log shows.

    Attributes
    ----------
    label : str
        Words that name it.
    column : str
        Name of the column in training.csv or quality.csv.
    format : str
        Format specification of its values.
    in_table : bool
        Whether the live table has it. The live table has all shown columns of training.csv in any case.
    """

    label: str
    column: str
    format: str
    in_table: bool = True

    def text(self, row: Mapping[str, float]) -> str:
        """Return the value of the column in a row as text."""
        return format(row[self.column], self.format)


class Journal:
    """The files of a run, and progress: a live table, or lines to the logger hpcres.train.

    Parameters
    ----------
    run : RunFolder or None
        Folder of the files. With None (every process but the first) nothing is written or shown.
    columns, quality : list of str
        Columns of training.csv and of quality.csv. `quality` is empty if nothing is judged.
    resume_step : int
        Step from which the run goes on. What the files have after it is dropped.
    shown : sequence of Shown
        Which of all these columns a terminal or a log shows. Phase fractions are also shown.
    live : bool
        Whether to show a table that is renewed, if stderr is a terminal, in place of a line for each report.
    """

    def __init__(
        self,
        run: RunFolder | None,
        columns: list[str],
        quality: list[str],
        resume_step: int,
        shown: Sequence[Shown] = (),
        live: bool = False,
    ) -> None:
        self._run = run
        self._reported = [one for one in shown if one.column in columns]
        self._found = [one for one in shown if one.column in quality]
        self._display = ExitStack()
        self._show: Show | None = None
        if run is None:
            return
        folder = run.path
        self._rows = _Rows(folder / "training.csv", columns, resume_step)
        self._fractions = [name for name in columns if name.startswith("fraction_")]
        self._judged = _Rows(folder / "quality.csv", quality, resume_step) if quality else None
        for picture in folder.glob("training-slices/step-*.png"):
            if int(picture.stem[5:]) > resume_step:
                picture.unlink()
        self._events = Events(folder / "tensorboard", resume_step)
        self._score, self._beside = "", [""] * sum(one.in_table for one in self._found)
        if live and on_terminal():
            self._shown: deque[list[str]] = deque(maxlen=_SHOWN_ROWS)
            self._show = self._display.enter_context(progress_display("training", 1.0, keep=True))

    def note(self, message: str) -> None:
        """Show a message to the user."""
        if self._run is not None:
            log.info(message)

    def report(self, done: float, row: Mapping[str, float]) -> None:
        """Add a row to training.csv and to the events, and show it.

        Parameters
        ----------
        done : float
            Share of the run that is done, 0 to 1.
        row : mapping of str to float
            Exactly the columns of training.csv.
        """
        if self._run is None:
            return
        self._rows.add(row)
        step = int(row["step"])
        self._events.add(step, {f"training/{name}": v for name, v in row.items() if name not in ("step", "seconds")})
        if self._show is not None:
            shown = [f"{step}", f"{row['seconds']:.0f}", *(one.text(row) for one in self._reported)]
            shown += [*(f"{row[name]:.3f}" for name in self._fractions), self._score, *self._beside]
            self._shown.append(shown)
            table = Table("step", "s", *(one.label for one in self._reported), box=None)
            beside = [one.label for one in self._found if one.in_table]
            for name in [*(name.removeprefix("fraction_") for name in self._fractions), "score", *beside]:
                table.add_column(name)
            for one in self._shown:
                table.add_row(*one)
            self._show(done, f"{done:.0%}", above=table)
            return
        fractions = " ".join(f"{name.removeprefix('fraction_')} {row[name]:.3f}" for name in self._fractions)
        parts = [f"{done:4.0%}", f"{row['seconds']:.0f} s", f"step {step}"]
        parts += [f"{one.label} {one.text(row)}" for one in self._reported]
        self.note("  ".join([*parts, *([fractions] if fractions else [])]))

    def judged(self, row: Mapping[str, float], labels: np.ndarray, is_best: bool) -> None:
        """Add a row to quality.csv and to the events, save a slice of labels, and show the row.

        Parameters
        ----------
        row : mapping of str to float
            The columns of quality.csv.
        labels : ndarray
            Slice (row, column) of labels.
        is_best : bool
            Whether the score is the best so far.
        """
        assert self._run is not None
        assert self._judged is not None
        self._judged.add(row)
        step = int(row["step"])
        self._events.add(step, {f"quality/{name}": v for name, v in row.items() if name not in ("step", "seconds")})
        image = Image.fromarray(np.ascontiguousarray(labels, np.uint8), mode="P")
        image.putpalette(np.array(PHASE_COLOURS, np.uint8).tobytes())
        (self._run.path / "training-slices").mkdir(exist_ok=True)
        image.save(self._run.path / "training-slices" / f"step-{step:08d}.png")
        self._score = f"{row['score']:.2f}{' best' if is_best else ''}"
        self._beside = [one.text(row) for one in self._found if one.in_table]
        if self._show is None:
            parts = [f"      judged at step {step}: score {self._score}"]
            self.note("  ".join([*parts, *(f"{one.label} {one.text(row)}" for one in self._found)]))

    def write_page(self, title: str) -> None:
        """Write training.html from the files as they are now."""
        if self._run is not None:
            from hpcres.training.page import write_page  # brings matplotlib

            write_page(self._run.path, title)

    def close(self) -> None:
        """Stop the live table and close the files."""
        if self._run is None:
            return
        self._display.close()
        for file in (self._rows, self._judged, self._events):
            if file is not None:
                file.close()


def _rows_up_to(path: Path, columns: list[str], step: int) -> list[list[str]]:
    if step == 0 or not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if with_new_columns(header, path) != columns:
        return []
    # A kill can cut the last row short.
    return [row for row in rows if len(row) == len(columns) and int(row[0]) <= step]
