"""Check the contracts: python -m exactmoe.contracts.check [FOLDER]
Every *.yaml says what it promises and which test would prove it wrong, and that test exists.

Exit status: 0 all well, 1 an error, no contract, or no falsification test."""

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_METADATA = ("id", "version", "kind", "description")
_FALSIFIER = ("id", "rule", "prediction", "test", "if_fails")


class Report(NamedTuple):
    """What was read, and what is wrong with it."""

    contracts: int
    equations: int
    falsifiers: int
    errors: list[str]


def check(folder: Path, root: Path) -> Report:
    """Check every contract in `folder`; the tests they name lie under `root`."""
    report = Report(0, 0, 0, [])
    for path in sorted(folder.glob("*.yaml")):
        equations, falsifiers, errors = check_text(path.read_text(encoding="utf-8"), path.stem, root)
        report = Report(
            report.contracts + 1,
            report.equations + equations,
            report.falsifiers + falsifiers,
            report.errors + [f"{path.name}: {error}" for error in errors],
        )
    for what, count in (("contract", report.contracts), ("falsification test", report.falsifiers)):
        if not count:
            report.errors.append(f"{folder}: no {what}: nothing was checked")
    return report


def check_text(text: str, name: str, root: Path) -> tuple[int, int, list[str]]:
    """Equations, falsification tests and errors of one contract; `name` is its file name without .yaml."""
    try:
        contract = yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        return 0, 0, [str(error)]
    if not isinstance(contract, dict):
        return 0, 0, ["not a mapping"]
    metadata, equations = _mapping(contract, "metadata"), _mapping(contract, "equations")
    falsifiers = contract.get("falsification_tests", [])
    if not isinstance(falsifiers, list):
        falsifiers = []
    errors = [
        *_missing(metadata, _METADATA, "metadata"),
        *_equation_errors(equations),
        *_falsifier_errors(falsifiers, root),
    ]
    if metadata.get("id") != name:
        errors.append(f"metadata: id {metadata.get('id')!r} is not the name of the file")
    if not equations:
        errors.append("equations: there are none")
    if not falsifiers:
        errors.append("falsification_tests: there are none; nothing could prove this contract wrong")
    return len(equations), len(falsifiers), errors


def _mapping(contract: dict[Any, Any], key: str) -> dict[str, Any]:
    value = contract.get(key)
    return value if isinstance(value, dict) else {}


def _missing(entry: dict[str, Any], fields: tuple[str, ...], where: str) -> Iterator[str]:
    for field in fields:
        value = entry.get(field)
        if not (isinstance(value, str) and value.strip()):
            yield f"{where}: {field} must be a text, got {value!r}"


def _equation_errors(equations: dict[str, Any]) -> Iterator[str]:
    for name, equation in equations.items():
        yield from _missing(equation if isinstance(equation, dict) else {}, ("formula",), f"equations.{name}")


def _falsifier_errors(falsifiers: list[Any], root: Path) -> Iterator[str]:
    seen: set[str] = set()
    for position, falsifier in enumerate(falsifiers):
        entry = falsifier if isinstance(falsifier, dict) else {}
        where = f"falsification_tests[{position}] {entry.get('id')}"
        missing = list(_missing(entry, _FALSIFIER, where))
        yield from missing
        if missing:
            continue
        if entry["id"] in seen:
            yield f"{where}: the id is taken"
        seen.add(entry["id"])
        error = _test_error(entry["test"], root)
        if error:
            yield f"{where}: {error}"


def _test_error(node_id: str, root: Path) -> str | None:
    """What is wrong with `path::test_name` (or `path::Class::test_name`), or None."""
    path, *names = node_id.split("::")
    file = root / path
    if not names:
        return f"{node_id!r} is not path::test_name"
    if not (path.startswith("tests/") and Path(path).name.startswith("test_") and file.is_file()):
        return f"{node_id}: there is no test file {path}"
    scope: ast.AST = ast.parse(file.read_text(encoding="utf-8"), path)
    for name in names:
        found = [
            node
            for node in ast.iter_child_nodes(scope)
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
        ]
        if not found:
            return f"{node_id}: {path} has no {name}"
        scope = found[-1]
        marks = {mark.attr for d in scope.decorator_list for mark in ast.walk(d) if isinstance(mark, ast.Attribute)}
        if marks & {"skip", "skipif", "xfail"}:
            return f"{node_id}: {name} is marked to be skipped or to fail; it proves nothing"
    if not (isinstance(scope, ast.FunctionDef) and scope.name.startswith("test_")):
        return f"{node_id}: {names[-1]} is not a test function"
    return None


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key written twice is an error, not the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", node.value[position][0].start_mark
                )
        return super().construct_mapping(node, deep)


def main(argv: list[str] | None = None) -> int:
    """Print the counts and the errors of the contracts; the exit status."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(prog="python -m exactmoe.contracts.check", description="Check the contracts.")
    parser.add_argument("folder", nargs="?", type=Path, default=here, metavar="FOLDER", help="default: the project's")
    parser.add_argument("--root", type=Path, default=here.parent, help="where tests/ lies (default: the repository)")
    args = parser.parse_args(argv)
    report = check(args.folder, args.root)
    for error in report.errors:
        print(error, file=sys.stderr)
    print(
        f"{report.contracts} contracts, {report.equations} equations, {report.falsifiers} falsification tests", end=""
    )
    print(f", {len(report.errors)} errors")
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
