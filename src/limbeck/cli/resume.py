"""``limbeck resume``"""

from __future__ import annotations

from pathlib import Path

import typer

from limbeck.cli.run import report


def command(
    folder: Path = typer.Argument(metavar="RUN", help="The folder of an interrupted run."),
    json: bool = typer.Option(False, "--json", help="One JSON object on standard output."),
    quiet: bool = typer.Option(False, "--quiet", help="Warnings only on standard error."),
) -> None:
    """Go on with an interrupted run, mid-epoch, from its newest whole checkpoint.

    Example: limbeck resume runs/first
    """
    from limbeck.engine.run import resume

    report(resume(folder, quiet=quiet), json)
