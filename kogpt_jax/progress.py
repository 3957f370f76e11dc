"""A progress bar on stderr for what is counted."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TextIO, cast


@contextlib.contextmanager
def counting(what: str, total: int, is_wanted: bool) -> Iterator[Callable[[], None]]:
    """Yields what to call after each of ``total``; it draws only if wanted and stderr is a terminal."""
    stderr = cast(TextIO | None, sys.stderr)  # None where the shell closed it
    if not is_wanted or stderr is None or not stderr.isatty():
        yield lambda: None
        return
    from rich import console, progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
