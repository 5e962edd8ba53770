"""Quantise activation rows.      x [T, K] f32 -> q [S, T, K] i8, scale [T, K/256] f32, group_sum [S, T, K/16] i16
Promised order: each block of 256 alone; the scale from the block's largest magnitude, every element rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels import tiles
from exactmoe.kernels.errors import require
from exactmoe.kernels.formats import BLOCK
from exactmoe.kernels.launch import FAITHFUL
from exactmoe.kernels.numerics import quantize_8, quantize_15
from exactmoe.kernels.tensors import PROFILES, Activations, require_f32, slices

__all__ = ["PROFILES", "empty_activations", "quantize"]


def quantize(x: Tensor, profile: str) -> Activations:
    """Quantise rows of x [T, K] f32, K a multiple of 256; bit-equal to parity.reference.quantize.quantize."""
    require_f32(x, "x", None, None)
    require(x.shape[1] % BLOCK == 0, f"activation width must be a multiple of {BLOCK}, got {x.shape[1]}")
    out = empty_activations(x.shape[0], x.shape[1], profile, x.device)
    blocks = x.numel() // BLOCK
    if blocks:
        M = tiles.rows_of_blocks(blocks)
        _quantize_kernel[(triton.cdiv(blocks, M),)](x, *out, blocks, S=slices(profile), M=M, num_warps=4, **FAITHFUL)
    return out


def empty_activations(t: int, k: int, profile: str, device: torch.device) -> Activations:
    """Unwritten activations for `t` rows of width `k`."""
    require(t * k < 2**31, f"{t} rows of width {k} are too many for one launch; use smaller chunks")
    s = slices(profile)
    return Activations(
        torch.empty(s, t, k, dtype=torch.int8, device=device),
        torch.empty(t, k // BLOCK, dtype=torch.float32, device=device),
        torch.empty(s, t, k // 16, dtype=torch.int16, device=device),
    )


@triton.jit
def store_activations(x, block, live, q_ptr, scale_ptr, sum_ptr, blocks, S: tl.constexpr):
    """Quantise tile x [M, 256], whose rows are activation blocks `block` of `blocks`, and store all its parts."""
    M: tl.constexpr = x.shape[0]
    j = tl.arange(0, 256)
    g = tl.arange(0, 16)
    if S == 1:
        q, scale = quantize_8(x)
        _store_slice(q, q_ptr, sum_ptr, block, live, j, g, M)
    else:
        v, scale = quantize_15(x)
        hi = (v + 64) >> 7
        _store_slice(hi, q_ptr, sum_ptr, block, live, j, g, M)
        _store_slice(v - 128 * hi, q_ptr + blocks * 256, sum_ptr + blocks * 16, block, live, j, g, M)
    tl.store(scale_ptr + block, scale, live)


@triton.jit
def _store_slice(q, q_ptr, sum_ptr, block, live, j, g, M: tl.constexpr):
    at = block.to(tl.int64)[:, None]
    tl.store(q_ptr + at * 256 + j[None, :], q.to(tl.int8), live[:, None])
    total = tl.sum(tl.reshape(q, [M, 16, 16]), axis=2)
    tl.store(sum_ptr + at * 16 + g[None, :], total.to(tl.int16), live[:, None])


@triton.jit(do_not_specialize=["blocks"])
def _quantize_kernel(x_ptr, q_ptr, scale_ptr, sum_ptr, blocks, S: tl.constexpr, M: tl.constexpr):
    block = tl.program_id(0) * M + tl.arange(0, M)
    live = block < blocks
    x = tl.load(x_ptr + block.to(tl.int64)[:, None] * 256 + tl.arange(0, 256)[None, :], live[:, None], 0.0)
    store_activations(x, block, live, q_ptr, scale_ptr, sum_ptr, blocks, S)
