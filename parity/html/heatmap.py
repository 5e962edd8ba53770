"""Stages down, layers across: a cell for each, coloured by its worst distance in ULP on a log scale."""

from collections.abc import Iterator
from html import escape

from exactmoe.model.stages import WHOLE_MODEL
from exactmoe.parity.diff.report import cell
from exactmoe.parity.diff.traces import DiffReport
from exactmoe.parity.diff.verdict import StageDiff, Verdict

# Lowest distance of each shade u1..u7: 2^23 is a factor of two in f32, beyond which little is left in common.
_SHADES = (1, 2, 16, 256, 4096, 2**18, 2**23)
_SHADE_NAMES = ("1", "2 to 15", "16 to 255", "256 to 4095", "2^12 to 2^18-1", "2^18 to 2^23-1", "2^23 or more")

_FEW, _MANY = 12, 30  # columns up to which cells are wide, and beyond which they are narrow


def heat_map(report: DiffReport) -> str:
    """The table with its legend."""
    rows: dict[str, dict[int, tuple[int, StageDiff]]] = {}
    for n, row in enumerate(report.rows):
        rows.setdefault(row.stage, {})[row.layer] = n, row
    layers = sorted({row.layer for row in report.rows})
    columns = ["model" if layer == WHOLE_MODEL else str(layer) for layer in layers]
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    body = []
    for stage, found in rows.items():
        cells = [_cell(*found[layer], report.first) if layer in found else "<td></td>" for layer in layers]
        body.append(f'<tr><th scope="row">{escape(stage)}</th>{"".join(cells)}</tr>')
    size = " few" if len(layers) <= _FEW else " many" if len(layers) > _MANY else ""
    return (
        f'<div class="scroll"><table class="heat{size}"><thead><tr><th scope="col">stage \\ layer</th>{head}</tr>'
        f"</thead><tbody>{''.join(body)}</tbody></table></div>"
        f'<ul class="legend" aria-label="Legend">{"".join(_legend(report))}</ul>'
    )


def shade(row: StageDiff) -> str:
    """The style class of a stage's cell."""
    match row.verdict:
        case Verdict.MATCH:
            return "tol" if row.differing else "u0"
        case Verdict.MISSING | Verdict.SHAPE:
            return "none"
        case Verdict.INDEX_REORDERED | Verdict.INDEX_SET:
            return "ids"
        case Verdict.NAN_LEFT | Verdict.NAN_RIGHT | Verdict.NAN_BOTH:
            return "nan"
    if row.metrics is None or row.metrics.infinite:
        return "u7"
    worst = row.metrics.worst_ulp or 0
    return f"u{max(sum(worst >= lowest for lowest in _SHADES), 1)}"


def powers(text: str) -> str:
    """Escaped text with `2^12` set as a power."""
    parts = escape(text).split("2^")
    out = [parts[0]]
    for part in parts[1:]:
        digits = len(part) - len(part.lstrip("0123456789"))
        out.append(f"2<sup>{part[:digits]}</sup>{part[digits:]}")
    return "".join(out)


def _cell(n: int, row: StageDiff, first: StageDiff | None) -> str:
    marked = " first" if row is first else ""
    title = escape(f"{row.name}: {row.text}", quote=True)
    return f'<td class="{shade(row)}{marked}" title="{title}"><a href="#row-{n}">{powers(cell(row))}</a></td>'


def _legend(report: DiffReport) -> Iterator[str]:
    yield '<li><span class="u0">=</span>same bits</li>'
    for n, name in enumerate(_SHADE_NAMES, 1):
        yield f'<li><span class="u{n}">{powers(name)}</span>ULP</li>'
    used = {row.verdict for row in report.rows}
    if any(row.passed and row.differing for row in report.rows):
        yield f'<li><span class="tol">~</span>{escape(report.rule)}, bits differ</li>'
    if any(row.verdict is Verdict.DIFFER and row.metrics is None for row in report.rows):
        yield '<li><span class="u7">differ</span>by how much was not measured</li>'
    words = {
        Verdict.NAN_LEFT: ("nan", "NaN-L", "NaN on the left only"),
        Verdict.NAN_RIGHT: ("nan", "NaN-R", "NaN on the right only"),
        Verdict.NAN_BOTH: ("nan", "NaN", "NaN on both sides"),
        Verdict.INDEX_REORDERED: ("ids", "order", "the same experts in another order"),
        Verdict.INDEX_SET: ("ids", "set", "other experts"),
        Verdict.SHAPE: ("none", "shape", "another form, not compared"),
        Verdict.MISSING: ("none", "none", "missing or empty, not compared"),
    }
    for verdict, (style, text, meaning) in words.items():
        if verdict in used:
            yield f'<li><span class="{style}">{text}</span>{meaning}</li>'
    if report.first is not None:
        yield "<li>outlined: the first difference</li>"
