"""The commands: a study and options in, one call, an exit status out.

Exit status: 0 done; 2 the input is wrong; 3 finished, some tiles or chunks failed; 75 stopped by a signal after
saving what can be; anything else is a bug. Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from hpcres import __version__
from hpcres.errors import InputError, Stopped, Unfinished
from hpcres.lengths import VoxelEdges, cubic, parse_voxel_edges
from hpcres.outputs import FIELDS, METRICS, PAGE, STUDY, TRANSPORT, refuse_output
from hpcres.signals import EXIT_STOPPED, end_if_asked, has_said, is_first_rank, keeps, listening, received, stopped_by
from hpcres.study import Metrics, Study, checked_phase_name
from hpcres.study_file import files_of, load_study, save_study, saved_study
from hpcres.terminal import speak_what_it_can

EXIT_INPUT, EXIT_UNFINISHED = 2, 3
_DISK_ERRORS = {
    errno.ENOSPC: "no space left; free some or write elsewhere with --output, then run again",
    errno.EDQUOT: "disk quota reached; free some or write elsewhere with --output, then run again",
    errno.EROFS: "read-only file system; write elsewhere with --output",
    errno.EACCES: "permission denied; check its owner and mode, or write elsewhere with --output",
    errno.EPERM: "not permitted; check its owner and mode, or write elsewhere with --output",
    errno.ENOENT: "no such file or folder; check the path",
    errno.ENOTDIR: "a part of this path is a file, not a folder; check the path",
    errno.EISDIR: "is a folder where a file is due; check the path",
}
_NOT_ON_WINDOWS = ("train", "plan", "infer", "verify")
_Command = TypeVar("_Command", bound=Callable[..., Any])


def main() -> None:
    """Run a command and leave with its exit status. Only rank 0 speaks of errors that every rank sees."""
    # Without a home that can be written, matplotlib warns that it keeps its fonts in a temporary folder.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    speak_what_it_can()
    try:
        with listening("hpcres"):
            commands.main(prog_name="hpcres", standalone_mode=False)
        status = 0
    except click.exceptions.Exit as request:
        status = request.exit_code
    except click.Abort:
        status = 130
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"; see {context.command_path} --help" if context else ""
        status = _complain(error.format_message().rstrip(".") + hint, EXIT_INPUT)
    except InputError as error:
        status = _complain(str(error), EXIT_INPUT)
    except Unfinished as error:
        status = _complain(str(error), EXIT_UNFINISHED)
    except Stopped as error:
        status = _complain(str(error), EXIT_STOPPED)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        status = _complain(f"{error.filename or 'output'}: {_DISK_ERRORS[error.errno]}", EXIT_INPUT)
    has_said(status)
    with suppress(OSError):
        sys.stdout.flush()
    sys.exit(status)


def _echo(text: object, err: bool = False) -> None:
    """click's own would write to an ASCII terminal as if it were another."""
    print(text, file=sys.stderr if err else sys.stdout, flush=True)


def _complain(message: str, status: int) -> int:
    if is_first_rank():
        with suppress(OSError):  # of a terminal that is gone
            _echo("hpcres: " + " ".join(message.split()), err=True)
    return status


class _Stage(click.Command):
    def invoke(self, ctx: click.Context) -> Any:
        with listening(self.name or "hpcres"):
            return super().invoke(ctx)


def _study_options(command: _Command) -> _Command:
    command = click.option(
        "--output", metavar="PATH", help="Write here instead of where the study says."
    )(command)
    return click.option(
        "--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one setting; repeatable."
    )(command)


_study_argument = click.argument("study", metavar="[STUDY]", default="study.yaml", type=click.Path())
_volume_argument = click.argument("source", metavar="[STUDY|VOLUME]", default="study.yaml", type=click.Path())
_tiles = click.option("--tiles", metavar="ZxYxX", help="Tiles per axis; the study's inference.tiles by default.")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace what an earlier run left.")
_voxel_size = click.option(
    "--voxel-size", metavar="LENGTH|Z,Y,X",
    help="Edge of a bare volume's voxel with its unit, 65nm, or three along z, y, x: 2um,250nm,250nm.",
)
_scheduler = click.option(
    "--scheduler",
    metavar="ADDRESS|FILE",
    help="A running Dask scheduler (tcp://host:port or its file); local by default.",
)
_worker_wait = click.option(
    "--worker-wait", type=click.FloatRange(min=0, min_open=True), default=900, metavar="SECONDS", show_default=True,
    help="How long to wait for new workers once a running scheduler has lost its last.",
)  # fmt: skip


