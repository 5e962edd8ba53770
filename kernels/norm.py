"""RMSNorm, alone or with its activations quantised in the same pass.      x [T, K] f32 -> y [T, K] f32
Promised order: the mean of squares is a sum of integers; then sqrt, division, x*r, *weight, one rounding each."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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
        _rms_norm_kernel[(T,)](x, weight, y, eps, K=K, W=triton.next_power_of_2(K), num_warps=4, **FAITHFUL)
    return y


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, profile: str) -> NormedActivations:
    """RMSNorm of rows x [T, K], K a multiple of 256, and its activations in `profile`, in one launch."""
    _require_norm(x, weight)
    T, K = x.shape
    require(K % BLOCK == 0, f"activation width must be a multiple of {BLOCK}, got {K}")
    out = NormedActivations(torch.empty_like(x), empty_activations(T, K, profile, x.device))
    if T:
        _rms_norm_quantize_kernel[(T,)](
            x, weight, out.normed, *out.activations, eps, T,
            K=K, NB=triton.next_power_of_2(K // BLOCK), S=slices(profile), num_warps=4, **FAITHFUL,
        )  # fmt: skip
    return out


def _require_norm(x: Tensor, weight: Tensor) -> None:
    require_f32(x, "x", None, None)
    require(0 < x.shape[1] <= _MAX_WIDTH, f"a normed row must have 1 to {_MAX_WIDTH} elements, got {x.shape[1]}")
    require_f32(weight, "norm weight", x.shape[1])


@triton.jit
def _rms_norm_kernel(x_ptr, w_ptr, y_ptr, eps, K: tl.constexpr, W: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * K
    j = tl.arange(0, W)
    x = tl.load(x_ptr + row + j, j < K, 0.0)[None, :]
    y = (x * inverse_rms(x, K, eps)[:, None]) * tl.load(w_ptr + j, j < K, 0.0)[None, :]
    tl.store(y_ptr + row + j[None, :], y, (j < K)[None, :])


@triton.jit(do_not_specialize=["T"])
def _rms_norm_quantize_kernel(
    x_ptr, w_ptr, y_ptr, q_ptr, scale_ptr, sum_ptr, eps, T, K: tl.constexpr, NB: tl.constexpr, S: tl.constexpr
):
    t = tl.program_id(0)
    row = t.to(tl.int64) * K
    j = tl.arange(0, NB * 256)
    x = tl.load(x_ptr + row + j, j < K, 0.0)[None, :]
    y = (x * inverse_rms(x, K, eps)[:, None]) * tl.load(w_ptr + j, j < K, 0.0)[None, :]
    tl.store(y_ptr + row + j[None, :], y, (j < K)[None, :])
    b = tl.arange(0, NB)
    store_activations(
        tl.reshape(y, [NB, 256]), t * (K // 256) + b, b < K // 256, q_ptr, scale_ptr, sum_ptr, T * (K // 256), S
    )
