"""The commands: a study and options in, one call, an exit status out.

Exit status: 0 done; 2 the input is wrong; 3 finished, some tiles or chunks failed; 75 stopped by a signal after
saving; anything else is a bug. Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from hpcres import __version__
from hpcres.errors import InputError, Stopped, Unfinished

EXIT_INPUT, EXIT_UNFINISHED, EXIT_STOPPED = 2, 3, 75
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
_Command = TypeVar("_Command", bound=Callable[..., Any])


def main() -> None:
    """Run a command and leave with its exit status. Only rank 0 speaks of errors that every rank sees."""
    try:
        commands.main(standalone_mode=False)
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
    sys.stdout.flush()
    sys.exit(status)


def _complain(message: str, status: int) -> int:
    rank = next(
        (os.environ[k] for k in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "RANK") if k in os.environ), "0"
    )
    if rank == "0":
        click.echo("hpcres: " + " ".join(message.split()), err=True)
    return status


def _study_options(command: _Command) -> _Command:
    command = click.option(
        "--output", metavar="PATH", help="Write here instead of where the study says."
    )(command)
    return click.option(
        "--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one setting; repeatable."
    )(command)


_study_argument = click.argument("study", metavar="[STUDY]", default="study.yaml", type=click.Path())
_volume_argument = click.argument("source", metavar="[STUDY|VOLUME]", default="study.yaml", type=click.Path())
_overwrite = click.option("--overwrite", is_flag=True, help="Replace what an earlier run left.")
_scheduler = click.option(
    "--scheduler",
    metavar="ADDRESS|FILE",
    help="A running Dask scheduler (tcp://host:port or its file); local by default.",
)


def _is_study(source: str) -> bool:
    return Path(source).suffix in (".yaml", ".yml")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="hpcres")
def commands() -> None:
    """Fuse a coarse 3D image and sharp 2D ones into a sharp 3D label volume, and measure it.

    Every command reads one study file (study.yaml in the working directory by default).

    \b
    hpcres train study.yaml             learn the generator
    hpcres infer --tiles 8x8x8          paint the volume, over MPI ranks
    hpcres metrics                      measure it, with Dask
    hpcres report                       one HTML page of it all
    """
