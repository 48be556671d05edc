"""The result files of a finished volume, of a study or a bare one: metrics.json, transport.json, and the page of both.

Each function opens its inputs, refuses what does not fit, works, and writes. Results of a study go where it says, those
of a bare volume where `output` says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from math import log10
from pathlib import Path
from typing import Any

from hpcres import __version__
from hpcres.errors import InputError, Unfinished
from hpcres.geometry import Periodic, meeting_sides
from hpcres.inputs import Given, is_study, painted_volume, refuse_settings, refuse_voxel_size, study_for, voxel_edges_of
from hpcres.lengths import EdgeLengths, VoxelEdges, cubic
from hpcres.metrics.table import transport_text
from hpcres.outputs import FIELDS, METRICS, PAGE, TRANSPORT, refuse_output
from hpcres.progress import progress_display
from hpcres.signals import end_if_signalled
from hpcres.study import Metrics, Study, SubVolumes
from hpcres.study.file import files_of, load_study, save_study
from hpcres.transport import SCHEMA, FieldStore, Means, describe
from hpcres.transport.options import TransportOptions
from hpcres.transport.results import Ranks, ResultsFile
from hpcres.transport.second_opinion import by_taufactor
from hpcres.volumes.absent import Absent, absent_chunks, absent_chunks_of_study
from hpcres.volumes.files import write_json
from hpcres.volumes.formats import open_volume
from hpcres.volumes.sizes import compare_sizes
from hpcres.volumes.volume import Volume

log = logging.getLogger("hpcres")
Warn = Callable[[Iterable[object]], None]
"""Called with what a user should know before the work begins, such as absent chunks; often with nothing."""


# ---- metrics.json ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Content of metrics.json, lines for the user on voxel sizes, and the file; None if it was not to be written."""

    result: dict[str, Any]
    notes: list[str]
    path: Path | None


@dataclass(frozen=True)
class Workers:
    """The Dask workers that measure.

    Parameters
    ----------
    scheduler : str, optional
        Address or file of a running Dask scheduler; the cores of this machine by default.
    wait : float
        Seconds to wait for new workers once a running scheduler has lost its last.
    """

    scheduler: str | None
    wait: float

    def connect(self) -> AbstractContextManager[Any]:
        """Connect to them."""
        from hpcres.metrics.schedule import connect

        return connect(self.scheduler, worker_wait=self.wait)


@dataclass(frozen=True)
class MetricsOptions:
    """What is measured besides what the study says.

    Parameters
    ----------
    periodic : axes
        Axes along which the volume's two sides meet.
    added, left_out : sequence of str
        Statistics to measure besides the study's, and those not to measure.
    lags : int, optional
        Largest distance of correlations, in voxels.
    """

    periodic: Iterable[str] = ()
    added: Sequence[str] = ()
    left_out: Sequence[str] = ()
    lags: int | None = None

    def chosen(self, own: Metrics) -> Metrics:
        """Return the metrics settings `own` with statistics added and left out, and other lags."""
        which = [name for name in dict.fromkeys([*own.statistics, *self.added]) if name not in self.left_out]
        return own.model_copy(update={"statistics": tuple(which), "lags": self.lags or own.lags})


def write_metrics(given: Given, options: MetricsOptions, workers: Workers, warn: Warn) -> Measured:
    """Measure a study's volume, reference and images, or a bare volume, and write metrics.json.

    Parameters
    ----------
    given : Given
        Source and output.
    options : MetricsOptions
        What is measured.
    workers : Workers
        What measures.
    warn : function
        Called with warnings before the measurement.

    Raises
    ------
    InputError, Stopped, Unfinished
    """
    sides = meeting_sides(options.periodic)
    if is_study(given.source):
        return _measured_study(given, options, sides, workers, warn)
    return _measured_volume(given, options, sides, workers, warn)


