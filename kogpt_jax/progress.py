"""Progress bars: on stderr, and only if it is a terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TextIO, cast


@contextlib.contextmanager
def progress_bar(
    total: int, is_wanted: bool = True, *, counts_bytes: bool = False
) -> Iterator[Callable[[str, int], None]]:
    """Yields ``advance(description, amount)``: ``amount`` of ``total`` more, bytes or items, is done."""
    stderr = cast(TextIO | None, sys.stderr)  # None where the shell closed it
    if not is_wanted or stderr is None or not stderr.isatty():
        yield _draw_nothing
        return
    from rich import console, progress

    amounts = (
        (progress.DownloadColumn(), progress.TransferSpeedColumn())
        if counts_bytes
        else (progress.MofNCompleteColumn(), progress.TimeElapsedColumn())
    )
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        *amounts,
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)

        def advance(description: str, amount: int) -> None:
            bar.update(task, description=description, advance=amount)

        yield advance


def _draw_nothing(description: str, amount: int) -> None:
    pass
