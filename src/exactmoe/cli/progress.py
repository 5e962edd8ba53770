"""A progress bar for people, on stderr; silent where stderr is not a terminal."""

import sys
from collections.abc import Iterable, Iterator
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