def _is_study(source: str) -> bool:
    return Path(source).suffix in (".yaml", ".yml")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, invoke_without_command=True
)
@click.version_option(__version__, prog_name="hpcres")
@click.pass_context
def commands(context: click.Context) -> None:
    """Fuse a coarse 3D image and sharp 2D ones into a sharp 3D label volume, and measure it.

    Every command reads one study file (study.yaml in the working directory by default).

    \b
    hpcres train study.yaml             learn the generator
    hpcres infer --tiles 8x8x8          paint the volume, over MPI ranks
    hpcres metrics                      measure it, with Dask
    hpcres report                       one HTML page of it all
    """
    if sys.platform == "win32" and context.invoked_subcommand in _NOT_ON_WINDOWS:
        raise InputError(
            f"hpcres {context.invoked_subcommand} needs Linux or macOS: Windows has neither its file locks nor its "
            "signals; run it in WSL 2 (https://learn.microsoft.com/windows/wsl)"
        )
    if context.invoked_subcommand is None:
        _echo(context.get_help())


commands.command_class = _Stage


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, else a line every few seconds."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    said = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal said
        if done == total or time.monotonic() - said > 5:
            said = time.monotonic()
            _echo(f"{what}: {done} of {total}", err=True)

    yield line


@commands.command()
@_study_argument
@_study_options
@_overwrite
def phantom(study: str, settings: tuple[str, ...], output: str | None, overwrite: bool) -> None:
    """Make a ground truth, its low-res volume, and slices of a twin that training may see.

    \b
    hpcres phantom study.yaml
    hpcres phantom --set phantom.kind=chi2 --set phantom.voxels=128x128x128 --overwrite

    Writes <output>/phantom/: truth.zarr, low_res.zarr, and slices.tif (one file per plane where
    high_res.isotropic is false).
    """
    from hpcres.phantoms import make_phantom

    def say(name: str) -> None:
        end_if_asked()
        _echo(f"phantom: {name}", err=True)

    loaded = _study_of(study, settings, output, "phantom")
    for path in make_phantom(loaded, overwrite, say):
        _echo(path)
    save_study(loaded, "phantom")


@commands.command()
@_volume_argument
@_study_options
@click.option("--phases", metavar="LABEL=NAME,…", help="Labels of the volume in the order of the output's 0, 1, 2, …")
@_voxel_size
@_overwrite
def convert(
    source: str, settings: tuple[str, ...], output: str | None, phases: str | None, voxel_size: str | None,
    overwrite: bool,
) -> None:  # fmt: skip
    """Write a volume (.tif, .npy, .h5:/dataset, .zarr) as a sharded OME-Zarr label store.

    \b
    hpcres convert study.yaml                                       its low_res volume, to <output>/low_res.zarr
    hpcres convert scan.tif --output scan.zarr --voxel-size "65 nm" --phases "0=pore,128=active"

    With phases, the labels of the store are 0, 1, 2, … in their order; without, the values are kept.
    """
    from hpcres.volumes.convert import convert as convert_volume
    from hpcres.volumes.formats import open_volume
    from hpcres.volumes.phases import open_low_res
    from hpcres.volumes.sizes import compare_sizes

    if _is_study(source):
        if phases or voxel_size:
            raise InputError(f"{source}: a study has its own phases and voxel size; drop --phases and --voxel-size")
        study = load_study(source, settings, output)
        if study.low_res.channels:
            raise InputError(f"{source}: low_res.channels are probabilities, and a store holds labels; name one volume")
        groups = zip(study.low_res.phases, study.low_res.groups, strict=True)
        unknown = {label: f"unknown {label}" for label in study.low_res.unknown}
        names: dict[int, str] | None = {label: "+".join(group) for label, group in groups} | unknown
        target = study.folder / "low_res.zarr"
        volume = open_low_res(study.low_res)
        edges, notes = cubic(study.low_res_voxel_size), compare_sizes(study, low_res=volume)
    else:
        if output is None:
            raise InputError(f"{source}: no place to write to; give --output NAME.zarr")
        if settings:
            raise InputError(f"--set {settings[0]}: {source} is a volume, not a study; drop --set")
        names, target = _parse_phases(phases), Path(output)
        volume = open_volume(source)
        edges, notes = _voxel_edges(volume, voxel_size)
    size, unit = edges.lengths(source)
    _say_absent(volume)
    with _progress("convert") as progress:
        convert_volume(
            volume, target, phases=names, voxel_size=size, unit=unit, overwrite=overwrite, progress=progress
        )
    _say(notes)
    _echo(target)


