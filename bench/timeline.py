"""Where the time of decode steps goes: a profile in the Chrome format, which Perfetto opens.

trace_step(model, context)    profile a few steps
apart(trace)                  the profile with kernels that overlap on tracks of their own, as Perfetto needs them
summary(trace)                the profile by kernel
busy(trace)                   for how long a kernel ran"""

import json
import statistics
import tempfile
from collections import defaultdict
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


def trace_step(model: "Model", context: int) -> dict[str, Any]:
    """Profile some steps after `context` positions. Raises MissingEnvironment without a CUDA device."""
    from torch.profiler import ProfilerActivity, profile

    require_cuda(model.device)
    decoder = prepare(model, context, _STEPS + 1).decoder
    decoder.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(_STEPS):
            decoder.step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return apart(trace)


def apart(trace: Mapping[str, Any]) -> dict[str, Any]:
    """The trace with each of a stream's kernels on the first of its tracks that is free.

    A kernel that is launched while the one before it still runs overlaps it, and Perfetto drops an event that begins
    within another of its track and ends behind it. Further tracks are named for their stream."""
    events = [dict(event) for event in trace.get("traceEvents", ())]
    found = {**trace, "traceEvents": events}
    unused = 1 + max((event["tid"] for event in events if isinstance(event.get("tid"), int)), default=0)
    tracks: dict[tuple[Any, Any], list[Any]] = {}  # of a stream: their tids, its own first
    free: dict[tuple[Any, Any], float] = defaultdict(lambda: float("-inf"))  # of a track: from when on
    moved = {}
    for kernel in sorted(_kernels(found), key=lambda event: float(event["ts"])):
        pid, stream, start = kernel["pid"], kernel["tid"], float(kernel["ts"])
        own = tracks.setdefault((pid, stream), [stream])
        track = next((tid for tid in own if free[pid, tid] <= start), None)
        if track is None:
            own.append(track := unused)
            unused += 1
        free[pid, track] = start + float(kernel["dur"])
        moved[pid, stream, kernel["ts"]] = track
    events += [
        {**event, "tid": tid, "args": {"name": f"{event['args']['name'].strip()}, overlapping"}}
        for event in events
        if event.get("name") == "thread_name"
        for tid in tracks.get((event["pid"], event["tid"]), ())[1:]
    ]
    for event in events:
        if event.get("cat") == "kernel" or event.get("ph") == "f":  # an arrow ends where its kernel begins
            event["tid"] = moved.get((event["pid"], event["tid"], event["ts"]), event["tid"])
    return found


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
