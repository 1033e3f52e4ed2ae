"""What a person sees while a run trains: a bar on a terminal, a line an evaluation elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Writes to standard error, so that standard output stays free for results. quiet: say nothing but warnings."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.quiet = quiet
        self._bar: Bar | None = None

    @contextmanager
    def bar(self, total: int, done: int) -> Iterator[None]:
        """Show progress from ``done`` to ``total`` steps; on a terminal only."""
        if self.quiet or not self.console.is_terminal:
            yield
            return
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Bar(*columns, console=self.console, transient=True) as self._bar:
            self._task = self._bar.add_task("", total=total, completed=done)
            yield
        self._bar = None

    def advance(self, step: int, terms: Mapping[str, float], rate: float) -> None:
        """Move the bar to ``step`` and show the weighted terms."""
        if self._bar is not None:
            losses = "  ".join(f"{name} {value:.3f}" for name, value in terms.items())
            self._bar.update(self._task, completed=step, description=f"{losses}  {rate:.0f} samples/s")

    def note(self, text: str) -> None:
        """A line that stays."""
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A warning; shown even when quiet."""
        self.console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)
