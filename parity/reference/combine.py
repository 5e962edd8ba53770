"""Sum a token's experts.      expert_out [R, D] f32, weight [T, A] f32 -> [T, D] f32

Left fold over rank: ((0 + w_0*y_0) + w_1*y_1) + ..."""

import numpy as np

from exactmoe.parity.reference.numerics import F32, quiet, require


@quiet
def combine(expert_out: F32, weight: F32) -> F32:
    """The weighted sum over ranks k of rows r = t*A + k."""
    T, A = weight.shape
    R, D = expert_out.shape
    require(R == T * A, f"{R} expert rows are not {T} tokens of {A} experts")
    y = expert_out.reshape(T, A, D)
    total = np.zeros((T, D), np.float32)
    for k in range(A):
        total = total + weight[:, k, None] * y[:, k]
    return total
