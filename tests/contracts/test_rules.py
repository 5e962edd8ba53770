"""Every rule is shown a contract that breaks it, and says where: code, line and column, severity, field."""

from pathlib import Path

import pytest

from exactmoe.contracts.rules import READING, RULES
from exactmoe.contracts.validate import validate

CITED = "test: tests/test_double.py::test_two_doubles_to_four"

# Code, where it is reported, the field that the message names, and what is replaced by what in the good contract.
# Two texts stand for everything from the first up to the second, or to the end.
SPOILT: list[tuple[str, str, str, str | tuple[str, str], str]] = [
    ("YAML-001", "7:9", "while", "kind: kernel", "kind: [kernel"),
    (
        "YAML-002",
        "6:3",
        "the",
        "  author: exactmoe maintainers\n",
        "  author: exactmoe maintainers\n  author: another\n",
    ),
    ("YAML-002", "26:5", "the", "    domain: every integer", "    formula: y = 3x"),
    ("YAML-003", "11:11", "an", "references:\n    - arithmetic", "references: &r\n    - arithmetic\n  covers: *r"),
    ("YAML-003", "22:10", "the", "version: 1.1.0\nequations", "version: !!python/name:os.system 1.1.0\nequations"),
    ("YAML-004", "1:1", "a", ("metadata", ""), "- a list\n"),
    (
        "KEY-001",
        "48:5",
        "falsification_tests[0].if_fail",
        "    if_fails: doubling is wrong\n  - id: F-2",
        "    if_fail: doubling is wrong\n  - id: F-2",
    ),
    ("KEY-001", "67:1", "qa_gates", "qa_gate:", "qa_gates:"),
    ("KEY-001", "22:1", "kind", "version: 1.1.0\nequations", "kind: kernel\nequations"),
    ("TYPE-001", "3:12", "metadata.version", "  version: 1.1.0\n  created", "  version: 1.1\n  created"),
    ("TYPE-001", "34:16", "proof_obligations[0].tolerance", "tolerance: 1e-5", "tolerance: small"),
    ("TYPE-001", "34:16", "proof_obligations[0].tolerance", "tolerance: 1e-5", "tolerance: -1e-5"),
    ("TYPE-001", "9:15", "metadata.references", "  references:\n    - arithmetic", "  references: arithmetic"),
    ("SCHEMA-001", "9:15", "metadata.references", "  references:\n    - arithmetic", "  references: []"),
    ("SCHEMA-002", "3:12", "metadata.version", "  version: 1.1.0\n  created", "  version: ''\n  created"),
    ("SCHEMA-003", "23:12", "equations", ("equations", "proof_obligations"), "equations: {}\n"),
    ("SCHEMA-004", "25:14", "equations.double.formula", "    formula: y = 2x", "    formula: ' '"),
    ("SCHEMA-004", "24:3", "equations.double.formula", "    formula: y = 2x\n", ""),
    ("SCHEMA-005", "38:15", "proof_obligations[1].property", "property: base holds", "property: ''"),
    ("SCHEMA-006", "39:13", "proof_obligations[1].formal", "formal: base", "formal: y % 2 = 0"),
    ("SCHEMA-007", "49:9", "falsification_tests[1].id", "- id: F-2", "- id: F-1"),
    ("SCHEMA-008", "49:5", "falsification_tests[1].prediction", "    prediction: 2 * 3 = 6\n", ""),
    (
        "SCHEMA-009",
        "49:5",
        "falsification_tests[1].if_fails",
        "    if_fails: doubling is wrong\n    devices",
        "    devices",
    ),
    (
        "SCHEMA-010",
        "65:9",
        "kani_harnesses[1].id",
        "  - id: K-1\n",
        "  - {id: K-1, obligation: OBL-1, bound: 1}\n  - id: K-1\n",
    ),
    ("SCHEMA-011", "64:5", "kani_harnesses[0].obligation", "    obligation: OBL-1\n", ""),
    ("SCHEMA-012", "64:5", "kani_harnesses[0].bound", "    bound: 8\n", ""),
    ("SCHEMA-013", "1:1", "qa_gate", ("qa_gate", ""), ""),
    (
        "SCHEMA-014",
        "34:15",
        "proof_obligations[0].requires",
        "    formal: y % 2 = 0",
        "    formal: y % 2 = 0\n    requires: OBL-2",
    ),
    (
        "SCHEMA-015",
        "34:23",
        "proof_obligations[0].applies_to_phase",
        "    formal: y % 2 = 0",
        "    formal: y % 2 = 0\n    applies_to_phase: fold",
    ),
    ("SCHEMA-016", "42:22", "proof_obligations[1].parent_contract", "type: subcontract", "type: invariant"),
    ("SCHEMA-017", "42:22", "proof_obligations[1].parent_contract", "depends_on: [base-v1]", "depends_on: []"),
    ("PROVABILITY-001", "1:1", "proof_obligations", ("proof_obligations", "falsification_tests"), ""),
    ("PROVABILITY-001", "1:1", "falsification_tests", ("falsification_tests", "implementation_stages"), ""),
    ("PROVABILITY-001", "44:3", "falsification_tests", ("  - id: F-2", "implementation_stages"), ""),
    ("FIELD-001", "1:1", "metadata.author", "  author: exactmoe maintainers\n", ""),
    ("FIELD-001", "37:11", "proof_obligations[1].type", "type: subcontract", "type: ''"),
    ("FIELD-001", "44:5", "falsification_tests[0].rule", "    rule: doubles\n", ""),
    (
        "FIELD-001",
        "44:5",
        "falsification_tests[0].test",
        "    test: tests/test_double.py::test_two_doubles_to_four\n",
        "",
    ),
    ("FIELD-001", "57:5", "implementation_stages[0].description", "    description: Do it.\n", ""),
    ("FIELD-001", "67:1", "qa_gate.checks", "  checks: [F-1, F-2]\n", ""),
    ("FIELD-002", "28:9", "equations.double.invariants[0]", "- y is even", "- ''"),
    ("ID-001", "2:7", "metadata.id", "  id: good-v1", "  id: better-v1"),
    ("ID-002", "37:9", "proof_obligations[1].id", "  - type: subcontract", "  - id: OBL-1\n    type: subcontract"),
    ("KIND-001", "6:9", "metadata.kind", "kind: kernel", "kind: kernal"),
    ("KIND-001", "7:11", "metadata.status", "status: DRAFT", "status: DONE"),
    ("KIND-001", "21:18", "metadata.devices[1]", "devices: [cpu, gpu]", "devices: [cpu, tpu]"),
    ("KIND-001", "31:11", "proof_obligations[0].type", "type: invariant", "type: invariants"),
    ("KIND-001", "55:15", "falsification_tests[1].devices[0]", "    devices: [cpu]", "    devices: [gpus]"),
    ("VERSION-001", "3:12", "metadata.version", "  version: 1.1.0\n  created", "  version: 1.1.x\n  created"),
    ("VERSION-001", "4:12", "metadata.created", "created: 2026-01-01", "created: 2026-13-01"),
    ("VERSION-001", "16:7", "metadata.amendment_history[1].description", "      description: Threes too.\n", ""),
    ("VERSION-002", "22:10", "version", "version: 1.1.0\nequations", "version: 1.0.0\nequations"),
    ("VERSION-003", "16:16", "metadata.amendment_history[1].version", "    - version: 1.1.0", "    - version: 1.2.0"),
    ("VERSION-003", "1:1", "metadata.amendment_history", ("  amendment_history", "  covers"), ""),
    ("VERSION-004", "17:13", "metadata.amendment_history[1].date", "date: 2026-01-02", "date: 2025-12-31"),
    ("VERSION-004", "16:16", "metadata.amendment_history[1].version", "    - version: 1.0.0", "    - version: 1.1.0"),
    ("VERSION-004", "16:7", "metadata.amendment_history[1].date", "      date: 2026-01-02\n", ""),
    ("DEPENDS-001", "11:25", "metadata.depends_on[1]", "depends_on: [base-v1]", "depends_on: [base-v1, bass-v1]"),
    ("DEPENDS-002", "11:25", "metadata.depends_on[1]", "depends_on: [base-v1]", "depends_on: [base-v1, good-v1]"),
    ("BIND-001", "47:5", "falsification_tests[0].test[0]", CITED, "test: cargo test doubles"),
    ("BIND-001", "47:5", "falsification_tests[0].test[0]", CITED, "test: tests/test_double.py::helper"),
    (
        "BIND-001",
        "47:5",
        "falsification_tests[0].test[0]",
        CITED,
        "test: contracts/../tests/test_double.py::test_two_doubles_to_four",
    ),
    (
        "BIND-002",
        "47:5",
        "falsification_tests[0].test[0]",
        CITED,
        "test: tests/test_double.py::test_two_doubles_to_five",
    ),
    ("BIND-002", "47:5", "falsification_tests[0].test[0]", CITED, "test: tests/test_triple.py::test_two"),
    ("BIND-002", "47:5", "falsification_tests[0].test[0]", CITED, "test: tests/test_double.py::test_skipped"),
    ("BIND-002", "47:5", "falsification_tests[0].test[0]", CITED, "test: tests/test_double.py::test_expected_to_fail"),
    ("BIND-002", "47:5", "falsification_tests[0].test[0]", CITED, "test: tests/test_double.py::test_of_a_class"),
    (
        "BIND-002",
        "53:9",
        "falsification_tests[1].test[0]",
        "      - tests/test_double.py::TestDouble::test_three",
        "      - tests/test_double.py::TestDouble::test_four",
    ),
    (
        "BIND-003",
        "41:25",
        "proof_obligations[1].falsified_by[1]",
        "falsified_by: [F-1, F-2]",
        "falsified_by: [F-1, F-3]",
    ),
    ("BIND-003", "37:5", "proof_obligations[1].falsified_by", "    falsified_by: [F-1, F-2]\n", ""),
    ("SCOPE-001", "35:17", "proof_obligations[0].applies_to", "applies_to: double", "applies_to: doubled"),
    ("SCOPE-001", "30:5", "proof_obligations[0].applies_to", "    applies_to: double\n", ""),
    ("COVERS-001", "20:7", "metadata.covers[0]", "    - kernels/double.py\n", "    - kernels/a**\n"),
    ("COVERS-001", "20:7", "metadata.covers[0]", "    - kernels/double.py\n", "    - kernels/triple.py\n"),
    ("COVERS-001", "20:7", "metadata.covers[0]", "    - kernels/double.py\n", "    - ../outside.py\n"),
    ("COVERS-001", "1:1", "metadata.covers", "  covers:\n    - kernels/double.py\n", ""),
    (
        "STAGE-001",
        "59:32",
        "implementation_stages[0].expected_acceptance[1]",
        "expected_acceptance: [F-1, OBL-1]",
        "expected_acceptance: [F-1, OBL-2]",
    ),
    ("STAGE-001", "70:17", "qa_gate.checks[1]", "checks: [F-1, F-2]", "checks: [F-1, F-9]"),
    (
        "STAGE-002",
        "60:16",
        "implementation_stages[0].evidence[0]",
        "evidence: [kernels/double.py,",
        "evidence: [kernels/triple.py,",
    ),
    (
        "STAGE-002",
        "60:35",
        "implementation_stages[0].evidence[1]",
        '"tests/test_double.py::test_two_doubles_to_four"]',
        '"tests/test_double.py::test_nothing"]',
    ),
]


