"""A diff of two runs as one HTML file: no script, no address outside the file, light and dark, readable as text."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from exactmoe.model.stages import WHOLE_MODEL
from exactmoe.parity.diff.metrics import Metrics, bucket_label
from exactmoe.parity.diff.report import classes, number
from exactmoe.parity.diff.router import RouterVerdict
from exactmoe.parity.diff.traces import DiffReport, Fact
from exactmoe.parity.diff.verdict import First, StageDiff
from exactmoe.parity.html.heatmap import heat_map
from exactmoe.parity.html.router import router_view
from exactmoe.parity.html.style import CSS

_FIELDS = {"float16": (1, 5, 10), "float32": (1, 8, 23), "float64": (1, 11, 52)}  # sign, exponent, fraction


def render_report(report: DiffReport, evidence: Mapping[str, Any] | None = None) -> str:
    """The whole page. `evidence` is what a bisection found: any tree of JSON's types, shown as it is."""
    sections = [("", _tiles(report))]
    if report.first is not None:
        sections.append((f"First difference: {report.first.name}", _first(report.first)))
    if evidence:
        sections.append(("Bisection", tree(evidence)))
    if any(row.layer != WHOLE_MODEL for row in report.rows):
        sections.append(("Worst distance by stage and layer", heat_map(report)))
    if report.router:
        sections.append(("Routers", router_view(report.router, report.tokens)))
    sections += [(report.what.capitalize(), _stages(report)), ("What was compared", _provenance(report))]
    body = "".join(f"<section>{f'<h2>{escape(head)}</h2>' if head else ''}{part}</section>" for head, part in sections)
    outcome = "Equal" if report.equal else "Not equal"
    return shell(f"{outcome}: {report.title}", report.title, _banner(report, outcome) + body)


