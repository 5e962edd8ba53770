"""Progress for people, on stderr; silent where stderr is not a terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items of `iterable`, drawing how many of `total` (default: its length) have gone by.

    The bar is on stderr and is wiped at the end; where stderr is not a terminal there is none."""
    if not sys.stderr.isatty():
        yield from iterable
        return
    from rich import progress
    from rich.console import Console

    yield from progress.track(iterable, description, total, console=Console(stderr=True), transient=True)


@contextlib.contextmanager
def status() -> Iterator[Callable[[str], None] | None]:
    """A line that says what is running now: call what it yields with the words; None where there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as line:
        yield line.update


@contextlib.contextmanager
def transfer(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar of bytes done and of how many, on stderr; None where there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
