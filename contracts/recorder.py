"""A pytest plugin that records a run as evidence.

    pytest -p exactmoe.contracts.recorder --record-evidence FILE [--evidence-commit ID]

`--list-tests FILE` writes the node ids of all tests that are collected, those too that this machine would leave out.

The record has the outcome of every test that ran, and the hash of every file that a contract of contracts/ covers or
cites. It says on which device kernels ran; in a tree without git, `--evidence-commit` says of which commit it is."""

import datetime as dt
import importlib.metadata
import json
import platform
import subprocess
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest

from exactmoe.contracts.record import Record, content_hash, write
from exactmoe.contracts.status import concerned
from exactmoe.contracts.validate import files, load

_COUNTS = pytest.StashKey[dict[str, list[int]]]()
_COLLECTED = pytest.StashKey[Counter[str]]()
_HASHES = pytest.StashKey[dict[str, str]]()
_PLACE = {"passed": 0, "failed": 1, "skipped": 2}
_PACKAGES = ("torch", "triton", "numpy", "pytest")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("evidence")
    group.addoption("--record-evidence", metavar="FILE", help="write what the run showed to FILE")
    group.addoption("--evidence-commit", metavar="ID", help="the commit of a tree without git")
    group.addoption("--list-tests", metavar="FILE", help="write the node ids of all collected tests to FILE")


def pytest_configure(config: pytest.Config) -> None:
    """Begin to count; what the tests run on is what the files hold now."""
    config.stash[_COUNTS] = {}
    config.stash[_COLLECTED] = Counter()
    config.stash[_HASHES] = _hashes(config.rootpath) if config.getoption("--record-evidence") else {}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """List the tests, before any is left out."""
    config.stash[_COLLECTED].update(function(item.nodeid) for item in items)
    path = config.getoption("--list-tests")
    if path:
        Path(path).write_text(json.dumps(sorted({function(item.nodeid) for item in items})), encoding="utf-8")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Count how each test ended."""
    report = yield
    counts = item.config.stash[_COUNTS].setdefault(function(item.nodeid), [0, 0, 0])
    if report.when == "call" or report.outcome != "passed":  # set-up and teardown count where they go wrong
        excused = hasattr(report, "wasxfail")
        counts[_PLACE["skipped" if excused else report.outcome]] += 1
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the record."""
    path = session.config.getoption("--record-evidence")
    if path and not session.config.getoption("collectonly"):
        write(_record(session.config), Path(path))


def function(node_id: str) -> str:
    """A node id without its parameters."""
    return node_id.split("[", 1)[0]


def _record(config: pytest.Config) -> Record:
    root = config.rootpath
    loaded = [load(path)[0].contract for path in files([root / "contracts"])]
    before, now = config.stash[_HASHES], _hashes(root)
    counts, collected = config.stash[_COUNTS], config.stash[_COLLECTED]
    device, machine = _device()
    return Record(
        device=device,
        machine=machine,
        versions={"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in _PACKAGES}},
        commit=config.getoption("--evidence-commit") or _commit(root),
        date=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        numerics=next((c.metadata.version for c in loaded if c and c.metadata.id == "numerics-v1"), "unknown"),
        # A file that changed while the tests ran was not what they ran on.
        files={name: found if before.get(name) == found else "" for name, found in sorted(now.items())},
        tests={
            name: (ok, bad, left, max(collected[name] - ok - bad - left, 0))
            for name, (ok, bad, left) in sorted(counts.items())
            if ok + bad + left
        },
    )


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