def _voxel_edges(volume: Any, text: str | None) -> tuple[VoxelEdges, list[str]]:
    """What --voxel-size says, else the file; and a line on what the file does not say, or what is overridden.

    The line is for beside a result: an error must stay the only line.
    """
    own: VoxelEdges = volume.edges
    try:
        edges = parse_voxel_edges(text) if text else own
    except ValueError as error:
        raise InputError(f"--voxel-size: {error}") from None
    if text and not edges.agrees_with(own):
        return edges, [f"{volume.path}: --voxel-size {edges} goes before the file's own, {own}"]
    if not text:
        _, unit = edges.lengths(volume.path, "give all three with --voxel-size Z,Y,X, such as 1um,250nm,250nm")
        because = f" ({own.note})" if own.note else ""
        if unit == "voxel":
            return edges, [f"{volume.path}: does not say its voxel size{because}; lengths are in voxels"]
        if unit == "unit":
            return edges, [f"{volume.path}: says the ratio of voxel edges, {own}, and no length{because}"]
    return edges, []


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        _echo(line, err=True)


def _parse_phases(text: str | None) -> dict[int, str] | None:
    """`0=pore,128=active` as label → name."""
    if not text:
        return None
    phases: dict[int, str] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)\s*=\s*(\S.*?)\s*", part)
        if not match:
            raise InputError(f"--phases {text}: {part!r} is no LABEL=NAME; write for example 0=pore,128=active")
        try:
            label, name = int(match.group(1)), checked_phase_name(match.group(2))
        except ValueError as error:
            raise InputError(f"--phases {text}: {error}") from None
        if label in phases or name in phases.values():
            raise InputError(f"--phases {text}: {part.strip()!r} repeats a label or a name; give each once")
        phases[label] = name
    return phases


@commands.command()
@_study_argument
@_study_options
@click.option(
    "--init-from", metavar="PATH", help="Begin from the weights of another material's checkpoint.pt or best.pt."
)
@_overwrite
def train(
    study: str, settings: tuple[str, ...], output: str | None, init_from: str | None, overwrite: bool
) -> None:  # fmt: skip
    """Learn the generator, on one process or under torchrun; a stopped run goes on where it was.

    \b
    hpcres train
    hpcres train configs/case3-sofc-small.yaml --set training.minutes=10
    torchrun --nproc-per-node 4 -m hpcres train study.yaml
    hpcres train new.yaml --init-from other/checkpoint.pt

    Writes <output>/checkpoint.pt (all that infer needs besides the coarse volume), training.csv and training.html; with
    training.quality_steps also quality.csv and best.pt, the generator with the best score; tensorboard/ has all curves.
    """
    # Threads that wait must not spin: on cores shared with anything else that makes a step several times longer.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from hpcres.training.run import train as run

    if init_from is not None:
        settings = (*settings, f"training.init_from={json.dumps(str(Path(init_from).resolve()), ensure_ascii=False)}")
    loaded = _study_of(study, settings, output, "train")
    _say_absent(*_volumes_of(loaded))
    result = run(loaded, overwrite=overwrite)
    if is_first_rank():
        if result.already_finished:
            _echo(f"already trained to step {result.step}; --overwrite trains anew", err=True)
        _echo(result.checkpoint)


@commands.command()
@_study_argument
@_study_options
@_tiles
@click.option("--ranks", type=click.IntRange(1), help="MPI ranks; the study's cluster by default.")
def plan(study: str, settings: tuple[str, ...], output: str | None, tiles: str | None, ranks: int | None) -> None:
    """What infer would cost: tiles, memory, bytes, hours from a trial of seconds, and the sbatch lines. Dry run.

    \b
    hpcres plan --tiles 8x8x8
    hpcres plan study.yaml --tiles 16x16x16 --ranks 1024

    Works before training too: the cost does not depend on the weights.
    """
    from hpcres.checkpoint import build_generator, load_checkpoint
    from hpcres.inference.plan import describe, estimate
    from hpcres.volumes.phases import open_low_res
    from hpcres.volumes.sizes import compare_sizes

    given = [study, *(f"--set={setting}" for setting in settings), *([f"--output={output}"] if output else [])]
    if tiles is not None:
        settings = (*settings, f"inference.tiles={tiles}")
    loaded = load_study(study, settings, output)
    trained = loaded.checkpoint_path.exists()
    generator = load_checkpoint(loaded.checkpoint_path).generator if trained else build_generator(loaded).eval()
    volume = open_low_res(loaded.low_res)
    notes = compare_sizes(loaded, low_res=volume, images=True, reference=True)
    count = ranks or loaded.cluster.infer_nodes * loaded.cluster.ranks_per_node
    _say(notes)
    _echo(describe(loaded, *estimate(loaded, generator, volume.shape, count), shlex.join(given)))


