"""The loop of every training: begin or resume, report, judge, save, and stop on signals.

A resumed run goes on from its checkpoint. The trainer (`trainer.Trainer`), which the study's family makes, defines what
a step does.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hpcres.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from hpcres.conditions import conditions_volume
from hpcres.errors import InputError, Stopped, Unfinished
from hpcres.families import family_of
from hpcres.old_names import with_new_result_names
from hpcres.signals import handling_signals, set_saved
from hpcres.study import Study
from hpcres.study.file import save_study
from hpcres.training.distributed import Processes, processes
from hpcres.training.folder import RunFolder, recover, refuse_outputs
from hpcres.training.journal import Journal
from hpcres.training.threads import Threads
from hpcres.training.trainer import Trainer
from hpcres.volumes.sizes import compare_sizes

_PAGE_SECONDS = 60
"""Least time between two pages, in seconds. training.html takes a second to draw, so a run that saves often does not
draw it each time."""


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes
    ----------
    checkpoint : str
        Path of the checkpoint.
    step : int
        Number of generator steps done.
    seconds : float
        Seconds of training so far, those of an earlier run that was resumed included.
    resumed_step : int
        Step from which an earlier run was resumed, 0 for a new run.
    already_finished : bool
        Whether the earlier run had finished, so that no step was made.
    """

    checkpoint: str
    step: int
    seconds: float
    resumed_step: int
    already_finished: bool


def train(study: Study, *, overwrite: bool = False, live: bool = False) -> TrainingResult:
    """Train a generator, or resume from the study's checkpoint.

    Under torchrun every process calls this. The generator is saved in `study.checkpoint_path`.

    Parameters
    ----------
    study : Study
        Images, low-res volume, networks and training settings. `autotune` first chooses what it leaves to the machine.
    overwrite : bool
        Whether to train from the start if there is a checkpoint. That checkpoint is kept until the first one of this
        run is saved.
    live : bool
        Whether to show a table that is renewed, if stderr is a terminal. Else lines go to the logger hpcres.train.

    Returns
    -------
    TrainingResult
        Where the checkpoint is, its generator step, and the seconds of training so far.

    Raises
    ------
    InputError
        Before anything is written: study, images, volume or an existing checkpoint do not fit, or training.minutes are
        too few.
    Stopped
        After saving, on SIGINT, SIGTERM, SIGHUP or SIGUSR1.
    Unfinished
        A loss or a weight is no longer finite.
    """
    with processes(study.device, study.training.threads) as group:
        before = _checkpoint_to_resume(study, group, overwrite)
        first_step, seconds = _progress_of(before)
        if before is not None and _share_done(_as_begun(study, before), first_step, seconds) >= 1:
            return TrainingResult(str(study.checkpoint_path), first_step, seconds, first_step, True)
        with _prepared(study, group, before, overwrite, live) as run:
            return run.train()


def _checkpoint_to_resume(study: Study, group: Processes, overwrite: bool) -> Checkpoint | None:
    if group.rank == 0:
        recover(study.folder)
    group.largest(0.0)  # no process reads the folder before it is recovered
    return None if overwrite or not study.checkpoint_path.exists() else _resumable(study)


def _as_begun(study: Study, before: Checkpoint) -> Study:
    """Return the study with what was chosen when the run of `before` began.

    A setting has the chosen value if the study still leaves it open.
    """
    return family_of(study.network.family).as_begun(study, before)


@contextmanager
def _prepared(study: Study, group: Processes, before: Checkpoint | None, overwrite: bool, live: bool) -> Iterator[_Run]:
    """Prepare data, settings, networks, folder and journal of a run, and close folder and journal at the end.

    InputError is raised before anything is written.
    """
    refuse_outputs(study, overwrite, [] if before else study.inputs)
    size_notes = compare_sizes(study, low_res=conditions_volume(study), images=True, reference=True)
    threads = Threads(fixed=study.training.threads is not None)
    trainer: Trainer = family_of(study.network.family).trainer(study, group, threads, before)
    study = trainer.study
    folder = RunFolder(study.folder, anew=before is None)
    writes = group.rank == 0
    with folder.prepared(writes):
        if writes:
            save_study(study, "train", folder.path)
        columns = ["step", "seconds", *trainer.losses, "learning_rate", *trainer.measures]
        judges = study.training.quality_steps and writes
        quality = ["step", "seconds", *trainer.quality_columns()] if judges else []
        run_folder, first_step = folder if writes else None, _progress_of(before)[0]
        with closing(Journal(run_folder, columns, quality, first_step, trainer.shown, live)) as journal:
            for message in (*size_notes, *_opening(trainer, group, before, asked=study.training.init_from)):
                journal.note(message)
            yield _Run(trainer, group, folder, threads, journal, before, overwrite)


