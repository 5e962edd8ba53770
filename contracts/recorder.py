"""A pytest plugin that records a run as evidence.

    pytest -p exactmoe.contracts.recorder --record-evidence FILE [--evidence-commit ID]

`--list-tests FILE` writes the node ids of all tests that are collected, those too that this machine would leave out.

The record has the outcome of every test that ran, and the hash of every file that a contract of contracts/ covers or
cites. It says on which device kernels ran; in a tree without git, `--evidence-commit` says of which commit it is.

Under pytest-xdist the workers run the tests, and the process that began the run counts and writes. A run that was
interrupted, stopped early or lost a worker writes nothing and removes FILE: what it did not reach may be what fails."""

import datetime as dt
import importlib.metadata
import json
import platform
import subprocess
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from exactmoe.contracts.record import Record, content_hash, write
from exactmoe.contracts.status import concerned
from exactmoe.contracts.validate import files, load

_PLACE = {"passed": 0, "failed": 1, "skipped": 2}
_PACKAGES = ("torch", "triton", "numpy", "pytest")
_ENDED = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
_SENT = "exactmoe_collected"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("evidence")
    group.addoption("--record-evidence", metavar="FILE", help="write what the run showed to FILE")
    group.addoption("--evidence-commit", metavar="ID", help="the commit of a tree without git")
    group.addoption("--list-tests", metavar="FILE", help="write the node ids of all collected tests to FILE")


def pytest_configure(config: pytest.Config) -> None:
    """Begin to count."""
    config.pluginmanager.register(_Worker(config) if hasattr(config, "workerinput") else _Recorder(config))


class _Worker:
    """A worker of pytest-xdist: it collects and runs tests. Its reports are sent by pytest-xdist; it writes nothing."""

    def __init__(self, config: pytest.Config) -> None:
        self.config: Any = config
        self.collected: Counter[str] = Counter()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.collected.update(function(item.nodeid) for item in items)  # before any is left out

    def pytest_sessionfinish(self) -> None:
        self.config.workeroutput[_SENT] = dict(self.collected)


class _Recorder:
    """Every other process."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.path: str | None = None if config.getoption("collectonly") else config.getoption("--record-evidence")
        self.counts: dict[str, list[int]] = {}
        self.collected: Counter[str] = Counter()
        self.ended = 0
        self.workers: dict[str, dict[str, int] | None] = {}  # what each collected, once it has come to its end
        self.wrong = ""  # why there is no record
        # What the tests run on is what the files hold now.
        self.hashes = _hashes(config.rootpath) if self.path else {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.collected.update(function(item.nodeid) for item in items)  # before any is left out
        self.list_tests()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        # Workers run the rest all the same.
        if report.failed and not self.config.getoption("continue_on_collection_errors"):
            self.wrong = self.wrong or f"{report.nodeid or 'a file'} could not be collected"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        counts = self.counts.setdefault(function(report.nodeid), [0, 0, 0])
        if report.when == "call" or report.outcome != "passed":  # set-up and teardown count where they go wrong
            excused = hasattr(report, "wasxfail")
            counts[_PLACE["skipped" if excused else report.outcome]] += 1

    def pytest_runtest_logfinish(self) -> None:
        self.ended += 1

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        self.workers[node.gateway.id] = None

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        sent = getattr(node, "workeroutput", {}).get(_SENT)
        if error or sent is None:
            self.wrong = self.wrong or f"worker {node.gateway.id} ended before its time: {error}"
        self.workers[node.gateway.id] = sent

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.wrong = self.wrong or self._unfinished(session)
        if self.workers and not self.wrong:
            self.collected.update(next(iter(self.workers.values())))
            self.list_tests()
        if not self.path:
            return
        if not self.wrong:
            write(self.record(), Path(self.path))
            return
        Path(self.path).unlink(missing_ok=True)
        if session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.path and self.wrong:
            terminalreporter.write_line(f"no evidence was recorded: {self.wrong}", red=True)

    def list_tests(self) -> None:
        """Write the tests that were collected, if that is asked for."""
        path = self.config.getoption("--list-tests")
        if path:
            Path(path).write_text(json.dumps(sorted(self.collected)), encoding="utf-8")

    def record(self) -> Record:
        """What the run showed."""
        root = self.config.rootpath
        loaded = [load(path)[0].contract for path in files([root / "contracts"])]
        now = _hashes(root)
        device, machine = _device()
        return Record(
            device=device,
            machine=machine,
            versions={"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in _PACKAGES}},
            commit=self.config.getoption("--evidence-commit") or _commit(root),
            date=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            numerics=next((c.metadata.version for c in loaded if c and c.metadata.id == "numerics-v1"), "unknown"),
            # A file that changed while the tests ran was not what they ran on.
            files={name: found if self.hashes.get(name) == found else "" for name, found in sorted(now.items())},
            tests={
                name: (ok, bad, left, max(self.collected[name] - ok - bad - left, 0))
                for name, (ok, bad, left) in sorted(self.counts.items())
                if ok + bad + left
            },
        )

    def _unfinished(self, session: pytest.Session) -> str:
        """Why this was not the whole run, or nothing."""
        if session.exitstatus not in _ENDED:
            return "the run was interrupted"
        if self.ended != session.testscollected:
            return f"of {session.testscollected} tests {self.ended} came to their end"
        if None in self.workers.values():
            return "a worker has not come to its end"
        if any(one != other for one, other in pairwise(self.workers.values())):
            return "the workers collected different tests"
        return ""


def function(node_id: str) -> str:
    """A node id without its parameters."""
    return node_id.split("[", 1)[0]


def _hashes(root: Path) -> dict[str, str]:
    """sha256 of every file that a contract covers or cites."""
    loaded = [load(path)[0].contract for path in files([root / "contracts"])]
    names = {name for contract in loaded if contract for name in concerned(contract, root)}
    return {name: content_hash(root / name) for name in names}


def _device() -> tuple[str, str]:
    import torch

    if torch.cuda.is_available():
        return "gpu", torch.cuda.get_device_name()
    return "cpu", f"{platform.machine()}, kernels in Triton's interpreter"


def _commit(root: Path) -> str:
    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    return "unknown" if head is None else head + ("+" if git("status", "--porcelain") else "")
