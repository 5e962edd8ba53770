"""What changed between two versions of a contract, which version bump that needs, and whether the file made it.

What is promised is compared, not the text: comments, layout and trailing spaces are no change. By these rules:

    major  a promise was changed or removed: a formula, domain, invariant, condition, kind; an obligation or one of its
           fields (its property where no formal predicate stands); a falsifier, a check of the gate or a device removed
    minor  something was added, or what shows it changed: an equation, obligation, falsifier, dependency, device; a
           prediction, the cited tests, `falsified_by`, the covered files, what a stage expects, what it depends on
    patch  prose: descriptions, references, `rule`, `if_fails`, stages, names
    none   the version, its amendments and the typed status: they are about the change, not of it"""

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from exactmoe.contracts.document import Document, parse
from exactmoe.contracts.findings import Finding, Where, shown
from exactmoe.contracts.schema import Contract, shape
from exactmoe.contracts.versions import BUMPS, Bump, bump, version

Verb = Literal["added", "removed", "changed"]


@dataclass(frozen=True)
class Change:
    """One difference: its name with ids for indices, where it stands (in the new file unless removed), its bump."""

    verb: Verb
    name: str
    needs: Bump
    where: Where

    def __str__(self) -> str:
        return f"{self.verb} {self.name} ({self.needs})"


@dataclass(frozen=True)
class Difference:
    """Everything between two versions of one contract."""

    file: str
    old_version: str | None  # None: there was no such contract
    new_version: str | None  # None: there is none any more
    changes: list[Change]
    findings: list[Finding]

    @property
    def needed(self) -> Bump:
        """The bump that the changes need together."""
        return max((change.needs for change in self.changes), key=BUMPS.index, default="none")

    def lines(self) -> list[str]:
        """The changes, the errors and the verdict."""
        if self.old_version is None or self.new_version is None:
            verb = "added" if self.old_version is None else "removed"
            return [f"{self.file}: {verb}, {self.old_version or self.new_version}", *map(str, self.findings)]
        return [
            *(f"{self.file}: {change}" for change in self.changes),
            *map(str, self.findings),
            f"{self.file}: {self.old_version} -> {self.new_version}, needs {self.needed}",
        ]

    def as_json(self) -> dict[str, Any]:
        """The difference as JSON holds it."""
        return {
            "file": self.file,
            "old_version": self.old_version,
            "new_version": self.new_version,
            "needed": self.needed,
            "changes": [{"verb": c.verb, "name": c.name, "needs": c.needs} for c in self.changes],
            "findings": [finding.as_json() for finding in self.findings],
        }


class Unreadable(ValueError):
    """A contract that cannot be compared, since it cannot be read; the message holds the first finding."""


class NoRevision(ValueError):
    """There is no git checkout here, or it does not hold the revision; the message says which."""


def compare(old: Document, new: Document) -> Difference:
    """Compare two versions of one contract. Raises `Unreadable` where one of them is no contract."""
    before, after = _contract(old), _contract(new)
    changes = list(_changes(before, after))
    file = shown(new.path)
    findings = list(_bump_findings(before, after, new, changes))
    return Difference(file, before.metadata.version, after.metadata.version, changes, findings)


def since(paths: Sequence[Path], revision: str) -> list[Difference]:
    """Compare the contracts `paths` (files, or folders of *.yaml) with what they were in a git revision.

    Raises `NoRevision` where git cannot say."""
    differences = []
    for path in paths:
        folder = path if path.is_dir() else path.parent
        _git(folder, "rev-parse", "--quiet", "--verify", f"{revision}^{{commit}}")
        listed = _git(folder, "ls-tree", "--name-only", revision, "./").splitlines() if path.is_dir() else [path.name]
        now = {file.name for file in folder.glob("*.yaml")} if path.is_dir() else {path.name}
        for name in sorted(now | {name for name in listed if name.endswith(".yaml")}):
            difference = _since(folder / name, revision)
            if difference is not None:
                differences.append(difference)
    return differences


