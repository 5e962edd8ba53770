import numpy as np
import pytest

from exactmoe.kernels.errors import InvalidInput
from exactmoe.parity.diff.diff import diff_arrays
from exactmoe.parity.diff.metrics import Tolerance
from exactmoe.parity.diff.verdict import StageDiff, Verdict


@pytest.fixture
def x(rng):
    return rng.standard_normal((3, 4)).astype(np.float32)


def changed(x, at, value):
    y = x.copy()
    y[at] = value
    return y


def test_the_same_bits_match(x):
    found = diff_arrays("q", x, x.copy(), layer=2)
    assert found.passed
    assert found.verdict is Verdict.MATCH
    assert str(found) == "q, layer 2: match: 12 elements, same bits"


def test_one_flipped_bit_differs_and_is_shown_in_decimal_and_hex():
    left, right = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
    right.view(np.uint32)[1, 2] ^= 1
    found = diff_arrays("lm_head", left, right)
    assert not found.passed
    assert found.verdict is Verdict.DIFFER
    assert str(found) == "lm_head: 1 of 6 differ, 1 ULP at worst; first (1, 2): 1.0 0x3f800000 != 1.0000001 0x3f800001"


def test_minus_zero_is_not_zero(x):
    found = diff_arrays("q", changed(x, (0, 0), 0.0), changed(x, (0, 0), -0.0))
    assert found.verdict is Verdict.DIFFER
    assert found.first.right_bits == "0x80000000"


@pytest.mark.parametrize(("side", "verdict"), [(0, Verdict.NAN_LEFT), (1, Verdict.NAN_RIGHT)])
def test_nan_on_one_side_is_named_by_its_side(x, side, verdict):
    pair = [changed(x, (1, 1), 7.0), changed(x, (1, 1), 7.0)]
    pair[side][2, 2] = np.nan
    found = diff_arrays("q", *pair)
    assert found.verdict is verdict
    assert not found.passed
    assert found.first.at == (2, 2)


def test_nan_at_the_same_place_on_both_sides_is_seen_and_does_not_pass(x):
    y = changed(x, (1, 1), np.nan)
    found = diff_arrays("q", y, y.copy())
    assert found.verdict is Verdict.NAN_BOTH
    assert not found.passed
    assert found.differing == 0
    assert "1 of 12 are NaN on both sides" in found.text


def test_an_op_that_promises_nan_may_have_it_match_where_both_have_it(x):
    y = changed(x, (1, 1), np.nan)
    found = diff_arrays("q", y, y.copy(), nan_equal=True)
    assert found.passed
    assert found.text == "match: 12 elements, same bits, 1 of them NaN on both sides"
    assert diff_arrays("q", x, y, nan_equal=True).verdict is Verdict.NAN_RIGHT


def test_a_difference_weighs_more_than_nan_on_both_sides(x):
    y = changed(x, (1, 1), np.nan)
    assert diff_arrays("q", y, changed(y, (0, 0), 9)).verdict is Verdict.DIFFER


@pytest.mark.parametrize(("left", "right"), [(True, False), (False, True), (False, False)])
def test_an_array_that_is_not_there_is_missing(x, left, right):
    found = diff_arrays("q", x if left else None, x if right else None)
    assert found.verdict is Verdict.MISSING
    assert not found.passed
    assert ("left" in found.text, "right" in found.text) == (not left, not right)


def test_nothing_to_compare_does_not_pass(x):
    for stage, empty in (("q", x[:0]), ("moe_router_indices", np.zeros((0, 2), np.int32))):
        found = diff_arrays(stage, empty, empty)
        assert found.verdict is Verdict.MISSING
        assert not found.passed


def test_a_match_of_no_element_does_not_pass():
    assert not StageDiff("q", 0, Verdict.MATCH, "match", "", "").passed


@pytest.mark.parametrize("other", [(4, 3), (12,), (3, 4, 1), (1, 4)])
def test_another_shape_is_not_compared_element_by_element(x, other):
    found = diff_arrays("q", x, np.resize(x, other))
    assert found.verdict is Verdict.SHAPE
    assert (found.passed, found.count) == (False, 0)
    assert found.text == f"float32 [3, 4] != float32 {list(other)}"


def test_another_dtype_is_not_compared(x):
    assert diff_arrays("q", x, x.astype(np.float64)).verdict is Verdict.SHAPE


def test_a_tolerance_is_named_whether_it_is_kept_or_not(x):
    y = changed(x, (1, 1), x[1, 1] + np.float32(0.25))
    kept = diff_arrays("q", x, y, tolerance=Tolerance(atol=0.5))
    assert kept.passed
    assert kept.text == "match within atol=0.5, rtol=0: 1 of 12 bits differ"
    broken = diff_arrays("q", x, y, tolerance=Tolerance(rtol=1e-6))
    assert not broken.passed
    assert broken.text.startswith("1 of 12 differ beyond atol=0, rtol=1e-06")
    assert diff_arrays("q", x, changed(x, (0, 0), np.nan), tolerance=Tolerance(1e30, 1)).verdict is Verdict.NAN_RIGHT


def test_a_dtype_without_bits_is_refused():
    with pytest.raises(InvalidInput, match="q, right: dtype"):
        diff_arrays("q", np.ones(3), np.ones(3, complex))


IDS = np.array([[0, 3], [2, 1], [3, 0]], np.int32)


@pytest.mark.parametrize(
    ("right", "verdict", "said"),
    [
        (IDS, Verdict.MATCH, "match: 6 ids"),
        ([[0, 3], [1, 2], [3, 0]], Verdict.INDEX_REORDERED, "0 have another set of experts, 1 the same set"),
        ([[0, 3], [1, 2], [3, 1]], Verdict.INDEX_SET, "1 have another set of experts, 1 the same set"),
        ([[0, 3], [2, 1], [3, 3]], Verdict.INDEX_SET, "1 have another set of experts, 0 the same set"),
        (IDS + 1, Verdict.INDEX_SET, "3 have another set of experts"),
    ],
)
def test_expert_ids_are_compared_as_sets_and_orders(right, verdict, said):
    found = diff_arrays("moe_router_indices", IDS, np.asarray(right, np.int32), tolerance=Tolerance(100))
    assert found.verdict is verdict
    assert found.passed == (verdict is Verdict.MATCH)
    assert said in found.text
    assert found.metrics is None


def test_ids_may_come_as_flat_floats_and_are_compared_as_ids():
    foreign = IDS.astype(np.float32).reshape(-1)
    assert diff_arrays("moe_router_indices", IDS, foreign).passed
    assert diff_arrays("moe_router_indices", foreign, IDS).passed
    assert diff_arrays("moe_router_indices", IDS, foreign[::-1].copy()).verdict is Verdict.INDEX_REORDERED
    assert diff_arrays("moe_router_indices", foreign, foreign[::-1].copy()).verdict is Verdict.INDEX_SET
    assert diff_arrays("moe_router_indices", IDS, foreign + np.float32(0.5)).verdict is Verdict.SHAPE
    assert diff_arrays("moe_router_indices", IDS, foreign * np.float32(np.nan)).verdict is Verdict.SHAPE
    assert diff_arrays("moe_router_indices", IDS, foreign[:-1]).verdict is Verdict.SHAPE
