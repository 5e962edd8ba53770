"""The contracts check: good ones pass, each planted fault is named, and nothing at all is an error."""

from pathlib import Path

import pytest

from exactmoe.contracts.check import check_text, main

GOOD = """
metadata:
  id: good
  version: 1.0.0
  kind: numerics
  description: A promise.
equations:
  double:
    formula: y = 2x
falsification_tests:
  - id: F-1
    rule: doubles
    prediction: 2 * 2 = 4
    test: tests/test_double.py::test_two_doubles_to_four
    if_fails: doubling is wrong
  - id: F-2
    rule: doubles in a class
    prediction: 2 * 3 = 6
    test: tests/test_double.py::TestDouble::test_three
    if_fails: doubling is wrong
"""
TESTS = """
import pytest

def test_two_doubles_to_four(): assert 2 * 2 == 4
def helper(): pass
class TestDouble:
    def test_three(self): assert 2 * 3 == 6
@pytest.mark.skip(reason="later")
def test_skipped(): assert False
@pytest.mark.xfail
def test_expected_to_fail(): assert False
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "contracts").mkdir()
    (tmp_path / "tests" / "test_double.py").write_text(TESTS)
    return tmp_path


def run(root: Path) -> int:
    return main([str(root / "contracts"), "--root", str(root)])


def test_a_good_contract_is_counted_and_passes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "contracts" / "good.yaml").write_text(GOOD)
    assert run(root) == 0
    assert capsys.readouterr().out == "1 contracts, 1 equations, 2 falsification tests, 0 errors\n"


TEST = "tests/test_double.py::test_two_doubles_to_four"
FAULTS = {
    "a key twice": ("  kind: numerics", "  kind: numerics\n  kind: other", "the key 'kind' stands twice"),
    "an equation twice": (
        "falsification_tests",
        "  double: {formula: z}\nfalsification_tests",
        "'double' stands twice",
    ),
    "broken yaml": ("metadata:", "metadata: [", "while parsing"),
    "no description": ("  description: A promise.\n", "", "metadata: description must be a text, got None"),
    "a version that is a number": ("1.0.0", "1.0", "metadata: version must be a text, got 1.0"),
    "another id": ("id: good", "id: better", "id 'better' is not the name of the file"),
    "no equations": ("equations:\n  double:\n    formula: y = 2x\n", "", "equations: there are none"),
    "an empty formula": ("formula: y = 2x", "formula: ''", "equations.double: formula must be a text"),
    "an equation without formula": ("    formula: y = 2x", "    domain: x", "equations.double: formula must be a text"),
    "no falsifiers": (GOOD[GOOD.index("falsification_tests") :], "", "nothing could prove this contract wrong"),
    "a falsifier without a consequence": ("    if_fails: doubling is wrong\n  - ", "  - ", "if_fails must be a text"),
    "an id twice": ("F-2", "F-1", "the id is taken"),
    "a test that is not a node id": (TEST, "tests/test_double.py", "is not path::test_name"),
    "a test file that is not there": (TEST, "tests/test_triple.py::test_two", "no test file tests/test_triple.py"),
    "a test outside tests": (TEST, "contracts/../tests/test_double.py::test_two_doubles_to_four", "no test file"),
    "a test that is not there": (TEST, "tests/test_double.py::test_two", "tests/test_double.py has no test_two"),
    "a method that is not there": ("::test_three", "::test_four", "tests/test_double.py has no test_four"),
    "a function that is no test": (TEST, "tests/test_double.py::helper", "helper is not a test function"),
    "a class for a test": (TEST, "tests/test_double.py::TestDouble", "TestDouble is not a test function"),
    "a skipped test": (TEST, "tests/test_double.py::test_skipped", "it proves nothing"),
    "a test expected to fail": (TEST, "tests/test_double.py::test_expected_to_fail", "it proves nothing"),
}


@pytest.mark.parametrize(("good", "bad", "message"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_named(root: Path, good: str, bad: str, message: str) -> None:
    assert good in GOOD
    assert check_text(GOOD, "good", root)[2] == []
    _, _, errors = check_text(GOOD.replace(good, bad, 1), "good", root)
    assert any(message in error for error in errors), errors


def test_errors_go_to_stderr_with_the_name_of_the_file(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "contracts" / "good.yaml").write_text(GOOD)
    (root / "contracts" / "worse.yaml").write_text(GOOD)
    assert run(root) == 1
    assert capsys.readouterr().err == "worse.yaml: metadata: id 'good' is not the name of the file\n"


def test_a_folder_without_contracts_is_an_error(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root) == 1
    err = capsys.readouterr().err
    assert "no contract: nothing was checked" in err
    assert "no falsification test: nothing was checked" in err


def test_a_text_that_is_no_mapping_is_an_error(root: Path) -> None:
    assert check_text("- a list", "good", root) == (0, 0, ["not a mapping"])
    assert check_text("", "good", root) == (0, 0, ["not a mapping"])
