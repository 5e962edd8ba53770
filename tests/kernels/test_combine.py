"""The weighted sum of expert outputs."""

from collections.abc import Callable

import pytest

from exactmoe.parity.cases import Case


@pytest.mark.cases("combine")
def test_combine_equals_the_reference_bit_for_bit(case: Case, check: Callable[..., None]) -> None:
    check(case)
