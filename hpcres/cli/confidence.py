"""The command `hpcres confidence`."""

from __future__ import annotations

import json

import click

from hpcres.cli.console import echo
from hpcres.cli.options import Stage


@click.command(cls=Stage)
@click.argument("folders", metavar="FOLDER FOLDER FOLDER...", nargs=-1, required=True, type=click.Path())
@click.option(
    "--level",
    type=click.FloatRange(0.5, 0.999),
    default=0.9,
    show_default=True,
    help="Probability with which an interval is to hold the truth.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def confidence(folders: tuple[str, ...], level: float, as_json: bool) -> None:
    """With what confidence each number may be trusted: intervals from trainings that differ by their seed.

    \b
    for seed in 0 1 2 3 4; do
        hpcres train --set seed=$seed --output runs/$seed
        hpcres infer --set seed=$seed --output runs/$seed
        hpcres metrics --set seed=$seed --output runs/$seed
        hpcres tortuosity --set seed=$seed --output runs/$seed
    done
    hpcres confidence runs/*

    Each folder holds the metrics.json, and the transport.json if there is to be D_rel, of one training. The interval
    takes the true volume for one more such run. What all runs have wrong together is not in it (docs/metrics.md).
    """
    from hpcres.metrics.confidence import confidence_json, confidence_text, intervals

    found = intervals(folders, level)
    echo(json.dumps(confidence_json(found, folders, level), indent=1) if as_json else confidence_text(found, level))
