"""The kernels of a decode step, against the reference."""

from collections.abc import Callable

import pytest
import torch

from exactmoe.kernels.argmax import argmax, choose
from exactmoe.kernels.matmul import matmul
from exactmoe.kernels.matvec import matvec
from exactmoe.kernels.packed import pack
from exactmoe.kernels.quantize import quantize
from exactmoe.parity.cases import Case, Matvec, tensors


@pytest.mark.cases("matvec", "decode_router", "experts_up", "experts_down", "decode_attention")
def test_a_kernel_of_the_decode_step_equals_the_reference_bit_for_bit(case: Case, check: Callable[..., None]) -> None:
    check(case)


@pytest.mark.parametrize("profile", ["q8_k", "q16_k"])
@pytest.mark.parametrize("fmt", ["Q4_K", "Q6_K"])
def test_one_token_by_bytes_equals_a_matmul_on_tensor_cores(fmt: str, profile: str, device: torch.device) -> None:
    case = Matvec(100, 1024, fmt, profile)
    (weight,), x, *_ = tensors(case.arguments(), device)
    assert matvec([pack(weight)], x, profile).equal(matmul(weight, quantize(x[None], profile))[0])


def test_packing_loses_no_bit_of_a_block(device: torch.device) -> None:
    (weight,), *_ = tensors(Matvec(5, 768, "Q6_K", "q8_k").arguments(), device)
    packed = pack(weight)
    low = packed.words.view(torch.uint8).view(5, 3, 128)
    high = packed.high.view(torch.uint8).view(5, 3, 64) ^ 0xAA
    scales = packed.scales.view(torch.uint8).view(5, 3, 2, 2, 4).transpose(3, 4).reshape(5, 3, 16)
    d = packed.d.view(torch.uint8).view(5, 3, 2)
    assert torch.cat([low, high, scales, d], dim=2).view(5, -1).equal(weight.data)


def test_q4_k_is_packed_where_it_lies(device: torch.device) -> None:
    (weight,), *_ = tensors(Matvec(5, 768, "Q4_K", "q8_k").arguments(), device)
    assert pack(weight).words.data_ptr() == weight.data.data_ptr()


def test_a_choice_moves_on_by_one(device: torch.device) -> None:
    logits = torch.tensor([0.0, 3.0, -1.0, 3.0], device=device)
    token, position = (torch.tensor([i], dtype=torch.int32, device=device) for i in (9, 41))
    choose(logits, token, position)
    assert (token.item(), position.item()) == (int(argmax(logits[None])[0]), 42) == (1, 42)
