"""Settings that a study leaves to the machine: precision, and a network for which training.minutes are enough.

These settings are chosen from timings (`trial`) before the first step and saved in the checkpoint. A resumed run keeps
them, on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil, inf
from typing import Any

import torch

from hpcres.checkpoint import Checkpoint
from hpcres.errors import InputError
from hpcres.progress import duration
from hpcres.study import Study
from hpcres.training.data.cubes import LowResCubes
from hpcres.training.data.slices import RealSlices
from hpcres.training.distributed import Processes
from hpcres.training.recipes import Choice
from hpcres.training.threads import WAITING_SHARE, Threads
from hpcres.training.trial import choose_precision, short_trial, step_seconds, with_settings

_CRITICS_ABOVE = 2
"""Largest difference of critic_width and width in a narrowed network, as in configs/fast.yaml."""
_FEW_STEPS = 50
"""A run of at most this many steps, with nothing to choose, is not timed beforehand."""
_SOME_WAITING_SHARE = 0.05
"""Mean share of threads that wait for a core, above which whole steps are also timed with fewer threads."""


@dataclass(frozen=True)
class Tuned:
    """A study whose settings are all chosen.

    Attributes
    ----------
    study : Study
        The study with the chosen settings.
    chosen : dict
        By dotted key, each setting that was chosen here: {"study": its value in the study, "chosen": the value used}.
    messages : list of str
        For the user: what was chosen and why, and how long the run will take.
    """

    study: Study
    chosen: dict[str, dict[str, Any]]
    messages: list[str] = field(default_factory=list)

    def by(self, choice: Choice) -> Tuned:
        """Return a copy with the recipe `choice` added to what was chosen."""
        recipe = {"study": "auto", "chosen": choice.plain}
        message = f"recipe auto is {choice.name}: {choice.why}"
        return replace(self, chosen={"recipe": recipe, **self.chosen}, messages=[message, *self.messages])


class TooFewSteps(InputError):
    """Error: training.minutes do not allow training.least_steps, even with the narrowest network allowed."""


def autotune(
    study: Study, group: Processes, low_res: LowResCubes, real: RealSlices, threads: Threads, before: Checkpoint | None
) -> Tuned:
    """Choose precision, threads and network width for a new run, or take those of the run to resume.

    Collective: all processes choose alike. Parts of a step are timed on throwaway networks for a few seconds.

    Parameters
    ----------
    study : Study
        The study, which may leave settings open.
    group : Processes
        The processes of the run.
    low_res, real : LowResCubes, RealSlices
        Data of the timed steps.
    threads : Threads
        Threads of this process; their number is lowered where other work uses the cores.
    before : Checkpoint or None
        The run to resume, whose settings are kept without any timing.

    Returns
    -------
    Tuned
        The study with all settings chosen, and messages for the user.

    Raises
    ------
    TooFewSteps
        training.minutes are too few for training.least_steps, even with the narrowest network allowed.
    """
    if before is not None:
        return _resumed(study, before)
    settings = study.training
    if settings.precision != "auto" and settings.minutes is None and settings.steps <= _FEW_STEPS:
        return Tuned(study, {})
    chosen: dict[str, dict[str, Any]] = {}
    _, message = threads.trial(group, short_trial(with_settings(study, precision="fp32"), group), WAITING_SHARE)
    messages = [message]
    if settings.precision == "auto":
        precision, bf16_speed = choose_precision(study, group)
        chosen["training.precision"] = {"study": "auto", "chosen": precision}
        study = with_settings(study, precision=precision)
        messages.append(_why_precision(precision, bf16_speed, group))
    seconds, message = threads.trial(group, partial(step_seconds, study, group, low_res, real), _SOME_WAITING_SHARE)
    messages.append(message)
    narrowed = study
    while _too_few(narrowed, seconds) and _may_be_narrower(narrowed):
        narrowed = _narrower(narrowed)
        seconds = step_seconds(narrowed, group, low_res, real)
    if _too_few(narrowed, seconds):
        raise TooFewSteps(_refusal(study, narrowed, seconds, group))
    for key in ("width", "critic_width"):
        given, used = getattr(study.network, key), getattr(narrowed.network, key)
        if given != used:
            chosen[f"network.{key}"] = {"study": given, "chosen": used}
    if narrowed is not study:
        messages.append(_why_narrower(study, narrowed))
    messages.append(_outlook(narrowed, seconds))
    return Tuned(narrowed, chosen, [message for message in messages if message is not None])


def as_chosen(study: Study, before: Checkpoint) -> Study:
    """Return the study with what was chosen when the run of `before` began.

    Parameters
    ----------
    study : Study
        The study as it is now.
    before : Checkpoint
        The run to resume.

    Returns
    -------
    Study
        Each setting that the study still leaves open has the chosen value. A network width has the chosen value if the
        study still gives the width that it gave when the run began.
    """
    chosen = _chosen(before)
    study = with_recipe(study, before)
    network = {}
    for name in ("width", "critic_width"):
        setting = chosen.get(f"network.{name}")
        if setting is not None and getattr(study.network, name) == setting["study"]:
            network[name] = setting["chosen"]
    precision = study.training.precision
    return with_settings(
        study, network, precision=before.study.training.precision if precision == "auto" else precision
    )


def with_recipe(study: Study, before: Checkpoint) -> Study:
    """Return the study with the recipe that was chosen when the run of `before` began.

    The study is returned as it is if it has no recipe to choose or none was chosen.
    """
    recipe = _chosen(before).get("recipe")
    return study if study.recipe is None or recipe is None else Choice(**recipe["chosen"]).applied(study)


def _chosen(before: Checkpoint) -> dict[str, dict[str, Any]]:
    assert before.training_state is not None
    return before.training_state.get("chosen_settings", {})  # none in checkpoints of earlier versions


def _resumed(study: Study, before: Checkpoint) -> Tuned:
    assert before.training_state is not None
    tuned, seconds = as_chosen(study, before), before.training_state["seconds"]
    messages = []
    if study.training.precision == "auto":
        messages.append(f"precision {tuned.training.precision}, as chosen when this run began")
    if tuned.network != study.network:
        messages.append(f"generator width {tuned.network.width}, as chosen when this run began")
    messages.append(_outlook(tuned, seconds / before.step, before.step, seconds))
    return Tuned(tuned, _chosen(before), messages)


def _too_few(study: Study, seconds: float) -> bool:
    """Return whether training.minutes end the run before training.least_steps, at `seconds` per step."""
    settings = study.training
    if settings.minutes is None or settings.init_from is not None:  # trained weights need fewer steps
        return False
    return 60 * settings.minutes / seconds < min(settings.least_steps, settings.steps)


def _may_be_narrower(study: Study) -> bool:
    least = study.network.least_width
    return least is not None and study.network.width > least


def _narrower(study: Study) -> Study:
    width = study.network.width - 1
    return with_settings(
        study, {"width": width, "critic_width": min(study.network.critic_width, width + _CRITICS_ABOVE)}
    )


def _why_precision(name: str, bf16_speed: float, group: Processes) -> str:
    threads = torch.get_num_threads()
    device = "GPU" if group.device.type == "cuda" else f"CPU with {threads} thread{'s' * (threads > 1)}"
    return f"precision {name}: in a trial on this {device}, bf16 had {bf16_speed:.2g} times the speed of fp32"


def _why_narrower(study: Study, narrowed: Study) -> str:
    return (
        f"training.minutes: {study.training.minutes:g} allows fewer than {study.training.least_steps} steps "
        f"(training.least_steps) of a generator of width {study.network.width} on this machine; its width is now "
        f"{narrowed.network.width} and critic_width {narrowed.network.critic_width} (network.least_width allows it)"
    )


def _outlook(study: Study, seconds: float, steps_done: int = 0, seconds_done: float = 0.0) -> str:
    """Return a message for the user: how many steps the run will make at `seconds` per step, and their time."""
    settings = study.training
    left = inf if settings.minutes is None else max(0.0, 60 * settings.minutes - seconds_done)
    steps = min(settings.steps - steps_done, max(1, ceil(min(left / seconds, settings.steps))))
    verb, more = ("took", "more ") if steps_done else ("takes", "")
    total = duration(min(left, steps * seconds))
    message = f"a step {verb} about {duration(seconds)}: about {steps} {more}steps in {total}"
    if steps * seconds > 3600 * study.cluster.train_hours:
        message += (
            f", longer than cluster.train_hours {study.cluster.train_hours:g}; set training.minutes, or add the recipe "
            "for few cores (base: [yours.yaml, hpcres:fast])"
        )
    return message


def _refusal(study: Study, narrowest: Study, seconds: float, group: Processes) -> str:
    settings = study.training
    steps, least = 60 * (settings.minutes or 0) / seconds, min(settings.least_steps, settings.steps)
    narrowed = ", the narrowest that network.least_width allows," if narrowest is not study else ""
    return (
        f"training.minutes: {settings.minutes:g} allows about {steps:.2g} steps of a generator of width "
        f"{narrowest.network.width}{narrowed} at {duration(seconds)} each on this machine; fewer than {least} steps "
        f"(training.least_steps) give no usable generator; set training.minutes to {ceil(least * seconds / 60)} or "
        "more, or add the recipe for few cores (base: [yours.yaml, hpcres:fast])"
        + ("" if group.device.type == "cuda" else ", or use a GPU")
    )
