"""The score of bisection and the power of common metrics, fault by fault, as one HTML file."""

from html import escape

from exactmoe.parity.faults.score import Row, Score
from exactmoe.parity.html.page import shell


def render_score(score: Score) -> str:
    """The whole page: counts, then a row a fault with what each metric said of it at its stage and in the logits."""
    outcome = "Every fault is named" if score.perfect else "Not every fault is named"
    style = "yes" if score.perfect else "no"
    counts = "".join(f"<div><dt>{name}</dt><dd>{got} of {of}</dd></div>" for name, (got, of) in score.counts().items())
    body = (
        f'<div class="banner {style}"><strong>{outcome}</strong><p>{len(score.rows)} faults, each planted and bisected'
        f', each beside a control without the mistake</p></div><section><dl class="tiles">{counts}</dl></section>'
        f"<section><h2>What each metric sees</h2>{_table(score)}</section>"
    )
    return shell(f"{outcome}: score of bisection", "Score of bisection", body)


def _table(score: Score) -> str:
    power = score.power()
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("fault", "planted in", "named", *power))
    rows = "".join(_row(row, tuple(power)) for row in score.rows)
    total = "".join(f"<td>{stage} / {logits}</td>" for stage, logits in power.values())
    return (
        f'<div class="scroll"><table class="rows"><thead><tr>{head}</tr></thead><tbody>{rows}'
        f'<tr><th scope="row">detected, of {len(score.rows)}</th><td></td><td></td>{total}</tr></tbody></table></div>'
        '<p class="soft">A metric compares the planted stage, then the logits, of a right and a wrong run: '
        "stage / logits.</p>"
    )


def _row(row: Row, metrics: tuple[str, ...]) -> str:
    named = "yes" if row.right else f'<span class="tag bad">{escape(str(row.named))}</span>'
    seen = "".join(_seen(row.stage_metrics[name], row.logit_metrics[name]) for name in metrics)
    return f'<tr><th scope="row">{escape(row.fault)}</th><td>{escape(row.planted)}</td><td>{named}</td>{seen}</tr>'


def _seen(stage: bool, logits: bool) -> str:
    words = " / ".join("yes" if seen else '<span class="apart">no</span>' for seen in (stage, logits))
    return f'<td class="tag">{words}</td>'
