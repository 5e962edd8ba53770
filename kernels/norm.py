"""RMSNorm, alone or with its activations quantised in the same pass.      x [T, K] f32 -> y [T, K] f32
Promised order: the mean of squares is a sum of integers; then sqrt, division, x*r, *weight, one rounding each."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels import tiles
from exactmoe.kernels.errors import require
from exactmoe.kernels.formats import BLOCK
from exactmoe.kernels.launch import FAITHFUL
from exactmoe.kernels.numerics import inverse_rms
from exactmoe.kernels.quantize import empty_activations, store_activations
from exactmoe.kernels.tensors import Activations, require_f32, slices

_MAX_WIDTH = 16384  # beyond it the integer sum of squares could leave int64


class NormedActivations(NamedTuple):
    """A normed row twice: as f32 for the router, quantised for the matmuls."""

    normed: Tensor  # [T, K] f32
    activations: Activations


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of rows x [T, K] with weight [K]; bit-equal to parity.reference.norm.rms_norm."""
    _require_norm(x, weight)
    T, K = x.shape
    y = torch.empty_like(x)
    if T:
        M = tiles.norm_rows(T)
        _rms_norm_kernel[(triton.cdiv(T, M),)](
            x, weight, y, eps, T, K=K, W=triton.next_power_of_2(K), M=M, num_warps=4, **FAITHFUL
        )
    return y


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, profile: str) -> NormedActivations:
    """RMSNorm of rows x [T, K], K a multiple of 256, and its activations in `profile`, in one launch."""
    _require_norm(x, weight)
    T, K = x.shape
    require(K % BLOCK == 0, f"activation width must be a multiple of {BLOCK}, got {K}")
    out = NormedActivations(torch.empty_like(x), empty_activations(T, K, profile, x.device))
    if T:
        M = tiles.norm_rows(T)
        _rms_norm_quantize_kernel[(triton.cdiv(T, M),)](
            x, weight, out.normed, *out.activations, eps, T,
            K=K, NB=triton.next_power_of_2(K // BLOCK), S=slices(profile), M=M, num_warps=4, **FAITHFUL,
        )  # fmt: skip
    return out


def _require_norm(x: Tensor, weight: Tensor) -> None:
    require_f32(x, "x", None, None)
    require(0 < x.shape[1] <= _MAX_WIDTH, f"a normed row must have 1 to {_MAX_WIDTH} elements, got {x.shape[1]}")
    require_f32(weight, "norm weight", x.shape[1])


@triton.jit
def _normed(x_ptr, w_ptr, eps, t, T, K: tl.constexpr, W: tl.constexpr):
    """Normed rows `t` [M] as a tile [M, W], its offsets and its mask."""
    j = tl.arange(0, W)
    mask = (t < T)[:, None] & (j < K)[None, :]
    at = t.to(tl.int64)[:, None] * K + j[None, :]
    x = tl.load(x_ptr + at, mask, 0.0)
    return (x * inverse_rms(x, K, eps)[:, None]) * tl.load(w_ptr + j, j < K, 0.0)[None, :], at, mask


@triton.jit(do_not_specialize=["T"])
def _rms_norm_kernel(x_ptr, w_ptr, y_ptr, eps, T, K: tl.constexpr, W: tl.constexpr, M: tl.constexpr):
    y, at, mask = _normed(x_ptr, w_ptr, eps, tl.program_id(0) * M + tl.arange(0, M), T, K, W)
    tl.store(y_ptr + at, y, mask)


@triton.jit(do_not_specialize=["T"])
def _rms_norm_quantize_kernel(
    x_ptr, w_ptr, y_ptr, q_ptr, scale_ptr, sum_ptr, eps, T,
    K: tl.constexpr, NB: tl.constexpr, S: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = K // 256
    y, at, mask = _normed(x_ptr, w_ptr, eps, tl.program_id(0) * M + tl.arange(0, M), T, K, NB * 256)
    tl.store(y_ptr + at, y, mask)
    b = tl.arange(0, M * NB)
    t = tl.program_id(0) * M + b // NB
    live = (t < T) & (b % NB < blocks)
    store_activations(tl.reshape(y, [M * NB, 256]), t * blocks + b % NB, live, q_ptr, scale_ptr, sum_ptr, T * blocks, S)
