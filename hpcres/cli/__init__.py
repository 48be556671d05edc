"""The commands of `hpcres`: they turn a study and options into one library call, and its errors into exit statuses.

The exit statuses are 0 done; 2 the input is wrong; 3 finished, but some tiles, chunks or solves failed; 75 stopped by
a signal after saving; 130 ended by a second SIGINT; anything else is a bug. Commands import heavy libraries inside
their functions, so that `--help` stays quick.
"""

from __future__ import annotations

import errno
import logging
import sys
from contextlib import suppress

import click

from hpcres import __version__
from hpcres.cli import confidence, convert, infer, metrics, phantom, plan, report, schema, tortuosity, train, verify
from hpcres.cli.console import echo, show_log, with_options
from hpcres.errors import InputError, Stopped, Unfinished
from hpcres.signals import EXIT_AT_ONCE, EXIT_STOPPED, handling_signals, is_first_rank, set_exit_status
from hpcres.terminal import replace_unencodable

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


def main() -> None:
    """Run a command and exit with its status.

    If several ranks raise the same error, only rank 0 prints it.
    """
    # Without a writable home, matplotlib warns that it keeps its font cache in a temporary folder.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    replace_unencodable()
    show_log()
    try:
        with handling_signals("hpcres"):
            commands.main(prog_name="hpcres", standalone_mode=False)
        status = 0
    except click.exceptions.Exit as request:
        status = request.exit_code
    except click.Abort:
        status = EXIT_AT_ONCE
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
    set_exit_status(status)
    with suppress(OSError):
        sys.stdout.flush()
    sys.exit(status)


def _complain(message: str, status: int) -> int:
    if is_first_rank():
        with suppress(OSError):  # the terminal may be closed
            echo("hpcres: " + with_options(" ".join(message.split())), err=True)
    return status


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
        echo(context.get_help())


for _command in (
    phantom.phantom,
    convert.convert,
    train.train,
    plan.plan,
    infer.infer,
    verify.verify,
    metrics.metrics,
    tortuosity.tortuosity,
    report.report,
    confidence.confidence,
    schema.schema,
):
    commands.add_command(_command)
