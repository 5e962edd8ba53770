"""Group routed rows by expert.      expert [T, A] i32 -> order [R] i32, offset [E+1] i32,  R = T*A, row r = t*A + rank
Promised order: rows of one expert stand in ascending r (stable); an expert with no row keeps an empty range."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels import tiles
from exactmoe.kernels.errors import require
from exactmoe.kernels.launch import FAITHFUL
from exactmoe.kernels.tensors import require_shape


class Dispatch(NamedTuple):
    """Rows grouped by expert: those of expert e are order[offset[e]:offset[e+1]]."""

    order: Tensor  # [R] i32
    offset: Tensor  # [E+1] i32


def dispatch(expert: Tensor, n_experts: int) -> Dispatch:
    """Stable grouping of routed rows, ids in 0..n_experts-1; bit-equal to parity.reference.dispatch.dispatch."""
    require(expert.dtype == torch.int32, f"expert ids must be i32, got {expert.dtype}")
    require_shape(expert, "expert ids", None, None)
    require(n_experts > 0, f"at least one expert, got {n_experts}")
    R = expert.numel()
    out = Dispatch(
        torch.empty(R, dtype=torch.int32, device=expert.device),
        torch.empty(n_experts + 1, dtype=torch.int32, device=expert.device),
    )
    _dispatch_kernel[(n_experts + 1,)](expert, *out, R, M=tiles.dispatch(R), num_warps=4, **FAITHFUL)
    return out


@triton.jit(do_not_specialize=["R"])
def _dispatch_kernel(expert_ptr, order_ptr, offset_ptr, R, M: tl.constexpr):
    e = tl.program_id(0)
    below = tl.zeros([M], tl.int32)
    for at in range(0, R, M):
        r = at + tl.arange(0, M)
        below += (tl.load(expert_ptr + r, r < R, 1 << 30) < e).to(tl.int32)
    slot = tl.sum(below, axis=0)
    tl.store(offset_ptr + e, slot)
    for at in range(0, R, M):
        r = at + tl.arange(0, M)
        mine = tl.load(expert_ptr + r, r < R, 1 << 30) == e
        count = mine.to(tl.int32)
        tl.store(order_ptr + slot + tl.cumsum(count, axis=0) - count, r, mine)
        slot += tl.sum(count, axis=0)
