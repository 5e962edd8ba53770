"""One token through its experts, in two launches.      logits [E] f32, operand of x [D] -> h [A, F] -> y [D] f32
Promised order: as route, grouped_matmul, swiglu, quantize, combine and add, one after another; every program picks the
experts and quantises for itself.

The second launch fetches its weights while the first still runs: the router's logits were there before both."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels import tiles
from exactmoe.kernels.decode_router import Routed
from exactmoe.kernels.dependent import DEPENDENT, finish_wait, release_next
from exactmoe.kernels.errors import require
from exactmoe.kernels.formats import BLOCK
from exactmoe.kernels.launch import FAITHFUL
from exactmoe.kernels.matvec import fetch, fold
from exactmoe.kernels.numerics import swiglu_of
from exactmoe.kernels.packed import Q4_K, PackedMatrix, operand_at, operand_slices, operand_stride, store_operand
from exactmoe.kernels.prefetch import prefetch
from exactmoe.kernels.router import scores, take_best, weight_of
from exactmoe.kernels.tensors import require_f32, slices


def experts_up(
    routed: Routed, gate: PackedMatrix, up: PackedMatrix, top_k: int, later: PackedMatrix | None = None
) -> Tensor:
    """silu(gate) * up of the `top_k` experts that the logits choose, best first: h [A, F].

    Their part of `later` is fetched ahead. Bit-equal to parity.reference.decode_experts.experts_up."""
    E = routed.logits.shape[0]
    require_f32(routed.logits, "logits", E)
    require(1 <= top_k <= E, f"top_k must be 1 to the {E} experts, got {top_k}")
    for name, w in (("gate", gate), ("up", up)):
        require(
            (w.experts, w.n, w.k) == (E, gate.n, gate.k), f"{name} is of {w.experts} experts of {w.n} x {w.k}, not {E}"
        )
    F, NB = gate.n, gate.k // BLOCK
    S = operand_slices(routed.operand, gate.k)
    h = torch.empty(top_k, F, dtype=torch.float32, device=routed.logits.device)
    tile = tiles.experts_up(F)
    _experts_up_kernel[(top_k * triton.cdiv(F, tile.rows),)](
        *routed, *gate.planes, *up.planes, h, *(later.planes if later else (None,) * 4),
        LATER=later.plane_bytes if later else (0,) * 4,
        E=E, E2=triton.next_power_of_2(E), NB=NB, F=F, FORMAT=gate.format.ggml_id, FORMAT2=up.format.ggml_id,
        S=S, BN=tile.rows, AHEAD=min(NB, tile.ahead), WARPS=tile.warps, num_warps=tile.warps, **DEPENDENT, **FAITHFUL,
    )  # fmt: skip
    return h


def experts_down(routed: Routed, h: Tensor, down: PackedMatrix, x: Tensor, profile: str) -> Tensor:
    """x [D] plus the experts' outputs of h [A, F], each weighted as the logits choose, best first.

    Bit-equal to parity.reference.decode_experts.experts_down."""
    E = routed.logits.shape[0]
    A, F = h.shape
    A2 = triton.next_power_of_2(A)
    require_f32(h, "h", A, down.k)
    require(down.experts == E and 1 <= A <= E, f"{A} of {E} experts, weights are of {down.experts}")
    require_f32(x, "x", down.n)
    D, FB = down.n, F // BLOCK
    y = torch.empty_like(x)
    tile = tiles.experts_down(D)
    programs = triton.cdiv(D, tile.rows)
    words = operand_stride(F, slices(profile))
    stride = A * words + A2 * tile.rows
    scratch = torch.empty(programs, stride, dtype=torch.int32, device=x.device)
    _experts_down_kernel[(programs,)](
        routed.logits, h, *down.planes, x, y, scratch,
        E=E, E2=triton.next_power_of_2(E), A=A, A2=A2, FB=FB,
        FB2=triton.next_power_of_2(FB), D=D, FORMAT=down.format.ggml_id, S=slices(profile), WORDS=words, STRIDE=stride,
        BN=tile.rows, AHEAD=min(FB, tile.ahead), num_warps=tile.warps, **DEPENDENT, **FAITHFUL,
    )  # fmt: skip
    return y


@triton.jit
def _scores(logits_ptr, ROWS: tl.constexpr, E: tl.constexpr, E2: tl.constexpr):
    """`scores` of the logits, ROWS times the same: with a row for every warp no warp waits for another."""
    e = tl.broadcast_to(tl.arange(0, E2)[None, :], [ROWS, E2])
    logit = tl.load(logits_ptr + e, e < E, 0.0)
    return scores(logit, e < E, tl.full([ROWS], 1, tl.int1), E, E2)


@triton.jit
def _experts_up_kernel(
    logits_ptr, operand_ptr, words_ptr, high_ptr, scales_ptr, d_ptr, words2_ptr, high2_ptr, scales2_ptr, d2_ptr, h_ptr,
    later_ptr, later2_ptr, later3_ptr, later4_ptr, LATER: tl.constexpr,
    E: tl.constexpr, E2: tl.constexpr, NB: tl.constexpr, F: tl.constexpr, FORMAT: tl.constexpr, FORMAT2: tl.constexpr,
    S: tl.constexpr, BN: tl.constexpr, AHEAD: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    EVEN: tl.constexpr = F % BN == 0
    tiles_each: tl.constexpr = (F + BN - 1) // BN
    k = tl.program_id(0) // tiles_each
    n = (tl.program_id(0) % tiles_each) * BN + tl.arange(0, BN)
    finish_wait()
    release_next()
    key, _ = _scores(logits_ptr, WARPS, E, E2)
    for _ in range(k):
        _, _, key = take_best(key)
    _, expert, _ = take_best(key)
    expert = tl.max(expert).to(tl.int64)
    start = (expert * F + n) * NB
    operand = operand_at(operand_ptr + tl.zeros([1], tl.int32), 0, NB, S)
    gate = (words_ptr, high_ptr, scales_ptr, d_ptr)
    up = (words2_ptr, high2_ptr, scales2_ptr, d2_ptr)
    fetched = fetch(gate, start, n < F, FORMAT, EVEN, AHEAD)
    fetched2 = fetch(up, start, n < F, FORMAT2, EVEN, AHEAD)
    later = (later_ptr, later2_ptr, later3_ptr, later4_ptr)
    for plane in tl.static_range(4):
        if LATER[plane] > 0:
            byte_ptr = later[plane].to(tl.pointer_type(tl.int8), bitcast=True) + expert * LATER[plane]
            prefetch(byte_ptr, LATER[plane], tl.program_id(0) % tiles_each, tiles_each, 32 * WARPS)
    g = fold(fetched, gate, start, n < F, operand, NB, FORMAT, S, EVEN, AHEAD)
    u = fold(fetched2, up, start, n < F, operand, NB, FORMAT2, S, EVEN, AHEAD)
    tl.store(h_ptr + k * F + n, swiglu_of(g, u), n < F)


@triton.jit
def _experts_down_kernel(
    logits_ptr, h_ptr, words_ptr, high_ptr, scales_ptr, d_ptr, x_ptr, y_ptr, scratch_ptr,
    E: tl.constexpr, E2: tl.constexpr, A: tl.constexpr, A2: tl.constexpr,
    FB: tl.constexpr, FB2: tl.constexpr, D: tl.constexpr, FORMAT: tl.constexpr, S: tl.constexpr,
    WORDS: tl.constexpr, STRIDE: tl.constexpr, BN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    EVEN: tl.constexpr = A == A2 and D % BN == 0
    planes = (words_ptr, high_ptr, scales_ptr, d_ptr)
    # A tile's rows are BN features of every rank: row k*BN + i is feature i of the expert of rank k.
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    ranks = tl.arange(0, A2)
    key, bad = _scores(logits_ptr, A2, E, E2)
    expert = tl.zeros([A2], tl.int32)
    prob = tl.zeros([A2], tl.float32)
    total = tl.zeros([A2], tl.float32)
    for k in tl.static_range(A):
        best, e, key = take_best(key)
        expert = tl.where(ranks == k, e, expert)
        prob = tl.where(ranks == k, best, prob)
        total = total + best
    expert = expert.to(tl.int64)
    start = tl.reshape(expert[:, None] * D + n[None, :], [A2 * BN]) * FB
    live = tl.reshape((ranks < A)[:, None] & (n < D)[None, :], [A2 * BN])
    fetched = fetch(planes, start, live, FORMAT, EVEN, AHEAD)
    weight = weight_of(prob, bad, total, A)
    finish_wait()
    release_next()
    at_ptr = scratch_ptr + tl.program_id(0) * STRIDE
    # All ranks' blocks at once: block b of rank k is row k*FB2 + b of the tile.
    r = tl.arange(0, A2 * FB2)
    k_of, b_of = r // FB2, r % FB2
    real = (k_of < A) & (b_of < FB)
    h = tl.load(h_ptr + (k_of * FB + b_of)[:, None] * 256 + tl.arange(0, 256)[None, :], real[:, None], 0.0)
    store_operand(h, k_of * WORDS, tl.where(real, b_of, FB), at_ptr, FB, S, FORMAT == Q4_K)
    tl.debug_barrier()
    of_row = tl.minimum(tl.arange(0, A2 * BN) // BN, A - 1) * WORDS
    operand = operand_at(at_ptr + of_row, 0, FB, S)
    y = fold(fetched, planes, start, live, operand, FB, FORMAT, S, EVEN, AHEAD)
    y = weight[:, None] * tl.reshape(y, [A2, BN])
    # Through memory, and not from layout to layout: then a thread folds all ranks of a feature.
    y_at = (scratch_ptr + tl.program_id(0) * STRIDE + A * WORDS).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(y_at + ranks[:, None] * BN + tl.arange(0, BN)[None, :], y)
    tl.debug_barrier()
    acc = tl.zeros([BN], tl.float32)
    for k in tl.static_range(A):
        acc = acc + tl.load(y_at + k * BN + tl.arange(0, BN))
    tl.store(y_ptr + n, tl.load(x_ptr + n, n < D, 0.0) + acc, n < D)
