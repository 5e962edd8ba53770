"""Quantised matmul, dense and grouped."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from exactmoe.kernels.formats import Q4_K
from exactmoe.kernels.matmul import grouped_matmul, matmul
from exactmoe.kernels.tensors import Activations, quant_matrix
from exactmoe.parity.cases import Case, GroupedMatmul, tensors


@pytest.mark.cases("matmul", "grouped_matmul")
def test_matmul_equals_the_reference_bit_for_bit(case: Case, check: Callable[..., None]) -> None:
    check(case)


@pytest.mark.parametrize("x", [127, -127])
def test_the_largest_q4_k_sums_are_exact(x: int, device: torch.device) -> None:
    """Every code 15, every scale and min 63, every activation at its bound: sc*q*x sums to 30 million."""
    block = torch.full((1, 144), 0xFF, dtype=torch.uint8, device=device)
    block[0, :4] = torch.tensor([0, 0x3C, 0, 0], dtype=torch.uint8)  # d = 1, dmin = 0
    q = torch.full((1, 1, 256), x, dtype=torch.int8, device=device)
    sums = torch.full((1, 1, 16), 16 * x, dtype=torch.int16, device=device)
    y = matmul(quant_matrix(block, Q4_K, "w"), Activations(q, torch.ones(1, 1, device=device), sums))
    assert y.item() == float(np.float32(256 * 63 * 15 * x))


def test_a_routed_row_equals_the_dense_product_with_its_expert(device: torch.device) -> None:
    case = GroupedMatmul(7, 5, 3, 48, 256, "Q6_K", "q16_k", "ragged")
    weight, x, rows, per = tensors(case.arguments(), device)
    routed = grouped_matmul(weight, x, rows, per)
    order, offset = rows.order.tolist(), rows.offset.tolist()
    assert sorted(order) == list(range(21))
    for e in range(case.E):
        dense = matmul(quant_matrix(weight.data[e], weight.format, "w"), x)
        for r in order[offset[e] : offset[e + 1]]:
            assert routed[r].equal(dense[r // per]), f"row {r} of expert {e}"
