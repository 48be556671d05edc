"""What a run tells while it goes: rows of training.csv, and a live line on a terminal or plain lines in a log."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

_FLOAT = "{:.6g}"


class Journal:
    """training.csv at `path` and progress on stderr. Rows after `resume_step`, left by a killed run, are dropped.

    With `path` None (every process but the first) it says and writes nothing.
    """

    def __init__(self, path: Path | None, columns: list[str], resume_step: int) -> None:
        self._columns = columns
        self._file = None
        self._progress: Progress | None = None
        if path is None:
            return
        kept = _rows_up_to(path, columns, resume_step)
        self._file = path.open("w", newline="", encoding="utf-8")
        self._csv = csv.writer(self._file)
        self._csv.writerows([columns, *kept])
        self._file.flush()
        console = Console(stderr=True)
        self._console = console
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("training"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
                TextColumn("{task.description}"), console=console,
            )  # fmt: skip
            self._task = self._progress.add_task("", total=1.0)
            self._progress.start()

    def note(self, message: str) -> None:
        if self._file is not None:
            self._console.print(f"train: {message}", highlight=False, markup=False, soft_wrap=True)

    def report(self, done: float, row: dict[str, float]) -> None:
        """Add a row of exactly the columns; `done` is the share of the run, 0 to 1."""
        if self._file is None:
            return
        self._csv.writerow([v if isinstance(v := row[c], int) else _FLOAT.format(v) for c in self._columns])
        self._file.flush()
        fractions = " ".join(f"{name[9:]} {row[name]:.3f}" for name in self._columns if name.startswith("fraction_"))
        line = (
            f"step {row['step']}  wasserstein {row['wasserstein']:.3g}  voxel loss {row['voxel_loss']:.2g}  "
            f"agreement {row['low_res_agreement']:.2%}  {fractions}"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=done, description=line)
        else:
            self.note(f"{done:4.0%}  {row['seconds']:.0f} s  {line}")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._file is not None:
            self._file.close()
        sys.stderr.flush()


def _rows_up_to(path: Path, columns: list[str], step: int) -> list[list[str]]:
    if step == 0 or not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if header != columns:
        return []
    # A kill can cut the last row short.
    return [row for row in rows if len(row) == len(columns) and int(row[0]) <= step]
