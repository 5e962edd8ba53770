"""The kernels of a decode step, against the reference."""

from collections.abc import Callable

import pytest
import torch

from exactmoe.bench.layers import MoeStep
from exactmoe.kernels.argmax import argmax, choose
from exactmoe.kernels.cursor import place
from exactmoe.kernels.decode_attention import decode_attention, keys_of_one_launch
from exactmoe.kernels.decode_router import NextLayer, decode_router
from exactmoe.kernels.errors import InvalidInput
from exactmoe.kernels.formats import EXECUTABLE
from exactmoe.kernels.guess import Guess
from exactmoe.kernels.kv_cache import KVLayer
from exactmoe.kernels.matmul import matmul
from exactmoe.kernels.matvec import Norm, matvec
from exactmoe.kernels.packed import pack
from exactmoe.kernels.prefetch import Past, past_arguments, spans
from exactmoe.kernels.quantize import quantize
from exactmoe.kernels.rope import RopeTable
from exactmoe.kernels.router import RouterWeight
from exactmoe.kernels.tensors import quant_matrix
from exactmoe.parity.cases import Case, DecodeAttention, Matvec, tensors
from exactmoe.parity.neutrality import Launch, recorded


@pytest.mark.cases("matvec", "decode_router", "experts_up", "experts_down", "decode_attention")
def test_a_kernel_of_the_decode_step_equals_the_reference_bit_for_bit(case: Case, check: Callable[..., None]) -> None:
    check(case)


@pytest.mark.parametrize("profile", ["q8_k", "q16_k"])
@pytest.mark.parametrize("fmt", ["Q4_K", "Q6_K"])
def test_one_token_by_bytes_equals_a_matmul_on_tensor_cores(fmt: str, profile: str, device: torch.device) -> None:
    case = Matvec(100, 1024, fmt, profile)
    (weight,), x, *_ = tensors(case.arguments(), device)
    assert matvec([pack(weight)], x, profile).equal(matmul(weight, quantize(x[None], profile))[0])


@pytest.mark.parametrize("position", [0, 63, 127])
def test_attention_in_one_launch_equals_attention_in_three(position: int, device: torch.device) -> None:
    case = DecodeAttention(8, 2, 64, position, "q8_k")
    qkv, q_norm, k_norm, rope, kv, at, profile = tensors(case.arguments(), device)
    longer = KVLayer(*(torch.cat([part, part, *[part[:1]] * 128]) for part in kv))
    rope = RopeTable(*(torch.cat([part, part, *[part[:1]] * 128]) for part in rope))
    assert keys_of_one_launch(longer) == 128 < longer.k.shape[0]
    again = KVLayer(*(part.clone() for part in longer))
    launches: list[list[Launch]] = [[], []]
    found = []
    for cache, most, made in ((longer, None, launches[0]), (again, 128, launches[1])):
        with recorded(made):
            found.append(decode_attention(qkv, q_norm, k_norm, rope, cache, at, profile, (), most))
    assert [len(made) for made in launches] == [3, 1]
    for three, one in zip([*found[0], *longer], [*found[1], *again], strict=True):
        assert three.cpu().numpy().tobytes() == one.cpu().numpy().tobytes()


@pytest.mark.parametrize("experts", [3, 12])
def test_what_is_guessed_and_fetched_ahead_changes_no_bit(experts: int, device: torch.device) -> None:
    """In the interpreter nothing is fetched; on a GPU the addresses must be ones that can be read."""
    step = MoeStep(1, experts, 3, 256, 512, "Q4_K", "Q6_K", "q8_k")
    x, norm, router, gate, up, down, top_k, profile = step.on(device)
    guess = decode_router(x, norm, router, profile).logits
    weights, row, _, _, residual = Matvec(9, 512, "Q4_K", profile, around="operand").on(device)
    plain = matvec(weights, row, profile, None, residual)
    for logits in (guess, torch.full_like(guess, torch.nan), torch.full_like(guess, torch.inf)):
        for matrices in ((gate, up), (down, down), (gate, up, down)):
            assert matvec(weights, row, profile, None, residual, Guess(logits, matrices, top_k)).equal(plain)
    for later in ([guess], [row, guess, residual, x]):
        assert matvec(weights, row, profile, None, residual, later=later).equal(plain)


