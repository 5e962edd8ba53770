"""A field of a real contract cannot change unseen: each mutation is reported by `validate` or by `diff`."""

from pathlib import Path

import pytest

from exactmoe.contracts.diff import Unreadable, compare
from exactmoe.contracts.document import parse, read
from exactmoe.contracts.findings import Finding
from exactmoe.contracts.validate import validate

ROOT = Path(__file__).resolve().parents[2]
CONTRACT = ROOT / "contracts" / "contract-validation-v1.yaml"

# The field as the message names it, what is replaced by what, the code that reports it, and how many lines below the
# mutated one: a missing field is reported where its section begins, a folded text where it begins.
MUTATIONS: list[tuple[str, str, str, str, int]] = [
    ("metadata.id", "  id: contract-validation-v1", "  id: contract-validation-v2", "ID-001", 0),
    ("metadata.version", "  version: 1.0.0\n  created", "  version: 1.0.1\n  created", "VERSION-003", 13),
    ("metadata.created", "created: 2026-11-23", "created: 23.11.2026", "VERSION-001", 0),
    ("metadata.author", "author: exactmoe maintainers", "author: somebody else", "BUMP-002", 0),
    ("metadata.kind", "kind: format", "kind: formal", "KIND-001", 0),
    ("metadata.description", "what changes a promise", "what changes a word", "BUMP-002", -2),
    ("metadata.references", "    - Semantic Versioning 2.0.0\n", "", "BUMP-002", -3),
    ("metadata.depends_on[0]", "depends_on: []", "depends_on: [numerics-v9]", "DEPENDS-001", 0),
    ("metadata.amendment_history[0].version", "    - version: 1.0.0", "    - version: 0.9.0", "VERSION-003", 0),
    ("metadata.covers[0]", "    - contracts/binding.py", "    - contracts/bindings.py", "COVERS-001", 0),
    ("metadata.devices[0]", "  devices: [cpu]\n\n", "  devices: [cuda]\n\n", "KIND-001", 0),
    ("equations.bump.formula", "none < patch < minor", "none < minor", "BUMP-002", 0),
    ("equations.reading.domain", "domain: every sequence of bytes", "domain: UTF-8", "BUMP-002", 0),
    ("equations.reading.invariants", "counted from 1", "counted from 0", "BUMP-002", 0),
    ("equations.rules.preconditions", "a folder that holds tests/", "a folder", "BUMP-002", 0),
    ("equations.rules.postconditions", "counted as bound out of all", "counted", "BUMP-002", 0),
    ("proof_obligations[0].type", "type: soundness", "type: sound", "KIND-001", 0),
    (
        "proof_obligations[2].propperty",
        "    property: a changed promise",
        "    propperty: a changed promise",
        "KEY-001",
        0,
    ),
    ("proof_obligations[OBL-CV-BUMP].formal", "errors > 0", "errors >= 0", "BUMP-002", 0),
    ("proof_obligations[OBL-CV-RULES].tolerance", "tolerance: 0", "tolerance: 1e-3", "BUMP-002", 0),
    ("proof_obligations[2].applies_to", "applies_to: bump", "applies_to: bumps", "SCOPE-001", 0),
    (
        "proof_obligations[2].falsified_by[1]",
        "[FALSIFY-CV-005, FALSIFY-CV-006]\n\n",
        "[FALSIFY-CV-005, FALSIFY-CV-7]\n\n",
        "BIND-003",
        0,
    ),
    ("falsification_tests[1].id", "- id: FALSIFY-CV-002", "- id: FALSIFY-CV-001", "SCHEMA-007", 0),
    ("falsification_tests[FALSIFY-CV-002].prediction", "1e-5 is a number, yes", "1e-5 is a text, yes", "BUMP-002", 0),
    ("falsification_tests[3].test[0]", "::test_the_good_contract_breaks_no_rule", "::test_all_is_good", "BIND-002", 0),
    ("falsification_tests[5].if_fails", "    if_fails: a field is read by nothing\n", "", "SCHEMA-009", -4),
    (
        "falsification_tests[FALSIFY-CV-003].rule",
        "rule: every rule can be broken",
        "rule: rules can be broken",
        "BUMP-002",
        0,
    ),
    ("falsification_tests[FALSIFY-CV-006].devices", "    devices: [cpu]", "    devices: []", "BUMP-002", 0),
    (
        "implementation_stages[0].expected_acceptance[0]",
        "expected_acceptance: [OBL-CV-READ",
        "expected_acceptance: [OBL-CV-RED",
        "STAGE-001",
        0,
    ),
    (
        "implementation_stages[0].evidence[0]",
        "- tests/contracts/test_rules.py\n",
        "- tests/contracts/test_ruler.py\n",
        "STAGE-002",
        0,
    ),
    ("implementation_stages[M-CV-1].blockers", "blockers: []", "blockers: [time]", "BUMP-002", 0),
    ("qa_gate.checks[0]", "    - FALSIFY-CV-001", "    - FALSIFY-CV-101", "STAGE-001", 0),
    ("qa_gate.pass_criteria", "pass_criteria: every falsifier passes", "pass_criteria: most pass", "BUMP-002", 0),
]


def reported(path: Path) -> list[Finding]:
    """What `validate` and `diff` against the unspoilt contract say of `path`."""
    findings = validate([path], root=ROOT, dialect="house").findings
    try:
        return findings + compare(parse(CONTRACT.read_text(), path), read(path)).findings
    except Unreadable:  # then `diff` fails as well, with a finding of `validate`
        return findings


@pytest.mark.parametrize(
    ("field", "old", "new", "code", "below"),
    MUTATIONS,
    ids=[f"{field}-{code}" for field, _, _, code, _ in MUTATIONS],
)
def test_a_mutated_field_of_a_real_contract_is_reported_with_its_line(
    tmp_path: Path, field: str, old: str, new: str, code: str, below: int
) -> None:
    text = CONTRACT.read_text()
    assert old in text
    path = tmp_path / CONTRACT.name
    path.write_text(text)
    assert reported(path) == []
    path.write_text(text.replace(old, new, 1))
    line = text[: text.index(old)].count("\n") + 1
    found = [(finding.line, finding.message) for finding in reported(path) if finding.code == code]
    assert any(at == line + below and field in message for at, message in found), (line, found)


def test_at_least_25_fields_are_mutated() -> None:
    assert len({field for field, *_ in MUTATIONS}) >= 25