class _Run:
    """A run whose networks are built, or restored from `before`. It writes its own files."""

    def __init__(
        self,
        trainer: Trainer,
        group: Processes,
        folder: RunFolder,
        threads: Threads,
        journal: Journal,
        before: Checkpoint | None,
        overwrite: bool,
    ) -> None:
        self.trainer, self.study, self.group, self.folder = trainer, trainer.study, group, folder
        self.threads, self.journal = threads, journal
        self.first_step, self.seconds_before = _progress_of(before)
        best = None if before is None else (before.training_state or {}).get("best")
        self.best: dict[str, Any] | None = with_new_result_names(best)
        """Step and judgement of the generator with the best score so far."""
        self.how_to_resume = "run it without overwriting to go on" if overwrite else "run the same command to go on"
        self._reported = self._saved = self._page_written = self.seconds_before
        """Seconds of training at the last report, checkpoint and training.html."""

    def train(self) -> TrainingResult:
        """Make every step to the end of the schedule.

        Stopped is raised after saving, Unfinished if a loss or a weight is no longer finite.
        """
        settings = self.study.training
        with handling_signals("train", self._kept(self.first_step, self.how_to_resume)) as received:
            started, seconds = time.monotonic(), self.seconds_before
            for step in range(self.first_step, settings.steps):
                rate = learning_rate(self.study, _share_done(self.study, step, seconds))
                finite = self._step(step, rate)
                stop, broken, seconds = self.group.largest(
                    bool(received), not finite, self.seconds_before + time.monotonic() - started
                )
                if broken:
                    raise Unfinished(
                        f"training: a loss is no longer finite at step {step + 1}; {self._kept(step)}; "
                        "lower training.learning_rate or use precision fp32, and run with `overwrite`"
                    )
                done = _share_done(self.study, step + 1, seconds)
                last = done >= 1 or bool(stop)
                if last or seconds - self._reported >= settings.report_seconds:
                    self._report(step + 1, seconds, min(done, 1.0), rate)
                if settings.quality_steps and (done >= 1 or (step + 1) % settings.quality_steps == 0):
                    self._judge(step + 1, seconds)
                if last or seconds - self._saved >= settings.checkpoint_minutes * 60:
                    self._save(step + 1, seconds, finished=done >= 1, stopping=bool(stop))
                if done >= 1:
                    break
                if stop:
                    raise Stopped(self._stopped(step + 1, received))
            for message in self.trainer.closing(step + 1, self.best or {}):
                self.journal.note(message)
        return TrainingResult(str(self.study.checkpoint_path), step + 1, seconds, self.first_step, False)

    def _step(self, step: int, rate: float) -> bool:
        self.threads.step_begins()
        finite = self.trainer.step(step, rate)
        if (message := self.threads.step_ends()) is not None:
            self.journal.note(message)
        return finite

    def _report(self, steps: int, seconds: float, done: float, rate: float) -> None:
        self._reported = seconds
        row = {"step": steps, "seconds": seconds, "learning_rate": rate}
        self.journal.report(done, self.trainer.report() | row)

    def _judge(self, steps: int, seconds: float) -> None:
        """Evaluate the generator that would be saved now, note the result, and keep it in best.pt if it is the best."""
        if self.group.rank == 0:
            generator, found, labels = self.trainer.evaluate()
            is_best = self.best is None or found["score"] < self.best["score"]
            if is_best:
                save_checkpoint(
                    self.folder.best,
                    generator=generator,
                    study=self.study,
                    step=steps,
                    init_from=self.trainer.init_from,
                )
                self.best = {"step": steps, **found}
            self.journal.judged({"step": steps, "seconds": seconds, **found}, labels, is_best)
        self.group.largest(0.0)  # the others wait, or their clocks would part

    def _save(self, steps: int, seconds: float, finished: bool, stopping: bool) -> None:
        self._saved = seconds
        self._refuse_broken_weights(steps)
        if self.group.rank == 0:
            best = finished and self.study.training.keep == "best"
            generator = load_checkpoint(self.folder.best).generator if best else self.trainer.to_save()
            state = {"seconds": seconds, "processes": self.group.size, "best": self.best, **self.trainer.state()}
            save_checkpoint(
                self.folder.checkpoint,
                generator=generator,
                study=self.study,
                step=steps,
                training_state=state,
                init_from=self.trainer.init_from,
            )
            self.folder.take_over()
            set_saved(self._kept(steps, self.how_to_resume))
            # The first page imports matplotlib, which may take longer than a signal allows.
            if finished or (not stopping and seconds - self._page_written >= _PAGE_SECONDS):
                self._page_written = seconds
                self.journal.write_page(f"Training of {self.study.name}")
        self.group.largest(0.0)  # a process that leaves early would take the saving one down with it

    def _refuse_broken_weights(self, step: int) -> None:
        """Raise Unfinished if a weight is not finite.

        This happens on every process alike, since all hold the same weights.
        """
        for module in self.trainer.modules.values():
            for name, tensor in module.state_dict().items():
                if not torch.isfinite(tensor).all():
                    raise Unfinished(
                        f"training: weight {name} is no longer finite at step {step}, so it was not saved; lower "
                        "training.learning_rate and run with `overwrite`"
                    )

    def _stopped(self, steps: int, received: list[int]) -> str:
        name = signal.Signals(received[0]).name if received else "a signal"  # another process received it
        return (
            f"training: stopped by {name} after saving step {steps} to {self.study.checkpoint_path}; "
            f"{self.how_to_resume}"
        )

    def _kept(self, steps: int, how_to_resume: str = "") -> str:
        """Return which files are left if the run ends before it saves again, after `steps` steps."""
        if self.folder.waits:
            return f"the earlier run in {self.study.folder} is kept"
        path = self.study.checkpoint_path
        if not path.exists():
            return "nothing is saved"
        return f"{path} of step {steps} or before is kept{'; ' * bool(how_to_resume)}{how_to_resume}"