@pytest.mark.parametrize("position", [0, 3, 70])
@pytest.mark.parametrize("most", [1, 64, 1000])
def test_a_past_that_is_fetched_ahead_changes_no_bit(most: int, position: int, device: torch.device) -> None:
    weights, x, profile, norm, residual = Matvec(9, 512, "Q4_K", "q8_k", around="norm").on(device)
    rows = torch.zeros(70, 3, 32, dtype=torch.int16, device=device)
    past = Past(rows, torch.tensor([position], dtype=torch.int32, device=device), most)
    plain = matvec(weights, x, profile, norm, residual)
    assert matvec(weights, x, profile, norm, residual, past=past).equal(plain)


def test_a_past_is_whole_rows_before_a_position_and_not_for_an_operand(device: torch.device) -> None:
    position = torch.zeros(1, dtype=torch.int32, device=device)
    rows = torch.zeros(70, 4, 32, dtype=torch.int16, device=device)
    assert past_arguments(None) == ((None, None), {"PAST_ROW": 0, "PAST_MOST": 0})
    assert past_arguments(Past(rows, position, 1000)) == ((position, rows), {"PAST_ROW": 256, "PAST_MOST": 70})
    for wrong, match in (
        (Past(rows[:, :2], position, 9), "contiguous"),
        (Past(rows, position.long(), 9), "position must be one i32"),
        (Past(rows, position.repeat(2), 9), "position must be one i32"),
        (Past(rows, position, 0), "at least one row is fetched ahead, got 0"),
    ):
        with pytest.raises(InvalidInput, match=match):
            past_arguments(wrong)
    weights, x, profile, _, residual = Matvec(9, 512, "Q4_K", "q8_k", around="operand").on(device)
    with pytest.raises(InvalidInput, match="asks for no past"):
        matvec(weights, x, profile, None, residual, past=Past(rows, position, 9))


def test_a_guess_is_the_next_router_s_word_on_this_row(device: torch.device) -> None:
    x, norm, router, *_, profile = MoeStep(1, 12, 3, 256, 512, "Q4_K", "Q6_K", "q8_k").on(device)
    norm2 = Norm(norm.weight.flip(0).contiguous(), norm.eps)
    router2 = RouterWeight(router.q.flip(0).contiguous(), router.scale.flip(0).contiguous())
    plain, made = (
        decode_router(x, norm, router, profile),
        decode_router(x, norm, router, profile, NextLayer(norm2, router2)),
    )
    assert plain.guess is None
    assert made.guess is not None
    assert made.guess.equal(decode_router(x, norm2, router2, profile).logits)
    assert not made.guess.equal(plain.logits)
    assert made.logits.equal(plain.logits)
    assert made.operand.equal(plain.operand)


def test_a_guess_is_refused_that_fits_no_experts(device: torch.device) -> None:
    x, norm, router, gate, _, _, _, profile = MoeStep(1, 12, 3, 256, 512, "Q4_K", "Q6_K", "q8_k").on(device)
    weights, row, _, _, residual = Matvec(9, 512, "Q4_K", profile, around="operand").on(device)
    for wrong, match in ((torch.zeros(11, device=device), "guess"), (torch.zeros(12, device=device), "top_k must be")):
        with pytest.raises(InvalidInput, match=match):
            matvec(weights, row, profile, None, residual, Guess(wrong, (gate, gate), 13))
    fits = torch.zeros(12, device=device)
    with pytest.raises(InvalidInput, match="at most three matrices, got 4"):
        matvec(weights, row, profile, None, residual, Guess(fits, (gate,) * 4, 3))
    with pytest.raises(InvalidInput, match="either a guess is fetched ahead"):
        matvec(weights, row, profile, None, residual, Guess(fits, (gate, gate), 3), [fits])
    with pytest.raises(InvalidInput, match="at most 4 tensors are fetched ahead, got 5"):
        matvec(weights, row, profile, None, residual, None, [fits] * 5)
    with pytest.raises(InvalidInput, match="eps"):
        decode_router(x, norm, router, profile, NextLayer(Norm(norm.weight, 1.0), router))
    with pytest.raises(InvalidInput, match="next router"):
        decode_router(x, norm, router, profile, NextLayer(norm, RouterWeight(router.q[:5], router.scale[:5])))


