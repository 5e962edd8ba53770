"""The rules of the tree, read from the sources. Every rule is also shown a planted breach, which it must report."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("kernels", "model", "parity", "bench", "contracts")
MAX_FILE_BYTES = 16 * 2**20

Sources = Mapping[str, str]  # module name -> its text


class Finding(NamedTuple):
    """What a rule looked at, and what breaks it."""

    examined: int
    breaches: list[str]


def repository() -> Sources:
    """Every module of the package, under the name it is imported by."""
    files = [(ROOT / "src", path) for path in (ROOT / "src" / "exactmoe" / "cli").rglob("*.py")]
    files += [(ROOT, path) for folder in LINKED for path in (ROOT / folder).rglob("*.py")]
    sources = {}
    for base, path in files:
        name = ".".join(path.relative_to(base).with_suffix("").parts)
        sources[name if name.startswith("exactmoe.") else f"exactmoe.{name}"] = path.read_text(encoding="utf-8")
    return sources


def under(sources: Sources, *packages: str) -> dict[str, ast.Module]:
    """The parsed modules of these packages."""
    return {
        name: ast.parse(text, name)
        for name, text in sources.items()
        if any(name.startswith(f"exactmoe.{package}.") for package in packages)
    }


def imports(name: str, module: ast.Module) -> Iterator[str]:
    """Full names of all that a module imports, wherever in it: `from a.b import c` is `a.b.c`."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__") and node.args:
            target = node.args[0]
            if isinstance(target, ast.JoinedStr) and target.values:  # what stands before the first {}
                target = target.values[0]
            yield target.value if isinstance(target, ast.Constant) and isinstance(target.value, str) else "?"


