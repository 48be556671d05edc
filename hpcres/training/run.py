"""A run of training: new or taken up where its checkpoint stands, reported, judged, saved, and stopped by signals.

What a step does is in `adversarial`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from hpcres.checkpoint import Checkpoint, load_checkpoint
from hpcres.errors import InputError, Stopped, Unfinished
from hpcres.signals import handling_signals, set_saved
from hpcres.study import Study
from hpcres.study_file import save_study
from hpcres.training.adversarial import Models
from hpcres.training.distributed import Processes, processes
from hpcres.training.fitting import Fitted, as_before, fit
from hpcres.training.folder import RunFolder, recover, refuse_outputs
from hpcres.training.journal import Journal
from hpcres.training.quality import Judge
from hpcres.training.samples import LowResCubes, RealSlices
from hpcres.training.threads import Threads
from hpcres.volumes.phases import open_low_res
from hpcres.volumes.sizes import compare_sizes

_COLUMNS = [
    "step", "seconds", "critic_loss", "wasserstein", "gradient_penalty", "generator_loss", "voxel_loss",
    "learning_rate", "low_res_agreement",
]  # fmt: skip
_PAGE_SECONDS = 60
"""training.html takes a second to draw, so a run that saves often does not draw it each time."""
_MAY_CHANGE = {
    "steps", "minutes", "threads", "report_seconds", "checkpoint_minutes", "quality_steps", "keep", "init_from",
    "compile", "match_fractions", "least_steps",
}  # fmt: skip
"""Training settings that a resumed run may have different from the run it continues."""
_ASTRAY = 0.1
"""Of the low-res voxels, the disagreement with the best generator from which on something is wrong with a training."""


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended. `resumed_step` is where it took up an earlier run, 0 for a new one."""

    checkpoint: str
    step: int
    seconds: float
    resumed_step: int
    already_finished: bool


def train(study: Study, *, overwrite: bool = False) -> TrainingResult:
    """Train what `study` asks for, or go on where its checkpoint stands; the checkpoint is in study.checkpoint_path.

    Raises InputError before anything is written where study, images, volume or an existing checkpoint do not fit;
    Stopped after saving on SIGINT, SIGTERM, SIGHUP or SIGUSR1; Unfinished where a loss is no longer finite.
    """
    settings = study.training
    with processes(study.device, settings.threads) as group, ExitStack() as ending:
        cubes = group.share(settings.cubes)
        if group.rank == 0:
            recover(study.folder)
        group.largest(0.0)  # nobody reads what is not yet in its place
        before = None if overwrite or not study.checkpoint_path.exists() else _resumable(study)
        budget = settings.minutes * 60 if settings.minutes else float("inf")
        first, seconds_before = _place_of(before)
        if before is not None and (first >= settings.steps or seconds_before >= budget):
            return TrainingResult(str(study.checkpoint_path), first, seconds_before, first, True)
        notes = compare_sizes(study, low_res=open_low_res(study.low_res), images=True, reference=True)
        low_res, real = LowResCubes(study), RealSlices(study, group.device)
        threads = Threads(fixed=settings.threads is not None)
        fitted = fit(study, group, low_res, real, threads, before)
        study = fitted.study
        models = Models(study, group, fitted.record)
        if before is not None:
            models.restore(before)
        elif settings.init_from is not None:
            models.begin_from(settings.init_from)
        refuse_outputs(study, overwrite, [] if before else study.inputs)
        run = models.run = RunFolder(study.folder, anew=before is None)
        ending.enter_context(run.prepared(group.rank == 0))
        if group.rank == 0:
            save_study(study, "train", run.path)
        judge = Judge(study, low_res, models.operator) if settings.quality_steps and group.rank == 0 else None
        columns = [*_COLUMNS[:-1], *(f"fraction_{name}" for name in study.phases), _COLUMNS[-1]]
        journal = Journal(
            run if group.rank == 0 else None, columns,
            ["step", "seconds", *judge.columns] if judge else [], first,
        )  # fmt: skip
        try:
            for message in (*notes, *_opening(study, group, models, low_res, real, before, fitted)):
                journal.note(message)
            again = "run it without --overwrite to go on" if overwrite else "run the same command to go on"
            with handling_signals("train", _kept(study, run, first, again)) as received:
                started = time.monotonic()
                reported = saved = paged = seconds = seconds_before
                done = 0.0
                for step in range(first, settings.steps):
                    begun = max(step / settings.steps, seconds / budget)
                    rate = learning_rate(study, begun)
                    threads.step_begins()
                    outcome = models.step(step, cubes, low_res, real, rate)
                    if (said := threads.step_ends()) is not None:
                        journal.note(said)
                    stop, broken, seconds = group.largest(
                        bool(received), not outcome.finite, seconds_before + time.monotonic() - started
                    )
                    if broken:
                        raise Unfinished(
                            f"training: a loss is no longer finite at step {step + 1}; {_kept(study, run, step)}; "
                            "lower training.learning_rate or use precision fp32, and run with --overwrite"
                        )
                    done = max((step + 1) / settings.steps, seconds / budget)
                    if done >= 1 or stop or seconds - reported >= settings.report_seconds:
                        reported = seconds
                        row = models.report(outcome, low_res.channels)
                        row |= {"step": step + 1, "seconds": seconds, "learning_rate": rate}
                        journal.report(min(done, 1.0), row)
                    if settings.quality_steps and (done >= 1 or (step + 1) % settings.quality_steps == 0):
                        if judge is not None:
                            models.judge(judge, step + 1, seconds, low_res, real, journal)
                        group.largest(0.0)  # the others wait, or their clocks would part
                    if done >= 1 or stop or seconds - saved >= settings.checkpoint_minutes * 60:
                        saved = seconds
                        models.refuse_broken_weights(step + 1)
                        if group.rank == 0:
                            models.save(step + 1, seconds, low_res, real, finished=done >= 1)
                            run.take_over()
                            set_saved(_kept(study, run, step + 1, again))
                            if done >= 1 or stop or seconds - paged >= _PAGE_SECONDS:
                                paged = seconds
                                journal.write_page(f"Training of {study.name}")
                        group.largest(0.0)  # a process that leaves early would take the saving one down with it
                    if done >= 1:
                        break
                    if stop:
                        name = signal.Signals(received[0]).name if received else "a signal"
                        raise Stopped(
                            f"training: stopped by {name} after saving step {step + 1} to "
                            f"{study.checkpoint_path}; {again}"
                        )
                for message in _closing(study, models, step + 1):
                    journal.note(message)
                return TrainingResult(str(study.checkpoint_path), step + 1, seconds, first, False)
        finally:
            journal.close()


