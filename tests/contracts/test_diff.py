"""exactmoe contracts diff: which bump each change needs, and what a file that bumped too little is told."""

import json
import subprocess
from pathlib import Path

import pytest

from exactmoe.cli.main import main
from exactmoe.contracts.diff import compare
from exactmoe.contracts.document import parse

PATH = Path("good-v1.yaml")

# What is replaced by what in the good contract, the change that is named, the bump that it needs, and its line.
CHANGES: list[tuple[str, str, str, str, int]] = [
    ("y = 2x", "y = 3x", "changed equations.double.formula", "major", 25),
    ("    domain: every integer\n", "", "removed equations.double.domain", "major", 24),
    ("every integer", "some integers", "changed equations.double.domain", "major", 26),
    ("      - y is even\n", "      - y is odd\n", "removed equations.double.invariants: y is even", "major", 27),
    (
        "      - y is even\n",
        "      - y is even\n      - y > x\n",
        "added equations.double.invariants: y > x",
        "minor",
        29,
    ),
    (
        "    domain: every integer\n",
        "    domain: every integer\n    codomain: even\n",
        "added equations.double.codomain",
        "minor",
        27,
    ),
    ("proof_obligations:", "  triple:\n    formula: y = 3x\nproof_obligations:", "added equations.triple", "minor", 29),
    ("  double:\n", "  doubled:\n", "removed equations[double]", "major", 23),
    ("type: invariant", "type: bound", "changed proof_obligations[OBL-1].type", "major", 31),
    ("formal: y % 2 = 0", "formal: y % 4 = 0", "changed proof_obligations[OBL-1].formal", "major", 33),
    ("tolerance: 1e-5", "tolerance: 1e-4", "changed proof_obligations[OBL-1].tolerance", "major", 34),
    ("    tolerance: 1e-5\n", "", "removed proof_obligations[OBL-1].tolerance", "major", 30),
    ("applies_to: double", "applies_to: all", "changed proof_obligations[OBL-1].applies_to", "major", 35),
    ("the result is even", "it is even", "changed proof_obligations[OBL-1].property", "patch", 32),
    ("    formal: y % 2 = 0\n", "", "removed proof_obligations[OBL-1].formal", "major", 30),
    (
        "[F-1, F-2]\n    parent",
        "[F-2]\n    parent",
        "removed proof_obligations[base holds].falsified_by: F-1",
        "minor",
        41,
    ),
    ("- id: OBL-1", "- id: OBL-2", "removed proof_obligations[OBL-1]", "major", 29),
    ("2 * 2 = 4", "2 * 2 > 3", "changed falsification_tests[F-1].prediction", "minor", 46),
    ("::test_two_doubles_to_four\n", "::test_other\n", "removed falsification_tests[F-1].test", "minor", 47),
    ("rule: doubles\n", "rule: it doubles\n", "changed falsification_tests[F-1].rule", "patch", 45),
    (
        "if_fails: doubling is wrong\n  -",
        "if_fails: wrong\n  -",
        "changed falsification_tests[F-1].if_fails",
        "patch",
        48,
    ),
    ("- id: F-2", "- id: F-3", "removed falsification_tests[F-2]", "major", 43),
    ("    devices: [cpu]\n", "", "removed falsification_tests[F-2].devices", "minor", 49),
    ("description: Do it.", "description: Do it well.", "changed implementation_stages[M-1].description", "patch", 58),
    ("[F-1, OBL-1]", "[F-1]", "removed implementation_stages[M-1].expected_acceptance: OBL-1", "minor", 59),
    ("- nobody has time", "- no GPU", "removed implementation_stages[M-1].blockers: nobody has time", "patch", 61),
    ("checks: [F-1, F-2]", "checks: [F-1]", "removed qa_gate.checks: F-2", "major", 70),
    ("pass_criteria: all pass", "pass_criteria: all", "changed qa_gate.pass_criteria", "patch", 71),
    ("bound: 8", "bound: 9", "changed kani_harnesses", "patch", 63),
    ("kind: kernel", "kind: model", "changed metadata.kind", "major", 6),
    ("description: Doubling.", "description: Doubling!", "changed metadata.description", "patch", 8),
    ("author: exactmoe", "author: other", "changed metadata.author", "patch", 5),
    ("- arithmetic", "- algebra", "changed metadata.references", "patch", 9),
    ("depends_on: [base-v1]", "depends_on: []", "removed metadata.depends_on: base-v1", "minor", 11),
    ("- kernels/double.py", "- kernels/*.py", "changed metadata.covers", "minor", 19),
    ("devices: [cpu, gpu]", "devices: [cpu]", "removed metadata.devices: gpu", "major", 21),
]


