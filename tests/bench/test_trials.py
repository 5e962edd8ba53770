"""Trials of a comparison: how often it said what, with an interval that holds; and the slowdown that is planted."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from exactmoe.bench import clock
from exactmoe.bench import compare as comparing
from exactmoe.bench import plant as planting
from exactmoe.bench import run as running
from exactmoe.bench.compare import Verdict
from exactmoe.bench.plant import calibrate, spinning
from exactmoe.bench.trials import lines, tally, wilson
from exactmoe.bench.worker import timer
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
    assert found == pytest.approx(0.03, rel=0.1)


def test_a_spin_is_found_where_the_first_line_through_two_points_misses_it() -> None:
    assert calibrate(0.03, lambda cycles: 1e-7 * cycles**1.5, 500) == pytest.approx(0.03, rel=0.1)


@pytest.mark.parametrize("measure", [lambda cycles: 0.05 + 1e-6 * cycles, lambda cycles: 0.01])
def test_no_spin_is_found_where_one_takes_too_long_or_changes_nothing(measure: Callable[[int], float]) -> None:
    assert calibrate(0.03, measure, 2000) is None


@pytest.mark.parametrize(("every", "order"), [(1, "cscscscscs"), (2, "ccsccscs"), (5, "cccccs"), (9, "cccccs")])
def test_spins_stand_behind_the_calls(every: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(planting, "spin", lambda cycles: ran.append("s" if cycles == 7 else "?"))
    for call in spinning([lambda: ran.append("c")] * 5, every, 7):
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


def test_a_worker_with_a_share_plants_it_and_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[float] = []
    graph = SimpleNamespace(replay=lambda: None)

    def plant(calls: list[Any], share: float) -> tuple[Any, float]:
        graphs.append(share)
        if len(graphs) > 1:
            raise InvalidInput("a delay cannot be planted")
        return graph, 0.031

    monkeypatch.setattr(launch, "resolve_device", lambda _="auto": torch.device("cpu"))
    monkeypatch.setattr(running, "judge", lambda case, device: (True, "d"))
    monkeypatch.setattr(running, "calls_of", lambda bench, args: [lambda: None] * 3)
    monkeypatch.setattr(clock, "capture", lambda calls: graph)
    monkeypatch.setattr(clock, "enough", lambda calls: 3 * calls)
    monkeypatch.setattr(clock, "replay_us", lambda graph: 90.0)
    monkeypatch.setattr(planting, "planted", plant)
    answer = timer("q8_k", 0.03)
    assert answer("qkv") == {"us": 10.0, "method": clock.METHOD, "equal": True, "digest": "d", "planted": 0.031}
    assert answer("router") == {"error": "a delay cannot be planted"}
    assert timer("q8_k")("qkv") == {"us": 10.0, "method": clock.METHOD, "equal": True, "digest": "d"}
    assert graphs == [0.03, 0.03]