def called(call: ast.Call) -> str:
    """The last word of what is called."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def inside(target: str, package: str) -> bool:
    return target == package or target.startswith(f"{package}.")


# One-way imports

ABOVE = {
    "kernels": ("model", "parity", "bench", "contracts", "cli"),
    "model": ("parity", "bench", "contracts", "cli"),
    "parity": ("bench", "contracts", "cli"),
    "bench": ("contracts", "cli"),
    "contracts": ("kernels", "model", "parity", "bench", "cli"),
}


def imports_upwards(sources: Sources) -> Finding:
    """Dependencies point one way: bench -> parity -> model -> kernels."""
    modules = under(sources, *ABOVE)
    breaches = [
        f"{name} imports {target}"
        for name, module in modules.items()
        for target in imports(name, module)
        for package in ABOVE[name.split(".")[1]]
        if inside(target, f"exactmoe.{package}")
    ]
    return Finding(len(modules), breaches)


def reference_imports(sources: Sources) -> Finding:
    """The reference is numpy, the standard library and itself."""
    modules = under(sources, "parity.reference")
    breaches = [
        f"{name} imports {target}"
        for name, module in modules.items()
        for target in imports(name, module)
        if target.split(".")[0] not in {"numpy", *sys.stdlib_module_names}
        and not inside(target, "exactmoe.parity.reference")
    ]
    return Finding(len(modules), breaches)


# numpy's own change bits with the CPU. cos, sin and pow of binary64 on the host are the contract's for the rope table,
# and come from math.
LIBRARY_FUNCTIONS = frozenset(
    (
        "exp",
        "exp2",
        "expm1",
        "log",
        "log2",
        "log10",
        "log1p",
        "logaddexp",
        "sin",
        "cos",
        "tan",
        "tanh",
        "power",
        "einsum",
    )
)


def reference_arithmetic(sources: Sources) -> Finding:
    """The reference spells its sums and its transcendentals."""
    modules = under(sources, "parity.reference")
    breaches = [
        f"{name}:{node.lineno} uses np.{node.attr}"
        for name, module in modules.items()
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute)
        and node.attr in LIBRARY_FUNCTIONS
        and isinstance(node.value, ast.Name)
        and node.value.id == "np"
    ]
    return Finding(len(modules), breaches)


# Production knows nothing of tracing

PRODUCTION = "exactmoe.model.forward"
TRACING = re.compile(
    r"(^|_)(trac(e|ed|er|ing)|captur(e|ed|ing)|dump|hook|record|stage|intermediate|observer|probe|debug)s?(_|$)"
)


def tracing_in_production(sources: Sources) -> Finding:
    """What the production pass reaches imports no tracing, no stages, no parity, and takes no argument for them."""
    reached: set[str] = set()
    breaches: list[str] = []
    waiting = [PRODUCTION] if PRODUCTION in sources else []
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        module = ast.parse(sources[name], name)
        for target in imports(name, module):
            if {"traced", "stages"} & set(target.split(".")) or inside(target, "exactmoe.parity"):
                breaches.append(f"{name} imports {target}")
            waiting += [found for found in (target, target.rpartition(".")[0]) if found in sources]
        arguments = [node.arg for node in ast.walk(module) if isinstance(node, ast.arg)]
        breaches += [f"{name} takes an argument {argument}" for argument in arguments if TRACING.search(argument)]
    return Finding(len(reached), breaches)


# Kernels

NOT_OPS = {
    "errors": "the two exceptions",
    "formats": "the list of quantised types",
    "launch": "where kernels run",
    "interpreter": "how fast the interpreter runs",
    "tensors": "containers and their checks",
    "guess": "which weights are on their way to the cache",
    "prefetch": "what comes later, on its way to the cache",
    "cursor": "where a step begins: two integers are stored",
    "tiles": "block sizes, which change no bit",
    "dependent": "how kernels of a decode step overlap",
    "ptx_lint": "judges the compiler's output",
    "ptx_lock": "keeps what the lint saw",
}


def kernels_without_twin(sources: Sources) -> Finding:
    """One op, one word: kernels/<op>.py has its numpy twin in parity/reference/<op>.py."""
    names = {name.rpartition(".")[2] for name in under(sources, "kernels")}
    breaches = [
        f"kernels/{name}.py has no twin parity/reference/{name}.py"
        for name in sorted(names - set(NOT_OPS))
        if f"exactmoe.parity.reference.{name}" not in sources
    ]
    breaches += [f"kernels/{name}.py is excepted but is not there" for name in sorted(set(NOT_OPS) - names)]
    return Finding(len(names - set(NOT_OPS)), breaches)


PROMISE = re.compile(r"bit-equal\s+to\s+`*(parity\.reference\.[\w.]+\w)", re.IGNORECASE)


def broken_promises(sources: Sources) -> Finding:
    """A docstring that names its twin in the reference names a function that exists."""
    promises = [
        (name, promise)
        for name, module in under(sources, "kernels", "model").items()
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef)
        for promise in PROMISE.findall(ast.get_docstring(node) or "")
    ]
    breaches = []
    for name, promise in promises:
        file, _, function = promise.rpartition(".")
        twin = ast.parse(sources.get(f"exactmoe.{file}", ""))
        if function not in {node.name for node in twin.body if isinstance(node, ast.FunctionDef)}:
            breaches.append(f"{name} is promised equal to {promise}, which does not exist")
    return Finding(len(promises), breaches)


def is_jit(function: ast.FunctionDef) -> bool:
    """Decorated with `triton.jit` or `triton.jit(...)`."""
    decorators = [d.func if isinstance(d, ast.Call) else d for d in function.decorator_list]
    return any(ast.unparse(d) in ("triton.jit", "jit") for d in decorators)


def jit_functions(sources: Sources) -> Iterator[tuple[str, ast.FunctionDef]]:
    for name, module in under(sources, "kernels", "model", "parity", "bench").items():
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef) and is_jit(node):
                yield name, node


INEXACT = frozenset(
    (
        "exp",
        "exp2",
        "log",
        "log2",
        "sin",
        "cos",
        "erf",
        "sigmoid",
        "softmax",
        "sqrt",
        "rsqrt",
        "fdiv",
        "fma",
        "bfloat16",
    )
)
SCHEDULING = (
    "tl.extra.cuda.gdc_wait",
    "tl.extra.cuda.gdc_launch_dependents",
)  # when kernels start: they compute nothing
# sum and cumsum stay: what they add must be integers, which this cannot see and the PTX lint can.


def inexact_operations(sources: Sources) -> Finding:
    """No operation that rounds otherwise than once, to nearest even, and no atomics, whose order is the machine's."""
    functions = list(jit_functions(sources))
    breaches = []
    for name, function in functions:
        for node in ast.walk(function):
            word = inexact(node)
            if word:
                breaches.append(f"{name}.{function.name}: uses {word} in {ast.unparse(node)}")
    return Finding(len(functions), breaches)


def inexact(node: ast.AST) -> str | None:
    """The forbidden word that this node of a jit function is, or None."""
    if isinstance(node, ast.Attribute):
        whole = ast.unparse(node)
        if any(name == whole or name.startswith(f"{whole}.") for name in SCHEDULING):
            return None
        return whole if node.attr in INEXACT or re.match(r"tl\.(atomic_|math\b|extra\b)|.*libdevice", whole) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return None if compile_time(node.left) and compile_time(node.right) else "/"
    return "/" if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Div) else None


