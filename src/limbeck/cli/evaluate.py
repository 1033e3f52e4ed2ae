"""``limbeck evaluate``"""

from __future__ import annotations

from pathlib import Path

import typer

from limbeck.cli.output import number, print_json, print_table


def command(
    folder: Path = typer.Argument(metavar="RUN", help="The folder of a finished run."),
    split: str = typer.Option("test", help="val or test."),
    protocol: list[str] = typer.Option([], help="What to measure; default: the recipe's. May be repeated."),
    json: bool = typer.Option(False, "--json", help="One JSON object instead of a table."),
) -> None:
    """Measure the student of a finished run again.

    Example: limbeck evaluate runs/first --split test --protocol teacher-agreement
    """
    from accelerate import PartialState

    from limbeck.engine.run import evaluate_run

    metrics = evaluate_run(folder, split=split, names=protocol or None)
    if not PartialState().is_main_process:
        return
    if json:
        print_json(metrics)
        return
    print_table(("metric", split), [(name, number(value, 4)) for name, value in metrics.items()], right=(1,))
