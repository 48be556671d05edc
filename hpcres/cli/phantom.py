"""The command `hpcres phantom`."""

from __future__ import annotations

import click

from hpcres.cli.console import echo
from hpcres.cli.options import Stage, overwrite_option, study_argument, study_options
from hpcres.inputs import study_for
from hpcres.signals import end_if_signalled
from hpcres.study.file import save_study


@click.command(cls=Stage)
@study_argument
@study_options
@overwrite_option
def phantom(study: str, settings: tuple[str, ...], output: str | None, overwrite: bool) -> None:
    """Make a ground truth, its low-res volume, and slices of a twin that training may see.

    \b
    hpcres phantom study.yaml
    hpcres phantom --set phantom.kind=chi2 --set phantom.voxels=128x128x128 --overwrite

    Writes <output>/phantom/: truth.zarr, low_res.zarr, and slices.tif (one file per plane where
    high_res.isotropic is false).
    """
    from hpcres.phantoms.files import make_phantom

    def show(name: str) -> None:
        end_if_signalled()
        echo(f"phantom: {name}", err=True)

    loaded = study_for("phantom", study, settings, output)
    for path in make_phantom(loaded, overwrite, show):
        echo(path)
    save_study(loaded, "phantom")
