"""Trials of a comparison: how often it said what, with an interval that holds; and the slowdown that is planted."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exactmoe.bench import clock
from exactmoe.bench import compare as comparing
from exactmoe.bench import plant as planting
from exactmoe.bench import run as running
from exactmoe.bench.compare import Verdict
from exactmoe.bench.plant import Spins, calibrate, planted, spinning, spins
from exactmoe.bench.trials import lines, tally, wilson
from exactmoe.bench.worker import RENEW, timer
from exactmoe.cli.main import main
from exactmoe.kernels import launch
from exactmoe.kernels.errors import InvalidInput


@pytest.mark.parametrize(
    ("seen", "of", "low", "high"),
    [(0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0), (1, 20, 0.0089, 0.2361), (50, 100, 0.4038, 0.5962)],
)
def test_wilsons_interval_is_the_one_of_the_books(seen: int, of: int, low: float, high: float) -> None:
    assert wilson(seen, of)[2:] == pytest.approx((low, high), abs=1e-4)


def test_wilsons_interval_holds_the_true_rate_nineteen_times_in_twenty(rng: np.random.Generator) -> None:
    rates = [wilson(int(n), 40) for n in rng.binomial(40, 0.1, 2000)]
    assert 0.93 <= np.mean([rate.low <= 0.1 <= rate.high for rate in rates]) <= 0.98


def test_every_verdict_is_counted_and_the_three_that_can_be_are_said_even_at_none() -> None:
    said = ["same"] * 8 + ["slower", "missing"]
    rates = tally([Verdict("a", verdict) for verdict in said] + [Verdict("b", "faster")])
    assert {name: {v: rate[:2] for v, rate in found.items()} for name, found in rates.items()} == {
        "a": {"faster": (0, 10), "slower": (1, 10), "same": (8, 10), "missing": (1, 10)},
        "b": {"faster": (1, 1), "slower": (0, 1), "same": (0, 1)},
    }
    assert "slower 1 of 10 (1.8 to 40.4%)" in lines(rates)[0]


@pytest.mark.parametrize(("fixed", "slope"), [(0.0, 1e-5), (0.012, 3e-6), (0.029, 1e-4)])
def test_a_spin_is_found_whose_length_gives_the_share(fixed: float, slope: float, rng: np.random.Generator) -> None:
    def measure(cycles: int) -> float:
        return fixed + slope * cycles + 1e-4 * rng.standard_normal()

    found = calibrate(0.03, measure, 2000)
    assert found is not None
    assert fixed + slope * found == pytest.approx(0.03, rel=0.12)


def test_a_spin_is_found_where_the_first_line_through_two_points_misses_it() -> None:
    found = calibrate(0.03, lambda cycles: 1e-7 * cycles**1.5, 500)
    assert found is not None
    assert 1e-7 * found**1.5 == pytest.approx(0.03, rel=0.1)


@pytest.mark.parametrize("measure", [lambda cycles: 0.05 + 1e-6 * cycles, lambda cycles: 0.01])
def test_no_spin_is_found_where_one_takes_too_long_or_changes_nothing(measure: Callable[[int], float]) -> None:
    assert calibrate(0.03, measure, 2000) is None


@pytest.mark.parametrize(("every", "order"), [(1, "cscscscscs"), (2, "ccsccscs"), (5, "cccccs"), (9, "cccccs")])
def test_spins_stand_behind_the_calls(every: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(planting, "spin", lambda cycles: ran.append("s" if cycles == 7 else "?"))
    for call in spinning([lambda: ran.append("c")] * 5, Spins(every, 7)):
        call()
    assert "".join(ran) == order


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Workers without a GPU: 10 us, and what is planted on top. The list is of the plants asked for."""
    asked: list[Any] = []

    @contextmanager
    def revisions(rev: str, profile: str, plant: float | None = None, model: str | None = None) -> Iterator[Any]:
        asked.append(plant)
        plain = {"us": 10.0, "equal": True, "digest": "x"}
        slow = {**plain, "us": 10 * (1 + plant), "planted": plant} if plant else plain
        yield lambda _: plain, lambda _: slow

    monkeypatch.setattr(comparing, "revisions", revisions)
    monkeypatch.setattr(launch, "resolve_device", lambda _="auto": torch.device("cpu"))
    return asked


