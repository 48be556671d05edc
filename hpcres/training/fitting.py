"""What a recipe leaves to the machine: precision, and a network that the minutes are enough for.

It is chosen once, before a run begins, kept in the checkpoint, and the same ever after, wherever the run goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from math import ceil, inf
from typing import Any

import torch

from hpcres.checkpoint import Checkpoint
from hpcres.errors import InputError
from hpcres.study import Study
from hpcres.training.distributed import Processes
from hpcres.training.samples import LowResCubes, RealSlices
from hpcres.training.threads import Threads
from hpcres.training.trial import Precision, choose_precision, short_trial, step_seconds, with_settings

_CRITICS_ABOVE = 2
"""A narrowed generator has critics whose width is this much above its own, as in configs/fast.yaml."""
_FEW_STEPS = 50
"""A run of no more is its own trial."""
_STARVED_A_LITTLE = 0.05
"""Threads without a core, on average over a trial, from which on it is repeated with one before a run is refused."""


@dataclass(frozen=True)
class Fitted:
    """The study that is trained, with nothing left open; `record` is what the machine had a say in, as dotted key:
    {"asked": …, "chosen": …}, and `messages` say why."""

    study: Study
    record: dict[str, dict[str, Any]]
    messages: list[str] = field(default_factory=list)


def fit(
    study: Study, group: Processes, low_res: LowResCubes, real: RealSlices, threads: Threads, before: Checkpoint | None
) -> Fitted:
    """Choose for a new run, or as for the one that goes on from `before`. Collective; a few seconds.

    InputError where training.minutes are too few for training.least_steps, however narrow the network may become.
    """
    if before is not None:
        fitted = _as_before(study, before)
        if _worth_a_trial(fitted.study):
            seconds = step_seconds(fitted.study, group, low_res, real)
            fitted.messages.append(_outlook(fitted.study, seconds, before.step, _state_of(before)["seconds"]))
        return fitted
    record: dict[str, dict[str, Any]] = {}
    messages: list[str] = []
    if not _worth_a_trial(study):
        return Fitted(study, record, messages)
    if (message := threads.try_out(short_trial(with_settings(study, precision="fp32"), group))) is not None:
        messages.append(message)
    estimate: float | None = None
    threads.step_begins()
    if study.training.precision == "auto":
        precision = choose_precision(study, group)
        estimate = precision.seconds
        record["training.precision"] = {"asked": "auto", "chosen": precision.name}
        study = with_settings(study, precision=precision.name)
        messages.append(_why_precision(precision, group))
    seconds = step_seconds(study, group, low_res, real, estimate)
    if _too_few(study, seconds) and group.largest(threads.starved())[0] > _STARVED_A_LITTLE:
        seconds, message = threads.try_one(partial(step_seconds, study, group, low_res, real), seconds)
        if message is not None:
            messages.append(message)
    narrowed = study
    while _too_few(narrowed, seconds) and _may_be_narrower(narrowed):
        narrowed = _narrower(narrowed)
        seconds = step_seconds(narrowed, group, low_res, real)
    if _too_few(narrowed, seconds):
        raise InputError(_refusal(study, narrowed, seconds, group))
    for key in ("width", "critic_width"):
        asked, chosen = getattr(study.network, key), getattr(narrowed.network, key)
        if asked != chosen:
            record[f"network.{key}"] = {"asked": asked, "chosen": chosen}
    if narrowed is not study:
        messages.append(_why_narrower(study, narrowed))
    messages.append(_outlook(narrowed, seconds))
    return Fitted(narrowed, record, messages)


def as_before(study: Study, before: Checkpoint) -> Study:
    """The study with what was chosen when the run of `before` began, where it leaves the same open."""
    record = _record_of(before)
    network = {}
    for name in ("width", "critic_width"):
        chosen = record.get(f"network.{name}")
        if chosen is not None and getattr(study.network, name) == chosen["asked"]:
            network[name] = chosen["chosen"]
    precision = study.training.precision
    return with_settings(
        study, network, precision=before.study.training.precision if precision == "auto" else precision
    )


def _record_of(before: Checkpoint) -> dict[str, dict[str, Any]]:
    return _state_of(before).get("fitted", {})  # none by an earlier version


def _state_of(before: Checkpoint) -> dict[str, Any]:
    assert before.training_state is not None
    return before.training_state


def _as_before(study: Study, before: Checkpoint) -> Fitted:
    fitted = as_before(study, before)
    messages = []
    if study.training.precision == "auto":
        messages.append(f"precision {fitted.training.precision}, as this run began, whatever is faster on this machine")
    if fitted.network != study.network:
        messages.append(f"a network of width {fitted.network.width}, as this run began")
    return Fitted(fitted, _record_of(before), messages)


def _worth_a_trial(study: Study) -> bool:
    """A run of few steps, with nothing left open, is its own trial."""
    settings = study.training
    return settings.precision == "auto" or settings.minutes is not None or settings.steps > _FEW_STEPS


def _too_few(study: Study, seconds: float) -> bool:
    """Whether the minutes, and not the steps asked for, end a run before it is worth anything."""
    settings = study.training
    if settings.minutes is None or settings.init_from is not None:  # another material's weights need fewer
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


def _why_precision(precision: Precision, group: Processes) -> str:
    ratio = precision.ratio
    threads = torch.get_num_threads()
    device = "GPU" if group.device.type == "cuda" else f"CPU with {threads} thread{'s' * (threads > 1)}"
    times = f"{ratio:.2f} times" if ratio >= 1 else f"{ratio:.2g} of"
    return f"precision {precision.name}: in a trial on this {device}, bf16 had {times} the speed of fp32"


def _why_narrower(study: Study, narrowed: Study) -> str:
    return (
        f"{study.training.minutes:g} minutes are too few for {study.training.least_steps} steps with a network of "
        f"width {study.network.width} here, so its width is {narrowed.network.width} and that of its critics "
        f"{narrowed.network.critic_width}, as network.least_width allows"
    )


def _outlook(study: Study, seconds: float, done: int = 0, spent: float = 0.0) -> str:
    """How many steps there will be after those done, and how long they take; `seconds` is of a step, `spent` so far."""
    settings = study.training
    left = inf if settings.minutes is None else max(0.0, 60 * settings.minutes - spent)
    steps = min(settings.steps - done, max(1, ceil(min(left / seconds, settings.steps))))
    said = f"a step takes about {_duration(seconds)} here: about {steps} {'more ' * (done > 0)}steps in "
    said += _duration(min(left, steps * seconds))
    if steps * seconds > 3600 * study.cluster.train_hours:
        said += (
            f", longer than cluster.train_hours {study.cluster.train_hours:g}; training.minutes sets a limit, and a "
            "recipe for few cores (configs/fast.yaml) makes steps of a hundredth of this network's work"
        )
    return said


def _refusal(study: Study, narrowest: Study, seconds: float, group: Processes) -> str:
    settings = study.training
    steps, least = 60 * (settings.minutes or 0) / seconds, min(settings.least_steps, settings.steps)
    needed = ceil(least * seconds / 60)
    network = f"width {narrowest.network.width}" + (", its narrowest," if narrowest is not study else "")
    return (
        f"training.minutes: {settings.minutes:g} are enough for about {steps:.2g} steps of a network of {network} at "
        f"{_duration(seconds)} each on this machine, and fewer than {least} (training.least_steps) make no usable "
        f"generator; set training.minutes to {needed} or more, or take a recipe for few cores (base: [yours.yaml, "
        "fast.yaml], from configs/)" + ("" if group.device.type == "cuda" else ", or a GPU")
    )


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


