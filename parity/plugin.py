"""The pytest plugin: a test of your own kernel gets cases, their inputs, the reference and the comparison.

    @pytest.mark.exactmoe("route")
    def test_my_router(parity_case):
        parity_case.check(my_route(**parity_case.inputs))

The marker names an op of `exactmoe.parity.cases`; the test runs once for each of its cases. `check` compares bit for
bit and fails with the first coordinate and both values in decimal and hex. A test that never calls it fails, and so
does a run that compared nothing. `parity_check(expected, output)` does the same for data of your own.

pytest loads this module in every run of an environment that holds it, so it imports nothing but pytest. It asserts
nothing itself: PYTEST_DONT_REWRITE."""

from collections.abc import Callable, Iterator
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
    """What the tests of this process compared."""

    rows: "list[StageDiff]" = field(default_factory=list)
    asked: int = 0  # tests that were to compare something
    too_large: int = 0  # cases left out for want of a GPU


_RUN = pytest.StashKey[_Run]()


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


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run of which nothing was compared; write the report."""
    run = session.config.stash[_RUN]
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
