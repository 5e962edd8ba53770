"""What a check of a contract has to say: `file:line:column: CODE message`, an error or a warning."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

Severity = Literal["error", "warning"]
Where = tuple[str | int, ...]
"""A place in a contract, as keys and indices from the top: ("proof_obligations", 2, "formal")."""


class Position(NamedTuple):
    """Line and column in a file, both counted from 1."""

    line: int
    column: int


@dataclass(frozen=True, order=True)
class Finding:
    """One thing that is wrong: where, by which rule, and in words that name the field."""

    file: str
    line: int
    column: int
    code: str
    message: str
    severity: Severity = "error"

    def __str__(self) -> str:
        mark = "" if self.severity == "error" else "warning: "
        return f"{self.file}:{self.line}:{self.column}: {self.code} {mark}{self.message}"

    def as_json(self) -> dict[str, Any]:
        """The finding as JSON holds it."""
        return asdict(self)


def spelled(where: Where) -> str:
    """`where` as a reader writes it: metadata.references, proof_obligations[2].formal."""
    text = ""
    for part in where:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "the contract"


def shown(path: Path) -> str:
    """`path` as messages give it: relative to the working directory where it lies below it."""
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return path.as_posix()
