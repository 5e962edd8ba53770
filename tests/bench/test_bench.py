"""Benchmarks: the table, the judging, the arithmetic of a row, and the history. The clock itself needs a GPU."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from exactmoe.bench import clock as clock_module
from exactmoe.bench import run as running
from exactmoe.bench.cases import Bench, benches
from exactmoe.bench.clock import Times
from exactmoe.bench.history import lines, read
from exactmoe.bench.page import render_history
from exactmoe.cli.main import main
from exactmoe.kernels.errors import InvalidInput, MissingEnvironment
from exactmoe.kernels.launch import resolve_device
from exactmoe.parity.cases import CASES, Matvec

SMALL = Bench("small", Matvec(16, 256, "Q4_K", "q8_k"), 1, 16 * 144, 2 * 16 * 256)


def _run(commit: str, us: float, digest: str, equal: bool = True, model: str = "") -> str:
    cold = [us, us, us] if equal else None
    row = {"name": "qkv", "equal": equal, "digest": digest, "cold": cold, "gb_s": 1.0, "gib": None, "roof": 0.5}
    run = {"date": "2026-01-01T00:00", "commit": commit, "device": "GPU", "activations": "q8_k", "model": model}
    return json.dumps({**run, "rows": [row]})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock without a GPU: every call takes 2 us, and is called."""

    def time_graph(calls, samples=30, sampler=None):
        for call in calls:
            call()
        return Times(2.0, 1.5, 2.5)

    monkeypatch.setattr(running, "time_graph", time_graph)
    monkeypatch.setattr(running, "copy_bandwidth", lambda _: 2.304)
    monkeypatch.setattr(running, "matmul_rate", lambda _: 1.0)


@pytest.mark.parametrize("profile", ["q8_k", "q16_k"])
def test_every_benchmark_is_a_case_of_an_op_that_is_judged_elsewhere_too(profile: str) -> None:
    table = benches(profile)
    assert len(table) > 30
    layers = {bench.case.op for bench in table.values()} - CASES.keys()
    assert layers == {"moe_step", "moe_ffn"}  # judged in test_layers
    assert all(bench.weight_bytes > 0 for bench in table.values())
    assert {
        f"{kind}-{tokens}" for kind in ("matmul", "grouped-up", "attend", "moe-layer") for tokens in (8, 4096)
    } <= table.keys()


def test_a_row_has_what_the_times_and_sizes_make_of_it(clock: None, device: torch.device) -> None:
    row = running.measure(SMALL, device, running.Roofs(2.304, 1.0))
    assert row.equal
    assert (row.cold, row.gb_s, row.roof) == (Times(2.0, 1.5, 2.5), pytest.approx(1.152), pytest.approx(0.5))
    assert row.tflop_s == pytest.approx(2 * 16 * 256 / 2e6 / 1)
    assert len(row.digest) == 64


