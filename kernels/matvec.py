"""One token through quantised matrices.      x [K] f32, weights [N, K] -> y [sum N] f32
Promised order: as norm, quantize, matmul and add, one after another; every program quantises the row for itself.

The matrices lie one below the other in y. A program fetches its first weights before it waits for the kernel that makes
x: they do not depend on it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels import tiles
from exactmoe.kernels.dependent import DEPENDENT, finish_wait, release_next
from exactmoe.kernels.errors import require
from exactmoe.kernels.formats import BLOCK
from exactmoe.kernels.launch import FAITHFUL
from exactmoe.kernels.numerics import fixed_point_23, inverse_rms_of, magnitude
from exactmoe.kernels.packed import (
    Q4_K,
    PackedMatrix,
    block_product,
    load_block,
    of_lanes,
    operand_at,
    operand_slices,
    operand_stride,
    store_operand,
)
from exactmoe.kernels.tensors import require_f32, slices


class Norm(NamedTuple):
    """An RMSNorm before a matrix."""

    weight: Tensor  # [K] f32
    eps: float


def matvec(
    weights: Sequence[PackedMatrix], x: Tensor, profile: str, norm: Norm | None = None, residual: Tensor | None = None
) -> Tensor:
    """y [sum N] of one or two matrices over the row x [K], normed first where asked, plus `residual` [sum N].

    In place of the row there may be its operand, i32, which another kernel has made; then there is no norm. Bit-equal
    to parity.reference.matvec.matvec."""
    require(1 <= len(weights) <= 2, f"one or two matrices, got {len(weights)}")
    K = weights[0].k
    for w in weights:
        require(w.k == K and w.experts == 1, f"matrices of width {K} and {w.k}, of {w.experts} experts, in one matvec")
    ready = x.dtype == torch.int32
    if ready:
        require(norm is None, "an operand is quantised already: it cannot be normed")
        require(operand_slices(x, K) == slices(profile), f"the operand is not of profile {profile}")
    else:
        require_f32(x, "x", K)
    if norm is not None:
        require_f32(norm.weight, "norm weight", K)
    N = sum(w.n for w in weights)
    if residual is not None:
        require_f32(residual, "residual", N)
    y = torch.empty(N, dtype=torch.float32, device=x.device)
    first, last = weights[0], weights[-1]
    tile = tiles.matvec(N, K // BLOCK)
    counts = [triton.cdiv(w.n, tile.rows) for w in weights]
    programs = min(sum(counts), tile.programs) if len(weights) == 1 else sum(counts)
    looping = programs < sum(counts)
    parts = tile.parts if K // BLOCK % tile.parts == 0 and not looping else 1
    words = 0 if ready else operand_stride(K, slices(profile))
    own = words + (tile.rows * (K // BLOCK) if parts > 1 else 0)
    scratch = torch.empty(programs, own, dtype=torch.int32, device=x.device) if own else None
    _matvec_kernel[(programs,)](
        x, norm.weight if norm else None, norm.eps if norm else 0.0, residual, y, scratch,
        *first.planes, *last.planes,
        NB=K // BLOCK, NB2=triton.next_power_of_2(K // BLOCK), N=first.n, N2=last.n if len(weights) == 2 else 0,
        FORMAT=first.format.ggml_id, FORMAT2=last.format.ggml_id, S=slices(profile), WORDS=words,
        READY=ready, BN=tile.rows, PARTS=parts, LOOP=looping, AHEAD=min(K // BLOCK // parts, tile.ahead),
        num_warps=tile.warps, **DEPENDENT, **FAITHFUL,
    )  # fmt: skip
    return y


@triton.jit
def block_index(NB2: tl.constexpr):
    """Index of the elements of NB2 blocks, [NB2, 256]."""
    return tl.arange(0, NB2)[:, None] * 256 + tl.arange(0, 256)[None, :]


@triton.jit
def load_row(x_ptr, norm_ptr, eps, NB: tl.constexpr, NB2: tl.constexpr):
    """The row x [NB*256] as f32 [NB2, 256], zero beyond its blocks, RMS-normed where asked."""
    j = block_index(NB2)
    K: tl.constexpr = NB * 256
    x = tl.load(x_ptr + j, j < K, 0.0)
    if norm_ptr is not None:
        weight = tl.load(norm_ptr + j, j < K, 0.0)
        top = tl.max(magnitude(x)) + tl.zeros([1, 1], tl.int32)  # a number, so that no layout is in the way
        i = fixed_point_23(x, top)
        r = inverse_rms_of(tl.sum(i * i) + tl.zeros([1, 1], tl.int64), top, K, eps)
        x = (x * r) * weight
    return x


@triton.jit
def fetch(planes, start, live, FORMAT: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr):
    """The first AHEAD blocks of rows that begin with blocks `start` [N], on their way; half as many of Q6_K, whose
    blocks take twice the registers."""
    count: tl.constexpr = AHEAD if FORMAT == Q4_K else (AHEAD + 1) // 2
    fetched = ()  # type: tuple[tl.tensor, ...]
    for b in tl.static_range(count):
        fetched = fetched + (load_block(planes, start, live, b, FORMAT, EVEN),)  # noqa: RUF005 - Triton has no *
    return fetched


@triton.jit
def fold(
    fetched, planes, start, live, x,
    NB: tl.constexpr, FORMAT: tl.constexpr, S: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y [N] of rows of NB blocks from `start` on against `operand_at`'s `x`: block products, left to right.

    The first blocks are `fetched`; each one used makes room for one more."""
    acc = tl.zeros([start.shape[0], 1], tl.float32)
    for b in tl.static_range(NB):
        acc = acc + block_product(fetched[b], planes, start, live, x, b, NB, FORMAT, S, EVEN)
        fetched = _fetch_more(fetched, planes, start, live, b, NB, FORMAT, EVEN, AHEAD)
    return of_lanes(acc)


