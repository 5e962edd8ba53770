"""What a recorded test run showed: a JSON file with a seal, a checksum that an accidental edit breaks.

    {"format": 2, "device": "cpu" | "gpu", "machine": ..., "versions": {...}, "commit": ..., "date": ...,
     "numerics": ..., "files": {path: sha256}, "tests": {node id: [passed, failed, skipped, left out]},
     "seal": sha256 of all the rest}

A node id stands for all its parameters; left out are those that were collected and did not run. A test that was left
out whole is not in it, and proves nothing."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

FORMAT = 2
FOLDER = "contracts/evidence"
"""Where the records that ship lie, relative to the repository."""

Outcome = Literal["passed", "failed", "skipped"]


class Unusable(ValueError):
    """A record that cannot be believed, and why."""


@dataclass(frozen=True)
class Record:
    """One test run."""

    device: str  # cpu: kernels ran in Triton's interpreter; gpu
    machine: str  # the GPU's name, or the CPU's
    versions: dict[str, str]
    commit: str  # with "+" behind it where the tree had changes; "unknown" without git
    date: str  # UTC, ISO 8601
    numerics: str  # version of the arithmetic
    files: dict[str, str]  # what any contract covers or cites -> sha256
    tests: dict[str, tuple[int, int, int, int]]  # node id without parameters -> passed, failed, skipped, left out

    def outcome(self, node_id: str) -> Outcome | None:
        """What became of a test: failed if any of its parameters did, passed if all did that this device can run.

        None if it did not run. Parameters are left out on a cpu that need a gpu; on a gpu none may be, or the test has
        not run: what others did says nothing of them."""
        passed, failed, skipped, left_out = self.tests.get(node_id, (0, 0, 0, 0))
        if failed:
            return "failed"
        if skipped:
            return "skipped"
        return "passed" if passed and not (left_out and self.device == "gpu") else None

    def changed(self, paths: Iterable[str], root: Path) -> list[str]:
        """Those of `paths`, relative to `root`, whose content is no longer what the run saw."""
        return [path for path in paths if self.files.get(path) != content_hash(root / path)]

    def dump(self) -> str:
        """The record as JSON, sealed."""
        data: dict[str, Any] = {"format": FORMAT, **asdict(self)}
        return json.dumps({**data, "seal": _seal(data)}, indent=1) + "\n"

    @staticmethod
    def load(path: Path) -> "Record":
        """Read a record. Raises Unusable for one that is none, or that was changed since it was written."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise Unusable(f"{path}: no evidence can be read: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise Unusable(f"{path}: no record of evidence of format {FORMAT}")
        seal = data.pop("seal", None)
        if seal != _seal(data):
            raise Unusable(f"{path}: its seal does not fit: it was changed after the run that wrote it")
        del data["format"]
        try:
            record = Record(**{**data, "tests": {name: tuple(counts) for name, counts in data["tests"].items()}})
        except (TypeError, KeyError, AttributeError) as error:
            raise Unusable(f"{path}: not the fields of a record: {error}") from error
        if any(len(counts) != 4 for counts in record.tests.values()):
            raise Unusable(f"{path}: a test has four counts: passed, failed, skipped, left out")
        if record.device not in ("cpu", "gpu"):
            raise Unusable(f"{path}: device must be cpu or gpu, got {record.device!r}")
        return record


def _seal(data: Mapping[str, Any]) -> str:
    text = json.dumps({name: value for name, value in data.items() if name != "seal"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def content_hash(path: Path) -> str:
    """sha256 of a file, or "" where there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def write(record: Record, path: Path) -> None:
    """Write a record whole, or leave what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(record.dump(), encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
