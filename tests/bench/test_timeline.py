"""A profile by kernel, and as Perfetto takes it. Making one needs a GPU."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from exactmoe.bench.timeline import Kernel, busy, summary, trace_step
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


def test_there_is_no_profile_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(MissingEnvironment, match="CUDA device"):
        trace_step(SimpleNamespace(device=torch.device("cpu")), 0, tmp_path / "trace.json")