@triton.jit
def _fetch_more(
    fetched, planes, start, live,
    b: tl.constexpr, BLOCKS: tl.constexpr, FORMAT: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """`fetched` and, once block `b` is used, the next of BLOCKS that is not among them."""
    count: tl.constexpr = AHEAD if FORMAT == Q4_K else (AHEAD + 1) // 2
    if b + count < BLOCKS:
        fetched = fetched + (load_block(planes, start, live, b + count, FORMAT, EVEN),)  # noqa: RUF005
    return fetched


@triton.jit
def _fold_parts(
    fetched, planes, start, live, x, parts_ptr,
    NB: tl.constexpr, PARTS: tl.constexpr, FORMAT: tl.constexpr, S: tl.constexpr, EVEN: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """As `fold`, of N rows in PARTS runs of NB/PARTS blocks that lie one below the other in `start`, for more warps to
    share. The products meet at `parts_ptr` [N, NB] and are folded there, in the one order."""
    N: tl.constexpr = start.shape[0] // PARTS
    each: tl.constexpr = NB // PARTS
    lane = tl.arange(0, 8)[None, :]
    r = tl.arange(0, N * PARTS)[:, None]
    held = tl.zeros([N * PARTS, 8], tl.float32)
    for b in tl.static_range(each):
        held = tl.where(lane == b % 8, block_product(fetched[b], planes, start, live, x, b, NB, FORMAT, S, EVEN), held)
        fetched = _fetch_more(fetched, planes, start, live, b, each, FORMAT, EVEN, AHEAD)
        if b % 8 == 7 or b == each - 1:  # every lane holds another block's
            at = r % N * NB + r // N * each + b // 8 * 8 + lane
            tl.store(parts_ptr + at, held, (lane + b // 8 * 8 < each) & (r < N * PARTS))
    tl.debug_barrier()
    acc = tl.zeros([N], tl.float32)
    for b in tl.static_range(NB):
        acc = acc + tl.load(parts_ptr + tl.arange(0, N) * NB + b)
    return acc


@triton.jit
def _segment(
    pid, planes, x_ptr, norm_ptr, eps, residual_ptr, y_ptr, at_ptr, parts_ptr,
    NB: tl.constexpr, NB2: tl.constexpr, N: tl.constexpr, FORMAT: tl.constexpr, S: tl.constexpr, READY: tl.constexpr,
    BN: tl.constexpr, PARTS: tl.constexpr, LOOP: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Rows of one matrix; its first tile is `pid`."""
    EVEN: tl.constexpr = N % BN == 0
    r = tl.arange(0, BN * PARTS)
    skip = r // BN * (NB // PARTS)
    n = pid * BN + r % BN
    if not LOOP:
        fetched = fetch(planes, n.to(tl.int64) * NB + skip, n < N, FORMAT, EVEN, AHEAD)
    finish_wait()
    release_next()
    if not READY:
        x = load_row(x_ptr, norm_ptr, eps, NB, NB2)
        store_operand(x, tl.zeros([NB2], tl.int32), tl.arange(0, NB2), at_ptr, NB, S, FORMAT == Q4_K)
        tl.debug_barrier()
    if LOOP:
        operand = operand_at(at_ptr + tl.zeros([1], tl.int32), 0, NB, S)
        for tile in range(pid, tl.cdiv(N, BN), tl.num_programs(0)):
            n = tile * BN + tl.arange(0, BN)
            start = n.to(tl.int64) * NB
            fetched = fetch(planes, start, n < N, FORMAT, EVEN, AHEAD)
            tl.debug_barrier()  # or the assembler puts each fetch off until its use
            y = fold(fetched, planes, start, n < N, operand, NB, FORMAT, S, EVEN, AHEAD)
            _store(y, n, n < N, residual_ptr, y_ptr)
    elif PARTS == 1:
        operand = operand_at(at_ptr + tl.zeros([1], tl.int32), 0, NB, S)
        y = fold(fetched, planes, n.to(tl.int64) * NB, n < N, operand, NB, FORMAT, S, EVEN, AHEAD)
        _store(y, n, n < N, residual_ptr, y_ptr)
    else:
        operand = operand_at(at_ptr + tl.zeros([1], tl.int32), skip, NB, S)
        start = n.to(tl.int64) * NB + skip
        y = _fold_parts(fetched, planes, start, n < N, operand, parts_ptr, NB, PARTS, FORMAT, S, EVEN, AHEAD)
        n = pid * BN + tl.arange(0, BN)
        _store(y, n, n < N, residual_ptr, y_ptr)


@triton.jit
def _store(acc, n, live, residual_ptr, y_ptr):
    if residual_ptr is not None:
        acc = tl.load(residual_ptr + n, live, 0.0) + acc
    tl.store(y_ptr + n, acc, live)


@triton.jit
def _matvec_kernel(
    x_ptr, norm_ptr, eps, residual_ptr, y_ptr, scratch_ptr,
    words_ptr, high_ptr, scales_ptr, d_ptr, words2_ptr, high2_ptr, scales2_ptr, d2_ptr,
    NB: tl.constexpr, NB2: tl.constexpr, N: tl.constexpr, N2: tl.constexpr,
    FORMAT: tl.constexpr, FORMAT2: tl.constexpr, S: tl.constexpr, WORDS: tl.constexpr, READY: tl.constexpr,
    BN: tl.constexpr, PARTS: tl.constexpr, LOOP: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    planes = (words_ptr, high_ptr, scales_ptr, d_ptr)
    at_ptr = x_ptr
    parts_ptr = None
    if not READY or PARTS > 1:
        own_ptr = scratch_ptr + pid * (WORDS + BN * NB * (PARTS > 1))
        parts_ptr = (own_ptr + WORDS).to(tl.pointer_type(tl.float32), bitcast=True)
        if not READY:
            at_ptr = own_ptr
    tiles_before: tl.constexpr = (N + BN - 1) // BN
    if N2 == 0 or pid < tiles_before:
        _segment(
            pid, planes, x_ptr, norm_ptr, eps, residual_ptr, y_ptr, at_ptr, parts_ptr,
            NB, NB2, N, FORMAT, S, READY, BN, PARTS, LOOP, AHEAD,
        )  # fmt: skip
    else:
        tl.static_assert(residual_ptr is None)
        planes2 = (words2_ptr, high2_ptr, scales2_ptr, d2_ptr)
        _segment(
            pid - tiles_before, planes2, x_ptr, norm_ptr, eps, None, y_ptr + N, at_ptr, parts_ptr,
            NB, NB2, N2, FORMAT2, S, READY, BN, PARTS, LOOP, AHEAD,
        )  # fmt: skip
