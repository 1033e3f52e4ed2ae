"""``limbeck bench``"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import typer

from limbeck.cli.output import count, number, print_json, print_table
from limbeck.errors import BadInput


def command(
    context: typer.Context,
    recipe: str = typer.Argument("", help="A YAML file, or the name of a shipped recipe. Any key: --train.lr 3e-4"),
    everything: bool = typer.Option(
        False, "--all", help="Every shipped recipe that has controls and brings its data; one table, scoreboard.md, in --out."
    ),
    only: str = typer.Option("", help="With --all: these recipes alone, as in trg,lelp."),
    seeds: int = typer.Option(3, help="How many seeds, from 0."),
    out: Path | None = typer.Option(
        None, help="Where the runs go; an interrupted bench goes on there. Default runs/bench-<time>."
    ),
    json: Path | None = typer.Option(None, "--json", help="Write the result as JSON to this file; - for standard output."),
    jobs: int | None = typer.Option(
        None, min=1, help="Runs at a time, each in a process; default 1, or one a core for embedded models on a CPU."
    ),
    quiet: bool = typer.Option(False, "--quiet", help="Warnings only on standard error."),
) -> None:
    """Train a recipe's method and its controls over seeds; means, deviations and paired 95 % intervals.

    Example: limbeck bench switch-kd --seeds 5 --json out.json
    """
    from limbeck.engine.bench import bench, bench_all

    if everything == bool(recipe):
        raise BadInput("bench takes a recipe or --all, and not both: limbeck bench switch-kd, or limbeck bench --all")
    folder = out or Path(f"runs/bench-{time.strftime('%Y%m%d-%H%M%S')}")
    if everything:
        names = tuple(name for name in only.split(",") if name)
        result = bench_all(seeds=seeds, out=folder, names=names, jobs=jobs, quiet=quiet)
    else:
        result = bench(recipe, seeds=seeds, out=folder, overrides=context.args, jobs=jobs, quiet=quiet)
    if json is not None and str(json) == "-":
        print_json(result)
        return
    if json is not None:
        import json as encoder

        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(encoder.dumps(result, indent=1))
    print_scores(result) if everything else print_bench(result)


def print_scores(result: dict[str, Any]) -> None:
    """The scoreboard: each system against each of its controls."""
    rows = [
        (
            row["method"],
            row["control"],
            heading(row["metric"]),
            number(row["method_mean"]),
            number(row["control_mean"]),
            f"{row['gain']:+.3f}",
            interval(row),
            number(row["seconds"], 0),
        )
        for row in result["rows"]
    ]
    head = ("system", "control", "metric", "with the system", "with the control", "gain", "95 % interval", "seconds, all arms")
    print_table(head, rows, right=(3, 4, 5, 7))
    for name, reason in result["failed"].items():
        print(f"not benched: {name}: {reason}")


def print_bench(result: dict[str, Any]) -> None:
    """The arms, then the method's paired difference to each."""
    measured = next(iter(result["arms"].values()))
    metrics = [name for name in measured if "/" not in name and name not in ("parameters", "seconds", "teacher_accuracy")]
    rows = []
    teacher, speed = result["teacher"], result["latency_ms"]
    if teacher:
        cells = [number(teacher.get(metric)) for metric in metrics]
        rows.append(("teacher", *cells, count(teacher["parameters"]), number(speed.get("teacher"), 2), "-"))
    order = [name for name in result["arms"] if name != result["method"]] + [result["method"]]
    for name in order:
        arm = result["arms"][name]
        cells = [spread(arm.get(metric)) for metric in metrics]
        rows.append(
            (name, *cells, count(arm["parameters"]["mean"]), number(speed.get(name), 2), number(arm["seconds"]["mean"], 1))
        )
    head = ("", *map(heading, metrics), "parameters", "CPU ms", "train s")
    print_table(head, rows, right=range(1, len(head)))
    gains = [
        (f"{result['method']} - {name}", heading(metric), f"{d['mean']:+.3f}", interval(d))
        for name, differences in result["paired"].items()
        for metric, d in differences.items()
        if metric in metrics
    ]
    print_table(("paired by seed", "metric", "mean", "95 % interval"), gains, right=(2,))
    print(f"{result['seeds']} seed{'s' if result['seeds'] > 1 else ''}, {result['split']} split; runs:")
    for name in order:
        print(f"  {name}: {result['runs'][name][0]}" + (f" ... {result['runs'][name][-1]}" if result["seeds"] > 1 else ""))


def heading(metric: str) -> str:
    """A metric's name as short as a column: "switch route", "teacher agreement"."""
    return metric.replace("_", " ").removesuffix(" accuracy")


def spread(cell: dict[str, Any] | None) -> str:
    """mean ± deviation."""
    if cell is None:
        return "-"
    return number(cell["mean"]) + (f" ± {cell['std']:.3f}" if cell["std"] is not None else "")


def interval(difference: dict[str, float | None]) -> str:
    """[low, high], or that one seed gives none."""
    if difference["low"] is None:
        return "one seed: none"
    return f"[{difference['low']:+.3f}, {difference['high']:+.3f}]"
