"""The command line: one file a command; what is heavy is imported by the command that needs it."""

from __future__ import annotations

import sys

import typer

from limbeck import __version__
from limbeck.cli import bench, cache, compare, evaluate, export, list_methods, probe, resume, run, show, synth, taps
from limbeck.errors import BadInput, LimbeckError

app = typer.Typer(
    name="limbeck",
    help="Distil visual knowledge from a large model into a small one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

app.command("list")(list_methods.command)
app.command("show")(show.command)
app.command("run", context_settings=OVERRIDES)(run.command)
app.command("resume")(resume.command)
app.command("cache", context_settings=OVERRIDES)(cache.command)
app.command("evaluate")(evaluate.command)
app.command("bench", context_settings=OVERRIDES)(bench.command)
app.command("compare")(compare.command)
app.command("probe")(probe.command)
app.command("export")(export.command)
app.command("taps")(taps.command)
app.add_typer(synth.app)


def print_version(asked: bool) -> None:
    if asked:
        print(f"limbeck {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", help="Print the version and leave.", callback=print_version, is_eager=True),
) -> None:
    """Distil visual knowledge from a large model into a small one."""


def main() -> None:
    """Exit status 0, 1 (failed) or 2 (bad input); either with one line on standard error."""
    try:
        app()
    except LimbeckError as error:
        print(f"limbeck: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)
