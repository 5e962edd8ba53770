"""SwiGLU, alone or with its activations quantised in the same pass.      gate, up [R, F] f32 -> [R, F] f32
Promised order: exp, 1 + it, its reciprocal, times gate, times up, one rounding each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels import tiles
from exactmoe.kernels.errors import require
from exactmoe.kernels.formats import BLOCK
from exactmoe.kernels.launch import FAITHFUL
from exactmoe.kernels.numerics import swiglu_of
from exactmoe.kernels.quantize import empty_activations, store_activations
from exactmoe.kernels.tensors import Activations, require_f32, slices


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise; bit-equal to parity.reference.swiglu.swiglu."""
    _require_pair(gate, up)
    out = torch.empty_like(gate)
    n = gate.numel()
    if n:
        M = tiles.elementwise(n)
        _swiglu_kernel[(triton.cdiv(n, M),)](gate, up, out, n, M=M, num_warps=4, **FAITHFUL)
    return out


def swiglu_quantize(gate: Tensor, up: Tensor, profile: str) -> Activations:
    """`quantize(swiglu(gate, up), profile)` in one launch; F a multiple of 256."""
    _require_pair(gate, up)
    require(gate.shape[1] % BLOCK == 0, f"activation width must be a multiple of {BLOCK}, got {gate.shape[1]}")
    out = empty_activations(gate.shape[0], gate.shape[1], profile, gate.device)
    blocks = gate.numel() // BLOCK
    if blocks:
        M = tiles.rows_of_blocks(blocks)
        _swiglu_quantize_kernel[(triton.cdiv(blocks, M),)](
            gate, up, *out, blocks, S=slices(profile), M=M, num_warps=4, **FAITHFUL
        )
    return out


def _require_pair(gate: Tensor, up: Tensor) -> None:
    require_f32(gate, "gate", None, None)
    require_f32(up, "up", *gate.shape)
    require(gate.numel() < 2**31, f"{list(gate.shape)} is too large for one launch; use smaller chunks")


@triton.jit(do_not_specialize=["n"])
def _swiglu_kernel(gate_ptr, up_ptr, out_ptr, n, M: tl.constexpr):
    i = tl.program_id(0) * M + tl.arange(0, M)
    y = swiglu_of(tl.load(gate_ptr + i, i < n, 0.0), tl.load(up_ptr + i, i < n, 0.0))
    tl.store(out_ptr + i, y, i < n)


@triton.jit(do_not_specialize=["blocks"])
def _swiglu_quantize_kernel(gate_ptr, up_ptr, q_ptr, scale_ptr, sum_ptr, blocks, S: tl.constexpr, M: tl.constexpr):
    block = tl.program_id(0) * M + tl.arange(0, M)
    live = block < blocks
    at = block.to(tl.int64)[:, None] * 256 + tl.arange(0, 256)[None, :]
    y = swiglu_of(tl.load(gate_ptr + at, live[:, None], 0.0), tl.load(up_ptr + at, live[:, None], 0.0))
    store_activations(y, block, live, q_ptr, scale_ptr, sum_ptr, blocks, S)
