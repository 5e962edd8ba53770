"""Quantised matmul, dense or grouped by expert: one kernel.      weight [N, K], x [T, K] -> y [T, N] f32
Promised order: per block of 256 an exact integer sum, put into f32 once; then P = xd*(d*S - dmin*T), and the P of a row
are folded from zero in ascending block order. Nothing else is rounded, so tiles and row grouping cannot matter.

The integers ride on fp16 tensor cores. Terms of a chain are kept so small that every partial sum stays below 2^24,
where f32 holds integers exactly in any order: sc*(q-8) for Q4_K (504*127*256), two slices 64h + l of sc*q for Q6_K.
Chains are joined as integers, which also keeps the compiler from merging two of them into one longer, inexact chain."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels import tiles
from exactmoe.kernels.dispatch import Dispatch
from exactmoe.kernels.errors import require
from exactmoe.kernels.formats import BLOCK, executable_format
from exactmoe.kernels.launch import FAITHFUL
from exactmoe.kernels.q4_k import HIGH_Q4_K, load_codes_q4_k, load_f16, load_scales_q4_k, low_k_q4_k, split_halves_q4_k
from exactmoe.kernels.q6_k import HIGH_Q6_K, load_codes_q6_k, load_scales_q6_k, low_k_q6_k
from exactmoe.kernels.tensors import Activations, QuantMatrix, require_activations, require_shape

_Q4_K = tl.constexpr(12)
_MAX_EXPERTS = 1024


def matmul(weight: QuantMatrix, x: Activations, tile: tiles.MatmulTile | None = None) -> Tensor:
    """y [T, N] f32 = x [T, K] @ weight [N, K]^T; bit-equal to parity.reference.matmul.matmul."""
    executable_format(weight.format.name, "weight")
    require_shape(weight.data, "weight", weight.n, None)
    require_activations(x, weight.k, "x")
    T = x.q.shape[1]
    y = torch.empty(T, weight.n, dtype=torch.float32, device=x.q.device)
    if T and weight.n:
        tile = tile or tiles.matmul(T)
        _launch(triton.cdiv(T, tile.rows), weight, x, None, y, T, 1, tile)
    return y


def grouped_matmul(
    weight: QuantMatrix,
    x: Activations,
    dispatch: Dispatch,
    rows_per_activation: int,
    tile: tiles.MatmulTile | None = None,
) -> Tensor:
    """y [R, N] f32, routed row r = activation row r // rows_per_activation times the weights [E, N, K] of r's expert.

    One launch for all experts; bit-equal to parity.reference.matmul.grouped_matmul."""
    executable_format(weight.format.name, "weight")
    require(weight.data.ndim == 3, f"grouped weights must be [E, N, row bytes], got {list(weight.data.shape)}")
    E = weight.data.shape[0]
    require(0 < E <= _MAX_EXPERTS, f"1 to {_MAX_EXPERTS} experts, got {E}")
    require_activations(x, weight.k, "x")
    R = dispatch.order.shape[0]
    require(dispatch.offset.shape[0] == E + 1, f"dispatch has {dispatch.offset.shape[0] - 1} experts, weights {E}")
    require(
        rows_per_activation > 0 and x.q.shape[1] * rows_per_activation == R,
        f"{x.q.shape[1]} activation rows times {rows_per_activation} are not {R} routed rows",
    )
    y = torch.empty(R, weight.n, dtype=torch.float32, device=x.q.device)
    if R and weight.n:
        tile = tile or tiles.grouped_matmul(R, E)
        row_tiles = R // tile.rows + min(E, R)  # at most this many tiles hold a row
        _launch(row_tiles, weight, x, dispatch, y, R, rows_per_activation, tile)
    return y


def _launch(
    row_tiles: int,
    weight: QuantMatrix,
    x: Activations,
    dispatch: Dispatch | None,
    y: Tensor,
    rows: int,
    rows_per_activation: int,
    tile: tiles.MatmulTile,
) -> None:
    E = weight.data.shape[0] if dispatch else 0
    cols = min(tile.cols, max(16, triton.next_power_of_2(weight.n)))
    grid = (row_tiles, triton.cdiv(weight.n, cols))
    _matmul_kernel[grid](
        weight.data, weight.heads, x.q, x.scale, x.group_sum, y,
        dispatch.order if dispatch else None, dispatch.offset if dispatch else None,
        rows, x.q.shape[1], N=weight.n, NB=weight.k // BLOCK,
        BYTES=weight.format.data_bytes, FORMAT=weight.format.ggml_id,
        E=E, E2=triton.next_power_of_2(E) if E else 0, PER=rows_per_activation, S=x.q.shape[0],
        BM=tile.rows, BN=cols, num_warps=tile.warps, **FAITHFUL,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "T"])
def _matmul_kernel(
    w_ptr, head_ptr, q_ptr, scale_ptr, sum_ptr, y_ptr,
    order_ptr, offset_ptr,
    rows, T, N: tl.constexpr, NB: tl.constexpr, BYTES: tl.constexpr, FORMAT: tl.constexpr,
    E: tl.constexpr, E2: tl.constexpr, PER: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if E == 0:
        row = pid * BM + tl.arange(0, BM)
        live_m = row < rows
        expert = 0
    else:
        expert, first, end = _expert_tile(pid, offset_ptr, E, E2, BM)
        if expert >= E:
            return
        slot = first + tl.arange(0, BM)
        live_m = slot < end
        row = tl.load(order_ptr + slot, live_m, 0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    live_n = n < N
    first_block = (n + expert * N).to(tl.int64) * NB
    block_ptr = w_ptr + first_block * BYTES
    if FORMAT == _Q4_K:
        head_ptr = head_ptr + first_block * 16
    act = row // PER
    x_ptr = q_ptr + act.to(tl.int64) * (NB * 256)
    bs_ptr = sum_ptr + act.to(tl.int64) * (NB * 16)
    acc = tl.zeros([BN, BM], tl.float32)
    for i in range(NB):
        xd = tl.load(scale_ptr + act * NB + i, live_m, 0.0)[None, :]
        if FORMAT == _Q4_K:
            p = _q4_k_product(
                block_ptr, head_ptr + i * 16, live_n, x_ptr, bs_ptr, live_m, T * (NB * 256), T * (NB * 16), xd, S
            )
        else:
            p = _q6_k_product(block_ptr, live_n, x_ptr, live_m, T * (NB * 256), xd, S)
        acc = acc + p
        block_ptr += BYTES
        x_ptr += 256
        bs_ptr += 16
    tl.store(y_ptr + row.to(tl.int64)[None, :] * N + n[:, None], acc, live_n[:, None] & live_m[None, :])


@triton.jit
def _expert_tile(pid, offset_ptr, E: tl.constexpr, E2: tl.constexpr, BM: tl.constexpr):
    """The expert that tile `pid` belongs to (E when past all), the tile's first slot, the end of the expert's slots."""
    e = tl.arange(0, E2)
    begin = tl.load(offset_ptr + e, e < E, 0)
    count = tl.load(offset_ptr + e + 1, e < E, 0) - begin
    tile_count = (count + BM - 1) // BM
    past = tl.cumsum(tile_count, axis=0)
    expert = tl.sum(((past <= pid) & (e < E)).to(tl.int32), axis=0)
    mine = e == expert
    first = tl.sum(tl.where(mine, begin + (pid - past + tile_count) * BM, 0), axis=0)
    end = tl.sum(tl.where(mine, begin + count, 0), axis=0)
    return expert, first, end


@triton.jit
def _q4_k_product(code_ptr, head_ptr, live_n, x_ptr, bs_ptr, live_m, q_stride, sum_stride, xd, S: tl.constexpr):
    """P [N, M] of one block: xd * (d*S - dmin*T)."""
    N: tl.constexpr = code_ptr.shape[0]
    low, high = load_codes_q4_k(code_ptr, live_n)
    sc, mn = load_scales_q4_k(head_ptr, live_n)
    sc_low, sc_high = split_halves_q4_k(sc)
    w_low = tl.reshape(((low - 8) * sc_low).to(tl.float16), [N, 128])
    w_high = tl.reshape(((high - 8) * sc_high).to(tl.float16), [N, 128])
    # Activations are summed in 16 groups of 16, two to a sub-block, as a dot needs 16 terms.
    sc16 = tl.reshape(tl.broadcast_to(sc.to(tl.float16)[:, :, None], [N, 8, 2]), [N, 16])
    mn16 = tl.reshape(tl.broadcast_to(mn.to(tl.float16)[:, :, None], [N, 8, 2]), [N, 16])
    k = low_k_q4_k()
    s, t = _q4_k_sums(w_low, w_high, sc16, mn16, x_ptr, bs_ptr, k, live_m)
    if S == 2:
        s_lo, t_lo = _q4_k_sums(w_low, w_high, sc16, mn16, x_ptr + q_stride, bs_ptr + sum_stride, k, live_m)
        s = 128.0 * s + s_lo
        t = 128.0 * t + t_lo
    d = load_f16(head_ptr, live_n)[:, None]
    dmin = load_f16(head_ptr + 2, live_n)[:, None]
    return xd * (d * s - dmin * t)


@triton.jit
def _q4_k_sums(w_low, w_high, sc16, mn16, x_ptr, bs_ptr, k, live_m):
    """f32 of the exact sums of sc*q*x and of mn*x over one block and slice."""
    centred = _dot_pair(w_low, w_high, x_ptr, k, HIGH_Q4_K, live_m)
    g = tl.arange(0, 16)
    bs = tl.load(bs_ptr[None, :] + g[:, None], live_m[None, :], 0).to(tl.float16)
    s = centred + 8 * tl.dot(sc16, bs).to(tl.int32)
    return s.to(tl.float32), tl.dot(mn16, bs).to(tl.int32).to(tl.float32)


@triton.jit
def _q6_k_product(block_ptr, live_n, x_ptr, live_m, q_stride, xd, S: tl.constexpr):
    """P [N, M] of one block: xd * (d*S)."""
    N: tl.constexpr = block_ptr.shape[0]
    low, high = load_codes_q6_k(block_ptr, live_n)
    g = tl.arange(0, 8)
    j = 8 * (g // 4) + g % 4
    p_low = low * load_scales_q6_k(block_ptr, j, live_n)[:, :, None]
    p_high = high * load_scales_q6_k(block_ptr, j + 4, live_n)[:, :, None]
    h_low = (p_low + 32) >> 6
    h_high = (p_high + 32) >> 6
    wh_low = tl.reshape(h_low.to(tl.float16), [N, 128])
    wh_high = tl.reshape(h_high.to(tl.float16), [N, 128])
    wl_low = tl.reshape((p_low - 64 * h_low).to(tl.float16), [N, 128])
    wl_high = tl.reshape((p_high - 64 * h_high).to(tl.float16), [N, 128])
    k = low_k_q6_k()
    s = _q6_k_sum(wh_low, wh_high, wl_low, wl_high, x_ptr, k, live_m)
    if S == 2:
        s = 128.0 * s + _q6_k_sum(wh_low, wh_high, wl_low, wl_high, x_ptr + q_stride, k, live_m)
    return xd * (load_f16(block_ptr + 208, live_n)[:, None] * s)


@triton.jit
def _q6_k_sum(wh_low, wh_high, wl_low, wl_high, x_ptr, k, live_m):
    """f32 of the exact sum of sc*(q-32)*x over one block and slice."""
    h = _dot_pair(wh_low, wh_high, x_ptr, k, HIGH_Q6_K, live_m)
    return (64 * h + _dot_pair(wl_low, wl_high, x_ptr, k, HIGH_Q6_K, live_m)).to(tl.float32)


@triton.jit
def _dot_pair(w_low, w_high, x_ptr, k, high: tl.constexpr, live_m):
    """Exact integer dot of both halves of a block, i32 [N, M]: one chain of 256 below 2^24."""
    x_low = tl.load(x_ptr[None, :] + k[:, None], live_m[None, :], 0).to(tl.float16)
    x_high = tl.load(x_ptr[None, :] + (k + high)[:, None], live_m[None, :], 0).to(tl.float16)
    return tl.dot(w_high, x_high, tl.dot(w_low, x_low)).to(tl.int32)