@commands.command()
@_study_argument
@_study_options
@_tiles
@click.option("--checkpoint", metavar="PATH", help="The study's by default.")
@click.option(
    "--low-res", metavar="PATH", multiple=True, help="The study's by default; of probabilities once for each channel."
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Of the noise; the study's by default.")
@click.option("--ensemble", metavar="K", type=click.IntRange(1, 255), help="Paint K seeds; see below.")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), help="The study's by default.")
@_overwrite
def infer(
    study: str, settings: tuple[str, ...], output: str | None, tiles: str | None, checkpoint: str | None,
    low_res: tuple[str, ...], seed: int | None, ensemble: int | None, device: str | None, overwrite: bool,
) -> None:  # fmt: skip
    """Paint the high-res volume, tile by tile over MPI ranks; a stopped run goes on where it was.

    \b
    hpcres infer --tiles 8x8x8
    mpirun -n 16 hpcres infer --tiles 8x8x8
    hpcres infer --checkpoint checkpoint.pt --low-res tomogram.tif --output labels.zarr

    Writes <output>/labels.zarr, OME-Zarr 0.5 with a pyramid; the bytes do not depend on the number of ranks.
    Without a study file, the checkpoint and the coarse volume are all it needs. With --ensemble K the labels are those
    of the first of K seeds, labels-agreement.zarr holds the share of seeds that agree with them, and the attributes of
    labels.zarr how every metric varies with the seed.
    """
    from hpcres.inference.ranks import join_ranks
    from hpcres.inference.run import infer as run
    from hpcres.inference.run import open_job

    alone = checkpoint and low_res and not Path(study).exists()
    with join_ranks() as ranks:
        loaded = None if alone else _study_of(study, settings, output, "infer")
        job = open_job(
            loaded, checkpoint=checkpoint, low_res=low_res, output=output, tiles=tiles, seed=seed, device=device,
            command=_command_line(), inference={} if ensemble is None else {"ensemble": ensemble},
        )  # fmt: skip
        if ranks.rank == 0:
            _say_absent(job.low_res)
        painted = run(job, ranks, overwrite=overwrite)
        if ranks.rank == 0:
            if loaded is not None:
                save_study(loaded, "infer")
            _echo(painted.store)


@commands.command()
@click.argument("source", metavar="[STUDY|STORE]", default="study.yaml", type=click.Path())
@_study_options
@click.option("--repair", is_flag=True, help="Paint again what is missing or damaged, and nothing else.")
@click.option(
    "--audit", "audited", metavar="K", type=click.IntRange(1),
    help="Then paint K tiles again, half a tile later, and compare: a seam would show at the store's tile faces.",
)  # fmt: skip
def verify(
    source: str, settings: tuple[str, ...], output: str | None, repair: bool, audited: int | None
) -> None:
    """Check every shard of a painted store: there, undamaged, labels valid. Exit 3 where some are not.

    \b
    hpcres verify
    hpcres verify labels.zarr --repair
    mpirun -n 16 hpcres verify --audit 32

    An audit that finds more labels to differ than rounding explains, 4 in a million, also ends with exit 3.
    """
    from hpcres.inference.journal import Claim
    from hpcres.inference.ranks import join_ranks
    from hpcres.inference.run import infer as run
    from hpcres.inference.verify import audit, find_faults, remove_faulty, repair_job

    if _is_study(source):
        path = load_study(source, settings, output).labels_path
    else:
        _no_settings(source, settings)
        path = Path(source)
    with join_ranks() as ranks, Claim(path) as claim:

        def say(line: str) -> None:
            if ranks.rank == 0:
                _echo(line)

        def check() -> Any:
            with _progress("verify") as progress:
                return find_faults(path, progress, claim if repair else None)

        faults = ranks.from_first(check)
        for fault in faults:
            say(str(fault))
        if not faults:
            say(f"{path}: every shard is there and whole")
        elif not repair:
            raise Unfinished(f"{path}: {len(faults)} shards are missing or damaged; run hpcres verify --repair")
        else:
            job = repair_job(path, _command_line())
            tiles = ranks.from_first(lambda: remove_faulty(path, faults))
            run(job, ranks, claim=claim)
            say(f"{path}: {tiles} tiles painted again")
        if audited:
            with _progress("audit") if ranks.rank == 0 else nullcontext() as progress:
                outcome = audit(repair_job(path), audited, ranks, progress)
            say(f"{path}: {outcome}")
            outcome.refuse_seams(path)


def _statistics(own: Metrics, added: Sequence[str], left_out: Sequence[str], lags: int | None) -> Metrics:
    which = [name for name in dict.fromkeys([*own.statistics, *added]) if name not in left_out]
    return own.model_copy(update={"statistics": tuple(which), "lags": lags or own.lags})


_STATISTIC = click.Choice(("correlations", "chords", "connectivity", "spectrum", "representative", "geodesic"))


