import json
from importlib import import_module

import numpy as np
import pytest
import torch

from exactmoe.cli import options
from exactmoe.model import stages
from exactmoe.parity.run import Schedule

TOKENS = "5,300,7"
N_STAGES = len(stages.keys(2))


def run(exactmoe, model_file, *arguments, tokens=TOKENS, steps=1):
    return exactmoe("parity", model_file, "--tokens", tokens, "--steps", steps, *arguments)


@pytest.fixture
def brief(monkeypatch):
    """One schedule of one token, for tests of something else: most of a small run's time goes to schedules."""
    monkeypatch.setattr("exactmoe.parity.run.plan_schedules", lambda *_, **__: (Schedule("one token", 1, 1),))


def edited(monkeypatch, target, change):
    """Replace the function at `target` by itself followed by `change` of its result."""
    module, _, name = target.rpartition(".")
    original = getattr(import_module(module), name)
    monkeypatch.setattr(target, lambda *a, **k: change(original(*a, **k)))


@pytest.mark.parametrize("profile", ["q8_k", "q16_k"])
def test_the_kernels_equal_the_reference_in_every_stage_of_every_layer(exactmoe, model_file, tmp_path, profile):
    path = tmp_path / "report.json"
    outcome = run(exactmoe, model_file, "--activations", profile, "--json", path, steps=2)
    assert outcome.status == 0, outcome.out
    last = outcome.out.rstrip().splitlines()[-1]
    assert last.startswith("PARITY: equal, ")
    assert last.endswith("0 differ")
    found = json.loads(path.read_text())
    assert found["verdict"] == "equal"
    assert found["coverage"]["compared"] == found["coverage"]["requested"] == N_STAGES
    assert found["activations"] == profile
    assert found["nan_logits"] == 0
    assert found["numerics"].startswith("numerics-v1 ")
    assert set(found["versions"]) == {"torch", "triton", "numpy", "python"}
    compared = {(s["name"], s["layer"]): s["compared"] for s in found["stages"]}
    assert compared["embedding", -1] == 5 * 256
    assert compared["attn_scores", 1] == 2 * (3 * 3 + 4 + 5)
    assert compared["moe_expert_gate", 0] == 5 * 2 * 256
    assert compared["lm_head", -1] == 5 * 512
    assert all(s["differing"] == 0 for s in found["stages"])


@pytest.mark.usefixtures("brief")
def test_the_same_command_gives_the_same_digest_and_json_on_stdout_leaves_the_report_to_stderr(
    exactmoe, model_file, tmp_path
):
    page, cases = tmp_path / "report.html", tmp_path / "report.xml"
    written = ["--json", "-", "--html", page, "--junit", cases]
    outcomes = [run(exactmoe, model_file, *written, tokens="1,2") for _ in range(2)]
    found = [json.loads(o.out) for o in outcomes]
    assert [f["verdict"] for f in found] == ["equal", "equal"]
    assert found[0]["digest"] == found[1]["digest"]
    for outcome in outcomes:
        assert outcome.err.rstrip().splitlines()[-1].startswith("PARITY: equal")
    assert "<strong>Equal</strong>" in page.read_text()
    assert page.read_text().count('<td class="u0" title=') > N_STAGES
    assert cases.read_text().count("<testcase ") > N_STAGES
    assert 'failures="0"' in cases.read_text()


@pytest.mark.parametrize(
    ("target", "stage", "at"),
    [
        ("exactmoe.model.traced.combine", "moe_ffn_out", (2, 200)),
        ("exactmoe.parity.reference.traced.attention_softmax", "attn_softmax", (2, 1, 0)),
        ("exactmoe.model.traced.router_logits", "moe_router_logits", (1, 3)),
    ],
)
@pytest.mark.usefixtures("brief")
def test_one_bit_of_one_op_on_one_side_gives_1_and_its_place(exactmoe, model_file, monkeypatch, target, stage, at):
    calls = []

    def flip(output):
        calls.append(1)
        if len(calls) == 2:  # layer 1 of the prompt
            bits = output.view(np.int32 if isinstance(output, np.ndarray) else torch.int32)
            bits[at] ^= 1
        return output

    edited(monkeypatch, target, flip)
    outcome = run(exactmoe, model_file)
    assert outcome.status == 1
    assert f"{stage}, layer 1, prefill: 1/" in outcome.out
    assert f"; first {at}: " in outcome.out
    last = outcome.out.rstrip().splitlines()[-1]
    assert last.startswith("PARITY: NOT EQUAL")
    assert f"first in {stage}, layer 1, prefill" in last


@pytest.mark.usefixtures("brief")
def test_a_kernel_that_is_wrong_in_production_only_gives_1(exactmoe, model_file, monkeypatch):
    edited(monkeypatch, "exactmoe.model.forward.attend", lambda out: out * 1.5)
    outcome = run(exactmoe, model_file)
    assert outcome.status == 1
    assert "first difference in triton: production = traced, prefill: " in outcome.out


@pytest.mark.usefixtures("brief")
def test_a_stage_that_is_not_emitted_gives_1(exactmoe, model_file, monkeypatch):
    def forget(traced):
        del traced.stages["moe_router_indices", 1]
        return traced

    edited(monkeypatch, "exactmoe.model.traced.forward_traced", forget)
    outcome = run(exactmoe, model_file)
    assert outcome.status == 1
    assert "not emitted: triton: moe_router_indices, layer 1, prefill" in outcome.out
    assert f"{N_STAGES} stages requested; emitted by reference {N_STAGES}, by triton {N_STAGES - 1}" in outcome.out


