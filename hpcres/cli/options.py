"""Options that several commands share, and parsers of options whose value is more than a string."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from hpcres.cli.console import command_line
from hpcres.errors import InputError
from hpcres.inputs import DEFAULT_STUDY, Given
from hpcres.signals import handling_signals
from hpcres.study import checked_phase_name

_Command = TypeVar("_Command", bound=Callable[..., Any])


class Stage(click.Command):
    """A command that notes signals under its own name."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command with handlers that note signals."""
        with handling_signals(self.name or "hpcres"):
            return super().invoke(ctx)


def study_options(command: _Command) -> _Command:
    """Add the options --set and --output to a command."""
    command = click.option("--output", metavar="PATH", help="Write here instead of where the study says.")(command)
    return click.option(
        "--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one setting; repeatable."
    )(command)


study_argument = click.argument("study", metavar="[STUDY]", default=DEFAULT_STUDY, type=click.Path())
volume_argument = click.argument("source", metavar="[STUDY|VOLUME]", default=DEFAULT_STUDY, type=click.Path())
tiles_option = click.option("--tiles", metavar="ZxYxX", help="Tiles per axis; the study's inference.tiles by default.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what an earlier run left.")
voxel_size_option = click.option(
    "--voxel-size",
    metavar="LENGTH|Z,Y,X",
    help="Edge of a bare volume's voxel with its unit, 65nm, or three along z, y, x: 2um,250nm,250nm.",
)
scheduler_option = click.option(
    "--scheduler",
    metavar="ADDRESS|FILE",
    help="A running Dask scheduler (tcp://host:port or its file); local by default.",
)
worker_wait_option = click.option(
    "--worker-wait",
    type=click.FloatRange(min=0, min_open=True),
    default=900,
    metavar="SECONDS",
    show_default=True,
    help="How long to wait for new workers once a running scheduler has lost its last.",
)
axis_choice = click.Choice(("z", "y", "x"))


def given(options: dict[str, Any]) -> Given:
    """Take source, output and what belongs to them out of the options of a command.

    Parameters
    ----------
    options : dict
        Options by name; those that are returned are removed. The source is `study` or `source`.

    Returns
    -------
    Given
    """
    names = ("settings", "output", "voxel_size", "overwrite")
    found = {name: options.pop(name) for name in names if name in options}
    return Given(options.pop("study" if "study" in options else "source"), command_line(), **found)


def parse_bytes(option: str, text: str | None) -> int | None:
    """Parse a size such as `4GiB` as a number of bytes; None stays None.

    Raises
    ------
    InputError
        The text is not a size. The message names the option.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]i?B|[KMGT])", text, re.IGNORECASE)
    if match is None or not (size := float(match.group(1))):
        raise InputError(f"{option} {text}: not a size; write for example {option} 4GiB")
    unit = match.group(2).upper()
    return int(size * (1000 if unit.endswith("B") and "I" not in unit else 1024) ** ("KMGT".index(unit[0]) + 1))


def parse_phases(text: str | None) -> dict[int, str] | None:
    """Parse `0=pore,128=active` as label → name; None for no text.

    Raises
    ------
    InputError
        A part is not LABEL=NAME, a name is not valid, or a label or a name is repeated.
    """
    if not text:
        return None
    phases: dict[int, str] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)\s*=\s*(\S.*?)\s*", part)
        if not match:
            raise InputError(f"--phases {text}: {part!r} is not LABEL=NAME; write for example 0=pore,128=active")
        try:
            label, name = int(match.group(1)), checked_phase_name(match.group(2))
        except ValueError as error:
            raise InputError(f"--phases {text}: {error}") from None
        if label in phases or name in phases.values():
            raise InputError(f"--phases {text}: {part.strip()!r} repeats a label or a name; give each once")
        phases[label] = name
    return phases


def parse_conductivities(texts: tuple[str, ...]) -> dict[str, float] | None:
    """Parse `pore=1` and `gel=0.1` as name → conductivity; None for no texts.

    Raises
    ------
    InputError
        A text is not NAME=VALUE with a value from 0 on, a name is repeated, or nothing conducts.
    """
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
