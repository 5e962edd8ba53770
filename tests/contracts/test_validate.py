"""exactmoe contracts validate: what is printed, the exit status, and files in the form of provable-contracts."""

import json
from pathlib import Path

import pytest

from exactmoe.cli.main import main

# In the form of provable-contracts, written for these tests: prose for tests, sections that only its tools use, keys
# that it ignores, histories and dependencies in any shape.
PV_KERNEL = """\
metadata:
  version: "1.0.0"
  created: "2026-02-01"
  author: "Somebody Else"
  description: "A clamp"
  references: ["Any text book"]
equations:
  clamp:
    formula: "c(x) = min(max(x, lo), hi)"
    domain: "x in R, lo <= hi"
    codomain: "[lo, hi]"
    where: ["lo and hi are finite"]
proof_obligations:
  - type: bound
    property: "Output lies in [lo, hi]"
    formal: "lo <= c(x) <= hi"
    tolerance: 1e-7
    applies_to: simd
    lean: {theorem: Clamp.bounded, status: proved}
  - type: idempotency
    property: "Clamping twice is clamping once"
    note: "follows from the bound"
kernel_structure:
  phases:
    - {name: low, description: "max with lo"}
simd_dispatch:
  clamp: {scalar: clamp_scalar, avx2: clamp_avx2}
enforcement:
  range: {description: "bounded", severity: "ERROR"}
verification_summary: {total_obligations: 2}
type_invariants:
  - {name: ordered, type: Range, predicate: "self.lo <= self.hi"}
coq_spec: {module: ClampSpec}
falsification_tests:
  - id: FALSIFY-CL-001
    rule: "Range"
    prediction: "c(x) in [lo, hi]"
    test: |
      cargo test -p clamp --lib range
    if_fails: "comparison the wrong way round"
    status: DISCHARGED
  - id: FALSIFY-CL-002
    rule: "Idempotency"
    prediction: "c(c(x)) = c(x)"
    if_fails: "state is kept"
kani_harnesses:
  - {id: KANI-CL-001, obligation: CL-1, property: "range", bound: 8, strategy: exhaustive, harness: verify_range}
qa_gate:
  id: F-CL-001
  name: "Clamp"
  checks: ["range"]
  pass_criteria: "All pass"
"""
PV_PATTERN = """\
metadata:
  id: C-SOME-PATTERN
  version: 1.4.0
  kind: pattern
  status: ACTIVE_ALGORITHM_LEVEL
  description: A plan.
  references: [a finding]
  binds_to: [another plan]
  depends_on: ['parent-v1 (v1.4.0, DRAFT)']
  amendment_history:
    - {v: 1, anything: goes}
status: DRAFT
scope: "src/**"
proof_obligations:
  - {type: ordering, property: names are in order}
implementation_stages:
  - {id: S-1, status: SHIPPED, discharged_by: somebody}
"""
PV_REGISTRY = """\
metadata:
  version: "2.0.0"
  description: "A table"
  references: ["the vendor"]
  registry: true
"""


def validate(*args: object) -> int:
    return main(["contracts", "validate", *map(str, args)])


