"""The same comparison again and again: how often it says faster, slower or the same, and how sure that rate is.

With both sides the same revision every faster or slower is a false alarm; with a slowdown planted in this one, every
slower is a slowdown seen."""

from collections import Counter
from collections.abc import Iterable
from math import sqrt
from typing import Any, NamedTuple

from exactmoe.bench.compare import Verdict

_Z = 1.959964  # of 95%


class Rate(NamedTuple):
    """How often something was said, and the 95% interval of its rate."""

    seen: int
    of: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.seen} of {self.of} ({100 * self.low:.1f} to {100 * self.high:.1f}%)"


def wilson(count: int, of: int) -> Rate:
    """The rate with Wilson's interval, which holds at 0 and at all too."""
    p, z2 = count / of, _Z * _Z
    middle, half = p + z2 / (2 * of), _Z * sqrt(p * (1 - p) / of + z2 / (4 * of * of))
    return Rate(count, of, max(0.0, (middle - half) / (1 + z2 / of)), min(1.0, (middle + half) / (1 + z2 / of)))


def tally(verdicts: Iterable[Verdict]) -> dict[str, dict[str, Rate]]:
    """For each benchmark the rate of faster, slower and same, and of other verdicts that were given."""
    counts: dict[str, Counter[str]] = {}
    for verdict in verdicts:
        counts.setdefault(verdict.name, Counter())[verdict.verdict] += 1
    return {
        name: {said: wilson(found[said], found.total()) for said in dict.fromkeys(("faster", "slower", "same", *found))}
        for name, found in counts.items()
    }


def lines(rates: dict[str, dict[str, Rate]]) -> list[str]:
    """A line for each benchmark."""
    return [
        f"{name:20} " + ", ".join(f"{said} {rate}" for said, rate in found.items()) for name, found in rates.items()
    ]


def to_dict(rates: dict[str, dict[str, Rate]]) -> dict[str, Any]:
    """As JSON has it."""
    return {name: {said: rate._asdict() for said, rate in found.items()} for name, found in rates.items()}