def compile_time(node: ast.expr) -> bool:
    """A number, or a constant by its name: Python divides these, not the GPU."""
    return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id == node.id.upper())


def renamed_triton(sources: Sources) -> Finding:
    """`tl` is the one name of triton.language, so that the rule above cannot be walked round."""
    modules = under(sources, "kernels")
    breaches = []
    for name, module in modules.items():
        for node in ast.walk(module):
            if isinstance(node, ast.ImportFrom) and inside(node.module or "", "triton.language"):
                breaches.append(f"{name} imports from {node.module}")
            elif isinstance(node, ast.ImportFrom) and node.module == "triton":
                breaches += [
                    f"{name} imports {a.name} from triton" for a in node.names if a.name in ("language", "jit")
                ]
            elif isinstance(node, ast.Import):
                breaches += [
                    f"{name} imports {a.name} as {a.asname}"
                    for a in node.names
                    if inside(a.name, "triton.language") and (a.name, a.asname) != ("triton.language", "tl")
                ]
    return Finding(len(modules), breaches)


def unannotated_functions(sources: Sources) -> Finding:
    """Under kernels/ the type checker lets jit functions go without types; every other function has them."""
    functions = [
        (name, node)
        for name, module in under(sources, "kernels").items()
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef) and not is_jit(node)
    ]
    breaches = []
    for name, function in functions:
        a = function.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        bare = [x.arg for x in arguments if x.annotation is None and x.arg not in ("self", "cls")]
        bare += ["return"] if function.returns is None else []
        breaches += [f"{name}.{function.name}: {argument} has no type" for argument in bare]
    return Finding(len(functions), breaches)


K, M, R = "exactmoe.kernels", "exactmoe.model", "exactmoe.parity.reference"
JIT = "import triton\nimport triton.language as tl\n@triton.jit\ndef _k(x_ptr, N: tl.constexpr):\n    "