def _since(path: Path, revision: str) -> Difference | None:
    there = _git(path.parent, "ls-tree", "--name-only", revision, f"./{path.name}")
    old = parse(_git(path.parent, "show", f"{revision}:./{path.name}"), path) if there else None
    if not path.exists():
        return None if old is None else Difference(shown(path), _contract(old).metadata.version, None, [], [])
    new = parse(path.read_text(encoding="utf-8"), path)
    if old is None:
        return Difference(shown(path), None, _contract(new).metadata.version, [], [])
    return compare(old, new)


def _git(folder: Path, *args: str) -> str:
    try:
        done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise NoRevision("git is not installed, so there is no earlier version to compare with") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["no such revision in this clone"]
        raise NoRevision(f"git {' '.join(args)} in {folder}: {said[0]}")
    return done.stdout


def _contract(document: Document) -> Contract:
    if document.findings:
        raise Unreadable(str(document.findings[0]))
    contract, findings = shape(document, "house")
    if contract is None or findings:
        raise Unreadable(str(findings[0]))
    return contract


def _bump_findings(before: Contract, after: Contract, new: Document, changes: list[Change]) -> Iterator[Finding]:
    at: Where = ("metadata", "version")
    was, now = version(before.metadata.version), version(after.metadata.version)
    if was is None or now is None:
        bad = before.metadata.version if was is None else after.metadata.version
        yield new.finding("BUMP-001", at, f"metadata.version: {bad!r} is not MAJOR.MINOR.PATCH")
        return
    own = bump(was, now)
    if own is None:
        yield new.finding("BUMP-001", at, f"metadata.version: {now} lies below {was}")
        return
    for change in changes:
        if BUMPS.index(change.needs) > BUMPS.index(own):
            yield new.finding(
                "BUMP-002",
                change.where,
                f"{change.name}: {change.verb}, which needs a {change.needs} bump; "
                f"metadata.version went {was} -> {now}, {own}",
                at_key=True,
            )
    history = {amendment.version: amendment for amendment in after.metadata.amendment_history}
    where: Where = ("metadata", "amendment_history")
    if own != "none" and str(now) not in history:
        yield new.finding("BUMP-003", where, f"metadata.amendment_history: no entry for the new version {now}")
    for amendment in before.metadata.amendment_history:
        if history.get(amendment.version) != amendment:
            verb = "changed" if amendment.version in history else "removed"
            message = f"metadata.amendment_history: the entry of {amendment.version} was {verb}; entries are only added"
            yield new.finding("BUMP-004", where, message)


# Which bump a changed or removed field needs; what is not named here is prose. Added fields need a minor bump.
_EQUATION: dict[str, Bump] = dict.fromkeys(
    ("formula", "domain", "codomain", "invariants", "preconditions", "postconditions"), "major"
)
_OBLIGATION: dict[str, Bump] = {
    **dict.fromkeys(
        ("type", "formal", "tolerance", "applies_to", "requires", "applies_to_phase", "parent_contract"), "major"
    ),
    "falsified_by": "minor",
    "id": "minor",
}
_FALSIFIER: dict[str, Bump] = {"prediction": "minor", "test": "minor", "devices": "minor"}
_STAGE: dict[str, Bump] = {"expected_acceptance": "minor"}
_GATE: dict[str, Bump] = {"checks": "major"}
_METADATA: dict[str, Bump] = {"kind": "major", "registry": "major", "id": "major", "covers": "minor"}
_ABOUT_THE_CHANGE = ("version", "amendment_history", "status")
_FOREIGN = (
    "kernel_structure",
    "simd_dispatch",
    "enforcement",
    "verification_summary",
    "type_invariants",
    "coq_spec",
    "kani_harnesses",
)


