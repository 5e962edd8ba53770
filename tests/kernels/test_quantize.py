"""Activation quantisation."""

from collections.abc import Callable

import pytest
import torch

from exactmoe.kernels.quantize import quantize
from exactmoe.parity.cases import Case


@pytest.mark.cases("quantize")
def test_quantised_activations_equal_the_reference_bit_for_bit(case: Case, check: Callable[..., None]) -> None:
    check(case)


def test_the_first_of_equal_magnitudes_becomes_minus_127(device: torch.device) -> None:
    x = torch.zeros(2, 256, device=device)
    x[0, 3], x[0, 200] = 5.0, -5.0
    x[1, 3], x[1, 200] = -5.0, 5.0
    q, scale, _ = quantize(x, "q8_k")
    assert q[0, :, 3].tolist() == [-127, -127] and q[0, :, 200].tolist() == [127, 127]
    assert scale[0].item() < 0 < scale[1].item()


def test_sixteen_bit_slices_join_to_the_value_and_stay_in_their_ranges(device: torch.device) -> None:
    x = torch.randn(7, 512, generator=torch.Generator().manual_seed(5)).to(device)
    q, scale, _ = quantize(x, "q16_k")
    hi, lo = q.to(torch.float64)
    assert hi.abs().max() <= 127 and lo.min() >= -64 and lo.max() <= 63
    joined = (128 * hi + lo) * scale.to(torch.float64).repeat_interleave(256, dim=1)
    assert (joined - x).abs().max() <= 0.51 * scale.abs().max()
