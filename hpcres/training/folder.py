"""The output folder of training, and how `train `overwrite`` replaces an earlier run.

A new run writes to the hidden folder `.train-new` until its first checkpoint is saved. Its files then replace those of
the earlier run. So the output folder never holds a table of one run beside a checkpoint of the other, and one of the
runs is complete on disk at every moment.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpcres.outputs import CHECKPOINT, TABLE, refuse_output
from hpcres.signals import half_made, renaming
from hpcres.study import Study

_CHECKPOINT, _BEST, _TABLES = "checkpoint.pt", "best.pt", ("training.csv", "quality.csv")
_OTHERS = (_BEST, *_TABLES, "training.html", "training-slices", "tensorboard", "study-train.yaml")


class RunFolder:
    """The folder that a run writes to.

    `path` changes once, when the run replaces an earlier one.

    Parameters
    ----------
    folder : Path
        Output folder.
    anew : bool
        Whether the run starts anew and replaces an earlier run.
    """

    def __init__(self, folder: Path, *, anew: bool = False) -> None:
        self._folder, self._apart = folder, _apart(folder)
        self.waits = anew and (folder / _CHECKPOINT).exists()
        """Whether an earlier run is still in the output folder and this one is in `.train-new`."""

    @property
    def path(self) -> Path:
        """The folder that the run writes to now."""
        return self._apart if self.waits else self._folder

    @property
    def checkpoint(self) -> Path:
        """Path of this run's checkpoint.pt."""
        return self.path / _CHECKPOINT

    @property
    def best(self) -> Path:
        """Path of this run's best.pt."""
        return self.path / _BEST

    def take_over(self) -> None:
        """Replace the earlier run, if there is one.

        Call this when the checkpoint of this run is saved.
        """
        if self.waits:
            _replace(self._folder)
            self.waits = False

    @contextmanager
    def prepared(self, writes: bool) -> Iterator[None]:
        """Create the folder for the block, and remove `.train-new` at its end if it holds no checkpoint.

        A `.train-new` with a checkpoint stays for `recover`: an error in `take_over` may have left it as the only
        complete run.

        Parameters
        ----------
        writes : bool
            Whether this process writes. If it does not, nothing is done.
        """
        if not writes:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with half_made(*([self._apart] if self.waits else [])):
                yield
        finally:
            if self.waits and not self.checkpoint.exists():
                shutil.rmtree(self._apart, ignore_errors=True)


def recover(folder: Path) -> None:
    """Finish a `take_over` that a kill interrupted, or remove the files of a run that was killed before it.

    Call this on rank 0 only.
    """
    if (_apart(folder) / _CHECKPOINT).exists():
        _replace(folder)
    elif _apart(folder).is_dir():
        shutil.rmtree(_apart(folder))


def refuse_outputs(study: Study, overwrite: bool, inputs: list[str]) -> None:
    """Raise InputError if training may not write one of its files.

    Nothing is changed.

    Parameters
    ----------
    study : Study
        The study, which names the files.
    overwrite : bool
        Whether an existing checkpoint may be replaced.
    inputs : list of str
        Files that are read and must not be replaced.

    Raises
    ------
    InputError
        Training may not write one of its files.
    """
    refuse_output(study.checkpoint_path, CHECKPOINT, inputs=inputs, overwrite=overwrite, renewed=True)
    refuse_output(study.best_path, CHECKPOINT, inputs=inputs, renewed=True)
    for name in _TABLES:
        refuse_output(study.folder / name, TABLE, inputs=inputs, renewed=True)


def _apart(folder: Path) -> Path:
    return folder / ".train-new"


def _replace(folder: Path) -> None:
    """Replace the earlier run by the one in `.train-new`.

    The earlier checkpoint is removed after its other files, and the new one is moved after its other files. So no
    process reads a mixture of both runs. After a kill `recover` can finish, because the new checkpoint is in
    `.train-new` until all is done.
    """
    old, new = folder / _CHECKPOINT, _apart(folder)
    with renaming():
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
