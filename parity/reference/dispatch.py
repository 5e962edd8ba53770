"""Group routed rows by expert, stably.      expert [T, A] i32 -> order [R] i32, offset [E+1] i32,  R = T*A"""

from typing import NamedTuple

import numpy as np

from exactmoe.parity.reference.numerics import I32, require


class Dispatch(NamedTuple):
    """Rows by expert, those of one expert in ascending order: expert e has order[offset[e]:offset[e+1]]."""

    order: I32  # [R]
    offset: I32  # [E+1]


def dispatch(expert: I32, n_experts: int) -> Dispatch:
    """Group routed rows r = t*A + rank. Raises ValueError for an expert id outside 0..E-1."""
    require_experts(expert, n_experts)
    flat = expert.reshape(-1)
    rows = [np.flatnonzero(flat == e) for e in range(n_experts)]
    offset = [0]
    for group in rows:
        offset.append(offset[-1] + len(group))
    return Dispatch(np.concatenate(rows).astype(np.int32), np.array(offset, np.int32))


def require_experts(expert: I32, n_experts: int) -> None:
    """Refuse an expert id outside 0..E-1."""
    low, high = (int(expert.min()), int(expert.max())) if expert.size else (0, 0)
    require(0 <= low and high < n_experts, f"expert ids must be 0 to {n_experts - 1}, got {low} to {high}")