def spoil(good: str, old: str | tuple[str, str], new: str) -> str:
    if isinstance(old, tuple):
        start = good.index(old[0])
        old = good[start : good.index(old[1], start) if old[1] else None]
    assert old in good
    return good.replace(old, new, 1)


def test_the_good_contract_breaks_no_rule(project: Path) -> None:
    report = validate([project / "contracts"], dialect="house")
    assert report.findings == []
    assert (report.obligations_bound, report.obligations, report.falsifiers_bound, report.falsifiers) == (2, 2, 2, 2)


@pytest.mark.parametrize(
    ("code", "where", "field", "old", "new"),
    SPOILT,
    ids=[f"{code}-{position}" for position, (code, *_) in enumerate(SPOILT)],
)
def test_a_spoilt_field_is_reported_at_its_line_and_column(
    project: Path, good: str, code: str, where: str, field: str, old: str | tuple[str, str], new: str
) -> None:
    path = project / "contracts" / "good-v1.yaml"
    path.write_text(spoil(good, old, new))
    found = [finding for finding in validate([path], dialect="house").findings if finding.code == code]
    mark = "warning: " if code in RULES and RULES[code].severity == "warning" else ""
    assert any(str(finding).startswith(f"{path}:{where}: {code} {mark}{field}") for finding in found), found


