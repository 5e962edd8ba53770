import io
import json
from dataclasses import replace

import numpy as np
import pytest

from exactmoe.kernels.errors import InvalidInput
from exactmoe.model import stages
from exactmoe.parity.diff.metrics import Tolerance
from exactmoe.parity.diff.report import as_json, cell, print_report
from exactmoe.parity.diff.router import RouterVerdict
from exactmoe.parity.diff.traces import diff_traces
from exactmoe.parity.diff.verdict import Verdict

KEYS = stages.keys(2)


def text_of(report):
    out = io.StringIO()
    print_report(report, out)
    return out.getvalue()


def row(report, stage, layer=-1):
    (found,) = [r for r in report.rows if (r.stage, r.layer) == (stage, layer)]
    return found


def test_two_traces_of_equal_bits_are_equal_in_every_stage(trace):
    report = diff_traces(trace(), trace())
    assert report.equal
    assert report.first is None
    assert [(r.stage, r.layer) for r in report.rows] == KEYS
    assert report.compared == len(KEYS)
    assert report.elements == sum(a.size for a in trace().arrays.values())
    assert (
        report.verdict
        == f"equal (bit for bit): 45 of 45 stages compared, {report.elements:,} elements, 0 differ in bits"
    )
    assert [r.count(RouterVerdict.SAME) for r in report.router] == [5, 5]


@pytest.mark.parametrize("key", KEYS)
def test_one_flipped_bit_is_found_in_its_stage_and_layer(trace, key):
    left, right = trace(), trace()
    right.arrays[key].view(np.uint32).reshape(-1)[3] ^= 1
    report = diff_traces(left, right)
    assert not report.equal
    assert [(r.stage, r.layer) for r in report.failed] == [key]
    assert report.differing == 1
    assert str(report.first) in report.verdict


def test_the_first_difference_is_the_first_to_happen(trace):
    left, right = trace(), trace()
    for key in (("lm_head", -1), ("attn_norm", 1), ("post_ffn_residual", 0)):
        right.arrays[key][4, 1] += 1
    assert (diff_traces(left, right).first.name) == "post_ffn_residual, layer 0"


@pytest.mark.parametrize("side", [0, 1])
def test_a_stage_on_one_side_only_is_missing_and_fails(trace, side):
    pair = [trace(), trace()]
    del pair[side].arrays["q", 1]
    report = diff_traces(*pair)
    assert not report.equal
    assert row(report, "q", 1).verdict is Verdict.MISSING
    assert row(report, "q", 1).text == f"missing on the {('left', 'right')[side]}"
    assert report.compared == 44
    assert "44 of 45 stages compared" in report.verdict


def test_a_difference_comes_before_what_is_missing(trace):
    left, right = trace(), trace()
    del right.arrays["embedding", -1]
    right.arrays["q", 0][0, 0] += 1
    assert diff_traces(left, right).first.name == "q, layer 0"


def test_traces_that_hold_nothing_are_not_equal(trace):
    empty = replace(trace(), arrays={})
    report = diff_traces(empty, empty)
    assert not report.equal
    assert report.verdict == "NOT EQUAL (bit for bit): nothing was compared"


def test_traces_without_positions_are_not_equal(trace):
    none = replace(trace(), positions=np.arange(0), arrays={key: a[:0] for key, a in trace().arrays.items()})
    report = diff_traces(none, none)
    assert not report.equal
    assert report.compared == 0


def test_rows_are_compared_by_their_position(trace):
    left, right = trace(), trace()
    order = np.array([2, 0, 1, 4, 3])
    right.positions = order
    right.arrays = {key: a[order] for key, a in right.arrays.items()}
    right.arrays["q", 0][0, 1] += 1
    report = diff_traces(left, right)
    assert [r.name for r in report.failed] == ["q, layer 0"]
    assert report.first.first.where == "position 2, column 1"


def test_other_positions_are_named_and_nothing_is_compared(trace):
    left, right = trace(), trace()
    left.positions, right.positions = np.arange(5), np.arange(3, 8)
    report = diff_traces(left, right)
    assert not report.equal
    assert report.elements == 0
    assert {r.verdict for r in report.rows} == {Verdict.SHAPE}
    assert report.first.text == "other positions: 5, of which only here 0, 1, 2 and 5, of which only here 5, 6, 7"


def test_a_stage_of_fewer_rows_than_positions_is_of_another_shape(trace):
    left, right = trace(), trace()
    for side in (left, right):
        side.arrays["v", 0] = side.arrays["v", 0][:4]
    assert row(diff_traces(left, right), "v", 0).verdict is Verdict.SHAPE