def _changes(old: Contract, new: Contract) -> Iterator[Change]:
    yield from _metadata(old, new)
    places: dict[str, Any] = {name: name for name in new.equations}
    yield from _entries("equations", old.equations, new.equations, places, _EQUATION, ("minor", "major"))
    sections: list[tuple[str, dict[str, Bump], tuple[Bump, Bump]]] = [
        ("proof_obligations", _OBLIGATION, ("minor", "major")),
        ("falsification_tests", _FALSIFIER, ("minor", "major")),
        ("implementation_stages", _STAGE, ("patch", "patch")),
    ]
    for section, fields, bumps in sections:
        before, after = (_named(getattr(c, section)) for c in (old, new))
        places = {name: position for position, name in enumerate(after)}
        yield from _entries(section, before, after, places, fields, bumps)
    gates: list[dict[str, Any]] = [{"": c.qa_gate} if c.qa_gate else {} for c in (old, new)]
    yield from _entries("qa_gate", gates[0], gates[1], {"": None}, _GATE, ("minor", "major"))
    for section in _FOREIGN:
        if getattr(old, section) != getattr(new, section):
            yield Change("changed", section, "patch", (section,))


def _named(entries: Sequence[Any]) -> dict[str, Any]:
    """Entries by their id; by their property where they have none; the second of a name by its number too."""
    named: dict[str, Any] = {}
    for entry in entries:
        name = entry.id or getattr(entry, "property", "")
        named[f"{name} {len(named)}" if name in named else name] = entry
    return named


def _entries(
    section: str,
    old: dict[str, Any],
    new: dict[str, Any],
    places: dict[str, Any],
    fields: dict[str, Bump],
    bumps: tuple[Bump, Bump],
) -> Iterator[Change]:
    """Entries of a section that were added, removed or changed; `bumps` are those of adding and of removing one."""
    for name in old.keys() - new.keys():
        yield Change("removed", f"{section}[{name}]" if name else section, bumps[1], (section,))
    for name, entry in new.items():
        here: Where = (section,) if places[name] is None else (section, places[name])
        label = f"{section}.{name}" if section == "equations" else f"{section}[{name}]" if name else section
        if name not in old:
            yield Change("added", label, bumps[0], here)
            continue
        yield from _fields(label, here, old[name], entry, fields)


def _fields(label: str, here: Where, old: Any, new: Any, fields: dict[str, Bump]) -> Iterator[Change]:
    for field in type(new).model_fields:
        before, after = _plain(getattr(old, field)), _plain(getattr(new, field))
        if before == after:
            continue
        needs: Bump = fields.get(field, "patch")
        if field == "property" and (new.formal is None or new.formal != old.formal):
            needs = "major"  # without a formal predicate the sentence is the promise
        name, where = f"{label}.{field}", (*here, field)
        if before in (None, [], ""):
            yield Change("added", name, "minor" if needs == "major" else needs, where)
        elif isinstance(before, list) and isinstance(after, list):
            yield from _lists(name, where, before, after, needs)
        else:
            yield Change("removed" if after in (None, "") else "changed", name, needs, where)


def _lists(name: str, where: Where, old: list[Any], new: list[Any], needs: Bump) -> Iterator[Change]:
    """A list whose order says nothing: adding to it needs less than removing from it."""
    for item in old:
        if item not in new:
            yield Change("removed", f"{name}: {item}", needs, where)
    for position, item in enumerate(new):
        if item not in old:
            yield Change("added", f"{name}: {item}", "minor" if needs == "major" else needs, (*where, position))


def _metadata(old: Contract, new: Contract) -> Iterator[Change]:
    for field in type(new.metadata).model_fields:
        if field in _ABOUT_THE_CHANGE:
            continue
        before, after = (_plain(getattr(c.metadata, field)) for c in (old, new))
        name, where = f"metadata.{field}", ("metadata", field)
        if field == "devices":  # asking less of the evidence is a weaker promise
            yield from _lists(name, where, before, after, "major")
        elif field == "depends_on":
            yield from _lists(name, where, before, after, "minor")
        elif before != after:
            yield Change("changed", name, _METADATA.get(field, "patch"), where)


def _plain(value: Any) -> Any:
    """A value without what is no change: spaces at the ends of lines and around a text."""
    if isinstance(value, str):
        return "\n".join(line.rstrip() for line in value.strip().splitlines())
    return [_plain(item) for item in value] if isinstance(value, list) else value
