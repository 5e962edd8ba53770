"""Embedding rows."""

from collections.abc import Callable

import pytest

from exactmoe.parity.cases import Case


@pytest.mark.cases("embed")
def test_embedding_rows_equal_the_reference_bit_for_bit(case: Case, check: Callable[..., None]) -> None:
    check(case)
