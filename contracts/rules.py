"""The rules of a contract, one function a rule. SCHEMA-001 to 017 and PROVABILITY-001 mean what they mean in `pv
validate` of provable-contracts; the others are this project's own and hold for its own contracts.

A rule yields what is wrong: the place, and a sentence that names the field."""

import datetime as dt
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exactmoe.contracts import binding
from exactmoe.contracts.document import Document
from exactmoe.contracts.findings import Finding, Severity, Where, spelled
from exactmoe.contracts.schema import (
    DEVICES,
    KINDS,
    OBLIGATION_TYPES,
    STATUSES,
    Contract,
    Dialect,
    Falsifier,
    Obligation,
)
from exactmoe.contracts.versions import Version, version


@dataclass(frozen=True)
class Context:
    """What a rule may look at besides the contract itself."""

    document: Document
    dialect: Dialect
    root: Path  # holds tests/ and the covered files
    graph: Mapping[str, Sequence[str]]  # every known contract -> what it depends on


Breach = tuple[Where, str]
Check = Callable[[Contract, Context], Iterator[Breach]]


@dataclass(frozen=True)
class Rule:
    """A rule: its code, what it says, how bad a breach is, and whether it is asked of every dialect."""

    code: str
    says: str
    severity: Severity
    everywhere: bool
    check: Check


RULES: dict[str, Rule] = {}
READING = {
    "YAML-001": "the file is YAML in UTF-8",
    "YAML-002": "no key stands twice",
    "YAML-003": "no aliases and no tags",
    "YAML-004": "a contract is a mapping",
    "KEY-001": "every key is known",
    "TYPE-001": "every value has the type of its field",
}
"""The codes of reading and of shape, which come before the rules."""


def check(contract: Contract, context: Context) -> list[Finding]:
    """What the rules find."""
    return [
        context.document.finding(rule.code, where, message, severity=rule.severity)
        for rule in RULES.values()
        if rule.everywhere or context.dialect == "house"
        for where, message in rule.check(contract, context)
    ]


def _rule(code: str, says: str, *, severity: Severity = "error", everywhere: bool = False) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        RULES[code] = Rule(code, says, severity, everywhere, function)
        return function

    return register


def _blank(text: str | None) -> bool:
    return not (text and text.strip())


def _repeated(values: Iterable[str | None]) -> Iterator[tuple[int, str]]:
    seen: set[str] = set()
    for position, value in enumerate(values):
        if value and value in seen:
            yield position, value
        seen.add(value or "")


def _one_of(where: Where, value: str, allowed: Iterable[str]) -> Iterator[Breach]:
    allowed = list(allowed)
    if value not in allowed:
        near = next(iter(difflib.get_close_matches(value, allowed, 1, 0.6)), None)
        hint = f"did you mean {near}?" if near else f"known are {', '.join(allowed) or 'none'}"
        yield where, f"{spelled(where)}: {value!r} is unknown; {hint}"


# What `pv validate` asks.


@_rule("SCHEMA-001", "metadata.references is not empty", everywhere=True)
def _references(c: Contract, _: Context) -> Iterator[Breach]:
    if not c.metadata.references:
        yield ("metadata", "references"), "metadata.references: a contract cites at least one source"


@_rule("SCHEMA-002", "metadata.version is not empty", everywhere=True)
def _version(c: Contract, _: Context) -> Iterator[Breach]:
    if _blank(c.metadata.version):
        yield ("metadata", "version"), "metadata.version is missing or empty"


@_rule("SCHEMA-003", "there is an equation", everywhere=True)
def _equations(c: Contract, context: Context) -> Iterator[Breach]:
    if _promises(c, context) and not c.equations:
        yield ("equations",), "equations: there is none"


@_rule("SCHEMA-004", "every equation has a formula", everywhere=True)
def _formulas(c: Contract, _: Context) -> Iterator[Breach]:
    for name, equation in c.equations.items():
        if _blank(equation.formula):
            where = ("equations", name, "formula")
            yield where, f"{spelled(where)} is missing or empty"


@_rule("SCHEMA-005", "every obligation has a property", everywhere=True)
def _properties(c: Contract, _: Context) -> Iterator[Breach]:
    for position, obligation in enumerate(c.proof_obligations):
        if _blank(obligation.property):
            where = ("proof_obligations", position, "property")
            yield where, f"{spelled(where)} is missing or empty"