def _measured_study(given: Given, options: MetricsOptions, sides: Periodic, workers: Workers, warn: Warn) -> Measured:
    from hpcres.metrics.measure import measure_study

    refuse_voxel_size(given.source, given.voxel_size)
    study = study_for("metrics", given.source, given.settings, given.output)
    study = study.model_copy(update={"metrics": options.chosen(study.metrics)})
    volume = painted_volume(study)
    refuse_output(study.metrics_path, METRICS, inputs=[*study.inputs, volume.path], renewed=True)
    warn(absent := absent_chunks_of_study(study, volume))
    with workers.connect() as client:
        result = measure_study(study, volume, client=client, periodic=sides, command=given.command)
    notes = result.get("notes", [])
    end_if_signalled()
    save_study(study, "metrics")
    return _written(result, notes, study.metrics_path, absent)


def _measured_volume(given: Given, options: MetricsOptions, sides: Periodic, workers: Workers, warn: Warn) -> Measured:
    from hpcres.metrics.measure import Work, header, is_of, measure

    refuse_settings(given.source, given.settings)
    volume, target = open_volume(given.source), Path(given.output) if given.output else None
    edges, notes = voxel_edges_of(volume, given.voxel_size)
    if target is not None:
        same = is_of(target, volume)
        refuse_output(target, METRICS, inputs=[given.source], overwrite=given.overwrite, renewed=same)
        target.absolute().parent.mkdir(parents=True, exist_ok=True)  # the scratch folder of geodesic paths is there
    warn(absent := absent_chunks(volume))
    with workers.connect() as client:
        measured = measure(
            volume,
            Work(client, scratch=target and target.absolute().parent),
            voxel_size=edges,
            periodic=sides,
            statistics=options.chosen(Metrics()),
        )
    return _written({**header(given.command), "volume": measured}, notes, target, absent)


def _written(result: dict[str, Any], notes: list[str], target: Path | None, absent: Iterable[Absent]) -> Measured:
    result["absent_chunks"] = [one.as_json() for one in absent]
    end_if_signalled()
    if target is not None:
        write_json(target, result)
    return Measured(result, notes, target)


# ---- transport.json ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solved:
    """Content of transport.json, and the file; None if it was not to be written."""

    result: dict[str, Any]
    path: Path | None
    unsolved: list[str]
    """Phase and direction of each solve that did not reach `rtol`."""
    rtol: float

    def refuse_unsolved(self) -> None:
        """Raise Unfinished if a solve did not reach `rtol`."""
        if self.unsolved:
            raise Unfinished(
                f"{' and '.join(self.unsolved)}: not solved to `rtol` {self.rtol:g}, so no number is given; all others "
                "are solved. Try a larger `rtol`, conductivities less far apart, or a part of the volume with `crop`"
            )


def write_transport(
    given: Given, options: TransportOptions, *, ranks: Ranks, resume_with: str, show: Callable[[str], None], warn: Warn
) -> Solved:
    """Solve what transport.json lacks, of a study's volume and reference or of a bare volume.

    The file is saved after each solve. A result that it already holds is not solved again. Progress is shown on stderr.

    Parameters
    ----------
    given : Given
        Source and output.
    options : TransportOptions
        They are checked against each other and the volume first.
    ranks : Ranks
        The processes that solve together; rank 0 writes. Every rank calls this function.
    resume_with : str
        How the user resumes after a signal, for the message.
    show : function
        Called with each line of the results, on rank 0.
    warn : function
        Called with warnings before the first solve.

    Returns
    -------
    Solved
        Its `result` is complete on rank 0 only.

    Raises
    ------
    InputError, Stopped
    """
    task = _checked(given, options)
    alone, first, study = ranks.communicator is None, ranks.rank == 0, task.study
    if not alone:
        options.refuse_several_processes()
    header = {"schema": SCHEMA, "hpcres": __version__, "command": given.command, "solver": task.solver}
    results = ResultsFile(task.target, header)
    means = Means(
        threads=options.threads or (None if alone else ranks.cores),
        device=options.open_device(),
        comm=ranks.communicator,
        on_node=ranks.on_node,
        memory=options.memory,
        scratch=task.scratch,
        say=log.info,
    )
    results.resume({} if given.overwrite else ranks.from_first(results.read))
    volumes = [volume for volume in (task.volume, task.reference) if volume is not None]
    absent = ranks.from_first(lambda: absent_chunks(*volumes))
    warn(absent)
    results.content["absent_chunks"] = [one.as_json() for one in absent]
    if study is not None:
        results.content["published"] = [p.model_dump(mode="json") for p in study.reference.published]
    shown = _Shown(task, options.check, show)
    field = None if options.field is None else FieldStore(options.field, given.overwrite)
    unsolved = []
    with _Iterations(options.rtol, alone=alone, shown=first) as report:

        def solve(which: str, volume: Volume, field: FieldStore | None) -> None:
            solve_one = partial(
                options.solve,
                volume,
                phases=study.phases if study else None,
                voxel_size=task.voxel_size,
                means=means,
                field=field,
                report=report,
            )
            shown.volume, show_result = volume, shown if first else lambda *_: None
            unsolved.extend(
                results.solve_missing(which, volume, solve_one, ranks=ranks, show=show_result, resume_with=resume_with)
            )

        solve("volume", task.volume, field)
        if field is not None and first:
            show(f"fields written to {field.path}")
        if task.reference is not None:
            if first:
                show(f"reference {task.reference.path}:")
            solve("reference", task.reference, None)
    if first:
        if study is not None:
            save_study(study, "tortuosity")
        results.save()
    return Solved(results.content, task.target, unsolved, options.rtol)