def shell(title: str, head: str, body: str) -> str:
    """A whole page around `body`, which is HTML; `title` of the window and `head` are text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{CSS}</style></head>"
        f"<body><main><h1>{escape(head)}</h1>{body}</main></body></html>\n"
    )


def tree(value: Any) -> str:
    """Any value of JSON's types as HTML: objects as lists of terms, lists of objects as tables."""
    if isinstance(value, Mapping):
        items = "".join(f"<dt>{escape(_words(key))}</dt><dd>{tree(item)}</dd>" for key, item in value.items())
        return f'<dl class="tree">{items}</dl>'
    if isinstance(value, Sequence) and not isinstance(value, str):
        if value and all(isinstance(item, Mapping) for item in value):
            return _objects(value)
        if any(isinstance(item, Mapping | list | tuple) for item in value):
            return "<ol>" + "".join(f"<li>{tree(item)}</li>" for item in value) + "</ol>"
        return ", ".join(tree(item) for item in value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        return f'<span class="mono">{value}</span>'
    text = escape(str(value))
    code = str(value).startswith(("exactmoe ", "0x"))
    return f"<code>{text}</code>" if code else text


def _objects(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{escape(_words(name))}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join("<td>" + (tree(row[name]) if name in row else "") + "</td>" for name in names) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table class="rows"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _words(name: object) -> str:
    return str(name).replace("_", " ")


def _banner(report: DiffReport, outcome: str) -> str:
    detail = report.verdict if report.first is None else f"First difference ({report.rule}): {report.first}"
    style = "yes" if report.equal else "no"
    return f'<div class="banner {style}"><strong>{outcome}</strong><p>{escape(detail)}</p></div>'


def _tiles(report: DiffReport) -> str:
    worst = max((row.metrics.worst_ulp or 0 for row in report.rows if row.metrics), default=None)
    tiles = [
        ("compared", f"{report.compared:,} of {len(report.rows):,} {_noun(report)}"),
        ("not passed", f"{len(report.failed):,}"),
        ("elements compared", f"{report.elements:,}"),
        ("with other bits", f"{report.differing:,}"),
    ]
    if worst is not None:
        tiles.append(("worst distance, ULP", f"{worst:,}"))
    if report.router:
        changed = sum(len(router.changed) for router in report.router)
        unexplained = sum(router.count(RouterVerdict.UNEXPLAINED) for router in report.router)
        tiles.append(
            ("tokens routed otherwise", f"{changed:,}" + (f", {unexplained:,} unexplained" if changed else ""))
        )
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles)
    return f'<dl class="tiles">{items}</dl>'


def _noun(report: DiffReport) -> str:
    """What the rows are, if it is short."""
    return report.what if " " not in report.what else "rows"


def _first(row: StageDiff) -> str:
    parts = [f"<p>{escape(row.text)}</p>"]
    if row.first:
        where = f" ({escape(row.first.where)})" if row.first.where else ""
        parts.append(f"<p>Element <code>{row.first.at}</code>{where}</p>")
        parts.append(f'<div class="scroll">{_pair(row.first, row.left.split(" ")[0])}</div>')
    else:
        parts.append(f"<p>left <code>{escape(row.left)}</code>, right <code>{escape(row.right)}</code></p>")
    if row.metrics:
        parts.append(f'<div class="side"><div><h3>Distances</h3>{_histogram(row.metrics)}</div>{_numbers(row)}</div>')
    return "".join(parts)


def _pair(first: First, dtype: str) -> str:
    """Both values in decimal, hex and binary, with the bits that differ marked."""
    left, right = (_binary(bits) for bits in (first.left_bits, first.right_bits))
    rows = []
    for side, value, bits, own, other in (
        ("left", first.left, first.left_bits, left, right),
        ("right", first.right, first.right_bits, right, left),
    ):
        strip = f'<td class="mono bits">{_strip(own, other, _FIELDS.get(dtype, ()))}</td>' if own else ""
        rows.append(f'<tr><th scope="row">{side}</th><td class="mono">{escape(value)}</td>'
                    f'<td class="mono">{escape(bits)}</td>{strip}</tr>')  # fmt: skip
    head = "sign, exponent, fraction" if dtype in _FIELDS else "bits"
    head = f"<tr><td></td><th>decimal</th><th>hex</th><th>{head if left else ''}</th></tr>"
    return f'<table class="pair">{head}{"".join(rows)}</table>'


def _binary(bits: str) -> str:
    return f"{int(bits, 16):0{4 * (len(bits) - 2)}b}" if bits.startswith("0x") else ""


def _strip(own: str, other: str, fields: Sequence[int]) -> str:
    ends = {sum(fields[: n + 1]) for n in range(len(fields) - 1)}
    out = []
    for n, bit in enumerate(own):
        styles = [*(["x"] if other[n : n + 1] != bit else []), *(["gap"] if n + 1 in ends else [])]
        style = f' class="{" ".join(styles)}"' if styles else ""
        out.append(f"<i{style}>{bit}</i>")
    return "".join(out)


def _histogram(found: Metrics) -> str:
    """Elements by distance, heights on a log scale, counts written."""
    bars = [(bucket_label(n), count, "zero" if n == 0 else "bar") for n, count in enumerate(found.ulp)]
    if not bars:
        return "<p>No pair of finite numbers.</p>"
    while len(bars) > 2 and bars[1][1] == 0:  # what lies empty between 0 and the first distance
        del bars[1]
    top = max(count.bit_length() for _, count, _ in bars)
    step = max(26, min(46, 1080 // len(bars)))
    width, height, floor = step * len(bars) + 8, 168, 118
    parts = []
    for x, (label, count, style) in enumerate(bars):
        middle, tall = step * x + step // 2 + 3, round(96 * count.bit_length() / top) if count else 0
        left = middle - step // 2 + 6
        parts.append(f'<rect class="{style}" x="{left}" y="{floor - tall}" width="{step - 12}" height="{tall}"/>')
        if count:
            parts.append(f'<text text-anchor="middle" x="{middle}" y="{floor - tall - 4}">{_short(count)}</text>')
        parts.append(
            f'<text class="soft" text-anchor="end" transform="translate({middle + 4} {floor + 12}) rotate(-35)">'
            f"{_power_text(label)}</text>"
        )
    said = ", ".join(f"{label}: {count}" for label, count, _ in bars if count)
    return (
        f'<div class="scroll"><svg role="img" aria-label="Elements by distance in ULP. {said}" width="{width}" '
        f'height="{height}"><title>Elements by distance in ULP: {said}</title>{"".join(parts)}</svg></div>'
        '<p class="soft">Elements by distance in ULP; heights on a log scale.</p>'
    )


def _power_text(label: str) -> str:
    """A bucket's label short enough for an axis."""
    return escape(label.split(" to ", maxsplit=1)[0] + "+" if " to " in label else label)


def _short(count: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**4)):
        if count >= size:
            return f"{count / (1000 if unit == 'k' else size):.3g}{unit}"
    return str(count)


def _numbers(row: StageDiff) -> str:
    found = row.metrics
    if found is None:
        return ""
    facts = [
        ("elements", f"{found.count:,}"),
        ("with other bits", f"{found.differing:,}"),
        ("worst distance", "undefined" if found.worst_ulp is None else f"{found.worst_ulp:,} ULP"),
        ("max abs", number(found.max_abs)),
        ("max rel", number(found.max_rel)),
        ("RMS", number(found.rms)),
        ("cosine, float64", number(found.cosine, 12)),
        *((name, f"{n:,}") for name, n in classes(found)),
    ]
    items = "".join(f'<tr><th scope="row">{name}</th><td class="mono">{value}</td></tr>' for name, value in facts)
    return f'<div><h3>Measured</h3><table class="pair">{items}</table></div>'


def _stages(report: DiffReport) -> str:
    numbered = list(enumerate(report.rows))
    failed = [(n, row) for n, row in numbered if not row.passed]
    passed = [(n, row) for n, row in numbered if row.passed]
    parts = []
    if failed:
        parts.append(f"<h3>{len(failed):,} not passed</h3>{_rows(failed)}")
    if passed:
        parts.append(f"<details><summary>{len(passed):,} passed</summary>{_rows(passed)}</details>")
    return "".join(parts) or "<p>Nothing was compared.</p>"


def _rows(rows: Sequence[tuple[int, StageDiff]]) -> str:
    nan = any(row.metrics and (row.metrics.nan_left + row.metrics.nan_right + row.metrics.nan_both) for _, row in rows)
    numbers = ["layer", "differing", "elements", "worst ULP", "max abs", "max rel", "RMS", "cosine"]
    numbers += ["NaN left / right / both"] if nan else []
    head = "".join(f'<th class="n">{name}</th>' for name in numbers)
    head = f"<tr><th>stage</th><th>verdict</th>{head}<th>first difference</th></tr>"
    body = "".join(_stage_row(n, row, nan=nan) for n, row in rows)
    return f'<div class="scroll"><table class="rows"><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _stage_row(n: int, row: StageDiff, *, nan: bool) -> str:
    found = row.metrics
    values = ["" if row.layer == WHOLE_MODEL else str(row.layer), f"{row.differing:,}", f"{row.count:,}"]
    if found:
        values.append("" if found.worst_ulp is None else f"{found.worst_ulp:,}")
        values += [*map(number, (found.max_abs, found.max_rel, found.rms)), number(found.cosine, 8)]
    else:
        values += [""] * 5
    if nan:
        values.append(f"{found.nan_left} / {found.nan_right} / {found.nan_both}" if found else "")
    cells = "".join(f'<td class="n">{value}</td>' for value in values)
    last = row.first or ("" if row.passed and not row.differing else row.text)
    return (
        f'<tr id="row-{n}"><td>{escape(row.stage)}</td>'
        f'<td class="tag{"" if row.passed else " bad"}">{row.verdict.value}</td>{cells}'
        f'<td class="wrap">{escape(str(last))}</td></tr>'
    )


def _provenance(report: DiffReport) -> str:
    facts = [Fact("run", report.left, report.right), *report.facts]
    rows = "".join(_fact(fact) for fact in facts)
    table = (
        f'<table class="rows"><thead><tr><th></th><th>left</th><th>right</th></tr></thead><tbody>{rows}</tbody></table>'
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return f'<div class="scroll">{table}</div>' + (f'<ul class="notes">{notes}</ul>' if notes else "")


def _fact(fact: Fact) -> str:
    values = [f"<code>{escape(value)}</code>" for value in (fact.left, fact.right)]
    if fact.agree:
        return f'<tr><th scope="row">{escape(fact.name)}</th><td colspan="2">{values[0]}</td></tr>'
    apart = "".join(f'<td><span class="apart">{value}</span></td>' for value in values)
    return f'<tr><th scope="row">{escape(fact.name)}</th>{apart}</tr>'
