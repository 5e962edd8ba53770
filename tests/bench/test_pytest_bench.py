"""The benchmarks under pytest-benchmark, on a device that is a list: what is queued, and what JSON says of it."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["pytester"]
BENCH = Path(__file__).parent.parent.parent / "bench"

# A device whose queue is a list, and whose every entry but events takes 1 ms; graphs hold 8 calls.
DEVICE = """
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from exactmoe.bench import clock, run
from exactmoe.bench.run import Roofs, Row, Run

QUEUE = []


class Event:
    def record(self):
        QUEUE.append("event")
        self.at = len([one for one in QUEUE if one not in ("event", "wait")])

    def synchronize(self):
        QUEUE.append("wait")

    def elapsed_time(self, last):
        return float(last.at - self.at)


class Graph:
    def replay(self):
        QUEUE.append("graph")


class ModelBench:
    def __init__(self, file, device, profile):
        assert (Path(file).name, profile) == ("model.gguf", "q16_k")

    def row(self, of, sampler=None):
        if of.kind.startswith("memory"):
            return Row(of.name, "in use", 0, EQUAL, "", gib=2.5 if of.kind == "memory-most" else 2.0)
        work = [lambda: QUEUE.append("run"), lambda: QUEUE.append("rewind")]
        times = sampler(work[1], work[0], 3, warmup=1, calls=4) if of.name == "decode-0" else [1.0]
        return Row(of.name, "steps", 1, True, "the digest", clock.Times.of(times))

    def describe(self, rows):
        return described("the device", "q16_k", Roofs(1.0, 2.0), rows, "a model")


def described(device, profile, roofs, rows, model=""):
    assert rows
    return Run("today", "a commit", str(device), "1/2", {}, "n", profile, model, *roofs, tuple(rows))


EQUAL = %s


@pytest.fixture(autouse=True, scope="session")
def device(request):
    (test_bench,) = {item.module for item in request.session.items}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "_event", Event)
        patch.setattr(clock, "enough", lambda calls: (calls, Graph()))
        patch.setattr(run, "judge", lambda case, device: (EQUAL, "the digest"))
        patch.setattr(run, "calls_of", lambda bench, args: iter([lambda: None] * 8))
        patch.setattr(Roofs, "of", staticmethod(lambda device: Roofs(1000.0, 1.0)))
        for name, value in {
            "resolve_device": lambda _: torch.device("cpu"),
            "describe": described,
            "ModelBench": ModelBench,
            "open_gguf": lambda path: path,
            "Config": SimpleNamespace(from_gguf=lambda file: "its config"),
            "refusal": lambda row, *_: ValueError("too long") if row.name == "decode-4096" else None,
        }.items():
            patch.setattr(test_bench, name, value)
        yield
    Path("queue.txt").write_text(" ".join(QUEUE))
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # a worker's process has no benchmarks

    def run(*options: str, equal: bool = True, only: str = "router") -> tuple[pytest.RunResult, list[str], Any]:
        pytester.makepyfile(device=DEVICE % equal)
        pytester.syspathinsert()
        always = ("-p", "device", "--benchmark-json=found.json", "-p", "no:cacheprovider", "-p", "no:xdist")
        result = pytester.runpytest_subprocess(*always, *options, str(BENCH), "-k", only)
        found = pytester.path / "found.json"
        text = found.read_text() if found.exists() else ""
        return result, (pytester.path / "queue.txt").read_text().split(), json.loads(text) if text else None

    return run


def test_a_round_is_behind_another_replay_and_the_row_is_of_a_call(run) -> None:
    result, queue, found = run("--benchmark-only")
    result.assert_outcomes(passed=1, deselected=45)
    rounds = ["graph", "event", "graph", "event", "wait"]
    assert queue == 2 * (1 + 125 + 30) * rounds, (
        "cold and warm: how long it lasts, until the device has settled, samples"
    )
    (router,) = found["benchmarks"]
    assert router["name"] == "test_bench[router]"
    assert router["stats"]["data"] == pytest.approx([1e-3 / 8] * 30)
    assert router["options"]["timer"].endswith("device_clock")
    row = router["extra_info"]
    assert (row["name"], row["equal"], row["digest"]) == ("router", True, "the digest")
    assert (row["cold"], row["warm"]) == (pytest.approx([125.0] * 3), pytest.approx([1000.0] * 3))
    assert row["gb_s"] == pytest.approx(4 * 128 * 2048 / 125e3)
    assert row["roof"] == pytest.approx(row["gb_s"] / 1000)
    circumstances = found["exactmoe"]
    assert (circumstances["device"], circumstances["commit"]) == ("cpu", "a commit")
    assert (circumstances["activations"], circumstances["model"], circumstances["copy_gb_s"]) == ("q8_k", "", 1000.0)
    assert not {"rows", "peers"} & circumstances.keys()


def test_what_is_not_the_references_bits_fails_and_is_not_timed(run) -> None:
    result, queue, found = run("--benchmark-only", equal=False)
    result.assert_outcomes(failed=1, deselected=45)
    result.stdout.fnmatch_lines(["*so it has no speed*"])
    assert (queue, found) == ([], None)


def test_activations_are_those_that_were_asked_for(run) -> None:
    _, _, found = run("--exactmoe-activations", "q16_k", "--benchmark-only")
    assert found["exactmoe"]["activations"] == "q16_k"
    assert "q16_k" in found["benchmarks"][0]["extra_info"]["case"]


def test_a_model_has_its_own_rows_and_each_says_what_memory_was_in_use(run) -> None:
    model = ("--exactmoe-model", "model.gguf", "--exactmoe-activations", "q16_k")
    result, queue, found = run(*model, "--benchmark-only", only="decode-0")
    result.assert_outcomes(passed=1, deselected=7)
    assert queue == ["rewind", "event", "run", "event", "wait"] * 4, "the first warms up"
    (step,) = found["benchmarks"]
    assert step["stats"]["data"] == pytest.approx([1e-3 / 4] * 3)
    assert step["extra_info"]["cold"] == pytest.approx([250.0] * 3)
    assert step["extra_info"]["gib"] == 2.5
    assert (found["exactmoe"]["model"], found["exactmoe"]["activations"]) == ("a model", "q16_k")
    result, queue, _ = run(*model, "--benchmark-only", only="decode-0", equal=False)
    result.assert_outcomes(failed=1, deselected=7)
    assert queue == [], "what holds more than it should gets no time"


def test_a_row_that_cannot_run_on_the_model_fails_with_the_reason(run) -> None:
    model = ("--exactmoe-model", "model.gguf", "--exactmoe-activations", "q16_k")
    result, queue, _ = run(*model, "--benchmark-only", only="decode-4096")
    result.assert_outcomes(failed=1, deselected=7)
    result.stdout.fnmatch_lines(["*ValueError: too long*"])
    assert queue == []


def test_without_timing_a_row_is_judged_and_run_once(run) -> None:
    result, queue, _ = run("--benchmark-disable")
    result.assert_outcomes(passed=1, deselected=45)
    assert queue.count("wait") == 2 + 1 + 125 + 30, "cold: how long it lasts, and once; warm as ever"
