"""The tools around the code: lint, types, the wheel, and the shared conftest. Each is shown something to catch."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("kernels", "model", "parity", "bench", "contracts")


def tool(where: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *args], cwd=where, capture_output=True, text=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The project's configuration over five folders that each hold one planted file."""
    (tmp_path / "src" / "exactmoe").mkdir(parents=True)
    (tmp_path / "src" / "exactmoe" / "__init__.py").write_text('"""Planted."""\n\n__version__ = "0"\n')
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in LINKED:
        (tmp_path / name).mkdir()
        (tmp_path / "src" / "exactmoe" / name).symlink_to(Path("..", "..", name))
        (tmp_path / name / "planted.py").write_text('"""Planted."""\n')
    return tmp_path


def test_the_type_checker_reads_every_folder(tree: Path) -> None:
    assert tool(tree, "mypy").returncode == 0
    for name in LINKED:
        (tree / name / "planted.py").write_text(f'"""Planted."""\n\nWRONG_IN_{name.upper()}: int = "text"\n')
    found = tool(tree, "mypy")
    assert found.returncode == 1
    assert {line.split("planted")[0] for line in found.stdout.splitlines()[:-1]} == {
        f"src/exactmoe/{name}/" for name in LINKED
    }


@pytest.mark.parametrize("name", LINKED)
def test_lint_refuses_to_import_a_folder_by_its_bare_name(tree: Path, name: str) -> None:
    ruff = ("ruff", "check", "--select", "TID251", "--output-format", "concise")
    fine = f'"""Planted."""\n\nimport exactmoe.{name}.planted\nfrom exactmoe import {name}\n'
    (tree / "model" / "planted.py").write_text(fine)
    assert tool(tree, *ruff).returncode == 0
    for line in (f"import {name}", f"import {name}.planted", f"from {name} import x", f"from {name}.planted import x"):
        (tree / "model" / "planted.py").write_text(f'"""Planted."""\n\n{line}\n')
        found = tool(tree, *ruff)
        assert found.returncode == 1, line
        assert "TID251" in found.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a wheel built from a copy of the repository."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("src", *LINKED):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
    built = tool(tree, "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", "out")
    assert built.returncode == 0, built.stderr
    (path,) = (tree / "out").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_the_wheel_installs_exactmoe_and_nothing_beside_it(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert "exactmoe" in tops
    assert {top for top in tops if not top.endswith(".dist-info")} == {"exactmoe"}


@pytest.mark.parametrize("folder", LINKED)
def test_the_wheel_holds_every_file_of_the_folder(wheel: list[str], folder: str) -> None:
    files = {
        f"exactmoe/{path.relative_to(ROOT)}"
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files == {name for name in wheel if name.startswith(f"exactmoe/{folder}/")}
    assert files


PLANTED_TESTS = """
import os, warnings
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("n", range(3))
def test_on_a_gpu(n):
    raise AssertionError("there is none")

@pytest.mark.browser
def test_in_a_browser():
    raise AssertionError("there is none")

def test_in_the_interpreter(device):
    assert (device.type, os.environ["TRITON_INTERPRET"]) == ("cpu", "1")

def test_warns():
    warnings.warn("planted")
"""


def planted(
    folder: Path, tests: str, *options: str, without: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `tests` beside the project's conftest, without an environment variable, and with others."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "src").symlink_to(ROOT / "src")
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")
    (folder / "tests" / "test_planted.py").write_text(tests)
    env = {k: v for k, v in os.environ.items() if k != without} | variables
    args = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    return subprocess.run(args, cwd=folder, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "two workers"])
def test_without_a_gpu_or_a_browser_their_tests_are_counted_as_not_run_and_warnings_are_errors(
    tmp_path: Path, workers: tuple[str, ...]
) -> None:
    blind = {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    run = planted(tmp_path, PLANTED_TESTS, *workers, without="TRITON_INTERPRET", **blind)
    assert run.returncode == 1
    assert "not run: 3 tests that need a CUDA device; kernels ran in the interpreter" in run.stdout
    assert "not run: 1 tests that need Chromium; none is installed" in run.stdout
    assert "FAILED tests/test_planted.py::test_warns - UserWarning: planted" in run.stdout
    assert ("1 failed, 1 passed in" if workers else "1 failed, 1 passed, 4 deselected") in run.stdout


def test_all_tests_are_run_in_a_worker_for_every_core_and_chosen_ones_in_one_process() -> None:
    def recipe(*variables: str) -> str:
        make = ["make", "--dry-run", "--no-print-directory", "test", "INSTALLED=Makefile", *variables]
        found = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return found.splitlines()[-1]  # before it the environment may be made

    assert recipe().startswith(".venv/bin/pytest -n logical ")
    assert recipe().endswith(" --record-evidence build/evidence.json")
    assert recipe("ARGS=tests/kernels -k router") == ".venv/bin/pytest tests/kernels -k router"


@pytest.mark.parametrize(("on", "workers"), [("cuda", 0), ("cpu", None)])
def test_a_gpu_is_not_shared_by_workers(
    on: str, workers: int | None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    conftest = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    monkeypatch.setattr(conftest, "_DEVICE", torch.device(on))
    assert conftest.pytest_xdist_auto_num_workers() == workers


def test_a_worker_has_one_thread(tmp_path: Path) -> None:
    tests = "import torch\ndef test_threads():\n    assert torch.get_num_threads() == 1\n"
    assert planted(tmp_path, tests, "-n", "1", without="OMP_NUM_THREADS").returncode == 0


@pytest.mark.parametrize(("letter", "drawn"), [("a", "7b225904"), ("b", "48844869")], ids=["a", "b"])
def test_random_numbers_come_from_the_name_of_the_test(rng: np.random.Generator, letter: str, drawn: str) -> None:
    name = f"tests/test_tools.py::test_random_numbers_come_from_the_name_of_the_test[{letter}]"
    again = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))
    numbers = rng.bytes(4)
    assert (numbers, numbers.hex()) == (again.bytes(4), drawn)
