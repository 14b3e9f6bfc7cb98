"""A progress bar for the slow steps of preparing a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(description: str, total: int | None, done: int = 0) -> Iterator[Callable[[int], object]]:
    """Show a bar on stderr where that is a terminal.

    Args:
        description: text at the left of the bar.
        total: amount of work; ``None`` when it is unknown.
        done: amount done before.

    Yields:
        A function to call with each further amount done.
    """
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda amount: bar.advance(task, amount)
