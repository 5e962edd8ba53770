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
from exactmoe.kernels.guess import Guess, fetch_guess, guess_arguments
from exactmoe.kernels.launch import FAITHFUL
from exactmoe.kernels.numerics import bits_of, fixed_point_23, from_bits, inverse_rms_of, magnitude
from exactmoe.kernels.packed import (
    Q4_K,
    PackedMatrix,
    block_product,
    block_sums,
    load_block,
    load_end,
    load_operand,
    operand_at,
    operand_slices,
    operand_stride,
    scales_of,
    store_operand,
)
from exactmoe.kernels.prefetch import Past, past_arguments, past_lines, prefetch, prefetch_past, spans
from exactmoe.kernels.tensors import require_f32, slices

_LATER = tl.constexpr(4)  # tensors that are fetched ahead where there is no guess
_REGISTERS = 128  # for two formats, or the next kernel would find no room beside this one


class Norm(NamedTuple):
    """An RMSNorm before a matrix."""

    weight: Tensor  # [K] f32
    eps: float


def matvec(
    weights: Sequence[PackedMatrix],
    x: Tensor,
    profile: str,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    guess: Guess | None = None,
    later: Sequence[Tensor] = (),
    past: Past | None = None,
) -> Tensor:
    """y [sum N] of one or two matrices over the row x [K], normed first where asked, plus `residual` [sum N].

    In place of the row there may be its operand, i32, which another kernel has made; then there is no norm. A `guess`
    is fetched ahead, or up to four tensors that the next kernel reads; and a `past` by a kernel that makes its operand
    itself, once its own weights are on their way. Bit-equal to parity.reference.matvec.matvec."""
    require(1 <= len(weights) <= 2, f"one or two matrices, got {len(weights)}")
    K = weights[0].k
    for w in weights:
        require(w.k == K and w.experts == 1, f"matrices of width {K} and {w.k}, of {w.experts} experts, in one matvec")
    ready = x.dtype == torch.int32
    if ready:
        require(norm is None, "an operand is quantised already: it cannot be normed")
        require(past is None, "a kernel whose operand is ready asks for no past: it has no time to")
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
    parts = parts_of(K // BLOCK)
    counts = [triton.cdiv(w.n, tile.rows * tile.tiles) for w in weights]
    programs = min(sum(counts), tile.programs) if len(weights) == 1 else sum(counts)
    words = 0 if ready else operand_stride(K, slices(profile))
    ahead, sizes = guess_arguments(guess)
    if later:
        require(guess is None, "either a guess is fetched ahead, or other tensors")
        tensors, nbytes = spans(later, _LATER.value)
        rest = ahead[1 + len(tensors) :]  # of a guess's places
        ahead, sizes["LATER"] = (None, *tensors, *rest), (*nbytes, *(0,) * len(rest))
    before, past_sizes = past_arguments(past)
    scratch = torch.empty(programs, words, dtype=torch.int32, device=x.device) if words else None
    _matvec_kernel[(programs,)](
        x, norm.weight if norm else None, norm.eps if norm else 0.0, residual, y, scratch,
        *first.planes, *last.planes, *ahead, *before,
        NB=K // BLOCK, NB2=triton.next_power_of_2(K // BLOCK), N=first.n, N2=last.n if len(weights) == 2 else 0,
        FORMAT=first.format.ggml_id, FORMAT2=last.format.ggml_id, S=slices(profile), WORDS=words,
        READY=ready, BN=tile.rows, PARTS=parts, TILES=tile.tiles, LOOP=programs < sum(counts), AHEAD=tile.ahead,
        AHEAD2=min(tile.ahead, tile.tiles) if last.format.name != "Q4_K" else tile.ahead,
        PROGRAMS=programs, WARPS=tile.warps, **sizes, **past_sizes, num_warps=tile.warps,
        maxnreg=_REGISTERS if first.format != last.format else None, **DEPENDENT, **FAITHFUL,
    )  # fmt: skip
    return y


def parts_of(blocks: int) -> int:
    """Runs that a row of `blocks` blocks is taken in: a warp has four groups of eight lanes, a group one run."""
    return next(parts for parts in (4, 2, 1) if blocks % parts == 0)


@triton.jit
def block_index(NB2: tl.constexpr):
    """Index of the elements of NB2 blocks, [NB2, 256]."""
    return tl.arange(0, NB2)[:, None] * 256 + tl.arange(0, 256)[None, :]


@triton.jit
def load_norm(norm_ptr, NB: tl.constexpr, NB2: tl.constexpr):
    """The weights of a norm as `normed` takes them: weights, so not to be waited for."""
    j = block_index(NB2)
    return tl.load(norm_ptr + j, j < NB * 256, 0.0)


@triton.jit
def load_row(x_ptr, NB: tl.constexpr, NB2: tl.constexpr):
    """The row x [NB*256] as f32 [NB2, 256], zero beyond its blocks."""
    j = block_index(NB2)
    return tl.load(x_ptr + j, j < NB * 256, 0.0)


@triton.jit
def normed(x, weight, eps, K: tl.constexpr):
    """The row of `load_row`, of K elements, RMS-normed; as it is if the norm's weight is None."""
    if weight is not None:
        top = tl.max(magnitude(x)) + tl.zeros([1, 1], tl.int32)  # a number, so that no layout is in the way
        i = fixed_point_23(x, top)
        r = inverse_rms_of(tl.sum(i * i) + tl.zeros([1, 1], tl.int64), top, K, eps)
        x = (x * r) * weight
    return x


@triton.jit
def fetch(
    planes, planes2, start, n, first: tl.constexpr, count: tl.constexpr,
    N: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr, NB: tl.constexpr, EACH: tl.constexpr,
    FORMAT: tl.constexpr, FORMAT2: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """`count` blocks from the `first` on, on their way, of those that `fold` takes: for each of a row's EACH blocks
    here, that of every tile, of the first matrix and then of the second, if FORMAT2 is not 0."""
    COUNT: tl.constexpr = EACH * TILES
    FORMATS: tl.constexpr = (FORMAT, FORMAT2)
    both = (planes, planes2)
    fetched = ()  # type: tuple[tl.tensor, ...]
    for i in tl.static_range(first, first + count):
        if i < (2 * COUNT if FORMAT2 > 0 else COUNT):
            fetched = fetched + (  # noqa: RUF005 - Triton has no *
                _fetch(both[i // COUNT], start, n, i % COUNT, N, STEP, TILES, NB, FORMATS[i // COUNT], EVEN),
            )
    return fetched


@triton.jit
def _fetch(
    planes, start, n, i: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr, NB: tl.constexpr,
    FORMAT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The `i`th block, and with the first tile's what those of all tiles have once, as a tuple."""
    end = ()  # type: tuple[tl.tensor, ...]
    if i % TILES == 0:
        end = (load_end(planes, start, n, i // TILES, N, STEP, TILES, NB, FORMAT, EVEN),)
    step: tl.constexpr = i % TILES * STEP
    return load_block(planes, start + step * NB, n + step < N, i // TILES, FORMAT, EVEN) + end


@triton.jit
def issue(ptr):
    """Have the loads above on their way before those below.

    The assembler puts a load off until its use, where every one would be waited for, but moves none past a store that
    may change what it reads. This store, to `ptr`, is never made."""
    tl.store(ptr, 0, tl.program_id(2) > 0)


@triton.jit
def load_operands(x, ptr, NB: tl.constexpr, EACH: tl.constexpr, FORMAT: tl.constexpr, S: tl.constexpr):
    """The first EACH blocks of `operand_at`'s `x`; the first of them, without which `fold` cannot begin, last."""
    loaded = ()  # type: tuple[tl.tensor, ...]
    for b in tl.static_range(EACH - 1, 0, -1):
        loaded = (load_operand(x, b, NB, FORMAT, S),) + loaded  # noqa: RUF005
    issue(ptr)
    return (load_operand(x, 0, NB, FORMAT, S),) + loaded  # noqa: RUF005


@triton.jit
def fold(
    fetched, planes, planes2, start, n, x, x2, ptr,
    N: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr, NB: tl.constexpr, PARTS: tl.constexpr,
    FORMAT: tl.constexpr, FORMAT2: tl.constexpr, S: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y [M // PARTS, 8] of rows against `load_operands`' x: their block products, left to right. Column t is tile t's.
    And that of the same rows of a second matrix against x2, or if FORMAT2 is 0 the first again.

    M runs of NB // PARTS blocks begin with blocks `start` [M], i64, of rows `n` [M]; PARTS of them, one behind the
    other, are a row. Tile t's are t * STEP rows further on; there are at most eight. What is not less than N is no
    row. The first AHEAD blocks are `fetched`; each one used makes room for one more. `ptr` is `issue`'s."""
    EACH: tl.constexpr = NB // PARTS
    COUNT: tl.constexpr = EACH * TILES
    FORMATS: tl.constexpr = (FORMAT, FORMAT2)
    both = (x, x2)
    tl.static_assert(TILES <= 8)
    none = tl.zeros([start.shape[0], 8], tl.int32)
    products = ()  # type: tuple[tl.tensor, ...]
    for i in tl.static_range(2 * COUNT if FORMAT2 > 0 else COUNT):
        w, own = fetched[i], both[i // COUNT][i % COUNT // TILES]
        if i % TILES == 0:
            end, held = w[-1], (none, none)
            scales = scales_of(end, FORMATS[i // COUNT])
        held = _hold(held, w, scales, own, i % TILES, FORMATS[i // COUNT], S)
        if i % TILES == TILES - 1:
            products = products + (block_product(held, end, own, FORMATS[i // COUNT], S),)  # noqa: RUF005
        more = fetch(planes, planes2, start, n, i + AHEAD, 1, N, STEP, TILES, NB, EACH, FORMAT, FORMAT2, EVEN)
        if len(more) > 0:
            issue(ptr)
        fetched = fetched + more
    y = _in_order(products, 0, EACH, NB, PARTS)
    y2 = y
    if FORMAT2 > 0:
        y2 = _in_order(products, EACH, EACH, NB, PARTS)
    return y, y2


@triton.jit
def _hold(held, w, scales, x, t: tl.constexpr, FORMAT: tl.constexpr, S: tl.constexpr):
    """`held` with the sums of tile t's block, for each slice, in lane t: each has them, and keeps its own tile's."""
    own = tl.arange(0, 8)[None, :] == t
    sums = block_sums(w, scales, t, x, FORMAT, S)
    return tl.where(own, sums[0][:, None], held[0]), tl.where(own, sums[S - 1][:, None], held[1])


@triton.jit
def _in_order(products, first: tl.constexpr, EACH: tl.constexpr, NB: tl.constexpr, PARTS: tl.constexpr):
    """The sum of NB products, EACH in each of PARTS runs of rows [M, 8], left to right: [M // PARTS, 8]."""
    M: tl.constexpr = products[0].shape[0] // PARTS
    part = tl.arange(0, PARTS)[None, :, None]
    acc = tl.zeros([M, 8], tl.float32)
    for k in tl.static_range(NB):
        bits = tl.reshape(bits_of(products[first + k % EACH]), [M, PARTS, 8])
        acc = acc + from_bits(tl.sum(tl.where(part == k // EACH, bits, 0), axis=1))
    return acc


@triton.jit
def tile_rows(first, M: tl.constexpr, STEP: tl.constexpr):
    """Which rows `fold`'s y [M, 8] is of, where tile 0 begins with row `first`."""
    return first + tl.arange(0, M)[:, None] + tl.arange(0, 8)[None, :] * STEP


@triton.jit
def of_a_tile(TILES: tl.constexpr):
    """Which columns [1, 8] of `fold`'s y are of a tile."""
    return (tl.arange(0, 8) < TILES)[None, :]


@triton.jit
def _segment(
    pid, planes, x_ptr, norm_ptr, eps, residual_ptr, y_ptr, at_ptr,
    NB: tl.constexpr, NB2: tl.constexpr, N: tl.constexpr, FORMAT: tl.constexpr, S: tl.constexpr, READY: tl.constexpr,
    BN: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, LOOP: tl.constexpr, AHEAD: tl.constexpr,
    later, LATER: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, A: tl.constexpr, PROGRAMS: tl.constexpr,
    WARPS: tl.constexpr, past, PAST_ROW: tl.constexpr, PAST_MOST: tl.constexpr,
):  # fmt: skip
    """Rows of one matrix, from the `pid`th BN * TILES on."""
    EVEN: tl.constexpr = N % (BN * TILES) == 0
    EACH: tl.constexpr = NB // PARTS
    r = tl.arange(0, BN * PARTS)
    skip = r % PARTS * EACH
    n = pid * (BN * TILES) + r // PARTS
    start = n.to(tl.int64) * NB + skip
    norm = norm_ptr
    if norm_ptr is not None:
        norm = load_norm(norm_ptr, NB, NB2)
    fetched = fetch(planes, (), start, n, 0, AHEAD, N, BN, TILES, NB, EACH, FORMAT, 0, EVEN)
    if A > 0:
        fetch_guess(pid, later, LATER, E, E2, A, PROGRAMS, WARPS)
    lines = past_lines(past, PAST_ROW, PAST_MOST)
    finish_wait()
    release_next()
    if not READY:
        x = load_row(x_ptr, NB, NB2)
        prefetch_past(past, lines, PAST_ROW, PAST_MOST, tl.program_id(0), PROGRAMS, 32 * WARPS)
        x = normed(x, norm, eps, NB * 256)
        store_operand(x, tl.zeros([NB2], tl.int32), tl.arange(0, NB2), at_ptr, NB, S, FORMAT == Q4_K)
        tl.debug_barrier()
    operand = operand_at(at_ptr, skip, NB, S)
    if LOOP:
        tl.static_assert(residual_ptr is None)
        operands = load_operands(operand, y_ptr, NB, EACH, FORMAT, S)
        count: tl.constexpr = (N + BN * TILES - 1) // (BN * TILES)
        for i in range(pid, count, tl.num_programs(0)):
            tl.debug_barrier()
            y, _ = fold(
                fetched, planes, (), start, n, operands, (), y_ptr,
                N, BN, TILES, NB, PARTS, FORMAT, 0, S, EVEN, AHEAD,
            )  # fmt: skip
            at = tile_rows(i * (BN * TILES), BN, BN)
            tl.store(y_ptr + at, y, of_a_tile(TILES) & (at < N))
            # The next tile's, before anything waits; behind the last one some that are not used.
            n = tl.minimum(i + tl.num_programs(0), count - 1) * (BN * TILES) + r // PARTS
            start = n.to(tl.int64) * NB + skip
            fetched = fetch(planes, (), start, n, 0, AHEAD, N, BN, TILES, NB, EACH, FORMAT, 0, EVEN)
    else:
        at = tile_rows(pid * (BN * TILES), BN, BN)
        live = of_a_tile(TILES) & (at < N)
        if residual_ptr is not None:
            before = tl.load(residual_ptr + at, live, 0.0)
        operands = load_operands(operand, y_ptr, NB, EACH, FORMAT, S)
        y, _ = fold(
            fetched, planes, (), start, n, operands, (), y_ptr,
            N, BN, TILES, NB, PARTS, FORMAT, 0, S, EVEN, AHEAD,
        )  # fmt: skip
        if residual_ptr is not None:
            y = before + y
        tl.store(y_ptr + at, y, live)


@triton.jit
def _matvec_kernel(
    x_ptr, norm_ptr, eps, residual_ptr, y_ptr, scratch_ptr,
    words_ptr, high_ptr, scales_ptr, d_ptr, words2_ptr, high2_ptr, scales2_ptr, d2_ptr,
    guess_ptr, later_ptr, later2_ptr, later3_ptr, later4_ptr, later5_ptr, later6_ptr, later7_ptr, later8_ptr,
    later9_ptr, later10_ptr, later11_ptr, later12_ptr, position_ptr, past_ptr,
    NB: tl.constexpr, NB2: tl.constexpr, N: tl.constexpr, N2: tl.constexpr,
    FORMAT: tl.constexpr, FORMAT2: tl.constexpr, S: tl.constexpr, WORDS: tl.constexpr, READY: tl.constexpr,
    BN: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, LOOP: tl.constexpr, AHEAD: tl.constexpr,
    AHEAD2: tl.constexpr, LATER: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, A: tl.constexpr,
    PROGRAMS: tl.constexpr, WARPS: tl.constexpr, PAST_ROW: tl.constexpr, PAST_MOST: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    past = (position_ptr, past_ptr)
    planes = (words_ptr, high_ptr, scales_ptr, d_ptr)
    later = (
        guess_ptr, later_ptr, later2_ptr, later3_ptr, later4_ptr, later5_ptr, later6_ptr, later7_ptr, later8_ptr,
        later9_ptr, later10_ptr, later11_ptr, later12_ptr,
    )  # fmt: skip
    if A == 0:  # before the weights, for the next kernel reads them before its wait
        for i in tl.static_range(_LATER):
            prefetch(later[1 + i], LATER[i], pid, PROGRAMS, 32 * WARPS)
    at_ptr = x_ptr
    if not READY:
        at_ptr = scratch_ptr + pid * WORDS
    tiles_before: tl.constexpr = (N + BN * TILES - 1) // (BN * TILES)
    if N2 == 0 or pid < tiles_before:
        _segment(
            pid, planes, x_ptr, norm_ptr, eps, residual_ptr, y_ptr, at_ptr,
            NB, NB2, N, FORMAT, S, READY, BN, PARTS, TILES, LOOP, AHEAD, later, LATER, E, E2, A, PROGRAMS, WARPS,
            past, PAST_ROW, PAST_MOST,
        )  # fmt: skip
    else:
        tl.static_assert(residual_ptr is None)
        planes2 = (words2_ptr, high2_ptr, scales2_ptr, d2_ptr)
        _segment(
            pid - tiles_before, planes2, x_ptr, norm_ptr, eps, None, y_ptr + N, at_ptr,
            NB, NB2, N2, FORMAT2, S, READY, BN, PARTS, TILES, LOOP, AHEAD2, later, LATER, E, E2, 0, PROGRAMS, WARPS,
            past, PAST_ROW, PAST_MOST,
        )  # fmt: skip
