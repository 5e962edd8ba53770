"""QK-norm and rotary position embedding.      x [T, n*C] f32 -> [T, n, C] f32"""

import functools
import hashlib
import math
from typing import NamedTuple

import numpy as np

from exactmoe.parity.reference.norm import rms_norm
from exactmoe.parity.reference.numerics import F32, quiet, require


class RopeTable(NamedTuple):
    """Rotations of positions 0..P-1."""

    cos: F32  # [P, C/2]
    sin: F32  # [P, C/2]

    def digest(self) -> str:
        """sha256 of the table's bytes, cos then sin."""
        return hashlib.sha256(self.cos.tobytes() + self.sin.tobytes()).hexdigest()


@functools.lru_cache(maxsize=4)
def rope_table(n_positions: int, head_dim: int, base: float) -> RopeTable:
    """angle(p, i) = p * base^(-2i/C) in binary64; cos and sin rounded once to binary32."""
    require(head_dim > 0 and head_dim % 2 == 0, f"head width must be even, got {head_dim}")
    cos = np.empty((n_positions, head_dim // 2), np.float32)
    sin = np.empty_like(cos)
    for i in range(head_dim // 2):
        frequency = math.pow(base, -2 * i / head_dim)
        for p in range(n_positions):
            cos[p, i] = math.cos(p * frequency)
            sin[p, i] = math.sin(p * frequency)
    return RopeTable(cos, sin)


@quiet
def qk_norm_rope(x: F32, weight: F32, eps: np.float32, table: RopeTable, start: int) -> F32:
    """Heads normed over C, then turned on NEOX pairs (i, i + C/2) at positions start..start+T-1."""
    T, C = x.shape[0], weight.shape[0]
    require(x.shape[1] % C == 0, f"rows of {x.shape[1]} are not whole heads of {C}")
    y = rms_norm(x.reshape(T, -1, C), weight, eps)
    a, b = y[..., : C // 2], y[..., C // 2 :]
    cos, sin = table.cos[start : start + T, None], table.sin[start : start + T, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
