"""Scalars for TensorBoard, where it is installed (`pip install hpcres[tensorboard]`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Events:
    """An event file in `folder`, written by TensorBoard's own writer; nothing where TensorBoard is not installed.

    TensorBoard shows all files of a folder as one run, and drops what an earlier file has after `resume_step`.

    Parameters
    ----------
    folder : Path
        Made where it is not there.
    resume_step : int
        Step that the run goes on from; 0 for a new one.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write a number for each tag at a step."""
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)
            self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
