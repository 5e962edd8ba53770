"""Tracing leaves production alone, and a tracing that did not would be seen."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from exactmoe.cli.main import main
from exactmoe.kernels.errors import InvalidInput, MissingEnvironment
from exactmoe.model.gguf.reader import open_gguf
from exactmoe.parity import neutrality
from exactmoe.parity.bits import Comparison
from exactmoe.parity.neutrality import Launch, Neutrality, check_neutrality

TOKENS = [3, 141, 59]


@pytest.fixture(scope="module")
def found(model_file: Path) -> Neutrality:
    return check_neutrality(open_gguf(model_file), TOKENS, steps=1)


def test_production_is_the_same_beside_tracing_and_without_it(found: Neutrality) -> None:
    assert found.neutral
    assert {c.name for c in found.comparisons} == {
        "logits, prompt", "logits, step 1", "chosen ids", "cache k", "cache k_scale", "cache v", "cache v_scale",
    }  # fmt: skip
    assert all(c.count > 0 for c in found.comparisons)
    assert found.here.launches == found.alone.launches
    assert len(found.here.launches) > 2 * (20 + 6)  # two layers, a prompt and a step


def test_every_kernel_of_the_forward_pass_was_seen(found: Neutrality) -> None:
    kernels = {launch.kernel for launch in found.here.launches}
    assert {"_matmul_kernel", "_route_kernel", "_sums_kernel", "_embed_kernel", "_argmax_kernel"} <= kernels
    assert all(len(launch.binary) == 64 for launch in found.here.launches)


def _apart(found: Neutrality) -> dict[str, Neutrality]:
    launches = found.alone.launches
    other = launches[5]._replace(binary="0" * 64)
    wrong = Comparison("logits", 1, 1, (0,), "1", "2")
    return {
        "binary": replace(found, alone=found.alone._replace(launches=(*launches[:5], other, *launches[6:]))),
        "order": replace(found, alone=found.alone._replace(launches=launches[::-1])),
        "one more": replace(found, here=found.here._replace(launches=(*launches, launches[0]))),
        "one less": replace(found, here=found.here._replace(launches=launches[:-1])),
        "none": replace(found, here=found.here._replace(launches=()), alone=found.alone._replace(launches=())),
        "digest": replace(found, alone=found.alone._replace(digest="0")),
        "tokens": replace(found, alone=found.alone._replace(tokens=(1,))),
        "bits": replace(found, comparisons=(*found.comparisons, wrong)),
        "nothing compared": replace(found, comparisons=()),
    }


@pytest.mark.parametrize(
    "what", ["binary", "order", "one more", "one less", "none", "digest", "tokens", "bits", "nothing compared"]
)
def test_whatever_differs_is_not_neutral(found: Neutrality, what: str) -> None:
    assert not _apart(found)[what].neutral


def test_the_first_launch_that_differs_is_named(found: Neutrality) -> None:
    assert _apart(found)["binary"].first_launch_apart == 5
    assert _apart(found)["one less"].first_launch_apart == len(found.alone.launches) - 1
    assert "0000000000" in str(Launch("_k", (1,), "M=1", "0" * 64))


def test_a_production_that_imports_tracing_is_found_out(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neutrality.sys, "executable", neutrality.sys.executable)
    code = "import sys; from exactmoe.parity import neutrality as n; sys.meta_path.insert(0, n._NoTracing()); import "
    for module in ("exactmoe.model.traced", "exactmoe.parity.trace.capture", "exactmoe.model.plan"):
        done = neutrality.subprocess.run(
            [neutrality.sys.executable, "-c", code + module], capture_output=True, text=True
        )
        assert done.returncode == 1
        assert "a process that must not trace" in done.stderr
    done = neutrality.subprocess.run(
        [neutrality.sys.executable, "-c", code + "exactmoe.model.forward"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_process_that_fails_is_an_error_and_no_verdict(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neutrality.sys, "executable", "/bin/false")
    with pytest.raises(MissingEnvironment, match="process without tracing failed"):
        neutrality._in_a_process_that_cannot_trace(open_gguf(model_file), TOKENS, 1, "q8_k", "auto")


def test_no_token_is_refused(model_file: Path) -> None:
    with pytest.raises(InvalidInput, match="nothing would be compared"):
        check_neutrality(open_gguf(model_file), [])


def test_the_command_tells_and_exits_as_the_verdict_says(
    model_file: Path, found: Neutrality, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    results = {"neutral": found, **_apart(found)}
    for name in ("neutral", "binary", "bits"):
        monkeypatch.setattr(neutrality, "check_neutrality", lambda *_, name=name: results[name])
        status = main(["neutrality", str(model_file), "--tokens", "1,2", "--json", str(tmp_path / "r.json")])
        assert status == (0 if name == "neutral" else 1)
        out = capsys.readouterr().out
        assert ("NOT NEUTRAL" in out) == (name != "neutral")
        assert json.loads((tmp_path / "r.json").read_text())["neutral"] == (name == "neutral")
    assert main(["neutrality", str(model_file), "--tokens", "1,600"]) == 2
