"""One token through its experts, in two launches.      logits [E] f32, operand of x [D] -> h [A, F] -> y [D] f32
Promised order: as route, grouped_matmul, swiglu, quantize, combine and add, one after another; every program chooses
for itself, and every one of the second launch quantises for itself."""

from typing import NamedTuple

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
from exactmoe.kernels.matvec import fetch, fold, issue, load_operands, of_a_tile, parts_of, tile_rows
from exactmoe.kernels.numerics import swiglu_of
from exactmoe.kernels.packed import Q4_K, PackedMatrix, operand_at, operand_slices, operand_stride, store_operand
from exactmoe.kernels.router import expert_of_rank, scores, take_best, weight_of
from exactmoe.kernels.tensors import require_f32, slices


class Activated(NamedTuple):
    """What the second launch takes."""

    h: Tensor  # [A, F] f32, the chosen experts' rows, best first
    logits: Tensor  # [E] f32, from which it chooses again, while the first still runs


_REGISTERS = 128  # so that the second launch finds room beside the first, and fetches its weights early


def experts_up(routed: Routed, gate: PackedMatrix, up: PackedMatrix, top_k: int) -> Activated:
    """silu(gate) * up of the `top_k` experts that the logits choose, best first.

    Bit-equal to parity.reference.decode_experts.experts_up."""
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
    _experts_up_kernel[(top_k * triton.cdiv(F, tile.rows * tile.tiles),)](
        routed.logits, routed.operand, *gate.planes, *up.planes, h,
        E=E, E2=triton.next_power_of_2(E), ROWS=tile.warps, NB=NB, F=F,
        FORMAT=gate.format.ggml_id, FORMAT2=up.format.ggml_id, S=S, BN=tile.rows, PARTS=parts_of(NB), TILES=tile.tiles,
        AHEAD=tile.ahead, num_warps=tile.warps, **DEPENDENT, **FAITHFUL,
    )  # fmt: skip
    return Activated(h, routed.logits)


