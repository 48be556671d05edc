"""The command `hpcres tortuosity`: options, their checks, and the lines that it prints; transport/ has the solver."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpcres import __version__
from hpcres.cli.console import command_line, echo, echo_notes, progress_lines, warn
from hpcres.cli.inputs import is_study, painted_volume, refuse_settings, refuse_voxel_size, study_for, voxel_edges_of
from hpcres.cli.options import (
    Stage,
    axis_choice,
    overwrite_option,
    parse_bytes,
    parse_conductivities,
    study_options,
    volume_argument,
    voxel_size_option,
)
from hpcres.errors import InputError, Unfinished
from hpcres.lengths import VoxelEdges, cubic
from hpcres.outputs import FIELDS, TRANSPORT, refuse_output
from hpcres.signals import end_if_signalled
from hpcres.study import Study
from hpcres.study_file import save_study

if TYPE_CHECKING:
    from hpcres.inference.ranks import Ranks
    from hpcres.transport.results import ResultsFile
    from hpcres.volumes.volume import Volume


@dataclass(frozen=True)
class _Options:
    """The options as click gives them, by the names of the command's parameters."""

    source: str
    settings: tuple[str, ...]
    output: str | None
    voxel_size: str | None
    only: tuple[str, ...]
    directions: tuple[str, ...]
    crop: str | None
    rtol: float
    conductivities: tuple[str, ...]
    periodic: tuple[str, ...]
    profile: bool
    field: str | None
    threads: int | None
    estimate: str | None
    memory: str | None
    scratch: str | None
    device: str | None
    check: str | None
    overwrite: bool
    as_json: bool


@click.command(cls=Stage)
@volume_argument
@study_options
@voxel_size_option
@click.option("--phase", "only", multiple=True, metavar="NAME", help="Only this phase, or label; repeatable.")
@click.option("--direction", "directions", type=axis_choice, multiple=True, help="All three by default.")
@click.option("--crop", metavar="Z0:Z1,Y0:Y1,X0:X1", help="Only this part of the volume.")
@click.option(
    "--rtol",
    default=0.001,
    show_default=True,
    type=click.FloatRange(1e-6, 1),
    help="Stop when the estimated error of D_rel is under this share of it.",
)
@click.option(
    "--conductivity",
    "conductivities",
    multiple=True,
    metavar="NAME=VALUE",
    help="Let these phases, or labels, conduct together; repeatable.",
)
@click.option("--periodic", type=axis_choice, multiple=True, help="Sides that meet; repeatable.")
@click.option("--profile", is_flag=True, help="Also tau of every layer along the direction.")
@click.option("--field", metavar="STORE.ZARR", help="Write potential and flux density here.")
@click.option("--threads", type=click.IntRange(1), help="All cores by default; the result does not depend on it.")
@click.option(
    "--estimate",
    type=click.Choice(("blocks",)),
    help="No solution: blocks of 64³ voxels alone, as a resistor network. Measured -100 to +9 % off, and no faster.",
)
@click.option("--memory", metavar="SIZE", help="Solve out of core where the process would hold more, such as 4GiB.")
@click.option(
    "--scratch", metavar="DIR", help="Scratch storage for --memory, best on a fast local disk; beside the output."
)
@click.option("--device", metavar="cuda[:N]", help="Solve on a GPU, after set-up on the cores.")
@click.option(
    "--check", type=click.Choice(("taufactor",)), help="Solve with TauFactor too, in memory, and print its numbers."
)
@overwrite_option
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON.")
def tortuosity(**given: Any) -> None:
    """Relative diffusivity and tortuosity factor of whole phases, exactly, with their error.

    \b
    hpcres tortuosity                                   every phase and direction; the reference too
    hpcres tortuosity electrode.tiff --phase 0 --direction z
    hpcres tortuosity --conductivity pore=1 --conductivity gel=0.1
    hpcres tortuosity --crop 0:256,0:256,0:256          a part of the volume
    mpirun -n 4 hpcres tortuosity                       in the memory of several nodes
    hpcres tortuosity --memory 4GiB --scratch /local    in little memory, on scratch storage
    hpcres tortuosity --device cuda                     on a GPU
    hpcres tortuosity v.tif --phase 1 --check taufactor   beside TauFactor

    Needs about 15 bytes a voxel where 40 % conduct, together over all ranks; with --memory down to 4, and 15 of
    scratch storage. Writes <output>/transport.json after each solve; for a bare volume only where --output names a
    file. Results of other phases, directions and settings in that file are kept, and a result that it already holds is
    not solved again.
    """
    from hpcres.inference.ranks import join_ranks
    from hpcres.transport import SCHEMA
    from hpcres.transport.results import ResultsFile

    options = _Options(**given)
    task = _checked(options)
    with join_ranks() as ranks:
        _refuse_several_processes(options, ranks)
        header = {"schema": SCHEMA, "hpcres": __version__, "command": command_line(), "solver": task.solver}
        results = ResultsFile(task.target, header)
        unsolved = _solve(options, task, results, ranks)
        if ranks.rank == 0:
            _finish(options, task, results)
    if unsolved:
        raise Unfinished(
            f"{' and '.join(unsolved)}: not solved to --rtol {options.rtol:g}, so no number is given; all others are "
            "solved. Try a larger --rtol, conductivities less far apart, or a part of the volume with --crop"
        )


