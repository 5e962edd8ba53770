"""The recorder: one process or several, the record is the same, and a run that did not come to its end leaves none."""

import json
from typing import Any

import pytest

from exactmoe.contracts.record import Record

pytest_plugins = ["pytester"]

OF_ALL_KINDS = """
import pytest

@pytest.fixture
def breaks():
    raise OSError

@pytest.fixture
def breaks_later():
    yield
    raise OSError

@pytest.fixture(scope="module")
def shared():
    return []

def test_passes():
    assert True

@pytest.mark.parametrize("x", range(12))
def test_mixed(x):
    assert x != 5
    if x in (1, 7):
        pytest.skip("today")

@pytest.mark.parametrize("x", range(5))
def test_left_out(x, shared):
    shared.append(x)

def test_breaks_before(breaks):
    assert True

def test_breaks_after(breaks_later):
    assert True

@pytest.mark.skip
def test_skipped():
    assert False

@pytest.mark.xfail
def test_expected_to_fail():
    assert False

@pytest.mark.xfail(strict=True)
def test_fails_by_passing():
    assert True

@pytest.mark.xfail
def test_passes_by_surprise():
    assert True

@pytest.mark.xfail
def test_breaks_as_expected(breaks):
    assert True

class TestClass:
    @pytest.mark.parametrize("name", ["a::b[c]", "d"])
    def test_inside(self, name):
        assert True

def test_left_out_whole():
    assert False
"""
LEAVES_OUT = """
def pytest_collection_modifyitems(config, items):
    out = [item for item in items if item.name in ("test_left_out_whole", "test_left_out[1]", "test_left_out[4]")]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]
"""
COUNTED = {
    "test_a.py::TestClass::test_inside": (2, 0, 0, 0),
    "test_a.py::test_breaks_after": (1, 1, 0, 0),
    "test_a.py::test_breaks_as_expected": (0, 0, 1, 0),
    "test_a.py::test_breaks_before": (0, 1, 0, 0),
    "test_a.py::test_expected_to_fail": (0, 0, 1, 0),
    "test_a.py::test_fails_by_passing": (0, 1, 0, 0),
    "test_a.py::test_mixed": (9, 1, 2, 0),
    "test_a.py::test_passes": (1, 0, 0, 0),
    "test_a.py::test_passes_by_surprise": (0, 0, 1, 0),
    "test_a.py::test_skipped": (0, 0, 1, 0),
    "test_a.py::test_left_out": (3, 0, 0, 2),
    "test_b.py::test_other": (6, 0, 0, 0),
}
OTHER = """
import pytest

@pytest.mark.parametrize("x", range(6))
def test_other(x):
    assert True
"""
CONTRACT = """metadata: {id: any-v1, version: 1.0.0, created: "2026-01-01", author: somebody, kind: kernel,
  description: Any., references: [a book], covers: [covered.py], devices: [cpu]}
equations: {any: {formula: a}}
proof_obligations: [{type: invariant, property: any, applies_to: any, falsified_by: [F-1]}]
falsification_tests: [{id: F-1, rule: any, prediction: any, test: "test_b.py::test_other", if_fails: wrong}]
qa_gate: {id: GATE, name: the gate, checks: [F-1], pass_criteria: all pass}
"""
WORKERS = ("-n", "2", "--dist", "worksteal")
BOTH = pytest.mark.parametrize("workers", [(), WORKERS], ids=["alone", "two workers"])


