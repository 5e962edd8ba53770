"""Greedy choice.      logits [T, V] f32 -> token [T] i32
Promised order: the largest logit, equal ones to the smaller id (-0 equals +0); NaN is below everything."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels import tiles
from exactmoe.kernels.dependent import DEPENDENT, finish_wait, release_next
from exactmoe.kernels.errors import require
from exactmoe.kernels.launch import FAITHFUL
from exactmoe.kernels.numerics import ordered
from exactmoe.kernels.tensors import require_f32


def argmax(logits: Tensor) -> Tensor:
    """Id of the largest logit of each row; bit-equal to parity.reference.argmax.argmax."""
    require_f32(logits, "logits", None, None)
    out = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)
    _argmax(logits, out, None)
    return out


def choose(logits: Tensor, token: Tensor, position: Tensor) -> None:
    """Write the id of the largest logit [V] to `token` [1] i32, and add one to `position` [1] i32, on the device.

    The id is bit-equal to parity.reference.argmax.argmax."""
    require_f32(logits, "logits", None)
    for name, value in (("token", token), ("position", position)):
        require(value.dtype == torch.int32 and value.numel() == 1, f"{name} must be one i32")
    _argmax(logits[None], token, position)


def _argmax(logits: Tensor, out: Tensor, position: Tensor | None) -> None:
    T, V = logits.shape
    require(V > 0, "logits must have at least one column")
    if T:
        M = tiles.argmax(V)
        parts = triton.cdiv(V, M)
        best = torch.empty(T, parts, dtype=torch.int64, device=logits.device)
        _best_kernel[(T, parts)](logits, best, V=V, M=M, num_warps=4, **DEPENDENT, **FAITHFUL)
        _argmax_kernel[(T,)](
            best, out, position, PARTS=parts, N=triton.next_power_of_2(parts), num_warps=4, **DEPENDENT, **FAITHFUL
        )


@triton.jit
def _best_kernel(x_ptr, best_ptr, V: tl.constexpr, M: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * M + tl.arange(0, M)
    finish_wait()
    release_next()
    x = tl.load(x_ptr + t * V + j, j < V, 0.0)
    # One integer key orders by value, then by smaller id.
    key = (ordered(x).to(tl.int64) << 32) | (2147483647 - j).to(tl.int64)
    best = tl.max(tl.where(j < V, key, -9223372036854775808), axis=0)
    tl.store(best_ptr + t * tl.num_programs(1) + tl.program_id(1), best)


@triton.jit
def _argmax_kernel(best_ptr, out_ptr, position_ptr, PARTS: tl.constexpr, N: tl.constexpr):
    t = tl.program_id(0)
    i = tl.arange(0, N)
    finish_wait()
    release_next()
    top = tl.max(tl.load(best_ptr + t.to(tl.int64) * PARTS + i, i < PARTS, -9223372036854775808), axis=0)
    tl.store(out_ptr + t, (2147483647 - (top & 0xFFFFFFFF)).to(tl.int32))
    if position_ptr is not None:
        tl.store(position_ptr, tl.load(position_ptr) + 1)
