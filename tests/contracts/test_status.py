"""Evidence and status: what a run showed is recorded, sealed, and is all that a status comes from."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exactmoe.contracts import status as status_module
from exactmoe.contracts.record import Record, Unusable, content_hash, write
from exactmoe.contracts.status import ContractStatus, markdown, statuses

TESTS = """
import pytest

def test_one():
    assert 1 + 1 == 2

@pytest.mark.parametrize("x", [1, 2])
def test_two(x):
    assert x

def test_three():
    assert True
"""
CONTRACT = """metadata:
  id: sum-v1
  version: 1.0.0
  created: "2026-01-01"
  author: somebody
  kind: kernel
  description: Sums.
  references: [a book]
  covers: [sums.py]
  devices: [cpu]
equations:
  sum:
    formula: a + b
proof_obligations:
  - type: invariant
    property: sums are sums
    applies_to: sum
    falsified_by: [FALSIFY-1, FALSIFY-2]
falsification_tests:
  - {id: FALSIFY-1, rule: one, prediction: it holds, test: "tests/test_sums.py::test_one", if_fails: wrong}
  - {id: FALSIFY-2, rule: two, prediction: it holds, test: "tests/test_sums.py::test_two", if_fails: wrong}
qa_gate: {id: GATE, name: the gate, checks: [FALSIFY-1, FALSIFY-2], pass_criteria: all pass}
"""


class Project:
    """A small repository with one contract."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("tests", "contracts/evidence"):
            (root / folder).mkdir(parents=True)
        (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
        (root / "sums.py").write_text("pass\n")
        self.tests = root / "tests" / "test_sums.py"
        self.tests.write_text(TESTS)
        self.contract = root / "contracts" / "sum-v1.yaml"
        self.contract.write_text(CONTRACT)

    def run(self, *options: str) -> Path:
        """A recorded run."""
        self.outcome(*options)
        return self.root / "run.json"

    def outcome(self, *options: str) -> subprocess.CompletedProcess[str]:
        """How a recorded run went."""
        out = self.root / "run.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "exactmoe.contracts.recorder", "--record-evidence", out]
        return subprocess.run([*command, *options], cwd=self.root, capture_output=True, text=True, check=False)

    def passing(
        self,
        device: str = "cpu",
        where: str = "passing.json",
        date: str = "2026-01-01T00:00:00+00:00",
        **tests: tuple[int, int, int, int],
    ) -> Path:
        """What a run would record in which every test passes, but for those given."""
        counts = {"test_one": (1, 0, 0, 0), "test_two": (2, 0, 0, 0), "test_three": (1, 0, 0, 0)} | tests
        files = {name: content_hash(self.root / name) for name in ("sums.py", "tests/test_sums.py")}
        record = Record(
            device, "a machine", {}, "abc", date, "1.0.0", files,
            {f"tests/test_sums.py::{name}": count for name, count in counts.items()},
        )  # fmt: skip
        write(record, self.root / where)
        return self.root / where

    def status(self, *records: Path) -> ContractStatus:
        (found,) = statuses([self.contract], records)
        return found

    def edit(self, file: Path, before: str, after: str) -> None:
        text = file.read_text()
        assert before in text
        file.write_text(text.replace(before, after))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Its tests are found by reading them: quicker than a pytest of its own."""

    def read(_: set[str], root: Path) -> set[str]:
        names = re.findall(r"^def (test_\w+)", (root / "tests" / "test_sums.py").read_text(), re.MULTILINE)
        return {f"tests/test_sums.py::{name}" for name in names}

    monkeypatch.setattr(status_module, "_collected", read)
    return Project(tmp_path)


@pytest.fixture
def real(tmp_path: Path) -> Project:
    """Its tests are found by pytest."""
    return Project(tmp_path)


def states(status: ContractStatus) -> dict[str, str]:
    return {f"{name} {s.device}": s.state for name, needed in status.falsifiers.items() for s in needed}


def test_without_a_run_a_bound_contract_is_proposed(project: Project) -> None:
    found = project.status()
    assert found.status == "PROPOSED"
    assert set(states(found).values()) == {"bound"}


def test_a_run_that_passes_discharges_a_contract_of_the_cpu(real: Project) -> None:
    found = real.status(real.run())
    assert (found.status, found.obligation(0)) == ("DISCHARGED", "passed")
    assert "| `sum-v1` | 1.0.0 | DISCHARGED | 1 of 1 | 2 of 2 |  |" in markdown([found])


def test_a_contract_of_a_gpu_too_is_active_at_the_algorithm_level_without_a_gpu(project: Project) -> None:
    project.edit(project.contract, "devices: [cpu]", "devices: [cpu, gpu]")
    assert project.status(project.passing()).status == "ACTIVE_ALGORITHM_LEVEL"


def test_gpu_evidence_of_older_code_is_active_at_runtime_and_says_what_changed(project: Project) -> None:
    project.edit(project.contract, "devices: [cpu]", "devices: [cpu, gpu]")
    project.passing("gpu", "contracts/evidence/gpu.json")
    assert project.status(project.passing()).status == "DISCHARGED"
    (project.root / "sums.py").write_text("changed\n")
    found = project.status(project.passing())
    assert found.status == "ACTIVE_RUNTIME"
    gpu = found.falsifiers["FALSIFY-1"][1]
    assert (gpu.state, gpu.changed) == ("stale", ("sums.py",))
    assert "changed since: sums.py" in str(gpu)


def test_evidence_of_the_cpu_does_not_outlive_a_change_of_what_is_covered(project: Project) -> None:
    record = project.passing()
    (project.root / "sums.py").write_text("changed\n")
    found = project.status(record)
    assert (found.status, set(states(found).values())) == ("PROPOSED", {"stale"})


@pytest.mark.parametrize("body", ["pytest.skip('not today')", "pytest.xfail('known')"])
def test_a_skipped_test_has_not_passed(real: Project, body: str) -> None:
    real.edit(real.tests, "assert 1 + 1 == 2", body)
    found = real.status(real.run())
    assert (found.status, found.falsifiers["FALSIFY-1"][0].state) == ("PROPOSED", "skipped")
    assert [finding.code for finding in found.findings] == ["STATUS-003"]


def test_one_parameter_that_fails_fails_the_falsifier_and_names_its_line(real: Project) -> None:
    real.edit(real.tests, "assert x", "assert x == 1")
    found = real.status(real.run())
    assert found.falsifiers["FALSIFY-2"][0].state == "failed"
    (finding,) = found.findings
    line = next(i for i, text in enumerate(CONTRACT.splitlines(), 1) if "FALSIFY-2, rule" in text)
    assert (finding.code, finding.line) == ("STATUS-003", line)


def test_a_run_of_some_tests_is_no_evidence_of_the_others(real: Project) -> None:
    found = real.status(real.run("tests/test_sums.py::test_one", "--evidence-commit", "abc"))
    record = Record.load(real.root / "run.json")
    assert (record.device, record.commit) == ("cpu", "abc")
    assert {"python", "torch", "triton", "numpy"} <= record.versions.keys()
    assert record.files.keys() == {"sums.py", "tests/test_sums.py"}
    assert record.tests == {"tests/test_sums.py::test_one": (1, 0, 0, 0)}
    assert states(found) == {"FALSIFY-1 cpu": "passed", "FALSIFY-2 cpu": "bound"}
    assert found.status == "PROPOSED"


BOTH = 'test: ["tests/test_sums.py::test_one", "tests/test_sums.py::test_two"]'
LEFT_OUT = (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("second", "state"),
    [((2, 0, 0, 0), "passed"), ((1, 0, 1, 0), "skipped"), ((1, 1, 0, 0), "failed"), (LEFT_OUT, "bound")],
)
def test_two_runs_of_the_same_files_together_show_what_each_left_out(
    project: Project, second: tuple[int, int, int, int], state: str
) -> None:
    project.edit(project.contract, 'test: "tests/test_sums.py::test_one"', BOTH)
    runs = [
        project.passing(where="a.json", test_two=LEFT_OUT),
        project.passing(where="b.json", test_one=LEFT_OUT, test_two=second),
    ]
    for some in (runs, runs[::-1]):
        assert project.status(*some).falsifiers["FALSIFY-1"][0].state == state


def test_a_failure_of_these_files_is_not_hidden_by_a_later_pass_of_others(project: Project) -> None:
    project.edit(project.contract, 'test: "tests/test_sums.py::test_one"', BOTH)
    project.edit(project.root / "sums.py", "pass", "pass  # other")
    older = project.passing(where="a.json", date="2026-01-02T00:00:00+00:00")
    project.edit(project.root / "sums.py", "pass  # other", "pass")
    failed = project.passing(where="b.json", test_one=(0, 1, 0, 0), test_two=LEFT_OUT)
    passed = project.passing(where="c.json", test_one=LEFT_OUT, date="2026-01-03T00:00:00+00:00")
    assert project.status(older, failed, passed).falsifiers["FALSIFY-1"][0].state == "failed"


def test_two_runs_of_different_files_do_not_add_up(project: Project) -> None:
    project.edit(project.contract, 'test: "tests/test_sums.py::test_one"', BOTH)
    first = project.passing(where="a.json", test_two=LEFT_OUT)
    project.edit(project.root / "sums.py", "pass", "pass  # other")
    second = project.passing(where="b.json", test_one=LEFT_OUT)
    assert project.status(first, second).falsifiers["FALSIFY-1"][0].state == "bound"


@pytest.mark.parametrize(
    ("counts", "state"),
    [((2, 0, 0, 0), "passed"), ((1, 0, 0, 1), "bound"), ((0, 1, 0, 1), "failed"), ((0, 0, 1, 1), "skipped")],
)
def test_some_parameters_do_not_stand_for_all_where_all_can_run(
    counts: tuple[int, int, int, int], state: str, project: Project
) -> None:
    project.edit(project.contract, "devices: [cpu]", "devices: [cpu, gpu]")
    gpu = project.passing("gpu", "gpu.json", test_two=counts)
    found = project.status(project.passing(test_two=(1, 0, 0, 1)), gpu)
    assert (states(found)["FALSIFY-2 cpu"], states(found)["FALSIFY-2 gpu"]) == ("passed", state)
    assert found.status == ("DISCHARGED" if state == "passed" else "ACTIVE_ALGORITHM_LEVEL")
    assert [finding.code for finding in found.findings] == ["STATUS-003"] * (state in ("failed", "skipped"))


def test_a_parameter_that_was_not_chosen_is_counted(real: Project) -> None:
    record = Record.load(real.run("-k", "test_one or test_two and 2"))
    assert record.tests["tests/test_sums.py::test_two"] == (1, 0, 0, 1)


def test_a_file_that_changes_while_the_tests_run_is_not_what_they_ran_on(real: Project) -> None:
    real.edit(real.tests, "assert 1 + 1 == 2", "open('sums.py', 'w').write('changed')")
    found = real.status(real.run())
    assert set(states(found).values()) == {"stale"}


@pytest.mark.parametrize("later", [{}, {"test_one": (0, 0, 1, 0)}, {"test_one": (0, 1, 0, 0)}])
def test_what_a_later_run_said_of_other_code_does_not_hide_a_pass_of_this(
    project: Project, later: dict[str, tuple[int, int, int, int]]
) -> None:
    this = project.passing()
    text = (project.root / "sums.py").read_text()
    (project.root / "sums.py").write_text("tried and taken back\n")
    other = project.passing(where="other.json", date="2026-02-01T00:00:00+00:00", **later)
    (project.root / "sums.py").write_text(text)
    found = project.status(this, other)
    assert (found.status, found.findings) == ("DISCHARGED", ())


@pytest.mark.parametrize("change", [("def test_two", "def test_too"), ("def test_two", "def _test_two")])
def test_a_cited_test_that_is_renamed_or_gone_is_an_error_with_its_line(
    project: Project, change: tuple[str, str]
) -> None:
    record = project.passing()
    project.edit(project.tests, *change)
    found = project.status(record)
    assert found.status == "DRAFT"
    assert [finding.code for finding in found.findings] == ["STATUS-002"]
    assert "FALSIFY-2" in found.findings[0].message


def test_a_test_that_exists_and_is_not_collected_is_not_bound(real: Project) -> None:
    real.tests.write_text(TESTS + "\ntest_two.__test__ = False\n")
    assert real.status().falsifiers["FALSIFY-2"][0].state == "unbound"


@pytest.mark.parametrize(
    ("typed", "error"), [("DRAFT", False), ("PROPOSED", False), ("ACTIVE_RUNTIME", True), ("DISCHARGED", True)]
)
def test_a_typed_status_above_the_evidence_is_an_error(project: Project, typed: str, error: bool) -> None:
    project.edit(project.contract, "  kind: kernel\n", f"  kind: kernel\n  status: {typed}\n")
    found = project.status()
    assert [finding.code for finding in found.findings] == (["STATUS-001"] if error else [])
    assert all(finding.line == 7 for finding in found.findings)


def test_an_edited_record_is_refused(project: Project) -> None:
    record = project.passing()
    data = json.loads(record.read_text())
    data["tests"]["tests/test_sums.py::test_one"] = [5, 0, 0, 0]
    record.write_text(json.dumps(data))
    with pytest.raises(Unusable, match="seal does not fit"):
        project.status(record)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}'])
def test_what_is_no_record_is_refused(project: Project, text: str) -> None:
    file = project.root / "x.json"
    file.write_text(text)
    with pytest.raises(Unusable, match=r"x\.json: no (evidence|record)"):
        project.status(file)


def test_a_record_without_a_count_of_what_was_left_out_is_refused(project: Project) -> None:
    record = project.passing(test_one=(1, 0, 0))  # type: ignore[arg-type]
    with pytest.raises(Unusable, match="four counts"):
        project.status(record)


def test_the_command_exits_with_0_1_or_2(project: Project, tmp_path: Path) -> None:
    from exactmoe.cli.main import main

    record = project.passing()
    contract = str(project.contract)
    assert main(["contracts", "status", "--evidence", str(record), contract]) == 0
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    assert main(["contracts", "status", "--evidence", str(record), "--readme", str(readme), contract]) == 1
    readme.write_text(markdown(statuses([project.contract], [record])))
    assert main(["contracts", "status", "--evidence", str(record), "--readme", str(readme), contract]) == 0
    assert main(["contracts", "status", "--evidence", str(tmp_path / "none.json"), contract]) == 2
    project.edit(project.tests, "def test_two", "def test_too")
    assert main(["contracts", "status", "--evidence", str(record), contract]) == 1
    shutil.rmtree(project.root / "contracts" / "evidence")
    (project.root / "empty").mkdir()
    assert main(["contracts", "status", str(project.root / "empty")]) == 2


def test_a_falsifier_of_a_gpu_alone_is_not_shown_by_the_cpu(project: Project) -> None:
    before = 'test: "tests/test_sums.py::test_one"'
    project.edit(project.contract, before, f"devices: [gpu], {before}")
    found = project.status(project.passing())
    assert states(found)["FALSIFY-1 gpu"] == "bound"
    assert found.status == "ACTIVE_ALGORITHM_LEVEL"
