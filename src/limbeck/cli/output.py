"""How commands print: tables for people, one JSON value for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

WIDE = 240  # columns, where standard output is a file or a pipe: nothing is folded there


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    print(json.dumps(value, indent=1))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """A table on standard output; ``right``: columns that hold numbers. Cells are plain text, never markup."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left", overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def count(value: float | None) -> str:
    """1,234,567 for a table; a dash where there is none."""
    return "-" if value is None else f"{value:,.0f}"
