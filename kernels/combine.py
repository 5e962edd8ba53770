"""Sum the active experts' outputs.      expert_out [R, D] f32, weight [T, A] f32 -> [T, D] f32,  R = T*A
Promised order: from zero, rank 0 first: one rounding for the product, one for the sum."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels import tiles
from exactmoe.kernels.errors import require
from exactmoe.kernels.launch import FAITHFUL
from exactmoe.kernels.tensors import require_f32


def combine(expert_out: Tensor, weight: Tensor) -> Tensor:
    """Left fold over rank k of weight[t, k] * expert_out[t*A + k]; bit-equal to parity.reference.combine.combine."""
    require_f32(weight, "weight", None, None)
    T, A = weight.shape
    require(A > 0, "weight must have at least one rank")
    require_f32(expert_out, "expert_out", T * A, None)
    D = expert_out.shape[1]
    require(T * D < 2**31, f"[{T}, {D}] is too large for one launch; use smaller chunks")
    out = torch.empty(T, D, dtype=torch.float32, device=expert_out.device)
    n = out.numel()
    if n:
        M = tiles.elementwise(n)
        _combine_kernel[(triton.cdiv(n, M),)](expert_out, weight, out, n, D=D, A=A, M=M, num_warps=4, **FAITHFUL)
    return out


@triton.jit(do_not_specialize=["n"])
def _combine_kernel(y_ptr, w_ptr, out_ptr, n, D: tl.constexpr, A: tl.constexpr, M: tl.constexpr):
    i = tl.program_id(0) * M + tl.arange(0, M)
    live = i < n
    t = i // D
    row = t.to(tl.int64) * A
    acc = tl.zeros([M], tl.float32)
    for k in tl.static_range(A):
        w = tl.load(w_ptr + row + k, live, 0.0)
        acc = acc + w * tl.load(y_ptr + (row + k) * D + i % D, live, 0.0)
    tl.store(out_ptr + i, acc, live)
