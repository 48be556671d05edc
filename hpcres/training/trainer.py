"""The interface of a family's training to the training loop, for any data, losses and networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import nn

from hpcres.networks.generator import Generator
from hpcres.study import Study
from hpcres.training.journal import Shown


class Trainer(Protocol):
    """Networks, optimizers and data of a run on one process of a group.

    The loop has schedule, files and signals. A trainer is made of a study, the group of processes, its number of
    threads (threads.Threads) and the checkpoint that the run goes on from, or None. It raises InputError if these do
    not fit, before anything is written.

    Attributes
    ----------
    study : Study
        The study, with all settings chosen that the given one left open.
    modules : dict of str to torch.nn.Module
        Networks by the names that the user is told, the generator first. None of their weights may become infinite.
    losses, measures : sequence of str
        Keys of `report`: columns of training.csv before and behind the learning rate.
    shown : sequence of journal.Shown
        What a terminal or a log shows of `report` and of `evaluate`.
    choices : sequence of str
        For the user, if settings were chosen: which and why.
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
        """Yield messages for the user, before the first step, on what is unusual about the data."""
        ...

    def step(self, number: int, rate: float) -> bool:
        """Run a step, and return whether every loss of this process is finite.

        Every random draw depends on the seed, the step and the sample alone, so that a resumed run goes on as one
        without a stop.

        Parameters
        ----------
        number : int
            Number of the step, from 0.
        rate : float
            Learning rate.

        Returns
        -------
        bool
            Whether every loss of this process is finite.
        """
        ...

    def report(self) -> dict[str, float]:
        """Return losses and measures of the last step, as means over all processes.

        Collective.
        """
        ...

    def to_save(self) -> Generator:
        """Return the generator that is saved, in eval mode.

        One process calls it.
        """
        ...

    def quality_columns(self) -> Sequence[str]:
        """Return the keys of what `evaluate` finds.

        `score` is among them; a smaller score is better. One process calls it.
        """
        ...

    def evaluate(self) -> tuple[Generator, dict[str, float], np.ndarray]:
        """Evaluate the generator that would be saved now.

        One process calls it.

        Returns
        -------
        generator : Generator
            The generator that would be saved now.
        found : dict of str to float
            What the evaluation finds.
        labels : ndarray
            A slice of labels to show.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return what the constructor needs of a checkpoint to go on.

        The state holds tensors, numbers, strings, lists and dicts.
        """
        ...

    def closing(self, steps: int, best: Mapping[str, Any]) -> Iterator[str]:
        """Yield messages for the user at the end of the run.

        Parameters
        ----------
        steps : int
            Number of steps that the run has made.
        best : mapping of str to Any
            What the judgements found of the best generator.
        """
        ...