def test_kept_expert_rows_are_compared_by_position_rank_and_expert(trace):
    left, right = trace(), trace()
    key = "moe_expert_up", 1
    rows = np.array([[0, 0, 3], [2, 1, 3], [4, 0, 3]], np.int32)
    for side, order in ((left, [0, 1, 2]), (right, [2, 0, 1])):
        side.arrays[key] = side.arrays[key][[0, 2, 4], 0][order]
        side.kept[key] = rows[order]
    assert diff_traces(left, right).equal
    right.arrays[key][0, 5] += 1
    assert diff_traces(left, right).first.first.where == "position 4, rank 0, expert 3, column 5"
    right.kept[key] = rows[[2, 0, 1]] + np.array([0, 0, 1], np.int32)
    assert "other (position, rank, expert) rows: 3, of which only here (0, 0, 3)" in diff_traces(left, right).first.text
    del right.kept[key]
    assert "one side keeps the rows of some experts only" in diff_traces(left, right).first.text


def test_experts_that_no_position_goes_to_are_noted_and_compared_as_nothing(trace):
    left, right = trace(), trace()
    key = "moe_expert_up", 1
    for side in (left, right):
        side.arrays[key] = side.arrays[key][:0, 0]
        side.kept[key] = np.zeros((0, 3), np.int32)
    report = diff_traces(left, right)
    assert report.equal
    assert report.notes == ("moe_expert_up, layer 1: neither side has a row of the experts that were kept",)
    assert (len(report.rows), report.compared) == (44, 44)
    for side in (left, right):
        side.arrays = {key: side.arrays[key]}
    assert not diff_traces(left, right).equal
    right.kept[key] = np.zeros((1, 3), np.int32)
    assert diff_traces(left, right).first.verdict is Verdict.SHAPE


