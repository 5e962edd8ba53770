"""A diff of two runs as text for people and as JSON for programs."""

import math
from collections.abc import Iterator
from typing import IO, Any

from exactmoe.model.stages import WHOLE_MODEL
from exactmoe.parity.diff.metrics import Metrics, bucket_label
from exactmoe.parity.diff.router import RouterDiff, RouterToken
from exactmoe.parity.diff.traces import DiffReport
from exactmoe.parity.diff.verdict import First, StageDiff, Verdict

WIDTH = 100  # of the report where the output is not a terminal
_NAME_WIDTH = 20
_SHOWN = 20  # failed stages and changed tokens listed; the JSON has them all

_LABELS = {
    Verdict.NAN_LEFT: "NaN-L",
    Verdict.NAN_RIGHT: "NaN-R",
    Verdict.NAN_BOTH: "NaN",
    Verdict.MISSING: "none",
    Verdict.SHAPE: "shape",
    Verdict.INDEX_REORDERED: "order",
    Verdict.INDEX_SET: "set",
}


def cell(row: StageDiff) -> str:
    """A stage in a few characters: `=`, `~` (within the tolerance), the worst distance in ULP, or what is wrong."""
    if row.verdict is Verdict.MATCH:
        return "~" if row.differing else "="
    if row.verdict is not Verdict.DIFFER:
        return _LABELS[row.verdict]
    if row.metrics is None:
        return "differ"
    if row.metrics.infinite:
        return "inf"
    worst = row.metrics.worst_ulp or 0
    return str(worst) if worst < 1024 else f"2^{worst.bit_length() - 1}"


def as_json(report: DiffReport) -> dict[str, Any]:
    """Everything in the report, in JSON's types; infinities and NaN are the strings `inf`, `-inf`, `nan`."""
    return {
        "verdict": "equal" if report.equal else "not equal",
        "summary": report.verdict,
        "rule": report.rule,
        "left": report.left,
        "right": report.right,
        "stages": len(report.rows),
        "compared": report.compared,
        "elements": report.elements,
        "differing": report.differing,
        "first_difference": None if report.first is None else _row_json(report.first),
        "notes": list(report.notes),
        "facts": [dict(fact._asdict(), agree=fact.agree) for fact in report.facts],
        "tokens": list(report.tokens),
        "rows": [_row_json(row) for row in report.rows],
        "router": [_router_json(router) for router in report.router],
    }