@_rule("SCHEMA-006", "no formal predicate stands twice", severity="warning", everywhere=True)
def _formals(c: Contract, _: Context) -> Iterator[Breach]:
    for position, formal in _repeated(obligation.formal for obligation in c.proof_obligations):
        where = ("proof_obligations", position, "formal")
        yield where, f"{spelled(where)}: {formal!r} stands in an obligation above"


@_rule("SCHEMA-007", "no falsifier id stands twice", everywhere=True)
def _falsifier_ids(c: Contract, _: Context) -> Iterator[Breach]:
    for position, taken in _repeated(falsifier.id for falsifier in c.falsification_tests):
        where = ("falsification_tests", position, "id")
        yield where, f"{spelled(where)}: {taken} is taken"


@_rule("SCHEMA-008", "every falsifier makes a prediction", everywhere=True)
def _predictions(c: Contract, _: Context) -> Iterator[Breach]:
    yield from _blank_in(c.falsification_tests, "prediction")


@_rule("SCHEMA-009", "every falsifier says what its failure would mean", severity="warning", everywhere=True)
def _if_fails(c: Contract, _: Context) -> Iterator[Breach]:
    yield from _blank_in(c.falsification_tests, "if_fails")


def _blank_in(falsifiers: Sequence[Falsifier], field: str) -> Iterator[Breach]:
    for position, falsifier in enumerate(falsifiers):
        if _blank(getattr(falsifier, field)):
            where = ("falsification_tests", position, field)
            yield where, f"{spelled(where)} of {falsifier.id or 'a falsifier'} is missing or empty"


@_rule("SCHEMA-010", "no Kani harness id stands twice", everywhere=True)
def _kani_ids(c: Contract, _: Context) -> Iterator[Breach]:
    for position, taken in _repeated(harness.id for harness in c.kani_harnesses):
        where = ("kani_harnesses", position, "id")
        yield where, f"{spelled(where)}: {taken} is taken"


@_rule("SCHEMA-011", "every Kani harness names its obligation", everywhere=True)
def _kani_obligations(c: Contract, _: Context) -> Iterator[Breach]:
    for position, harness in enumerate(c.kani_harnesses):
        if _blank(harness.obligation):
            where = ("kani_harnesses", position, "obligation")
            yield where, f"{spelled(where)} is missing or empty"


@_rule("SCHEMA-012", "every Kani harness has an unwinding bound", severity="warning", everywhere=True)
def _kani_bounds(c: Contract, _: Context) -> Iterator[Breach]:
    for position, harness in enumerate(c.kani_harnesses):
        if harness.bound is None:
            where = ("kani_harnesses", position, "bound")
            yield where, f"{spelled(where)} is missing"


@_rule("SCHEMA-013", "there is a qa_gate", severity="warning", everywhere=True)
def _qa_gate(c: Contract, context: Context) -> Iterator[Breach]:
    if _promises(c, context) and c.qa_gate is None:
        yield ("qa_gate",), "qa_gate is missing"


def _only_on(c: Contract, field: str, types: tuple[str, ...]) -> Iterator[Breach]:
    for position, obligation in enumerate(c.proof_obligations):
        if getattr(obligation, field) is not None and obligation.type not in types:
            where = ("proof_obligations", position, field)
            yield where, f"{spelled(where)} belongs to {' and '.join(types)}, not to {obligation.type or 'no type'}"


@_rule("SCHEMA-014", "requires stands on postconditions only", everywhere=True)
def _requires(c: Contract, _: Context) -> Iterator[Breach]:
    yield from _only_on(c, "requires", ("postcondition",))


@_rule("SCHEMA-015", "applies_to_phase stands on loop invariants and variants only", everywhere=True)
def _phases(c: Contract, _: Context) -> Iterator[Breach]:
    yield from _only_on(c, "applies_to_phase", ("loop_invariant", "loop_variant"))


@_rule("SCHEMA-016", "parent_contract stands on subcontracts only", everywhere=True)
def _parents(c: Contract, _: Context) -> Iterator[Breach]:
    yield from _only_on(c, "parent_contract", ("subcontract",))


@_rule("SCHEMA-017", "a subcontract's parent is in metadata.depends_on", everywhere=True)
def _declared_parents(c: Contract, _: Context) -> Iterator[Breach]:
    for position, obligation in enumerate(c.proof_obligations):
        parent = obligation.parent_contract
        if parent and obligation.type == "subcontract" and parent not in c.metadata.depends_on:
            where = ("proof_obligations", position, "parent_contract")
            yield where, f"{spelled(where)}: {parent} is not in metadata.depends_on"


