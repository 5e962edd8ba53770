"""The benchmarks under pytest-benchmark, on a device that is a list: what is queued, and what the table says of it."""

import json

import pytest

pytest_plugins = ["pytester"]

# A device whose queue is a list and whose graphs take 1 ms each; 8 calls a graph; one benchmark of the table.
DEVICE = """
from pathlib import Path

import pytest
import torch

from exactmoe.bench import clock, test_bench

QUEUE = []


class Event:
    def record(self):
        QUEUE.append("event")
        self.at = QUEUE.count("graph")

    def synchronize(self):
        QUEUE.append("wait")

    def elapsed_time(self, last):
        return float(last.at - self.at)


class Graph:
    def replay(self):
        QUEUE.append("graph")


@pytest.fixture(autouse=True, scope="session")
def device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "_event", Event)
        patch.setattr(test_bench, "resolve_device", lambda _: torch.device("cpu"))
        patch.setattr(test_bench, "judge", lambda case, device: (%s, "the digest"))
        patch.setattr(test_bench, "calls_of", lambda bench, args: iter([lambda: None] * 8))
        patch.setattr(test_bench, "enough", list)
        patch.setattr(test_bench, "capture", lambda calls: Graph())
        yield
    Path("queue.txt").write_text(" ".join(QUEUE))
"""


@pytest.fixture
def run(pytester: pytest.Pytester):
    def run(equal: bool) -> pytest.RunResult:
        pytester.makeconftest(DEVICE % equal)
        pytester.makepyfile(test_them="from exactmoe.bench.test_bench import cuda, test_bench")
        options = ("--benchmark-only", "--benchmark-json=found.json", "-p", "no:cacheprovider", "-p", "no:xdist")
        return pytester.runpytest_subprocess(*options, "-k", "router and not logits", "-W", "ignore")

    return run


def test_seconds_are_of_a_call_and_a_round_is_behind_another_replay(run, pytester: pytest.Pytester) -> None:
    run(True).assert_outcomes(passed=1, deselected=45)
    (found,) = json.loads((pytester.path / "found.json").read_text())["benchmarks"]
    assert found["name"] == "test_bench[router]"
    assert found["stats"]["data"] == pytest.approx([1e-3 / 8] * 20)
    assert found["extra_info"]["calls"] == 8
    assert found["extra_info"]["digest"] == "the digest"
    assert found["options"]["timer"].endswith("device_clock")
    rounds = 20 + 2
    assert (pytester.path / "queue.txt").read_text().split() == ["graph", "event", "graph", "event", "wait"] * rounds


def test_what_is_not_the_references_bits_fails_and_is_not_timed(run, pytester: pytest.Pytester) -> None:
    run(False).assert_outcomes(failed=1, deselected=45)
    assert not (pytester.path / "queue.txt").read_text()
