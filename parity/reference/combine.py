"""Sum the active experts' outputs.      expert_out [R, D] f32, weight [T, A] f32 -> [T, D] f32"""

import numpy as np

from exactmoe.parity.reference.numerics import F32, quiet, require


@quiet
def combine(expert_out: F32, weight: F32) -> F32:
    """Left fold over rank k of weight[t, k] * expert_out[t*A + k], from zero."""
    T, A = weight.shape
    require(len(expert_out) == T * A, f"expert_out must have {T * A} rows, got {len(expert_out)}")
    rows = expert_out.reshape(T, A, expert_out.shape[1])
    out = np.zeros((T, expert_out.shape[1]), np.float32)
    for k in range(A):
        out = out + weight[:, k, None] * rows[:, k]
    return out