@_rule("PROVABILITY-001", "a contract has obligations, and at least as many falsifiers", everywhere=True)
def _provability(c: Contract, context: Context) -> Iterator[Breach]:
    if not _promises(c, context):
        return
    obligations, falsifiers = len(c.proof_obligations), len(c.falsification_tests)
    if not obligations:
        yield ("proof_obligations",), "proof_obligations: there is none"
    if not falsifiers:
        yield ("falsification_tests",), "falsification_tests: there is none; nothing could prove this contract wrong"
    elif falsifiers < obligations:
        yield ("falsification_tests",), f"falsification_tests: {falsifiers} for {obligations} proof_obligations"


def _promises(c: Contract, context: Context) -> bool:
    """Whether equations, obligations and falsifiers are asked: of every provable contract here, of kernels by `pv`."""
    return c.provable and (context.dialect == "house" or c.metadata.kind in ("", "kernel"))


# What this project asks of its own contracts.


@_rule("FIELD-001", "no field that identifies or explains is missing")
def _fields(c: Contract, _: Context) -> Iterator[Breach]:
    for field in ("id", "created", "author", "kind", "description"):
        if _blank(getattr(c.metadata, field)):
            yield ("metadata", field), f"metadata.{field} is missing or empty"
    required: tuple[tuple[str, Sequence[object], tuple[str, ...]], ...] = (
        ("proof_obligations", c.proof_obligations, ("type",)),
        ("falsification_tests", c.falsification_tests, ("id", "rule", "test")),
        ("implementation_stages", c.implementation_stages, ("id", "description")),
    )
    for section, entries, fields in required:
        for position, entry in enumerate(entries):
            for field in fields:
                if not getattr(entry, field):
                    where = (section, position, field)
                    yield where, f"{spelled(where)} is missing or empty"
    for field in ("id", "name", "checks", "pass_criteria"):
        if c.qa_gate is not None and not getattr(c.qa_gate, field):
            yield ("qa_gate", field), f"qa_gate.{field} is missing or empty"


@_rule("FIELD-002", "no text of a list is empty")
def _texts(c: Contract, _: Context) -> Iterator[Breach]:
    lists: list[tuple[Where, Sequence[str]]] = [(("metadata", "references"), c.metadata.references)]
    for name, equation in c.equations.items():
        fields = ("invariants", "preconditions", "postconditions")
        lists += [(("equations", name, field), getattr(equation, field)) for field in fields]
    lists += [
        (("implementation_stages", position, "blockers"), stage.blockers)
        for position, stage in enumerate(c.implementation_stages)
    ]
    for where, texts in lists:
        for index, text in enumerate(texts):
            if _blank(text):
                yield (*where, index), f"{spelled((*where, index))} is empty"


@_rule("ID-001", "metadata.id is the name of the file")
def _id(c: Contract, context: Context) -> Iterator[Breach]:
    if c.metadata.id and c.metadata.id != context.document.stem:
        yield ("metadata", "id"), f"metadata.id: {c.metadata.id!r} is not the file's name, {context.document.stem!r}"


@_rule("ID-002", "no obligation, stage or check stands twice")
def _ids(c: Contract, _: Context) -> Iterator[Breach]:
    lists: list[tuple[str, Sequence[str | None]]] = [
        ("proof_obligations", [obligation.id for obligation in c.proof_obligations]),
        ("implementation_stages", [stage.id for stage in c.implementation_stages]),
    ]
    for section, names in lists:
        for position, taken in _repeated(names):
            where = (section, position, "id")
            yield where, f"{spelled(where)}: {taken} is taken"


@_rule("KIND-001", "kinds, types, devices and statuses are known words")
def _words(c: Contract, _: Context) -> Iterator[Breach]:
    if c.metadata.kind:
        yield from _one_of(("metadata", "kind"), c.metadata.kind, KINDS)
    if c.metadata.status is not None:
        yield from _one_of(("metadata", "status"), c.metadata.status, STATUSES)
    for index, device in enumerate(c.metadata.devices):
        yield from _one_of(("metadata", "devices", index), device, DEVICES)
    for position, obligation in enumerate(c.proof_obligations):
        if obligation.type:
            yield from _one_of(("proof_obligations", position, "type"), obligation.type, OBLIGATION_TYPES)
    for position, falsifier in enumerate(c.falsification_tests):
        for index, device in enumerate(falsifier.devices or []):
            yield from _one_of(("falsification_tests", position, "devices", index), device, DEVICES)


