"""``python -m limbeck``: what ``accelerate launch -m limbeck run recipe.yaml`` calls."""

from limbeck.cli.main import main

main()