@dataclass(frozen=True)
class _Task:
    """The checked options: inputs, output and settings of the solver."""

    study: Study | None
    volume: Volume
    reference: Volume | None
    edges: VoxelEdges
    notes: list[str]
    target: Path | None
    conductivity: dict[str, float] | None
    memory: int | None
    """Bytes that the process may hold."""
    scratch: Path
    solver: dict[str, Any]


def _checked(options: _Options) -> _Task:
    """Open the inputs and refuse options that do not fit them or each other."""
    from hpcres.transport import BLOCK_VOXELS, describe
    from hpcres.volumes.formats import open_volume
    from hpcres.volumes.sizes import compare_sizes

    source, output = options.source, options.output
    study = study_for("tortuosity", source, options.settings, output) if is_study(source) else None
    if study is None:
        refuse_settings(source, options.settings)
    else:
        refuse_voxel_size(source, options.voxel_size)
    conductivity = parse_conductivities(options.conductivities)
    if options.only and conductivity:
        raise InputError(f"--phase {options.only[0]}: --conductivity already names the phases; drop one of them")
    reference: Volume | None = None
    target: Path | None
    if study is not None:
        volume, target = painted_volume(study), study.transport_path
        edges, notes = cubic(study.high_res.voxel_size), compare_sizes(study, high_res=[volume], reference=True)
        if study.reference.volume is not None:
            reference = open_volume(study.reference.volume)
    else:
        volume, target = open_volume(source), Path(output) if output else None
        edges, notes = voxel_edges_of(volume, options.voxel_size)
    inputs = [volume.path, *(study.inputs if study else ())]
    if target is not None:
        refuse_output(target, TRANSPORT, inputs=inputs, renewed=True)
    if options.field is not None:
        refuse_output(options.field, FIELDS, inputs=[*inputs, target], overwrite=options.overwrite)
    memory, scratch = _out_of_core(options, target)
    _refuse_check(options, [one for one in (volume, reference) if one is not None], edges)
    solver = describe(options.rtol, _periodic(options), BLOCK_VOXELS if options.estimate else None)
    return _Task(study, volume, reference, edges, notes, target, conductivity, memory, scratch, solver)


def _out_of_core(options: _Options, target: Path | None) -> tuple[int | None, Path]:
    """Return how many bytes to hold at most, None without --memory, and the folder for scratch storage."""
    memory = parse_bytes("--memory", options.memory)
    refused = {
        "--memory": options.memory,
        "--device": options.device,
        "--profile": options.profile,
        "--field": options.field,
        "--periodic": options.periodic,
    }
    if options.estimate and (other := next((name for name, given in refused.items() if given), None)):
        raise InputError(f"--estimate blocks: takes no {other}, which needs a solution of the whole volume; drop one")
    if options.scratch is not None and memory is None:
        raise InputError(f"--scratch {options.scratch}: is for solving out of core; give --memory too")
    if memory is not None and options.device is not None:
        raise InputError(
            f"--device {options.device}: a GPU holds all of the volume, --memory a part of it; drop one of them"
        )
    if options.scratch is not None:
        scratch = Path(options.scratch)
    else:
        scratch = target.absolute().parent if target else Path.cwd()
        if memory is not None:
            scratch.mkdir(parents=True, exist_ok=True)
    if memory is not None and not (scratch.is_dir() and os.access(scratch, os.W_OK)):
        raise InputError(f"--scratch {scratch}: is not a folder that can be written; make it, or name another")
    return memory, scratch


def _refuse_check(options: _Options, volumes: Sequence[Volume], edges: VoxelEdges) -> None:
    """Raise InputError for --check if TauFactor cannot solve the volumes, before anything is solved.

    TauFactor solves one phase of cubic voxels with insulated sides, with the whole volume in memory.
    """
    from hpcres.transport import parse_crop
    from hpcres.transport.second_opinion import refuse_taufactor

    if options.check is None:
        return
    refused = {
        "--conductivity": options.conductivities,
        "--periodic": options.periodic,
        "--estimate": options.estimate,
        "--memory": options.memory,
    }
    if other := next((name for name, given in refused.items() if given), None):
        raise InputError(f"--check {options.check}: TauFactor cannot solve with {other}; drop one of them")
    for volume in volumes:
        shape = volume.shape if options.crop is None else parse_crop(options.crop, volume.shape).shape
        refuse_taufactor(volume.path, shape, edges.lengths(options.source)[0], _periodic(options))