@_rule("VERSION-001", "versions are MAJOR.MINOR.PATCH, dates YYYY-MM-DD")
def _forms(c: Contract, _: Context) -> Iterator[Breach]:
    versions: list[tuple[Where, str]] = [(("metadata", "version"), c.metadata.version)]
    dates: list[tuple[Where, str]] = [(("metadata", "created"), c.metadata.created)]
    for position, amendment in enumerate(c.metadata.amendment_history):
        where = ("metadata", "amendment_history", position)
        versions.append(((*where, "version"), amendment.version))
        dates.append(((*where, "date"), amendment.date))
        if _blank(amendment.description):
            yield (*where, "description"), f"{spelled((*where, 'description'))} is missing or empty"
    for at, text in versions:
        if text and version(text) is None:
            yield at, f"{spelled(at)}: {text!r} is not MAJOR.MINOR.PATCH"
    for at, text in dates:
        if text and _date(text) is None:
            yield at, f"{spelled(at)}: {text!r} is not a date YYYY-MM-DD"


def _date(text: str) -> dt.date | None:
    try:
        return dt.date.fromisoformat(text) if re.fullmatch(r"\d{4}-\d\d-\d\d", text) else None
    except ValueError:
        return None


@_rule("VERSION-002", "the version fields of a file agree")
def _agreement(c: Contract, _: Context) -> Iterator[Breach]:
    if c.version is not None and c.version != c.metadata.version:
        yield ("version",), f"version: {c.version} here, {c.metadata.version} in metadata.version"


@_rule("VERSION-003", "the last amendment is the version; none is needed at 1.0.0")
def _amended(c: Contract, _: Context) -> Iterator[Breach]:
    history, where = c.metadata.amendment_history, ("metadata", "amendment_history")
    if history and history[-1].version != c.metadata.version:
        at = (*where, len(history) - 1, "version")
        yield at, f"{spelled(at)}: {history[-1].version} is last, but metadata.version is {c.metadata.version}"
    elif not history and c.metadata.version not in ("", "1.0.0"):
        yield where, f"metadata.amendment_history: no entry for metadata.version {c.metadata.version}"


@_rule("VERSION-004", "amendments follow each other in version and in date")
def _history(c: Contract, _: Context) -> Iterator[Breach]:
    last_version, last_date = Version(0, 0, 0), _date(c.metadata.created) or dt.date.min
    for position, amendment in enumerate(c.metadata.amendment_history):
        where = ("metadata", "amendment_history", position)
        number, date = version(amendment.version), _date(amendment.date)
        if number is None or date is None:
            for field in ("version", "date"):
                if _blank(getattr(amendment, field)):
                    yield (*where, field), f"{spelled((*where, field))} is missing or empty"
            continue
        if number <= last_version:
            yield (*where, "version"), f"{spelled((*where, 'version'))}: {number} does not follow {last_version}"
        if date < last_date:
            yield (*where, "date"), f"{spelled((*where, 'date'))}: {date} lies before {last_date}"
        last_version, last_date = number, date


@_rule("DEPENDS-001", "every contract in metadata.depends_on exists")
def _dependencies(c: Contract, context: Context) -> Iterator[Breach]:
    for index, name in enumerate(c.metadata.depends_on):
        yield from _one_of(("metadata", "depends_on", index), name, sorted(context.graph))


@_rule("DEPENDS-002", "metadata.depends_on has no cycle")
def _cycles(c: Contract, context: Context) -> Iterator[Breach]:
    start = context.document.stem
    for index, name in enumerate(c.metadata.depends_on):
        way = [start] if name == start else _way(context.graph, name, start)
        if way:
            where = ("metadata", "depends_on", index)
            yield where, f"{spelled(where)}: a cycle, {' -> '.join([start, *way])}"


def _way(graph: Mapping[str, Sequence[str]], start: str, goal: str) -> list[str] | None:
    """The nodes from `start` to `goal` along the edges, or None."""
    waiting, seen = [[start]], {start}
    while waiting:
        path = waiting.pop()
        for name in graph.get(path[-1], ()):
            if name == goal:
                return [*path, name]
            if name not in seen:
                seen.add(name)
                waiting.append([*path, name])
    return None


@_rule("BIND-001", "every test is a pytest node id")
def _node_ids(c: Contract, _: Context) -> Iterator[Breach]:
    for where, node_id in _citations(c):
        if not binding.is_node_id(node_id):
            yield where, f"{spelled(where)}: {node_id!r} is not tests/.../test_name.py::test_name"


