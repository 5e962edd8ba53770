"""Earlier runs, from the lines that `exactmoe bench --record` wrote: what changed, in speed and in numbers.

Runs of different days and machines are history, not a verdict: only runs interleaved in one go can say faster or
slower."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exactmoe.kernels.errors import InvalidInput

FOLDER = Path(__file__).resolve().parent / "results"


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a file, oldest first; a benchmark of another activation profile than q8_k is one of its own.

    Raises InvalidInput for a line that is no run."""
    runs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found = json.loads(line)
            found["commit"], found["date"]
            for row in found["rows"]:
                if found["activations"] != "q8_k":
                    row["name"] = f"{row['name']} {found['activations']}"
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{path}:{number}: not a recorded run: {error}") from error
        runs.append(found)
    return runs


def lines(runs: list[dict[str, Any]], names: list[str]) -> Iterator[str]:
    """The history of each benchmark, one line a run: median, share of the roof, and whether its numbers changed."""
    known = list(dict.fromkeys(row["name"] for run in runs for row in run["rows"]))
    for name in known:
        if names and name.split()[0] not in names:
            continue
        yield name
        before = None
        for run in runs:
            row = next((row for row in run["rows"] if row["name"] == name), None)
            what = f"  {run['date'][:16]}  {run['commit'][:12]:12}  {run['activations']:6}"
            if row is None:
                yield f"{what}  not run"
                continue
            changed = before not in (None, row["digest"])
            before = row["digest"]
            if not row["equal"]:
                yield f"{what}  WRONG: not the reference's bits"
                continue
            said = f"{row['cold'][0]:10.2f} us  {100 * row['roof']:5.1f}% of the roof"
            yield f"{what}  {said}{'  numbers changed' if changed else ''}"