def print_report(report: DiffReport, out: IO[str]) -> None:
    """Print what was compared, a table of stages and layers, what failed, the routers and the verdict to `out`."""
    from rich.console import Console

    console = Console(file=out, width=None if out.isatty() else WIDTH, highlight=False, soft_wrap=False)

    def line(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    line(f"left   {report.left}")
    line(f"right  {report.right}")
    for fact in report.facts:
        line(f"{fact.name:<18} {fact.left}" + ("" if fact.agree else f"  |  {fact.right}"))
    for note in report.notes:
        line(f"note: {note}")
    for table in _tables(report, console.width):
        console.print()
        console.print(table)
    console.print()
    line("= same bits, ~ within the tolerance, a number is the worst distance in ULP")
    for row in report.failed[:_SHOWN]:
        line(f"{row.name}: {row.text}")
        if row.first:
            line(f"    first {row.first}")
        if row.metrics:
            line(f"    {measured(row.metrics)}")
    if len(report.failed) > _SHOWN:
        line(f"... and {len(report.failed) - _SHOWN} stages more that do not pass")
    for router in report.router:
        line(str(router))
        for token in router.changed[:_SHOWN]:
            line(f"    {token_text(token)}")
        if len(router.changed) > _SHOWN:
            line(f"    ... and {len(router.changed) - _SHOWN} tokens more")
    line(f"DIFF: {report.verdict}")


def measured(found: Metrics) -> str:
    """The numbers of a stage in a line."""
    parts = [f"max abs {number(found.max_abs)}", f"max rel {number(found.max_rel)}", f"rms {number(found.rms)}"]
    parts.append(f"cosine {number(found.cosine, 10)}")
    parts.append("ulp " + " ".join(f"{bucket_label(i)}:{n}" for i, n in enumerate(found.ulp) if n))
    parts += [f"{name} {n}" for name, n in classes(found) if n]
    return ", ".join(parts)


def classes(found: Metrics) -> list[tuple[str, int]]:
    """Counts of what a distance cannot say."""
    return [
        ("-0 against +0", found.zero_sign),
        ("infinity against a number", found.infinite),
        ("NaN left only", found.nan_left),
        ("NaN right only", found.nan_right),
        ("NaN both", found.nan_both),
    ]


def number(value: float | None, digits: int = 4) -> str:
    """A measured number; `undefined` where there is none."""
    return "undefined" if value is None else f"{value:.{digits}g}"


def token_text(token: RouterToken) -> str:
    """A token's experts on both sides, and what would explain a change."""
    text = f"position {token.position}: {token.verdict}, {list(token.left)} and {list(token.right)}"
    if token.margin is not None:
        text += f", margin {number(token.margin)}"
    if token.margin_ulp is not None:
        text += f" ({token.margin_ulp:,} ULP)"
    return text + (f", logit error {number(token.error)}" if token.error is not None else ", logit error unknown")


def _tables(report: DiffReport, width: int) -> Iterator[Any]:
    """Stages down, layers across; as many tables as the layers need at this width."""
    from rich.table import Table
    from rich.text import Text

    rows: dict[str, dict[int, StageDiff]] = {}
    for row in report.rows:
        rows.setdefault(row.stage, {})[row.layer] = row
    layers = sorted({row.layer for row in report.rows} - {WHOLE_MODEL})
    each = max((width - _NAME_WIDTH - len("model")) // 8, 1)
    for start in range(0, max(len(layers), 1), each):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("stage", no_wrap=True)
        shown = [*([WHOLE_MODEL] if not start else []), *layers[start : start + each]]
        for layer in shown:
            table.add_column("model" if layer == WHOLE_MODEL else f"L{layer}", justify="right", no_wrap=True)
        for name, row_of in rows.items():
            cells = [row_of.get(layer) for layer in shown]
            if any(cells):
                texts = [Text(cell(r), style="" if r.passed else "bold red") if r else Text() for r in cells]
                table.add_row(name, *texts)
        yield table


def _row_json(row: StageDiff) -> dict[str, Any]:
    return {
        "stage": row.stage,
        "layer": row.layer,
        "verdict": row.verdict.value,
        "passed": row.passed,
        "text": row.text,
        "left": row.left,
        "right": row.right,
        "count": row.count,
        "differing": row.differing,
        "first": None if row.first is None else _first_json(row.first),
        "metrics": None if row.metrics is None else _metrics_json(row.metrics),
    }


def _first_json(first: First) -> dict[str, Any]:
    return {
        "coordinates": list(first.at),
        "where": first.where,
        "left": first.left,
        "left_bits": first.left_bits,
        "right": first.right,
        "right_bits": first.right_bits,
    }


def _metrics_json(found: Metrics) -> dict[str, Any]:
    return {
        "outside": found.outside,
        "ulp": {bucket_label(i): n for i, n in enumerate(found.ulp)},
        "worst_ulp": found.worst_ulp,
        "max_abs": _json_number(found.max_abs),
        "max_rel": _json_number(found.max_rel),
        "rms": _json_number(found.rms),
        "cosine": found.cosine,
        "zero_sign": found.zero_sign,
        "infinite": found.infinite,
        "nan_left": found.nan_left,
        "nan_right": found.nan_right,
        "nan_both": found.nan_both,
    }


def _router_json(router: RouterDiff) -> dict[str, Any]:
    tokens = [
        dict(
            token._asdict(),
            verdict=token.verdict.value,
            left=list(token.left),
            right=list(token.right),
        )
        for token in router.tokens
    ]
    return {"layer": router.layer, "tokens": tokens}


def _json_number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