def learning_rate(study: Study, done: float) -> float:
    """Constant for the first half of the run, then linear down to the final share of it; `done` is 0 to 1."""
    settings = study.training
    decay = max(0.0, 2 * done - 1) * (1 - settings.final_learning_rate)
    return settings.learning_rate * (1 - decay)


def _resumable(study: Study) -> Checkpoint:
    """The study's checkpoint, where it is one of the same training."""
    path = study.checkpoint_path
    checkpoint = load_checkpoint(path)
    if checkpoint.training_state is None:
        raise InputError(f"{path}: holds no training state to go on from; use --overwrite or another --output")
    old, new = _what_matters(checkpoint.study), _what_matters(as_before(study, checkpoint))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise InputError(
                f"{path}: was trained with {key} {old.get(key, 'unset')}, the study now says {new.get(key, 'unset')}; "
                "use --overwrite to train anew, or another --output"
            )
    return checkpoint


def _what_matters(study: Study) -> dict[str, Any]:
    """Every setting that shapes training, by its dotted key."""
    sections = {"seed", "scale_factor", "high_res", "low_res", "imaging", "network", "training", "phantom"}
    flat: dict[str, Any] = {}

    def add(key: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                add(f"{key}.{name}" if key else str(name), item)
        elif isinstance(value, list):
            add(key, dict(enumerate(value)))
        else:
            flat[key] = value

    exclude = {"training": _MAY_CHANGE, "network": {"least_width"}}
    add("", study.plain(include=sections, exclude=exclude, exclude_none=True))
    return flat


def _place_of(checkpoint: Checkpoint | None) -> tuple[int, float]:
    if checkpoint is None:
        return 0, 0.0
    assert checkpoint.training_state is not None
    return checkpoint.step, float(checkpoint.training_state["seconds"])


def _kept(study: Study, run: RunFolder, step: int, again: str = "") -> str:
    """What is there where a run ends in its tracks, before or after the step that is given."""
    if run.waits:
        return f"the earlier run in {study.folder} is kept"
    if not study.checkpoint_path.exists():
        return "nothing is saved"
    return f"{study.checkpoint_path} of step {step} or before is kept{'; ' * bool(again)}{again}"


def _opening(
    study: Study, group: Processes, models: Models, low_res: LowResCubes, real: RealSlices, before: Checkpoint | None,
    fitted: Fitted,
) -> Iterator[str]:  # fmt: skip
    counts = [sum(p.numel() for p in module.parameters()) for module in (models.generator, models.critics)]
    yield (
        f"{group.size} process{'es' * (group.size > 1)} on {group.device.type} with {torch.get_num_threads()} threads "
        f"each; generator {counts[0]:,} weights, critic {counts[1]:,}; scale factor {study.scale_factor}"
    )
    yield from fitted.messages
    origin, asked = models.init_from, study.training.init_from
    if before is None and origin is not None:
        yield (
            f"beginning from step {origin['step']} of {origin['path']} (weights {origin['sha256'][:12]}…), phases "
            f"{', '.join(origin['phases'])} there for {', '.join(study.phases)} here; made anew: "
            f"{', '.join(origin['made_anew']) or 'nothing'}"
        )
    if before is not None:
        yield f"going on from step {before.step} of {before.path}"
        if asked is not None and (origin is None or origin["path"] != os.path.abspath(asked)):
            began = f"from {origin['path']}" if origin else "from random weights"
            yield f"this run began {began}, so training.init_from {asked} is not read; --overwrite begins from it"
        assert before.training_state is not None
        if before.training_state["processes"] != group.size:
            yield (
                f"it ran on {before.training_state['processes']} processes before, now on {group.size}: the same "
                "samples, sums rounded otherwise"
            )
    if low_res.unknown_share:
        yield f"{low_res.unknown_share:.2%} of the low-res volume is unknown, and left to the generator"
    for phase in real.missing_phases():
        yield f"warning: no high-res image shows phase {study.phases[phase]}, so none will be painted"


def _closing(study: Study, models: Models, steps: int) -> Iterator[str]:
    """What a finished run of so many steps should be known for."""
    warm_up = study.training.warm_up_steps
    if study.training.init_from is None and steps < 3 * warm_up:
        yield (
            f"only {steps} steps, {min(steps, warm_up)} of them warm-up: the result will not look like the images; "
            "allow more time, or set training.threads to the cores that are free"
        )
    best = models.best or {}
    if best.get("disagreement", 0.0) > _ASTRAY:
        yield (
            f"the best generator, of step {best['step']}, disagrees with the low-res volume in "
            f"{best['disagreement']:.0%} of its voxels: training went astray or was too short; try more "
            "training.warm_up_steps, a smaller network.width or a lower training.learning_rate"
        )
