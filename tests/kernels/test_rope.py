"""QK-norm and rotation."""

from collections.abc import Callable

import pytest
import torch

from exactmoe.kernels.norm import rms_norm
from exactmoe.kernels.rope import qk_norm_rope, rope_table
from exactmoe.parity.cases import Case
from exactmoe.parity.reference import rope as reference


@pytest.mark.cases("qk_norm_rope")
def test_normed_and_rotated_heads_equal_the_reference_bit_for_bit(case: Case, check: Callable[..., None]) -> None:
    check(case)


@pytest.mark.parametrize(("positions", "width", "base"), [(1, 2, 1e4), (300, 64, 1e4), (70, 128, 1e6)])
def test_the_table_equals_the_reference_bit_for_bit(
    positions: int, width: int, base: float, device: torch.device, same: Callable[..., None]
) -> None:
    table = rope_table(positions, width, base, device)
    expected = reference.rope_table(positions, width, base)
    same({"cos": table.cos.cpu().numpy(), "sin": table.sin.cpu().numpy()}, expected._asdict(), "table")


def test_position_zero_does_not_turn(device: torch.device) -> None:
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(3)).to(device)
    weight = torch.ones(64, device=device)
    turned = qk_norm_rope(x, weight, 0.0, rope_table(2, 64, 1e4, device), 0)
    assert turned.view(2, 64).equal(rms_norm(x.view(2, 64), weight, 0.0))
