"""What has been shown of each contract: computed from recorded test runs, never typed.

    DRAFT                     an obligation or falsifier is not bound to a test that is collected
    PROPOSED                  all are bound; one that the cpu must show has not passed on what the files hold now
    ACTIVE_ALGORITHM_LEVEL    all falsifiers that the cpu must show passed; one that a gpu must show has not
    ACTIVE_RUNTIME            all passed on every device they need, some on a gpu before a covered file changed
    DISCHARGED                all passed on every device they need, on what the files hold now

A test that was skipped, left out or failed has not passed. The falsifiers' own `devices`, else the contract's, say
where one must pass; its tests may have run in several runs of the same files. The files are those that the contract
covers and the files of the tests that it cites."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exactmoe.contracts.document import Document
from exactmoe.contracts.findings import Finding
from exactmoe.contracts.record import FOLDER, Record, Unusable
from exactmoe.contracts.rules import covered
from exactmoe.contracts.schema import STATUSES, Contract, Falsifier
from exactmoe.contracts.validate import files, load, root_of

_WORST_FIRST = ("unbound", "failed", "skipped", "bound", "stale", "passed")


@dataclass(frozen=True)
class Shown:
    """What is known of one falsifier on one device."""

    device: str
    state: str  # unbound, bound (it has not run), failed, skipped, stale (passed, then a file changed), passed
    record: Record | None  # that says so
    changed: tuple[str, ...] = ()  # files since then

    def __str__(self) -> str:
        text = f"{self.state} on {self.device}"
        if self.record is not None:
            text += f" ({self.record.machine}, {self.record.commit[:12]}, {self.record.date})"
        if self.changed:
            more = f" and {len(self.changed) - 3} more" if len(self.changed) > 3 else ""
            text += f"; changed since: {', '.join(self.changed[:3])}{more}"
        return text


@dataclass(frozen=True)
class ContractStatus:
    """What is known of one contract."""

    contract: Contract
    falsifiers: dict[str, tuple[Shown, ...]]  # by id, one for every device it needs
    findings: tuple[Finding, ...]

    @property
    def status(self) -> str:
        """The status, by the rules above."""
        everything = [shown for needed in self.falsifiers.values() for shown in needed]
        obligations = [self.obligation(i) for i in range(len(self.contract.proof_obligations))]
        if not everything or "unbound" in obligations or any(s.state == "unbound" for s in everything):
            return "DRAFT"
        if any(s.state != "passed" for s in everything if s.device == "cpu"):
            return "PROPOSED"
        if any(s.state not in ("passed", "stale") for s in everything):
            return "ACTIVE_ALGORITHM_LEVEL" if any(s.device == "cpu" for s in everything) else "PROPOSED"
        return "DISCHARGED" if all(s.state == "passed" for s in everything) else "ACTIVE_RUNTIME"

    def obligation(self, index: int) -> str:
        """The state of an obligation: that of the worst falsifier it names."""
        named = self.contract.proof_obligations[index].falsified_by
        states = [shown.state for name in named for shown in self.falsifiers.get(name, ())]
        missing = not named or any(name not in self.falsifiers for name in named)
        return "unbound" if missing or not states else min(states, key=_WORST_FIRST.index)

    def passed(self, device: str) -> tuple[int, int]:
        """Falsifiers passed on a device on what the files hold now, of those that need it."""
        states = [s.state for needed in self.falsifiers.values() for s in needed if s.device == device]
        return states.count("passed"), len(states)

    def as_json(self) -> dict[str, Any]:
        """As JSON has it."""
        meta = self.contract.metadata
        return {
            "id": meta.id,
            "version": meta.version,
            "status": self.status,
            "obligations": [
                {"property": o.property, "id": o.id, "state": self.obligation(i)}
                for i, o in enumerate(self.contract.proof_obligations)
            ],
            "falsifiers": [
                {"id": name, "device": s.device, "state": s.state, "changed": list(s.changed), **_origin(s.record)}
                for name, needed in self.falsifiers.items()
                for s in needed
            ],
            "findings": [finding.as_json() for finding in self.findings],
        }


def _origin(record: Record | None) -> dict[str, str | None]:
    if record is None:
        return {"machine": None, "commit": None, "date": None}
    return {"machine": record.machine, "commit": record.commit, "date": record.date}


def statuses(paths: Sequence[Path], evidence: Sequence[Path] = ()) -> list[ContractStatus]:
    """The status of every contract in `paths`, from the records that ship and those in `evidence`.

    Raises Unusable for a record that cannot be believed, OSError for a path that is not there."""
    found = [load(path)[0] for path in files(paths)]
    contracts = [(one.document, one.contract) for one in found if one.contract is not None and one.contract.provable]
    if not contracts:
        return []
    root = root_of(contracts[0][0].path)
    records = [Record.load(path) for path in (*sorted((root / FOLDER).glob("*.json")), *evidence)]
    collected = _collected(
        {t.split("::")[0] for _, c in contracts for f in c.falsification_tests for t in f.test}, root
    )
    return [_status(document, contract, records, collected, root) for document, contract in contracts]


def concerned(contract: Contract, root: Path) -> list[str]:
    """The files whose change makes a contract's evidence stale, relative to `root`."""
    names = {
        path.relative_to(root).as_posix() for pattern in contract.metadata.covers for path in covered(root, pattern)
    }
    names |= {test.split("::")[0] for falsifier in contract.falsification_tests for test in falsifier.test}
    return sorted(names)