def _refuse_several_processes(options: _Options, ranks: Ranks) -> None:
    if ranks.communicator is None:
        return
    given = {"--memory": options.memory, "--estimate blocks": options.estimate, "--device": options.device}
    given["--check taufactor"] = options.check
    if option := next((name for name, value in given.items() if value is not None), None):
        raise InputError(f"{option}: is for one process, and this job has several; drop it, or mpirun")


def _periodic(options: _Options) -> tuple[bool, bool, bool]:
    z, y, x = (axis in options.periodic for axis in "zyx")
    return z, y, x


def _solve(options: _Options, task: _Task, results: ResultsFile, ranks: Ranks) -> list[str]:
    """Solve the results that transport.json lacks, of the volume and of the study's reference.

    Returns
    -------
    list of str
        Phase and direction of each solve that did not converge.
    """
    from hpcres.transport import BLOCK_VOXELS
    from hpcres.transport.results import solve_missing
    from hpcres.volumes.absent import absent_chunks

    alone, first = ranks.communicator is None, ranks.rank == 0
    gpu = None
    if options.device is not None:
        from hpcres.transport.device import find_device

        gpu = find_device(options.device)
    results.resume({} if options.overwrite else ranks.from_first(results.read))
    volumes = [volume for volume in (task.volume, task.reference) if volume is not None]
    absent = ranks.from_first(lambda: absent_chunks(*volumes))
    warn(absent)
    results.content["absent_chunks"] = [one.as_json() for one in absent]
    study = task.study
    if study is not None:
        results.content["published"] = [p.model_dump(mode="json") for p in study.reference.published]
    printer = _Printer(task, options.as_json, options.check)
    solve = partial(
        solve_missing,
        results,
        ranks=ranks,
        show=printer if first else lambda *_: None,
        resume_with=f"run {'it without --overwrite' if options.overwrite else 'the same command'} to go on",
        phases=study.phases if study else None,
        only=options.only,
        conductivity=task.conductivity,
        directions=options.directions or ("z", "y", "x"),
        spacing=task.edges.lengths(options.source)[0],
        periodic=_periodic(options),
        crop=options.crop,
        rtol=options.rtol,
        threads=options.threads or (None if alone else ranks.cores),
        profile=options.profile,
        report=_reporter(alone),
        memory=task.memory,
        scratch=task.scratch,
        say=partial(echo, err=True),
        estimate=BLOCK_VOXELS if options.estimate else None,
        device=gpu,
    )
    unsolved = solve("volume", task.volume, field=options.field, overwrite=options.overwrite)
    if options.field is not None and first:
        echo(f"fields written to {options.field}", err=options.as_json)
    if task.reference is not None:
        if first:
            echo(f"reference {task.reference.path}:", err=options.as_json)
        printer.volume = task.reference
        unsolved += solve("reference", task.reference)
    return unsolved


def _reporter(alone: bool) -> Callable[[str, str, int, float, float], None]:
    """Return a function that is called after each iteration.

    It shows the iteration every few seconds. If the job has only one process, it ends the process on a signal.
    """
    show = progress_lines()

    def report(phase: str, direction: str, iterations: int, d_rel: float, error: float) -> None:
        if alone:  # several ranks must stop at the same place, which is between two solves
            end_if_signalled()
        show(f"{phase}, {direction}: iteration {iterations}, D_rel {d_rel:.6g}, estimated error {error:.1e}")

    return report


@dataclass
class _Printer:
    """Printer of results, one on each line.

    Before the first result it prints the solver and notes on the voxel size.
    """

    task: _Task
    as_json: bool
    check: str | None
    volume: Volume = field(init=False)
    """The volume that the results are of."""
    begun: bool = field(default=False, init=False)
    skipped: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.volume = self.task.volume

    def __call__(self, result: dict[str, Any], solved_before: bool) -> None:
        from hpcres.metrics.table import transport_text

        lines = []
        if not self.begun:
            echo_notes(self.task.notes)
            lines.append(f"{self.task.solver['method']}; stops at {self.task.solver['stop']}")
        if solved_before and not self.skipped:
            lines.append(
                f"{self.task.target}: results in this file are not solved again; --overwrite solves all of them"
            )
        self.begun, self.skipped = True, self.skipped or solved_before
        for line in (*lines, transport_text(result)):
            echo(line, err=self.as_json)
        if self.check and result["state"] == "converged":
            from hpcres.transport.second_opinion import by_taufactor

            echo(f"  {by_taufactor(self.volume, result)}", err=self.as_json)


def _finish(options: _Options, task: _Task, results: ResultsFile) -> None:
    if task.study is not None:
        save_study(task.study, "tortuosity")
    results.save()
    if options.as_json:
        echo(json.dumps(results.content, indent=1, ensure_ascii=False))
    if task.target is not None:
        echo(f"written to {task.target}", err=options.as_json)