@commands.command()
@_volume_argument
@_study_options
@_scheduler
@_worker_wait
@_voxel_size
@click.option(
    "--periodic", type=click.Choice(("z", "y", "x")), multiple=True,
    help="The volume's two sides meet along this axis; repeatable.",
)
@click.option("--with", "added", type=_STATISTIC, multiple=True, help="Measure this too; repeatable.")
@click.option("--without", "left_out", type=_STATISTIC, multiple=True, help="Do not measure this; repeatable.")
@click.option("--lags", type=click.IntRange(1), help="Largest distance of correlations, in voxels.  [default: 64]")
@_overwrite
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON instead of a table.")
def metrics(
    source: str, settings: tuple[str, ...], output: str | None, scheduler: str | None, worker_wait: float,
    voxel_size: str | None, periodic: tuple[str, ...], added: tuple[str, ...], left_out: tuple[str, ...],
    lags: int | None, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure volume fractions, surface and interphase areas, TPB, their spread over sub-volumes, correlations, chords,
    connected shares, spectra, and the standard error of each number.

    \b
    hpcres metrics                                  the study's labels.zarr, its reference and its images
    hpcres metrics electrode.tiff                   any volume: .tif, .npy, .h5:/dataset, .zarr
    hpcres metrics scan.zarr --voxel-size 65nm --output metrics.json
    hpcres metrics --periodic z --periodic y        what was painted so: the sides' faces and edges count too
    hpcres metrics --with geodesic                  the shortest paths too: 8 bytes a voxel of scratch space
    hpcres metrics --scheduler tcp://node1:8786     on a running Dask cluster

    Writes <output>/metrics.json; for a bare volume only where --output names a file, which may hold earlier metrics of
    the same volume, or with --overwrite those of another.
    """
    from hpcres.metrics.measure import header, is_of, measure, measure_study
    from hpcres.metrics.schedule import connect
    from hpcres.metrics.table import metrics_text
    from hpcres.study import SubVolumes
    from hpcres.volumes.files import write_json
    from hpcres.volumes.formats import open_volume

    command, (z, y, x) = _command_line(), (axis in periodic for axis in "zyx")
    if _is_study(source):
        if voxel_size:
            raise InputError(f"{source}: a study has its own voxel size; drop --voxel-size")
        study = _study_of(source, settings, output, "metrics")
        chosen = _statistics(study.metrics, added, left_out, lags)
        study = study.model_copy(update={"metrics": chosen})
        volume = _study_volume(study)
        target: Path | None = study.metrics_path
        refuse_output(study.metrics_path, METRICS, inputs=[*study.inputs, volume.path], renewed=True)
        absent = _say_absent(volume, *_volumes_of(study))
        with connect(scheduler, worker_wait=worker_wait) as client:
            result = measure_study(study, volume, client=client, periodic=(z, y, x), command=command)
        notes = result.get("notes", [])
        end_if_asked()
        save_study(study, "metrics")
    else:
        _no_settings(source, settings)
        volume, target = open_volume(source), Path(output) if output else None
        edges, notes = _voxel_edges(volume, voxel_size)
        if target is not None:
            refuse_output(target, METRICS, inputs=[source], overwrite=overwrite, renewed=is_of(target, volume))
            target.absolute().parent.mkdir(parents=True, exist_ok=True)  # the scratch folder of geodesic paths is there
        absent = _say_absent(volume)
        with connect(scheduler, worker_wait=worker_wait) as client:
            measured = measure(
                volume, client=client, voxel_size=edges, settings=SubVolumes(count=0), periodic=(z, y, x),
                statistics=_statistics(Metrics(), added, left_out, lags), scratch=target and target.absolute().parent,
            )  # fmt: skip
        result = {**header(command), "volume": measured}
    result["absent_chunks"] = absent
    end_if_asked()
    if target is not None:
        write_json(target, result)
    _say(notes)
    _echo(json.dumps(result, indent=1, ensure_ascii=False) if as_json else metrics_text(result))
    if target is not None:
        _echo(f"written to {target}", err=as_json)


@commands.command()
@_volume_argument
@_study_options
@_voxel_size
@click.option("--phase", "only", multiple=True, metavar="NAME", help="Only this phase, or label; repeatable.")
@click.option(
    "--direction", "directions", type=click.Choice(("z", "y", "x")), multiple=True, help="All three by default."
)
@click.option("--crop", metavar="Z0:Z1,Y0:Y1,X0:X1", help="Only this part of the volume.")
@click.option(
    "--rtol", default=0.001, show_default=True, type=click.FloatRange(1e-6, 1),
    help="Stop when the estimated error of D_rel is under this share of it.",
)
@click.option(
    "--conductivity", "conductivities", multiple=True, metavar="NAME=VALUE",
    help="Let these phases, or labels, conduct together; repeatable.",
)
@click.option("--periodic", type=click.Choice(("z", "y", "x")), multiple=True, help="Sides that meet; repeatable.")
@click.option("--profile", is_flag=True, help="Also tau of every layer along the direction.")
@click.option("--field", metavar="STORE.ZARR", help="Write potential and flux density here.")
@click.option("--threads", type=click.IntRange(1), help="All cores by default; the result does not depend on it.")
@click.option(
    "--estimate", type=click.Choice(("blocks",)),
    help="No solution: blocks of 64³ voxels alone, as a resistor network. Measured -100 to +9 % off, and no faster.",
)
@click.option("--memory", metavar="SIZE", help="Solve out of core where the process would hold more, such as 4GiB.")
@click.option(
    "--scratch", metavar="DIR", help="Scratch storage for --memory, best on a fast local disk; beside the output."
)
@click.option("--device", metavar="cuda[:N]", help="Solve on a GPU, after set-up on the cores.")
@_overwrite
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON.")
def tortuosity(
    source: str, settings: tuple[str, ...], output: str | None, voxel_size: str | None, only: tuple[str, ...],
    directions: tuple[str, ...], crop: str | None, rtol: float, conductivities: tuple[str, ...],
    periodic: tuple[str, ...], profile: bool,
    field: str | None, threads: int | None, estimate: str | None, memory: str | None, scratch: str | None,
    device: str | None, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Relative diffusivity and tortuosity factor of whole phases, exactly, with their error.

    \b
    hpcres tortuosity                                   every phase and direction; the reference too
    hpcres tortuosity electrode.tiff --phase 0 --direction z
    hpcres tortuosity --conductivity pore=1 --conductivity gel=0.1
    hpcres tortuosity --crop 0:256,0:256,0:256          a part of the volume
    mpirun -n 4 hpcres tortuosity                       in the memory of several nodes
    hpcres tortuosity --memory 4GiB --scratch /local    in little memory, on scratch storage
    hpcres tortuosity --device cuda                     on a GPU

    Needs about 15 bytes a voxel where 40 % conduct, together over all ranks; with --memory down to 4, and 15 of
    scratch storage. Writes <output>/transport.json after each solve; for a bare volume only where --output names a
    file. What it holds of other phases, directions and settings stays in it, and what it holds of the same is not
    solved again.
    """
    from hpcres.inference.ranks import join_ranks
    from hpcres.metrics.table import transport_text
    from hpcres.metrics.transport import BLOCK_VOXELS, SCHEMA, describe
    from hpcres.metrics.transport import tortuosity as solve
    from hpcres.metrics.transport.results import ResultsFile
    from hpcres.volumes.formats import open_volume
    from hpcres.volumes.sizes import compare_sizes

    study = _study_of(source, settings, output, "tortuosity") if _is_study(source) else None
    if study is None:
        _no_settings(source, settings)
    elif voxel_size:
        raise InputError(f"{source}: a study has its own voxel size; drop --voxel-size")
    conductivity = _parse_conductivities(conductivities)
    if only and conductivity:
        raise InputError(f"--phase {only[0]}: --conductivity says already what conducts; drop one of them")
    volume = _study_volume(study) if study else open_volume(source)
    if study:
        edges, notes = cubic(study.high_res.voxel_size), compare_sizes(study, high_res=[volume], reference=True)
    else:
        edges, notes = _voxel_edges(volume, voxel_size)
    target = study.transport_path if study else Path(output) if output else None
    inputs = [volume.path, *(study.inputs if study else ())]
    if target is not None:
        refuse_output(target, TRANSPORT, inputs=inputs, renewed=True)
    if field is not None:
        refuse_output(field, FIELDS, inputs=[*inputs, target], overwrite=overwrite)
    limit = _parse_bytes("--memory", memory)
    refused = {"--memory": memory, "--device": device, "--profile": profile, "--field": field, "--periodic": periodic}
    if estimate and (other := next((name for name, given in refused.items() if given), None)):
        raise InputError(f"--estimate blocks: takes no {other}, which is of a solution of the whole volume; drop one")
    if scratch is not None and limit is None:
        raise InputError(f"--scratch {scratch}: is for solving out of core; give --memory too")
    if limit is not None and device is not None:
        raise InputError(f"--device {device}: a GPU holds all of the volume, --memory a part of it; drop one of them")
    place = Path(scratch) if scratch else (target.absolute().parent if target else Path.cwd())
    if limit is not None and scratch is None:
        place.mkdir(parents=True, exist_ok=True)
    if limit is not None and not (place.is_dir() and os.access(place, os.W_OK)):
        raise InputError(f"--scratch {place}: is no folder that can be written; make it, or name another")
    said, again = time.monotonic(), f"run {'it without --overwrite' if overwrite else 'the same command'} to go on"

    def report(phase: str, direction: str, iterations: int, d_rel: float, error: float) -> None:
        nonlocal said
        if alone:  # several ranks look together, between two solves
            end_if_asked()
        if time.monotonic() - said > 5:
            said = time.monotonic()
            line = f"{phase}, {direction}: iteration {iterations}, D_rel {d_rel:.6g}, estimated error {error:.1e}"
            _echo(line, err=True)

    meets = [axis in periodic for axis in "zyx"]
    unsolved: list[str] = []
    with join_ranks() as ranks:
        alone, first = ranks.communicator is None, ranks.rank == 0
        if not alone and limit is not None:
            raise InputError("--memory: is for one process, and this is a job of several; drop it, or mpirun")
        if not alone and estimate:
            raise InputError("--estimate blocks: is for one process, and this is a job of several; drop it, or mpirun")
        gpu = None
        if device is not None:
            if not alone:
                raise InputError("--device: is for one process, and this is a job of several; drop it, or mpirun")
            from hpcres.metrics.transport.device import find_device

            gpu = find_device(device)
        solver = describe(rtol, meets, BLOCK_VOXELS if estimate else None)
        heading, lines = iter([f"{solver['method']}; stops at {solver['stop']}"]), iter(notes)
        header = {"schema": SCHEMA, "hpcres": __version__, "command": _command_line(), "solver": solver}
        results = ResultsFile(target, header)
        results.begin({} if overwrite else ranks.from_first(results.read))
        absent = _say_absent(volume)

        def measured(which: Literal["volume", "reference"], one: Any, **more: Any) -> None:
            digest = ranks.from_first(lambda: results.digest_for(which, one))
            part = results.part(which, one, digest)
            skipped = iter([f"{target}: results that are there already are not solved again; --overwrite begins anew"])

            def finished(result: dict[str, Any]) -> None:
                known = part.solved(result) is result
                if result["state"] == "not converged":
                    unsolved.append(f"{result['phase']}, {result['direction']}")
                _say([*lines] if first else [])
                for line in (*heading, *(skipped if known else ()), transport_text(result)) if first else ():
                    _echo(line, err=as_json)
                if not known:
                    part.add(result)
                    if first and target is not None:
                        results.save()
                        keeps(f"finished results are in {target}; {again}")
                if numbers := [number for heard in ranks.everyone(received()) for number in heard]:
                    raise stopped_by(numbers[0])

            solve(
                one, phases=study.phases if study else None, only=only, conductivity=conductivity,
                directions=directions or ("z", "y", "x"), spacing=edges.lengths(source)[0], periodic=meets, crop=crop,
                rtol=rtol,
                threads=threads or (None if alone else ranks.cores), profile=profile, report=report, finished=finished,
                solved=None if field else part.solved, comm=ranks.communicator, on_node=ranks.on_node, memory=limit,
                scratch=place, say=partial(_echo, err=True), estimate=BLOCK_VOXELS if estimate else None, device=gpu,
                **more,
            )  # fmt: skip

        measured("volume", volume, field=field, overwrite=overwrite)
        if field is not None and first:
            _echo(f"fields written to {field}", err=as_json)
        if study is not None:
            if study.reference.volume is not None:
                if first:
                    _echo(f"reference {study.reference.volume}:", err=as_json)
                measured("reference", open_volume(study.reference.volume))
            results.content["published"] = [p.model_dump(mode="json") for p in study.reference.published]
        if first:
            if study is not None:
                save_study(study, "tortuosity")
            results.content["absent_chunks"] = absent
            results.save()
            if as_json:
                _echo(json.dumps(results.content, indent=1, ensure_ascii=False))
            if target is not None:
                _echo(f"written to {target}", err=as_json)
    if unsolved:
        raise Unfinished(
            f"{' and '.join(unsolved)}: not solved to --rtol {rtol:g}, so without a number; all else is solved. Try a "
            "larger --rtol, conductivities less far apart, or a part of the volume with --crop"
        )


def _parse_bytes(option: str, text: str | None) -> int | None:
    """`4GiB` as bytes."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]i?B|[KMGT])", text, re.IGNORECASE)
    if match is None or not (size := float(match.group(1))):
        raise InputError(f"{option} {text}: not a size; write for example {option} 4GiB")
    unit = match.group(2).upper()
    return int(size * (1000 if unit.endswith("B") and "I" not in unit else 1024) ** ("KMGT".index(unit[0]) + 1))


def _parse_conductivities(texts: tuple[str, ...]) -> dict[str, float] | None:
    """`pore=1` and `gel=0.1` as name → conductivity."""
    found: dict[str, float] = {}
    for text in texts:
        match = re.fullmatch(r"(\S.*?)=([0-9.eE+-]+)", text)
        try:
            value = float(match.group(2)) if match else -1.0
        except ValueError:
            value = -1.0
        if match is None or not 0 <= value < 1e30:
            raise InputError(f"--conductivity {text}: not NAME=VALUE with a value from 0 on; write pore=1")
        if match.group(1) in found:
            raise InputError(f"--conductivity {text}: {match.group(1)} is given twice; give each phase once")
        found[match.group(1)] = value
    if found and not any(found.values()):
        raise InputError("--conductivity: nothing conducts; give a value above 0")
    return found or None


@commands.command()
@_volume_argument
@_study_options
@_scheduler
@_worker_wait
@_voxel_size
@click.option("--metrics", "measured_file", metavar="FILE", help="Of a bare volume; metrics.json beside the page.")
@click.option("--transport", "solved_file", metavar="FILE", help="Of a bare volume; transport.json beside the page.")
def report(
    source: str, settings: tuple[str, ...], output: str | None, scheduler: str | None, worker_wait: float,
    voxel_size: str | None, measured_file: str | None, solved_file: str | None,
) -> None:  # fmt: skip
    """One HTML page: slices, metrics beside their references, distributions, training, provenance.

    \b
    hpcres report                                   from what the other stages wrote, to <output>/report.html
    hpcres report electrode.tiff --output electrode.html

    The page of a bare volume is report.html here unless --output says otherwise. It shows what `hpcres metrics VOLUME
    --output metrics.json` and `hpcres tortuosity VOLUME --output transport.json` left beside it or where --metrics and
    --transport say; without the former the volume is measured on the way.
    """
    from hpcres.report.write import find_result, report_study, report_volume
    from hpcres.volumes.formats import open_volume

    end_if_asked()

    if _is_study(source):
        if voxel_size:
            raise InputError(f"{source}: a study has its own voxel size; drop --voxel-size")
        if file := measured_file or solved_file:
            raise InputError(f"{file}: a study has its own results; drop --metrics and --transport")
        study = load_study(source, settings, output)
        made: list[str | Path] = [study.labels_path, study.metrics_path, study.transport_path, *files_of(source)]
        refuse_output(study.report_path, PAGE, inputs=[*study.inputs, *made], renewed=True)
        _say_absent(volume := _study_volume(study), *_volumes_of(study))
        path = report_study(study, volume)
    else:
        from hpcres.metrics.measure import header, measure
        from hpcres.metrics.schedule import connect
        from hpcres.study import SubVolumes

        _no_settings(source, settings)
        volume, target = open_volume(source), Path(output or "report.html")
        given, notes = _voxel_edges(volume, voxel_size) if voxel_size else (None, [])
        refuse_output(target, PAGE, inputs=[source, measured_file, solved_file], renewed=True)
        _say_absent(volume)

        def found(stage: str, named: str | None, edges: VoxelEdges | None) -> dict[str, Any] | None:
            file = Path(named) if named else target.parent / f"{stage}.json"
            result = find_result(volume, stage, file, named is not None, edges)
            if result is not None:
                _echo(f"{stage} from {file}", err=True)
            return result

        result, solved = found("metrics", measured_file, given), found("transport", solved_file, None)
        if result is None:
            edges, notes = (given, notes) if given else _voxel_edges(volume, None)
            with connect(scheduler, worker_wait=worker_wait) as client:
                measured = measure(volume, client=client, voxel_size=edges, settings=SubVolumes(), statistics=Metrics())
            result = {**header(_command_line()), "volume": measured}
        path = report_volume(volume, result, target, solved)
        _say(notes)
    _echo(path)


def _study_volume(study: Study) -> Any:
    from hpcres.volumes.formats import open_volume

    if not study.labels_path.exists():
        raise InputError(f"{study.labels_path}: not there yet; run hpcres infer first")
    return open_volume(study.labels_path)


def _command_line() -> str:
    return " ".join(["hpcres", *sys.argv[1:]])


def _no_settings(source: str, settings: tuple[str, ...]) -> None:
    if settings:
        raise InputError(f"--set {settings[0]}: {source} is a volume, not a study; drop --set")


def _study_of(source: str, settings: tuple[str, ...], output: str | None, stage: str) -> Study:
    """The study, where its copy beside the results of the stage may be written: not after hours of work."""
    study = load_study(source, settings, output)
    copy = saved_study(study, stage)
    if copy.exists() and copy.samefile(source):
        if settings or output:
            raise InputError(
                f"{copy}: is the study that is read, and what is set besides would be saved in it; write elsewhere "
                "with --output, or copy it first"
            )
        return study
    refuse_output(copy, STUDY, inputs=[*study.inputs, *files_of(source)], renewed=True)
    return study


def _volumes_of(study: Study) -> list[Any]:
    """What the study compares a volume with, as far as it is there."""
    from hpcres.volumes.formats import open_volume

    paths = [*study.low_res.paths, study.reference.volume]
    return [open_volume(path, grey=True) for path in paths if path is not None and Path(path).is_dir()]


def _say_absent(*volumes: Any) -> list[dict[str, Any]]:
    """One line for each store in which chunk files are absent, and what is to be said of it in results."""
    from hpcres.volumes.absent import absent_chunks

    found = [one for volume in volumes if (one := absent_chunks(volume)) is not None]
    for one in found:
        if is_first_rank():
            _echo(f"warning: {one}", err=True)
    return [one.as_json() for one in found]