def test_the_cold_time_is_by_the_sampler_that_was_given(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(
        running, "time_graph", lambda calls, sampler=None: asked.append(sampler) or Times(2.0, 2.0, 2.0)
    )
    running.measure(SMALL, device, running.Roofs(2.0, 1.0), clock_module.sample)
    assert asked == [clock_module.sample, None]


def test_a_call_whose_bits_are_wrong_gets_no_time(
    clock: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(case, device):
        found = running.reference_output(case)
        found["out"][0] += 1
        return found

    monkeypatch.setattr(running, "kernel_output", broken)
    row = running.measure(SMALL, device, running.Roofs(1.0, 1.0))
    assert not row.equal
    assert (row.cold, row.warm, row.gb_s, row.roof) == (None, None, None, None)


def test_weights_are_rotated_through_more_memory_than_the_cache_has() -> None:
    huge = SMALL._replace(weight_bytes=60 * 2**20)
    args = huge.case.on(resolve_device("auto"))
    calls = list(running.calls_of(huge, args))
    assert len(calls) * huge.weight_bytes >= clock_module.ROTATED >= 12 * 50 * 2**20
    own = [next(cell for cell in call.__defaults__[0] if isinstance(cell, torch.Tensor)) for call in calls]  # type: ignore[attr-defined]
    shared = next(arg for arg in args if isinstance(arg, torch.Tensor))
    assert len({tensor.data_ptr() for tensor in (*own, shared)}) == len(calls) + 1


def test_there_is_no_speed_without_a_gpu() -> None:
    with pytest.raises(MissingEnvironment, match="needs a CUDA device"):
        running.run([SMALL], torch.device("cpu"), "q8_k")


def test_quantiles_of_samples() -> None:
    assert Times.of([float(i) for i in range(11)]) == Times(5.0, 1.0, 9.0)
    assert Times.of([3.0]) == Times(3.0, 3.0, 3.0)


def test_the_history_says_when_numbers_changed_and_never_calls_that_faster(tmp_path: Path) -> None:
    file = tmp_path / "gpu.jsonl"
    file.write_text("\n".join([_run("a", 9, "x"), _run("b", 8, "x"), _run("c", 4, "y"), _run("d", 4, "z", False)]))
    shown = list(lines(read(file), []))
    assert shown[0] == "qkv"
    assert ["numbers changed" in line for line in shown[1:]] == [False, False, True, False]
    assert "WRONG" in shown[4]
    assert not any("faster" in line for line in shown)


def test_the_history_says_when_a_time_came_to_mean_something_else_but_not_of_models(tmp_path: Path) -> None:
    file = tmp_path / "gpu.jsonl"

    def run(method: int, model: str = "") -> str:
        return json.dumps({**json.loads(_run("a", 9, "x", model=model)), "method": method})

    file.write_text("\n".join([_run("a", 9, "x"), run(1), run(2), run(2), _run("b", 9, "x", model="m"), run(2, "m")]))
    shown = list(lines(read(file), []))
    assert ["timed otherwise" in line for line in shown] == [False, False, False, True, False, False, False, False]
    assert render_history(read(file), "GPU").count("timed otherwise") == 1


def test_another_activation_profile_is_another_benchmark(tmp_path: Path) -> None:
    file = tmp_path / "gpu.jsonl"
    file.write_text(_run("a", 9, "x") + "\n" + _run("b", 12, "y").replace("q8_k", "q16_k"))
    shown = list(lines(read(file), ["qkv"]))
    assert [line for line in shown if not line.startswith(" ")] == ["qkv", "qkv q16_k"]
    assert not any("numbers changed" in line for line in shown)


def test_a_run_that_left_a_benchmark_out_says_so_and_one_of_another_kind_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "gpu.jsonl"
    other = _run("b", 5, "y").replace('"qkv"', '"lm-head"')
    third = _run("c", 5, "y").replace("q8_k", "q16_k")
    file.write_text("\n".join([_run("a", 9, "x"), other, third]))
    shown = list(lines(read(file), []))
    assert [line.split()[0] for line in shown if not line.startswith(" ")] == ["qkv", "lm-head", "qkv"]
    assert ["not run" in line for line in shown] == [False, False, True, False, True, False, False, False]


def test_another_model_is_another_benchmark_and_memory_is_in_gib(tmp_path: Path) -> None:
    file = tmp_path / "gpu.jsonl"
    size = (
        _run("c", 1, "", model="big").replace('"gib": null', '"gib": 21.2').replace('"cold": [1, 1, 1]', '"cold": null')
    )
    file.write_text("\n".join([_run("a", 9, "x", model="big"), _run("b", 5, "y", model="small"), size]))
    shown = list(lines(read(file), ["qkv"]))
    assert [line for line in shown if not line.startswith(" ")] == ["qkv (big)", "qkv (small)"]
    assert "21.20 GiB" in shown[2]


@pytest.mark.parametrize("line", ["{}", "nothing", "[1]", _run("a", 9, "x").replace("roof", "rooves")])
def test_a_history_with_a_line_that_is_no_run_is_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "gpu.jsonl"
    file.write_text(_run("a", 9, "x") + "\n" + line)
    with pytest.raises(InvalidInput, match=r"gpu\.jsonl:2: not a recorded run"):
        read(file)


def test_a_run_is_added_to_the_file_of_its_device(tmp_path: Path, clock: None) -> None:
    found = running.Run("d", "c", "NVIDIA H100", "1/2", {}, "n", "q8_k", "", 1.0, 1.0, ())
    assert running.append(found, tmp_path) == running.append(found, tmp_path) == tmp_path / "nvidia-h100.jsonl"
    assert len((tmp_path / "nvidia-h100.jsonl").read_text().splitlines()) == 2


def test_the_command_lists_refuses_and_reads_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list", "qkv"]) == 0
    assert capsys.readouterr().out.startswith("qkv                  matvec")
    assert main(["bench", "--trace", "x.json"]) == 2
    assert main(["bench", "--model", str(tmp_path / "none.gguf")]) == 2
    capsys.readouterr()
    assert main(["bench", "no-such"]) == 2
    assert "experts-up" in capsys.readouterr().err
    assert main(["bench", "--history", str(tmp_path / "none.jsonl")]) == 2
    file = tmp_path / "gpu.jsonl"
    file.write_text("")
    assert main(["bench", "--history", str(file)]) == 2
    file.write_text(_run("abc", 9, "x"))
    assert main(["bench", "--history", str(file)]) == 0
    assert "9.00 us" in capsys.readouterr().out


def test_the_clocks_are_those_of_the_device_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def ask(*command: str) -> str:
        asked.append(command)
        return "1980, 2619"

    monkeypatch.setattr(running, "_ask", ask)
    monkeypatch.setattr(running, "keep_busy", lambda device: asked.append(("busy", str(device))))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"12-ab-{device.index}")
    )
    assert running._clocks(torch.device("cuda", 3)) == "1980/2619"
    busy, command = asked
    assert busy == ("busy", "cuda:3"), "at rest the clocks are low"
    assert command[:2] == ("nvidia-smi", "--id=GPU-12-ab-3")
