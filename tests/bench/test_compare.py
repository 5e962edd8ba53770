"""Comparing two revisions: a planted slowdown is seen, noise is not, and nothing missing passes."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exactmoe.bench import compare as comparing
from exactmoe.bench.compare import PAIRS, PAIRS_OF_STEPS, SAME, STRETCHES, compare, judge, revisions, worker
from exactmoe.bench.worker import RENEW, serve
from exactmoe.kernels.errors import InvalidInput, MissingEnvironment


@dataclass(frozen=True)
class Noise:
    """What a machine does to the logarithm of a time."""

    own: float = 0.01  # of a side, neighbours correlated by `alike`
    alike: float = 0.0
    drift: float = 0.002  # a step of a walk that both sides are on
    first: float = 0.0  # by how much whoever is asked first is slower
    rare: float = 0.0  # how often a time is far too long
    taker: float = 0.0  # by how much whoever takes its memory first is slower, in a stretch
    place: float = 0.0  # what a side's memory does in a stretch
    uneven: float = 0.0  # how often a side is 1 to 8% slower for a whole stretch


MACHINES = {
    "measured": Noise(own=0.002, drift=0.0002, place=0.001),  # an H100, see bench/NOTES.md
    "quiet": Noise(),
    "loud": Noise(own=0.03),
    "alike": Noise(own=0.02, alike=0.8),
    "first": Noise(first=0.03),
    "rare": Noise(alike=0.3, rare=0.15),
    "drifting": Noise(own=0.005, drift=0.01),
    "placed": Noise(taker=0.01, place=0.005),
    "uneven": Noise(alike=0.5, place=0.006, uneven=0.2),
}


def pairs(noise: Noise, factor: float, rng: np.random.Generator, count: int = PAIRS) -> tuple[Any, Any]:
    """Times of both sides, asked in turn as `compare` asks; this side takes `factor` as long."""
    walk = np.cumsum(noise.drift * rng.standard_normal(2 * count)).reshape(count, 2)
    shocks = noise.own * rng.standard_normal((count, 2))
    own = shocks.copy()
    for i in range(1, count):
        own[i] = noise.alike * own[i - 1] + np.sqrt(1 - noise.alike**2) * shocks[i]
    turn = np.arange(count) * STRETCHES // count + np.arange(count) % max(1, count // STRETCHES)
    late = (turn[:, None] + np.arange(2)) % 2  # 0 for the side that is asked first
    logs = own + np.take_along_axis(walk, late, 1) + noise.first * (late == 0)
    logs += rng.exponential(0.2, (count, 2)) * (rng.random((count, 2)) < noise.rare)
    stretch = np.arange(count) * STRETCHES // count
    logs += noise.taker * ((stretch[:, None] + np.arange(2)) % 2 == 0)
    logs += noise.place * rng.standard_normal((STRETCHES, 2))[stretch]
    logs += (rng.uniform(0.01, 0.08, (STRETCHES, 2)) * (rng.random((STRETCHES, 2)) < noise.uneven))[stretch]
    return 10 * np.exp(logs[:, 0]), 10 * factor * np.exp(logs[:, 1])


def verdicts(noise: Noise, factor: float, rng: np.random.Generator, trials: int = 200) -> Counter[str]:
    return Counter(judge("x", *pairs(noise, factor, rng), False).verdict for _ in range(trials))


@pytest.mark.parametrize("machine", MACHINES)
def test_two_equal_sides_are_called_the_same_at_least_97_times_in_100(machine: str, rng: np.random.Generator) -> None:
    assert verdicts(MACHINES[machine], 1.0, rng)["same"] >= 0.97 * 200


@pytest.mark.parametrize(("factor", "want"), [(1.03, "slower"), (0.97, "faster")])
@pytest.mark.parametrize("machine", MACHINES)
def test_a_difference_of_three_in_a_hundred_is_seen_at_least_95_times_in_100(
    machine: str, factor: float, want: str, rng: np.random.Generator
) -> None:
    assert verdicts(MACHINES[machine], factor, rng)[want] >= 0.95 * 200


@pytest.mark.parametrize(("factor", "want"), [(1.003, "same"), (1.01, "slower"), (0.99, "faster")])
def test_on_the_machine_that_was_measured_one_in_a_hundred_is_seen_and_three_in_a_thousand_are_none(
    factor: float, want: str, rng: np.random.Generator
) -> None:
    assert verdicts(MACHINES["measured"], factor, rng)[want] == 200


def test_the_interval_that_takes_neighbours_for_independent_cries_wolf(rng: np.random.Generator) -> None:
    """What the stretches are for: a bootstrap of 40 single pairs, on the machine whose neighbours are alike."""
    cries = 0
    for _ in range(200):
        before, after = pairs(MACHINES["alike"], 1.0, rng, 40)
        ratios = after / before
        medians = np.median(ratios[rng.integers(0, 40, (400, 40))], axis=1)
        low, high = np.quantile(medians, [0.005, 0.995])
        cries += not low <= 1 <= high and abs(np.median(ratios) - 1) > SAME
    assert cries > 0.15 * 200


def machine(factor: float, digest: str = "x", **more: Any) -> Callable[[str], dict[str, Any]]:
    """A side that takes 10 us times `factor`, and a little noise."""
    rng = np.random.default_rng(round(1000 * factor))
    return lambda _: {"us": factor * rng.uniform(9.99, 10.01), "equal": True, "digest": digest, **more}


def test_a_ratio_within_the_margin_is_the_same_however_sure() -> None:
    found = judge("x", [10.0] * PAIRS, [10.04] * PAIRS, False)
    assert (found.verdict, found.ratio) == ("same", pytest.approx(1.004))


@pytest.mark.parametrize("count", [0, 50, 2 * STRETCHES + 2])
def test_a_number_of_pairs_that_cannot_be_judged_is_refused_before_anything_is_timed(count: int) -> None:
    with pytest.raises(InvalidInput, match=f"pairs must be a multiple of {2 * STRETCHES}, got {count}"):
        list(compare(["x"], lambda _: pytest.fail("asked"), machine(1), count))


def test_of_what_takes_long_fewer_pairs_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [0.0], [0]

    def side(name: str) -> dict[str, Any]:
        asked[0] += name != RENEW
        now[0] += 0.2
        return {"us": 10.0, "equal": True, "digest": "x", "renewed": True}

    monkeypatch.setattr(comparing.time, "perf_counter", lambda: now[0])
    (found,) = compare(["x"], side, side)
    assert found.verdict == "same"
    assert asked[0] == 2 * (2 + 2) * STRETCHES


def test_an_answer_that_takes_long_once_later_on_changes_no_number_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [0.0], [0]

    def side(name: str) -> dict[str, Any]:
        asked[0] += name != RENEW
        now[0] += 0.2 if asked[0] > 500 else 0.0
        return {"us": 10.0, "equal": True, "digest": "x", "renewed": True}

    monkeypatch.setattr(comparing.time, "perf_counter", lambda: now[0])
    (found,) = compare(["x"], side, side)
    assert found.verdict == "same"
    assert asked[0] == 2 * (2 * STRETCHES + PAIRS)


@pytest.mark.parametrize(
    ("machine", "alarms", "seen"), [("measured", 0, 200), ("quiet", 6, 200), ("loud", 6, 110), ("uneven", 6, 150)]
)
def test_forty_pairs_as_of_whole_models_cry_no_more_and_see_less(
    machine: str, alarms: int, seen: int, rng: np.random.Generator
) -> None:
    equal, slower = Counter[str](), Counter[str]()
    for _ in range(200):
        equal[judge("x", *pairs(MACHINES[machine], 1.0, rng, PAIRS_OF_STEPS), False).verdict] += 1
        slower[judge("x", *pairs(MACHINES[machine], 1.03, rng, PAIRS_OF_STEPS), False).verdict] += 1
    assert 200 - equal["same"] <= alarms
    assert slower["slower"] >= seen


def test_the_stretches_of_each_benchmark_are_told_as_they_go_by() -> None:
    told: list[tuple[str, int]] = []

    def progress(stretches: Iterable[int], name: str) -> Iterator[int]:
        for stretch in stretches:
            told.append((name, stretch))
            yield stretch

    assert len(list(compare(["x", "y"], machine(1), machine(1), 2 * STRETCHES, progress))) == 2
    assert told == [(name, stretch) for name in "xy" for stretch in range(STRETCHES)]


def test_numbers_that_changed_are_said() -> None:
    (found,) = compare(["x"], machine(1), machine(0.5, digest="y"))
    assert found.numbers_changed
    assert "numbers changed" in str(found)


def test_what_was_planted_is_said_with_the_verdict() -> None:
    (found,) = compare(["x"], machine(1), machine(1.03, planted=0.0302))
    assert (found.verdict, found.planted) == ("slower", 0.0302)
    assert "planted +3.02%" in str(found)
    asks, good = [0], machine(1.03)

    def side(name: str) -> dict[str, Any]:
        asks[0] += 1
        return {**good(name), "renewed": True, "planted": 0.03 if 50 < asks[0] < 900 else 0.3}

    (found,) = compare(["x"], machine(1), side)
    assert found.planted == 0.03


@pytest.mark.parametrize("count", [0, STRETCHES, 2 * STRETCHES - 2, 2 * STRETCHES + 1, 3 * STRETCHES])
def test_too_few_pairs_and_half_a_turn_are_refused(count: int) -> None:
    with pytest.raises(InvalidInput, match=f"{count} pairs"):
        judge("x", [1.0] * count, [1.0] * count, False)


@pytest.mark.parametrize(
    ("answer", "want"),
    [({"error": "no benchmark x"}, "missing"), ({"us": None, "equal": False, "digest": "y"}, "wrong")],
)
@pytest.mark.parametrize("swap", [False, True])
def test_what_is_missing_or_wrong_on_one_side_does_not_pass(answer: dict[str, Any], want: str, swap: bool) -> None:
    good = machine(1)
    sides = (good, lambda _: answer) if not swap else (lambda _: answer, good)
    (found,) = compare(["x"], *sides)
    assert (found.verdict, found.passed) == (want, False)
    assert ("this revision" in found.why) != swap


@pytest.mark.parametrize("renews", [True, False])
def test_sides_are_asked_in_turn_and_the_order_changes_and_so_who_takes_memory_first(renews: bool) -> None:
    asked: list[str] = []

    def side(name: str) -> Callable[[str], dict[str, Any]]:
        def ask(what: str) -> dict[str, Any]:
            asked.append(name.lower() if what == RENEW else name)
            if what == RENEW:
                return {"renewed": True} if renews else {"error": "this revision has no benchmark renew"}
            return {"us": 1.0, "equal": True, "digest": "x"}

        return ask

    (found,) = compare(["x"], side("A"), side("B"), 2 * STRETCHES)
    first, second = "ABBA", "BAAB"
    if renews:
        assert "".join(asked) == ("ab" + 2 * first + "ab" + 2 * second) * (STRETCHES // 2)
    else:  # what stays where it is warms up once
        assert (
            "".join(asked)
            == "ab" + first + (first + "ab" + second + "ab") * (STRETCHES // 2 - 1) + first + "ab" + second
        )
    assert found.verdict == "same"


def test_a_side_that_is_slow_because_it_takes_its_memory_second_is_not_slower() -> None:
    taken: list[str] = []

    def side(name: str) -> Callable[[str], dict[str, Any]]:
        def ask(what: str) -> dict[str, Any]:
            if what == RENEW:
                taken.clear()
                return {"renewed": True}
            if name not in taken:
                taken.append(name)
            return {"us": 10.3 if taken.index(name) else 10.0, "equal": True, "digest": "x"}

        return ask

    (found,) = compare(["x"], side("A"), side("B"))
    assert found.verdict == "same"


def test_times_of_another_meaning_are_not_compared() -> None:
    with pytest.raises(InvalidInput, match="clock measures something else"):
        list(compare(["x"], machine(1), machine(1, method=2)))
    (found,) = compare(["x"], machine(1, method=2), machine(1, method=2))
    assert found.verdict == "same"


def test_a_worker_answers_a_line_with_a_line(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "echo.py").write_text(
        'import sys\nfor line in sys.stdin: print(\'{"name": "%s"}\' % line.strip(), flush=True)\n'
    )
    with worker(tmp_path, ["q8_k"], "echo") as ask:
        assert [ask("a"), ask("b")] == [{"name": "a"}, {"name": "b"}]


def test_a_worker_that_ends_is_an_error_with_what_it_said(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "broken.py").write_text("raise SystemExit('there is no GPU')\n")
    with worker(tmp_path, ["q8_k"], "broken") as ask, pytest.raises(MissingEnvironment, match="there is no GPU"):
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
