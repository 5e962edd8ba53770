"""What a parity run found, as a table for people and as JSON for programs."""

from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from exactmoe.model.stages import WHOLE_MODEL
from exactmoe.parity.run import Difference, ParityResult, ScheduleResult, Tally

if TYPE_CHECKING:
    from exactmoe.model.gguf.reader import GGUFFile

WIDTH = 100  # of the report where the output is not a terminal
_NAME_WIDTH = 20
_FIRST_SHOWN = 20  # differences listed; the JSON has them all


class Setting(NamedTuple):
    """What was run where."""

    model: str
    sha256: str
    numerics: str  # id and version of the contract
    profile: str
    device: str
    versions: dict[str, str]


def describe_setting(file: "GGUFFile", profile: str, device: str) -> Setting:
    """The setting of a run of `file`; `device` as given to `run_parity`. Reads the whole file for its digest."""
    from exactmoe.parity.provenance import device_name, numerics_version, versions

    return Setting(file.path, file.sha256(), numerics_version(), profile, device_name(device), versions())


def verdict(result: ParityResult) -> str:
    """The closing line."""
    tallies = list(_tallies(result))
    compared, differing = (f"{n:,}" for n in (sum(t.compared for t in tallies), sum(t.differing for t in tallies)))
    n_stages = result.coverage.compared
    if result.equal:
        return f"PARITY: equal, {compared} elements in {n_stages} stages, caches and schedules, 0 differ"
    return f"PARITY: NOT EQUAL, {differing} of {compared} elements differ; {_why_not(result)}"


def as_json(result: ParityResult, setting: Setting) -> dict[str, Any]:
    """Everything in the report, in JSON's types."""
    return {
        "verdict": "equal" if result.equal else "not equal",
        "summary": verdict(result),
        "model": {"path": setting.model, "sha256": setting.sha256},
        "numerics": setting.numerics,
        "activations": setting.profile,
        "device": setting.device,
        "versions": setting.versions,
        "tokens": list(result.tokens),
        "steps": result.steps,
        "chosen": list(result.chosen),
        "stages": [_tally_json(t) for t in result.stages],
        "caches": [_tally_json(t) for t in result.caches],
        "paths": [_tally_json(t) for t in result.paths],
        "schedules": [_schedule_json(s, result) for s in result.schedules],
        "coverage": dict(result.coverage._asdict(), complete=result.coverage.complete),
        "first_difference": _difference_json(result.first),
        "nan_logits": result.nan_logits,
        "digest": result.digest,
        "production_digest": result.run_digest,
        "rope_digest": result.rope_digest,
        "seconds": {phase: round(seconds, 3) for phase, seconds in result.seconds.items()},
    }


def print_report(result: ParityResult, setting: Setting, out: IO[str]) -> None:
    """Print the tables, what differs, the coverage and the verdict to `out`."""
    from rich.console import Console

    console = Console(file=out, width=None if out.isatty() else WIDTH, highlight=False, soft_wrap=False)

    def line(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    versions = ", ".join(f"{name} {version}" for name, version in setting.versions.items())
    line(f"model     {setting.model}")
    line(f"          sha256 {setting.sha256}")
    line(f"numerics  {setting.numerics}, activations {setting.profile}")
    line(f"device    {setting.device}; {versions}")
    line(f"run       {len(result.tokens)} prompt positions and {_count(result.steps, 'decode step')}, four paths")
    for table in _layer_tables(result, console.width):
        console.print()
        console.print(table)
    console.print()
    console.print(_path_table(result))
    for difference in _differences(result):
        line(f"first difference in {difference}")
    c = result.coverage
    emitted = f"emitted by reference {c.emitted_reference}, by triton {c.emitted_triton}"
    line(f"coverage   {c.requested} stages requested; {emitted}; compared {c.compared}")
    for text in c.missing[:_FIRST_SHOWN]:
        line(f"not emitted: {text}")
    for text in c.unexpected[:_FIRST_SHOWN]:
        line(f"emitted but not requested: {text}")
    if result.nan_logits:
        line(f"note: {result.nan_logits:,} logits are NaN; NaNs count as equal")
    line("seconds    " + ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in result.seconds.items()))
    line(f"rope table {result.rope_digest}")
    line(f"digest     {result.digest}")
    line(verdict(result))


