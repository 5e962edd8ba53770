"""The benchmarks under pytest-benchmark:      pytest bench/

The clock is the device's. A round replays a graph of a millisecond or more that holds the call on several copies of its
weights, so the times in the table are of all its calls, and of its start, which is some microseconds: `extra_info` says
how many calls, and holds the digest of the output."""

from functools import cache

import pytest
import torch

from exactmoe.bench.cases import Bench, benches
from exactmoe.bench.clock import DeviceTimer, capture, enough
from exactmoe.bench.run import calls_of, judge
from exactmoe.kernels.launch import resolve_device


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """A CUDA device; without one there is nothing to time, and that is a failure."""
    return resolve_device("cuda")


@cache
def _timer() -> DeviceTimer:
    return DeviceTimer()


def device_seconds() -> float:
    """The clock of the device that the benchmarks run on."""
    return _timer()()


@pytest.mark.benchmark(timer=device_seconds)
@pytest.mark.parametrize("bench", benches().values(), ids=lambda bench: bench.name)
def test_bench(bench: Bench, cuda: torch.device, benchmark) -> None:  # type: ignore[no-untyped-def]
    """Judge, then time."""
    equal, digest = judge(bench.case, cuda)
    assert equal, "its bits are not the reference's, so it has no speed"
    calls = enough(list(calls_of(bench, bench.case.on(cuda))))
    graph = capture(calls)
    benchmark.extra_info |= {"calls": len(calls), "weight_bytes": bench.weight_bytes, "digest": digest}
    benchmark.pedantic(graph.replay, rounds=20, warmup_rounds=2)