def test_the_command_repeats_the_whole_comparison_and_reports_the_rates(
    sides: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["bench", "qkv", "router", "--compare", "HEAD", "--trials", "4"]) == 0
    assert sides == [None] * 4
    assert "slower 0 of 4 (0.0 to 49.0%), same 4 of 4 (51.0 to 100.0%)" in capsys.readouterr().out
    out = tmp_path / "found.json"
    assert main(["bench", "qkv", "--compare", "HEAD", "--trials", "3", "--plant", "3", "--json", str(out)]) == 1
    found = json.loads(out.read_text())
    assert sides[4:] == [0.03] * 3
    assert found["rates"]["qkv"]["slower"]["seen"] == 3
    assert [(verdict["verdict"], verdict["planted"]) for verdict in found["verdicts"]] == [("slower", 0.03)] * 3


@pytest.mark.parametrize(
    "options",
    [["--trials", "3"], ["--plant", "3"], ["--compare", "HEAD", "--plant", "0"], ["--compare", "H", "--trials", "0"]],
)
def test_trials_and_plants_that_mean_nothing_are_refused(options: list[str], sides: list[Any]) -> None:
    try:
        status = main(["bench", "qkv", *options])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert sides == []


class Device:
    """One on which a call takes 10 us, and a spin 1 us and its cycles, of which there are 1000 in a microsecond.

    A graph is the list of what it holds; between two spins of a graph less than `apart` calls are too few."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, launch_us: float) -> None:
        self.launch_us = launch_us
        self.captured = 0
        monkeypatch.setattr(planting, "spin", lambda cycles: self.ran.append(launch_us + cycles / 1000))
        monkeypatch.setattr(planting, "capture", self.capture)
        monkeypatch.setattr(planting, "replay_us", sum)
        self.ran: list[float] = []

    def call(self) -> None:
        self.ran.append(10.0)

    def capture(self, calls: list[Callable[[], object]]) -> list[float]:
        self.captured += 1
        self.ran = []
        for call in calls:
            call()
        return self.ran


@pytest.mark.parametrize(("launch_us", "every"), [(0.1, 1), (0.5, 2), (1.0, 4), (9.0, 32)])
def test_so_few_spins_are_planted_that_their_launches_do_not_take_longer(
    launch_us: float, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch, launch_us)
    calls = [device.call] * 64
    where = spins(calls, 0.03)
    assert where.every == every
    device.captured = 0
    graph, share = planted(calls, where)
    assert device.captured == 2, "it is not sought again"
    assert share == pytest.approx(0.03, rel=0.1)
    assert sum(graph) == pytest.approx(640 * 1.03, rel=0.003)  # type: ignore[call-overload]


def test_a_share_that_one_spin_exceeds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, 9.0)
    with pytest.raises(InvalidInput, match=r"a delay of 3% of 40\.0 us cannot be planted"):
        spins([device.call] * 4, 0.03)


def test_a_worker_with_a_share_seeks_it_once_and_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    sought: list[float] = []
    placed: list[Spins] = []

    def seek(calls: list[Any], share: float) -> Spins:
        sought.append(share)
        if len(sought) > 1:
            raise InvalidInput("a delay cannot be planted")
        return Spins(2, 300)

    def plant(calls: list[Any], where: Spins) -> tuple[Any, float]:
        placed.append(where)
        return "slower graph", 0.03 + 0.001 * len(placed)

    monkeypatch.setattr(launch, "resolve_device", lambda _="auto": torch.device("cpu"))
    monkeypatch.setattr(running, "judge", lambda case, device: (True, "d"))
    monkeypatch.setattr(running, "calls_of", lambda bench, args: [lambda: None] * 3)
    monkeypatch.setattr(clock, "enough", lambda calls: (3 * calls, "graph"))
    monkeypatch.setattr(clock, "replay_us", {"graph": 81.0, "slower graph": 90.0}.__getitem__)
    monkeypatch.setattr(planting, "spins", seek)
    monkeypatch.setattr(planting, "planted", plant)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    answer = timer("q8_k", 0.03)
    said = {"us": 10.0, "method": clock.REPLAY_METHOD, "equal": True, "digest": "d"}
    assert answer("qkv") == answer("qkv") == {**said, "planted": 0.031}
    assert answer(RENEW) == {"renewed": True}
    assert answer("qkv") == {**said, "planted": 0.032}
    assert (sought, placed) == ([0.03], [Spins(2, 300)] * 2)
    assert answer("router") == {"error": "a delay cannot be planted"}
    assert timer("q8_k")("qkv") == {**said, "us": 9.0}
