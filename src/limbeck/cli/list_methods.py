"""``limbeck list``"""

from __future__ import annotations

from dataclasses import asdict

import typer

from limbeck.cli.output import print_json, print_table


def command(json: bool = typer.Option(False, "--json", help="One JSON list instead of a table.")) -> None:
    """List the methods, built in and from installed packages.

    Example: limbeck list
    """
    from limbeck.api import list_methods

    entries = list_methods()
    if json:
        print_json([asdict(entry) for entry in entries])
        return
    print_table(("method", "models", "what it does", "paper"), [(e.name, e.models, e.summary, e.paper) for e in entries])
