import numpy as np
import pytest

from exactmoe.kernels.errors import InvalidInput
from exactmoe.parity.diff.router import RouterVerdict, diff_router

LOGITS = np.array([[4, 3, 2, 1], [1, 2, 2.5, 9]], np.float32)
IDS = np.array([[0, 1], [3, 2]], np.int32)


def judged(right, change=0.0, left_logits=LOGITS, **options):
    right_logits = None if left_logits is None else (left_logits + np.asarray(change, np.float32)).astype(np.float32)
    found = diff_router(
        1, IDS, np.asarray(right, np.int32), left_logits=left_logits, right_logits=right_logits, **options
    )
    return [token.verdict for token in found.tokens]


SAME, REORDERED, EXPLAINED, UNEXPLAINED = RouterVerdict


def test_the_same_experts_in_the_same_order_are_the_same_whatever_the_logits_do():
    assert judged(IDS, [[9, 0, 0, 0]]) == [SAME, SAME]


def test_the_same_experts_in_another_order_are_reordered():
    assert judged([[1, 0], [3, 2]]) == [REORDERED, SAME]


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ([0, 0, 1.5, 0], EXPLAINED),
        ([0, -0.75, 0.75, 0], EXPLAINED),
        ([0, 0, 1.0, 0], EXPLAINED),
        ([0, 0, 0.9, 0], UNEXPLAINED),
        ([5, 5, 5, 5], UNEXPLAINED),
        ([0, 0, 0, 0], UNEXPLAINED),
    ],
)
def test_a_flip_is_explained_where_differences_of_logits_moved_by_the_margin(change, verdict):
    assert judged([[0, 2], [3, 2]], [change, [0, 0, 0, 0]]) == [verdict, SAME]


def test_a_tie_broken_the_other_way_without_any_error_is_not_explained():
    tied = np.array([[4, 3, 3, 1], [1, 2, 2.5, 9]], np.float32)
    assert judged([[0, 2], [3, 2]], 0, tied) == [UNEXPLAINED, SAME]
    assert judged([[0, 2], [3, 2]], [[0, 0, 1e-6, 0], [0, 0, 0, 0]], tied) == [EXPLAINED, SAME]


def test_without_logits_or_with_nan_among_them_no_flip_is_explained():
    assert judged([[0, 2], [3, 2]], left_logits=None) == [UNEXPLAINED, SAME]
    assert judged([[0, 2], [3, 2]], [[0, 0, np.nan, 0], [0, 0, 0, 0]]) == [UNEXPLAINED, SAME]


def test_a_choice_that_is_not_the_best_on_its_own_side_explains_nothing():
    wrong = LOGITS[:, ::-1].copy()
    assert judged([[0, 2], [3, 2]], [[0, 0, 9, 0], [0, 0, 0, 0]], wrong) == [UNEXPLAINED, SAME]


def test_margins_are_those_between_the_last_chosen_and_the_best_of_the_others():
    found = diff_router(0, IDS, IDS, left_logits=LOGITS, right_logits=LOGITS)
    assert [token.margin for token in found.tokens] == [1.0, 0.5]
    assert [token.margin_ulp for token in found.tokens] == [2**22, 2**21]
    recorded = diff_router(0, IDS, IDS, margin_ulp=np.array([7, 8]), positions=np.array([30, 31]))
    assert [(token.position, token.margin_ulp, token.margin) for token in recorded.tokens] == [
        (30, 7, None),
        (31, 8, None),
    ]


def test_a_recorded_margin_that_is_none_is_shown_as_none():
    found = diff_router(0, IDS, IDS, margin_ulp=np.array([-1, 2**32]))
    assert [token.margin_ulp for token in found.tokens] == [None, None]


def test_a_router_that_chooses_every_expert_has_no_margin():
    everything = np.array([[0, 1]], np.int32)
    logits = np.array([[2, 1]], np.float32)
    (token,) = diff_router(0, everything, everything, left_logits=logits, right_logits=logits).tokens
    assert (token.margin, token.margin_ulp, token.error) == (None, None, 0)


def test_the_counts_are_in_the_line_of_the_layer():
    found = diff_router(3, IDS, np.array([[1, 0], [0, 1]], np.int32))
    assert str(found) == "router, layer 3: 1 reordered, 1 unexplained flip"
    assert len(found.changed) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"left_logits": LOGITS[:1]}, "left router logits must be"),
        ({"positions": np.arange(3)}, "positions must be"),
        ({"margin_ulp": np.arange(3)}, "margin_ulp must be"),
    ],
)
def test_arrays_of_other_tokens_are_refused(options, said):
    with pytest.raises(InvalidInput, match=said):
        diff_router(0, IDS, IDS, **options)
