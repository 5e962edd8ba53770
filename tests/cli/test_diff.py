import json
import shutil

import numpy as np
import pytest

from exactmoe.parity.trace.folder import Saved, write_trace
from exactmoe.parity.trace.manifest import Manifest

T, A, E = 3, 2, 4


def stages():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((T, E)).astype(np.float32)
    ids = np.argsort(-logits, axis=1)[:, :A].astype(np.int32)
    yield ("embedding", -1), rng.standard_normal((T, 8)).astype(np.float32)
    for layer in range(2):
        yield ("q", layer), rng.standard_normal((T, 8)).astype(np.float32)
        yield ("moe_router_logits", layer), logits
        yield ("moe_router", layer), rng.random((T, A)).astype(np.float32)
        yield ("moe_router_indices", layer), ids
    yield ("lm_head", -1), rng.standard_normal((T, 16)).astype(np.float32)


@pytest.fixture
def save(tmp_path):
    """Write a trace under a name; `change` edits its arrays, keywords its manifest."""

    def save(name, change=None, file_format="safetensors", **stated):
        arrays = {key: values.copy() for key, values in stages()}
        if change is not None:
            change(arrays)
        manifest = Manifest(
            **{
                "complete": True,
                "model": "small.gguf",
                "model_sha256": "ab" * 32,
                "numerics": "numerics-v1 1.0.0",
                "activations": "q8_k",
                "backend": "reference",
                "device": "numpy on the CPU",
                "versions": {"numpy": "2"},
                "tokens": (5, 6, 7),
                "n_layers": 2,
                "positions": (0, 1, 2),
                "plan": {},
                **stated,
            }
        )
        margins = np.arange(T)
        items = [
            Saved(key, values, None, margins if key[0] == "moe_router" and file_format != "aprt" else None)
            for key, values in arrays.items()
        ]
        write_trace(tmp_path / name, manifest, items, file_format)
        return tmp_path / name

    return save


def flip(key, at):
    def change(arrays):
        arrays[key].view(np.uint32)[at] ^= 1

    return change


def test_two_traces_of_the_same_bits_give_0(exactmoe, save):
    outcome = exactmoe("diff", save("a"), save("b"))
    assert outcome.status == 0, outcome.out
    last = outcome.out.rstrip().splitlines()[-1]
    assert last == "DIFF: equal (bit for bit): 10 of 10 stages compared, 168 elements, 0 differ in bits"


def test_one_flipped_bit_gives_1_its_place_and_both_values_everywhere(exactmoe, save, tmp_path):
    left, right = save("a"), save("b", flip(("q", 1), (2, 5)))
    files = [tmp_path / name for name in ("found.json", "found.html", "found.xml")]
    options = [part for name, path in zip(("--json", "--html", "--junit"), files, strict=True) for part in (name, path)]
    outcome = exactmoe("diff", left, right, *options)
    assert outcome.status == 1
    assert "q, layer 1: 1 of 24 differ, 1 ULP at worst" in outcome.out
    found = json.loads(files[0].read_text())
    first = found["first_difference"]
    assert (first["stage"], first["layer"], first["first"]["coordinates"]) == ("q", 1, [2, 5])
    assert int(first["first"]["left_bits"], 16) ^ int(first["first"]["right_bits"], 16) == 1
    for path in files[1:]:
        assert first["first"]["right_bits"] in path.read_text()
    assert 'failures="1"' in files[2].read_text()


def test_json_on_stdout_moves_the_table_to_stderr(exactmoe, save):
    left, right = save("a"), save("b")
    for given in (["--json"], ["--json", "-"]):
        outcome = exactmoe("diff", left, right, *given)
        assert json.loads(outcome.out)["verdict"] == "equal"
        assert "DIFF: equal" in outcome.err


def test_a_stage_on_one_side_only_gives_1(exactmoe, save):
    outcome = exactmoe("diff", save("a"), save("b", lambda arrays: arrays.pop(("q", 0))))
    assert outcome.status == 1
    assert "q, layer 0: missing on the right" in outcome.out


def test_margins_recorded_at_capture_stand_beside_a_flip(exactmoe, save):
    def choose(arrays):
        arrays["moe_router_indices", 0][2] = [0, 1]
        arrays["moe_router_indices", 0][1] = arrays["moe_router_indices", 0][1, ::-1]

    outcome = exactmoe("diff", save("a"), save("b", choose))
    assert outcome.status == 1
    assert "router, layer 0: 1 same, 1 reordered, 1 unexplained flip" in outcome.out
    assert "(2 ULP), logit error 0" in outcome.out


def test_a_tolerance_is_named_in_the_verdict(exactmoe, save):
    pair = save("a"), save("b", flip(("q", 1), (2, 5)))
    kept = exactmoe("diff", *pair, "--atol", "1e-5")
    assert kept.status == 0
    assert "DIFF: equal (within atol=1e-05, rtol=0): " in kept.out
    assert "1 differ in bits" in kept.out
    assert exactmoe("diff", *pair, "--rtol", "0").status == 1


