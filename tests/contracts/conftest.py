"""A small project with one contract that keeps every rule, for the tests to spoil."""

from pathlib import Path

import pytest

GOOD = """\
metadata:
  id: good-v1
  version: 1.1.0
  created: 2026-01-01
  author: exactmoe maintainers
  kind: kernel
  status: DRAFT
  description: Doubling.
  references:
    - arithmetic
  depends_on: [base-v1]
  amendment_history:
    - version: 1.0.0
      date: 2026-01-01
      description: The first.
    - version: 1.1.0
      date: 2026-01-02
      description: Threes too.
  covers:
    - kernels/double.py
  devices: [cpu, gpu]
version: 1.1.0
equations:
  double:
    formula: y = 2x
    domain: every integer
    invariants:
      - y is even
proof_obligations:
  - id: OBL-1
    type: invariant
    property: the result is even
    formal: y % 2 = 0
    tolerance: 1e-5
    applies_to: double
    falsified_by: [F-1]
  - type: subcontract
    property: base holds
    formal: base
    applies_to: all
    falsified_by: [F-1, F-2]
    parent_contract: base-v1
falsification_tests:
  - id: F-1
    rule: doubles
    prediction: 2 * 2 = 4
    test: tests/test_double.py::test_two_doubles_to_four
    if_fails: doubling is wrong
  - id: F-2
    rule: doubles in a class
    prediction: 2 * 3 = 6
    test:
      - tests/test_double.py::TestDouble::test_three
    if_fails: doubling is wrong
    devices: [cpu]
implementation_stages:
  - id: M-1
    description: Do it.
    expected_acceptance: [F-1, OBL-1]
    evidence: [kernels/double.py, "tests/test_double.py::test_two_doubles_to_four"]
    blockers:
      - nobody has time
kani_harnesses:
  - id: K-1
    obligation: OBL-1
    bound: 8
qa_gate:
  id: GATE
  name: Gate
  checks: [F-1, F-2]
  pass_criteria: all pass
"""
BASE = """\
metadata:
  id: base-v1
  version: 1.0.0
  created: 2026-01-01
  author: exactmoe maintainers
  kind: schema
  description: What others build on.
  references: [arithmetic]
"""
TESTS = """
import pytest

def test_two_doubles_to_four(): assert 2 * 2 == 4
class TestDouble:
    def test_three(self): assert 2 * 3 == 6
class test_of_a_class: pass
@pytest.mark.skip(reason="later")
def test_skipped(): assert False
@pytest.mark.xfail
def test_expected_to_fail(): assert False
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for folder in ("tests", "contracts", "kernels"):
        (tmp_path / folder).mkdir()
    (tmp_path / "tests" / "test_double.py").write_text(TESTS)
    (tmp_path / "kernels" / "double.py").write_text("def double(x): return 2 * x\n")
    (tmp_path / "contracts" / "base-v1.yaml").write_text(BASE)
    (tmp_path / "contracts" / "good-v1.yaml").write_text(GOOD)
    return tmp_path


@pytest.fixture
def good() -> str:
    return GOOD
