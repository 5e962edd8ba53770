"""The pytest plugin: a test of your own kernel gets cases, their inputs, the reference and the comparison.

    @pytest.mark.exactmoe("route")
    def test_my_router(parity_case):
        parity_case.check(my_route(**parity_case.inputs))

The marker names an op of `exactmoe.parity.cases`; the test runs once for each of its cases. `check` compares bit for
bit and fails with the first coordinate and both values in decimal and hex. A test that never calls it fails, and so
does a run that compared nothing. `parity_check(expected, output)` does the same for data of your own.

Under pytest-xdist what the workers compared comes with their reports to the process that began the run, which judges
and writes.

pytest loads this module in every run of an environment that holds it, so it imports nothing but pytest. It asserts
nothing itself: PYTEST_DONT_REWRITE."""

import pickle
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from exactmoe.parity.diff.verdict import StageDiff
    from exactmoe.parity.under_test import ParityCase

FIXTURES = ("parity_case", "parity_check")
REPORTS = (".html", ".xml", ".json")

_MARKER = "exactmoe(op, where=None): run the test for every case of `op`; `where` keeps the cases it says yes to"


@dataclass
class _Run:
    """What the tests compared; of a worker, what it has not sent yet."""

    rows: "list[StageDiff]" = field(default_factory=list)
    asked: int = 0  # tests that were to compare something
    too_large: int = 0  # cases left out for want of a GPU
    places: dict[str, int] = field(default_factory=dict)  # of the workers' tests, as they were collected
    sent: "list[tuple[int, list[StageDiff]]]" = field(default_factory=list)  # by workers: the place of a test, its rows


_RUN = pytest.StashKey[_Run]()
_SENT = "exactmoe_compared"
_TOO_LARGE = "exactmoe_too_large"


def pytest_addoption(parser: pytest.Parser) -> None:
    """--exactmoe-report."""
    parser.getgroup("exactmoe").addoption(
        "--exactmoe-report",
        metavar="FILE",
        help=f"write what was compared with the reference to FILE, as its ending says ({', '.join(REPORTS)})",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line("markers", _MARKER)
    config.stash[_RUN] = _Run()
    path = config.getoption("--exactmoe-report")
    if path is not None and Path(path).suffix not in REPORTS:
        raise pytest.UsageError(f"--exactmoe-report {path}: must end in one of {', '.join(REPORTS)}")


def pytest_pycollect_makemodule(module_path: Path) -> None:
    """Settle where kernels run before a test module that uses a case imports its kernels.

    Triton reads TRITON_INTERPRET when a kernel is defined, so this cannot wait for the first test."""
    text = module_path.read_bytes()
    if any(name.encode() in text for name in FIXTURES):
        from exactmoe.kernels.launch import resolve_device

        resolve_device("auto")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for every case of the op that the marker names."""
    if "parity_case" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("exactmoe")
    if marker is None or len(marker.args) != 1 or not set(marker.kwargs) <= {"where"}:
        raise pytest.Collector.CollectError(
            f"{metafunc.function.__name__}: parity_case needs the marker exactmoe with one op, as "
            "@pytest.mark.exactmoe('route'), and at most where=..."
        )
    from exactmoe.kernels.launch import resolve_device
    from exactmoe.parity.cases import CASES, Case

    (op,) = marker.args
    if op not in CASES:
        raise pytest.Collector.CollectError(f"no op {op!r} has cases; those are {', '.join(sorted(CASES))}")
    where: Callable[[Case], bool] = marker.kwargs.get("where") or (lambda _: True)
    wanted = [case for case in CASES[op] if where(case)]
    cases = wanted if resolve_device("auto").type == "cuda" else [case for case in wanted if not case.gpu]
    if not cases:
        raise pytest.Collector.CollectError(f"{metafunc.function.__name__}: no case of {op} is left to compare")
    metafunc.config.stash[_RUN].too_large += len(wanted) - len(cases)
    metafunc.parametrize("parity_case", cases, ids=str, indirect=True)


@pytest.fixture
def parity_case(request: pytest.FixtureRequest) -> "ParityCase":
    """A case: `op`, `inputs` by name on the device, `arguments`, `reference`, and `check(output)`."""
    from exactmoe.parity.under_test import ParityCase

    return ParityCase(request.param, request.config.stash[_RUN].rows.append)


@pytest.fixture
def parity_check(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`parity_check(expected, output, name="out")`: compare data of your own, and have it in the report."""
    from exactmoe.parity.under_test import check

    run = request.config.stash[_RUN]

    def compare(expected: Any, output: Any, name: str = "out", *, atol: float = 0.0, rtol: float = 0.0) -> None:
        __tracebackhide__ = True
        check(f"{request.node.name} {name}", expected, output, run.rows.append, atol=atol, rtol=rtol)

    return compare


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that was given a case or a comparison and compared nothing, and have that in the report."""
    asked = sorted(set(FIXTURES) & set(getattr(item, "fixturenames", ())))
    if not asked:
        yield
        return
    run = item.config.stash[_RUN]
    before = len(run.rows)
    run.asked += 1
    try:
        yield
        if len(run.rows) == before:
            pytest.fail(f"{item.name} was given {' and '.join(asked)} and compared nothing", pytrace=False)
    finally:
        if len(run.rows) == before:
            from exactmoe.parity.under_test import not_compared

            run.rows.append(not_compared(item.name))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A worker sends what was compared since its last report."""
    report = yield
    run = item.config.stash[_RUN]
    if hasattr(item.config, "workerinput") and (run.rows or run.asked):
        setattr(report, _SENT, pickle.dumps((run.asked, run.rows)))
        run.asked = 0
        run.rows.clear()
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    """Keep the order of the tests: the report has it, whichever worker was first."""
    node.config.stash[_RUN].places = {name: place for place, name in enumerate(ids)}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Take what a worker sent."""
    if hasattr(report, "node") and hasattr(report, _SENT):
        run = report.node.config.stash[_RUN]
        asked, rows = pickle.loads(report.__dict__.pop(_SENT))
        run.asked += asked
        run.sent.append((run.places[report.nodeid], rows))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker collects every test, so each has left out the same cases."""
    run = node.config.stash[_RUN]
    run.too_large = max(run.too_large, getattr(node, "workeroutput", {}).get(_TOO_LARGE, 0))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run of which nothing was compared; write the report."""
    run = session.config.stash[_RUN]
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:  # a worker's
        output[_TOO_LARGE] = run.too_large
        return
    run.rows += [row for _, rows in sorted(run.sent, key=lambda sent: sent[0]) for row in rows]
    if run.asked and not sum(row.count for row in run.rows) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    path = session.config.getoption("--exactmoe-report")
    if path is not None:
        from exactmoe.parity.under_test import write_report

        write_report(Path(path), run.rows)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """How much was compared with the reference."""
    run = config.stash[_RUN]
    if not (run.asked or run.too_large):
        return
    from exactmoe.parity.under_test import kernel_report

    report = kernel_report(run.rows)
    wrong = "all equal" if report.equal else f"{len(report.failed)} not equal"
    counts = f"{report.compared:,} outputs and {report.elements:,} elements of {run.asked:,} tests compared"
    terminalreporter.write_line(f"exactmoe: {counts}, {wrong}")
    if not report.elements:
        terminalreporter.write_line("exactmoe: nothing was compared, which is a failure", red=True)
    if run.too_large:
        terminalreporter.write_line(f"exactmoe: {run.too_large} cases left out, too large without a CUDA device")
