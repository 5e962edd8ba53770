"""Greedy choice."""

from collections.abc import Callable

import pytest
import torch

from exactmoe.kernels.argmax import argmax
from exactmoe.parity.cases import Case


@pytest.mark.cases("argmax")
def test_argmax_equals_the_reference_bit_for_bit(case: Case, check: Callable[..., None]) -> None:
    check(case)


def test_the_smaller_of_equal_ids_wins_zeros_are_equal_and_nan_is_below_everything(device: torch.device) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[0.0, 1.0, 1.0], [-0.0, 0.0, -1.0], [nan, -inf, nan], [nan, nan, nan], [-inf, inf, inf]]
    assert argmax(torch.tensor(rows, device=device)).tolist() == [1, 0, 1, 0, 1]
