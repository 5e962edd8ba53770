"""The rule of kernels.dependent, read from the source: a kernel waits before it lets the next one start."""

import ast
from pathlib import Path

import pytest

from exactmoe import kernels

EARLY = {"_decode_combine_kernel"}  # lets the next one start first; kernels.dependent says why it may


def calls(source: str) -> dict[str, list[str]]:
    """By function, its calls of `finish_wait` and `release_next` in the order of the text."""
    found: dict[str, list[str]] = {}
    for function in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)):
        named = [n for n in ast.walk(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        named.sort(key=lambda node: (node.lineno, node.col_offset))
        order = [n.func.id for n in named if isinstance(n.func, ast.Name)]
        order = [name for name in order if name in ("finish_wait", "release_next")]
        if order:
            found[function.name] = order
    return found


def breaches(found: dict[str, list[str]]) -> list[str]:
    wrong = []
    for name, order in found.items():
        waits = [i for i, call in enumerate(order) if call == "finish_wait"]
        lets = [i for i, call in enumerate(order) if call == "release_next"]
        if not waits or not lets:
            wrong.append(f"{name}: waits {len(waits)} times and lets the next start {len(lets)} times")
        elif (lets[0] < waits[0]) != (name in EARLY):
            wrong.append(f"{name}: {order[0]} comes first")
    return wrong


def test_every_kernel_of_a_chain_waits_before_it_lets_the_next_one_start() -> None:
    found: dict[str, list[str]] = {}
    for path in sorted(Path(kernels.__path__[0]).glob("*.py")):
        if path.stem != "dependent":
            found |= calls(path.read_text(encoding="utf-8"))
    assert found.keys() >= {"_experts_up_kernel", "_experts_down_kernel", "_decode_router_kernel", *EARLY}
    assert breaches(found) == []


def launched_alone(source: str) -> list[str]:
    """Kernels that wait for the one before them and are launched without DEPENDENT: they could not overlap it."""
    tree = ast.parse(source)
    waiting = {name for name, order in calls(source).items() if "finish_wait" in order}
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Subscript) and isinstance(call.func.value, ast.Name):
            given = [k.value.id for k in call.keywords if k.arg is None and isinstance(k.value, ast.Name)]
            if call.func.value.id in waiting and "DEPENDENT" not in given:
                found.append(call.func.value.id)
    return found


def test_every_kernel_of_a_chain_is_launched_so_that_it_may_overlap() -> None:
    sources = [path.read_text(encoding="utf-8") for path in sorted(Path(kernels.__path__[0]).glob("*.py"))]
    launches = sum(source.count("**DEPENDENT") for source in sources)
    assert launches > 8
    assert [name for source in sources for name in launched_alone(source)] == []


def test_a_kernel_launched_alone_is_named() -> None:
    kernel = "def _a_kernel():\n    finish_wait()\n"
    assert launched_alone(kernel + "_a_kernel[(1,)](x, num_warps=1, **FAITHFUL)") == ["_a_kernel"]
    assert launched_alone(kernel + "_a_kernel[(1,)](x, **DEPENDENT, **FAITHFUL)") == []


@pytest.mark.parametrize(
    ("name", "body", "why"),
    [
        ("_a_kernel", "release_next(); finish_wait()", "_a_kernel: release_next comes first"),
        ("_a_kernel", "finish_wait()", "_a_kernel: waits 1 times and lets the next start 0 times"),
        ("_a_kernel", "release_next()", "_a_kernel: waits 0 times and lets the next start 1 times"),
        ("_decode_combine_kernel", "finish_wait(); release_next()", "_decode_combine_kernel: finish_wait comes first"),
    ],
)
def test_a_kernel_out_of_order_is_named(name: str, body: str, why: str) -> None:
    assert breaches(calls(f"def {name}():\n    {body}")) == [why]
