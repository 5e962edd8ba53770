"""Where the time of decode steps goes: a profile in the Chrome format, which Perfetto opens.

trace_step(model, context, path)    profile a few steps
summary(trace)                      the profile by kernel
busy(trace)                         for how long a kernel ran"""

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from exactmoe.bench.step import prepare, require_cuda
from exactmoe.kernels.errors import require

if TYPE_CHECKING:
    from exactmoe.model.weights import Model

_STEPS = 4


class Kernel(NamedTuple):
    """One kernel of a profile."""

    name: str
    calls: int
    total: float  # us, of all calls
    median: float  # us, of one call; kernels that overlap count in full


def trace_step(model: "Model", context: int, path: Path) -> dict[str, Any]:
    """Profile some steps after `context` positions into `path`; returns the trace. Raises as `time_steps`."""
    from torch.profiler import ProfilerActivity, profile

    require_cuda(model.device)
    decoder = prepare(model, context, _STEPS + 1).decoder
    decoder.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(_STEPS):
            decoder.step()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    trace: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return trace


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
