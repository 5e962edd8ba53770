"""A profile by kernel, and as Perfetto takes it. Making one needs a GPU."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from exactmoe.bench import timeline, whole
from exactmoe.bench.run import Run
from exactmoe.bench.timeline import Kernel, apart, busy, summary, trace_step
from exactmoe.cli.main import main
from exactmoe.kernels.errors import InvalidInput, MissingEnvironment


def event(name: str, ts: float, dur: float, cat: str = "kernel") -> dict[str, object]:
    return {"name": name, "cat": cat, "ph": "X", "ts": ts, "dur": dur}


TRACE = {
    "traceEvents": [
        event("a", 0, 10), event("b", 8, 4), event("a", 20, 20), event("launch", 0, 99, "cuda_runtime"),
        {"name": "process", "ph": "M"},
    ]
}  # fmt: skip


def test_a_profile_is_summed_by_kernel_and_nothing_else_counts() -> None:
    assert summary(TRACE) == [Kernel("a", 2, 30.0, 15.0), Kernel("b", 1, 4.0, 4.0)]


def test_kernels_that_overlap_keep_the_device_busy_once() -> None:
    assert busy(TRACE) == 32.0


@pytest.mark.parametrize("trace", [{}, {"traceEvents": []}, {"traceEvents": [event("x", 0, 1, "cpu_op")]}])
def test_a_profile_without_a_kernel_is_refused(trace: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match="holds no kernel"):
        summary(trace)


def on(stream: int, name: str, ts: float, dur: float, cat: str = "kernel") -> dict[str, Any]:
    """An event of a stream of GPU 0."""
    return {**event(name, ts, dur, cat), "pid": 0, "tid": stream}


def arrow(stream: int, ts: float) -> dict[str, Any]:
    """The end of an arrow from a launch to the kernel that begins at `ts`."""
    return {"name": "ac2g", "cat": "ac2g", "ph": "f", "bp": "e", "id": 1, "pid": 0, "tid": stream, "ts": ts}


STREAMS = [  # of stream 7 three kernels at once, and one behind another; stream 8 has its own time
    on(7, "a", 0, 10), on(7, "b", 8, 4), on(7, "c", 9, 20), on(7, "d", 10, 1), on(7, "e", 12, 30), on(8, "f", 1, 50),
    on(7, "g", 60, 5), arrow(7, 0), arrow(7, 8), arrow(7, 9), arrow(8, 1), arrow(7, 99),
    {"name": "launch", "cat": "cuda_runtime", "ph": "X", "ts": 0, "dur": 99, "pid": 5, "tid": 5},
    {"name": "thread_name", "ph": "M", "pid": 0, "tid": 7, "args": {"name": "stream 7 "}},
    {"name": "thread_name", "ph": "M", "pid": 5, "tid": 5, "args": {"name": "python"}},
    {"name": "Iteration Start", "ph": "i", "pid": "Traces", "tid": "Trace", "ts": 0},
]  # fmt: skip


def test_no_kernel_begins_within_another_of_its_track() -> None:
    """Perfetto drops such a one: with 48 layers, half of all kernels."""
    found = apart({"traceEvents": STREAMS, "schemaVersion": 1})
    track = {event["name"]: event["tid"] for event in found["traceEvents"] if event.get("cat") == "kernel"}
    assert track == {"a": 7, "b": 9, "c": 10, "d": 7, "e": 7, "f": 8, "g": 7}
    named = {e["tid"]: e["args"]["name"] for e in found["traceEvents"] if e["name"] == "thread_name"}
    assert named == {7: "stream 7 ", 5: "python", 9: "stream 7, overlapping", 10: "stream 7, overlapping"}


def test_arrows_end_at_their_kernels_and_all_else_is_as_it_was() -> None:
    before = json.dumps(STREAMS)
    found = apart({"traceEvents": STREAMS, "schemaVersion": 1})
    assert found["schemaVersion"] == 1
    events = found["traceEvents"]
    assert [(e["ts"], e["tid"]) for e in events if e["ph"] == "f"] == [(0, 7), (8, 9), (9, 10), (1, 8), (99, 7)]
    others = [e for e in events[: len(STREAMS)] if e.get("cat") != "kernel" and e["ph"] != "f"]
    assert others == STREAMS[-4:]
    assert len(events) == len(STREAMS) + 2
    assert json.dumps(STREAMS) == before
    assert (summary(found), busy(found)) == (summary({"traceEvents": STREAMS}), busy({"traceEvents": STREAMS}))


def test_a_trace_without_events_has_none() -> None:
    assert apart({}) == {"traceEvents": []}


def test_there_is_no_profile_without_a_gpu() -> None:
    with pytest.raises(MissingEnvironment, match="CUDA device"):
        trace_step(SimpleNamespace(device=torch.device("cpu")), 0)


def test_steps_behind_a_first_are_profiled_and_their_kernels_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Profiler:
        def __init__(self, **_: Any) -> None: ...

        def __enter__(self) -> "Profiler":
            done.append("begin")
            return self

        def __exit__(self, *_: object) -> None:
            done.append("end")

        def export_chrome_trace(self, path: str) -> None:
            Path(path).write_text(json.dumps({"traceEvents": STREAMS}))

    decoder = SimpleNamespace(step=lambda: done.append("step"))
    monkeypatch.setattr("torch.profiler.profile", Profiler)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(timeline, "prepare", lambda model, context, steps: SimpleNamespace(decoder=decoder))
    found = trace_step(SimpleNamespace(device=torch.device("cuda")), 3)
    assert done == ["step", "wait", "begin", *["step"] * 4, "wait", "end"]
    assert found == apart({"traceEvents": STREAMS})


def test_the_command_writes_the_profile_of_the_step_after_the_context(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_wholes(rows: list[Any], *_: Any) -> tuple[Any, str]:
        assert [row.name for row in rows] == ["decode-3"]
        return Run("d", "c", "a device", "1/2", {}, "n", "q8_k", "m", 1.0, 1.0, ()), "the model"

    def trace(model: str, context: int) -> dict[str, Any]:
        assert (model, context) == ("the model", 3)
        return TRACE

    monkeypatch.setattr(whole, "run_wholes", run_wholes)
    monkeypatch.setattr(whole, "refusal", lambda *_: None)
    monkeypatch.setattr(timeline, "trace_step", trace)
    path = tmp_path / "step.json"
    assert main(["bench", "--model", str(model_file), "--context", "3", "--trace", str(path)]) == 0
    assert json.loads(path.read_text()) == TRACE
    said = capsys.readouterr().out
    assert "32.0 us busy" in said and str(path) in said
    assert [path.name for path in tmp_path.iterdir()] == ["step.json"]
