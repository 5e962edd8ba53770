"""The whole decode step of a model: its speed at a context, and where its time goes.

time_step(model, context)           microseconds a token, a run of TOKENS tokens after another
trace_step(model, context, path)    a profile of a few steps in the Chrome format, which Perfetto opens
summary(trace)                      that profile by kernel"""

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from exactmoe.bench.clock import elapsed
from exactmoe.kernels.errors import MissingEnvironment, require

if TYPE_CHECKING:
    from exactmoe.model.decode import Decoder
    from exactmoe.model.weights import Model

TOKENS = 128  # of a run, greedy
RUNS = 5
_TRACED = 4  # steps of a profile


class Kernel(NamedTuple):
    """One kernel of a profile."""

    name: str
    calls: int
    total: float  # us, of all calls
    median: float  # us, of one call; kernels that overlap count in full


def time_step(model: "Model", context: int, runs: int = RUNS) -> list[float]:
    """Microseconds a token of `runs` runs of TOKENS tokens, each after `context` positions of whatever the cache holds.

    Raises MissingEnvironment without a CUDA device."""
    decoder, cache = _ready(model, context + TOKENS)
    samples = []
    for i in range(runs + 1):
        cache.length = context
        took = elapsed(lambda: _steps(decoder))
        if i:  # the first run captures the graph
            samples.append(took / TOKENS)
    return samples


def _steps(decoder: "Decoder") -> None:
    for _ in range(TOKENS):
        decoder.step()


def trace_step(model: "Model", context: int, path: Path) -> dict[str, Any]:
    """Profile some steps after `context` positions into `path`; returns the trace. Raises as `time_step`."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    decoder, cache = _ready(model, context + _TRACED + 1)
    cache.length = context
    decoder.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(_TRACED):
            decoder.step()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    trace: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return trace


def _ready(model: "Model", positions: int) -> "tuple[Decoder, Any]":
    from exactmoe.model.cache import KVCache
    from exactmoe.model.forward import decoder_of

    if model.device.type != "cuda":
        raise MissingEnvironment("a decode step is timed on a CUDA device: what the interpreter takes says nothing")
    cache = KVCache.allocate(model, positions)
    for part in (cache.k, cache.k_scale, cache.v, cache.v_scale):
        part.zero_()  # a context nobody computed still has numbers
    return decoder_of(model, cache), cache


def summary(trace: Mapping[str, Any]) -> list[Kernel]:
    """The kernels of a profile, those that take most first. Raises InvalidInput for a profile without one."""
    times: dict[str, list[float]] = {}
    for event in _kernels(trace):
        times.setdefault(event["name"], []).append(float(event["dur"]))
    require(bool(times), "the profile holds no kernel: nothing ran on a device, or the profiler could not see it")
    rows = [Kernel(name, len(found), sum(found), statistics.median(found)) for name, found in times.items()]
    return sorted(rows, key=lambda kernel: -kernel.total)


def busy(trace: Mapping[str, Any]) -> float:
    """Microseconds in which at least one kernel ran."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in _kernels(trace)):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _kernels(trace: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    return (event for event in trace.get("traceEvents", ()) if event.get("cat") == "kernel" and "dur" in event)