def experts_down(activated: Activated, down: PackedMatrix, x: Tensor, profile: str) -> Tensor:
    """x [D] plus the experts' outputs, each weighted, best first.

    Bit-equal to parity.reference.decode_experts.experts_down."""
    A, F = activated.h.shape
    A2 = triton.next_power_of_2(A)
    require_f32(activated.h, "h", A, down.k)
    E = down.experts
    require(1 <= A <= E, f"{A} of {E} experts")
    require_f32(activated.logits, "logits", E)
    require_f32(x, "x", down.n)
    D, FB = down.n, F // BLOCK
    y = torch.empty_like(x)
    tile = tiles.experts_down(D)
    programs = triton.cdiv(D, tile.rows * tile.tiles)
    words = operand_stride(F, slices(profile))
    stride = A * words + A2 * tile.rows * tile.tiles
    scratch = torch.empty(programs, stride, dtype=torch.int32, device=x.device)
    _experts_down_kernel[(programs,)](
        activated.logits, activated.h, *down.planes, x, y, scratch,
        E=E, E2=triton.next_power_of_2(E), A=A, A2=A2, FB=FB, D=D,
        FORMAT=down.format.ggml_id, S=slices(profile), WORDS=words, STRIDE=stride, BN=tile.rows, TILES=tile.tiles,
        AHEAD=tile.ahead, num_warps=tile.warps, maxnreg=_REGISTERS, **DEPENDENT, **FAITHFUL,
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
    E: tl.constexpr, E2: tl.constexpr, ROWS: tl.constexpr, NB: tl.constexpr, F: tl.constexpr,
    FORMAT: tl.constexpr, FORMAT2: tl.constexpr, S: tl.constexpr,
    BN: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    EVEN: tl.constexpr = F % (BN * TILES) == 0
    EACH: tl.constexpr = NB // PARTS
    each: tl.constexpr = (F + BN * TILES - 1) // (BN * TILES)
    k = tl.program_id(0) // each
    part = tl.program_id(0) % each
    r = tl.arange(0, BN * PARTS)
    skip = r % PARTS * EACH
    finish_wait()
    # First what does not depend on the choice: it would come behind the weights, and none could be used without it.
    operand = operand_at(operand_ptr, skip, NB, S)
    operands = load_operands(operand, h_ptr, NB, EACH, FORMAT, S)
    operands2 = operands
    if FORMAT2 != FORMAT:
        operands2 = load_operands(operand, h_ptr, NB, EACH, FORMAT2, S)
    issue(h_ptr)
    key, _ = _scores(logits_ptr, ROWS, E, E2)
    expert = tl.max(expert_of_rank(key, k)).to(tl.int64)
    n = part * (BN * TILES) + r // PARTS
    start = (expert * F + n) * NB + skip
    gate = (words_ptr, high_ptr, scales_ptr, d_ptr)
    up = (words2_ptr, high2_ptr, scales2_ptr, d2_ptr)
    release_next()  # only now: the next kernel's programs would slow the choice down
    fetched = fetch(gate, up, start, n, 0, AHEAD, F, BN, TILES, NB, EACH, FORMAT, FORMAT2, EVEN)
    issue(h_ptr)
    release_next()  # of no effect, but no load is put off beyond it
    g, u = fold(
        fetched, gate, up, start, n, operands, operands2, h_ptr,
        F, BN, TILES, NB, PARTS, FORMAT, FORMAT2, S, EVEN, AHEAD,
    )  # fmt: skip
    at = tile_rows(part * (BN * TILES), BN, BN)
    tl.store(h_ptr + k * F + at, swiglu_of(g, u), of_a_tile(TILES) & (at < F))


@triton.jit
def _experts_down_kernel(
    logits_ptr, h_ptr, words_ptr, high_ptr, scales_ptr, d_ptr, x_ptr, y_ptr, scratch_ptr,
    E: tl.constexpr, E2: tl.constexpr,
    A: tl.constexpr, A2: tl.constexpr, FB: tl.constexpr, D: tl.constexpr, FORMAT: tl.constexpr, S: tl.constexpr,
    WORDS: tl.constexpr, STRIDE: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    EVEN: tl.constexpr = A == A2 and D % (BN * TILES) == 0
    planes = (words_ptr, high_ptr, scales_ptr, d_ptr)
    # The logits are older than the kernel before this one: while that runs, the weights are on their way.
    ranks = tl.arange(0, A2)
    key, bad = _scores(logits_ptr, A2, E, E2)
    prob, total = tl.zeros([A2], tl.float32), tl.zeros([A2], tl.float32)
    expert = tl.zeros([A2], tl.int32)
    for rank in range(A):
        best, chosen, key = take_best(key)
        total = total + best
        prob, expert = tl.where(ranks == rank, best, prob), tl.where(ranks == rank, chosen, expert)
    weight = weight_of(prob, bad, total, A)
    # A tile's rows are BN features of every rank: row k*BN + i is feature i of the expert of rank k.
    expert = tl.reshape(tl.broadcast_to(expert[:, None], [A2, BN]), [A2 * BN]).to(tl.int64)
    weight = tl.reshape(tl.broadcast_to(weight[:, None], [A2, BN]), [A2 * BN])
    r = tl.arange(0, A2 * BN)
    k = tl.minimum(r // BN, A - 1)
    first = tl.program_id(0) * (BN * TILES)
    n = tl.where(r < A * BN, first + r % BN, D)
    start = (expert * D + n) * FB
    y_at = tile_rows(first, BN, BN)
    live = of_a_tile(TILES) & (y_at < D)
    before = tl.load(x_ptr + y_at, live, 0.0)
    own_ptr = scratch_ptr + tl.program_id(0) * STRIDE
    fetched = fetch(planes, (), start, n, 0, AHEAD, D, BN, TILES, FB, FB, FORMAT, 0, EVEN)
    finish_wait()
    release_next()
    x = ()  # type: tuple[tl.tensor, ...]
    for b in tl.static_range(FB):
        at = (ranks * FB + b)[:, None] * 256 + tl.arange(0, 256)[None, :]
        x = x + (tl.load(h_ptr + at, (ranks < A)[:, None], 0.0),)  # noqa: RUF005 - Triton has no *
    for b in tl.static_range(FB):
        store_operand(x[b], ranks * WORDS, tl.where(ranks < A, b, FB), own_ptr, FB, S, FORMAT == Q4_K)
    tl.debug_barrier()
    operands = load_operands(operand_at(own_ptr + k * WORDS, 0, FB, S), y_ptr, FB, FB, FORMAT, S)
    y, _ = fold(
        fetched, planes, (), start, n, operands, (), y_ptr,
        D, BN, TILES, FB, 1, FORMAT, 0, S, EVEN, AHEAD,
    )  # fmt: skip
    # Through memory, and not from layout to layout: then a thread folds all ranks of a feature.
    part_ptr = (own_ptr + A * WORDS).to(tl.pointer_type(tl.float32), bitcast=True)
    column = tl.arange(0, 8)[None, :]
    tl.store(part_ptr + r[:, None] * TILES + column, weight[:, None] * y, of_a_tile(TILES))
    tl.debug_barrier()
    acc = tl.zeros([BN, 8], tl.float32)
    for rank in tl.static_range(A):
        row = rank * BN + tl.arange(0, BN)[:, None]
        acc = acc + tl.load(part_ptr + row * TILES + column, of_a_tile(TILES), 0.0)
    tl.store(y_ptr + y_at, before + acc, live)
