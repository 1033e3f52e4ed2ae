"""``limbeck probe``"""

from __future__ import annotations

from pathlib import Path

import typer

from limbeck.cli.output import number, print_json, print_table


def command(
    folder: Path = typer.Argument(metavar="RUN", help="The folder of a finished run that has a teacher."),
    split: str = typer.Option("val", help="val or test."),
    json: bool = typer.Option(False, "--json", help="One JSON object instead of a table."),
) -> None:
    """Do the student's errors come from seeing or from speaking? Swaps vision and language between teacher and student.

    Example: limbeck probe runs/first
    """
    from limbeck.engine.run import probe_run

    result = probe_run(folder, split=split)
    if json:
        print_json(result.as_dict())
        return
    table = result.accuracy
    rows = [(f"{vision} vision", *(number(table[vision][language]) for language in ("teacher", "student"))) for vision in table]
    print_table(("exact answers", "teacher language", "student language"), rows, right=(1, 2))
    for hybrid, reason in result.refused.items():
        print(f"{hybrid}: not legal: {reason}")
    print(f"{result.reading()} ({result.answers} answers, {split})")
