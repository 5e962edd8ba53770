"""The clock: what lies between its events, and how much is put there. The events themselves need a GPU."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from exactmoe.bench import clock


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was put in the device's queue, with a clock that reads 1 ms a graph."""
    put: list[str] = []

    class Event:
        def record(self) -> None:
            put.append("event")
            self.at = put.count("graph")

        def synchronize(self) -> None:
            put.append("wait")

        def elapsed_time(self, last: "Event") -> float:
            return float(last.at - self.at)

    monkeypatch.setattr(clock, "_event", Event)
    return put


class Graph:
    def __init__(self, queue: list[str]) -> None:
        self.queue = queue

    def replay(self) -> None:
        self.queue.append("graph")


def test_a_replay_is_timed_behind_another_and_nothing_waits_between(queue: list[str]) -> None:
    assert clock.replay_us(Graph(queue)) == pytest.approx(1000.0)
    assert queue == ["graph", "event", "graph", "event", "wait"]


def test_a_difference_of_readings_is_in_seconds_a_call_and_alone_waits(queue: list[str]) -> None:
    graph = Graph(queue)
    first = clock.Reading(8)
    graph.replay()
    graph.replay()
    last = clock.Reading(8)
    assert "wait" not in queue
    assert last - first == pytest.approx(2e-3 / 8)
    assert queue == ["event", "graph", "graph", "event", "wait"]


@pytest.fixture
def call_us(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A graph is the tuple of its calls, each of which takes what the list says last."""
    us = [0.0]
    monkeypatch.setattr(clock, "capture", tuple)
    monkeypatch.setattr(clock, "replay_us", lambda graph: us[-1] * len(graph))
    return us


@pytest.mark.parametrize(("us", "times"), [(0.5, 1000), (150.0, 4), (499.0, 2), (500.0, 1), (5000.0, 1)])
def test_calls_are_repeated_in_order_until_their_graph_lasts(us: float, times: int, call_us: list[float]) -> None:
    call_us.append(us)
    calls = [lambda: "first", lambda: "second"]
    assert clock.enough(calls) == (times * calls, tuple(times * calls))


@pytest.mark.parametrize(("us", "graphs"), [(150.0, [1, 2, 8]), (499.0, [1, 2, 4]), (500.0, [1, 2]), (5000.0, [1, 2])])
def test_a_graph_that_lasts_is_not_captured_twice(
    us: float, graphs: list[int], call_us: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    call_us.append(us)
    captured: list[int] = []

    def capture(calls: list[Callable[[], object]]) -> tuple[Callable[[], object], ...]:
        captured.append(len(calls))
        return tuple(calls)

    monkeypatch.setattr(clock, "capture", capture)
    clock.enough([lambda: "first", lambda: "second"])
    assert captured == graphs


@pytest.mark.parametrize(
    ("us", "taken"), [(19.0, 1000), (20.0, 1000), (200.0, 100), (3000.0, 7), (10000.0, 2), (1e6, 2)]
)
def test_of_long_calls_no_more_are_taken_than_a_graph_may_last(us: float, taken: int, call_us: list[float]) -> None:
    call_us.append(us)
    calls = [lambda i=i: i for i in range(1000)]
    assert clock.enough(calls) == (calls[:taken], tuple(calls[:taken]))


def test_a_sample_is_the_mean_of_a_graphs_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    # Of one call, of five, and of a graph that has them twice: how long it lasts, two rounds that warm up, and three.
    times = iter([100.0, 500.0, 1000.0, 1200.0, 1200.0, 990.0, 1000.0, 1010.0])

    def elapsed(call: Callable[[], object]) -> float:
        call()
        done.append("timed")
        return next(times)

    monkeypatch.setattr(clock, "capture", lambda _: SimpleNamespace(replay=lambda: done.append("replay")))
    monkeypatch.setattr(clock, "elapsed", elapsed)
    assert clock.time_graph([lambda: None] * 5, 3, settled_us=4000.0) == clock.Times(100.0, 99.0, 101.0)
    assert done[-15:] == ["replay", "replay", "timed"] * 5


@pytest.mark.parametrize(("us", "rounds"), [(50.0, 125), (400.0, 79), (10_000.0, 7), (1e6, 1)])
def test_a_device_settles_for_a_quarter_of_a_second(us: float, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []

    def sampler(prepare: object, work: object, rounds: int, warmup: int = 0, calls: int = 1) -> list[float]:
        asked.append((rounds, warmup, calls))
        return [1.0]

    monkeypatch.setattr(clock, "capture", lambda calls: SimpleNamespace(replay=None, us=us * len(calls)))
    monkeypatch.setattr(clock, "replay_us", lambda graph: graph.us)
    clock.time_graph([lambda: None] * 2, 30, sampler)
    ((samples, warmup, calls),) = asked
    assert (samples, warmup) == (30, rounds)
    assert 2 * warmup * calls * us >= 250_000


def test_the_roof_of_what_multiplies_is_that_of_a_device_with_power_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[object] = []
    monkeypatch.setattr(clock, "capture", lambda calls: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(clock, "replay_us", lambda graph: 1400.0)
    monkeypatch.setattr(clock, "elapsed", lambda work: timed.append(work) or 2048.0)
    assert clock.matmul_rate(torch.device("meta")) == pytest.approx(2 * 8192**3 / 2048e-6 / 1e12)
    assert len(timed) == 5


def test_a_round_is_prepared_and_what_warms_up_does_not_count(queue: list[str]) -> None:
    graph = Graph(queue)
    assert clock.sample(lambda: queue.append("prepared"), graph.replay, 3, warmup=2, calls=4) == pytest.approx(
        [250.0] * 3
    )
    assert queue == ["prepared", "event", "graph", "event", "wait"] * 5
