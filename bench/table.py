"""The table of speeds in the README: the latest number of every benchmark of a history, and nothing else.

markdown(device, runs)       the table of one device
differences(text, wanted)    what a text's tables of speeds have other than those wanted"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exactmoe.bench.history import measured, read, short

_HEAD = "| on {} | median | p10 to p90 | GB/s | of the roof | commit | date |"
_RULE = "|---|--:|--:|--:|--:|---|---|"
_TABLE = re.compile(r"^\| on [^|\n]+ \| median \|.*\n(?:\|.*\n?)*", re.MULTILINE)


def tables(folder: Path) -> list[str]:
    """The table of every history in `folder`, by the names of the devices."""
    return sorted(table for path in folder.glob("*.jsonl") for table in by_device(read(path)))


def by_device(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table for each device of some runs."""
    return [
        markdown(name, [run for run in runs if run["device"] == name]) for name in sorted({r["device"] for r in runs})
    ]


def markdown(device: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """The table of one device's runs, oldest run first."""
    latest = {row["name"]: (run, row) for run in runs for row in run["rows"]}
    return "\n".join([_HEAD.format(device), _RULE, *(_line(run, row) for run, row in latest.values())])


def differences(text: str, wanted: Sequence[str]) -> list[str]:
    """A diff from the tables of speeds in `text` to those wanted; empty where they are the same."""
    found = [line for table in sorted(t.strip() for t in _TABLE.findall(text)) for line in table.splitlines()]
    wanted_lines = [line for table in wanted for line in table.splitlines()]
    return list(difflib.unified_diff(found, wanted_lines, lineterm="", n=0))[2:]  # without its two lines of file names


def _line(run: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    found = measured(row)
    if found is None:
        cells = ["wrong, so it has no number", "", "", ""]
    else:
        median, low, high, unit = _legible(*found)
        spread = "" if low == high == median else f"{_short(low)} to {_short(high)}"
        rate = "" if row["gb_s"] is None else f"{row['gb_s']:,.0f}"
        share = "" if row["roof"] is None else f"{100 * row['roof']:.1f}%"
        cells = [f"{_short(median)} {unit}", spread, rate, share]
    return f"| {row['name']} | {' | '.join(cells)} | `{short(run['commit'])}` | {run['date'][:10]} |"


def _legible(median: float, low: float, high: float, unit: str) -> tuple[float, float, float, str]:
    """Times from 10,000 us on in ms."""
    if unit != "us" or median < 10_000:
        return median, low, high, unit
    return median / 1000, low / 1000, high / 1000, "ms"


def _short(value: float) -> str:
    """Four digits, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
