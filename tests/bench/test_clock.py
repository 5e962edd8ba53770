"""The clock: what lies between its events, and how much is put there. The events themselves need a GPU."""

import pytest

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
    assert clock.replay_us(Graph(queue)) == 1000.0
    assert queue == ["graph", "event", "graph", "event", "wait"]


@pytest.mark.parametrize(("us", "times"), [(1.0, 1000), (300.0, 4), (999.0, 2), (1000.0, 1), (5000.0, 1)])
def test_calls_are_repeated_in_order_until_their_graph_lasts(
    us: float, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [lambda: "first", lambda: "second"]
    monkeypatch.setattr(clock, "capture", lambda work: pytest.fail("other work") if list(work) != calls else "graph")
    monkeypatch.setattr(clock, "replay_us", lambda graph: us)
    assert clock.enough(calls) == times * calls


def test_a_sample_is_the_mean_of_a_graphs_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([500.0, 990.0, 1000.0, 1010.0])
    monkeypatch.setattr(clock, "capture", list)
    monkeypatch.setattr(clock, "replay_us", lambda _: next(times))
    assert clock.time_graph([lambda: None] * 5, 3) == clock.Times(100.0, 99.0, 101.0)
