"""Group routed rows by expert, stably.      expert [T, A] i32 -> order [R] i32, offset [E+1] i32,  R = T*A"""

from typing import NamedTuple

import numpy as np

from exactmoe.parity.reference.numerics import I32, require


class Dispatch(NamedTuple):
    """Rows of expert e are order[offset[e]:offset[e+1]], in ascending row number."""

    order: I32  # [R]
    offset: I32  # [E+1]


def dispatch(expert: I32, n_experts: int) -> Dispatch:
    """Routed rows r = t*A + rank, by expert and then by r."""
    flat = expert.reshape(-1)
    low, high = (int(flat.min()), int(flat.max())) if flat.size else (0, 0)
    require(0 <= low and high < n_experts, f"expert ids must be 0 to {n_experts - 1}, got {low} to {high}")
    order = np.argsort(flat, kind="stable").astype(np.int32)
    count = np.bincount(flat, minlength=n_experts)
    return Dispatch(order, np.concatenate([[0], np.cumsum(count)]).astype(np.int32))