def _status(
    document: Document, contract: Contract, records: Sequence[Record], collected: set[str], root: Path
) -> ContractStatus:
    names = concerned(contract, root)
    shown = {
        falsifier.id: tuple(
            _shown(falsifier, device, records, collected, names, root) for device in contract.devices(falsifier)
        )
        for falsifier in contract.falsification_tests
    }
    status = ContractStatus(contract, shown, ())
    return ContractStatus(contract, shown, tuple(_findings(document, status)))


def _shown(
    falsifier: Falsifier, device: str, records: Sequence[Record], collected: set[str], names: list[str], root: Path
) -> Shown:
    if not falsifier.test or any(test not in collected for test in falsifier.test):
        return Shown(device, "unbound", None)
    best = Shown(device, "bound", None)
    for record in sorted((r for r in records if r.device == device), key=lambda r: r.date):
        outcomes = {record.outcome(test) for test in falsifier.test}
        if None in outcomes and outcomes & {"failed"} == set():
            continue  # it says nothing of the whole falsifier
        state = _worst(outcomes)
        changed = tuple(record.changed(names, root))
        if state == "passed" and changed:
            state = "stale"
        if changed and (state != "stale" or best.state == "passed"):
            continue  # of other code: it has not failed, and a pass of what the files hold now says more
        best = Shown(device, state, record, changed)
    if best.state in ("bound", "stale"):  # one record may hold the tests that another of the same files left out
        now = sorted((r for r in records if r.device == device and not r.changed(names, root)), key=lambda r: r.date)
        latest = {test: outcome for r in now for test in falsifier.test if (outcome := r.outcome(test)) is not None}
        if len(latest) == len(set(falsifier.test)):
            best = Shown(device, _worst(latest.values()), now[-1])
    return best


def _worst(outcomes: Collection[str | None]) -> str:
    return next(outcome for outcome in ("failed", "skipped", "passed") if outcome in outcomes)


def _findings(document: Document, status: ContractStatus) -> list[Finding]:
    """What is an error: a typed status that the evidence does not carry, a cited test that is not there or failed."""
    found = []
    for position, falsifier in enumerate(status.contract.falsification_tests):
        where = ("falsification_tests", position, "test")
        for shown in status.falsifiers[falsifier.id]:
            if shown.state == "unbound":
                message = f"falsification_tests[{position}].test: {falsifier.id}: pytest collects no such test"
                found.append(document.finding("STATUS-002", where, message))
                break
            if shown.state in ("failed", "skipped"):
                message = f"falsification_tests[{position}].test: {falsifier.id}: {shown}"
                found.append(document.finding("STATUS-003", where, message))
    typed = status.contract.metadata.status
    if typed in STATUSES and STATUSES.index(typed) > STATUSES.index(status.status):
        message = f"metadata.status: {typed} is typed, the evidence carries {status.status}"
        found.append(document.finding("STATUS-001", ("metadata", "status"), message))
    return found


def _collected(paths: set[str], root: Path) -> set[str]:
    """Node ids, without parameters, of the tests that pytest collects from `paths`, on whichever machine they run."""
    there = sorted(path for path in paths if (root / path).is_file())
    if not there:
        return set()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tests.json"
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "exactmoe.contracts.recorder",
                   "-p", "no:cacheprovider", "--list-tests", str(out), *there]  # fmt: skip
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
        if not out.exists():
            raise Unusable(f"pytest could not collect the cited tests: {(done.stdout + done.stderr).strip()[-800:]}")
        return set(json.loads(out.read_text(encoding="utf-8")))


def markdown(found: Sequence[ContractStatus]) -> str:
    """The table of the README."""
    lines = [
        "| contract | version | status | obligations shown | falsifiers passed, cpu | gpu |",
        "|---|---|---|--:|--:|--:|",
    ]
    for one in found:
        meta, total = one.contract.metadata, len(one.contract.proof_obligations)
        shown = sum(one.obligation(i) == "passed" for i in range(total))
        cells = ["of".join(f" {n} " for n in one.passed(d)).strip() if one.passed(d)[1] else "" for d in ("cpu", "gpu")]
        lines.append(f"| `{meta.id}` | {meta.version} | {one.status} | {shown} of {total} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def table(found: Sequence[ContractStatus]) -> list[str]:
    """The statuses as lines of text, with what is missing of each."""
    lines = []
    for one in found:
        meta = one.contract.metadata
        lines.append(f"{meta.id:32} {meta.version:8} {one.status}")
        for name, needed in one.falsifiers.items():
            lines += [f"    {name:28} {shown}" for shown in needed if shown.state != "passed"]
    findings = [finding for one in found for finding in one.findings]
    lines += [str(finding) for finding in findings]
    total = [(s.state == "passed") for one in found for needed in one.falsifiers.values() for s in needed]
    lines.append(
        f"{len(findings)} error(s) in {len(found)} contract(s); {sum(total)} of {len(total)} falsifiers passed"
    )
    return lines
