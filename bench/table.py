"""The tables of speeds in the README: the latest number of every benchmark of a history, and nothing else.

markdown(device, runs)       the table of one device
beside(device, runs)         other software on it, each with our number of the same run
differences(text, wanted)    what a text's tables of speeds have other than those wanted"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exactmoe.bench.history import measured, read, short

_HEAD = "| on {} | median | p10 to p90 | GB/s | of the roof | commit | date |"
_RULE = "|---|--:|--:|--:|--:|---|---|"
_BESIDE = "| beside us on {} | theirs | ours | theirs to ours | computes in | version | commit | date |"
_BESIDE_RULE = "|---|--:|--:|--:|---|---|---|---|"
_TABLE = re.compile(r"^\| (?:on [^|\n]+ \| median|beside us on [^|\n]+ \| theirs) \|.*\n(?:\|.*\n?)*", re.MULTILINE)


def tables(folder: Path) -> list[str]:
    """The table of every history in `folder`, by the names of the devices."""
    return sorted(table for path in folder.glob("*.jsonl") for table in by_device(read(path)))


def by_device(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tables of each device of some runs."""
    found = []
    for name in sorted({run["device"] for run in runs}):
        own = [run for run in runs if run["device"] == name]
        found += [markdown(name, own), beside(name, own)]
    return [table for table in found if table]


def markdown(device: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """The table of one device's runs, oldest run first."""
    latest = {row["name"]: (run, row) for run in runs for row in run["rows"]}
    return "\n".join([_HEAD.format(device), _RULE, *(_line(run, row) for run, row in latest.values())])


def beside(device: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """The table of other software that was timed beside us; empty where there was none."""
    latest = {}
    for run in runs:
        ours = {row["name"]: row["cold"] for row in run["rows"]}
        for peer in run.get("peers", ()):
            if peer.get("cold") and ours.get(peer["name"]):
                latest[peer["name"], peer["peer"]] = (run, peer, ours[peer["name"]][0])
    if not latest:
        return ""
    lines = [_beside(*found) for _, found in sorted(latest.items(), key=lambda item: _counted(item[0][0]))]
    return "\n".join([_BESIDE.format(device), _BESIDE_RULE, *lines])


def _counted(name: str) -> list[str | int]:
    """A name to sort by, its numbers as numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _beside(run: Mapping[str, Any], peer: Mapping[str, Any], ours: float) -> str:
    theirs = peer["cold"][0]
    cells = [f"{peer['name']}, {peer['peer']}", f"{_short(theirs)} us", f"{_short(ours)} us", f"{theirs / ours:.2f}"]
    cells += [peer.get("computes", ""), peer.get("version", ""), f"`{short(run['commit'])}`", run["date"][:10]]
    return f"| {' | '.join(cells)} |"


def differences(text: str, wanted: Sequence[str]) -> list[str]:
    """A diff from the tables of speeds in `text` to those wanted; empty where they are the same."""
    found = [line for table in sorted(t.strip() for t in _TABLE.findall(text)) for line in table.splitlines()]
    wanted_lines = [line for table in sorted(wanted) for line in table.splitlines()]
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
