"""Comparing two revisions: a planted slowdown is seen, noise is not, and nothing missing passes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exactmoe.bench import compare as comparing
from exactmoe.bench.compare import PAIRS, compare, judge, revisions, worker
from exactmoe.bench.worker import serve
from exactmoe.kernels.errors import InvalidInput, MissingEnvironment


def machine(factor: float, rng: np.random.Generator, drift: list[float], digest: str = "x") -> Callable[..., Any]:
    """A side that takes 10 us times `factor`, with 1% of noise of its own and a drift that both sides share."""

    def ask(_: str) -> dict[str, Any]:
        drift[0] *= 1 + 0.002 * rng.standard_normal()
        return {"us": 10 * factor * drift[0] * (1 + 0.01 * rng.standard_normal()), "equal": True, "digest": digest}

    return ask


def verdict(factor: float, rng: np.random.Generator) -> str:
    drift = [1.0]
    (found,) = compare(["x"], machine(1.0, rng, drift), machine(factor, rng, drift))
    return found.verdict


@pytest.mark.parametrize(("factor", "want"), [(1.03, "slower"), (0.97, "faster")])
def test_a_difference_of_three_in_a_hundred_is_seen_every_time(
    factor: float, want: str, rng: np.random.Generator
) -> None:
    assert [verdict(factor, rng) for _ in range(20)] == [want] * 20


def test_two_equal_sides_are_called_the_same(rng: np.random.Generator) -> None:
    assert [verdict(1.0, rng) for _ in range(40)].count("same") == 40


def test_a_median_within_the_margin_is_the_same_however_sure() -> None:
    found = judge("x", [10.0] * PAIRS, [10.05] * PAIRS, False)
    assert (found.verdict, found.ratio) == ("same", pytest.approx(1.005))


def test_numbers_that_changed_are_said() -> None:
    rng = np.random.default_rng(0)
    (found,) = compare(["x"], machine(1, rng, [1.0]), machine(0.5, rng, [1.0], digest="y"))
    assert found.numbers_changed
    assert "numbers changed" in str(found)


@pytest.mark.parametrize(
    ("answer", "want"),
    [({"error": "no benchmark x"}, "missing"), ({"us": None, "equal": False, "digest": "y"}, "wrong")],
)
@pytest.mark.parametrize("swap", [False, True])
def test_what_is_missing_or_wrong_on_one_side_does_not_pass(answer: dict[str, Any], want: str, swap: bool) -> None:
    good = machine(1, np.random.default_rng(0), [1.0])
    sides = (good, lambda _: answer) if not swap else (lambda _: answer, good)
    (found,) = compare(["x"], *sides)
    assert (found.verdict, found.passed) == (want, False)
    assert ("this revision" in found.why) != swap


def test_sides_are_asked_in_turn_and_the_order_changes() -> None:
    asked: list[str] = []

    def side(name: str) -> Callable[[str], dict[str, Any]]:
        def ask(_: str) -> dict[str, Any]:
            asked.append(name)
            return {"us": 1.0, "equal": True, "digest": "x"}

        return ask

    list(compare(["x"], side("A"), side("B"), 4))
    assert "".join(asked) == "ABBA" * 3


def test_a_worker_answers_a_line_with_a_line(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "echo.py").write_text(
        'import sys\nfor line in sys.stdin: print(\'{"name": "%s"}\' % line.strip(), flush=True)\n'
    )
    with worker(tmp_path, "q8_k", "echo") as ask:
        assert [ask("a"), ask("b")] == [{"name": "a"}, {"name": "b"}]


def test_a_worker_that_ends_is_an_error_with_what_it_said(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "broken.py").write_text("raise SystemExit('there is no GPU')\n")
    with worker(tmp_path, "q8_k", "broken") as ask, pytest.raises(MissingEnvironment, match="there is no GPU"):
        ask("a")


def test_names_are_answered_in_order_and_empty_lines_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    serve(["a\n", "\n", "b\n"], lambda name: {"us": len(name)}, sys.stdout)
    assert capsys.readouterr().out == '{"name": "a", "us": 1}\n{"name": "b", "us": 1}\n'


def test_a_revision_that_is_not_there_is_refused_and_leaves_no_worktree(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(comparing.__file__).resolve().parent.parent
    before = subprocess.run(["git", "-C", root, "worktree", "list"], capture_output=True, text=True, check=False).stdout
    with pytest.raises(InvalidInput, match="no-such-revision"), revisions("no-such-revision", "q8_k"):
        pass
    after = subprocess.run(["git", "-C", root, "worktree", "list"], capture_output=True, text=True, check=False).stdout
    assert before == after
