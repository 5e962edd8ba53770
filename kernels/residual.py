"""The residual add.      a, b [T, D] f32 -> a + b, one rounding an element"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels import tiles
from exactmoe.kernels.errors import require
from exactmoe.kernels.launch import FAITHFUL
from exactmoe.kernels.tensors import require_f32


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b, elementwise; bit-equal to parity.reference.residual.add."""
    require_f32(a, "a", None, None)
    require_f32(b, "b", *a.shape)
    require(a.numel() < 2**31, f"{list(a.shape)} is too large for one launch; use smaller chunks")
    out = torch.empty_like(a)
    n = a.numel()
    if n:
        M = tiles.elementwise(n)
        _add_kernel[(triton.cdiv(n, M),)](a, b, out, n, M=M, num_warps=4, **FAITHFUL)
    return out


@triton.jit(do_not_specialize=["n"])
def _add_kernel(a_ptr, b_ptr, out_ptr, n, M: tl.constexpr):
    i = tl.program_id(0) * M + tl.arange(0, M)
    tl.store(out_ptr + i, tl.load(a_ptr + i, i < n, 0.0) + tl.load(b_ptr + i, i < n, 0.0), i < n)
