"""Lines, progress and warnings of the commands; results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hpcres.signals import is_first_rank

_OPTIONS = (
    "check|checkpoint|conductivity|crop|device|estimate|field|lags|memory|metrics|output|overwrite|periodic|phase|"
    "phases|profile|rtol|scheduler|scratch|set|tiles|transport|voxel_size|worker_wait"
)
"""Arguments of library functions that are options of commands."""


def with_options(message: str) -> str:
    """Name options where a message of the library names its arguments.

    Examples
    --------
    >>> with_options("give `overwrite`, or write elsewhere with `output`")
    'give --overwrite, or write elsewhere with --output'
    """
    return re.sub(f"`({_OPTIONS})`", lambda found: "--" + found.group(1).replace("_", "-"), message)


class _Lines(logging.Handler):
    """Prints a record as a line on stderr, behind the stage that its logger is named after."""

    def emit(self, record: logging.LogRecord) -> None:
        stage = record.name.partition(".")[2]
        echo_message(f"{stage}: {record.getMessage()}" if stage else record.getMessage(), err=True)


def show_log() -> None:
    """Print what the library logs, from now on."""
    logger = logging.getLogger("hpcres")
    if not any(isinstance(handler, _Lines) for handler in logger.handlers):
        logger.addHandler(_Lines())
    logger.setLevel(logging.INFO)


def echo(text: object, err: bool = False) -> None:
    """Print and flush a line on stdout, or on stderr if `err` is set.

    click.echo would write UTF-8 to a terminal whose encoding is ASCII.
    """
    print(text, file=sys.stderr if err else sys.stdout, flush=True)


def echo_message(message: object, err: bool = False) -> None:
    """Print a line of the library, which names arguments, with options in their place."""
    echo(with_options(str(message)), err=err)


def echo_notes(lines: Iterable[object]) -> None:
    """Print each line of the library on stderr."""
    for line in lines:
        echo_message(line, err=True)


def echo_result(result: Mapping[str, Any], path: Path | None, text: str, as_json: bool) -> None:
    """Print a result as JSON on stdout, or as `text` if there is any, and the file that it was written to."""
    if as_json or text:
        echo(json.dumps(result, indent=1, ensure_ascii=False) if as_json else text)
    if path is not None:
        echo(f"written to {path}", err=as_json)


def warn(lines: Iterable[object]) -> None:
    """Print warnings on stderr; of several ranks only rank 0 does."""
    if is_first_rank():
        echo_notes(f"warning: {line}" for line in lines)


def command_line() -> str:
    """Return the command as the user gave it, for the provenance of results."""
    return " ".join(["hpcres", *sys.argv[1:]])