class _Iterations:
    """Shows the iterations of each solve, and the time left of it by the error that is still to be lost."""

    def __init__(self, rtol: float, *, alone: bool, shown: bool) -> None:
        self._total, self._alone, self._shown = -log10(rtol), alone, shown
        self._display, self._solve = ExitStack(), ("", "")

    def __enter__(self) -> _Iterations:
        return self

    def __exit__(self, *_: object) -> None:
        self._display.close()

    def __call__(self, phase: str, direction: str, iterations: int, d_rel: float, error: float) -> None:
        if self._alone:  # several ranks must stop at the same place, which is between two solves
            end_if_signalled()
        if (phase, direction) != self._solve:
            self._display.close()
            self._solve = phase, direction
            display = progress_display(f"{phase}, {direction}", self._total, shown=self._shown)
            self._show = self._display.enter_context(display)
        decades = min(max(0.0, -log10(max(error, 1e-300))), 0.99 * self._total)
        self._show(decades, f"iteration {iterations}, D_rel {d_rel:.6g}, estimated error {error:.1e}")


@dataclass(frozen=True)
class _Task:
    """Inputs, output, and what the solver is told of them."""

    study: Study | None
    volume: Volume
    reference: Volume | None
    voxel_size: EdgeLengths
    notes: list[str]
    target: Path | None
    scratch: Path
    solver: dict[str, Any]


def _checked(given: Given, options: TransportOptions) -> _Task:
    """Open the inputs and refuse options that do not fit them or each other."""
    source = given.source
    study = study_for("tortuosity", source, given.settings, given.output) if is_study(source) else None
    if study is None:
        refuse_settings(source, given.settings)
    else:
        refuse_voxel_size(source, given.voxel_size)
    options.refuse_phases()
    reference: Volume | None = None
    target: Path | None
    if study is not None:
        volume, target = painted_volume(study), study.transport_path
        edges, notes = cubic(study.high_res.voxel_size), compare_sizes(study, high_res=[volume], reference=True)
        if study.reference.volume is not None:
            reference = open_volume(study.reference.volume)
    else:
        volume, target = open_volume(source), Path(given.output) if given.output else None
        edges, notes = voxel_edges_of(volume, given.voxel_size)
    inputs = [volume.path, *(study.inputs if study else ())]
    if target is not None:
        refuse_output(target, TRANSPORT, inputs=inputs, renewed=True)
    if options.field is not None:
        refuse_output(options.field, FIELDS, inputs=[*inputs, target], overwrite=given.overwrite)
    scratch, voxel_size = options.scratch_for(target), edges.lengths(source)[0]
    options.refuse_check([volume] if reference is None else [volume, reference], voxel_size)
    solver = describe(options.rtol, options.sides, options.block)
    return _Task(study, volume, reference, voxel_size, notes, target, scratch, solver)


