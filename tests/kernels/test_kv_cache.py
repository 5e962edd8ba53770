"""The integer cache."""

from collections.abc import Callable

import pytest

from exactmoe.parity.cases import Case


@pytest.mark.cases("append")
def test_appended_keys_and_values_equal_the_reference_bit_for_bit(case: Case, check: Callable[..., None]) -> None:
    check(case)
