"""Whether the test that a contract cites exists, by reading the file: nothing is imported and nothing is run.

A citation is a pytest node id, `tests/<folder>/test_<name>.py::test_<sentence>`, with a class between them where the
test is a method. A function stands for all its parameters. That pytest collects it is for `status` to show."""

import ast
import re
from functools import cache
from pathlib import Path

_NODE_ID = re.compile(r"(?P<path>tests/(?:[\w-]+/)*test_\w+\.py)(?P<names>(?:::\w+)*::test_\w+)")
_EXCUSES = frozenset({"skip", "skipif", "xfail"})


def is_node_id(text: str) -> bool:
    """Whether `text` has the form of a citation."""
    return _NODE_ID.fullmatch(text) is not None


def fault(node_id: str, root: Path) -> str | None:
    """What is wrong with a citation of the form of `is_node_id`, or None. `root` is the folder that holds tests/."""
    path, *names = node_id.split("::")
    file = root / path
    if not file.is_file():
        return f"there is no file {path}"
    try:
        scope: ast.AST = _parsed(file, file.stat().st_mtime_ns)
    except (SyntaxError, UnicodeDecodeError) as error:
        return f"{path} is not Python: {error}"
    for name in names:
        found = [
            node
            for node in ast.iter_child_nodes(scope)
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
        ]
        if not found:
            return f"{path} has no {name}"
        if _marks(scope) & _EXCUSES:
            return f"what holds {name} is marked to be skipped or to fail; it proves nothing"
        scope = found[-1]
        if _marks(scope) & _EXCUSES:
            return f"{name} is marked to be skipped or to fail; it proves nothing"
    return None if isinstance(scope, ast.FunctionDef) else f"{names[-1]} is a class, not a test function"


def _marks(scope: ast.AST) -> set[str]:
    """The names of the marks of a function or class, or those that a module's or class's `pytestmark` gives."""
    marking: list[ast.expr] = list(getattr(scope, "decorator_list", ()))
    marking += [
        statement.value
        for statement in ast.iter_child_nodes(scope)
        if isinstance(statement, ast.Assign) and any(ast.unparse(t) == "pytestmark" for t in statement.targets)
    ]
    return {mark.attr for expression in marking for mark in ast.walk(expression) if isinstance(mark, ast.Attribute)}


@cache
def _parsed(file: Path, _changed: int) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))
