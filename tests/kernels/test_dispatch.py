"""Grouping rows by expert."""

from collections.abc import Callable

import pytest
import torch

from exactmoe.kernels.dispatch import dispatch
from exactmoe.parity.cases import Case


@pytest.mark.cases("dispatch")
def test_dispatch_equals_the_reference_bit_for_bit(case: Case, check: Callable[..., None]) -> None:
    check(case)


def test_rows_of_an_expert_keep_their_order_and_empty_experts_keep_their_place(device: torch.device) -> None:
    expert = torch.tensor([[3, 1], [1, 3], [3, 0]], dtype=torch.int32, device=device)
    order, offset = dispatch(expert, 5)
    assert order.tolist() == [5, 1, 2, 0, 3, 4]
    assert offset.tolist() == [0, 1, 3, 3, 6, 6]