def test_the_expert_of_a_difference_is_named(trace):
    left, right = trace(), trace()
    right.arrays["moe_expert_out", 0][3, 1, 2] += 1
    expert = left.arrays["moe_router_indices", 0][3, 1]
    assert diff_traces(left, right).first.first.where == f"position 3, rank 1, column 2, expert {expert}"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tokens": (3, 1, 5, 1, 5)}, "different tokens: position 2 is 4 and 5"),
        ({"tokens": (3, 1, 4)}, "different tokens: 5 and 3 tokens"),
        ({"model_sha256": "cd" * 32}, "model digest: abab"),
        ({"numerics": "numerics-v1 2.0.0"}, "numerics version: numerics-v1 1.0.0 and numerics-v1 2.0.0"),
        ({"activations": "q16_k"}, "activation profile: q8_k and q16_k"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(trace, changed, said):
    with pytest.raises(InvalidInput, match=said):
        diff_traces(trace(), trace().but(**changed))


def test_force_compares_other_models_and_says_so_but_never_other_tokens(trace):
    report = diff_traces(trace(), trace().but(activations="q16_k"), force=True)
    assert report.equal
    assert report.notes == ("compared by force, though they differ in activation profile: q8_k and q16_k",)
    with pytest.raises(InvalidInput, match="different tokens"):
        diff_traces(trace(), trace().but(tokens=(1,)), force=True)


@pytest.fixture
def foreign(trace):
    flat = {key: a.astype(np.float32).reshape(-1) for key, a in trace().arrays.items()}
    stated = dict.fromkeys(("model", "model_sha256", "numerics", "activations", "device"), "")
    return replace(trace(), arrays=flat).but(backend="aprt", tokens=(), **stated)


def test_a_foreign_trace_is_compared_flat_and_the_verdict_says_so(trace, foreign):
    report = diff_traces(trace(), foreign)
    assert report.equal
    assert row(report, "q", 0).text.endswith("(compared flat: float32 [5, 6] and float32 [30])")
    assert any("foreign trace on the right" in note for note in report.notes)
    assert any("not every trace states its tokens" in note for note in report.notes)
    foreign.arrays["q", 0][7] += 1
    assert diff_traces(trace(), foreign).first.first.at == (1, 1)
    foreign.arrays["q", 0] = foreign.arrays["q", 0][:-1]
    assert diff_traces(trace(), foreign).first.verdict is Verdict.SHAPE


def test_a_tolerance_for_a_foreign_trace_is_named_in_the_verdict(trace, foreign):
    foreign.arrays["q", 0] += np.float32(1e-4)
    tolerance = Tolerance(atol=1e-3)
    report = diff_traces(trace(), foreign, tolerance)
    assert report.equal
    assert report.verdict.startswith("equal (within atol=0.001, rtol=0)")
    assert "30 differ in bits" in report.verdict
    assert cell(row(report, "q", 0)) == "~"
    assert row(report, "q", 0).text.startswith("match within atol=0.001, rtol=0: 30 of 30 bits differ")
    assert not diff_traces(trace(), foreign).equal


def test_a_stage_of_another_engine_comes_last_under_its_own_name(trace, foreign):
    left = trace()
    left.arrays["their_stage", 0] = foreign.arrays["their_stage", 0] = np.ones(3, np.float32)
    report = diff_traces(replace(left, positions=np.arange(0)), foreign)
    assert (report.rows[-1].stage, report.rows[-1].passed) == ("their_stage", True)


def test_a_router_flip_is_explained_by_the_logits_of_both_traces(trace):
    left, right = trace(), trace()
    for side in (left, right):
        side.arrays["moe_router_logits", 1][2] = [4, 3, 2.5, 0]
        side.arrays["moe_router_indices", 1][2] = [0, 1]
    right.arrays["moe_router_logits", 1][2, 2] = 3.5
    right.arrays["moe_router_indices", 1][2] = [0, 2]
    left.margins[1] = np.arange(5)
    report = diff_traces(left, right)
    (token,) = report.router[1].changed
    assert (token.position, token.verdict, token.margin, token.margin_ulp) == (2, RouterVerdict.EXPLAINED, 0.5, 2)
    assert "router, layer 1: 4 same, 1 explained flip" in text_of(report)
    del right.arrays["moe_router_logits", 1]
    (token,) = diff_traces(left, right).router[1].changed
    assert (token.verdict, token.error) == (RouterVerdict.UNEXPLAINED, None)


def test_the_text_has_a_table_the_first_difference_and_the_verdict(trace):
    left, right = trace(), trace()
    right.arrays["q", 1][2, 3] = np.nan
    right.arrays["lm_head", -1].view(np.uint32)[0, 0] ^= 1
    report = diff_traces(left, right, names=("a/one", "b/two"))
    lines = text_of(report).splitlines()
    assert lines[:2] == ["left   a/one", "right  b/two"]
    assert ["q", "=", "NaN-R"] in [line.split() for line in lines]
    assert ["lm_head", "1"] in [line.split() for line in lines]
    assert ["post_ffn_residual", "=", "="] in [line.split() for line in lines]
    assert any(line.startswith("    first (2, 3) (position 2, column 3): ") for line in lines)
    assert lines[-1].startswith("DIFF: NOT EQUAL (bit for bit): 45 of 45 stages compared")


def test_a_model_of_many_layers_is_printed_in_several_tables(trace):
    left, right = trace(), trace()
    for side in (left, right):
        side.arrays = {("q", layer): np.ones((5, 2), np.float32) for layer in range(30)}
    right.arrays["q", 29][0, 0] = 3
    found = text_of(diff_traces(left, right))
    assert found.count("\nstage") == 4
    assert "L29" in found
    assert "2^23" in found


def test_the_json_holds_every_row_and_only_numbers_that_json_knows(trace):
    left, right = trace(), trace()
    right.arrays["q", 1][2, 3] = np.inf
    found = json.loads(json.dumps(as_json(diff_traces(left, right)), allow_nan=False))
    assert found["verdict"] == "not equal"
    assert len(found["rows"]) == found["stages"] == 45
    wrong = found["first_difference"]
    assert (wrong["stage"], wrong["layer"], wrong["first"]["coordinates"]) == ("q", 1, [2, 3])
    assert (wrong["metrics"]["max_abs"], wrong["metrics"]["cosine"]) == ("inf", None)
    assert wrong["first"]["right_bits"] == "0x7f800000"
    assert len(found["router"][0]["tokens"]) == 5


def test_a_trace_of_ours_in_flat_vectors_is_compared_with_one_in_shape(trace):
    flat = trace()
    flat.arrays = {key: a.astype(np.float32).reshape(-1) for key, a in flat.arrays.items()}
    for pair in ((trace(), flat), (flat, trace()), (flat, flat)):
        report = diff_traces(*pair)
        assert report.equal
        assert report.compared == len(KEYS)
    flat.arrays["q", 1][8] += 1
    assert str(diff_traces(trace(), flat).first.first.at) == "(1, 2)"
    flat.positions = flat.positions[::-1]
    assert {r.verdict for r in diff_traces(trace(), flat).rows} == {Verdict.SHAPE}