def test_every_rule_has_a_contract_that_breaks_it() -> None:
    assert {code for code, *_ in SPOILT} == {*RULES, *READING}


def test_the_severities_are_those_of_pv() -> None:
    warnings = {code for code, rule in RULES.items() if rule.severity == "warning"}
    assert warnings == {"SCHEMA-006", "SCHEMA-009", "SCHEMA-012", "SCHEMA-013"}
    assert {code for code, rule in RULES.items() if rule.everywhere} == {
        *(f"SCHEMA-{number:03}" for number in range(1, 18)),
        "PROVABILITY-001",
    }


def test_a_cycle_through_other_contracts_is_reported_whole(project: Path) -> None:
    base = project / "contracts" / "base-v1.yaml"
    base.write_text(base.read_text() + "  depends_on: [good-v1]\n")
    found = {finding.file: finding.message for finding in validate([project / "contracts"]).findings}
    assert found == {
        str(base): "metadata.depends_on[0]: a cycle, base-v1 -> good-v1 -> base-v1",
        str(project / "contracts" / "good-v1.yaml"): ("metadata.depends_on[0]: a cycle, good-v1 -> base-v1 -> good-v1"),
    }


SKIPPED = "import pytest\npytestmark = pytest.mark.skip\ndef test_two_doubles_to_four(): ...\n"
SKIPPED_CLASS = "import pytest\n@pytest.mark.skip\nclass TestDouble:\n    def test_three(self): ...\n"
FAILING_CLASS = (
    "import pytest\nclass TestDouble:\n    pytestmark = [pytest.mark.xfail]\n    def test_three(self): ...\n"
)


