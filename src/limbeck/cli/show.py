"""``limbeck show``"""

from __future__ import annotations

import typer

from limbeck.cli.output import print_json, print_table


def command(
    method: str = typer.Argument(help="A name of `limbeck list`."),
    json: bool = typer.Option(False, "--json", help="One JSON object instead of text."),
) -> None:
    """Show a method: its paper, what moves where, its hyper-parameters, the recipes that use it.

    Example: limbeck show switch-kd
    """
    from limbeck.engine.recipe import load_recipe, shipped_recipes
    from limbeck.methods.registry import describe, find, hyper_parameters

    entry = find(method)
    loaded = entry.load()
    hyper = hyper_parameters(loaded)
    recipes = [name for name, path in shipped_recipes().items() if load_recipe(path).method.name == method]
    if json:
        print_json(
            {"name": entry.name, "paper": entry.paper, "hyper_parameters": hyper, "recipes": recipes, "text": describe(loaded)}
        )
        return
    print(describe(loaded), end="\n\n")
    print(loaded.Config.__doc__ or "", end="\n")
    print_table(("hyper-parameter", "default"), [(name, repr(default)) for name, default in hyper.items()])
    print(f"recipes: {', '.join(recipes) or 'none'}")
