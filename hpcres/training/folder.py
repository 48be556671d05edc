"""The folder of a run: what a new run writes stays apart until its checkpoint can take the place of an earlier run.

At every moment the folder holds the earlier run, or the new one whole in `.train-new`, or the new run in its place:
never a table of one beside a checkpoint of the other.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpcres.outputs import CHECKPOINT, TABLE, refuse_output
from hpcres.signals import half_made, publishing
from hpcres.study import Study

_CHECKPOINT, _BEST, _TABLES = "checkpoint.pt", "best.pt", ("training.csv", "quality.csv")
_OTHERS = (_BEST, *_TABLES, "training.html", "training-slices", "tensorboard", "study-train.yaml")


class RunFolder:
    """Where a run's files are now; `path` changes once, when the run takes an earlier one's place."""

    def __init__(self, folder: Path, *, anew: bool = False) -> None:
        self._folder, self._apart = folder, _apart(folder)
        self.waits = anew and (folder / _CHECKPOINT).exists()
        """Whether an earlier run is in the folder, which this one will replace."""

    @property
    def path(self) -> Path:
        return self._apart if self.waits else self._folder

    @property
    def checkpoint(self) -> Path:
        return self.path / _CHECKPOINT

    @property
    def best(self) -> Path:
        return self.path / _BEST

    def take_over(self) -> None:
        """Put the run, whose checkpoint has just been saved, in the place of the earlier one."""
        if self.waits:
            _replace(self._folder)
            self.waits = False

    @contextmanager
    def prepared(self, writes: bool) -> Iterator[None]:
        """The folder is there inside the block; what has taken no place by its end is removed (where this `writes`)."""
        if not writes:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with half_made(*([self._apart] if self.waits else [])):
                yield
        finally:
            if self.waits:
                shutil.rmtree(self._apart, ignore_errors=True)


def recover(folder: Path) -> None:
    """Finish what a kill in the middle of `take_over` left, or remove what one before it did. One process alone."""
    if (_apart(folder) / _CHECKPOINT).exists():
        _replace(folder)
    elif _apart(folder).is_dir():
        shutil.rmtree(_apart(folder))


def refuse_outputs(study: Study, overwrite: bool, inputs: list[str]) -> None:
    """InputError where training may not write one of its files; nothing is changed."""
    refuse_output(study.checkpoint_path, CHECKPOINT, inputs=inputs, overwrite=overwrite, renewed=True)
    refuse_output(study.best_path, CHECKPOINT, inputs=inputs, renewed=True)
    for name in _TABLES:
        refuse_output(study.folder / name, TABLE, inputs=inputs, renewed=True)


def _apart(folder: Path) -> Path:
    return folder / ".train-new"


def _replace(folder: Path) -> None:
    """The earlier checkpoint goes last of its run and the new one comes last of its own: nothing reads a mixture, and
    after a kill in between it shows how far this came."""
    old, new = folder / _CHECKPOINT, _apart(folder)
    with publishing():
        if old.exists():
            for name in _OTHERS:
                _remove(folder / name)
            old.unlink()
        for name in _OTHERS:
            if (new / name).exists():
                (new / name).rename(folder / name)
        (new / _CHECKPOINT).rename(old)
    shutil.rmtree(new, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