@pytest.mark.parametrize("text", [SKIPPED, SKIPPED_CLASS, FAILING_CLASS], ids=["module", "class", "list"])
def test_a_test_excused_by_what_holds_it_is_no_binding(project: Path, text: str) -> None:
    (project / "tests" / "test_double.py").write_text(text)
    report = validate([project / "contracts" / "good-v1.yaml"])
    said = [finding.message for finding in report.findings if finding.code == "BIND-002"]
    assert any("marked to be skipped or to fail" in message for message in said), said
    assert report.falsifiers_bound == 0


def test_a_test_file_that_is_not_python_binds_nothing(project: Path) -> None:
    (project / "tests" / "test_double.py").write_text("def test_two_doubles_to_four(:\n")
    report = validate([project / "contracts" / "good-v1.yaml"])
    assert all("is not Python" in finding.message for finding in report.findings)
    assert [finding.code for finding in report.findings] == ["BIND-002", "BIND-002", "STAGE-002"]


def test_the_readme_lists_every_rule_as_it_is() -> None:
    readme = (Path(__file__).resolve().parents[2] / "contracts" / "README.md").read_text()
    rows = [f"| {code} | {says} | pv |" for code, says in READING.items()]
    for rule in RULES.values():
        marks = ["pv"] * rule.everywhere + ["warning"] * (rule.severity == "warning")
        rows.append(f"| {rule.code} | {rule.says} | {', '.join(marks)} |")
    table = readme[readme.index("| code | says |") :].splitlines()[2:]
    assert table[: len(rows)] == rows
