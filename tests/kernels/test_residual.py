"""The residual add."""

from collections.abc import Callable

import pytest

from exactmoe.parity.cases import Case


@pytest.mark.cases("add")
def test_residual_add_equals_the_reference_bit_for_bit(case: Case, check: Callable[..., None]) -> None:
    check(case)
