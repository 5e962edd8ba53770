"""The history of the benchmarks as one HTML file: a plot for each, with the commit at each point."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from exactmoe.bench.history import labels, measured, short
from exactmoe.parity.html.page import shell

_WIDE, _HIGH, _LEFT, _BASE = 640, 150, 60, 24  # of a plot, of its left and lower margin, in pixels


def render_history(runs: Sequence[Mapping[str, Any]], device: str) -> str:
    """The whole page. Runs are in the order of time, oldest first."""
    names = list(dict.fromkeys(row["name"] for run in runs for row in run["rows"]))
    body = "".join(
        f"<section><h2>{escape(name)}</h2>{_plot(name, runs)}{_table(name, runs)}</section>" for name in names
    )
    lead = (
        f"<p>{len(runs)} runs on {escape(device)}, oldest first. Times of different runs are history: the machine, its "
        "clocks and its driver were not the same. Only runs interleaved in one go can say faster or slower.</p>"
    )
    return shell(f"Benchmarks on {device}", f"Benchmarks on {device}", lead + body)


def _points(name: str, runs: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any], Mapping[str, Any]]]:
    """Number of the run, run and row of every run that has a number."""
    found = []
    for number, run in enumerate(runs):
        row = next((row for row in run["rows"] if row["name"] == name), None)
        if row is not None and measured(row):
            found.append((number, run, row))
    return found


def _plot(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """Median as a line, p10 to p90 as bars, from zero, so that a length is a time, or a size."""
    points = [(number, run, row, found) for number, run, row in _points(name, runs) if (found := measured(row))]
    if not points:
        return "<p>No run has a number.</p>"
    top = max(found[2] for *_, found in points) * 1.1 or 1.0

    def x(number: int) -> float:
        return _LEFT + (number + 0.5) * (_WIDE - _LEFT) / len(runs)

    def y(us: float) -> float:
        return _HIGH - _BASE - us / top * (_HIGH - _BASE - 8)

    parts = [
        f'<line x1="{_LEFT}" y1="{y(us):.1f}" x2="{_WIDE}" y2="{y(us):.1f}" stroke="currentColor" opacity="0.15"/>'
        f'<text x="{_LEFT - 6}" y="{y(us) + 4:.1f}" text-anchor="end" font-size="11" fill="currentColor">'
        f"{us:.3g}</text>"
        for us in (0.0, top / 2.2, top / 1.1)
    ]
    line = " ".join(f"{x(number):.1f},{y(found[0]):.1f}" for number, _, _, found in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="1.5" opacity="0.6"/>')
    before = None
    for number, run, row, (median, low, high, unit) in points:
        changed, before = labels(row, run, before), (row, run)
        at, word = x(number), "".join(f", {label}" for label in changed)
        fill = "var(--bar)" if "numbers changed" in changed else "var(--good)"
        parts.append(
            f'<line x1="{at:.1f}" y1="{y(low):.1f}" x2="{at:.1f}" y2="{y(high):.1f}" stroke="{fill}" stroke-width="2"/>'
            f'<circle cx="{at:.1f}" cy="{y(median):.1f}" r="4" fill="{fill}"><title>{escape(short(run["commit"]))}: '
            f"{median:.2f} {unit}{word}</title></circle>"
            f'<text x="{at:.1f}" y="{_HIGH - 8}" text-anchor="middle" font-size="10" fill="currentColor">'
            f"{escape(run['commit'][:7])}</text>"
        )
    label = f"{points[0][3][3]} of {escape(name)}"
    svg = f'<svg width="{_WIDE}" height="{_HIGH}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f'<div class="scroll">{svg}</div>'


def _table(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{escape(run['date'][:16])}</td><td><code>{escape(short(run['commit']))}</code></td>"
        f'<td>{escape(run["activations"])}</td><td class="n">{found[0]:.2f} {found[3]}</td>'
        f'<td class="n">{found[1]:.2f}</td><td class="n">{found[2]:.2f}</td>'
        f'<td class="n">{_percent(row["roof"])}</td><td><code>{escape(row["digest"][:12])}</code></td></tr>'
        for _, run, row in _points(name, runs)
        if (found := measured(row))
    )
    head = "".join(
        f"<th{' class=n' if number else ''}>{text}</th>"
        for text, number in (("date", 0), ("commit", 0), ("activations", 0), ("median", 1), ("p10", 1), ("p90", 1),
                             ("of the roof", 1), ("digest", 0))
    )  # fmt: skip
    return f'<div class="scroll"><table class="rows"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"