@pytest.mark.parametrize(
    ("old", "new", "said", "needs", "line"), CHANGES, ids=[f"{said}-{needs}" for _, _, said, needs, _ in CHANGES]
)
def test_a_change_is_named_with_the_bump_it_needs_and_without_the_bump_it_is_an_error(
    good: str, old: str, new: str, said: str, needs: str, line: int
) -> None:
    assert old in good
    difference = compare(parse(good, PATH), parse(good.replace(old, new, 1), PATH))
    change = next(change for change in difference.changes if str(change).startswith(said))
    assert change.needs == needs
    verb, name = said.split(" ", 1)
    errors = [str(finding) for finding in difference.findings]
    assert any(error.startswith(f"{PATH}:{line}:") and f"BUMP-002 {name}" in error for error in errors), errors
    assert any(f"{verb}, which needs a {needs} bump; metadata.version went 1.1.0 -> 1.1.0, none" in e for e in errors)


NO_CHANGES = {
    "comments": ("kind: kernel", "kind: kernel  # really"),
    "quotes": ("y = 2x", "'y = 2x'"),
    "spaces at an end": ("description: Doubling.", 'description: "Doubling.  "'),
    "flow for block": ("references:\n    - arithmetic", "references: [arithmetic]"),
    "the typed status": ("status: DRAFT", "status: PROPOSED"),
    "a list of one test": (
        "test: tests/test_double.py::test_two_doubles_to_four",
        "test: [tests/test_double.py::test_two_doubles_to_four]",
    ),
}


@pytest.mark.parametrize(("old", "new"), NO_CHANGES.values(), ids=NO_CHANGES)
def test_what_promises_nothing_else_is_no_change(good: str, old: str, new: str) -> None:
    assert old in good
    difference = compare(parse(good, PATH), parse(good.replace(old, new, 1), PATH))
    assert (difference.changes, difference.findings, difference.needed) == ([], [], "none")


def bumped(good: str, version: str) -> str:
    entry = f"    - version: {version}\n      date: 2026-01-03\n      description: More.\n"
    return good.replace("version: 1.1.0\n  created", f"version: {version}\n  created").replace(
        "  covers:", entry + "  covers:"
    )


@pytest.mark.parametrize(
    ("version", "enough"),
    [("1.1.1", ()), ("1.2.0", ("minor",)), ("2.0.0", ("minor", "major")), ("3.4.5", ("minor", "major"))],
)
@pytest.mark.parametrize(
    ("old", "new", "needs"),
    [("proof_obligations:", "  t:\n    formula: y\nproof_obligations:", "minor"), ("y = 2x", "y = 3x", "major")],
)
def test_a_bump_is_enough_from_what_the_change_needs_on(
    good: str, version: str, enough: tuple[str, ...], old: str, new: str, needs: str
) -> None:
    difference = compare(parse(good, PATH), parse(bumped(good, version).replace(old, new), PATH))
    assert difference.needed == needs
    assert (difference.findings == []) is (needs in enough)


def test_a_new_version_without_its_entry_is_an_error(good: str) -> None:
    new = good.replace("version: 1.1.0\n  created", "version: 1.1.1\n  created")
    (finding,) = compare(parse(good, PATH), parse(new, PATH)).findings
    assert str(finding) == (
        "good-v1.yaml:13:5: BUMP-003 metadata.amendment_history: no entry for the new version 1.1.1"
    )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("description: The first.", "description: Always so.", "the entry of 1.0.0 was changed"),
        ("    - version: 1.0.0\n      date: 2026-01-01\n      description: The first.\n", "", "of 1.0.0 was removed"),
    ],
)
def test_the_history_is_only_added_to(good: str, old: str, new: str, said: str) -> None:
    (finding,) = compare(parse(good, PATH), parse(good.replace(old, new), PATH)).findings
    assert finding.code == "BUMP-004"
    assert said in finding.message


