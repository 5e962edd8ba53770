"""Quantised matmul, dense or grouped by expert.      weight [N, K], x [T, K] -> y [T, N] f32

For block i of 256: exact integer sums S (and T, of the minimums), each put into f32 once, and
    Q4_K: P_i = xd_i * (d_i*N(S_i) - dmin_i*N(T_i))      Q6_K: P_i = xd_i * (d_i*N(S_i))
where N(S) = f32(S) of one slice, or 128*f32(S_hi) + f32(S_lo) of two.  y = ((0 + P_0) + P_1) + ..."""

import numpy as np

from exactmoe.parity.reference.dispatch import Dispatch
from exactmoe.parity.reference.numerics import F32, F64, I32, U8, Array, isum_dot, quiet, require
from exactmoe.parity.reference.q4_k import decode_q4_k
from exactmoe.parity.reference.q6_k import decode_q6_k
from exactmoe.parity.reference.quantize import BLOCK, Activations
from exactmoe.parity.reference.weights import BLOCK_BYTES, QuantMatrix

_ROWS = 2048  # weight rows decoded at a time: a block of each is 4 MiB of float64


@quiet
def matmul(weight: QuantMatrix, x: Activations) -> F32:
    """y [T, N] = x [T, K] @ weight [N, K]^T. Raises ValueError for widths that do not meet."""
    T, K = x.q.shape[1:]
    require(weight.k == K, f"activations of width {K} meet weights of width {weight.k}")
    size = BLOCK_BYTES[weight.type_name]
    y = np.zeros((T, weight.n), np.float32)
    for first in range(0, weight.n, _ROWS):
        rows = slice(first, first + _ROWS)
        for i in range(K // BLOCK):
            block = weight.data[rows, i * size : (i + 1) * size]
            slices = x.q[:, :, i * BLOCK : (i + 1) * BLOCK]
            y[:, rows] = y[:, rows] + _product(weight.type_name, block, slices, x.scale[:, i])
    return y


def grouped_matmul(weight: QuantMatrix, x: Activations, dispatch: Dispatch, rows_per_activation: int) -> F32:
    """y [R, N]: routed row r is activation row r // rows_per_activation times its expert's matrix of weight [E, N, K].

    Raises ValueError for counts of experts or rows that do not meet."""
    E, R = weight.data.shape[0], len(dispatch.order)
    require(len(dispatch.offset) == E + 1, f"dispatch is for {len(dispatch.offset) - 1} experts, weights for {E}")
    T = x.q.shape[1]
    require(T * rows_per_activation == R, f"{T} activation rows, {rows_per_activation} times each, are not {R} rows")
    y = np.empty((R, weight.n), np.float32)
    for e in range(E):
        rows = dispatch.order[dispatch.offset[e] : dispatch.offset[e + 1]]
        if len(rows):
            source = rows // rows_per_activation
            y[rows] = matmul(
                QuantMatrix(weight.data[e], weight.type_name), Activations(x.q[:, source], x.scale[source])
            )
    return y


def _product(type_name: str, block: U8, slices: Array, xd: F32) -> F32:
    """P [T, N] of one block: weights [N, block bytes], activations i8 [S, T, 256] of scale [T]."""
    N = len(block)
    if type_name == "Q4_K":
        b = decode_q4_k(block)
        s = _joined(slices, (b.scale[..., None] * b.code).reshape(N, BLOCK))
        sums: I32 = np.sum(slices.reshape(*slices.shape[:2], 8, 32), axis=-1, dtype=np.int32)  # of each sub-block
        t = _joined(sums, b.minimum)
        return xd[:, None] * (b.d * s - b.dmin * t)
    c = decode_q6_k(block)
    s = _joined(slices, (c.scale[..., None] * c.code).reshape(N, BLOCK))
    return xd[:, None] * (c.d * s)


def _joined(slices: Array, weight: Array) -> F32:
    """N(S) [T, N] of the sums S of slices [S, T, k] times weight [N, k], all integers."""
    S, T, k = slices.shape
    exact: F64 = isum_dot(slices.reshape(S * T, k), weight.T).reshape(S, T, len(weight))
    high: F32 = exact[0].astype(np.float32)
    return high if S == 1 else np.float32(128) * high + exact[1].astype(np.float32)