def _layer_tables(result: ParityResult, width: int) -> Iterator[Any]:
    """Stages down, layers across; as many tables as the layers need at this width."""
    from rich.table import Table
    from rich.text import Text

    rows: dict[str, dict[int, Tally]] = {}
    for tally in (*result.stages, *result.caches):
        rows.setdefault(tally.name, {})[tally.layer] = tally
    layers = sorted({t.layer for t in (*result.stages, *result.caches)} - {WHOLE_MODEL})
    cell = max((len(_cell(t)) for row in rows.values() for t in row.values()), default=0)
    total = max((len(_total(row.values())) for row in rows.values()), default=0)
    each = max((width - _NAME_WIDTH - total - 4) // (max(cell, len("layer 00")) + 2), 1)
    for start in range(0, max(len(layers), 1), each):
        shown = layers[start : start + each]
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("stage", no_wrap=True)
        table.add_column("all layers", justify="right", no_wrap=True)
        for layer in shown:
            table.add_column(f"layer {layer}", justify="right", no_wrap=True)
        for name, row in rows.items():
            if start and WHOLE_MODEL in row:
                continue
            tallies = [row[layer] for layer in shown if layer in row]
            cells = [Text(_cell(t), style="" if t.equal else "bold red") for t in tallies]
            fine = all(t.equal for t in row.values())
            table.add_row(name, Text(_total(row.values()), style="" if fine else "bold red"), *cells)
        yield table


def _path_table(result: ParityResult) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("paths and schedules")
    table.add_column("covered")
    table.add_column("elements", justify="right", no_wrap=True)
    whole = f"prompt and {_count(result.steps, 'step')}"
    for tally in result.paths:
        table.add_row(tally.name, whole, Text(_total([tally]), style="" if tally.equal else "bold red"))
    for outcome in result.schedules:
        fine = outcome.tally.equal and _same_digest(outcome, result) is not False
        name = f"{outcome.schedule.name} = one chunk" if outcome.schedule.all_positions else outcome.schedule.name
        table.add_row(name, _covered(outcome, result), Text(_total([outcome.tally]), style="" if fine else "bold red"))
    return table


def _cell(tally: Tally) -> str:
    if tally.failed and not tally.differing:
        return "form" if tally.first and not tally.first.comparison.same_form else "nothing"
    return f"{tally.differing}/{tally.compared}" if tally.compared else "nothing"


def _total(tallies: Any) -> str:
    tallies = list(tallies)
    broken = [t for t in tallies if not t.equal and not t.differing]
    if broken:
        return f"{len(broken)} not compared"
    return f"{sum(t.differing for t in tallies)}/{sum(t.compared for t in tallies)} differ"


def _covered(outcome: ScheduleResult, result: ParityResult) -> str:
    plan = outcome.schedule
    n = len(result.tokens)
    text = f"all {n} positions" if plan.positions == n else f"the first {plan.positions} of {n} positions"
    text += ", " + _count(-(-plan.positions // plan.chunk), "chunk")
    if plan.steps:
        text += ", " + _count(plan.steps, "step")
    same = _same_digest(outcome, result)
    return text if same is None else text + (", same digest" if same else ", digest differs")


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _same_digest(outcome: ScheduleResult, result: ParityResult) -> bool | None:
    return None if outcome.digest is None else outcome.digest == result.run_digest


def _tallies(result: ParityResult) -> Iterator[Tally]:
    yield from result.stages
    yield from result.caches
    yield from result.paths
    yield from (s.tally for s in result.schedules)


def _differences(result: ParityResult) -> list[Difference]:
    """The earliest of the run, then the first of each thing that differs, at most _FIRST_SHOWN in all."""
    found = [result.first] if result.first else []
    found += [t.first for t in _tallies(result) if t.first is not None and t.first is not result.first]
    return found[:_FIRST_SHOWN]


def _why_not(result: ParityResult) -> str:
    if result.first is not None:
        return f"first in {result.first}"
    gaps: Sequence[str] = (*result.coverage.missing, *result.coverage.unexpected)
    if gaps:
        return f"stages do not match the request: {gaps[0]}"
    again = [s.schedule.name for s in result.schedules if _same_digest(s, result) is False]
    return f"{again[0]} has another digest" if again else "not everything was compared"


def _difference_json(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    c = difference.comparison
    return {
        "name": difference.name,
        "layer": difference.layer,
        "when": difference.when,
        "coordinates": None if c.first is None else list(c.first),
        "left": c.left,
        "right": c.right,
        "text": str(difference),
    }


def _tally_json(tally: Tally) -> dict[str, Any]:
    return {
        "name": tally.name,
        "layer": tally.layer,
        "compared": tally.compared,
        "differing": tally.differing,
        "equal": tally.equal,
        "first_difference": _difference_json(tally.first),
    }


def _schedule_json(outcome: ScheduleResult, result: ParityResult) -> dict[str, Any]:
    plan = outcome.schedule
    return {
        **_tally_json(outcome.tally),
        "chunk": plan.chunk,
        "positions": plan.positions,
        "positions_in_prompt": len(result.tokens),
        "steps": plan.steps,
        "digest": outcome.digest,
    }
