"""A run of training: new or taken up where its checkpoint stands, reported, judged, saved, and stopped by signals.

What a step does is in `adversarial`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from hpcres.checkpoint import Checkpoint, load_checkpoint
from hpcres.errors import InputError, Stopped, Unfinished
from hpcres.signals import handling_signals, set_saved
from hpcres.study import Study
from hpcres.study_file import save_study
from hpcres.training.adversarial import Models, Outcome
from hpcres.training.autotune import TooFewSteps, Tuned, as_chosen, autotune, with_recipe
from hpcres.training.distributed import Processes, processes
from hpcres.training.folder import RunFolder, recover, refuse_outputs
from hpcres.training.journal import Journal
from hpcres.training.quality import Judge
from hpcres.training.recipes import Choice, choices
from hpcres.training.samples import LowResCubes, RealSlices
from hpcres.training.threads import Threads
from hpcres.training.visible import Beside, beside
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
    """Train a generator, or resume from the study's checkpoint.

    Under torchrun every process calls this. The generator is saved in `study.checkpoint_path`.

    Parameters
    ----------
    study : Study
        Images, low-res volume, networks and training settings; `autotune` first chooses what it leaves to the machine.
    overwrite : bool
        Train from the start where there is a checkpoint, which is kept until the first one of this run is saved.

    Returns
    -------
    TrainingResult
        Where the checkpoint is, its generator step, and the seconds of training so far.

    Raises
    ------
    InputError
        Before anything is written: study, images, volume or an existing checkpoint do not fit, or training.minutes
        are too few.
    Stopped
        After saving, on SIGINT, SIGTERM, SIGHUP or SIGUSR1.
    Unfinished
        A loss or a weight is no longer finite.
    """
    with processes(study.device, study.training.threads) as group:
        before = _checkpoint_to_resume(study, group, overwrite)
        if before is not None:
            study = with_recipe(study, before)
        first_step, seconds = _progress_of(before)
        if before is not None and _share_done(study, first_step, seconds) >= 1:
            return TrainingResult(str(study.checkpoint_path), first_step, seconds, first_step, True)
        with _prepared(study, group, before, overwrite) as run:
            return run.train()


def _checkpoint_to_resume(study: Study, group: Processes, overwrite: bool) -> Checkpoint | None:
    if group.rank == 0:
        recover(study.folder)
    group.largest(0.0)  # no process reads the folder before it is recovered
    return None if overwrite or not study.checkpoint_path.exists() else _resumable(study)


@contextmanager
def _prepared(study: Study, group: Processes, before: Checkpoint | None, overwrite: bool) -> Iterator[_Run]:
    """Data, settings, networks, folder and journal of a run; folder and journal are closed at the end.

    InputError before anything is written.
    """
    refuse_outputs(study, overwrite, [] if before else study.inputs)
    size_notes = compare_sizes(study, low_res=open_low_res(study.low_res), images=True, reference=True)
    threads = Threads(fixed=study.training.threads is not None)
    tuned, low_res, real, both = _tuned(study, group, threads, before)
    study = tuned.study
    cubes = group.share(study.training.cubes)  # of the chosen recipe
    models = Models(study, group, tuned.chosen)
    if before is not None:
        models.restore(before)
    elif study.training.init_from is not None:
        models.begin_from(study.training.init_from)
    folder = models.folder = RunFolder(study.folder, anew=before is None)
    writes = group.rank == 0
    with folder.prepared(writes):
        if writes:
            save_study(study, "train", folder.path)
        judges = study.training.quality_steps and writes
        judge = Judge(study, low_res, models.operator, real.correction) if judges else None
        columns = [*_COLUMNS[:-1], *(f"fraction_{name}" for name in study.phases), _COLUMNS[-1]]
        quality = ["step", "seconds", *judge.columns] if judge else []
        with closing(Journal(folder if writes else None, columns, quality, _progress_of(before)[0])) as journal:
            opening = _opening(study, group, models, low_res, real, before, tuned)
            compared = both.messages(study, real.reached)
            for message in (*size_notes, *opening, *compared):
                journal.note(message)
            yield _Run(models, cubes, low_res, real, threads, judge, journal, before, overwrite)


def _tuned(
    study: Study, group: Processes, threads: Threads, before: Checkpoint | None
) -> tuple[Tuned, LowResCubes, RealSlices, Beside]:
    """The study with all that it leaves open chosen, and its data; of recipes, the first one that has steps enough."""

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


class _Run:
    """A run whose networks are built, or restored from `before`; it writes its own files."""

    def __init__(
        self, models: Models, cubes: range, low_res: LowResCubes, real: RealSlices, threads: Threads,
        judge: Judge | None, journal: Journal, before: Checkpoint | None, overwrite: bool,
    ) -> None:  # fmt: skip
        self.models, self.study, self.group, self.folder = models, models.study, models.group, models.folder
        self.cubes, self.low_res, self.real, self.threads = cubes, low_res, real, threads
        self.judge, self.journal = judge, journal
        self.first_step, self.seconds_before = _progress_of(before)
        self.how_to_resume = "run it without --overwrite to go on" if overwrite else "run the same command to go on"
        self._reported = self._saved = self._page_written = self.seconds_before
        """Seconds of training at the last report, checkpoint and training.html."""

    def train(self) -> TrainingResult:
        """Every step to the end of the schedule; Stopped after saving, or Unfinished."""
        settings = self.study.training
        with handling_signals("train", self._kept(self.first_step, self.how_to_resume)) as received:
            started, seconds = time.monotonic(), self.seconds_before
            for step in range(self.first_step, settings.steps):
                rate = learning_rate(self.study, _share_done(self.study, step, seconds))
                outcome = self._step(step, rate)
                stop, broken, seconds = self.group.largest(
                    bool(received), not outcome.finite, self.seconds_before + time.monotonic() - started
                )
                if broken:
                    raise Unfinished(
                        f"training: a loss is no longer finite at step {step + 1}; {self._kept(step)}; "
                        "lower training.learning_rate or use precision fp32, and run with --overwrite"
                    )
                done = _share_done(self.study, step + 1, seconds)
                last = done >= 1 or bool(stop)
                if last or seconds - self._reported >= settings.report_seconds:
                    self._report(step + 1, seconds, min(done, 1.0), rate, outcome)
                if settings.quality_steps and (done >= 1 or (step + 1) % settings.quality_steps == 0):
                    self._judge(step + 1, seconds)
                if last or seconds - self._saved >= settings.checkpoint_minutes * 60:
                    self._save(step + 1, seconds, finished=done >= 1, stopping=bool(stop))
                if done >= 1:
                    break
                if stop:
                    raise Stopped(self._stopped(step + 1, received))
            for message in _closing(self.study, self.models, step + 1):
                self.journal.note(message)
        return TrainingResult(str(self.study.checkpoint_path), step + 1, seconds, self.first_step, False)

    def _step(self, step: int, rate: float) -> Outcome:
        self.threads.step_begins()
        outcome = self.models.step(step, self.cubes, self.low_res, self.real, rate)
        if (message := self.threads.step_ends()) is not None:
            self.journal.note(message)
        return outcome

    def _report(self, steps: int, seconds: float, done: float, rate: float, outcome: Outcome) -> None:
        self._reported = seconds
        row = self.models.report(outcome, self.low_res.channels)
        self.journal.report(done, row | {"step": steps, "seconds": seconds, "learning_rate": rate})

    def _judge(self, steps: int, seconds: float) -> None:
        if self.judge is not None:
            self.models.judge(self.judge, steps, seconds, self.low_res, self.real, self.journal)
        self.group.largest(0.0)  # the others wait, or their clocks would part

    def _save(self, steps: int, seconds: float, finished: bool, stopping: bool) -> None:
        self._saved = seconds
        self.models.refuse_broken_weights(steps)
        if self.group.rank == 0:
            self.models.save(steps, seconds, self.low_res, self.real, finished)
            self.folder.take_over()
            set_saved(self._kept(steps, self.how_to_resume))
            # The first page imports matplotlib, which may take longer than a signal allows.
            if finished or (not stopping and seconds - self._page_written >= _PAGE_SECONDS):
                self._page_written = seconds
                self.journal.write_page(f"Training of {self.study.name}")
        self.group.largest(0.0)  # a process that leaves early would take the saving one down with it

    def _stopped(self, steps: int, received: list[int]) -> str:
        name = signal.Signals(received[0]).name if received else "a signal"  # another process received it
        return (
            f"training: stopped by {name} after saving step {steps} to {self.study.checkpoint_path}; "
            f"{self.how_to_resume}"
        )

    def _kept(self, steps: int, how_to_resume: str = "") -> str:
        """The files that are left if the run ends before it saves again; `steps` steps are done."""
        if self.folder.waits:
            return f"the earlier run in {self.study.folder} is kept"
        path = self.study.checkpoint_path
        if not path.exists():
            return "nothing is saved"
        return f"{path} of step {steps} or before is kept{'; ' * bool(how_to_resume)}{how_to_resume}"


def _share_done(study: Study, steps: int, seconds: float) -> float:
    """Share of the schedule after so many steps and seconds, by the nearer of its limits; 1 or more at its end."""
    minutes = study.training.minutes
    return max(steps / study.training.steps, seconds / (60 * minutes) if minutes else 0.0)


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
    old, new = _what_matters(checkpoint.study), _what_matters(as_chosen(study, checkpoint))
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


def _progress_of(checkpoint: Checkpoint | None) -> tuple[int, float]:
    if checkpoint is None:
        return 0, 0.0
    assert checkpoint.training_state is not None
    return checkpoint.step, float(checkpoint.training_state["seconds"])


def _opening(
    study: Study, group: Processes, models: Models, low_res: LowResCubes, real: RealSlices, before: Checkpoint | None,
    tuned: Tuned,
) -> Iterator[str]:  # fmt: skip
    counts = [sum(p.numel() for p in module.parameters()) for module in (models.generator, models.critics)]
    yield (
        f"{group.size} process{'es' * (group.size > 1)} on {group.device.type} with {torch.get_num_threads()} threads "
        f"each; generator {counts[0]:,} weights, critic {counts[1]:,}; scale factor {study.scale_factor}"
    )
    yield from tuned.messages
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
