"""Versions of contracts: MAJOR.MINOR.PATCH, and the bump from one to another."""

import re
from typing import Literal, NamedTuple

Bump = Literal["none", "patch", "minor", "major"]
BUMPS: tuple[Bump, ...] = ("none", "patch", "minor", "major")


class Version(NamedTuple):
    """One version; compares as numbers do."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return ".".join(map(str, self))


def version(text: str) -> Version | None:
    """The version that `text` spells, or None."""
    match = re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)", text)
    return Version(*map(int, match.groups())) if match else None


def bump(old: Version, new: Version) -> Bump | None:
    """How far `new` lies above `old`; None where it lies below."""
    if new < old:
        return None
    if new.major > old.major:
        return "major"
    if new.minor > old.minor:
        return "minor"
    return "patch" if new.patch > old.patch else "none"
