"""The command `hpcres tortuosity`."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from hpcres.cli.console import echo_message, echo_result, warn
from hpcres.cli.options import (
    Stage,
    axis_choice,
    given,
    overwrite_option,
    parse_bytes,
    parse_conductivities,
    study_options,
    volume_argument,
    voxel_size_option,
)


@click.command(cls=Stage)
@volume_argument
@study_options
@voxel_size_option
@click.option("--phase", multiple=True, metavar="NAME", help="Only this phase, or label; repeatable.")
@click.option("--direction", type=axis_choice, multiple=True, help="All three by default.")
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
def tortuosity(conductivity: tuple[str, ...], memory: str | None, as_json: bool, **options: Any) -> None:
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
    from hpcres.result_files import write_transport
    from hpcres.transport.options import TransportOptions

    source = given(options)
    options |= {"conductivity": parse_conductivities(conductivity), "memory": parse_bytes("--memory", memory)}
    resume_with = f"run {'it without --overwrite' if source.overwrite else 'the same command'} to go on"
    show = partial(echo_message, err=as_json)
    with join_ranks() as ranks:
        solve = TransportOptions(**options)
        found = write_transport(source, solve, ranks=ranks, resume_with=resume_with, show=show, warn=warn)
        if ranks.rank == 0:
            echo_result(found.result, found.path, "", as_json)
    found.refuse_unsolved()
