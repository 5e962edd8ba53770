"""Time calls on a CUDA device: events around a graph that holds every call, behind another replay of it.

The calls of a graph are the same work on different memory, copies whose weights together exceed the L2 cache many times
over, so that each reads its own from memory. With one copy the cache is warm.

On an idle device a graph starts some microseconds after the event in front of it, now 3 and now 8: of a graph of 150 us
that is 4% too much, and noise of 2%. So a replay in front keeps the device busy until event and graph are in its queue,
and a graph lasts `GRAPH_US` or more.

A device that was idle, or busy with little, is up to 5% slower at what multiplies, for up to 0.2 s: a third of the
samples of some kernels and all of others. So a row's samples begin after `SETTLED_US` of the same work."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

# Counted up when times come to mean something else: those of a row, and of a replay, by which revisions are compared.
# 1 had idle starts in them, and weights from the cache; rows of 2 began before the device had settled.
METHOD, REPLAY_METHOD = 3, 2
GRAPH_US = 1000.0
SETTLED_US = 250_000.0
_AT_MOST_US = 20_000.0  # 99 copies of attention over 4,096 tokens would last two seconds
ROTATED = 16 * 50 * 2**20  # bytes of weights, 16 times the L2 of an H100: with 4, some kernels are a sixth too fast


class Times(NamedTuple):
    """Microseconds of one call."""

    median: float
    p10: float
    p90: float

    @staticmethod
    def of(samples: Sequence[float]) -> "Times":
        """The quantiles of some samples, at least one."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        return Times(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])


class Sampler(Protocol):
    """Gives microseconds of each of the `calls` in `work`, for so many rounds behind those that only warm up.

    What `prepare` does or puts into the device's queue comes in front of every round and is not timed."""

    def __call__(
        self, prepare: Callable[[], None], work: Callable[[], object], rounds: int, warmup: int = 0, calls: int = 1
    ) -> list[float]: ...


def sample(
    prepare: Callable[[], None], work: Callable[[], object], rounds: int, warmup: int = 0, calls: int = 1
) -> list[float]:
    """The sampler of `exactmoe bench`."""
    found = []
    for _ in range(warmup + rounds):
        prepare()
        found.append(elapsed(work) / calls)
    return found[warmup:]


def time_graph(
    calls: Sequence[Callable[[], object]],
    samples: int = 30,
    sampler: Sampler = sample,
    settled_us: float = SETTLED_US,
) -> Times:
    """Time `calls`, each of them as often in a graph as the others; a sample is the mean of a replay behind another,
    after `settled_us` of the same."""
    work, graph = enough(calls)
    warmup = math.ceil(settled_us / (2 * replay_us(graph)))
    return Times.of(sampler(graph.replay, graph.replay, samples, warmup, len(work)))


def enough(calls: Sequence[Callable[[], object]]) -> tuple[list[Callable[[], object]], torch.cuda.CUDAGraph]:
    """`calls` over and over, so often that a graph of them lasts `GRAPH_US`, and that graph.

    Of long calls, which are not held up by memory, only as many as last `_AT_MOST_US`, and at least two."""
    one = replay_us(capture(calls[:1]))
    work = list(calls[: max(2, math.ceil(_AT_MOST_US / one))])
    graph = capture(work)
    times = math.ceil(GRAPH_US / replay_us(graph))
    if times > 1:
        work *= times
        graph = capture(work)
    return work, graph


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of `calls`, in order, replayed once."""
    for call in calls:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of a replay, started behind another one."""
    graph.replay()
    return elapsed(graph.replay)


def elapsed(call: Callable[[], object]) -> float:
    """Microseconds that a call keeps the device busy."""
    first = Reading()
    call()
    return (Reading() - first) * 1e6


spin: Callable[[int], None] = torch.cuda._sleep  # noqa: SLF001 - torch has no other
"""A launch that does nothing for so many cycles."""


def keep_busy(device: torch.device) -> None:
    """A second of work in the device's queue; does not wait for it."""
    with torch.cuda.device(device):
        spin(2 * 10**9)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class Reading:
    """A point in the device's queue, taken without waiting for it.

    The difference of two is what the device did between them, in seconds, a share of it for each of `calls`. It waits
    for both, so a timer of readings times work that was queued behind other work."""

    def __init__(self, calls: int = 1) -> None:
        self._calls = calls
        self._event = _event()
        self._event.record()

    def __sub__(self, earlier: "Reading") -> float:
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1000 / self._calls


def copy_bandwidth(device: torch.device) -> float:
    """GB/s that a copy of 1 GiB reads and writes: the roof of what only moves bytes."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = time_graph([lambda: target.copy_(source)], 10)
    return 2 * source.numel() / times.median / 1000


def matmul_rate(device: torch.device) -> float:
    """TFLOP/s of the library's fp16 matrix product of 8,192: the roof of what multiplies.

    A quarter of a second of it brings an H100 to the limit of its power, and 765 down to 651 to 718."""
    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.float16, device=device) for _ in range(2))
    times = time_graph([lambda: a @ b], 5, settled_us=0)
    return float(2 * n**3 / times.median / 1e6)


def host_bandwidth(device: torch.device) -> float:
    """GB/s of copying 1 GiB of the host's ordinary memory to the device: the roof of loading a file that is cached."""
    source = torch.ones(2**30, dtype=torch.uint8)
    target = torch.empty_like(source, device=device)
    return source.numel() / Times.of([elapsed(lambda: target.copy_(source)) for _ in range(5)]).median / 1000