# Rule, a tree that breaks it, and what must be said of it.
BREACHES: list[tuple[Callable[[Sources], Finding], dict[str, str], str]] = [
    (imports_upwards, {f"{K}.a": "import exactmoe.model.config"}, "imports exactmoe.model.config"),
    (imports_upwards, {f"{K}.a": "from exactmoe.parity.bits import compare"}, "imports exactmoe.parity.bits.compare"),
    (imports_upwards, {f"{K}.a": "from exactmoe import bench"}, "imports exactmoe.bench"),
    (imports_upwards, {f"{K}.a": "from ..model import config"}, "imports exactmoe.model.config"),
    (imports_upwards, {f"{K}.a": "def f():\n    from exactmoe.model import x"}, "imports exactmoe.model.x"),
    (imports_upwards, {f"{M}.a": "import exactmoe.parity.bits"}, "imports exactmoe.parity.bits"),
    (imports_upwards, {f"{M}.gguf.a": "from ...bench import clock"}, "imports exactmoe.bench.clock"),
    (imports_upwards, {f"{M}.a": "import_module(f'exactmoe.parity.{x}')"}, "imports exactmoe.parity."),
    (imports_upwards, {f"{M}.a": "importlib.import_module('exactmoe.cli.main')"}, "imports exactmoe.cli.main"),
    (imports_upwards, {"exactmoe.parity.a": "from exactmoe.bench import x"}, "imports exactmoe.bench.x"),
    (imports_upwards, {"exactmoe.contracts.a": "import exactmoe.kernels.tiles"}, "imports exactmoe.kernels.tiles"),
    (reference_imports, {f"{R}.a": "import torch"}, "imports torch"),
    (reference_imports, {f"{R}.a": "from exactmoe.kernels.errors import require"}, "imports exactmoe.kernels.errors"),
    (reference_imports, {f"{R}.a": "from exactmoe.parity.bits import compare"}, "imports exactmoe.parity.bits.compare"),
    (reference_imports, {f"{R}.a": "from .. import bits"}, "imports exactmoe.parity.bits"),
    (reference_imports, {f"{R}.a": "import_module(name)"}, "imports ?"),
    (reference_arithmetic, {f"{R}.a": "y = np.exp(x)"}, "uses np.exp"),
    (reference_arithmetic, {f"{R}.a": "f = np.einsum"}, "uses np.einsum"),
    (
        tracing_in_production,
        {PRODUCTION: "from exactmoe.model.traced import f"},
        "forward imports exactmoe.model.traced",
    ),
    (tracing_in_production, {PRODUCTION: "from exactmoe.model import stages"}, "imports exactmoe.model.stages"),
    (tracing_in_production, {PRODUCTION: "def f():\n    import exactmoe.parity"}, "imports exactmoe.parity"),
    (
        tracing_in_production,
        {PRODUCTION: "from exactmoe.model.moe import f", f"{M}.moe": "from exactmoe.model import stages"},
        "exactmoe.model.moe imports exactmoe.model.stages",
    ),
    (tracing_in_production, {PRODUCTION: "def f(x, trace=None): ..."}, "takes an argument trace"),
    (tracing_in_production, {PRODUCTION: "def f(x, *, capture_stages): ..."}, "takes an argument capture_stages"),
    (tracing_in_production, {PRODUCTION: "f = lambda x, hooks: x"}, "takes an argument hooks"),
    (kernels_without_twin, {f"{K}.norm": ""}, "kernels/norm.py has no twin"),
    (kernels_without_twin, {f"{K}.norm": "", f"{R}.norm": ""}, "kernels/tiles.py is excepted but is not there"),
    (
        broken_promises,
        {f"{K}.a": "def f():\n    'Bit-equal to parity.reference.a.f.'", f"{R}.a": "def g(): ..."},
        "promised equal to parity.reference.a.f",
    ),
    *((inexact_operations, {f"{K}.a": JIT + f"tl.{word}(x)"}, f"uses tl.{word}") for word in sorted(INEXACT)),
    (inexact_operations, {f"{K}.a": JIT + "tl.atomic_add(x_ptr, 1.0)"}, "uses tl.atomic_add"),
    (inexact_operations, {f"{K}.a": JIT + "tl.atomic_max(x_ptr, 1)"}, "uses tl.atomic_max"),
    (inexact_operations, {f"{K}.a": JIT + "tl.math.abs(x)"}, "uses tl.math"),
    (inexact_operations, {f"{K}.a": JIT + "x.sigmoid()"}, "uses x.sigmoid"),
    (inexact_operations, {f"{K}.a": JIT + "x / y"}, "uses /"),
    (inexact_operations, {f"{K}.a": JIT + "1.0 / x"}, "uses /"),
    (inexact_operations, {f"{K}.a": JIT + "x /= 2.0"}, "uses /"),
    (inexact_operations, {f"{K}.a": JIT.replace("jit", "jit(do_not_specialize=['N'])") + "x / y"}, "uses /"),
    (inexact_operations, {f"{M}.a": JIT + "x / y"}, "uses /"),
    (renamed_triton, {f"{K}.a": "from triton.language import exp"}, "imports from triton.language"),
    (renamed_triton, {f"{K}.a": "import triton.language.math as m"}, "imports triton.language.math as m"),
    (renamed_triton, {f"{K}.a": "import triton.language as t"}, "imports triton.language as t"),
    (renamed_triton, {f"{K}.a": "from triton import language"}, "imports language from triton"),
    (unannotated_functions, {f"{K}.a": "def f(x) -> int: ..."}, "f: x has no type"),
    (unannotated_functions, {f"{K}.a": "def f(*, x): ..."}, "f: x has no type"),
    (unannotated_functions, {f"{K}.a": "class C:\n    def f(self): ..."}, "f: return has no type"),
]
# What the rules must let pass.
ALLOWED: list[tuple[Callable[[Sources], Finding], dict[str, str]]] = [
    (imports_upwards, {"exactmoe.bench.a": "import exactmoe.parity.bits, exactmoe.model.moe, exactmoe.kernels.norm"}),
    (imports_upwards, {f"{K}.a": "import exactmoe.models, kernels_of_others, parity_bits"}),
    (reference_imports, {f"{R}.a": "import numpy as np, math\nfrom exactmoe.parity.reference.norm import f"}),
    (reference_imports, {f"{R}.a": "from . import norm\nfrom .norm import f"}),
    (reference_arithmetic, {f"{R}.a": "y = exp(x)\nz = np.sqrt(y)\nt = math.cos(1.0)"}),
    (tracing_in_production, {PRODUCTION: "from exactmoe.kernels import a", f"{M}.traced": "def f(trace): ..."}),
    (broken_promises, {f"{K}.a": "def f():\n    'bit-equal to parity.reference.a.f.'", f"{R}.a": "def f(): ..."}),
    (inexact_operations, {f"{K}.a": JIT + "tl.sqrt_rn(x) // 2 + tl.div_rn(1.0, x) * (1.0 / P_ONE) + exp(x)"}),
    (inexact_operations, {f"{K}.a": JIT + "pass\ndef host(x): return x / 2"}),
    (renamed_triton, {f"{K}.a": "import triton\nimport triton.language as tl\nfrom triton.runtime import driver"}),
    (unannotated_functions, {f"{K}.a": JIT + "pass\ndef f(x: int, *y: int) -> int: ..."}),
]
RULES = list(dict.fromkeys(rule for rule, _, _ in BREACHES))