@pytest.mark.parametrize(("version", "said"), [("1.0.9", "1.0.9 lies below 1.1.0"), ("1.2", "is not MAJOR")])
def test_a_version_below_or_without_form_is_an_error(good: str, version: str, said: str) -> None:
    new = good.replace("version: 1.1.0\n  created", f"version: '{version}'\n  created")
    findings = compare(parse(good, PATH), parse(new, PATH)).findings
    assert [finding.code for finding in findings] == ["BUMP-001"]
    assert said in findings[0].message


def diff(*args: object) -> int:
    return main(["contracts", "diff", *map(str, args)])


def test_two_files_are_compared_and_the_verdict_is_printed(
    project: Path, good: str, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = project / "contracts" / "good-v1.yaml", project / "new.yaml"
    new.write_text(bumped(good, "1.2.0").replace("Doubling.", "Twice."))
    assert diff(old, new) == 0
    assert capsys.readouterr().out == (
        f"{new}: changed metadata.description (patch)\n{new}: 1.1.0 -> 1.2.0, needs patch\n"
        "0 error(s) in 1 contract(s) compared\n"
    )
    new.write_text(good.replace("y = 2x", "y = 3x"))
    assert diff("--json", old, new) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["needed"], found["findings"][0]["line"]) == ("major", 25)


def test_what_cannot_be_compared_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = project / "contracts" / "good-v1.yaml"
    (project / "bad.yaml").write_text("- a list\n")
    for args, said in (
        ((good,), "OLD and NEW are compared"),
        ((good, project / "bad.yaml"), "YAML-004"),
        ((good, project / "absent.yaml"), "absent.yaml"),
        (("--rev", "HEAD", project / "contracts"), "not a git repository"),
    ):
        assert diff(*args) == 2
        assert said in capsys.readouterr().err


@pytest.fixture
def repository(project: Path) -> Path:
    git(project, "init", "--quiet")
    git(project, "add", ".")
    git(project, "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "-m", "first")
    return project


def git(where: Path, *args: str) -> None:
    subprocess.run(["git", *args], cwd=where, check=True)


def test_every_contract_is_compared_with_a_revision(
    repository: Path, good: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = repository / "contracts"
    assert diff("--rev", "HEAD", folder) == 0
    assert "0 error(s) in 2 contract(s) compared" in capsys.readouterr().out
    (folder / "good-v1.yaml").write_text(good.replace("y = 2x", "y = 3x"))
    (folder / "base-v1.yaml").unlink()
    (folder / "next-v1.yaml").write_text(good.replace("good-v1", "next-v1"))
    assert diff("--rev", "HEAD", folder) == 1
    out = capsys.readouterr().out
    assert f"{folder / 'base-v1.yaml'}: removed, 1.0.0\n" in out
    assert f"{folder / 'next-v1.yaml'}: added, 1.1.0\n" in out
    assert f"{folder / 'good-v1.yaml'}:25:5: BUMP-002 equations.double.formula: changed" in out
    assert "1 error(s) in 3 contract(s) compared" in out
    assert diff("--rev", "HEAD", folder / "good-v1.yaml") == 1
    assert "1 error(s) in 1 contract(s) compared" in capsys.readouterr().out


def test_a_revision_that_is_not_there_is_refused_unless_it_may_be_absent(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = repository / "contracts"
    assert diff("--rev", "HEAD~1", folder) == 2
    assert "HEAD~1" in capsys.readouterr().err
    assert diff("--if-any", "--rev", "HEAD~1", folder) == 0
    assert capsys.readouterr().out.startswith("nothing was compared: git rev-parse")


def test_where_no_formal_predicate_stands_the_property_is_the_promise(good: str) -> None:
    informal = good.replace("    formal: y % 2 = 0\n", "")
    (change,) = compare(
        parse(informal, PATH), parse(informal.replace("the result is even", "it is even"), PATH)
    ).changes
    assert str(change) == "changed proof_obligations[OBL-1].property (major)"
