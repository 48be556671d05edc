"""The command `hpcres schema`."""

from __future__ import annotations

import json

import click

from hpcres.cli.console import echo
from hpcres.cli.options import Stage


@click.command(cls=Stage)
@click.argument("file", type=click.Choice(("study", "metrics", "transport")))
def schema(file: str) -> None:
    """Print the JSON schema of the study file, of metrics.json or of transport.json.

    \b
    hpcres schema study > study.schema.json

    Editors complete and check a study that begins with `# yaml-language-server: $schema=study.schema.json`.
    """
    from hpcres.schemas import schema_of

    echo(json.dumps(schema_of(file), indent=1, ensure_ascii=False))
