"""Router logits and routing."""

from collections.abc import Callable

import pytest
import torch

from exactmoe.kernels.router import route, router_bits
from exactmoe.parity.cases import Case


@pytest.mark.cases("prepare_router", "router_logits", "route")
def test_router_equals_the_reference_bit_for_bit(case: Case, check: Callable[..., None]) -> None:
    check(case)


def test_equal_scores_go_to_the_smaller_experts_with_equal_weights(device: torch.device) -> None:
    routing = route(torch.zeros(3, 12, device=device), 4)
    assert routing.expert.tolist() == [[0, 1, 2, 3]] * 3
    assert routing.weight.tolist() == [[0.25] * 4] * 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_gets_the_first_experts_and_no_weight(bad: float, device: torch.device) -> None:
    logits = torch.arange(24, dtype=torch.float32, device=device).reshape(2, 12).contiguous()
    logits[0, 7] = bad
    routing = route(logits, 3)
    assert routing.expert.tolist() == [[0, 1, 2], [11, 10, 9]]
    assert routing.weight[0].isnan().all() and not routing.weight[1].isnan().any()


@pytest.mark.parametrize("width", [256, 300, 512, 2048, 16384])
def test_router_bits_keep_every_partial_sum_exact(width: int) -> None:
    x, w = router_bits(width)
    assert width * 2**x * 2**w <= 2**52
