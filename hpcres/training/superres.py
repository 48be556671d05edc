"""The training of the family superres: Algorithm 1 of Dahari et al. 2022 on a low-res volume and high-res images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from hpcres.checkpoint import Checkpoint
from hpcres.networks.generator import Generator
from hpcres.study import Study
from hpcres.training.autotune import TooFewSteps, Tuned, autotune, with_recipe
from hpcres.training.data.cubes import LowResCubes
from hpcres.training.data.slices import RealSlices
from hpcres.training.distributed import Processes
from hpcres.training.evaluation import Evaluator
from hpcres.training.journal import Shown
from hpcres.training.recipes import Choice, choices
from hpcres.training.threads import Threads
from hpcres.training.visible import Beside, beside
from hpcres.training.wgan import Models, Outcome

_ASTRAY = 0.1
"""Share of the low-res voxels with which the best generator disagrees, above which something is wrong with a
training."""


class SuperResTrainer:
    """The trainer (trainer.Trainer) of a super-resolution generator and its critics."""

    losses = ("critic_loss", "wasserstein", "gradient_penalty", "generator_loss", "voxel_loss")
    shown = (
        Shown("wasserstein", "wasserstein", ".3g"),
        Shown("voxel loss", "voxel_loss", ".2g"),
        Shown("agreement", "low_res_agreement", ".2%"),
        Shown("fractions off", "fraction_error", ".3f", False),
        Shown("areas", "area_error", ".1%", False),
        Shown("TPB", "tpb", ".5f", False),
        Shown("TPB of the images", "tpb_images", ".5f", False),
        Shown("disagreement", "disagreement", ".2%", False),
        Shown("box disagreement", "box_disagreement", ".2%"),
        Shown("visible fractions off", "visible_fraction_error", ".3f"),
    )

    def __init__(self, study: Study, group: Processes, threads: Threads, before: Checkpoint | None) -> None:
        if before is not None:
            study = with_recipe(study, before)
        tuned, self._low_res, self._real, self._beside = _tuned(study, group, threads, before)
        self.study, self._group, self._chosen = tuned.study, group, tuned.chosen
        self.choices = tuned.messages
        self._cubes = group.share(self.study.training.cubes)  # of the chosen recipe
        self.models = Models(self.study, group)
        if before is not None:
            self.models.restore(before)
        elif self.study.training.init_from is not None:
            self.models.begin_from(self.study.training.init_from)
        self.measures = [*(f"fraction_{name}" for name in self.study.phases), "low_res_agreement"]
        self.modules: dict[str, nn.Module] = {"generator": self.models.generator, "critic": self.models.critics}
        self._outcome: Outcome | None = None

    @property
    def init_from(self) -> dict[str, Any] | None:
        """Where the run began, if not from random weights."""
        return self.models.init_from

    def notes(self) -> Iterator[str]:
        """Yield messages on unknown voxels, on phases that no image shows, and on the visible phases."""
        if self._low_res.unknown_share:
            yield f"{self._low_res.unknown_share:.2%} of the low-res volume is unknown, and left to the generator"
        for phase in self._real.missing_phases():
            yield f"warning: no high-res image shows phase {self.study.phases[phase]}, so none will be painted"
        yield from self._beside.messages(self.study, self._real.reached)

    def step(self, number: int, rate: float) -> bool:
        """Run the critic steps and the generator step, and return whether every loss of this process is finite."""
        self._outcome = self.models.step(number, self._cubes, self._low_res, self._real, rate)
        return self._outcome.finite

    def report(self) -> dict[str, float]:
        """Return losses and measures of the last step, as means over all processes."""
        assert self._outcome is not None
        return self.models.report(self._outcome, self._low_res.channels)

    def to_save(self) -> Generator:
        """Return the generator that is saved."""
        return self.models.recalibrated(self._low_res, self._real)

    @cached_property
    def _judge(self) -> Evaluator:
        return Evaluator(self.study, self._low_res, self.models.operator, self._real.correction)

    def quality_columns(self) -> list[str]:
        """Return the names of what `evaluate` finds."""
        return self._judge.columns

    def evaluate(self) -> tuple[Generator, dict[str, float], np.ndarray]:
        """Return the generator that would be saved now, what its evaluation finds, and a slice of labels."""
        generator = self.models.recalibrated(self._low_res, self._real)
        return generator, *self._judge.evaluate(generator, self._group.device)

    def state(self) -> dict[str, Any]:
        """Return the state of the networks and optimizers, and the chosen settings."""
        return {**self.models.state(), "chosen_settings": self._chosen}

    def closing(self, steps: int, best: Mapping[str, Any]) -> Iterator[str]:
        """Yield warnings of a run that was too short, and of a disagreement with the low-res volume."""
        warm_up = self.study.training.warm_up_steps
        if self.study.training.init_from is None and steps < 3 * warm_up:
            yield (
                f"only {steps} steps, {min(steps, warm_up)} of them warm-up: the result will not look like the images; "
                "allow more time, or set training.threads to the cores that are free"
            )
        if best.get("disagreement", 0.0) > _ASTRAY:
            yield (
                f"the best generator, of step {best['step']}, disagrees with the low-res volume in "
                f"{best['disagreement']:.0%} of its voxels: training went astray or was too short; try more "
                "training.warm_up_steps, a smaller network.width or a lower training.learning_rate"
            )


def _tuned(
    study: Study, group: Processes, threads: Threads, before: Checkpoint | None
) -> tuple[Tuned, LowResCubes, RealSlices, Beside]:
    """Return the study with all that it leaves open chosen, and its data.

    If the recipe is open, the first recipe that allows enough steps is chosen.
    """

    def data(study: Study) -> tuple[LowResCubes, RealSlices, Beside]:
        low_res = LowResCubes(study)
        both = beside(study, low_res.fractions)
        return low_res, RealSlices(study, group.device, both.corrected(study)), both

    def chosen(choice: Choice) -> tuple[Tuned, LowResCubes, RealSlices, Beside]:
        applied = choice.applied(study)
        found = data(applied)
        return autotune(applied, group, *found[:2], threads, None).by(choice), *found

    if study.recipe is None:
        found = data(study)
        return autotune(study, group, *found[:2], threads, before), *found
    *longer, last = choices(study)
    for choice in longer:
        with suppress(TooFewSteps):
            return chosen(choice)
    return chosen(last)
