"""QK-norm and rotary position embedding, head by head.      x [T, n*C] f32 -> [T, n, C] f32
Promised order: rms_norm of the head row, then a' = a*cos - b*sin and b' = b*cos + a*sin on NEOX pairs (i, i + C/2)."""

import hashlib
import math
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels import tiles
from exactmoe.kernels.errors import require
from exactmoe.kernels.launch import FAITHFUL
from exactmoe.kernels.numerics import inverse_rms
from exactmoe.kernels.tensors import require_f32


class RopeTable(NamedTuple):
    """Rotations of positions 0..P-1, the same for every layer and head."""

    cos: Tensor  # [P, C/2] f32
    sin: Tensor  # [P, C/2] f32

    def digest(self) -> str:
        """sha256 of the table's bytes, cos then sin: the one host computation a result depends on."""
        return hashlib.sha256(self.cos.cpu().numpy().tobytes() + self.sin.cpu().numpy().tobytes()).hexdigest()


def rope_table(n_positions: int, head_dim: int, base: float, device: torch.device) -> RopeTable:
    """Table for positions 0..n_positions-1 in binary64, rounded once to f32; base is the file's rope.freq_base."""
    require(head_dim > 0 and head_dim % 2 == 0, f"head width must be even, got {head_dim}")
    frequency = [math.pow(base, -2 * i / head_dim) for i in range(head_dim // 2)]
    angle = [p * f for p in range(n_positions) for f in frequency]

    def table(fn: object) -> Tensor:
        values = np.fromiter(map(fn, angle), np.float64, len(angle))  # type: ignore[call-overload]
        return torch.from_numpy(values.astype(np.float32).reshape(n_positions, head_dim // 2)).to(device)

    return RopeTable(table(math.cos), table(math.sin))


def qk_norm_rope(x: Tensor, weight: Tensor, eps: float, table: RopeTable, start: int) -> Tensor:
    """Normed and rotated heads [T, n, C] of x [T, n*C] at positions start..start+T-1; weight [C] is the head norm's.

    Bit-equal to parity.reference.rope.qk_norm_rope."""
    require_f32(x, "x", None, None)
    require(weight.ndim == 1 and weight.shape[0] > 0, f"head norm weight must be [C], got {list(weight.shape)}")
    C = weight.shape[0]
    require_f32(weight, "head norm weight", C)
    T = x.shape[0]
    require(x.shape[1] % C == 0, f"rows of {x.shape[1]} are not whole heads of {C}")
    require(table.cos.shape[1] * 2 == C, f"the rope table is for heads of {2 * table.cos.shape[1]}, not {C}")
    require(
        0 <= start and start + T <= table.cos.shape[0],
        f"positions {start}..{start + T - 1} lie outside the rope table of {table.cos.shape[0]}",
    )
    n = x.shape[1] // C
    out = torch.empty(T, n, C, dtype=torch.float32, device=x.device)
    if T * n:
        M = tiles.heads(T * n)
        _qk_norm_rope_kernel[(triton.cdiv(T * n, M),)](
            x, weight, *table, out, eps, start, T * n, HEADS=n, C=C, C2=triton.next_power_of_2(C), M=M,
            num_warps=4, **FAITHFUL,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["start", "rows"])
def _qk_norm_rope_kernel(
    x_ptr, w_ptr, cos_ptr, sin_ptr, out_ptr, eps, start, rows,
    HEADS: tl.constexpr, C: tl.constexpr, C2: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    live = row < rows
    at = row.to(tl.int64) * C
    c = tl.arange(0, C2)
    turn = load_turn(w_ptr + tl.zeros([1], tl.int32), cos_ptr, sin_ptr, live, start + row // HEADS, C, C2)
    y = normed_rotated(load_heads(x_ptr + at, live, C, C2), turn, eps, C, C2)
    tl.store(out_ptr + at[:, None] + c[None, :], y, live[:, None] & (c < C)[None, :])


@triton.jit
def _pair(C: tl.constexpr, C2: tl.constexpr):
    """The element that each of a head turns with."""
    half: tl.constexpr = C // 2
    c = tl.arange(0, C2)
    return tl.where(c < half, c + half, c - half)


@triton.jit
def load_turn(w_ptr, cos_ptr, sin_ptr, live, position, C: tl.constexpr, C2: tl.constexpr):
    """What heads [M] are normed and turned with: weights at `w_ptr` [1] or [M], their pairs', cos and sin."""
    half: tl.constexpr = C // 2
    c = tl.arange(0, C2)
    inside = live[:, None] & (c < C)[None, :]
    at = position.to(tl.int64)[:, None] * half + (c % half)[None, :]
    weight, pair = load_pair(w_ptr, C, C2)
    return weight, pair, tl.load(cos_ptr + at, inside, 0.0), tl.load(sin_ptr + at, inside, 0.0)


@triton.jit
def load_pair(w_ptr, C: tl.constexpr, C2: tl.constexpr):
    """Weights of a head's norm at `w_ptr` [1] or [M], and beside them those of the elements that theirs turn with."""
    c = tl.arange(0, C2)
    inside = (c < C)[None, :]
    return (
        tl.load(w_ptr[:, None] + c[None, :], inside, 0.0),
        tl.load(w_ptr[:, None] + _pair(C, C2)[None, :], inside, 0.0),
    )


@triton.jit
def load_heads(head_ptr, live, C: tl.constexpr, C2: tl.constexpr):
    """Heads at `head_ptr` [M], f32 [M, C2], and beside them the elements that theirs turn with."""
    c = tl.arange(0, C2)
    mask = live[:, None] & (c < C)[None, :]
    x = tl.load(head_ptr[:, None] + c[None, :], mask, 0.0)
    return x, tl.load(head_ptr[:, None] + _pair(C, C2)[None, :], mask, 0.0)


@triton.jit
def normed_rotated(heads, turn, eps, C: tl.constexpr, C2: tl.constexpr):
    """`load_heads`' tuple, normed and rotated with `load_turn`'s, as f32 [M, C2]."""
    x, pair = heads
    weight, weight_pair, cos, sin = turn
    r = inverse_rms(x, C, eps)[:, None]
    y, z = (x * r) * weight, (pair * r) * weight_pair
    return tl.where((tl.arange(0, C2) < C // 2)[None, :], y * cos - z * sin, y * cos + z * sin)