class Run:
    """A recorded run of the files in a folder. The workers are processes; what begins the run is this process."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.root = pytester.path
        self.file = self.root / "run.json"
        (self.root / "contracts").mkdir()
        (self.root / "contracts" / "any-v1.yaml").write_text(CONTRACT)
        (self.root / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
        (self.root / "covered.py").touch()
        (self.root / "test_b.py").write_text(OTHER)

    def __call__(self, *options: str) -> pytest.RunResult:
        plugins = ("-p", "xdist.plugin", "-p", "exactmoe.contracts.recorder", "-p", "no:cacheprovider")
        return self.pytester.runpytest_inprocess(*plugins, "--record-evidence", "run.json", *options)

    def record(self) -> dict[str, Any]:
        """What it wrote, but for the time."""
        Record.load(self.file)  # its seal fits
        found: dict[str, Any] = json.loads(self.file.read_text())
        return {name: value for name, value in found.items() if name not in ("date", "seal")}

    def refused(self, done: pytest.RunResult, why: str) -> bool:
        """Whether the run failed, said why there is no record, and left none, not even of an earlier run."""
        said = f"no evidence was recorded: {why}" in done.stdout.str()
        return done.ret != 0 and said and not self.file.exists()


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # or every worker loads what no test here needs
    return Run(pytester)


@pytest.fixture
def recorded(run: Run) -> Run:
    """There is a record of an earlier run."""
    assert run().ret == 0
    assert run.record()["tests"] == {"test_b.py::test_other": [6, 0, 0, 0]}
    return run


@pytest.mark.parametrize("scheduling", ["worksteal", "loadfile"])
def test_workers_leave_the_record_that_one_process_leaves(run: Run, scheduling: str) -> None:
    (run.root / "test_a.py").write_text(OF_ALL_KINDS)
    (run.root / "conftest.py").write_text(LEAVES_OUT)
    assert run("--list-tests", "alone.json").ret == 1
    alone = run.record()
    assert {name: tuple(counts) for name, counts in alone["tests"].items()} == COUNTED
    assert alone["files"].keys() == {"covered.py", "test_b.py"} and all(alone["files"].values())
    run.file.unlink()
    done = run("-n", "2", "--dist", scheduling, "--list-tests", "workers.json")
    assert done.ret == 1 and "2 workers" in done.stdout.str()
    assert run.record() == alone
    listed = (run.root / "alone.json").read_text()
    assert "test_left_out_whole" in listed and (run.root / "workers.json").read_text() == listed


@BOTH
def test_a_file_that_a_test_changes_is_not_what_the_tests_ran_on(run: Run, workers: tuple[str, ...]) -> None:
    (run.root / "test_a.py").write_text(
        "from pathlib import Path\ndef test_changes():\n    Path('covered.py').write_text('changed')\n"
    )
    assert run(*workers).ret == 0
    files = run.record()["files"]
    assert files["covered.py"] == "" and files["test_b.py"]


@BOTH
def test_a_run_of_no_test_fails_and_its_record_shows_nothing(run: Run, workers: tuple[str, ...]) -> None:
    assert run("-k", "nothing", *workers).ret == pytest.ExitCode.NO_TESTS_COLLECTED
    assert run.record()["tests"] == {}


def test_a_worker_that_ends_in_a_test_leaves_no_record(recorded: Run) -> None:
    (recorded.root / "test_a.py").write_text("import os\ndef test_ends():\n    os._exit(0)\n")
    # A file for each worker: where tests move between them, pytest-xdist may break on sending one to what has ended.
    done = recorded("-n", "2", "--dist", "loadfile", "--max-worker-restart", "0")
    assert recorded.refused(done, "worker gw")
    assert "1 failed, 6 passed" in done.stdout.str()


def test_a_worker_that_ends_when_its_tests_have_passed_leaves_no_record(recorded: Run) -> None:
    (recorded.root / "conftest.py").write_text(
        "import os, pytest\n@pytest.hookimpl(tryfirst=True)\ndef pytest_sessionfinish(session):\n"
        "    if getattr(session.config, 'workerinput', {}).get('workerid') == 'gw1':\n        os._exit(0)\n"
    )
    done = recorded(*WORKERS)
    assert "6 passed" in done.stdout.str() and "failed" not in done.stdout.str()
    assert recorded.refused(done, "worker gw1 ended before its time")


@BOTH
def test_a_file_that_cannot_be_collected_leaves_no_record(recorded: Run, workers: tuple[str, ...]) -> None:
    (recorded.root / "test_a.py").write_text("import nothing_of_this_name\n")
    assert recorded.refused(recorded(*workers), "test_a.py could not be collected")


@BOTH
def test_a_run_that_stops_at_its_first_failure_leaves_no_record(recorded: Run, workers: tuple[str, ...]) -> None:
    (recorded.root / "test_a.py").write_text("def test_fails():\n    assert False\n")
    (recorded.root / "test_b.py").write_text(OTHER.replace("range(6)", "range(60)"))
    assert recorded.refused(recorded("-x", *workers), "")


@BOTH
def test_a_run_that_breaks_leaves_no_record(recorded: Run, workers: tuple[str, ...]) -> None:
    (recorded.root / "conftest.py").write_text("def pytest_runtest_logreport():\n    raise OSError\n")
    assert recorded(*workers).ret == pytest.ExitCode.INTERNAL_ERROR
    assert not recorded.file.exists()


@BOTH
@pytest.mark.parametrize("how", ["raise KeyboardInterrupt", "pytest.exit('enough')", "pytest.exit('enough', 0)"])
def test_an_interrupted_run_leaves_no_record(recorded: Run, workers: tuple[str, ...], how: str) -> None:
    (recorded.root / "test_b.py").write_text(OTHER.replace("assert True", f"if x == 1: {how}"))
    try:
        assert recorded(*workers).ret != 0
    except KeyboardInterrupt:
        assert how == "raise KeyboardInterrupt"
    assert not recorded.file.exists()


def test_a_run_that_is_interrupted_before_its_first_test_leaves_no_record(recorded: Run) -> None:
    stop = "import pytest\ndef pytest_collection_finish():\n    pytest.exit('enough')\n"
    (recorded.root / "conftest.py").write_text(stop)
    assert recorded.refused(recorded(), "the run was interrupted")


def test_workers_that_collect_different_tests_leave_no_record(recorded: Run) -> None:
    text = OTHER.replace("import pytest", "import os, pytest\nN = 6 + (os.environ.get('PYTEST_XDIST_WORKER') == 'gw1')")
    (recorded.root / "test_b.py").write_text(text.replace("range(6)", "range(N)"))
    (recorded.root / "conftest.py").write_text(LEAVES_OUT.replace("test_left_out_whole", "test_other[6]"))
    assert recorded.refused(recorded(*WORKERS), "the workers collected different tests")