@pytest.fixture(scope="module")
def sources() -> Sources:
    return repository()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps_the_rule(sources: Sources, rule: Callable[[Sources], Finding]) -> None:
    finding = rule(sources)
    assert finding.examined > 0, "nothing was examined"
    assert finding.breaches == []


@pytest.mark.parametrize(
    ("rule", "planted", "said"),
    BREACHES,
    ids=[f"{rule.__name__}-{position}" for position, (rule, _, _) in enumerate(BREACHES)],
)
def test_a_planted_breach_is_reported(rule: Callable[[Sources], Finding], planted: Sources, said: str) -> None:
    assert any(said in breach for breach in rule(planted).breaches)


@pytest.mark.parametrize(
    ("rule", "fine"),
    ALLOWED,
    ids=[f"{rule.__name__}-{position}" for position, (rule, _) in enumerate(ALLOWED)],
)
def test_what_is_allowed_is_not_reported(rule: Callable[[Sources], Finding], fine: Sources) -> None:
    finding = rule(fine)
    assert finding.examined > 0
    assert finding.breaches == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_that_sees_nothing_says_so(rule: Callable[[Sources], Finding]) -> None:
    assert rule({}).examined == 0


# Files


def misplaced(root: Path) -> list[str]:
    """What is wrong with the links of src/exactmoe, and the __init__.py files of the linked folders."""
    wrong = []
    for name in LINKED:
        link = root / "src" / "exactmoe" / name
        if not (link.is_symlink() and link.readlink() == Path("..", "..", name) and link.is_dir()):
            wrong.append(f"src/exactmoe/{name} is not a link to ../../{name}")
        wrong += [f"{path.relative_to(root)} must not be" for path in sorted((root / name).rglob("__init__.py"))]
    return wrong


def test_the_five_folders_are_linked_and_are_no_packages_of_their_own() -> None:
    assert misplaced(ROOT) == []


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    (tmp_path / "src" / "exactmoe").mkdir(parents=True)
    for name in LINKED:
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / "src" / "exactmoe" / name).symlink_to(Path("..", "..", name))
    return tmp_path


def test_a_planted_misplacement_is_reported(small_tree: Path) -> None:
    assert misplaced(small_tree) == []
    (small_tree / "kernels" / "inner" / "__init__.py").touch()
    (small_tree / "src" / "exactmoe" / "model").unlink()
    (small_tree / "src" / "exactmoe" / "bench").unlink()
    (small_tree / "src" / "exactmoe" / "bench").mkdir()
    (small_tree / "src" / "exactmoe" / "parity").unlink()
    (small_tree / "src" / "exactmoe" / "parity").symlink_to(small_tree / "parity")
    assert misplaced(small_tree) == [
        "kernels/inner/__init__.py must not be",
        "src/exactmoe/model is not a link to ../../model",
        "src/exactmoe/parity is not a link to ../../parity",
        "src/exactmoe/bench is not a link to ../../bench",
    ]


def too_large(root: Path) -> Finding:
    """Files above MAX_FILE_BYTES, among those git has or would take; without git, among all."""
    git = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True, text=True)
    names = listed.stdout.split("\0")[:-1]
    paths = [root / name for name in names] if listed.returncode == 0 else root.rglob("*")
    files = [path for path in paths if path.is_file()]
    large = [f"{path.relative_to(root)}: {size}" for path in files if (size := path.stat().st_size) > MAX_FILE_BYTES]
    return Finding(len(files), large)


def test_no_file_is_larger_than_the_largest_that_ships() -> None:
    finding = too_large(ROOT)
    assert finding.examined > len(LINKED)
    assert finding.breaches == []


def test_a_planted_large_file_is_reported(tmp_path: Path) -> None:
    for name, size in (("fits", MAX_FILE_BYTES), ("large", MAX_FILE_BYTES + 1)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    assert too_large(tmp_path) == Finding(2, [f"large: {MAX_FILE_BYTES + 1}"])
