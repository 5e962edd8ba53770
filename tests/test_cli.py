"""The command: how commands are found, what their failures look like from outside, and that it starts light."""

import argparse
import os
import pty
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import exactmoe
from exactmoe.cli import main as cli
from exactmoe.cli.progress import track
from exactmoe.kernels.errors import InvalidInput, MissingEnvironment

HEAVY = ("torch", "numpy", "triton", "gguf", "pydantic", "rich", "tokenizers", "safetensors", "yaml")
COMMANDS = Path(cli.__file__).parent / "commands"


def exactmoe_process(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "exactmoe", *args], capture_output=True, text=True, env=environment())


def environment() -> dict[str, str]:
    source = str(Path(exactmoe.__file__).parent.parent)
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return inherited | {"PYTHONPATH": source, "PYTHONIOENCODING": "utf-8"}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[argparse.Namespace], int]], int]:
    """Run the command line with a command `planted` whose `run` is the function given."""

    def run_planted(run: Callable[[argparse.Namespace], int]) -> int:
        command = types.ModuleType("planted")
        vars(command).update(HELP="planted", EXAMPLES="", configure=lambda parser: None, run=run)
        monkeypatch.setitem(sys.modules, "exactmoe.cli.commands.planted", command)
        monkeypatch.setattr(cli, "COMMANDS", ("planted",))
        return cli.main(["planted"])

    return run_planted


@pytest.mark.parametrize("status", [0, 1])
def test_the_exit_status_is_what_the_command_returns(
    planted: Callable[[Callable[[argparse.Namespace], int]], int], status: int
) -> None:
    assert planted(lambda args: status) == status


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InvalidInput("no such layer: 7"), 2, "no such layer: 7"),
        (MissingEnvironment("no CUDA device"), 3, "no CUDA device"),
        (ModuleNotFoundError("?", name="gguf"), 3, "this command needs the package 'gguf', which is not installed"),
        (FileNotFoundError(2, "No such file or directory", "x.gguf"), 2, "x.gguf: No such file or directory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_refusal_is_one_line_on_stderr_and_a_status(
    planted: Callable[[Callable[[argparse.Namespace], int]], int],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    assert planted(run) == status
    assert capsys.readouterr() == ("", f"exactmoe: error: {message}\n")


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), ModuleNotFoundError("a bug", name="exactmoe.nowhere"), OSError("a bug")]
)
def test_a_bug_keeps_its_traceback(
    planted: Callable[[Callable[[argparse.Namespace], int]], int], error: Exception
) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    with pytest.raises(type(error), match="a bug"):
        planted(run)


@pytest.mark.parametrize("args", [[], ["frobnicate"], ["--frobnicate"], ["inspect"], ["inspect", "a", "b"]])
def test_wrong_usage_exits_2_and_shows_the_usage(args: list[str]) -> None:
    process = exactmoe_process(*args)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("usage: exactmoe")


def test_the_version_is_the_package_s() -> None:
    process = exactmoe_process("--version")
    assert (process.returncode, process.stdout, process.stderr) == (0, f"exactmoe {exactmoe.__version__}\n", "")


def test_help_lists_every_command_with_its_line_and_the_exit_statuses() -> None:
    process = exactmoe_process("--help")
    assert (process.returncode, process.stderr) == (0, "")
    listed = [line.split()[0] for line in process.stdout.splitlines() if line.startswith("    ") and line[4] != " "]
    assert listed == list(cli.COMMANDS)
    assert "exit status, for every command" in process.stdout


def test_every_command_module_is_listed_and_every_listed_one_is_there() -> None:
    assert {path.stem for path in COMMANDS.glob("*.py")} - {"__init__"} == set(cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_s_help_has_examples_that_its_own_parser_accepts(name: str) -> None:
    process = exactmoe_process(name, "--help")
    assert (process.returncode, process.stderr) == (0, "")
    examples = [shlex.split(line)[1:] for line in process.stdout.splitlines() if line.startswith(f"  exactmoe {name}")]
    assert examples
    for example in examples:
        assert cli._parser(example).parse_args(example).command.__name__.endswith(f".{name}")


@pytest.mark.parametrize("args", [["--help"], *([name, "--help"] for name in cli.COMMANDS)], ids=" ".join)
def test_help_loads_no_heavy_package(args: list[str]) -> None:
    code = f"""
import sys
from exactmoe.cli.main import main
try:
    main({args!r})
except SystemExit as stop:
    assert stop.code == 0, stop.code
print("loaded:", *sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1].strip() == "loaded:"


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    code = """
import sys, types
from exactmoe.cli import main as cli
command = types.ModuleType("planted")
vars(command).update(HELP="", EXAMPLES="", configure=lambda parser: None, run=lambda args: print("yes") or 0)
sys.modules["exactmoe.cli.commands.planted"] = command
cli.COMMANDS = ("planted",)
sys.stdin.read()
sys.exit(cli.main(["planted"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 141


def test_progress_yields_every_item_and_writes_nothing_where_stderr_is_no_terminal(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert list(track(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert capfd.readouterr() == ("", "")


def test_progress_is_drawn_on_stderr_where_that_is_a_terminal() -> None:
    code = "from exactmoe.cli.progress import track; print(list(track('abc', 'letters')))"
    ours, theirs = pty.openpty()
    process = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        env=environment() | {"TERM": "xterm"},
    )
    os.close(theirs)
    drawn = os.read(ours, 65536).decode()
    os.close(ours)
    assert (process.returncode, process.stdout) == (0, "['a', 'b', 'c']\n")
    assert "letters" in drawn
