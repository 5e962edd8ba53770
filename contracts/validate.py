"""Validate contracts: read them strictly, check their shape, then the rules; count what is bound to a test."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from exactmoe.contracts import binding, rules
from exactmoe.contracts.document import Document, read
from exactmoe.contracts.findings import Finding, shown
from exactmoe.contracts.schema import Contract, Dialect, shape


class Loaded(NamedTuple):
    """One file: what it holds, and what is wrong with it."""

    document: Document
    contract: Contract | None  # None where it cannot be read as one
    dialect: Dialect


@dataclass
class Report:
    """What was validated."""

    loaded: list[Loaded] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    obligations: int = 0
    obligations_bound: int = 0
    falsifiers: int = 0
    falsifiers_bound: int = 0

    @property
    def errors(self) -> int:
        """How many findings are errors."""
        return sum(finding.severity == "error" for finding in self.findings)

    @property
    def warnings(self) -> int:
        """How many findings are warnings."""
        return len(self.findings) - self.errors

    def lines(self) -> list[str]:
        """The findings, then the counts with their denominators."""
        foreign = sum(loaded.dialect == "pv" for loaded in self.loaded)
        which = f", {foreign} of them in the form of provable-contracts" if foreign else ""
        return [
            *map(str, self.findings),
            f"{self.errors} error(s), {self.warnings} warning(s) in {len(self.loaded)} contract(s){which}",
            f"obligations bound {self.obligations_bound}/{self.obligations}, "
            f"falsifiers bound {self.falsifiers_bound}/{self.falsifiers}",
        ]

    def as_json(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return {
            "errors": self.errors,
            "warnings": self.warnings,
            "contracts": [{"file": shown(loaded.document.path), "dialect": loaded.dialect} for loaded in self.loaded],
            "obligations": {"bound": self.obligations_bound, "total": self.obligations},
            "falsifiers": {"bound": self.falsifiers_bound, "total": self.falsifiers},
            "findings": [finding.as_json() for finding in self.findings],
        }


def files(paths: Sequence[Path]) -> list[Path]:
    """The contracts that `paths` name: a file is itself, a folder every *.yaml in it. Raises OSError."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(path.glob("*.yaml"))
        else:
            path.stat()
            found.append(path)
    return list(dict.fromkeys(found))


def load(path: Path, dialect: Dialect | Literal["auto"] = "auto") -> tuple[Loaded, list[Finding]]:
    """One contract, and what reading it and its shape showed."""
    document = read(path)
    chosen = _dialect(document) if dialect == "auto" else dialect
    if document.findings and not isinstance(document.data, dict):
        return Loaded(document, None, chosen), list(document.findings)
    contract, findings = shape(document, chosen)
    return Loaded(document, contract, chosen), [*document.findings, *findings]


def root_of(path: Path) -> Path:
    """The folder that the citations of a contract start from: the nearest one above it that holds tests/."""
    folders = path.resolve().parents
    return next((folder for folder in folders if (folder / "tests").is_dir()), folders[0])


def validate(paths: Sequence[Path], *, root: Path | None = None, dialect: Dialect | Literal["auto"] = "auto") -> Report:
    """Validate the contracts that `paths` name. Tests are looked for below `root`, by default `root_of` each file."""
    report = Report()
    chosen = files(paths)
    graph = _neighbours(chosen)
    for path in chosen:
        loaded, findings = load(path, dialect)
        here = root or root_of(path)
        if loaded.contract is not None:
            context = rules.Context(loaded.document, loaded.dialect, here, graph)
            findings += rules.check(loaded.contract, context)
            _count(report, loaded.contract, here)
        report.loaded.append(loaded)
        report.findings += sorted(findings)
    return report


def _count(report: Report, contract: Contract, root: Path) -> None:
    report.obligations += len(contract.proof_obligations)
    report.obligations_bound += sum(rules.obligation_bound(contract, o, root) for o in contract.proof_obligations)
    report.falsifiers += len(contract.falsification_tests)
    report.falsifiers_bound += sum(rules.bound(f, root) for f in contract.falsification_tests)


def _dialect(document: Document) -> Dialect:
    """`pv` for a contract that neither has its file's name as its id nor cites a pytest node."""
    if not isinstance(document.data, dict):
        return "house"
    metadata, tests = document.data.get("metadata"), document.data.get("falsification_tests")
    if isinstance(metadata, dict) and metadata.get("id") == document.stem:
        return "house"
    cited = [entry.get("test") for entry in tests if isinstance(entry, dict)] if isinstance(tests, list) else []
    flat = [text for test in cited for text in (test if isinstance(test, list) else [test])]
    return "house" if any(isinstance(text, str) and binding.is_node_id(text) for text in flat) else "pv"


def _neighbours(chosen: Sequence[Path]) -> dict[str, list[str]]:
    """What every contract given, and every other in their folders, depends on."""
    return dependencies([*chosen, *(other for path in chosen for other in sorted(path.parent.glob("*.yaml")))])


def dependencies(paths: Sequence[Path]) -> dict[str, list[str]]:
    """The names of the contracts `paths`, each with what it depends on; nothing where the file does not say."""
    graph: dict[str, list[str]] = {}
    for path in dict.fromkeys(path.resolve() for path in paths):
        data = read(path).data
        metadata = data.get("metadata") if isinstance(data, dict) else None
        depends = metadata.get("depends_on") if isinstance(metadata, dict) else None
        names = depends if isinstance(depends, list) else []
        graph.setdefault(path.stem, [name for name in names if isinstance(name, str)])
    return graph