def test_an_operand_is_not_normed_again_and_is_of_the_profile_asked_for(device: torch.device) -> None:
    weights, x, profile, _, residual = Matvec(5, 512, "Q4_K", "q8_k", around="operand").on(device)
    norm = Norm(torch.ones(512, device=device), 1e-6)
    with pytest.raises(InvalidInput, match="cannot be normed"):
        matvec(weights, x, profile, norm, residual)
    with pytest.raises(InvalidInput, match="not of profile q16_k"):
        matvec(weights, x, "q16_k", None, residual)
    with pytest.raises(InvalidInput, match="no operand of 512"):
        matvec(weights, x[:-1], profile, None, residual)


def test_what_is_fetched_ahead_is_whole_and_not_too_much(device: torch.device) -> None:
    square = torch.zeros(4, 4, device=device)
    assert spans([square], 3) == ((square, None, None), (64, 0, 0))
    with pytest.raises(InvalidInput, match="at most 2 tensors are fetched ahead, got 3"):
        spans([square] * 3, 2)
    with pytest.raises(InvalidInput, match="contiguous"):
        spans([square.T[:2]], 2)


def test_packing_loses_no_bit_of_a_block(device: torch.device) -> None:
    (weight,), *_ = tensors(Matvec(5, 768, "Q6_K", "q8_k").arguments(), device)
    packed = pack(weight)
    low = packed.words.view(torch.uint8).view(5, 3, 128)
    lanes = packed.high.view(torch.uint8).view(5, 3, 2, 2, 2, 2, 4) ^ 0xAA
    pairs = torch.stack([lanes >> 2 * j & 3 for j in range(4)], dim=6)  # [.., half, row, 16 bytes, nibble, word, byte]
    high = sum(pairs[:, :, :, row, :, nibble] << 2 * row + 4 * nibble for row in range(2) for nibble in range(2))
    high = high.to(torch.uint8).reshape(5, 3, 64)
    scales = packed.scales.view(torch.uint8).view(5, 3, 2, 2, 2, 2).permute(0, 1, 2, 5, 3, 4).reshape(5, 3, 16)
    d = packed.d.view(torch.uint8).view(5, 3, 2)
    assert torch.cat([low, high, scales, d], dim=2).view(5, -1).equal(weight.data)


def test_q4_k_is_packed_where_it_lies(device: torch.device) -> None:
    data = torch.arange(5 * 3 * 144, device=device).to(torch.uint8).view(5, -1)
    weight = quant_matrix(data, EXECUTABLE["Q4_K"], "weight")
    packed = pack(weight)
    assert (packed.words.data_ptr(), packed.high.data_ptr()) == (weight.data.data_ptr(), weight.heads.data_ptr())
    assert sum(packed.plane_bytes) == data.nbytes
    assert weight.as_in_file().equal(data)
    assert weight.rows(1, 3).as_in_file().equal(data[1:4])


def test_a_choice_moves_on_by_one(device: torch.device) -> None:
    logits = torch.tensor([0.0, 3.0, -1.0, 3.0], device=device)
    token, position = (torch.tensor([i], dtype=torch.int32, device=device) for i in (9, 41))
    choose(logits, token, position)
    assert (token.item(), position.item()) == (int(argmax(logits[None])[0]), 42) == (1, 42)


@pytest.mark.parametrize(("given", "expected"), [(None, 9), (7, 7), (0, 0)])
@pytest.mark.parametrize("at", [0, 1, 4096, 2**31 - 1])
def test_a_step_is_placed_where_it_is_said(at: int, given: int | None, expected: int, device: torch.device) -> None:
    token, position = (torch.tensor([i], dtype=torch.int32, device=device) for i in (9, 41))
    place(token, position, at, None if given is None else torch.tensor([given], dtype=torch.int32, device=device))
    assert (token.item(), position.item()) == (expected, at)
