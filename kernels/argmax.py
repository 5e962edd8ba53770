"""Greedy choice.      logits [T, V] f32 -> token [T] i32
Promised order: the largest logit, equal ones to the smaller id (-0 equals +0); NaN is below everything."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels.errors import require
from exactmoe.kernels.launch import FAITHFUL
from exactmoe.kernels.numerics import ordered
from exactmoe.kernels.tensors import require_f32


def argmax(logits: Tensor) -> Tensor:
    """Id of the largest logit of each row; bit-equal to parity.reference.argmax.argmax."""
    require_f32(logits, "logits", None, None)
    T, V = logits.shape
    require(V > 0, "logits must have at least one column")
    out = torch.empty(T, dtype=torch.int32, device=logits.device)
    if T:
        _argmax_kernel[(T,)](logits, out, V=V, M=min(triton.next_power_of_2(V), 8192), num_warps=8, **FAITHFUL)
    return out


@triton.jit
def _argmax_kernel(x_ptr, out_ptr, V: tl.constexpr, M: tl.constexpr):
    t = tl.program_id(0)
    # One integer key orders by value, then by smaller id.
    best = tl.full([M], -9223372036854775808, tl.int64)
    for at in range(0, V, M):
        j = at + tl.arange(0, M)
        x = tl.load(x_ptr + t.to(tl.int64) * V + j, j < V, 0.0)
        key = (ordered(x).to(tl.int64) << 32) | (2147483647 - j).to(tl.int64)
        best = tl.maximum(best, tl.where(j < V, key, -9223372036854775808))
    top = tl.max(best, axis=0)
    tl.store(out_ptr + t, (2147483647 - (top & 0xFFFFFFFF)).to(tl.int32))
