"""`exactmoe bisect`: what it prints, writes and exits with."""

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from exactmoe.cli.main import main

TOKENS = "3,141,59,26,5"


def test_a_planted_fault_is_named_and_the_evidence_is_whole(model_file: Path, tmp_path: Path, capsys) -> None:
    files = {name: tmp_path / f"evidence.{name}" for name in ("json", "html", "xml")}
    status = main(
        ["bisect", str(model_file), "--suspect", "fault:combine-contracted@1", "--tokens", TOKENS,
         "-o", str(files["json"]), "--html", str(files["html"]), "--junit", str(files["xml"])]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert status == 1
    assert "BISECT: fault:combine-contracted@1: first wrong stage moe_ffn_out, layer 1, made here" in out
    evidence = json.loads(files["json"].read_text())
    assert evidence["found"]["stage"] == "moe_ffn_out" and evidence["found"]["layer"] == 1
    assert evidence["tokens"] == [3, 141, 59, 26, 5]
    assert evidence["verdict"] == evidence["found"]["sentence"]
    assert {"model_sha256", "numerics", "activations", "versions", "device", "next"} <= evidence.keys()
    assert evidence["found"]["passes"] <= evidence["found"]["most_passes"]
    assert "moe_ffn_out" in files["html"].read_text()
    failures = [
        case.get("name", "") for case in ET.parse(files["xml"]).iter("testcase") if case.find("failure") is not None
    ]
    assert failures and "moe_ffn_out" in failures[0]


def test_the_next_command_can_be_run(model_file: Path, capsys) -> None:
    arguments = ["bisect", str(model_file), "--suspect", "fault:eps-outside-the-root@0", "--tokens", TOKENS]
    assert main([*arguments, "--stage", "attn_out@0", "-o", "-"]) == 1
    following = json.loads(capsys.readouterr().out)["next"]
    assert following.endswith("--stage attention@0")
    assert main(following.split()[1:]) == 1
    assert "attention, layer 0, inherited" in capsys.readouterr().out


@pytest.mark.parametrize(("function", "status"), [("right", 0), ("wrong", 1)])
def test_an_op_of_ones_own_is_judged(model_file: Path, tmp_path: Path, capsys, function: str, status: int) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from exactmoe.kernels.combine import combine\n"
        "def right(out, weight):\n    return combine(out, weight)\n"
        "def wrong(out, weight):\n    return combine(out, weight.flip(1).contiguous())\n"
    )
    arguments = ["bisect", str(model_file), "--suspect", f"combine={path}:{function}", "--tokens", "3,141,59"]
    assert main(arguments) == status
    out = capsys.readouterr().out
    assert ("moe_ffn_out, layer 0, made here" in out) == bool(status)
    assert ("clean, 45 of 45" in out) == (not status)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suspect", "fault:nothing"], "there is no fault 'nothing'"),
        (["--suspect", "fault:approximate-exp@x"], "'x' is not a layer"),
        (["--suspect", "fault:approximate-exp", "--stage", "q"], "needs a layer"),
        (["--suspect", "nothing"], "is none of"),
        (["--suspect", "fault:approximate-exp", "--past", "5"], "--past 5 leaves none of 5"),
        (["--html", "/no/such/x.html"], "no folder"),
    ],
)
def test_what_cannot_be_asked_is_refused(model_file: Path, capsys, arguments: list[str], said: str) -> None:
    assert main(["bisect", str(model_file), "--tokens", TOKENS, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_faults_can_be_listed(capsys) -> None:
    assert main(["bisect", "--list-faults"]) == 0
    assert "one-wrong-sub-scale" in capsys.readouterr().out
