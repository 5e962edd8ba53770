"""The decode steps of a whole model, timed in turn with those of another revision."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from exactmoe.bench import compare as comparing
from exactmoe.bench import step, whole, worker
from exactmoe.bench.clock import REPLAY_METHOD
from exactmoe.cli.main import main
from exactmoe.model import decode
from exactmoe.model.weights import Model, load_model


@pytest.fixture
def model(model_file: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A small one, with rows and runs that fit it, on a device that has a clock."""
    rows = {f"decode-{n}": whole.Whole("decode", n) for n in (0, 4)}
    monkeypatch.setattr(whole, "decode_rows", lambda: rows)
    monkeypatch.setattr(step, "TOKENS", 3)
    monkeypatch.setattr(step, "time_run", lambda sequence: 10.0 + sequence.context)
    return load_model(model_file, device)


def test_decode_steps_are_judged_once_and_timed_whenever_asked(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[int] = []
    right = whole.judge_decode
    monkeypatch.setattr(whole, "judge_decode", lambda m, s: judged.append(s.context) or right(m, s))
    answer = worker.of_steps(model)
    said = [answer(name) for name in ("decode-4", "decode-4", "decode-0", "decode-4")]
    assert [one["us"] for one in said] == [14.0, 14.0, 10.0, 14.0]
    assert all(one["equal"] for one in said)
    assert said[0]["digest"] == said[3]["digest"] != said[2]["digest"]
    assert judged == [4, 0, 4]  # one at a time is held


def test_a_model_stays_where_it_is(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = worker.of_steps(model)
    first = answer("decode-0")
    monkeypatch.setattr(whole, "judge_decode", lambda *_: pytest.fail("judged again"))
    assert (answer(worker.RENEW), answer("decode-0")) == ({"renewed": False}, first)


def test_a_benchmark_is_made_anew_in_other_memory_and_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the graph is a stand-in, and so is what is timed."""
    made: list[list[Any]] = []
    judged: list[str] = []
    rooms: list[int] = []
    empty = torch.empty

    def copies(_bench: Any, args: Any) -> list[Any]:
        made.append(args)
        return [args]

    def room(size: int, **options: Any) -> torch.Tensor:
        rooms.append(size)
        return empty(1, dtype=options["dtype"])

    monkeypatch.setattr("exactmoe.kernels.launch.resolve_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr("exactmoe.bench.run.calls_of", copies)
    monkeypatch.setattr("exactmoe.bench.run.judge", lambda case, _: judged.append(str(case)) or (True, "digest"))
    monkeypatch.setattr("exactmoe.bench.clock.enough", lambda calls: (8 * calls, "its graph"))
    monkeypatch.setattr("exactmoe.bench.clock.replay_us", {"its graph": 80.0}.__getitem__)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: rooms.append(0))
    answer = worker.timer("q8_k")
    monkeypatch.setattr(torch, "empty", room)
    said = [answer(name) for name in ("norm-8", "norm-8", worker.RENEW, "norm-8", "norm-8", "nothing", "route-8")]
    time = {"us": 10.0, "method": REPLAY_METHOD, "equal": True, "digest": "digest"}
    assert said == [
        time,
        time,
        {"renewed": True},
        time,
        time,
        {"error": "this revision has no benchmark nothing"},
        time,
    ]
    assert len(judged) == 2, "each once"
    assert len(made) == 3
    assert made[0] is made[1] is not made[2], "numbers take longer than copies"
    assert [bool(size) for size in rooms] == [True, False, True, True]
    assert all(size % 2**21 == 0 for size in rooms)


def test_a_step_that_is_wrong_has_no_time_and_one_that_is_not_there_is_an_error(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = decode.experts_up

    def negated(*args: Any) -> Any:
        out = right(*args)
        return out._replace(h=-out.h)

    monkeypatch.setattr(decode, "experts_up", negated)
    answer = worker.of_steps(model)
    wrong = answer("decode-0")
    assert (wrong["equal"], wrong["us"]) == (False, None)
    assert "decode-9" in answer("decode-9")["error"]


def test_a_worker_serves_a_model_or_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker, "model_timer", lambda *args: lambda name: {"model": args})
    monkeypatch.setattr(worker, "timer", lambda *args: lambda name: {"kernels": args})
    for options in (["--model", "m.gguf"], [], ["0.03"]):
        monkeypatch.setattr("sys.stdin", ["x\n"])
        worker.main("q8_k", *options)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said == [
        {"name": "x", "model": ["q8_k", "m.gguf"]}, {"name": "x", "kernels": ["q8_k"]},
        {"name": "x", "kernels": ["q8_k", 0.03]},
    ]  # fmt: skip


def test_both_sides_are_given_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[tuple[str, ...]] = []

    class Side:
        def __init__(self, _tree: Path, options: tuple[str, ...]) -> None:
            started.append(options)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(comparing, "worker", Side)
    monkeypatch.chdir(tmp_path)
    with comparing.revisions("HEAD", "q16_k", model="big.gguf"):
        pass
    assert started == [("q16_k", "--model", str(tmp_path / "big.gguf"))] * 2


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["load", "--compare", "HEAD"], "no benchmark is named load"),
        (["decode-0", "--compare", "HEAD", "--plant", "3"], "--plant is of kernels"),
        (["--context", "0", "--compare", "HEAD"], "--compare takes names"),
    ],
)
def test_what_cannot_be_compared_of_a_model_is_refused(
    names: list[str], why: str, model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--model", str(model_file), *names]) == 2
    assert why in capsys.readouterr().err
