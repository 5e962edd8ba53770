"""A parity run as a report of stages, so that it is written as HTML and JUnit XML like a diff of two traces."""

from collections.abc import Iterator

from exactmoe.parity.bits import Comparison
from exactmoe.parity.diff.traces import DiffReport, Fact
from exactmoe.parity.diff.verdict import First, StageDiff, Verdict
from exactmoe.parity.report import Setting, verdict
from exactmoe.parity.run import ParityResult, Tally


def report_of(result: ParityResult, setting: Setting) -> DiffReport:
    """Every stage, cache, path and schedule of `result` as a row. It is equal exactly where `result` is.

    A parity run counts which elements differ, not how far: rows have no distances."""
    rows = [_row(tally) for tally in (*result.stages, *result.caches, *result.paths)]
    rows += _schedules(result)
    if not result.equal and all(row.passed for row in rows):
        rows.append(StageDiff("coverage", -1, Verdict.MISSING, verdict(result), "", ""))
    c = result.coverage
    notes = [
        f"{c.requested} stages requested; emitted by reference {c.emitted_reference}, by triton {c.emitted_triton}; "
        f"compared {c.compared}",
        f"{len(result.tokens)} prompt positions and {result.steps} decode steps",
        f"digest {result.digest}",
    ]
    notes += [f"not emitted: {text}" for text in c.missing]
    notes += [f"emitted but not requested: {text}" for text in c.unexpected]
    if result.nan_logits:
        notes.append(f"{result.nan_logits:,} logits are NaN; NaNs count as equal")
    stated = {
        "model": setting.model,
        "model digest": setting.sha256,
        "numerics version": setting.numerics,
        "activation profile": setting.profile,
    }
    facts = [Fact(name, value, value) for name, value in stated.items()]
    facts.append(Fact("device", "numpy", setting.device))
    facts += [Fact(name, version, version) for name, version in setting.versions.items()]
    return DiffReport(
        title="parity of the kernels with the reference",
        left="reference",
        right="triton",
        rule="bit for bit",
        rows=tuple(rows),
        facts=tuple(facts),
        tokens=result.tokens,
        notes=tuple(notes),
        what="stages, caches, paths and schedules",
    )


def _row(tally: Tally) -> StageDiff:
    if tally.equal:
        text = f"match: {tally.compared:,} elements, same bits"
        return StageDiff(tally.name, tally.layer, Verdict.MATCH, text, "", "", count=tally.compared)
    if tally.first is None:
        return StageDiff(tally.name, tally.layer, Verdict.MISSING, "nothing was compared", "missing", "missing")
    found = tally.first.comparison
    text = f"{tally.differing:,} of {tally.compared:,} differ; {tally.first.when}"
    if not found.same_form:
        return StageDiff(
            tally.name, tally.layer, Verdict.SHAPE, f"{found}; {tally.first.when}", found.left, found.right
        )
    if found.first is None:
        return StageDiff(tally.name, tally.layer, Verdict.MISSING, f"{found}; {tally.first.when}", "", "")
    first = _first(found, found.first, tally.first.when)
    return StageDiff(tally.name, tally.layer, _kind(first), text, "", "", None, first, tally.compared, tally.differing)


def _first(found: Comparison, at: tuple[int, ...], when: str) -> First:
    (left, left_bits), (right, right_bits) = (side.rsplit(" ", 1) for side in (found.left, found.right))
    return First(at, left, left_bits, right, right_bits, when)


def _kind(first: First) -> Verdict:
    if (first.left == "nan") != (first.right == "nan"):
        return Verdict.NAN_LEFT if first.left == "nan" else Verdict.NAN_RIGHT
    return Verdict.DIFFER


def _schedules(result: ParityResult) -> Iterator[StageDiff]:
    for outcome in result.schedules:
        row = _row(outcome.tally)
        if row.passed and outcome.digest is not None and outcome.digest != result.run_digest:
            text = f"digest {outcome.digest} where the main run has {result.run_digest}"
            row = StageDiff(row.stage, row.layer, Verdict.DIFFER, text, "", "", count=row.count, differing=0)
        yield row
