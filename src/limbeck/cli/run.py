"""``limbeck run``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from limbeck.cli.output import number, print_json, print_table

if TYPE_CHECKING:
    from limbeck.engine.run import Run


def command(
    context: typer.Context,
    recipe: str = typer.Argument(help="A YAML file, or the name of a shipped recipe. Any key: --train.lr 3e-4"),
    out: Path | None = typer.Option(None, help="The run folder; default runs/<method>-<time>."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the plan and what it would cost; train nothing."),
    json: bool = typer.Option(False, "--json", help="One JSON object on standard output."),
    quiet: bool = typer.Option(False, "--quiet", help="Warnings only on standard error."),
) -> None:
    """Distil what a recipe describes.

    Example: limbeck run switch-kd --out runs/first --train.steps 200
    """
    if dry_run:
        from limbeck.engine.plan import plan, print_plan

        planned = plan(recipe, overrides=context.args)
        print_json(planned) if json else print_plan(planned)
        return
    from limbeck.engine.run import run

    finished = run(recipe, out=out, overrides=context.args, quiet=quiet)
    report(finished, json)


def report(finished: Run, json: bool) -> None:
    """What a finished run says of itself; by the first process only."""
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    if json:
        print_json({"path": str(finished.path), "validation": finished.validation, "test": finished.test})
        return
    names = list(dict.fromkeys([*finished.validation, *finished.test]))
    rows = [(name, number(finished.validation.get(name), 4), number(finished.test.get(name), 4)) for name in names]
    print_table(("metric", "validation", "test"), rows, right=(1, 2))
    print(f"run: {finished.path}\nstudent: {finished.path / 'student'}")
