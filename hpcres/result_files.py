"""The result files of a finished volume, of a study or a bare one: metrics.json, transport.json, and the page of both.

Each function opens its inputs, refuses what does not fit, works, and writes. Results of a study go where it says, those
of a bare volume where `output` says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hpcres import __version__
from hpcres.errors import InputError, Unfinished
from hpcres.geometry import AXES, meeting_sides
from hpcres.inputs import is_study, painted_volume, refuse_settings, refuse_voxel_size, study_for, voxel_edges_of
from hpcres.lengths import Spacing, VoxelEdges, cubic
from hpcres.metrics.table import transport_text
from hpcres.outputs import FIELDS, METRICS, PAGE, TRANSPORT, refuse_output
from hpcres.signals import end_if_signalled
from hpcres.study import Metrics, Study, SubVolumes
from hpcres.study_file import files_of, load_study, save_study
from hpcres.transport import SCHEMA, describe
from hpcres.transport.options import TransportOptions
from hpcres.transport.results import Ranks, ResultsFile, solve_missing
from hpcres.transport.second_opinion import by_taufactor
from hpcres.volumes.absent import absent_chunks, absent_chunks_of_study
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


def write_metrics(
    source: str,
    *,
    settings: Sequence[str] = (),
    output: str | None = None,
    scheduler: str | None = None,
    worker_wait: float,
    voxel_size: str | None = None,
    periodic: Iterable[str] = (),
    added: Sequence[str] = (),
    left_out: Sequence[str] = (),
    lags: int | None = None,
    overwrite: bool = False,
    command: str,
    warn: Warn,
) -> Measured:
    """Measure a study's volume, reference and images, or a bare volume, and write metrics.json.

    Parameters
    ----------
    source : str
        A study file, or a label volume of any format.
    settings, output
        As in `hpcres.train`; of a bare volume `output` is the file to write, or None.
    scheduler : str, optional
        Address or file of a running Dask scheduler; the cores of this machine by default.
    worker_wait : float
        Seconds to wait for new workers once a running scheduler has lost its last.
    voxel_size : str, optional
        Of a bare volume, in place of the file's own.
    periodic : axes
        Axes along which the volume's two sides meet.
    added, left_out : sequence of str
        Statistics to measure besides the study's, and those not to measure.
    lags : int, optional
        Largest distance of correlations, in voxels.
    overwrite : bool
        Replace the metrics of another bare volume.
    command : str
        The command, for the provenance of the result.
    warn : function
        Called with warnings before the measurement.

    Raises
    ------
    InputError, Stopped, Unfinished
    """
    from hpcres.metrics.measure import header, is_of, measure, measure_study
    from hpcres.metrics.schedule import connect

    sides = meeting_sides(periodic)
    if is_study(source):
        refuse_voxel_size(source, voxel_size)
        study = study_for("metrics", source, settings, output)
        study = study.model_copy(update={"metrics": _chosen(study.metrics, added, left_out, lags)})
        volume = painted_volume(study)
        target: Path | None = study.metrics_path
        refuse_output(study.metrics_path, METRICS, inputs=[*study.inputs, volume.path], renewed=True)
        warn(absent := absent_chunks_of_study(study, volume))
        with connect(scheduler, worker_wait=worker_wait) as client:
            result = measure_study(study, volume, client=client, periodic=sides, command=command)
        notes = result.get("notes", [])
        end_if_signalled()
        save_study(study, "metrics")
    else:
        refuse_settings(source, settings)
        volume, target = open_volume(source), Path(output) if output else None
        edges, notes = voxel_edges_of(volume, voxel_size)
        if target is not None:
            refuse_output(target, METRICS, inputs=[source], overwrite=overwrite, renewed=is_of(target, volume))
            target.absolute().parent.mkdir(parents=True, exist_ok=True)  # the scratch folder of geodesic paths is there
        warn(absent := absent_chunks(volume))
        with connect(scheduler, worker_wait=worker_wait) as client:
            measured = measure(
                volume,
                client=client,
                voxel_size=edges,
                settings=SubVolumes(count=0),
                periodic=sides,
                statistics=_chosen(Metrics(), added, left_out, lags),
                scratch=target and target.absolute().parent,
            )
        result = {**header(command), "volume": measured}
    result["absent_chunks"] = [one.as_json() for one in absent]
    end_if_signalled()
    if target is not None:
        write_json(target, result)
    return Measured(result, notes, target)


def _chosen(own: Metrics, added: Sequence[str], left_out: Sequence[str], lags: int | None) -> Metrics:
    """Return the metrics settings `own` with statistics added and left out, and other lags."""
    which = [name for name in dict.fromkeys([*own.statistics, *added]) if name not in left_out]
    return own.model_copy(update={"statistics": tuple(which), "lags": lags or own.lags})


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
    source: str,
    options: TransportOptions,
    *,
    ranks: Ranks,
    settings: Sequence[str] = (),
    output: str | None = None,
    voxel_size: str | None = None,
    overwrite: bool = False,
    command: str,
    resume_with: str,
    show: Callable[[str], None],
    progress: Callable[[str], None],
    warn: Warn,
) -> Solved:
    """Solve what transport.json lacks, of a study's volume and reference or of a bare volume.

    The file is saved after each solve. A result that it already holds is not solved again.

    Parameters
    ----------
    source, settings, output, voxel_size, command, warn
        As in `write_metrics`.
    options : TransportOptions
        They are checked against each other and the volume first.
    ranks : Ranks
        The processes that solve together; rank 0 writes. Every rank calls this function.
    overwrite : bool
        Solve all of them anew.
    resume_with : str
        How the user resumes after a signal, for the message.
    show : function
        Called with each line of the results, on rank 0.
    progress : function
        Called with a line after each iteration, on every rank.

    Returns
    -------
    Solved
        Its `result` is complete on rank 0 only.

    Raises
    ------
    InputError, Stopped
    """
    task = _checked(source, options, settings, output, voxel_size, overwrite)
    if ranks.communicator is not None:
        options.refuse_several_processes()
    header = {"schema": SCHEMA, "hpcres": __version__, "command": command, "solver": task.solver}
    results = ResultsFile(task.target, header)
    gpu = options.open_device()
    results.resume({} if overwrite else ranks.from_first(results.read))
    volumes = [volume for volume in (task.volume, task.reference) if volume is not None]
    absent = ranks.from_first(lambda: absent_chunks(*volumes))
    warn(absent)
    results.content["absent_chunks"] = [one.as_json() for one in absent]
    study, alone, first = task.study, ranks.communicator is None, ranks.rank == 0
    if study is not None:
        results.content["published"] = [p.model_dump(mode="json") for p in study.reference.published]

    def report(phase: str, direction: str, iterations: int, d_rel: float, error: float) -> None:
        if alone:  # several ranks must stop at the same place, which is between two solves
            end_if_signalled()
        progress(f"{phase}, {direction}: iteration {iterations}, D_rel {d_rel:.6g}, estimated error {error:.1e}")

    shown = _Shown(task, task.volume, options.check, show)
    solve = partial(
        solve_missing,
        results,
        ranks=ranks,
        show=shown if first else lambda *_: None,
        resume_with=resume_with,
        phases=study.phases if study else None,
        only=options.phase,
        conductivity=options.conductivity,
        directions=options.direction or AXES,
        spacing=task.spacing,
        periodic=options.sides,
        crop=options.crop,
        rtol=options.rtol,
        threads=options.threads or (None if alone else ranks.cores),
        profile=options.profile,
        report=report,
        memory=options.memory,
        scratch=task.scratch,
        say=log.info,
        estimate=options.block,
        device=gpu,
    )
    unsolved = solve("volume", task.volume, field=options.field, overwrite=overwrite)
    if options.field is not None and first:
        show(f"fields written to {options.field}")
    if task.reference is not None:
        if first:
            show(f"reference {task.reference.path}:")
        shown.volume = task.reference
        unsolved += solve("reference", task.reference)
    if first:
        if study is not None:
            save_study(study, "tortuosity")
        results.save()
    return Solved(results.content, task.target, unsolved, options.rtol)


@dataclass(frozen=True)
class _Task:
    """Inputs, output, and what the solver is told of them."""

    study: Study | None
    volume: Volume
    reference: Volume | None
    spacing: Spacing
    notes: list[str]
    target: Path | None
    scratch: Path
    solver: dict[str, Any]


def _checked(
    source: str,
    options: TransportOptions,
    settings: Sequence[str],
    output: str | None,
    voxel_size: str | None,
    overwrite: bool,
) -> _Task:
    """Open the inputs and refuse options that do not fit them or each other."""
    study = study_for("tortuosity", source, settings, output) if is_study(source) else None
    if study is None:
        refuse_settings(source, settings)
    else:
        refuse_voxel_size(source, voxel_size)
    options.refuse_phases()
    reference: Volume | None = None
    target: Path | None
    if study is not None:
        volume, target = painted_volume(study), study.transport_path
        edges, notes = cubic(study.high_res.voxel_size), compare_sizes(study, high_res=[volume], reference=True)
        if study.reference.volume is not None:
            reference = open_volume(study.reference.volume)
    else:
        volume, target = open_volume(source), Path(output) if output else None
        edges, notes = voxel_edges_of(volume, voxel_size)
    inputs = [volume.path, *(study.inputs if study else ())]
    if target is not None:
        refuse_output(target, TRANSPORT, inputs=inputs, renewed=True)
    if options.field is not None:
        refuse_output(options.field, FIELDS, inputs=[*inputs, target], overwrite=overwrite)
    scratch, spacing = options.scratch_for(target), edges.lengths(source)[0]
    options.refuse_check([volume] if reference is None else [volume, reference], spacing)
    solver = describe(options.rtol, options.sides, options.block)
    return _Task(study, volume, reference, spacing, notes, target, scratch, solver)


@dataclass
class _Shown:
    """Shows results, one on each line; before the first one notes on the voxel size, and the solver."""

    task: _Task
    volume: Volume
    """The volume that the results are of."""
    check: str | None
    show: Callable[[str], None]
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
            self.show(f"  {by_taufactor(self.volume, result)}")


# ---- report.html -------------------------------------------------------------------------------------------


def write_report(
    source: str,
    *,
    settings: Sequence[str] = (),
    output: str | None = None,
    scheduler: str | None = None,
    worker_wait: float,
    voxel_size: str | None = None,
    metrics: str | None = None,
    transport: str | None = None,
    command: str,
    warn: Warn,
) -> tuple[Path, list[str]]:
    """Write the HTML page of a study, or of a bare volume, which is measured if no metrics.json is found.

    Parameters
    ----------
    source, settings, scheduler, worker_wait, voxel_size, command, warn
        As in `write_metrics`.
    output : str, optional
        Folder of the study's results, or the page of a bare volume; report.html by default.
    metrics, transport : str, optional
        Result files of a bare volume; metrics.json and transport.json beside the page by default.

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
    if is_study(source):
        refuse_voxel_size(source, voxel_size)
        if file := metrics or transport:
            raise InputError(f"{file}: a study has its own results; drop `metrics` and `transport`")
        return write_study_report(load_study(source, settings, output), files=files_of(source), warn=warn), []
    from hpcres.metrics.measure import header, measure
    from hpcres.metrics.schedule import connect
    from hpcres.reports.write import find_result, report_volume

    refuse_settings(source, settings)
    volume, target = open_volume(source), Path(output or "report.html")
    given, notes = voxel_edges_of(volume, voxel_size) if voxel_size else (None, [])
    refuse_output(target, PAGE, inputs=[source, metrics, transport], renewed=True)
    warn(absent_chunks(volume))

    def found(stage: str, named: str | None, edges: VoxelEdges | None) -> dict[str, Any] | None:
        file = Path(named) if named else target.parent / f"{stage}.json"
        result = find_result(volume, stage, file, named is not None, edges)
        if result is not None:
            log.info("%s from %s", stage, file)
        return result

    result, solved = found("metrics", metrics, given), found("transport", transport, None)
    if result is None:
        edges, notes = (given, notes) if given else voxel_edges_of(volume, None)
        with connect(scheduler, worker_wait=worker_wait) as client:
            measured = measure(volume, client=client, voxel_size=edges, settings=SubVolumes(), statistics=Metrics())
        result = {**header(command), "volume": measured}
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
