"""Attention over the integer cache."""

from collections.abc import Callable

import pytest
import torch

from exactmoe.kernels.attention import attend, attention_scores, attention_softmax
from exactmoe.parity.cases import Attend, Case, tensors


@pytest.mark.cases("attend", "attention_scores", "attention_softmax")
def test_attention_equals_the_reference_bit_for_bit(case: Case, check: Callable[..., None]) -> None:
    check(case)


def test_a_later_key_changes_no_earlier_output(device: torch.device) -> None:
    q, kv, start = tensors(Attend(7, 8, 2, 64, 255).arguments(), device)
    before = attend(q, kv, start)
    kv.k[start + 3 :], kv.v[start + 3 :], kv.k_scale[start + 3 :] = 77, 77, 1.0
    after = attend(q, kv, start)
    assert after[:3].equal(before[:3])
    assert not any(after[t].equal(before[t]) for t in range(3, 7))


def test_softmax_is_zero_and_the_score_minus_infinity_beyond_the_query(device: torch.device) -> None:
    q, kv, start = tensors(Attend(7, 8, 2, 64, 1).arguments(), device)
    scores, weights = attention_scores(q, kv, start), attention_softmax(q, kv, start)
    for t in range(7):
        assert (scores[t, :, start + t + 1 :] == float("-inf")).all() and (weights[t, :, start + t + 1 :] == 0).all()
        assert scores[t, :, : start + t + 1].isfinite().all()
        assert torch.allclose(weights[t].sum(dim=-1), torch.ones(8, device=device), atol=1e-5)
