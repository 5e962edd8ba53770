"""QK-norm and rotary positions.      x [T, n*C] f32 -> [T, n, C] f32"""

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
        """sha256 of the table's bytes, little-endian, cos then sin."""
        return hashlib.sha256(b"".join(part.astype("<f4").tobytes() for part in self)).hexdigest()


@functools.lru_cache(maxsize=4)
def rope_table(n_positions: int, head_dim: int, base: float) -> RopeTable:
    """angle(p, i) = p * base^(-2i/C) in binary64; its cos and sin rounded once, to binary32. Read-only."""
    require(head_dim > 0 and head_dim % 2 == 0, f"head width must be even, got {head_dim}")
    pairs = range(head_dim // 2)
    frequency = [math.pow(base, -2 * i / head_dim) for i in pairs]
    cos = np.array([[math.cos(p * frequency[i]) for i in pairs] for p in range(n_positions)], np.float64)
    sin = np.array([[math.sin(p * frequency[i]) for i in pairs] for p in range(n_positions)], np.float64)
    table = RopeTable(*(a.reshape(n_positions, len(pairs)).astype(np.float32) for a in (cos, sin)))
    for part in table:
        part.flags.writeable = False  # one table serves every cache of its size
    return table


@quiet
def qk_norm_rope(x: F32, weight: F32, eps: np.float32, table: RopeTable, start: int) -> F32:
    """Heads of C normed with weight [C], then their pairs (i, i + C/2) turned; row t is position start + t."""
    (T, width), C = x.shape, len(weight)
    require(width % C == 0, f"rows of {width} are no whole number of heads of {C}")
    P = len(table.cos)
    require(0 <= start and start + T <= P, f"positions {start} to {start + T - 1} are not among the table's {P}")
    y = rms_norm(x.reshape(T, width // C, C), weight, eps)
    a, b = y[..., : C // 2], y[..., C // 2 :]
    cos, sin = table.cos[start : start + T, None], table.sin[start : start + T, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
