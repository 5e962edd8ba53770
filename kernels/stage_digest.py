"""A hash of every token's row of a stage.      values [T, ...] f32 or i32 -> [T] i64
Promised order: none. Element i of a row gives mix(2^32 * (i + 1) + bits), and the row's hash is their sum mod 2^64.

mix is the finaliser of SplitMix64, a bijection of 64-bit integers, and no two (i, bits) give it the same integer. So a
changed, moved or exchanged element, a flipped sign and changes in pairs all change the sum, but for one chance in 2^64;
it is no defence against somebody who looks for a collision. Every NaN counts as the one NaN, 0x7fc00000."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels import tiles
from exactmoe.kernels.errors import require
from exactmoe.kernels.launch import FAITHFUL
from exactmoe.kernels.numerics import INF_BITS, NAN_BITS

_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64)  # as the signed integer of the same bits
_MIX_2 = tl.constexpr(0x94D049BB133111EB - 2**64)


def stage_digest(values: Tensor) -> Tensor:
    """Hash [T] of the rows of `values` [T, ...]; bit-equal to parity.reference.stage_digest.stage_digest."""
    require(values.dtype in (torch.float32, torch.int32), f"a stage must be f32 or i32, got {values.dtype}")
    require(values.ndim > 0, "a stage must have an axis of tokens")
    require(values.is_contiguous(), "a stage must be contiguous")
    T = values.shape[0]
    W = values.numel() // T if T else 0
    require(W < 2**31, f"rows of {W} elements are too long to hash")
    out = torch.empty(T, dtype=torch.int64, device=values.device)
    if T:
        M, BW = tiles.digest(T, max(W, 1))
        _digest_kernel[(triton.cdiv(T, M),)](
            values.view(torch.int32), out, T, W, FLOAT=values.dtype == torch.float32, M=M, BW=BW,
            num_warps=4, **FAITHFUL,
        )  # fmt: skip
    return out


@triton.jit
def _mix(z):
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _MIX_1  # i64 shifts bring the sign in; the masks take it out
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@triton.jit(do_not_specialize=["T", "W"])
def _digest_kernel(x_ptr, out_ptr, T, W, FLOAT: tl.constexpr, M: tl.constexpr, BW: tl.constexpr):
    t = tl.program_id(0) * M + tl.arange(0, M)
    total = tl.zeros([M], tl.int64)
    for at in range(0, W, BW):
        i = at + tl.arange(0, BW)
        live = (t < T)[:, None] & (i < W)[None, :]
        bits = tl.load(x_ptr + t.to(tl.int64)[:, None] * W + i[None, :], live, 0)
        if FLOAT:
            bits = tl.where((bits & 0x7FFFFFFF) > INF_BITS, NAN_BITS, bits)
        z = ((i + 1).to(tl.int64) << 32)[None, :] + (bits.to(tl.int64) & 0xFFFFFFFF)
        total += tl.sum(tl.where(live, _mix(z), 0), axis=1)
    tl.store(out_ptr + t, total, t < T)