@_rule("BIND-002", "every cited test exists and is not excused")
def _tests(c: Contract, context: Context) -> Iterator[Breach]:
    for where, node_id in _citations(c):
        if binding.is_node_id(node_id) and (fault := binding.fault(node_id, context.root)):
            yield where, f"{spelled(where)}: {fault}"


def _citations(c: Contract) -> Iterator[tuple[Where, str]]:
    for position, falsifier in enumerate(c.falsification_tests):
        for index, node_id in enumerate(falsifier.test):
            yield ("falsification_tests", position, "test", index), node_id


@_rule("BIND-003", "every obligation names falsifiers of this contract")
def _falsified_by(c: Contract, _: Context) -> Iterator[Breach]:
    known = [falsifier.id for falsifier in c.falsification_tests]
    for position, obligation in enumerate(c.proof_obligations):
        where = ("proof_obligations", position, "falsified_by")
        if not obligation.falsified_by:
            yield where, f"{spelled(where)} is missing or empty: nothing would show that the property is false"
        for index, name in enumerate(obligation.falsified_by):
            yield from _one_of((*where, index), name, known)


@_rule("SCOPE-001", "an obligation applies to an equation of the contract, or to all")
def _scope(c: Contract, _: Context) -> Iterator[Breach]:
    for position, obligation in enumerate(c.proof_obligations):
        where = ("proof_obligations", position, "applies_to")
        if _blank(obligation.applies_to):
            yield where, f"{spelled(where)} is missing or empty"
        else:
            yield from _one_of(where, obligation.applies_to or "", ["all", *c.equations])


@_rule("COVERS-001", "metadata.covers names files that exist")
def _covers(c: Contract, context: Context) -> Iterator[Breach]:
    if c.provable and not c.metadata.covers:
        yield ("metadata", "covers"), "metadata.covers is missing or empty: no change of code could make it stale"
    for index, pattern in enumerate(c.metadata.covers):
        where = ("metadata", "covers", index)
        if not covered(context.root, pattern):
            yield where, f"{spelled(where)}: nothing matches {pattern!r}"


def covered(root: Path, pattern: str) -> list[Path]:
    """The files below `root` that one entry of `metadata.covers` names, sorted; a pattern of pathlib, not absolute."""
    if not pattern or pattern.startswith("/") or ".." in Path(pattern).parts:
        return []
    try:
        return sorted(path for path in root.glob(pattern) if path.is_file())
    except ValueError:  # no pattern, such as a**
        return []


@_rule("STAGE-001", "stages and the gate name falsifiers or obligations of this contract")
def _acceptance(c: Contract, _: Context) -> Iterator[Breach]:
    known = [falsifier.id for falsifier in c.falsification_tests]
    known += [obligation.id for obligation in c.proof_obligations if obligation.id]
    for position, stage in enumerate(c.implementation_stages):
        for index, name in enumerate(stage.expected_acceptance):
            yield from _one_of(("implementation_stages", position, "expected_acceptance", index), name, known)
    for index, name in enumerate(c.qa_gate.checks if c.qa_gate else []):
        yield from _one_of(("qa_gate", "checks", index), name, known)


@_rule("STAGE-002", "the evidence of a stage is a test or a file that exists")
def _evidence(c: Contract, context: Context) -> Iterator[Breach]:
    for position, stage in enumerate(c.implementation_stages):
        for index, name in enumerate(stage.evidence):
            where = ("implementation_stages", position, "evidence", index)
            if binding.is_node_id(name):
                fault = binding.fault(name, context.root)
                if fault:
                    yield where, f"{spelled(where)}: {fault}"
            elif not covered(context.root, name):
                yield where, f"{spelled(where)}: {name!r} is neither a test nor a file here"


def bound(falsifier: Falsifier, root: Path) -> bool:
    """Whether every test that the falsifier cites exists, and there is one."""
    return bool(falsifier.test) and all(binding.is_node_id(t) and not binding.fault(t, root) for t in falsifier.test)


def obligation_bound(c: Contract, obligation: Obligation, root: Path) -> bool:
    """Whether every falsifier that the obligation names exists and is bound, and there is one."""
    known = {falsifier.id: falsifier for falsifier in c.falsification_tests}
    named = [known.get(name) for name in obligation.falsified_by]
    return bool(named) and all(f is not None and bound(f, root) for f in named)
