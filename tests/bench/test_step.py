"""The profile of a decode step, read; its clock needs a GPU."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from exactmoe.bench.step import FIRST, Kernel, busy, follow, prepare, summary, time_steps, trace_step
from exactmoe.kernels.errors import InvalidInput, MissingEnvironment
from exactmoe.model.weights import Model, load_model


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


@pytest.fixture
def model(model_file: Path, device: torch.device) -> Model:
    return load_model(model_file, device)


def test_a_context_is_made_of_numbers_and_poison_lies_behind_it(model: Model) -> None:
    cache = prepare(model, 9, 3).cache
    assert (cache.length, cache.capacity) == (9, 12)
    for part, bound in ((cache.k, 16256), (cache.v, 8192)):
        written = part[:, :9].int()
        assert written.unique().numel() > 0.8 * written.numel()
        assert int(written.abs().max()) <= bound
        assert bool((part[:, 9:] == -1).all())
    for scale in (cache.k_scale, cache.v_scale):
        assert bool(torch.isfinite(scale[:, :9]).all()) and bool((scale[:, :9] > 0).all())
        assert bool(torch.isnan(scale[:, 9:]).all())


def test_each_run_of_a_sequence_chooses_the_same_tokens(model: Model) -> None:
    sequence = prepare(model, 5, 3)
    (tokens, logits), (again, _) = follow(sequence), follow(sequence)
    assert tokens.tolist() == again.tolist()
    assert tokens[0] == FIRST
    assert tokens[1:].tolist() == logits.argmax(1).tolist()
    assert sequence.cache.length == 8


def test_there_is_no_time_without_a_gpu(tmp_path: Path) -> None:
    on_the_cpu = SimpleNamespace(device=torch.device("cpu"), cache=SimpleNamespace(k=torch.empty(0)))
    with pytest.raises(MissingEnvironment, match="CUDA device"):
        time_steps(on_the_cpu)
    with pytest.raises(MissingEnvironment, match="CUDA device"):
        trace_step(on_the_cpu, 0, tmp_path / "trace.json")
