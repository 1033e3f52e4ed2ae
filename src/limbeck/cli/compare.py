"""``limbeck compare``"""

from __future__ import annotations

from pathlib import Path

import typer

from limbeck.cli.output import number, print_json, print_table


def command(
    runs: list[Path] = typer.Argument(metavar="RUN...", help="Folders of finished runs."),
    json: bool = typer.Option(False, "--json", help="One JSON object instead of a table."),
) -> None:
    """Put finished runs side by side: metrics, size, latency, and the recipe keys in which they differ.

    Example: limbeck compare runs/sft runs/switch-kd
    """
    from limbeck.engine.compare import compare

    result = compare(runs)
    if json:
        print_json(result)
        return
    names = [str(run) for run in runs]
    rows = [(metric, *(number(values.get(name), 4) for name in names)) for metric, values in result["metrics"].items()]
    rows += [(f"recipe: {key}", *(str(values.get(name, "-")) for name in names)) for key, values in result["differences"].items()]
    print_table(("", *names), rows, right=range(1, len(names) + 1))
