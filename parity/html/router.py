"""The routers: a map of layers by tokens, and under it the expert ids of both sides with every flip marked."""

from collections.abc import Iterator, Sequence
from html import escape

from exactmoe.parity.diff.report import number
from exactmoe.parity.diff.router import RouterDiff, RouterToken, RouterVerdict

SHOWN = 200  # tokens of a layer in a table, and columns of the map; more would make the page unusable

_STEP = 13  # pixels between marks
_LEFT = 62


def router_view(routers: Sequence[RouterDiff], tokens: Sequence[int]) -> str:
    """The section's content; `tokens` are the ids of the prompt, by position."""
    counts = {verdict: sum(router.count(verdict) for router in routers) for verdict in RouterVerdict}
    words = ", ".join(f"{n:,} {verdict}" for verdict, n in counts.items() if n)
    parts = [
        f"<p>{words or 'no token'}, over {len(routers)} layers. A flip is explained where the margin between the last "
        "expert chosen and the next one is at most the error of the logits.</p>",
        f'<div class="scroll">{_map(routers)}</div>',
        f'<ul class="legend" aria-label="Legend">{"".join(_legend())}</ul>',
    ]
    parts += [_layer(router, tokens) for router in routers if router.changed]
    same = [router for router in routers if not router.changed]
    if same:
        inner = "".join(_layer(router, tokens) for router in same)
        what = "1 layer" if len(same) == 1 else f"{len(same)} layers"
        parts.append(f"<details><summary>{what} with the same experts for every token</summary>{inner}</details>")
    return "".join(parts)


def _map(routers: Sequence[RouterDiff]) -> str:
    columns = min(max((len(router.tokens) for router in routers), default=0), SHOWN)
    width, height = _LEFT + columns * _STEP + 10, 22 + len(routers) * _STEP + 4
    marks = []
    for x in range(0, columns, 5):
        position = next(router.tokens[x].position for router in routers if len(router.tokens) > x)
        marks.append(f'<text class="soft" text-anchor="middle" x="{_LEFT + x * _STEP + 6}" y="13">{position}</text>')
    for y, router in enumerate(routers):
        top = 22 + y * _STEP
        marks.append(f'<text text-anchor="end" x="{_LEFT - 8}" y="{top + 10}">layer {router.layer}</text>')
        for x, token in enumerate(router.tokens[:columns]):
            title = f"layer {router.layer}, position {token.position}: {token.verdict}"
            marks.append(f"<g><title>{title}</title>{_mark(token.verdict, _LEFT + x * _STEP, top)}</g>")
    label = escape("; ".join(str(router) for router in routers), quote=True)
    return f'<svg role="img" aria-label="{label}" width="{width}" height="{height}">{"".join(marks)}</svg>'


def _mark(verdict: RouterVerdict, x: int, y: int) -> str:
    """A shape for each verdict, so that none depends on its colour."""
    match verdict:
        case RouterVerdict.SAME:
            return f'<circle class="dot" cx="{x + 6}" cy="{y + 6}" r="1.6"/>'
        case RouterVerdict.REORDERED:
            return f'<circle class="ring" cx="{x + 6}" cy="{y + 6}" r="3.8"/>'
        case RouterVerdict.EXPLAINED:
            return f'<path class="tri" d="M{x + 6} {y + 2}L{x + 10.5} {y + 10}L{x + 1.5} {y + 10}Z"/>'
        case RouterVerdict.UNEXPLAINED:
            return f'<rect class="box" x="{x + 1}" y="{y + 1}" width="10" height="10"/>'


def _legend() -> Iterator[str]:
    for verdict in RouterVerdict:
        yield f'<li><svg width="13" height="13" aria-hidden="true">{_mark(verdict, 0, 0)}</svg> {verdict}</li>'


def _layer(router: RouterDiff, tokens: Sequence[int]) -> str:
    changed = router.changed
    parts = [f"<h3>Layer {router.layer}</h3>" if changed else ""]
    if changed:
        parts.append(_table(changed, tokens))
    same = [token for token in router.tokens if token.verdict is RouterVerdict.SAME]
    if same:
        what = f"Layer {router.layer}: {len(same):,} of {len(router.tokens):,} tokens have the same experts"
        parts.append(f"<details><summary>{what}</summary>{_table(same, tokens)}</details>")
    return "".join(parts)


def _table(shown: Sequence[RouterToken], tokens: Sequence[int]) -> str:
    head = (
        '<tr><th class="n">position</th><th class="n">token</th><th>verdict</th><th>left, best first</th>'
        '<th>right, best first</th><th class="n">margin</th><th class="n">in ULP</th>'
        '<th class="n">logit error</th></tr>'
    )
    body = "".join(_row(token, tokens) for token in shown[:SHOWN])
    more = f'<p class="soft">and {len(shown) - SHOWN:,} tokens more</p>' if len(shown) > SHOWN else ""
    return f'<div class="scroll"><table class="rows"><thead>{head}</thead><tbody>{body}</tbody></table></div>{more}'


def _row(token: RouterToken, tokens: Sequence[int]) -> str:
    known = str(tokens[token.position]) if 0 <= token.position < len(tokens) else ""
    style = "tag bad" if token.verdict is RouterVerdict.UNEXPLAINED else "tag"
    ulp = "" if token.margin_ulp is None else f"{token.margin_ulp:,}"
    margin = "" if token.margin is None else number(token.margin)
    error = "unknown" if token.error is None else number(token.error)
    return (
        f'<tr><td class="n">{token.position}</td><td class="n">{known}</td>'
        f'<td class="{style}">{token.verdict}</td>'
        f'<td class="mono">{_experts(token.left, token.right, "gone", "-")}</td>'
        f'<td class="mono">{_experts(token.right, token.left, "came", "+")}</td>'
        f'<td class="n">{margin}</td><td class="n">{ulp}</td><td class="n">{error}</td></tr>'
    )


def _experts(ids: Sequence[int], others: Sequence[int], style: str, sign: str) -> str:
    """Ids in rank order; marked by sign and colour where the other side lacks them, framed where they moved."""
    out = []
    for rank, expert in enumerate(ids):
        if expert not in others:
            out.append(f'<span class="ex {style}">{sign}{expert}</span>')
        else:
            moved = rank >= len(others) or others[rank] != expert
            out.append(f'<span class="ex{" moved" if moved else ""}">{expert}</span>')
    return "".join(out)
