"""Earlier runs, from the lines that `exactmoe bench --record` wrote: what changed, in speed and in numbers.

Runs of different days and machines are history, not a verdict: only runs interleaved in one go can say faster or
slower."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from exactmoe.kernels.errors import InvalidInput, require

_RUN = ("date", "commit", "device", "activations", "model")
_ROW = ("name", "equal", "digest", "cold", "gb_s", "roof", "gib")
FOLDER = Path(__file__).resolve().parent / "results"


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a file, oldest first; another activation profile than q8_k, or another model, is another benchmark.

    Raises InvalidInput for a line that is no run."""
    runs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found = json.loads(line)
            missing = [key for key in _RUN if key not in found]
            for row in found["rows"]:
                missing += [key for key in _ROW if key not in row]
            for row in (*found["rows"], *found.get("peers", ())):
                if found["activations"] != "q8_k":
                    row["name"] += f" {found['activations']}"
                if found["model"]:
                    row["name"] += f" ({found['model']})"
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{path}:{number}: not a recorded run: {error}") from error
        require(not missing, f"{path}:{number}: not a recorded run: without {', '.join(dict.fromkeys(missing))}")
        runs.append(found)
    return runs


def short(commit: str) -> str:
    """A commit to read; the + of a tree that had changes stays."""
    return commit[:12] + "+" * commit.endswith("+")


def measured(row: Mapping[str, Any]) -> tuple[float, float, float, str] | None:
    """Median, p10 and p90 of a row and their unit; None where it has no number."""
    if row["gib"] is not None:
        return row["gib"], row["gib"], row["gib"], "GiB"
    return None if row["cold"] is None else (*row["cold"], "us")


_Found = tuple[Mapping[str, Any], Mapping[str, Any]]  # a row, and the run that it is of


def labels(row: Mapping[str, Any], run: Mapping[str, Any], before: _Found | None) -> list[str]:
    """What else than speed changed since `before`: numbers, or what a time means, which of a model's rows never did."""
    if before is None:
        return []
    methods = {0 if each["model"] else each.get("method", 1) for each in (before[1], run)}
    return ["numbers changed"] * (before[0]["digest"] != row["digest"]) + ["timed otherwise"] * (len(methods) > 1)


def lines(runs: list[dict[str, Any]], names: list[str]) -> Iterator[str]:
    """The history of each benchmark, one line a run: median, share of the roof, and whether its numbers changed, or its
    clock.

    A run of another profile or model could not hold it, and has no line."""
    kinds = {row["name"]: _kind(run) for run in runs for row in run["rows"]}
    for name, kind in kinds.items():
        if names and name.split()[0] not in names:
            continue
        yield name
        before = None
        for run in runs:
            if _kind(run) != kind:
                continue
            row = next((row for row in run["rows"] if row["name"] == name), None)
            what = f"  {run['date'][:16]}  {short(run['commit']):13}  {run['activations']:6}"
            if row is None:
                yield f"{what}  not run"
                continue
            changed, before = labels(row, run, before), (row, run)
            if not row["equal"]:
                yield f"{what}  WRONG: not the reference's bits"
                continue
            found = measured(row)
            said = f"{found[0]:10.2f} {found[3]}" if found else "no number"
            share = "" if row["roof"] is None else f"  {100 * row['roof']:5.1f}% of the roof"
            yield f"{what}  {said}{share}{''.join(f'  {label}' for label in changed)}"


def _kind(run: Mapping[str, Any]) -> tuple[str, str]:
    """What a run is of: the profile, and the model or none."""
    return run["activations"], run["model"]
