"""The benchmarks under pytest-benchmark:      pytest bench/

The clock is the device's, and the table's times are of a call. A round replays a graph of a millisecond or more that
holds the call on several copies of its weights, behind another replay of it, as `exactmoe bench` does. `extra_info`
says how many calls that is, and holds the digest of the output."""

import pytest
import torch

from exactmoe.bench.cases import Bench, benches
from exactmoe.bench.clock import Reading, capture, enough
from exactmoe.bench.run import calls_of, judge
from exactmoe.kernels.launch import resolve_device


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """A CUDA device; without one there is nothing to time, and that is a failure."""
    return resolve_device("cuda")


class DeviceClock:
    """A timer for pytest-benchmark, which takes the difference of two readings."""

    __name__ = "device_clock"
    calls = 1  # between two readings

    def __call__(self) -> Reading:
        """The point that the device's queue has come to; waits for nothing."""
        return Reading(self.calls)


CLOCK = DeviceClock()


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("bench", benches().values(), ids=lambda bench: bench.name)
def test_bench(bench: Bench, cuda: torch.device, benchmark) -> None:  # type: ignore[no-untyped-def]
    """Judge, then time."""
    equal, digest = judge(bench.case, cuda)
    assert equal, "its bits are not the reference's, so it has no speed"
    calls = enough(list(calls_of(bench, bench.case.on(cuda))))
    graph = capture(calls)
    benchmark.extra_info |= {"calls": len(calls), "weight_bytes": bench.weight_bytes, "digest": digest}
    CLOCK.calls = len(calls)
    benchmark.pedantic(graph.replay, setup=graph.replay, rounds=20, warmup_rounds=2)
