"""``limbeck export``"""

from __future__ import annotations

from pathlib import Path

import typer

from limbeck.cli.output import count, number, print_json, print_table


def command(
    folder: Path = typer.Argument(metavar="RUN", help="The folder of a finished run whose student is an image classifier."),
    to: str = typer.Option("safetensors,onnx", help="Formats, with commas between them."),
    out: Path | None = typer.Option(None, help="The folder to write; default RUN/exported."),
    int8: bool = typer.Option(False, "--int8", help="A dynamically quantised ONNX graph too, and what it costs and gains."),
    opset: int | None = typer.Option(None, help="Of the ONNX operators, 18 or newer; default: the exporter's choice."),
    batch: str = typer.Option("dynamic", help="Pictures at a time: dynamic, or a number."),
    no_preprocessing: bool = typer.Option(
        False, "--no-preprocessing", help="A graph of pictures already resized and normalised."
    ),
    samples: int = typer.Option(2000, help="Held-out pictures to compare on, at most."),
    tolerance: float = typer.Option(1e-4, help="How far any logit of the graph may be from PyTorch's."),
    json: bool = typer.Option(False, "--json", help="One JSON object instead of a table."),
) -> None:
    """Write a trained image classifier for other programs, each file compared with the model.

    Example: limbeck export runs/first --to onnx,safetensors --out exported --int8
    """
    from limbeck.engine.export import export
    from limbeck.engine.progress import Progress

    result = export(
        folder,
        out=out,
        formats=[name.strip() for name in to.split(",") if name.strip()],
        int8=int8,
        opset=opset,
        batch=int(batch) if batch.isdecimal() else batch,  # type: ignore[arg-type]
        preprocessing=not no_preprocessing,
        samples=samples,
        tolerance=tolerance,
    )
    for text in result["warnings"]:
        Progress().warn(text)
    if json:
        print_json(result)
        return
    print_table(("file", "bytes"), [(name, count(entry["bytes"])) for name, entry in result["files"].items()], right=(1,))
    if "checked" in result:
        checked, milliseconds = result["checked"], result["latency"]["ms"]
        rows = [(name, number(accuracy, 4), number(milliseconds[name])) for name, accuracy in result["accuracy"].items()]
        print_table(("runtime", f"accuracy, {checked['split']}", "ms"), rows, right=(1, 2))
        print(
            f"model.onnx differs from PyTorch by at most {checked['max_difference']:.2g} on {checked['pictures']} pictures, "
            f"and names the same class on {checked['agreement']:.2%} of them"
        )
    print(f"exported: {out or folder / 'exported'}")