def test_a_trace_in_aprt_files_is_compared_with_one_in_safetensors(exactmoe, save):
    left, right = save("a"), save("b", file_format="aprt")
    outcome = exactmoe("diff", left, right)
    assert outcome.status == 0, outcome.out
    (right / "manifest.json").unlink()
    foreign = exactmoe("diff", left, right)
    assert foreign.status == 0, foreign.out
    assert "foreign trace on the right" in foreign.out
    assert "not every trace states its tokens" in foreign.out
    assert exactmoe("diff", left, save("c", flip(("q", 0), (0, 0)), "aprt")).status == 1


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"tokens": (5, 6, 8)}, "different tokens: position 2 is 7 and 8"),
        ({"model_sha256": "cd" * 32}, "differ in model digest"),
        ({"numerics": "numerics-v1 2.0.0"}, "differ in numerics version"),
        ({"activations": "q16_k"}, "differ in activation profile: q8_k and q16_k; --force compares them all the same"),
    ],
)
def test_runs_that_cannot_be_compared_give_2(exactmoe, save, stated, said):
    left, right = save("a"), save("b", **stated)
    outcome = exactmoe("diff", left, right)
    assert (outcome.status, outcome.out) == (2, "")
    assert said in outcome.err
    assert exactmoe("diff", left, right, "--force").status == (2 if "tokens" in stated else 0)


def test_what_is_no_trace_gives_2(exactmoe, save, tmp_path):
    good, empty, file = save("a"), tmp_path / "empty", tmp_path / "file.json"
    empty.mkdir()
    file.write_text("{}")
    cut = save("cut")
    manifest = cut / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    for other, said in (
        (tmp_path / "nowhere", "nowhere: there is no such file or folder"),
        (empty, "holds neither manifest.json nor an .aprt file"),
        (cut, "the trace is incomplete"),
        (file, "is a trace folder and "),
    ):
        outcome = exactmoe("diff", good, other)
        assert outcome.status == 2, said
        assert said in outcome.err


def test_an_altered_file_gives_2_and_no_report(exactmoe, save, tmp_path):
    left, right = save("a"), save("b")
    shutil.copy(right / "layer-0" / "q.safetensors", right / "layer-1" / "q.safetensors")
    outcome = exactmoe("diff", left, right, "--html", tmp_path / "found.html")
    assert outcome.status == 2
    assert "layer-1/q.safetensors: its values are not those of the manifest" in outcome.err
    assert not (tmp_path / "found.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--atol", "x"], "'x' is not a number"),
        (["--rtol", "-1"], "rtol must be a finite number of at least 0"),
        (["--atol", "nan"], "atol must be a finite number of at least 0"),
        (["--html", "/nowhere/at.html"], "there is no folder /nowhere"),
        (["--json", "/nowhere/at.json"], "there is no folder /nowhere"),
    ],
)
def test_wrong_arguments_give_2(exactmoe, save, arguments, said):
    outcome = exactmoe("diff", save("a"), save("b"), *arguments)
    assert outcome.status == 2
    assert said in outcome.err


@pytest.fixture
def digest(tmp_path):
    """Write a digest file under a name; `change` edits the arrays it hashes."""
    from exactmoe.parity.trace.digest import tree_of

    def digest(name, change=None, **header):
        arrays = {key: values.copy() for key, values in stages()}
        if change is not None:
            change(arrays)
        stated = {"model_sha256": "ab", "numerics": "n", "activations": "q8_k", "tokens": [5, 6, 7], **header}
        (tmp_path / name).write_text(tree_of(stated, arrays.items()).to_json())
        return tmp_path / name

    return digest


def test_equal_digest_files_are_equal_after_one_hash(exactmoe, digest):
    outcome = exactmoe("diff", digest("a.json"), digest("b.json"))
    assert outcome.status == 0
    assert "DIFF: equal: 10 stages on both sides, 0 differ, 1 hashes compared" in outcome.out


def test_differing_digest_files_name_the_rows(exactmoe, digest):
    def change(arrays):
        arrays["q", 1][[0, 2]] = arrays["q", 1][[2, 0]]

    outcome = exactmoe("diff", digest("a.json"), digest("b.json", change), "--json")
    assert outcome.status == 1
    found = json.loads(outcome.out)
    assert found["differing"] == [{"stage": "q", "layer": 1, "positions": [0, 2]}]
    assert not found["equal"]
    assert "q, layer 1: positions 0, 2" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--atol", "1"], "--atol is for traces"),
        (["--html", "x.html"], "--html is for traces"),
        (["--force"], "--force is for"),
    ],
)
def test_options_for_values_are_refused_for_digest_files(exactmoe, digest, arguments, said):
    outcome = exactmoe("diff", digest("a.json"), digest("b.json"), *arguments)
    assert outcome.status == 2
    assert said in outcome.err


def test_digest_files_of_other_tokens_are_refused(exactmoe, digest):
    outcome = exactmoe("diff", digest("a.json"), digest("b.json", tokens=[5, 6, 8]))
    assert outcome.status == 2
    assert "differ in tokens" in outcome.err
