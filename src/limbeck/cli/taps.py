"""``limbeck taps``"""

from __future__ import annotations

import typer

from limbeck.cli.output import print_json, print_table
from limbeck.errors import BadInput


def command(
    model: str = typer.Argument(
        help="source:name, as in transformers:org/model, timm:resnet18, torchvision:mobilenet_v2, python:pkg.mod:factory, tiny:cnn."
    ),
    shape: str = typer.Option(
        "",
        help="Shape of the picture batch for the dry forward, as in 1,3,64,64; default: a classifier's own size, else 1,3,224,224.",
    ),
    depth: int = typer.Option(4, help="How deep to list; 0 lists everything."),
    json: bool = typer.Option(False, "--json", help="One JSON list instead of a table."),
) -> None:
    """List what can be tapped in a model, with the output shapes of one dry forward; the usual points are marked.

    Example: limbeck taps timm:resnet18 --depth 1
    """
    from limbeck.engine.describe import tap_points

    sizes = shape.split(",") if shape else []
    if not all(size.strip().isdecimal() for size in sizes):
        raise BadInput(f"--shape {shape!r} is no shape: give numbers, as in 1,3,64,64")
    points = tap_points(model, tuple(map(int, sizes)) or None)
    rows = [point for point in points if not depth or point["name"].count(".") < depth]
    if json:
        print_json(rows)
        return
    print_table(("module", "class", "output", ""), [(r["name"], r["class"], r["shape"], r["mark"]) for r in rows])
