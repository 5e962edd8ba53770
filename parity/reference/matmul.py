"""Quantised matmul, dense or grouped by expert.      weight [N, K], x [T, K] -> y [T, N] f32

Per block of 256 the exact integers S (and T, for the mins), put into f32 once; P = xd*(d*S - dmin*T); the P of a row are
folded from zero in ascending block order."""

import numpy as np
import numpy.typing as npt

from exactmoe.parity.reference.dispatch import Dispatch
from exactmoe.parity.reference.numerics import F32, Array, isum_dot, quiet, require
from exactmoe.parity.reference.q4_k import decode_q4_k
from exactmoe.parity.reference.q6_k import decode_q6_k
from exactmoe.parity.reference.quantize import BLOCK, Activations
from exactmoe.parity.reference.weights import BLOCK_BYTES, QuantMatrix


@quiet
def matmul(weight: QuantMatrix, x: Activations) -> F32:
    """y [T, N] = x [T, K] @ weight [N, K]^T."""
    T, K = x.q.shape[1:]
    require(weight.k == K, f"activations of width {K} meet weights of width {weight.k}")
    size = BLOCK_BYTES[weight.type_name]
    y = np.zeros((T, weight.n), np.float32)
    for i in range(K // BLOCK):
        block = weight.data[:, i * size : (i + 1) * size]  # [N, size]
        slices = x.q[:, :, i * BLOCK : (i + 1) * BLOCK]  # [S, T, 256]
        y = y + _product(weight.type_name, block, slices, x.scale[:, i, None])
    return y


def grouped_matmul(weight: QuantMatrix, x: Activations, dispatch: Dispatch, rows_per_activation: int) -> F32:
    """y [R, N]: routed row r is activation row r // rows_per_activation times the weights [E, N, K] of its expert."""
    R = len(dispatch.order)
    E = weight.data.shape[0]
    require(len(dispatch.offset) == E + 1, f"dispatch has {len(dispatch.offset) - 1} experts, weights {E}")
    require(
        x.q.shape[1] * rows_per_activation == R,
        f"{x.q.shape[1]} activation rows times {rows_per_activation} are not {R} routed rows",
    )
    y = np.empty((R, weight.n), np.float32)
    for e in range(E):
        rows = dispatch.order[dispatch.offset[e] : dispatch.offset[e + 1]]
        if len(rows):
            source = rows // rows_per_activation
            mine = Activations(x.q[:, source], x.scale[source])
            y[rows] = matmul(QuantMatrix(weight.data[e], weight.type_name), mine)
    return y


def _product(type_name: str, block: npt.NDArray[np.uint8], slices: Array, xd: F32) -> F32:
    """P [T, N] of one block: block u8 [N, size], slices i8 [S, T, 256], xd f32 [T, 1]."""
    if type_name == "Q4_K":
        b = decode_q4_k(block)
        s = _joined(slices, np.repeat(b.scale, 32, axis=-1) * b.code)
        t = _joined(slices, np.repeat(b.minimum, 32, axis=-1))
        return xd * (b.d * s - b.dmin * t)
    require(type_name == "Q6_K", f"type {type_name} has no reference")
    c = decode_q6_k(block)
    return xd * (c.d * _joined(slices, np.repeat(c.scale, 16, axis=-1) * c.code))


def _joined(slices: Array, weight: Array) -> F32:
    """N(S) [T, N]: the exact sum of weight [N, 256] times each slice, put into f32, slices joined as 128*hi + lo."""
    sums = [isum_dot(part, weight.T).astype(np.float32) for part in slices]
    return sums[0] if len(sums) == 1 else np.float32(128) * sums[0] + sums[1]
