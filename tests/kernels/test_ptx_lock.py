"""The lock of the kernels' PTX: what changed is named, and what cannot be compared is no pass."""

import json
from pathlib import Path

import pytest

from exactmoe.kernels import ptx_lock
from exactmoe.kernels.errors import InvalidInput, MissingEnvironment
from exactmoe.kernels.ptx_lint import Found, Report
from exactmoe.kernels.ptx_lock import Lock, differences, lock_of, main, read_lock


def found(
    kernel: str = "_k",
    variant: str = "M=1",
    ptx: str = "a" * 64,
    arch: int = 90,
    warps: int = 4,
    registers: int | None = 32,
    barriers: int = 3,
) -> Found:
    return Found(kernel, variant, arch, {}, {}, {}, registers, 0, ptx, warps, 16, 100, barriers)


TAKES = "100 instructions, 3 barriers, 4 warps of 32 registers, 0 B stack, 16 B shared"


def test_a_lock_has_every_compilation_for_its_architecture() -> None:
    lock = lock_of([found(), found(ptx="b" * 64), found(arch=80, ptx="c" * 64), found("_j", "")])
    assert list(lock.kernels) == ["_j", "_k M=1"]
    assert [entry["ptx"][0] for entry in lock.kernels["_k M=1"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("after", "said"),
    [([found(ptx="b" * 64)], f"changed  _k M=1: aaaaaaaaaaaa {TAKES} -> bbbbbbbbbbbb"),
     ([found(warps=8)], "8 warps"), ([found(registers=40)], "40 registers"),
     ([found(barriers=9)], "9 barriers"),
     ([found(), found("_new")], "new      _new M=1"),
     ([found(variant="M=2")], "gone     _k M=1"),
     ([found(), found(ptx="b" * 64)], "changed  _k M=1")],
)  # fmt: skip
def test_what_changed_is_named(after: list[Found], said: str) -> None:
    lines = differences(lock_of([found()]), lock_of(after))
    assert any(said in line for line in lines)


def test_the_same_is_no_difference() -> None:
    assert differences(lock_of([found()]), lock_of([found()])) == []


def test_another_compiler_cannot_be_compared() -> None:
    lock = lock_of([found()])
    with pytest.raises(MissingEnvironment, match="not comparable"):
        differences(lock._replace(triton="2.0"), lock)


@pytest.mark.parametrize("of", [[], [found(arch=80)], [found(ptx="")], [found(registers=None)]])
def test_a_lock_of_nothing_is_refused(of: list[Found]) -> None:
    with pytest.raises(InvalidInput):
        lock_of(of)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"triton": "3"}'])
def test_a_missing_or_broken_lock_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "lock.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidInput, match=r"lock\.json"):
        read_lock(path)


def test_the_command_updates_checks_and_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    path = tmp_path / "ptx.lock.json"
    monkeypatch.setattr(ptx_lock, "read_lock", lambda: read_lock(path))
    monkeypatch.setattr(ptx_lock, "PATH", path)
    compiled = [found()]
    monkeypatch.setattr(ptx_lock, "lint_shipped", lambda archs, assembled: Report(compiled, []))
    assert main(["--check"]) == 2
    assert main(["--update"]) == 0
    assert main(["--check"]) == 0
    compiled[0] = found(ptx="b" * 64)
    assert main(["--check"]) == 1
    assert "changed  _k M=1" in capsys.readouterr().out
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "triton": "2.0"}))
    assert main(["--check"]) == 3
    assert Lock(**held) == lock_of([found()])
