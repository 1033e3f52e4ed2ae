"""``limbeck cache``"""

from __future__ import annotations

from pathlib import Path

import typer

from limbeck.cli.output import count, number, print_json, print_table


def command(
    context: typer.Context,
    recipe: str = typer.Argument(help="A YAML file, or the name of a shipped recipe. Any key: --data.path more.jsonl"),
    out: Path = typer.Option(help="The folder of the cache; one that holds a part of it is completed."),
    top_k: int | None = typer.Option(None, help="Ids kept of each distribution; default 64."),
    views: int | None = typer.Option(None, help="Random draws kept of each sample, where pictures are augmented; default 1."),
    shard: int | None = typer.Option(None, help="Samples a file, which is what a crash can lose; default 1024."),
    batch_size: int = typer.Option(64, help="Samples that the teacher reads at once."),
    json: bool = typer.Option(False, "--json", help="One JSON object on standard output."),
    quiet: bool = typer.Option(False, "--quiet", help="Warnings only on standard error."),
) -> None:
    """Ask a recipe's teacher once about every training sample, and keep what it says; any number of processes may do it together.

    Example: limbeck cache switch-kd --method '{name: kd}' --out caches/digits
    """
    from accelerate import PartialState

    from limbeck.engine.cache import cache

    result = cache(
        recipe, out=out, top_k=top_k, views=views, shard=shard, batch_size=batch_size, overrides=context.args, quiet=quiet
    )
    if not PartialState().is_main_process:
        return
    if json:
        print_json(result)
        return
    rows = []
    for name, entry in result["entries"].items():
        covered = entry.get("covered", {})
        masses = (number(covered.get(part), 4) for part in ("mean", "p5", "min"))
        rows.append((name, entry["kind"], count(entry["rows"]), number(entry["bytes_a_row"], 1), *masses))
    head = ("entry", "kind", "rows", "bytes a row", "covered mass: mean", "5th percentile", "minimum")
    print_table(head, rows, right=range(2, len(head)))
    views_of = f" x {result['views']} views" if result["views"] > 1 else ""
    print(
        f"{count(result['samples'])} samples{views_of} in {result['shards']} files, {result['bytes'] / 2**20:,.1f} MiB, "
        f"{result['seconds']:.1f} s: {result['path']}\ntrain from it: limbeck run RECIPE --cache {result['path']}"
    )
