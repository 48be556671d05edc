"""What the training loop asks of a family's training, whatever its data, losses and networks are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import nn

from hpcres.networks.generator import Generator
from hpcres.study import Study
from hpcres.training.journal import Shown


class Trainer(Protocol):
    """Networks, optimizers and data of a run on one process of a group; the loop has schedule, files and signals.

    Made of a study, the group of processes, its number of threads (threads.Threads) and the checkpoint that the run
    goes on from, or None. Raises InputError where these do not fit, before anything is written.

    Attributes
    ----------
    study : Study
        With all settings chosen that the given one left open.
    modules : dict of str to torch.nn.Module
        By the names that the user is told, the generator first; none of their weights may become infinite.
    losses, measures : sequence of str
        Keys of `report`: columns of training.csv before and behind the learning rate.
    shown : sequence of journal.Shown
        What of `report` and of `evaluate` a terminal or a log shows.
    choices : sequence of str
        For the user, where settings were chosen: which and why.
    init_from : dict or None
        Where the run began, if not from random weights (checkpoint.Checkpoint.init_from).
    """

    study: Study
    modules: dict[str, nn.Module]
    losses: Sequence[str]
    measures: Sequence[str]
    shown: Sequence[Shown]
    choices: Sequence[str]
    init_from: dict[str, Any] | None

    def notes(self) -> Iterator[str]:
        """For the user, before the first step: what is unusual about the data."""
        ...

    def step(self, number: int, rate: float) -> bool:
        """Step `number`, from 0, at a learning rate; whether every loss of this process is finite. Every random draw
        depends on the seed, the step and the sample alone, so that a resumed run goes on as one without a stop."""
        ...

    def report(self) -> dict[str, float]:
        """Losses and measures of the last step, means over all processes. Collective."""
        ...

    def to_save(self) -> Generator:
        """The generator that is saved, in eval mode. One process calls it."""
        ...

    def quality_columns(self) -> Sequence[str]:
        """Keys of what `evaluate` finds, `score` among them, where the smaller is the better. One process calls it."""
        ...

    def evaluate(self) -> tuple[Generator, dict[str, float], np.ndarray]:
        """The generator that would be saved now, what a judgement finds, and a slice of labels to show. One process."""
        ...

    def state(self) -> dict[str, Any]:
        """What the constructor needs of a checkpoint to go on: tensors, numbers, strings, lists and dicts."""
        ...

    def closing(self, steps: int, best: Mapping[str, Any]) -> Iterator[str]:
        """For the user at the end of so many steps; `best` is what the judgements found of the best generator."""
        ...
