"""RMSNorm, alone and with its activations."""

from collections.abc import Callable

import pytest

from exactmoe.parity.cases import Case


@pytest.mark.cases("rms_norm", "rms_norm_quantize")
def test_norm_equals_the_reference_bit_for_bit(case: Case, check: Callable[..., None]) -> None:
    check(case)
