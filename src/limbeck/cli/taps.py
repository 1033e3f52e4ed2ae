"""``limbeck taps``"""

from __future__ import annotations

import typer

from limbeck.cli.output import print_json, print_table


def command(
    model: str = typer.Argument(
        help="source:name, as in transformers:org/model, python:pkg.mod:factory, tiny:digit-vlm-student."
    ),
    shape: str = typer.Option("1,3,224,224", help="Shape of the picture batch for the dry forward of a plain module."),
    depth: int = typer.Option(4, help="How deep to list; 0 lists everything."),
    json: bool = typer.Option(False, "--json", help="One JSON list instead of a table."),
) -> None:
    """List what can be tapped in a model, with the output shapes of one dry forward.

    Example: limbeck taps tiny:digit-vlm-student
    """
    from limbeck.engine.describe import tap_points

    points = tap_points(model, tuple(int(part) for part in shape.split(",")))
    rows = [point for point in points if not depth or point["name"].count(".") < depth]
    if json:
        print_json(rows)
        return
    print_table(("module", "class", "output", ""), [(r["name"], r["class"], r["shape"], r["mark"]) for r in rows])