@dataclass
class _Shown:
    """Shows results, one on each line; before the first one notes on the voxel size, and the solver."""

    task: _Task
    check: str | None
    show: Callable[[str], None]
    volume: Volume | None = None
    """The volume that the results are of."""
    begun: bool = False
    skipped: bool = False

    def __call__(self, result: dict[str, Any], solved_before: bool) -> None:
        if not self.begun:
            for note in self.task.notes:
                log.warning("%s", note)
            self.show(f"{self.task.solver['method']}; stops at {self.task.solver['stop']}")
        if solved_before and not self.skipped:
            self.show(f"{self.task.target}: results in this file are not solved again; `overwrite` solves all of them")
        self.begun, self.skipped = True, self.skipped or solved_before
        self.show(transport_text(result))
        if self.check and result["state"] == "converged":
            assert self.volume is not None
            self.show(f"  {by_taufactor(self.volume, result)}")


# ---- report.html -------------------------------------------------------------------------------------------


def write_report(
    given: Given, workers: Workers, *, metrics: str | None = None, transport: str | None = None, warn: Warn
) -> tuple[Path, list[str]]:
    """Write the HTML page of a study, or of a bare volume, which is measured if no metrics.json is found.

    Parameters
    ----------
    given : Given
        Source and output: the folder of the study's results, or the page of a bare volume, report.html by default.
    workers : Workers
        What measures a bare volume.
    metrics, transport : str, optional
        Result files of a bare volume; metrics.json and transport.json beside the page by default.
    warn : function
        Called with the arrays that lack chunks.

    Returns
    -------
    path : Path
        The page.
    notes : list of str
        Lines for the user, on voxel sizes.

    Raises
    ------
    InputError, Stopped, Unfinished
    """
    end_if_signalled()
    source = given.source
    if is_study(source):
        refuse_voxel_size(source, given.voxel_size)
        if file := metrics or transport:
            raise InputError(f"{file}: a study has its own results; drop `metrics` and `transport`")
        study = load_study(source, given.settings, given.output)
        return write_study_report(study, files=files_of(source), warn=warn), []
    from hpcres.metrics.measure import Sampling, Work, header, measure
    from hpcres.reports.write import find_result, report_volume

    refuse_settings(source, given.settings)
    volume, target = open_volume(source), Path(given.output or "report.html")
    named, notes = voxel_edges_of(volume, given.voxel_size) if given.voxel_size else (None, [])
    refuse_output(target, PAGE, inputs=[source, metrics, transport], renewed=True)
    warn(absent_chunks(volume))

    def found(stage: str, file: str | None, edges: VoxelEdges | None) -> dict[str, Any] | None:
        path = Path(file) if file else target.parent / f"{stage}.json"
        result = find_result(volume, stage, path, file is not None, edges)
        if result is not None:
            log.info("%s from %s", stage, path)
        return result

    result, solved = found("metrics", metrics, named), found("transport", transport, None)
    if result is None:
        edges, notes = (named, notes) if named else voxel_edges_of(volume, None)
        with workers.connect() as client:
            measured = measure(
                volume, Work(client), voxel_size=edges, sampling=Sampling(SubVolumes()), statistics=Metrics()
            )
        result = {**header(given.command), "volume": measured}
    return report_volume(volume, result, target, solved), notes


def write_study_report(study: Study, *, files: Iterable[str | Path] = (), warn: Warn) -> Path:
    """Write the HTML page of a study from what the other stages wrote.

    Parameters
    ----------
    study : Study
        Study of the page.
    files : iterable of paths
        Files that the study was read from, which the page must not replace.
    warn : function
        Called with the arrays that lack chunks.

    Returns
    -------
    Path
        report.html in the study's folder.

    Raises
    ------
    InputError
    """
    from hpcres.reports.write import report_study

    made = (study.labels_path, study.metrics_path, study.transport_path, *files)
    refuse_output(study.report_path, PAGE, inputs=[*study.inputs, *made], renewed=True)
    volume = painted_volume(study)
    warn(absent_chunks_of_study(study, volume))
    return report_study(study, volume)
