"""SwiGLU, alone and with its activations."""

from collections.abc import Callable

import pytest

from exactmoe.parity.cases import Case


@pytest.mark.cases("swiglu", "swiglu_quantize")
def test_swiglu_equals_the_reference_bit_for_bit(case: Case, check: Callable[..., None]) -> None:
    check(case)