def test_a_good_folder_is_counted_with_denominators(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate(project / "contracts") == 0
    assert capsys.readouterr().out == (
        "0 error(s), 0 warning(s) in 2 contract(s)\nobligations bound 2/2, falsifiers bound 2/2\n"
    )


def test_a_test_that_is_gone_unbinds_its_falsifier_and_the_obligations_it_falsifies(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tests = project / "tests" / "test_double.py"
    tests.write_text(tests.read_text().replace("test_three", "test_drei"))
    assert validate(project / "contracts") == 1
    path = project / "contracts" / "good-v1.yaml"
    assert capsys.readouterr().out == (
        f"{path}:53:9: BIND-002 falsification_tests[1].test[0]: tests/test_double.py has no test_three\n"
        "1 error(s), 0 warning(s) in 2 contract(s)\n"
        "obligations bound 1/2, falsifiers bound 1/2\n"
    )


def test_warnings_pass_unless_they_are_asked_to_fail(project: Path, good: str) -> None:
    path = project / "contracts" / "good-v1.yaml"
    path.write_text(good.replace("    formal: base\n", "    formal: y % 2 = 0\n"))
    assert validate(path) == 0
    assert validate("--strict", path) == 1


def test_the_report_as_json_holds_every_finding_and_count(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = project / "contracts" / "good-v1.yaml"
    path.write_text(path.read_text().replace("kind: kernel", "kind: kernal"))
    assert validate("--json", path) == 1
    assert json.loads(capsys.readouterr().out) == {
        "errors": 1,
        "warnings": 0,
        "contracts": [{"file": str(path), "dialect": "house"}],
        "obligations": {"bound": 2, "total": 2},
        "falsifiers": {"bound": 2, "total": 2},
        "findings": [
            {
                "file": str(path),
                "line": 6,
                "column": 9,
                "code": "KIND-001",
                "message": "metadata.kind: 'kernal' is unknown; did you mean kernel?",
                "severity": "error",
            }
        ],
    }


def test_several_faults_of_one_file_are_reported_in_the_order_of_its_lines(
    project: Path, good: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = project / "contracts" / "good-v1.yaml"
    path.write_text(
        good.replace("kind: kernel", "kind: kernal").replace("qa_gate:", "qa_gates:").replace("[F-1]", "[]")
    )
    assert validate(path) == 1
    lines = [int(line.removeprefix(str(path)).split(":")[1]) for line in capsys.readouterr().out.splitlines()[:-2]]
    assert lines == sorted(lines)
    assert len(lines) == 4


def test_nothing_to_validate_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate(tmp_path) == 2
    assert "nothing was validated" in capsys.readouterr().err
    assert validate(tmp_path / "absent.yaml") == 2
    assert "absent.yaml: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("text", [PV_KERNEL, PV_PATTERN, PV_REGISTRY], ids=["kernel", "pattern", "registry"])
def test_a_contract_in_the_form_of_provable_contracts_validates(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "theirs-v1.yaml"
    path.write_text(text)
    assert validate("--strict", path) == 0, capsys.readouterr().out
    assert "1 contract(s), 1 of them in the form of provable-contracts" in capsys.readouterr().out
    assert validate("--dialect", "house", path) == 1


SPOILT = {
    "no references": (PV_KERNEL, '["Any text book"]', "[]", "6:15: SCHEMA-001", 1),
    "an empty formula": (PV_KERNEL, '"c(x) = min(max(x, lo), hi)"', '""', "9:14: SCHEMA-004", 1),
    "a harness without a bound": (PV_KERNEL, ", bound: 8", "", "47:5: SCHEMA-012 warning", 0),
    "an id twice": (PV_KERNEL, "FALSIFY-CL-002", "FALSIFY-CL-001", "42:9: SCHEMA-007", 1),
    "no falsifiers": (
        PV_KERNEL,
        PV_KERNEL[PV_KERNEL.index("falsification_tests") : PV_KERNEL.index("kani")],
        "",
        "1:1: PROVABILITY-001",
        1,
    ),
    "a key nearly known": (PV_KERNEL, "    codomain:", "    co-domain:", "11:5: KEY-001 warning", 0),
    "a section in the singular": (PV_KERNEL, "kani_harnesses:", "kani_harness:", "46:1: KEY-001 warning", 0),
    "a kind at the top": (PV_PATTERN, "scope:", "kind:", "13:1: KEY-001 warning", 0),
    "a tolerance in words": (PV_KERNEL, "1e-7", "tiny", "17:16: TYPE-001", 1),
    "a key twice": (PV_PATTERN, "scope:", "status:", "13:1: YAML-002", 1),
    "a parent undeclared": (
        PV_PATTERN,
        "type: ordering",
        "type: subcontract, parent_contract: x-v1",
        "15:42: SCHEMA-017",
        1,
    ),
}


@pytest.mark.parametrize(("text", "old", "new", "said", "status"), SPOILT.values(), ids=SPOILT)
def test_the_rules_of_pv_hold_for_a_contract_in_its_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, old: str, new: str, said: str, status: int
) -> None:
    path = tmp_path / "theirs-v1.yaml"
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert validate(path) == status
    assert f"{path}:{said}" in capsys.readouterr().out


def test_a_contract_of_this_project_does_not_become_a_foreign_one_by_losing_its_id(
    project: Path, good: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = project / "contracts" / "good-v1.yaml"
    path.write_text(good.replace("  id: good-v1\n", "").replace("  covers:\n    - kernels/double.py\n", ""))
    assert validate(path) == 1
    out = capsys.readouterr().out
    assert "FIELD-001 metadata.id" in out
    assert "COVERS-001" in out