def _share_done(study: Study, steps: int, seconds: float) -> float:
    """Return the share of the schedule that is done after so many steps and seconds.

    The nearer of its limits, steps or minutes, counts. The share is 1 or more at the end.
    """
    minutes = study.training.minutes
    return max(steps / study.training.steps, seconds / (60 * minutes) if minutes else 0.0)


def learning_rate(study: Study, done: float) -> float:
    """Return the learning rate at a point of the run.

    It is constant for the first half of the run. It then falls linearly to its final share,
    training.final_learning_rate.

    Parameters
    ----------
    study : Study
        The study, which sets the rate and its final share.
    done : float
        Share of the run that is done, 0 to 1.

    Returns
    -------
    float
        The learning rate.
    """
    settings = study.training
    decay = max(0.0, 2 * done - 1) * (1 - settings.final_learning_rate)
    return settings.learning_rate * (1 - decay)


def _resumable(study: Study) -> Checkpoint:
    """Return the study's checkpoint, or raise InputError if it is not one of the same training."""
    path = study.checkpoint_path
    checkpoint = load_checkpoint(path)
    if checkpoint.training_state is None:
        raise InputError(f"{path}: holds no training state to go on from; use `overwrite` or another `output`")
    if checkpoint.family != study.network.family:
        raise InputError(
            f"{path}: was trained with network.family {checkpoint.family}, the study now says {study.network.family}; "
            "use `overwrite` to train anew, or another `output`"
        )
    old, new = _what_matters(checkpoint.study), _what_matters(_as_begun(study, checkpoint))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise InputError(
                f"{path}: was trained with {key} {old.get(key, 'unset')}, the study now says {new.get(key, 'unset')}; "
                "use `overwrite` to train anew, or another `output`"
            )
    return checkpoint


def _what_matters(study: Study) -> dict[str, Any]:
    """Return every setting that shapes training, by its dotted key."""
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

    exclude = {"training": study.training.may_change, "network": study.network.may_change}
    add("", study.plain(include=sections, exclude=exclude, exclude_none=True))
    return flat


def _progress_of(checkpoint: Checkpoint | None) -> tuple[int, float]:
    if checkpoint is None:
        return 0, 0.0
    assert checkpoint.training_state is not None
    return checkpoint.step, float(checkpoint.training_state["seconds"])


def _opening(trainer: Trainer, group: Processes, before: Checkpoint | None, asked: str | None) -> Iterator[str]:
    """Yield messages on how the run begins; `asked` is the study's training.init_from."""
    weights = [f"{name} {sum(p.numel() for p in m.parameters()):,}" for name, m in trainer.modules.items()]
    weights[0] += " weights"
    yield (
        f"{group.size} process{'es' * (group.size > 1)} on {group.device.type} with {torch.get_num_threads()} threads "
        f"each; {', '.join(weights)}; scale factor {trainer.study.scale_factor}"
    )
    yield from trainer.choices
    origin = trainer.init_from
    if before is None and origin is not None:
        yield (
            f"beginning from step {origin['step']} of {origin['path']} (weights {origin['sha256'][:12]}…), phases "
            f"{', '.join(origin['phases'])} there for {', '.join(trainer.study.phases)} here; made anew: "
            f"{', '.join(origin['made_anew']) or 'nothing'}"
        )
    if before is not None:
        yield f"going on from step {before.step} of {before.path}"
        if asked is not None and (origin is None or origin["path"] != os.path.abspath(asked)):
            began = f"from {origin['path']}" if origin else "from random weights"
            yield f"this run began {began}, so training.init_from {asked} is not read; `overwrite` begins from it"
        assert before.training_state is not None
        if before.training_state["processes"] != group.size:
            yield (
                f"it ran on {before.training_state['processes']} processes before, now on {group.size}: the same "
                "samples, sums rounded otherwise"
            )
    yield from trainer.notes()