@pytest.mark.usefixtures("brief")
def test_stages_without_elements_give_1(exactmoe, model_file, monkeypatch):
    for side in ("exactmoe.model.traced", "exactmoe.parity.reference.traced"):
        edited(
            monkeypatch,
            f"{side}.forward_traced",
            lambda t: t._replace(stages={key: value[:0] for key, value in t.stages.items()}),
        )
    outcome = run(exactmoe, model_file)
    assert outcome.status == 1
    assert (
        f"{N_STAGES} stages requested; emitted by reference {N_STAGES}, by triton {N_STAGES}; compared 0" in outcome.out
    )


@pytest.mark.usefixtures("brief")
def test_a_text_is_cut_to_the_positions_asked_for(exactmoe, model_file, tmp_path):
    text = tmp_path / "text.py"
    text.write_text("import os\n")
    arguments = ["--text", text, "--steps", "1", "--json", "-"]
    cut = json.loads(exactmoe("parity", model_file, *arguments, "--positions", "3").out)
    tokens = options.encode(options.open_model(model_file)[0], "import os\n")
    assert cut["tokens"] == tokens[:3]
    refused = exactmoe("parity", model_file, *arguments, "--positions", len(tokens) + 1)
    assert refused.status == 2
    assert f"the text has {len(tokens)} tokens, --positions asks for {len(tokens) + 1}" in refused.err


@pytest.fixture
def seen(monkeypatch):
    """What the command would run, instead of running it."""
    calls = []

    class Stop(Exception):
        pass

    def stop(file, tokens, steps, activations, device, tell):
        calls.append((file.path, tokens, steps, activations, device))
        raise Stop

    monkeypatch.setattr("exactmoe.parity.run.run_parity", stop)

    def seen(exactmoe, *arguments):
        with pytest.raises(Stop):
            exactmoe("parity", *arguments)
        return calls[-1]

    return seen


def test_the_defaults_are_64_positions_of_the_shipped_text_and_4_steps_of_q8_k(
    exactmoe, model_file, seen, monkeypatch, tmp_path
):
    text = tmp_path / "prompt.txt"
    text.write_text("def f(x):\n    return x\n" * 40)
    monkeypatch.setattr(options, "SHIPPED_TEXT", text)
    path, tokens, *rest = seen(exactmoe, model_file)
    assert (path, len(tokens), rest) == (str(model_file), options.DEFAULT_POSITIONS, [4, "q8_k", "auto"])
    assert options.DEFAULT_POSITIONS == 64
    assert tokens == options.encode(options.open_model(model_file)[0], text.read_text())[:64]


def test_a_text_shorter_than_the_default_runs_whole(exactmoe, model_file, seen, tmp_path):
    text = tmp_path / "short.py"
    text.write_text("pass\n")
    tokens = seen(exactmoe, model_file, "--text", text)[1]
    assert tokens == options.encode(options.open_model(model_file)[0], "pass\n")


def test_the_shipped_model_and_text_are_the_default_and_at_hand(exactmoe, seen):
    assert seen(exactmoe)[0] == str(options.SHIPPED_MODEL)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--tokens", "512"], "token id 512 is outside the vocabulary of 512"),
        (["--tokens", "1,b"], "'b' is not a token id"),
        (["--tokens", ""], "'' is not a token id"),
        (["--tokens", "1", "--steps", "0"], "'0' is not a positive integer"),
        (["--tokens", "1", "--steps", "64"], "exceeds the context of 64 positions"),
        (["--tokens", "1", "--positions", "3"], "--positions 3 cuts a text"),
        (["--tokens", "1", "--text", "x"], "not allowed with"),
        (["--tokens", "1", "--activations", "f32"], "invalid choice"),
        (["--tokens", "1", "--device", "tpu"], "invalid choice"),
        (["--tokens", "1", "--json", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
        (["--tokens", "1", "--html", "/nowhere/at/all.html"], "there is no folder /nowhere/at"),
        (["--text", "/nowhere/at/all.txt"], "/nowhere/at/all.txt: cannot be read"),
    ],
)
def test_wrong_arguments_are_refused(exactmoe, model_file, arguments, text):
    outcome = exactmoe("parity", model_file, *arguments)
    assert outcome.status == 2
    assert text in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize(("content", "text"), [(b"", "the text is empty"), (b"\xff\xfe", "not UTF-8 text at byte 0")])
def test_a_text_that_holds_no_text_is_refused_by_name(exactmoe, model_file, tmp_path, content, text):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    outcome = exactmoe("parity", model_file, "--text", path)
    assert outcome.status == 2
    assert f"{path}: {text}" in outcome.err


def test_a_file_that_is_no_model_is_refused_by_name(exactmoe, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + bytes(20))
    outcome = exactmoe("parity", path, "--tokens", "1")
    assert outcome.status == 2
    assert str(path) in outcome.err


def test_a_gpu_that_is_demanded_and_absent_gives_3(exactmoe, model_file, no_cuda):
    outcome = exactmoe("parity", model_file, "--tokens", "1", "--device", "cuda")
    assert outcome.status == 3
    assert "CUDA" in outcome.err
